"""Batches of model features: shifted, padded or packed, with a task id per target token.

`train_dataset` yields endless training batches, `eval_examples` returns the rows of a split with their texts, and
`count_truncated` counts the rows longer than the feature lengths.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import seqio
import tensorflow as tf

from sbs_jax import checks
from sbs_jax.data import corpus, features, outside, registry, soft_targets, task_names, tokens
from sbs_jax.data.dataset import check_lengths
from sbs_jax.data.slots import NO_NUMBERS, Numbers
from sbs_jax.storage.json_files import brief
from sbs_jax.student.mutual_information import MOST_PAIRS

# Examples assigned to rows at a time.
_PLACES = 65_536
_Spec = seqio.FeatureConverter.FeatureSpec


class StepByStepFeatureConverter(seqio.EncDecFeatureConverter):
    """SeqIO's encoder-decoder converter with `decoder_task_ids`: objectives from 1 (1 label, 2 rationale), 0 padding.

    Task ids are a feature as long as the targets, because SeqIO refuses pass-through features when it packs.

    Example with T5's vocabulary: one row, "2 cats left", for both tasks.

        {"inputs": "predict: 2 cats left"  -> [9689, 10, 204, 10003, 646, 1],
         "targets": "2"                    -> [204, 1],                 "task_ids": [1, 1]}
        {"inputs": "explain: 2 cats left"  -> [3209, 10, 204, 10003, 646, 1],
         "targets": "4 - 2 = 2"            -> [314, 3, 18, 204, 3274, 204, 1],
         "task_ids": [2, 2, 2, 2, 2, 2, 2]}

    With the lengths {"inputs": 14, "targets": 10, "task_ids": 10} and `pack=True` they share one row. The decoder
    input of each starts with 0, and padding is 0 everywhere:

        encoder_input_tokens   [9689, 10, 204, 10003, 646, 1, 3209, 10, 204, 10003, 646, 1, 0, 0]
        encoder_segment_ids    [   1,  1,   1,    1,   1, 1,    2,  2,   2,    2,   2, 2, 0, 0]
        encoder_positions      [   0,  1,   2,    3,   4, 5,    0,  1,   2,    3,   4, 5, 0, 0]
        decoder_target_tokens  [204,   1, 314,   3, 18, 204, 3274,  204,   1, 0]
        decoder_input_tokens   [  0, 204,   0, 314,  3,  18,  204, 3274, 204, 0]
        decoder_task_ids       [  1,   1,   2,   2,  2,   2,    2,    2,   2, 0]
        decoder_loss_weights   [  1,   1,   1,   1,  1,   1,    1,    1,   1, 0]
        decoder_segment_ids    [  1,   1,   2,   2,  2,   2,    2,    2,   2, 0]
        decoder_positions      [  0,   1,   0,   1,  2,   3,    4,    5,   6, 0]

    With `pack=False` each example has its own row, without segment ids and positions.
    """

    TASK_FEATURES: ClassVar = {
        **seqio.EncDecFeatureConverter.TASK_FEATURES,
        "task_ids": _Spec(dtype=tf.int32),
    }
    MODEL_FEATURES: ClassVar = {
        **seqio.EncDecFeatureConverter.MODEL_FEATURES,
        "decoder_task_ids": _Spec(dtype=tf.int32),
    }

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        converted = dict(super()._convert_example(features))
        converted["decoder_task_ids"] = features["task_ids"]
        return converted

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Adds the length of `decoder_task_ids`; ValueError unless it equals that of the targets."""
        if task_feature_lengths["task_ids"] != task_feature_lengths["targets"]:
            raise ValueError(
                f"task_ids has length {task_feature_lengths['task_ids']} and targets has length "
                f"{task_feature_lengths['targets']}; make them equal, because every target token has a task id."
            )
        lengths = dict(super().get_model_feature_lengths(task_feature_lengths))
        lengths["decoder_task_ids"] = task_feature_lengths["task_ids"]
        return lengths


