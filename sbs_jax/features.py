"""Task features to model features: shifted, padded or packed, with a task id per target token.

`train_dataset` gives endless training batches, `eval_examples` the rows of a split with their
texts, `encode_inputs` the tokens of texts that come from elsewhere, and `count_truncated` what the
feature lengths cut off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import seqio
import tensorflow as tf

from sbs_jax import datasets, tokens

# The tokens of one example: inputs, targets, and the id of its task.
_Tokens = tuple[np.ndarray, np.ndarray, int]
_Item = TypeVar("_Item")
_Spec = seqio.FeatureConverter.FeatureSpec


class StepByStepFeatureConverter(seqio.EncDecFeatureConverter):
    """SeqIO's encoder-decoder converter, plus `decoder_task_ids`: 1 label, 2 rationale, 0 padding.

    The task id has to ride along as a feature of the targets' length, because SeqIO refuses
    pass-through features when it packs.

    Worked example with T5's vocabulary: one row, "2 cats left", for both tasks.

        {"inputs": "predict: 2 cats left"  -> [9689, 10, 204, 10003, 646, 1],
         "targets": "2"                    -> [204, 1],                 "task_ids": [1, 1]}
        {"inputs": "explain: 2 cats left"  -> [3209, 10, 204, 10003, 646, 1],
         "targets": "4 - 2 = 2"            -> [314, 3, 18, 204, 3274, 204, 1],
         "task_ids": [2, 2, 2, 2, 2, 2, 2]}

    With the lengths {"inputs": 14, "targets": 10, "task_ids": 10} and `pack=True` they share one
    row. The decoder starts each of them at 0, and padding is 0 everywhere:

        encoder_input_tokens   [9689, 10, 204, 10003, 646, 1, 3209, 10, 204, 10003, 646, 1, 0, 0]
        encoder_segment_ids    [   1,  1,   1,    1,   1, 1,    2,  2,   2,    2,   2, 2, 0, 0]
        encoder_positions      [   0,  1,   2,    3,   4, 5,    0,  1,   2,    3,   4, 5, 0, 0]
        decoder_target_tokens  [204,   1, 314,   3, 18, 204, 3274,  204,   1, 0]
        decoder_input_tokens   [  0, 204,   0, 314,  3,  18,  204, 3274, 204, 0]
        decoder_task_ids       [  1,   1,   2,   2,  2,   2,    2,    2,   2, 0]
        decoder_loss_weights   [  1,   1,   1,   1,  1,   1,    1,    1,   1, 0]
        decoder_segment_ids    [  1,   1,   2,   2,  2,   2,    2,    2,   2, 0]
        decoder_positions      [  0,   1,   0,   1,  2,   3,    4,    5,   6, 0]

    With `pack=False` each has a row of its own, without segment ids and positions.
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
        """Adds the length of `decoder_task_ids`. ValueError unless it is that of the targets."""
        if task_feature_lengths["task_ids"] != task_feature_lengths["targets"]:
            raise ValueError(
                f"The length of task_ids is {task_feature_lengths['task_ids']} and that of "
                f"targets {task_feature_lengths['targets']}; they must be equal, since there "
                "is one task id per target token."
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
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches of int32 arrays [batch_size, length], or [len(rows), length].

    The keys are those of `StepByStepFeatureConverter`, whose rows these are. (SeqIO's own pipeline
    gives the same rows at a few thousand a second on one core and can skip only by computing;
    here a row is a copy between arrays.)

    Each epoch of a task visits each of its rows once, in an order given by (seed, epoch, number of
    rows); batches run across the ends of epochs, so all are full. A mixture alternates strictly
    between label and rationale, each task in epochs of its own; where both have equally
    many rows, each pair is one row's. `<dataset>_label` with half the batch size and the same seed
    therefore trains on the same labels in the same order as `<dataset>_step_by_step`. The batches
    are the same in any process: hosts that build other `rows` of them cut up one and the same batch.

    Args:
      mixture_or_task: a registered name, e.g. "svamp_step_by_step".
      lengths: {"inputs": .., "targets": ..}; longer rows are cut (see `count_truncated`).
      split: usually "train".
      batch_size: rows per batch of all hosts together.
      pack: whether consecutive examples share a row while they fit.
      seed: of the shuffle.
      skip_batches: batches to leave out first, to resume after so many steps. Instant
        without packing; with it, about a second per million examples.
      rows: the rows of each batch to build, in this order; all by default. `Partitioner.local_rows`
        says which ones a host's devices hold.
    """
    datasets.check_lengths(lengths)
    if batch_size < 1:
        raise ValueError(f"Got batch_size {batch_size}; expected 1 or more.")
    mine = np.arange(batch_size) if rows is None else np.asarray(rows)
    if mine.size == 0 or mine.min() < 0 or mine.max() >= batch_size:
        raise ValueError(f"Got rows {mine.tolist()} of a batch of {batch_size}; expected numbers below {batch_size}.")
    if skip_batches < 0:
        raise ValueError(f"Got skip_batches {skip_batches}; expected 0 or more.")
    stream = _Stream(datasets.subtasks(mixture_or_task), split=split, lengths=lengths, seed=seed)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        found = stream.packed_rows() if pack else stream.rows(skip_batches * batch_size)
        if pack:
            found = itertools.islice(found, skip_batches * batch_size, None)
        while True:
            batch = list(itertools.islice(found, batch_size))
            yield _model_features(
                [[stream.example(place) for place in batch[index]] for index in mine],
                lengths=lengths,
                pack=pack,
            )

    return batches()


class Ahead(Iterator[_Item]):
    """The items of an iterator, which a thread computes while the last ones are in use; use it with `with`.

    An error of the iterator is raised where its item would have come.
    """

    def __init__(self, items: Iterator[_Item], *, depth: int = 2) -> None:
        self._items = items
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="batches ahead")

    def _work(self) -> None:
        try:
            for item in self._items:
                self._hand_over((item, None))
                if self._stop.is_set():
                    return
            self._hand_over((None, StopIteration()))
        except BaseException as error:
            self._hand_over((None, error))

    def _hand_over(self, outcome: tuple[Any, BaseException | None]) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(outcome, timeout=0.1)
                return

    def __next__(self) -> _Item:
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))
            raise error
        return item

    def __enter__(self) -> Ahead[_Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class _Stream:
    """The endless sequence of a mixture's examples: place p belongs to task p mod number of tasks."""

    def __init__(self, task_names: Sequence[str], *, split: str, lengths: Mapping[str, int], seed: int):
        self._tables = [datasets.token_tables(name, split) for name in task_names]
        self._task_ids = [datasets.TASK_IDS[datasets.split_task(name)[1]] for name in task_names]
        self._sizes = [
            (
                np.minimum(table["inputs"].sizes, lengths["inputs"]).tolist(),
                np.minimum(table["targets"].sizes, lengths["targets"]).tolist(),
            )
            for table in self._tables
        ]
        self._lengths, self._seed = lengths, seed
        # Two epochs of every number of rows: batches run across the end of an epoch.
        self._order = functools.lru_cache(maxsize=4)(self._compute_order)

    def example(self, place: int) -> _Tokens:
        task, row = self._locate(place)
        table = self._tables[task]
        inputs = table["inputs"].row(row, length=self._lengths["inputs"])
        targets = table["targets"].row(row, length=self._lengths["targets"])
        return inputs, targets, self._task_ids[task]

    def rows(self, first: int) -> Iterator[list[int]]:
        """The places of each unpacked row, one each, from row `first` on."""
        return ([place] for place in itertools.count(first))

    def packed_rows(self) -> Iterator[list[int]]:
        """The places of each packed row: as many as fit, in order."""
        row: list[int] = []
        inputs_left, targets_left = self._lengths["inputs"], self._lengths["targets"]
        for place in itertools.count():
            task, index = self._locate(place)
            inputs, targets = self._sizes[task][0][index], self._sizes[task][1][index]
            if inputs > inputs_left or targets > targets_left:
                yield row
                row = []
                inputs_left, targets_left = self._lengths["inputs"], self._lengths["targets"]
            row.append(place)
            inputs_left, targets_left = inputs_left - inputs, targets_left - targets

    def _locate(self, place: int) -> tuple[int, int]:
        """Task and row of a place."""
        turn, task = divmod(place, len(self._tables))
        count = len(self._sizes[task][0])
        epoch, position = divmod(turn, count)
        return task, self._order(count, epoch)[position]

    def _compute_order(self, count: int, epoch: int) -> list[int]:
        return np.random.default_rng((self._seed, epoch)).permutation(count).tolist()


def batch_shapes(lengths: Mapping[str, int], *, batch_size: int, pack: bool) -> dict[str, tuple[int, int]]:
    """Model features of a global batch (all int32) and their shapes."""
    datasets.check_lengths(lengths)
    empty = _model_features([], lengths=lengths, pack=pack)
    return {name: (batch_size, array.shape[1]) for name, array in empty.items()}


def _model_features(
    rows: Sequence[Sequence[_Tokens]], *, lengths: Mapping[str, int], pack: bool
) -> dict[str, np.ndarray]:
    """The model features of some rows, each made of one example or, packed, of several.

    Int32 [rows, length], as `StepByStepFeatureConverter` documents and makes them.
    """
    shape_BS, shape_BT = (len(rows), lengths["inputs"]), (len(rows), lengths["targets"])
    inputs, input_segments, input_positions = (np.zeros(shape_BS, np.int32) for _ in range(3))
    targets, target_segments, target_positions, task_ids = (np.zeros(shape_BT, np.int32) for _ in range(4))
    for index, examples in enumerate(rows):
        source_end = target_end = 0
        for segment, (input_ids, target_ids, task_id) in enumerate(examples, start=1):
            source = slice(source_end, source_end + len(input_ids))
            target = slice(target_end, target_end + len(target_ids))
            source_end, target_end = source.stop, target.stop
            inputs[index, source], targets[index, target] = input_ids, target_ids
            input_segments[index, source] = target_segments[index, target] = segment
            input_positions[index, source] = np.arange(len(input_ids))
            target_positions[index, target] = np.arange(len(target_ids))
            task_ids[index, target] = task_id
    decoder_inputs = np.zeros(shape_BT, np.int32)
    decoder_inputs[:, 1:] = targets[:, :-1]
    model_features = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": decoder_inputs,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets != tokens.PAD_ID).astype(np.int32),
        "decoder_task_ids": task_ids,
    }
    if pack:
        # Every segment, and the padding after the last, starts at 0 instead of the last EOS.
        decoder_inputs[:, 1:][target_segments[:, 1:] != target_segments[:, :-1]] = 0
        model_features |= {
            "encoder_segment_ids": input_segments,
            "encoder_positions": input_positions,
            "decoder_segment_ids": target_segments,
            "decoder_positions": target_positions,
        }
    return model_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalExample:
    """One row to evaluate.

    `inputs` (prefix included) and `targets` are texts; `label` is what a prediction is graded
    against. `features` are the unpacked model features, each int32 [length], keyed as in
    `train_dataset`.
    """

    id: str
    label: str
    inputs: str
    targets: str
    features: Mapping[str, np.ndarray]


