"""Arrays of model features, made of examples: shifted, padded or packed, with a task id per target token.

As documented in `batches.StepByStepFeatureConverter`, int32 [rows, length]; weights are float32, since rows may have
their own, and soft targets have the types of their store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from sbs_jax.data import soft_targets, tokens
from sbs_jax.data.dataset import check_lengths
from sbs_jax.student.soft_targets import FEATURES


@dataclasses.dataclass(frozen=True)
class SoftRows:
    """Soft targets of a mixture's rows: the first token in the store of each row of each task, None for other tasks."""

    store: soft_targets.Store
    starts: Sequence[np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples ordered by row and segment, each with its source (task, table row) and its destination.

    `tasks`, `indices`, `rows` and `segments` (from 1, ascending within a row) are integers [n].
    """

    tables: Sequence[Mapping[str, tokens.TokenTable]]
    task_ids: Sequence[int]
    _: dataclasses.KW_ONLY
    tasks: np.ndarray
    indices: np.ndarray
    rows: np.ndarray
    segments: np.ndarray
    soft: SoftRows | None = None

    def soft_targets(self, sizes: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Returns which examples have soft targets, and the arrays of those, for examples of `sizes` target tokens."""
        assert self.soft is not None
        starts = np.full_like(self.indices, -1)
        for task, of_task in enumerate(self.soft.starts):
            mine = self.tasks == task
            if of_task is not None:
                starts[mine] = of_task[self.indices[mine]]
        there = starts >= 0
        return there, self.soft.store.read(starts[there].tolist(), sizes[there].tolist())

    def weights(self) -> np.ndarray:
        """Returns the weight of each example, float32 [n]; 1 where rows have none."""
        found = np.ones(len(self.indices), np.float32)
        for task, tables in enumerate(self.tables):
            if tokens.WEIGHTS in tables:
                mine = self.tasks == task
                found[mine] = tables[tokens.WEIGHTS].ids[self.indices[mine]]
        return found

    def ids(self, feature: str, *, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the concatenated tokens of all examples, each truncated to `length`, and their sizes."""
        starts, sizes, last = (np.empty_like(self.indices) for _ in range(3))
        for task, tables in enumerate(self.tables):
            mine, table = self.tasks == task, tables[feature]
            starts[mine], ends = table.starts[self.indices[mine]], table.starts[self.indices[mine] + 1]
            sizes[mine] = np.minimum(ends - starts[mine], length)
            last[mine] = table.ids[ends - 1]
        example, within = ranges(sizes)
        source, task_of = starts[example] + within, self.tasks[example]
        ids = np.empty(len(example), np.int32)
        for task, tables in enumerate(self.tables):
            mine = task_of == task
            ids[mine] = tables[feature].ids[source[mine]]
        ids[np.cumsum(sizes) - 1] = last  # EOS, as in `tokens.cut`
        return ids, sizes


def ranges(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns counts [2, 3] into range numbers [0, 0, 1, 1, 1] and places within the ranges [0, 1, 0, 1, 2]."""
    number = np.repeat(np.arange(len(counts)), counts)
    return number, np.arange(len(number)) - (np.cumsum(counts) - counts)[number]


def shapes(
    lengths: Mapping[str, int], *, batch_size: int, pack: bool, teacher: soft_targets.Form | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of the model features of a global batch."""
    check_lengths(lengths)
    nothing = np.zeros(0, np.int64)
    none = Examples([], [], tasks=nothing, indices=nothing, rows=nothing, segments=nothing)
    empty = of(none, row_count=0, lengths=lengths, pack=pack)
    found = {name: jax.ShapeDtypeStruct((batch_size, array.shape[1]), array.dtype) for name, array in empty.items()}
    if teacher is not None:
        shape_BT, top_k = (batch_size, lengths["targets"]), teacher.top_k
        types = (teacher.ids, soft_targets.LOG_P, soft_targets.LOG_P)
        shapes = ((*shape_BT, top_k), (*shape_BT, top_k), shape_BT)
        found |= zip(FEATURES, map(jax.ShapeDtypeStruct, shapes, types), strict=True)
    return found


def of(examples: Examples, *, row_count: int, lengths: Mapping[str, int], pack: bool) -> dict[str, np.ndarray]:
    """Builds rows of model features, each of one example or, packed, of several.

    Those of `StepByStepFeatureConverter`, and soft targets if the examples have them.
    """
    sides = {}
    for feature, length in lengths.items():
        ids, sizes = examples.ids(feature, length=length)
        example, within = ranges(sizes)
        # Offset of each example in its row: the tokens of the row's earlier examples.
        before = np.cumsum(sizes) - sizes
        begins = before - before[examples.segments == 1][examples.rows] if len(sizes) else before
        place = (examples.rows * length + begins)[example] + within
        sides[feature] = _Side((row_count, length), place=place, example=example, within=within, ids=ids)
    source, target = sides["inputs"], sides["targets"]
    inputs, targets = source.spread(source.ids), target.spread(target.ids)
    task_ids = target.spread(np.asarray(examples.task_ids, np.int32)[examples.tasks][target.example])
    shape_BT = (row_count, lengths["targets"])
    decoder_inputs = np.zeros(shape_BT, np.int32)
    decoder_inputs[:, 1:] = targets[:, :-1]
    model_features = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": decoder_inputs,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": target.spread(examples.weights()[target.example]),
        "decoder_task_ids": task_ids,
    }
    if pack:
        input_segments, target_segments = (side.spread(examples.segments[side.example]) for side in (source, target))
        # Every segment, and the padding after the last, starts at 0 instead of the last EOS.
        decoder_inputs[:, 1:][target_segments[:, 1:] != target_segments[:, :-1]] = 0
        model_features |= {
            "encoder_segment_ids": input_segments,
            "encoder_positions": source.spread(source.within),
            "decoder_segment_ids": target_segments,
            "decoder_positions": target.spread(target.within),
        }
    if examples.soft is not None:
        there, arrays = examples.soft_targets(np.bincount(target.example, minlength=len(examples.indices)))
        # Where there is no teacher, all probabilities are 0.
        for name, values, empty in zip(FEATURES, arrays, (0.0, -np.inf, -np.inf), strict=True):
            model_features[name] = target.spread(values, only=there, empty=empty)
    return model_features


@dataclasses.dataclass(frozen=True)
class _Side:
    """Tokens of the encoder or the decoder, each with its place in the flattened rows and its example."""

    shape: tuple[int, int]
    _: dataclasses.KW_ONLY
    place: np.ndarray
    example: np.ndarray
    within: np.ndarray
    ids: np.ndarray

    def spread(self, values: np.ndarray, *, only: np.ndarray | None = None, empty: float = 0) -> np.ndarray:
        """Spreads one value per token, of any shape, to [rows, length, ..], `empty` elsewhere; integers become int32.

        With `only`, values of the tokens of these examples.
        """
        place = self.place if only is None else self.place[only[self.example]]
        dtype = np.dtype(np.int32) if values.dtype.kind == "i" and only is None else values.dtype
        flat = np.full((self.shape[0] * self.shape[1], *values.shape[1:]), empty, dtype)
        flat[place] = values
        return flat.reshape(*self.shape, *flat.shape[1:])
