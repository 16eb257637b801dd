"""Mesh, logical-axis rules and the shardings derived from them.

Arrays name their axes logically ("embed", "batch"); a table maps each logical axis to the mesh axis that shards it. A
`Layout` (bound by gin) holds the table and the shape of the mesh; with devices it becomes a `Partitioner`.
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

from sbs_jax import checks

AXES = ("slice", "data", "fsdp", "tensor")
Rules = Mapping[str, str | tuple[str, ...] | None]

# Logical axis to mesh axis. If two axes of an array map to the same mesh axis, the first one gets it.
RULES: Rules = {
    # Parameters, and the optimizer state that mirrors them.
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "joined_kv": "tensor",
    "heads": None,
    "kv": None,  # within a head
    "relpos_buckets": None,
    "layers": None,
    "adapter": None,  # the narrow side of a LoRA or adapter, and the length of a prompt or prefix
    "blocks": None,  # blocks of rows of a quantized kernel
    # Batches and activations.
    "batch": ("slice", "data", "fsdp"),
    "length": None,
    "activation_embed": None,
    "activation_mlp": "tensor",
    "activation_heads": "tensor",
    "activation_vocab": "tensor",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Number of devices per mesh axis, and changes to the rules.

    `slice` counts pods joined by the data-center network, `data` copies within a pod, `fsdp` shards of parameters and
    optimizer state, `tensor` splits of the matrices. Rows of a batch are sharded over the first three. One number may
    be -1: all remaining devices. `rules` replace entries of `RULES`.
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
            raise ValueError(f"Layout has {shape}; expected at most one -1 (all remaining devices).")
        for name, axes in self.rules.items():
            checks.choice("A logical axis of Layout.rules", name, RULES)
            for axis in _as_tuple(axes):
                checks.choice(f"Mesh axis of {name!r} in Layout.rules", axis, AXES)

    @property
    def shape(self) -> dict[str, int]:
        """Maps each mesh axis to its requested number of devices."""
        return {axis: getattr(self, axis) for axis in AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Computes the sizes of the mesh axes on this many devices. ValueError if they do not fit."""
        fixed = math.prod(n for n in self.shape.values() if n != -1)
        sizes = {axis: devices // fixed if n == -1 else n for axis, n in self.shape.items()}
        if math.prod(sizes.values()) != devices:
            axis = next((a for a, n in self.shape.items() if n == -1), "fsdp")
            nearest = self._nearest(axis, devices)
            raise ValueError(
                f"The mesh {self.shape} does not fit {devices} devices: its axes must multiply to {devices}; the "
                f"nearest that does: {nearest}. Choose it, another mesh (gin_configs/meshes/) or another machine."
            )
        return sizes

    def _nearest(self, free: str, devices: int) -> dict[str, int]:
        """Finds a mesh that fits: each fixed axis shrinks to the largest possible divisor of the remaining devices."""
        sizes, left = {}, devices
        for axis, n in self.shape.items():
            if axis != free:
                sizes[axis] = nearest_divisor(left, n)
                left //= sizes[axis]
        return {axis: left if axis == free else sizes[axis] for axis in AXES}

    def partitioner(self, devices: Sequence[Any] | None = None) -> "Partitioner":
        """Builds the partitioner on all devices, or on the given ones, which may belong to an absent machine."""
        devices = jax.devices() if devices is None else devices
        sizes = self.sizes(len(devices))
        # Auto: the compiler propagates shardings. Newer JAX's default would make every operation declare its own.
        types = (AxisType.Auto,) * len(sizes)
        slices = {getattr(device, "slice_index", None) for device in devices}
        if sizes["slice"] > 1 and len(slices) > 1:
            if len(slices) != sizes["slice"]:
                raise ValueError(
                    f"Layout.slice is {sizes['slice']}, but the devices form {len(slices)} slices; set slice to "
                    f"{len(slices)}."
                )
            within = (1, *(sizes[axis] for axis in AXES[1:]))
            array = mesh_utils.create_hybrid_device_mesh(within, (sizes["slice"], 1, 1, 1), devices)
            mesh = Mesh(array, AXES, axis_types=types)
        else:
            mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
        return Partitioner(mesh, {**RULES, **self.rules})


# Every device has a copy of the parameters and a part of the batch's rows.
DATA_PARALLEL = Layout(slice=1, data=-1, fsdp=1, tensor=1)
# Every device has a part of the parameters and of the batch's rows.
FSDP = Layout(slice=1, data=1, fsdp=-1, tensor=1)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Mesh of devices and table of logical axes, from which shardings are derived."""

    mesh: Mesh
    rules: Rules

    @property
    def sizes(self) -> dict[str, int]:
        """Maps each mesh axis to its number of devices."""
        return dict(self.mesh.shape)

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Returns the partition of an array with these logical axes."""
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
        """Returns the sharding of an array with these logical axes; without axes, a copy on every device."""
        return NamedSharding(self.mesh, self.spec(axes))

    @property
    def replicated(self) -> NamedSharding:
        """Returns the sharding with a copy on every device."""
        return self.sharding(())

    @property
    def batch(self) -> NamedSharding:
        """Returns the sharding of rows over the data-parallel axes."""
        return self.sharding(("batch",))

    @property
    def data_parallel_size(self) -> int:
        """Counts the shards of a batch's rows."""
        return math.prod(self.mesh.shape[axis] for axis in _as_tuple(self.rules["batch"]))

    @property
    def compiler_options(self) -> dict[str, str]:
        """Returns XLA options for a training step on these devices."""
        if self.mesh.devices.flat[0].platform != "tpu":
            return {}
        # This stops XLA from computing products as loops over shards. Eight products of an eighth's width take 1.5
        # times as long as
        # one on small models, and delay gradients (docs/experiments.md).
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}

    def shardings(
        self, tree: Any, *, parameters: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, tuple[str, ...]]
    ) -> Any:
        """Returns shardings of a tree of abstract arrays: parameters, or an optimizer state that mirrors them.

        A leaf belongs to the parameter whose name is the last such key on its path (optimizers keep dictionaries with
        the parameters' names). It takes that parameter's partition if it has the same shape, and is replicated
        otherwise (step counts, Adafactor's row and column statistics). `axes` are the parameters' logical axes.
        """

        def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in axes]
            if not names or leaf.shape != parameters[names[-1]].shape:
                return self.replicated
            name = names[-1]
            partition = self.spec(axes[name])
            for logical, mesh_axes, size in zip(axes[name], partition, leaf.shape, strict=True):
                shards = math.prod(self.mesh.shape[axis] for axis in _as_tuple(mesh_axes))
                if size % shards:
                    raise ValueError(
                        f"{name} has shape {tuple(leaf.shape)}, whose axis {logical!r} of {size} does not divide by "
                        f"{shards} of mesh axis {mesh_axes!r}; the nearest that divides it is "
                        f"{nearest_divisor(size, shards)}. Choose another mesh (gin_configs/meshes/)."
                    )
            return NamedSharding(self.mesh, partition)

        return jax.tree_util.tree_map_with_path(one, tree)

    def with_shardings(
        self, tree: Any, *, parameters: Mapping[str, jax.ShapeDtypeStruct], axes: Mapping[str, tuple[str, ...]]
    ) -> Any:
        """Adds `shardings` to a tree of abstract arrays."""
        shardings = self.shardings(tree, parameters=parameters, axes=axes)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
        )

    def local_rows(self, batch_size: int, *, devices: Iterable[Any] | None = None) -> np.ndarray:
        """Returns the rows of a global batch on some devices (default: this process's), ascending, once each.

        With a tensor axis across hosts, several hosts have the same rows. With several slices or an unusual order of
        devices, a host's rows need not be adjacent.
        """
        size = batch_size // self.data_parallel_size
        return (np.asarray(self._batch_shards(devices))[:, None] * size + np.arange(size)).reshape(-1)

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Turns host arrays `[rows, ..]` into global arrays with rows over the data-parallel axes.

        The host arrays hold only this process's rows, in the order of `local_rows`.
        """
        shards = self._batch_shards(None)
        place_of = {shard: place for place, shard in enumerate(shards)}

        def put(rows: np.ndarray) -> jax.Array:
            size, rest = divmod(len(rows), len(shards))
            if rest:
                raise ValueError(f"Got {len(rows)} rows; expected a multiple of this process's {len(shards)} shards.")

            def shard_at(index: Any) -> np.ndarray:
                place = place_of[(index[0].start or 0) // size]
                return rows[place * size : (place + 1) * size]

            shape = (size * self.data_parallel_size, *rows.shape[1:])
            return jax.make_array_from_callback(shape, self.batch, shard_at)

        return {name: put(rows) for name, rows in batch.items()}

    def _batch_shards(self, devices: Iterable[Any] | None) -> list[int]:
        """Returns the numbers of a batch's shards on these devices, ascending."""
        shard_of = self.batch.devices_indices_map((self.data_parallel_size,))
        mine = self.batch.addressable_devices if devices is None else devices
        return sorted({shard_of[device][0].start or 0 for device in mine})

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes `constrain` apply this table to all functions traced inside the context."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


