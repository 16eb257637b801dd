"""Arrays that are still on disk, read by slices, and the opened checkpoint that holds them."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbs_jax.student import adapters, families, t5

log = logging.getLogger(__name__)

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

    def swapped(self) -> "LazyArray":
        """Swaps the first two axes."""

        def read(index: Index) -> np.ndarray:
            return self.read((index[1], index[0], *index[2:])).swapaxes(0, 1)

        return LazyArray((self.shape[1], self.shape[0], *self.shape[2:]), self.dtype, read)

    def first(self, count: int) -> "LazyArray":
        """Keeps the first positions of the first axis."""

        def read(index: Index) -> np.ndarray:
            return self.read((slice(*index[0].indices(count)), *index[1:]))

        return LazyArray((count, *self.shape[1:]), self.dtype, read)

    def joined(self, axis: int) -> "LazyArray":
        """Merges an axis with the next one (heads and their width); both are read whole, then cut."""
        start, end = self.shape[:axis], self.shape[axis + 2 :]

        def read(index: Index) -> np.ndarray:
            part = self.read((*index[:axis], slice(None), slice(None), *index[axis + 1 :]))
            whole = part.reshape(*part.shape[:axis], -1, *part.shape[axis + 2 :])
            return whole[(*(slice(None),) * axis, index[axis])]

        return LazyArray((*start, self.shape[axis] * self.shape[axis + 1], *end), self.dtype, read)

    def picked(self, positions: np.ndarray, *, axis: int) -> "LazyArray":
        """Selects positions of an axis, in this order; -1 gives zeros. The axis is read whole, then cut."""

        def read(index: Index) -> np.ndarray:
            wanted = positions[index[axis]]
            part = np.take(self.read((*index[:axis], slice(None), *index[axis + 1 :])), wanted, axis=axis)
            part[(*(slice(None),) * axis, wanted < 0)] = 0
            return part

        shape = (*self.shape[:axis], len(positions), *self.shape[axis + 1 :])
        return LazyArray(shape, self.dtype, read)

    def onto(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        """Puts the array on devices, in the sharding and type of `like`; each shard is read separately."""
        if like.sharding is None:
            raise ValueError("Got `like` without a sharding; expected the sharding of the array to fill.")
        dtype = like.dtype

        def read(index: Any) -> np.ndarray:
            values = self.read(_filled(index or (), self.shape))
            with np.errstate(over="ignore"):  # `Watched` names what becomes infinite
                # Copied, because a CPU device may keep the memory that it gets, which may be a mapped file.
                return np.array(values, dtype)

        return jax.make_array_from_callback(like.shape, like.sharding, read)


def _filled(index: Index, shape: tuple[int, ...]) -> Index:
    """Fills in the bounds of slices."""
    return tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))


def shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array, by name."""
    return {name: tuple(array.shape) for name, array in arrays.items()}


class Watched(dict[str, LazyArray]):
    """Arrays whose NaN and infinite numbers are counted when they are read, and those that `dtype` cannot hold."""

    def __init__(self, arrays: Mapping[str, LazyArray], *, dtype: str = "float32") -> None:
        super().__init__({name: self._watched(name, array) for name, array in arrays.items()})
        self.dtype = dtype
        # By name and part: a part may be read more than once.
        self._not_finite: dict[str, dict[Any, int]] = {}
        self._too_large: dict[str, dict[Any, int]] = {}

    def _watched(self, name: str, array: LazyArray) -> LazyArray:
        def read(index: Index) -> np.ndarray:
            values = array.read(index)
            part = tuple(bounds.indices(size) for bounds, size in zip(index, array.shape, strict=True))
            not_finite, too_large = _outside(values, np.dtype(self.dtype))
            for counts, count in ((self._not_finite, not_finite), (self._too_large, too_large)):
                if count:
                    counts.setdefault(name, {})[part] = count
            return values

        return LazyArray(array.shape, array.dtype, read)

    def warn(self, owner: object) -> dict[str, dict[str, int]]:
        """Warns of the arrays with such numbers; returns the counts by array, {} if there are none."""
        found = {}
        for key, counts, what, remedy in (
            ("not_finite", self._not_finite, "NaN or infinite", "The model cannot answer: get the weights again"),
            ("too_large", self._too_large, f"too large for {self.dtype}", "They become infinite: write a wider type"),
        ):
            if counts:
                found[key] = {name: sum(parts.values()) for name, parts in sorted(counts.items())}
                shown = [f"{name} ({count:,} of {math.prod(self[name].shape):,})" for name, count in found[key].items()]
                shown = f"{', '.join(shown[:5])}{' ..' if len(shown) > 5 else ''}"
                log.warning(
                    "%s holds numbers that are %s, in %d of %d arrays: %s. %s.",
                    *(owner, what, len(counts), len(self), shown, remedy),
                )
        return found


def _outside(values: np.ndarray, dtype: np.dtype) -> tuple[int, int]:
    """Counts the numbers that are not finite, and those that `dtype` makes infinite."""
    if values.dtype.kind in "iub" or not values.size:
        return 0, 0
    ends, most = np.array([values.min(), values.max()], np.float64), float(jnp.finfo(dtype).max)
    if np.isfinite(ends).all() and np.abs(ends).max() <= most:  # NaN and infinity show in them
        return 0, 0
    finite = np.isfinite(values)
    with np.errstate(over="ignore", invalid="ignore"):
        held = np.isfinite(values.astype(dtype))
    return int((~finite).sum()), int((finite & ~held).sum())


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of any form: its architecture, and its arrays under our names and in our layout.

    `architecture` is None where the form does not store it (`.npz`). `vocabulary` is the path of its SentencePiece
    model, or "byte"; `origin` is the manifest of its run, or of the run that it was exported from; both are None if
    unknown. For adapters that are not merged, `arrays` holds the trained parameters, `tuning` the kind of adapters, and
    `base` the identity of their base: {"path", "seed", "fingerprint"}.
    """

    architecture: families.ModelConfig | None
    arrays: dict[str, LazyArray]
    step: int = 0
    vocabulary: str | None = None
    origin: dict[str, Any] | None = None
    tuning: adapters.Tuning | None = None
    base: dict[str, Any] | None = None

    @property
    def config(self) -> families.ModelConfig:
        """Returns the architecture. ValueError if the form does not store it."""
        if self.architecture is None:
            raise ValueError("These weights do not say their architecture. Give a run or another form of checkpoint.")
        return self.architecture

    def t5(self, form: str) -> t5.T5Config:
        """Returns the architecture of a T5. ValueError for another family, which this form does not hold."""
        if not isinstance(self.config, t5.T5Config):
            raise ValueError(
                f"These weights are of a {type(self.config).__name__}; {form} is written for T5 only. Keep the run, or "
                "convert it --to stablehlo."
            )
        return self.config
