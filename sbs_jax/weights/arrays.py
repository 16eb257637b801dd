"""Arrays that are still on disk, read by slices, and the opened checkpoint that holds them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sbs_jax.student import adapters, t5

# Selects part of an array: `(slice(0, 8), slice(None))`.
Index = tuple[slice, ...]
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array on disk; `read` fetches the part that an index selects and nothing else."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "LazyArray":
        """Wraps an array in memory."""
        return cls(array.shape, array.dtype, lambda index: array[index])

    def whole(self) -> np.ndarray:
        """Reads all of it."""
        return self.read((slice(None),) * len(self.shape))

    def transposed(self) -> "LazyArray":
        """Reverses the axes."""
        return LazyArray(self.shape[::-1], self.dtype, lambda index: self.read(index[::-1]).T)

    def at(self, position: int, *, axis: int) -> "LazyArray":
        """Selects one position of an axis and drops that axis."""

        def read(index: Index) -> np.ndarray:
            whole = (*index[:axis], slice(position, position + 1), *index[axis:])
            return np.squeeze(self.read(whole), axis)

        return LazyArray(self.shape[:axis] + self.shape[axis + 1 :], self.dtype, read)

    def joined(self, axis: int) -> "LazyArray":
        """Merges an axis with the next one (heads and their width); both are read whole, then cut."""
        start, end = self.shape[:axis], self.shape[axis + 2 :]

        def read(index: Index) -> np.ndarray:
            part = self.read((*index[:axis], slice(None), slice(None), *index[axis + 1 :]))
            whole = part.reshape(*part.shape[:axis], -1, *part.shape[axis + 2 :])
            return whole[(*(slice(None),) * axis, index[axis])]

        return LazyArray((*start, self.shape[axis] * self.shape[axis + 1], *end), self.dtype, read)

    def onto(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        """Puts the array on devices, in the sharding and type of `like`; each shard is read separately."""
        if like.sharding is None:
            raise ValueError("Got `like` without a sharding; expected the sharding of the array to fill.")
        dtype = like.dtype
        # Copied, because a CPU device may keep the memory that it gets, which may be a mapped file.
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: np.array(self.read(_filled(index or (), self.shape)), dtype)
        )


def _filled(index: Index, shape: tuple[int, ...]) -> Index:
    """Fills in the bounds of slices."""
    return tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))


def shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array, by name."""
    return {name: tuple(array.shape) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of any form: its architecture, and its arrays under our names and in our layout.

    `architecture` is None where the form does not store it (`.npz`). `vocabulary` is the path of its SentencePiece
    model, or "byte"; `origin` is the manifest of its run, or of the run that it was exported from; both are None if
    unknown. For adapters that are not merged, `arrays` holds the trained parameters, `tuning` the kind of adapters, and
    `base` the identity of their base: {"path", "seed", "fingerprint"}.
    """

    architecture: t5.T5Config | None
    arrays: dict[str, LazyArray]
    step: int = 0
    vocabulary: str | None = None
    origin: dict[str, Any] | None = None
    tuning: adapters.Tuning | None = None
    base: dict[str, Any] | None = None

    @property
    def config(self) -> t5.T5Config:
        """Returns the architecture. ValueError if the form does not store it."""
        if self.architecture is None:
            raise ValueError("These weights do not say their architecture. Give a run or another form of checkpoint.")
        return self.architecture