_active: contextvars.ContextVar[Partitioner | None] = contextvars.ContextVar("active", default=None)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Shards `x` by these logical axes inside `Partitioner.active()`; elsewhere does nothing.

    Left to itself, the compiler shards activations like the parameters they meet, and moves whole batches.
    """
    partitioner = _active.get()
    if partitioner is None:
        return x
    return jax.lax.with_sharding_constraint(x, partitioner.sharding(axes))


# Logical axes of a parameter in use: `tensor` still shards it, `fsdp` does not.
_IN_USE = {
    "vocab": "activation_vocab",
    "embed": "activation_embed",
    "mlp": "activation_mlp",
    "joined_kv": "activation_heads",
    "adapter": "adapter",
}


def gather_frozen(parameter: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Gathers a parameter's `fsdp` shards for use."""
    return constrain(parameter, tuple(_IN_USE[axis] for axis in axes))


def gather(parameter: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Gathers a parameter's `fsdp` shards for use; its gradient is summed directly into the shards.

    This makes the compiler gather one layer's weights at a time, in the dtype of their use. Left to itself it may cut a
    product into loops over shards, or sum whole gradients on every device (docs/experiments.md).
    """
    found: Any = _gather(parameter, axes)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(parameter: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return gather_frozen(parameter, axes)


def _gather_forward(parameter: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return _gather(parameter, axes), None


def _gather_backward(axes: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, axes),)


_gather.defvjp(_gather_forward, _gather_backward)


def shard_count(axis: str) -> int:
    """Returns the number of shards of a logical axis inside `Partitioner.active()`; elsewhere 1."""
    partitioner = _active.get()
    if partitioner is None:
        return 1
    return math.prod(partitioner.mesh.shape[each] for each in _as_tuple(partitioner.rules[axis]))


def platform() -> str:
    """Returns the platform that a traced function will run on: that of `Partitioner.active()`, else JAX's."""
    partitioner = _active.get()
    return jax.default_backend() if partitioner is None else partitioner.mesh.devices.flat[0].platform


def nearest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of `number` that is at most `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