def eval_examples(task: str, *, split: str, lengths: Mapping[str, int]) -> list[EvalExample]:
    """All rows of a task's split, once, in the order of the records, padded to `lengths`.

    A mixture is evaluated by one of its tasks: see `datasets.graded_task`.
    """
    datasets.check_lengths(lengths)
    rows, tables = datasets.examples(task, split), datasets.token_tables(task, split)
    task_id = datasets.TASK_IDS[datasets.split_task(task)[1]]
    model_features = _model_features(
        [
            [
                (
                    tables["inputs"].row(index, length=lengths["inputs"]),
                    tables["targets"].row(index, length=lengths["targets"]),
                    task_id,
                )
            ]
            for index in range(len(rows))
        ],
        lengths=lengths,
        pack=False,
    )
    return [
        EvalExample(
            id=row.id,
            label=row.label,
            inputs=row.inputs,
            targets=row.targets,
            features={name: array[index] for name, array in model_features.items()},
        )
        for index, row in enumerate(rows)
    ]


def encode_inputs(texts: Sequence[str], *, vocabulary: seqio.Vocabulary, length: int) -> tuple[np.ndarray, int]:
    """Tokens of texts that carry their prefix: int32 [n, length]; and how many had to be cut.

    The same tokens as the tasks', EOS for "</s>" and at the end, padded with 0.
    """
    table = tokens.TokenTable.of(texts, vocabulary)
    padded = np.zeros((len(texts), length), np.int32)
    for index, row in enumerate(padded):
        ids = table.row(index, length=length)
        row[: len(ids)] = ids
    return padded, int(np.sum(table.sizes > length))


def count_truncated(mixture_or_task: str, split: str, lengths: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """How many rows the feature lengths cut, and the longest there is, per task and feature.

    {"svamp_label": {"rows": 720, "inputs cut": 0, "inputs longest": 91, "targets cut": 0,
    "targets longest": 13}, "svamp_rationale": {..}}; lengths in tokens, EOS included.
    """
    datasets.check_lengths(lengths)
    counts = {}
    for task in datasets.subtasks(mixture_or_task):
        tables = datasets.token_tables(task, split)
        counts[task] = {"rows": len(tables["inputs"])}
        for feature, table in tables.items():
            counts[task][f"{feature} cut"] = int(np.sum(table.sizes > lengths[feature]))
            counts[task][f"{feature} longest"] = int(np.max(table.sizes))
    return counts


def count_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """The number of non-padding tokens of a batch, of encoder and decoder together."""
    sides = ("encoder_input_tokens", "decoder_target_tokens")
    return sum(int(np.count_nonzero(batch[side])) for side in sides)