def train_dataset(
    mixture_or_task: str,
    *,
    lengths: Mapping[str, int],
    split: str,
    batch_size: int,
    pack: bool,
    seed: int,
    skip_batches: int,
    rows: Sequence[int] | np.ndarray | None = None,
    weights: Mapping[str, int | float] | None = None,
    teacher: soft_targets.Store | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields endless training batches of arrays [batch_size, length, ..], or [len(rows), length, ..].

    Keys and rows are those of `StepByStepFeatureConverter`, int32. With soft targets, each batch also has
    `student.soft_targets.FEATURES` in the types of the store. (Rows are copied between arrays here, because SeqIO's own
    pipeline makes a few thousand rows per second and core, and must compute the rows that it skips.)

    Each epoch of a task visits each row once, in an order that depends only on (seed, epoch, number of rows). A row
    with several rationales has the next in each epoch. Batches run across the ends of epochs, so all are full. Several
    datasets take turns by their rates (`task_names.turns`). Each alternates strictly between label and rationale, each
    with its own epochs; if both have equally many rows, each pair comes from one row. `<dataset>_label` with half the
    batch size and the same seed therefore trains on the same labels in the same order as `<dataset>_step_by_step`. All
    processes plan the same batches, so each host can build only its own `rows` of a batch.

    Args:
      mixture_or_task: a name of task_names.py, e.g. "svamp_step_by_step".
      lengths: {"inputs": .., "targets": ..}; longer rows are truncated (see `count_truncated`).
      split: usually "train".
      batch_size: rows per batch of all hosts together.
      pack: put consecutive examples into one row while they fit.
      seed: seed of the shuffle.
      skip_batches: batches to skip when resuming. Instant without packing; with packing, a third of a second per
        million examples.
      rows: the rows of each batch to build, in this order; None for all. `Partitioner.local_rows` lists those of a
        host's devices.
      weights: weights of the objectives, which number them (`task_names.task_ids`).
      teacher: a store with the soft targets of every row of its tasks; tokens of other tasks have none.
    """
    check_lengths(lengths)
    checks.whole_number("batch_size", batch_size, least=1)
    checks.whole_number("skip_batches", skip_batches, least=0)
    mine = np.arange(batch_size) if rows is None else np.asarray(rows)
    if mine.size == 0 or mine.min() < 0 or mine.max() >= batch_size:
        raise ValueError(f"Got rows {mine.tolist()} of a batch of {batch_size}; expected numbers below {batch_size}.")
    stream = _Stream(mixture_or_task, split=split, lengths=lengths, seed=seed, weights=weights, teacher=teacher)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        found = stream.rows(pack=pack, skip=skip_batches * batch_size)
        while True:
            ends = np.array(list(itertools.islice(found, batch_size)))[mine]
            yield stream.model_features(ends[:, 0], ends[:, 1], pack=pack)

    return batches()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchExample:
    """Place of an example in a training batch: `row` from 0, `segment` from 1 (always 1 without packing)."""

    row: int
    segment: int
    task: str
    id: str


def batch_examples(
    mixture_or_task: str,
    *,
    lengths: Mapping[str, int],
    split: str,
    batch_size: int,
    pack: bool,
    seed: int,
    batch: int,
    weights: Mapping[str, int | float] | None = None,
    teacher: soft_targets.Store | None = None,
) -> tuple[list[BatchExample], dict[str, np.ndarray]]:
    """Lists the examples of batch number `batch` (from 0) of `train_dataset`, each built as its own row.

    The arrays have the batch's keys and one row per example.
    """
    names = task_names.subtasks(mixture_or_task)
    stream = _Stream(mixture_or_task, split=split, lengths=lengths, seed=seed, weights=weights, teacher=teacher)
    rows = list(itertools.islice(stream.rows(pack=pack, skip=batch * batch_size), batch_size))
    places = np.concatenate([np.arange(first, end) for first, end in rows])
    found = []
    for (row, segment), task, index in zip(
        ((row, place - first + 1) for row, (first, end) in enumerate(rows) for place in range(first, end)),
        *(each.tolist() for each in stream.locate(places)[::2]),
        strict=True,
    ):
        found.append(BatchExample(row=row, segment=segment, task=names[task], id=stream.id(task, index)))
    return found, stream.model_features(places, places + 1, pack=pack)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows that are the same in every epoch, or with several targets have the next in each; as `corpus.Rows`."""

    _tables: Mapping[str, tokens.TokenTable]
    id: Callable[[int], str]

    def __len__(self) -> int:
        return len(self._tables["inputs"])

    def sizes(self, feature: str) -> np.ndarray:
        """Returns the tokens of each text, of several targets of a row each."""
        return self._tables[feature].sizes

    def sizes_of(self, feature: str, *, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Returns the tokens of rows [m] in epochs [m]."""
        return self.sizes(feature)[self._targets(epochs, indices) if feature == "targets" else indices]

    def _targets(self, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Returns the numbers of the targets that rows have in epochs: number `epoch mod count` of each row's."""
        if tokens.TARGETS_OF not in self._tables:
            return indices
        starts = self._tables[tokens.TARGETS_OF].starts
        return starts[indices] + epochs % (starts[indices + 1] - starts[indices])

    def tables(self, epochs: np.ndarray, indices: np.ndarray) -> tuple[Mapping[str, tokens.TokenTable], np.ndarray]:
        """Returns tables, and the place in them of rows [m] in epochs [m]."""
        if tokens.TARGETS_OF not in self._tables:
            return self._tables, indices
        rows = {"inputs": indices, "targets": self._targets(epochs, indices), tokens.WEIGHTS: indices}
        found = {name: self._tables[name].chosen(each) for name, each in rows.items() if name in self._tables}
        return found, np.arange(len(indices))

    def encoded(self) -> Mapping[str, tokens.TokenTable]:
        return self._tables


def _source(task: str, split: str, *, lengths: Mapping[str, int], seed: int = 0) -> _Rows | corpus.Rows:
    kind = task_names.split(task)[1]
    if kind == outside.KIND:
        rows = outside.rows(task, split, lengths=lengths, options=registry.options())
        return _Rows(rows.tables, f"{split}-{{}}".format)
    tables = registry.token_tables(task, split)
    if kind == corpus.SPAN_CORRUPTION:
        return corpus.Rows(tables["text"], split=split, lengths=lengths, seed=seed, options=registry.options())
    return _Rows(tables, lambda row: registry.examples(task, split)[row].id)


def fingerprint(mixture_or_task: str, *, split: str, lengths: Mapping[str, int]) -> list[str]:
    """Returns a hash of the tokens of each task and feature, a line each, for processes to compare."""
    return [
        f"{task} {feature} tokens {hashlib.sha256(table.ids.data).hexdigest()}"
        for task in task_names.subtasks(mixture_or_task)
        for feature, table in _source(task, split, lengths=lengths).encoded().items()
    ]


def soft_rows(
    names: Sequence[str], split: str, *, store: soft_targets.Store, lengths: Mapping[str, int]
) -> features.SoftRows:
    """Finds the rows of tasks in a store. ValueError if it is of another vocabulary, or lacks a row of its tasks."""
    vocabulary = tokens.vocabulary_sha256(registry.options().vocabulary)
    if store.form.vocabulary != vocabulary:
        raise ValueError(
            f"The soft targets in {store.path} are of a teacher with another vocabulary (SHA-256 "
            f"{store.form.vocabulary}) than that of this run ({vocabulary}). Take the teacher's vocabulary."
        )
    if not set(names) & set(store.form.tasks):
        raise ValueError(
            f"{store.path} has soft targets of {', '.join(store.form.tasks)}, none of which is trained here: "
            f"{', '.join(names)}. Write them with `sbs soft_targets --task`, or set SOFT_TARGETS = None."
        )

    def starts(name: str) -> np.ndarray:
        tables = registry.token_tables(name, split)
        if tokens.TARGETS_OF in tables:
            raise ValueError(
                f"{name} has several rationales per row, and {store.path} the soft targets of one; set "
                "RATIONALES_PER_EXAMPLE = 1, or SOFT_TARGETS = None."
            )
        ids = [example.id for example in registry.examples(name, split)]
        return store.find(name, ids, tables["targets"], length=lengths["targets"])

    return features.SoftRows(store, [starts(name) if name in store.form.tasks else None for name in names])


class _Stream:
    """Endless sequence of a mixture's examples; its tasks have their places in turns, over and over again."""

    def __init__(
        self,
        mixture_or_task: str,
        *,
        split: str,
        lengths: Mapping[str, int],
        seed: int,
        weights: Mapping[str, int | float] | None,
        teacher: soft_targets.Store | None,
    ) -> None:
        names = task_names.subtasks(mixture_or_task)
        self._sources = [_source(name, split, lengths=lengths, seed=seed) for name in names]
        self._task_ids = task_names.task_ids(mixture_or_task, weights=weights)
        self._lengths, self._seed = lengths, seed
        self._soft = None if teacher is None else soft_rows(names, split, store=teacher, lengths=lengths)
        rows = {name: len(source) for name, source in zip(names, self._sources, strict=True)}
        self._turns = task_names.turns(mixture_or_task, registry.options(), rows=rows)
        self._count = np.bincount(self._turns, minlength=len(names))  # turns of each task in a cycle
        self._before = np.empty_like(self._turns)  # turns of the same task before this one
        for task, count in enumerate(self._count):
            self._before[self._turns == task] = np.arange(count)
        self._pairs = registry.options().pairs
        if self._pairs and (len(rows) % 2 or [*rows.values()][::2] != [*rows.values()][1::2]):
            raise ValueError(
                f"PAIRS is True, but the tasks {', '.join(names)} do not come in pairs with the same rows; train on a "
                "mixture, <dataset>_step_by_step or <dataset>_cascade."
            )
        # Two epochs for each task: batches run across the end of an epoch.
        self._order = functools.lru_cache(maxsize=2 * len(names))(self._compute_order)

    def model_features(self, first: np.ndarray, end: np.ndarray, *, pack: bool) -> dict[str, np.ndarray]:
        """Builds rows; row i holds the places `first[i]` to `end[i] - 1`."""
        counts = end - first
        rows, within = features.ranges(counts)
        tasks, epochs, indices = self.locate(first[rows] + within)
        tables = []
        for task, source in enumerate(self._sources):
            mine = tasks == task
            of_task, indices[mine] = source.tables(epochs[mine], indices[mine])
            tables.append(of_task)
        return features.of(
            features.Examples(
                tables, self._task_ids, tasks=tasks, indices=indices, rows=rows, segments=within + 1, soft=self._soft
            ),
            row_count=len(first),
            lengths=self._lengths,
            pack=pack,
        )

    def id(self, task: int, index: int) -> str:
        """Returns the id of a task's row."""
        return self._sources[task].id(index)

    def rows(self, *, pack: bool, skip: int) -> Iterator[tuple[int, int]]:
        """Yields (first place, place after the last) of each row, after `skip` rows."""
        if pack:
            return itertools.islice(self._packed_rows(), skip, None)
        return ((place, place + 1) for place in itertools.count(skip))

    def _packed_rows(self) -> Iterator[tuple[int, int]]:
        """Yields rows of as many consecutive places as fit."""
        start, chunk = 0, _PLACES
        while True:
            ends = self._ends(start, chunk)
            place = 0
            while ends[place] < chunk:  # a row that reaches the end of the chunk may continue beyond it
                yield start + place, start + ends[place]
                place = ends[place]
            start, chunk = start + place, _PLACES if place else 2 * chunk

    def _ends(self, start: int, count: int) -> list[int]:
        """Returns, for each of `count` places, the end of a row that begins there; both relative to `start`."""
        tasks, epochs, indices = self.locate(np.arange(start, start + count))
        ends = []
        for feature, length in self._lengths.items():
            sizes = np.empty(count, np.int64)
            for task, source in enumerate(self._sources):
                mine = tasks == task
                of_task = source.sizes_of(feature, epochs=epochs[mine], indices=indices[mine])
                sizes[mine] = np.minimum(of_task, length)
            total = np.concatenate([[0], np.cumsum(sizes)])
            ends.append(np.searchsorted(total, total[:-1] + length, side="right") - 1)
        found = np.minimum(*ends)
        return (self._whole_pairs(found, start=start) if self._pairs else found).tolist()

    def _whole_pairs(self, ends: np.ndarray, *, start: int) -> np.ndarray:
        """Shortens rows that begin at a pair to whole pairs, at most MOST_PAIRS. ValueError for a pair in no row."""
        place = np.arange(len(ends))
        pairs = np.minimum((ends - place) // 2, MOST_PAIRS)
        if len(too_long := np.flatnonzero(pairs[::2] == 0)):
            (task,), _, (index,) = (each.tolist() for each in self.locate(start + 2 * too_long[:1]))
            raise ValueError(
                f"A packed row of {dict(self._lengths)} tokens does not hold both label and rationale of "
                f"{brief(self.id(task, index))}, which a loss on pairs needs. Make TASK_FEATURE_LENGTHS longer, or set "
                "PACK = False."
            )
        return place + 2 * pairs

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the task, the epoch and the row number of each place."""
        cycles, turns = np.divmod(places, len(self._turns))
        tasks = self._turns[turns]
        turns = cycles * self._count[tasks] + self._before[turns]  # of the place's task, from the first place on
        indices, epochs = np.empty_like(places), np.empty_like(places)
        for task, source in enumerate(self._sources):
            mine = np.flatnonzero(tasks == task)
            count = len(source)
            epochs[mine], positions = np.divmod(turns[mine], count)
            for epoch in np.unique(epochs[mine]).tolist():
                of_epoch = epochs[mine] == epoch
                indices[mine[of_epoch]] = self._order(count, epoch)[positions[of_epoch]]
        return tasks, epochs, indices

    def _compute_order(self, count: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalExample:
    """One row to evaluate.

    `inputs` (prefix included) and `targets` are texts, in which slots stand for `numbers`. `answer` takes from a
    written text, without slots, what is graded against `label`. `features` are the unpacked model features, each int32
    [length], keyed as in `train_dataset`.
    """

    id: str
    label: Any
    inputs: str
    targets: str
    numbers: Numbers
    answer: Callable[[str], Any]
    features: Mapping[str, np.ndarray]


def eval_examples(task: str, *, split: str, lengths: Mapping[str, int]) -> list[EvalExample]:
    """Returns every row of a task's split once, in record order, padded to `lengths`.

    A mixture is evaluated by some of its tasks: see `task_names.graded`.
    """
    kind, arrays = task_names.split(task)[1], eval_features(task, split=split, lengths=lengths)
    features = [{name: array[row] for name, array in arrays.items()} for row in range(len(next(iter(arrays.values()))))]
    if kind == outside.KIND:
        found = outside.graded_rows(task, split, lengths=lengths, options=registry.options())
        return [EvalExample(numbers=NO_NUMBERS, features=one, **row) for row, one in zip(found, features, strict=True)]
    answer = functools.partial(registry.graded_text, kind=kind)
    return [
        EvalExample(
            id=row.id,
            label=row.label,
            inputs=row.inputs,
            targets=row.targets,
            numbers=row.numbers,
            answer=answer,
            features=one,
        )
        for row, one in zip(registry.examples(task, split), features, strict=True)
    ]


def eval_features(
    task: str, *, split: str, lengths: Mapping[str, int], rows: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns the unpacked model features of rows of a split (None: all, in order), int32 [n, length]."""
    check_lengths(lengths)
    source = _source(task, split, lengths=lengths)
    chosen = np.arange(len(source)) if rows is None else rows
    none = np.zeros_like(chosen)
    tables, indices = source.tables(none, chosen)
    (task_id,) = task_names.task_ids(task)
    return features.of(
        features.Examples(
            [tables], [task_id], tasks=none, indices=indices, rows=np.arange(len(chosen)), segments=none + 1
        ),
        row_count=len(chosen),
        lengths=lengths,
        pack=False,
    )


def count_truncated(mixture_or_task: str, split: str, lengths: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Counts rows and truncated rows, and finds the longest, per task and feature.

    {"svamp_label": {"rows": 720, "inputs cut": 0, "inputs longest": 91, "targets cut": 0, "targets longest": 13},
    "svamp_rationale": {..}}; lengths in tokens, EOS included. Of a row with several targets each counts.
    """
    check_lengths(lengths)
    counts = {}
    for task in task_names.subtasks(mixture_or_task):
        source = _source(task, split, lengths=lengths)
        counts[task] = {"rows": len(source)}
        for feature, length in lengths.items():
            sizes = source.sizes(feature)
            counts[task][f"{feature} cut"] = int(np.sum(sizes > length))
            counts[task][f"{feature} longest"] = int(np.max(sizes))
    return counts


def count_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Counts the non-padding tokens of a batch, of encoder and decoder together."""
    sides = ("encoder_input_tokens", "decoder_target_tokens")
    return sum(int(np.count_nonzero(batch[side])) for side in sides)
