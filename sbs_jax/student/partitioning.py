"""Where arrays live: the mesh, one table from logical to mesh axes, and what follows from them.

Arrays name their axes by what they are ("embed", "batch"); the table says which mesh axis cuts each of them. A
`Layout` (what gin binds) is the table and the shape of the mesh; on given devices it becomes a `Partitioner`.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("slice", "data", "fsdp", "tensor")
Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axis to mesh axis. Of an array's axes, the first that asks for a mesh axis gets it.
RULES: Rules = {
    # Of parameters, and of the optimiser state that mirrors them.
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "joined_kv": "tensor",
    "heads": None,
    "relpos_buckets": None,
    "layers": None,
    "adapter": None,  # the narrow side of a LoRA or adapter, and the length of a prompt or prefix
    "blocks": None,  # of a quantised kernel's rows
    # Of batches and activations.
    "batch": ("slice", "data", "fsdp"),
    "length": None,
    "activation_embed": None,
    "activation_mlp": "tensor",
    "activation_heads": "tensor",
    "activation_vocab": "tensor",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Devices per mesh axis, and the table of logical axes.

    `slice` counts pods joined by the data-centre network, `data` copies within one, `fsdp` shards of parameters and
    optimiser state, `tensor` splits of the matrices; rows of a batch are cut over the first three. One of them may be
    -1: all devices that are left. `rules` replace entries of `RULES`.
    """

    slice: int
    data: int
    fsdp: int
    tensor: int
    rules: Rules = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.shape
        if any(not isinstance(n, int) or isinstance(n, bool) or n == 0 or n < -1 for n in shape.values()):
            raise ValueError(f"Layout has {shape}; expected whole numbers of at least 1, or one -1.")
        if list(shape.values()).count(-1) > 1:
            raise ValueError(f"Layout has {shape}; only one axis can be -1 (all devices that are left).")
        for name, axes in self.rules.items():
            if name not in RULES:
                raise ValueError(f"Layout.rules has {name!r}; logical axes are {', '.join(RULES)}.")
            wrong = [axis for axis in _as_tuple(axes) if axis not in AXES]
            if wrong:
                raise ValueError(f"Layout.rules puts {name!r} on {wrong}; mesh axes are {', '.join(AXES)}.")

    @property
    def shape(self) -> dict[str, int]:
        """Mesh axis to its number of devices, as asked for."""
        return {axis: getattr(self, axis) for axis in AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Sizes of the axes on this many devices."""
        fixed = math.prod(n for n in self.shape.values() if n != -1)
        sizes = {axis: devices // fixed if n == -1 else n for axis, n in self.shape.items()}
        if math.prod(sizes.values()) != devices:
            axis = next((a for a, n in self.shape.items() if n == -1), "fsdp")
            nearest = self._nearest(axis, devices)
            raise ValueError(
                f"The mesh {self.shape} does not fit {devices} devices; its axes must multiply to {devices}. The "
                f"nearest that does: {nearest}. Choose it, another mesh (gin_configs/meshes/) or another machine."
            )
        return sizes

    def _nearest(self, free: str, devices: int) -> dict[str, int]:
        """The mesh with the fewest changes: every fixed axis as large a divisor of what is left as it can be."""
        sizes, left = {}, devices
        for axis, n in self.shape.items():
            if axis != free:
                sizes[axis] = nearest_divisor(left, n)
                left //= sizes[axis]
        return {axis: left if axis == free else sizes[axis] for axis in AXES}

    def partitioner(self, devices: Sequence[Any] | None = None) -> "Partitioner":
        """This layout on all devices, or on those given (also those of a machine that is not there)."""
        devices = jax.devices() if devices is None else devices
        sizes = self.sizes(len(devices))
        # Auto: the compiler propagates shardings; the default of newer JAX would make every operation declare its own.
        types = (AxisType.Auto,) * len(sizes)
        slices = {getattr(device, "slice_index", None) for device in devices}
        if sizes["slice"] > 1 and len(slices) > 1:
            if len(slices) != sizes["slice"]:
                raise ValueError(
                    f"Layout.slice is {sizes['slice']}, and the devices form {len(slices)} slices; set slice to "
                    f"{len(slices)}."
                )
            within = (1, *(sizes[axis] for axis in AXES[1:]))
            array = mesh_utils.create_hybrid_device_mesh(within, (sizes["slice"], 1, 1, 1), devices)
            mesh = Mesh(array, AXES, axis_types=types)
        else:
            mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
        return Partitioner(mesh, {**RULES, **self.rules})


# A copy of the parameters on every device, which share the rows of a batch.
DATA_PARALLEL = Layout(slice=1, data=-1, fsdp=1, tensor=1)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh of devices and the table of logical axes."""

    mesh: Mesh
    rules: Rules

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis to its number of devices."""
        return dict(self.mesh.shape)

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Partition of an array with these logical axes."""
        unknown = [axis for axis in axes if axis is not None and axis not in self.rules]
        if unknown:
            raise ValueError(f"Logical axes {unknown} are not in the table of {__name__}; it has {sorted(self.rules)}.")
        taken: set[str] = set()
        entries = []
        for axis in axes:
            free = tuple(a for a in _as_tuple(None if axis is None else self.rules[axis]) if a not in taken)
            taken.update(free)
            entries.append(free if len(free) > 1 else free[0] if free else None)
        return PartitionSpec(*entries)

    def sharding(self, axes: Sequence[str | None]) -> NamedSharding:
        """Sharding of an array with these logical axes; without axes, a copy on every device."""
        return NamedSharding(self.mesh, self.spec(axes))

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device."""
        return self.sharding(())

    @property
    def batch(self) -> NamedSharding:
        """Rows over the data-parallel axes."""
        return self.sharding(("batch",))

    @property
    def data_parallel_size(self) -> int:
        """Number of pieces that the rows of a batch are cut into."""
        return math.prod(self.mesh.shape[axis] for axis in _as_tuple(self.rules["batch"]))

    @property
    def compiler_options(self) -> dict[str, str]:
        """Options of XLA for a training step on these devices."""
        if self.mesh.devices.flat[0].platform != "tpu":
            return {}
        # Off: products cut into a loop over shards. It trades whole products for eight of an eighth's width, which
        # cost half as much again on small models, and hold gradients up (docs/experiments.md).
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

    def shardings(
        self, tree: Any, *, parameters: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, tuple[str, ...]]
    ) -> Any:
        """Shardings of a tree of abstract arrays: parameters, or an optimiser state that mirrors them.

        A leaf belongs to the parameter whose name is the last such key on its path (optimisers keep dictionaries with
        the parameters' names); it takes that parameter's partition if it has its shape, and is replicated otherwise
        (step counts, Adafactor's row and column statistics). `axes` are the parameters' logical ones.
        """

        def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in axes]
            if not names or leaf.shape != parameters[names[-1]].shape:
                return self.replicated
            name = names[-1]
            partition = self.spec(axes[name])
            for logical, mesh_axes, size in zip(axes[name], partition, leaf.shape, strict=True):
                pieces = math.prod(self.mesh.shape[axis] for axis in _as_tuple(mesh_axes))
                if size % pieces:
                    raise ValueError(
                        f"{name} has shape {tuple(leaf.shape)}, whose axis {logical!r} of {size} does not divide by "
                        f"{pieces} of mesh axis {mesh_axes!r}; the nearest that divides it is "
                        f"{nearest_divisor(size, pieces)}. Choose another mesh (gin_configs/meshes/)."
                    )
            return NamedSharding(self.mesh, partition)

        return jax.tree_util.tree_map_with_path(one, tree)

    def placed(
        self, tree: Any, *, parameters: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, tuple[str, ...]]
    ) -> Any:
        """The abstract arrays with their `shardings`."""
        shardings = self.shardings(tree, parameters=parameters, axes=axes)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
        )

    def local_rows(self, batch_size: int, *, devices: Iterable[Any] | None = None) -> np.ndarray:
        """The rows of a global batch that some devices hold (by default those of this process), ascending, once each.

        With a tensor axis across hosts several of them hold the same rows; with several slices or an unusual order of
        devices a host's rows need not be neighbours.
        """
        size = batch_size // self.data_parallel_size
        return (np.asarray(self._pieces(devices))[:, None] * size + np.arange(size)).reshape(-1)

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Host arrays `[rows, ..]` to global arrays, rows over the data-parallel axes.

        The host arrays hold this process's rows alone, in the order of `local_rows`.
        """
        pieces = self._pieces(None)
        first_row = {piece: place for place, piece in enumerate(pieces)}

        def put(rows: np.ndarray) -> jax.Array:
            size, rest = divmod(len(rows), len(pieces))
            if rest:
                raise ValueError(f"Got {len(rows)} rows; expected a multiple of this process's {len(pieces)} pieces.")

            def piece_at(index: Any) -> np.ndarray:
                place = first_row[(index[0].start or 0) // size]
                return rows[place * size : (place + 1) * size]

            shape = (size * self.data_parallel_size, *rows.shape[1:])
            return jax.make_array_from_callback(shape, self.batch, piece_at)

        return {name: put(rows) for name, rows in batch.items()}

    def _pieces(self, devices: Iterable[Any] | None) -> list[int]:
        """Which of the pieces that a batch is cut into lie on these devices, ascending."""
        places = self.batch.devices_indices_map((self.data_parallel_size,))
        mine = self.batch.addressable_devices if devices is None else devices
        return sorted({places[device][0].start or 0 for device in mine})

    @contextlib.contextmanager
    def constraining(self) -> Iterator[None]:
        """While a function is traced within, `constrain` holds activations to this table; elsewhere it does nothing."""
        token = _constraining.set(self)
        try:
            yield
        finally:
            _constraining.reset(token)


_constraining: contextvars.ContextVar[Partitioner | None] = contextvars.ContextVar("constraining", default=None)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`x` held to the partition of these logical axes, where a `Partitioner` is `constraining`.

    Without it the compiler, free to choose, cuts activations like the parameters they meet and moves whole batches.
    """
    partitioner = _constraining.get()
    if partitioner is None:
        return x
    return jax.lax.with_sharding_constraint(x, partitioner.sharding(axes))


# Axes of a parameter to those it has where it is used: whole, but for what `tensor` splits.
_IN_USE = {
    "vocab": "activation_vocab",
    "embed": "activation_embed",
    "mlp": "activation_mlp",
    "joined_kv": "activation_heads",
    "adapter": "adapter",
}


def whole(parameter: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A parameter with these logical axes, made whole for use, but for what `tensor` splits."""
    return constrain(parameter, tuple(_IN_USE[axis] for axis in axes))


def gathered(parameter: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A parameter with these logical axes, made whole for use; its gradient is summed straight into its shards.

    Said so, the compiler gathers one layer's weights in the type they are used in; left to itself it may cut a product
    into loops over shards, or sum whole gradients on every device (docs/experiments.md).
    """
    whole: Any = _gathered(parameter, axes)
    return whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(parameter: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return whole(parameter, axes)


def _gathered_forward(parameter: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return _gathered(parameter, axes), None


def _gathered_backward(axes: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, axes),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def pieces(axis: str) -> int:
    """Into how many a logical axis is cut where a `Partitioner` is `constraining`; elsewhere 1."""
    partitioner = _constraining.get()
    if partitioner is None:
        return 1
    return math.prod(partitioner.mesh.shape[each] for each in _as_tuple(partitioner.rules[axis]))


def platform() -> str:
    """What a function being traced will run on: the platform of a `Partitioner` that is `constraining`, else JAX's."""
    partitioner = _constraining.get()
    return jax.default_backend() if partitioner is None else partitioner.mesh.devices.flat[0].platform


def nearest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
