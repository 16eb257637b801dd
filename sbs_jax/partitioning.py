"""Where arrays live: the mesh, one table from logical to mesh axes, and the shardings that follow from it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis (named in t5.py) to mesh axis. `batch` is rows of a batch, on both data-parallel axes.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "joined_kv": "tensor",
    "heads": None,
    "relpos_buckets": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices per mesh axis: `data` copies, `fsdp` shards of parameters and optimiser state, `tensor` splits of the
    matrices. One of them may be -1: all devices that are left.
    """

    data: int
    fsdp: int
    tensor: int

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        if any(not isinstance(n, int) or n == 0 or n < -1 for n in sizes.values()):
            raise ValueError(f"MeshShape has {sizes}; expected whole numbers of at least 1, or one -1.")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"MeshShape has {sizes}; only one axis can be -1 (all devices that are left).")

    def sizes(self, devices: int) -> dict[str, int]:
        """Sizes of the axes on this many devices."""
        sizes = dataclasses.asdict(self)
        fixed = math.prod(n for n in sizes.values() if n != -1)
        sizes = {axis: devices // fixed if n == -1 else n for axis, n in sizes.items()}
        if math.prod(sizes.values()) != devices:
            raise ValueError(
                f"The mesh {dataclasses.asdict(self)} does not fit {devices} devices; its axes must multiply to "
                f"{devices}. Choose another mesh (gin_configs/meshes/) or another machine."
            )
        return sizes


def make_mesh(shape: MeshShape, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh over all devices (or those given), axes data, fsdp, tensor."""
    devices = jax.devices() if devices is None else devices
    sizes = shape.sizes(len(devices))
    # Auto: the compiler propagates shardings; the default of newer JAX would make every operation declare its own.
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Partition of an array with these logical axes."""
    unknown = [axis for axis in axes if axis not in RULES]
    if unknown:
        raise ValueError(f"Logical axes {unknown} are not in the table of {__name__}; it has {sorted(RULES)}.")
    return PartitionSpec(*(RULES[axis] for axis in axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data-parallel axes."""
    return NamedSharding(mesh, spec(("batch",)))


def data_parallel_size(mesh: Mesh) -> int:
    """Number of pieces that the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shardings(mesh: Mesh, tree: Any, *, axes: Mapping[str, tuple[str, ...]]) -> Any:
    """Shardings of a tree of abstract arrays: parameters, or an optimiser state that mirrors them.

    A leaf belongs to the parameter whose name is the last such key on its path (optimisers keep dictionaries with the
    parameters' names); it takes that parameter's partition if it has the same rank and every axis divides, and is
    replicated otherwise (step counts, Adafactor's row and column statistics).
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in axes]
        if not names or len(axes[names[-1]]) != len(leaf.shape):
            return replicated(mesh)
        partition = spec(axes[names[-1]])
        for axis, size in zip(partition, leaf.shape, strict=True):
            if axis is not None and size % mesh.shape[axis] and leaf.size > 1:
                raise ValueError(
                    f"{names[-1]} has shape {leaf.shape}, whose axis of {size} does not divide by mesh axis "
                    f"{axis!r} of {mesh.shape[axis]}; choose a mesh whose axes divide it."
                )
        return NamedSharding(mesh, partition if leaf.size > 1 else PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, tree)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Host arrays `[rows, ..]` to global arrays, rows over the data-parallel axes."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
