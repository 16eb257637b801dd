"""Where arrays live: the mesh, one table from logical to mesh axes, and what follows from them.

Arrays name their axes by what they are ("embed", "batch"); the table says which mesh axis cuts each of them. A
`Layout` (what gin binds) is the table and the shape of the mesh; on given devices it becomes a `Partitioner`.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
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
                sizes[axis] = max(d for d in range(1, left + 1) if left % d == 0 and d <= n)
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

    def shardings(self, tree: Any, *, axes: Mapping[str, tuple[str, ...]]) -> Any:
        """Shardings of a tree of abstract arrays: parameters, or an optimiser state that mirrors them.

        A leaf belongs to the parameter whose name is the last such key on its path (optimisers keep dictionaries with
        the parameters' names); it takes that parameter's partition if it has the same rank and every axis divides, and
        is replicated otherwise (step counts, Adafactor's row and column statistics).
        """

        def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in axes]
            if not names or len(axes[names[-1]]) != len(leaf.shape) or leaf.size <= 1:
                return self.replicated
            name = names[-1]
            partition = self.spec(axes[name])
            for logical, mesh_axes, size in zip(axes[name], partition, leaf.shape, strict=True):
                pieces = math.prod(self.mesh.shape[axis] for axis in _as_tuple(mesh_axes))
                if size % pieces:
                    nearest = max(d for d in range(1, pieces + 1) if size % d == 0)
                    raise ValueError(
                        f"{name} has shape {tuple(leaf.shape)}, whose axis {logical!r} of {size} does not divide by "
                        f"{pieces} of mesh axis {mesh_axes!r}; the nearest that divides it is {nearest}. Choose "
                        "another mesh (gin_configs/meshes/)."
                    )
            return NamedSharding(self.mesh, partition)

        return jax.tree_util.tree_map_with_path(one, tree)

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Host arrays `[rows, ..]` to global arrays, rows over the data-parallel axes."""
        return {name: jax.make_array_from_process_local_data(self.batch, rows) for name, rows in batch.items()}

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


def pieces(axis: str) -> int:
    """Into how many a logical axis is cut where a `Partitioner` is `constraining`; elsewhere 1."""
    partitioner = _constraining.get()
    if partitioner is None:
        return 1
    return math.prod(partitioner.mesh.shape[each] for each in _as_tuple(partitioner.rules[axis]))


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
