"""Parts of SeqIO tasks and mixtures: sources of rows and of text, preprocessors, strict alternation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from sbs_jax.data import corpus, selection, tokens

try:
    # TensorFlow only feeds data here; by default it would take the memory of every GPU it sees.
    tf.config.set_visible_devices([], "GPU")
except RuntimeError:
    logging.warning("TensorFlow was already initialized, so it may take GPU memory from JAX.")


class _Source(seqio.DataSource):
    """SeqIO source whose splits depend on the current options, and which any number of hosts can share."""

    def __init__(self, *, splits: Callable[[], Sequence[str]], performs_internal_shuffling: bool = False):
        self._splits_now = splits
        super().__init__(splits=(), performs_internal_shuffling=performs_internal_shuffling)

    @property
    def splits(self) -> Sequence[str]:
        """Splits that there are under the current options."""
        return self._splits_now()

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True: any number of hosts can share a split."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one shard per split; unused by SeqIO, because arbitrary sharding is supported."""
        return [split]


class RecordsSource(_Source):
    """SeqIO source of one task's rows: texts and their tokens.

    Shuffles row numbers instead of rows: the whole split gets a new order each epoch, for a few bytes per row. (SeqIO's
    own shuffle comes after the repeat, with a buffer of 1,000 examples: it mixes epochs of small datasets and hardly
    shuffles large ones.) The order depends only on the seed and the number of rows, so label and rationale of one row
    stay neighbours in the mixture if both tasks have all rows. Hosts take turns in that order.

    If rows have several targets (`DataOptions.rationales_per_example`), an epoch of the training split is K rounds over
    the rows, where K is the most targets of a row; round k gives a row with n of them its target k mod n. So they
    have what the first K epochs of `batches.train_dataset` have. Other splits have one round, of first targets.

    `num_input_examples` is unknown on purpose: SeqIO caches small sources *after* their first shuffle, which would
    freeze the order for all epochs.
    """

    def __init__(
        self,
        task_name: str,
        *,
        splits: Callable[[], Sequence[str]],
        examples: Callable[[str, str], selection.Examples],
        token_tables: Callable[[str, str], Mapping[str, tokens.TokenTable]],
    ):
        """Reads nothing yet. `examples` and `token_tables` take the task's name and a split."""
        self._task_name, self._examples, self._token_tables = task_name, examples, token_tables
        super().__init__(splits=splits, performs_internal_shuffling=True)

    def get_dataset(
        self,
        split: str = selection.TRAIN,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Returns one epoch of {"id", "label", "inputs_pretokenized", .., "inputs": tokens, ..}."""
        rows = self._examples(self._task_name, split)
        tables = dict(self._token_tables(self._task_name, split))
        targets_of = tables.pop(tokens.TARGETS_OF, None)
        if tokens.WEIGHTS in tables:
            raise ValueError(
                f"Rows of {self._task_name} have a weight, which SeqIO's converters have no room for. Train with `sbs "
                "train`, or remove the field 'weight' from the records."
            )
        starts_of_row = tf.constant(np.arange(len(rows) + 1) if targets_of is None else targets_of.starts)
        rounds = 1 if targets_of is None or split != selection.TRAIN else int(targets_of.sizes.max())
        if shard_info and len(rows) < shard_info.num_shards:
            raise ValueError(
                f"{self._task_name} has {len(rows)} rows in {split}, too few to share between {shard_info.num_shards} "
                "hosts. Use fewer hosts or more rows."
            )
        texts = {
            "id": tf.constant([row.id for row in rows]),
            "label": tf.constant([row.label for row in rows]),
        }
        pretokenized = {feature: tf.constant([*rows.texts(feature)]) for feature in tables}
        ids = {feature: (tf.constant(table.ids), tf.constant(table.starts)) for feature, table in tables.items()}

        def read(number: tf.Tensor, row: tf.Tensor) -> dict[str, tf.Tensor]:
            features = {name: column[row] for name, column in texts.items()}
            first, end = starts_of_row[row], starts_of_row[row + 1]
            place = {"inputs": row, "targets": first + tf.math.floormod(number // share, end - first)}
            features |= {f"{feature}_pretokenized": column[place[feature]] for feature, column in pretokenized.items()}
            for feature, (flat, starts) in ids.items():
                features[feature] = flat[starts[place[feature]] : starts[place[feature] + 1]]
            return features

        order, share = tf.data.Dataset.range(len(rows)), len(rows)  # rows of a round
        if shuffle:
            order = order.shuffle(len(rows), seed=seed, reshuffle_each_iteration=True)
        if shard_info:
            order = order.shard(shard_info.num_shards, shard_info.index)
            share = len(range(shard_info.index, len(rows), shard_info.num_shards))
        # The shuffle orders each round as an epoch of the other task. A finite repeat would skip an order at its end.
        return order.repeat().take(rounds * share).enumerate().map(read, num_parallel_calls=tf.data.AUTOTUNE)


class CorpusSource(_Source):
    """SeqIO source of a corpus: one element with all tokens of a split, which `corrupt` cuts into rows."""

    def __init__(self, *, splits: Callable[[], Sequence[str]], table: Callable[[str], tokens.TokenTable]):
        """Reads nothing yet. `table` takes a split."""
        self._table = table
        super().__init__(splits=splits)

    def get_dataset(
        self,
        split: str = selection.TRAIN,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Returns {"ids": this host's part of the tokens}."""
        del shuffle, seed  # SeqIO shuffles the rows, with a buffer, as for T5's own tasks
        ids = self._table(split).ids
        if shard_info:
            part = len(ids) // shard_info.num_shards
            ids = ids[shard_info.index * part : (shard_info.index + 1) * part]
        return tf.data.Dataset.from_tensors({"ids": tf.constant(ids)})


def corrupt(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None = None,
    *,
    options: selection.DataOptions,
) -> tf.data.Dataset:
    """Cuts tokens into rows and masks spans as `corpus.Rows`, with SeqIO's seeds; a SeqIO preprocessor.

    {"ids": tokens} -> {"inputs": tokens with sentinels, "targets": the masked spans}
    """
    lengths = sequence_length or corpus.DATASET.feature_lengths
    lengths = {feature: lengths[feature] for feature in ("inputs", "targets")}
    spans = corpus.Spans.fitting(lengths, density=options.noise_density, mean=options.mean_span)
    sentinel = tokens.vocabulary(options.vocabulary).vocab_size - 1

    def rows(split: Mapping[str, tf.Tensor]) -> tf.data.Dataset:
        count = tf.size(split["ids"], tf.int64) // spans.tokens
        ids = tf.reshape(split["ids"][: count * spans.tokens], [count, spans.tokens])
        return tf.data.Dataset.from_tensor_slices(ids)

    def masked(ids: np.ndarray, seed: np.ndarray) -> list[np.ndarray]:
        keys = np.random.default_rng(seed.view(np.uint32)).random((1, spans.tokens - 2))
        found = spans.corrupt(ids[None], keys, sentinel=sentinel)
        return [found[feature][0] for feature in lengths]

    def convert(ids: tf.Tensor, seed: Any) -> dict[str, tf.Tensor]:
        found = tf.numpy_function(masked, [ids, tf.stack(seed)], [tf.int32] * len(lengths))
        return {
            feature: tf.ensure_shape(each, [spans.lengths[feature]])
            for feature, each in zip(lengths, found, strict=True)
        }

    with_seeds: Any = seqio.map_over_dataset(convert, num_seeds=1)
    return with_seeds(dataset.flat_map(rows))


def cut_and_number(
    dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None = None, *, task_id: int
) -> tf.data.Dataset:
    """Cuts long sequences and adds a task id per target token; a SeqIO preprocessor.

    A sequence longer than its `sequence_length` still ends in EOS (`batches.count_truncated` counts these). With
    {"targets": 3} and task id 1:

        {"targets": [5, 6, 7, 1], ..} -> {"targets": [5, 6, 1], "task_ids": [1, 1, 1], ..}
    """

    def convert(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        converted = dict(row)
        for feature in ("inputs", "targets"):
            length = (sequence_length or {}).get(feature)
            if length is not None:
                kept = row[feature][: length - 1]
                # The last token is EOS, also in place of truncated ones.
                last = row[feature][tf.size(kept) :][-1:]
                converted[feature] = tf.concat([kept, last], axis=0)
        converted["task_ids"] = tf.fill(tf.shape(converted["targets"]), task_id)
        return converted

    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def take_turns(
    task_datasets: Sequence[tf.data.Dataset],
    rates: Sequence[float],
    seed: int | None,
    *,
    turns: Callable[[], np.ndarray],
    task_ids: Sequence[int],
) -> tf.data.Dataset:
    """Takes one example of a task in each turn and numbers its objective; a SeqIO sample function.

    `turns` returns the cycle of task numbers; rates and seed are ignored. With endless tasks (`num_epochs=None`) it
    never ends, and a task with fewer rows repeats sooner. If label and rationale of a dataset have the same number of
    rows and share a seed, each pair comes from one row.
    """
    del rates, seed

    def numbered(task_id: int, row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {**row, "task_ids": tf.fill(tf.shape(row["task_ids"]), task_id)}

    datasets = [each.map(functools.partial(numbered, id_)) for each, id_ in zip(task_datasets, task_ids, strict=True)]
    order = tf.data.Dataset.from_tensor_slices(turns().astype(np.int64)).repeat()
    return tf.data.Dataset.choose_from_datasets(datasets, order, stop_on_empty_dataset=True)
