"""Tasks and mixtures that somebody else has registered in SeqIO, in a file of `--module` or one that gin imports.

Their rows are read once, by SeqIO itself: source, preprocessors, cache, trimming. From then on they are token tables
like those of records, and every order of them can be computed: batches do not depend on the number of hosts, and a
resumed run goes on where it was (batches.py). A source must therefore end, and what a preprocessor draws at random is
drawn once, by the run's seed, not anew in each epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import seqio
import tensorflow as tf

from sbs_jax import checks
from sbs_jax.data import catalogue, selection, tokens, vocabularies
from sbs_jax.data.dataset import BY_LOSS, Dataset
from sbs_jax.data.grading import SCORE
from sbs_jax.data.selection import TEST, TRAIN, VALIDATION, DataOptions
from sbs_jax.storage import atomic
from sbs_jax.storage.json_files import brief

log = logging.getLogger(__name__)

KIND = "seqio"
_FEATURES = ("inputs", "targets")
_MOST_TOKENS = 2**31  # of a split, in memory: 8 GB
_known: dict[str, Rows] = {}  # by task, split and options as JSON
_LENGTHS = {"inputs": 512, "targets": 512}  # a run gives its own


def names() -> tuple[str, ...]:
    """Returns the names of all tasks and mixtures in SeqIO's registries, this project's included."""
    return (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names())


def tasks(name: str) -> tuple[str, ...]:
    """Returns the tasks of a mixture in SeqIO's registry, sorted; of a task, itself; () if it has neither."""
    if name in seqio.TaskRegistry.names():
        return (name,)
    if name in seqio.MixtureRegistry.names():
        return tuple(sorted(task.name for task in seqio.MixtureRegistry.get(name).tasks))
    return ()


def rates(name: str) -> list[float]:
    """Returns SeqIO's own rate of each task of a mixture. ValueError if one is not above 0."""
    mixture = seqio.MixtureRegistry.get(name)
    found = [float(mixture.get_rate(seqio.TaskRegistry.get(task))) for task in tasks(name)]
    for task, rate in zip(tasks(name), found, strict=True):
        checks.number(f"The rate of {task} in {name}", rate, above=0)
    return found


@functools.cache
def dataset(task: str) -> Dataset:
    """Describes a task as a dataset that is graded by its metric functions of predictions, or by loss if it has none.

    The first value of the first function is `score`, which picks the best checkpoint; higher is better.
    """
    functions = seqio.TaskRegistry.get(task).predict_metric_fns
    return Dataset(
        name=task,
        labels=None,
        read_release=None,
        parsers={},
        metric_fns=(functools.partial(_graded, functions),) if functions else (),
        primary_metric=SCORE if functions else BY_LOSS,
        same_label=_same,
        feature_lengths=_LENGTHS,
        module=catalogue.module_of(task),
    )


def _graded(
    functions: Sequence[Callable[..., Mapping[str, Any]]], targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for function in functions:
        for name, value in function(targets, predictions).items():
            with contextlib.suppress(TypeError, ValueError):  # texts and pictures of seqio.metrics
                found.setdefault(name, float(getattr(value, "value", value)))
    if not found:
        raise ValueError(f"The metric functions {functions} return no number; expected {{name: number}}.")
    return {SCORE: next(iter(found.values())), **found}


def _same(target: Any, prediction: Any) -> bool:
    return bool(np.all(target == prediction))


def answer(task: str, text: str, *, example: Mapping[str, Any], is_target: bool = False) -> Any:
    """Returns what a task grades of a text, by its postprocessor."""
    return seqio.TaskRegistry.get(task).postprocess_fn(text, example=example, is_target=is_target)


# -------------------------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a split: token tables of inputs and targets, and where rows are graded their other features."""

    tables: Mapping[str, tokens.TokenTable]
    examples: tuple[Mapping[str, Any], ...] | None

    def __len__(self) -> int:
        return len(self.tables["inputs"])

    def chosen(self, kept: np.ndarray) -> Rows:
        """Returns the rows at these places."""
        tables = {feature: table.chosen(kept) for feature, table in self.tables.items()}
        return Rows(tables, None if self.examples is None else tuple(self.examples[row] for row in kept))

    def sha256(self) -> str:
        """Hashes all tokens, and where rows begin."""
        found = hashlib.sha256()
        for feature in _FEATURES:
            found.update(self.tables[feature].ids.data)
            found.update(self.tables[feature].starts.data)
        return found.hexdigest()


def splits(task: str, options: DataOptions) -> tuple[str, ...]:
    """Returns the splits of a task; validation, if it has none, is held out from training."""
    there = [name for name in (TRAIN, VALIDATION, TEST) if name in seqio.TaskRegistry.get(task).splits]
    if VALIDATION not in there and TRAIN in there and options.validation_fraction:
        there.append(VALIDATION)
    return tuple(there)


def rows(task: str, split: str, *, lengths: Mapping[str, int], options: DataOptions, whole: bool | None = None) -> Rows:
    """Reads the rows of a split, or those held out for it; `whole` keeps other features (default: not of training).

    ValueError, with the row where one is at fault, if the task has no such split, no inputs or targets, another
    vocabulary, or rows that cannot be trained on.
    """
    there = splits(task, options)
    own = seqio.TaskRegistry.get(task).splits
    if split not in there:
        raise ValueError(f"The task {task} has no {split} split; it has {', '.join(own)}.")
    wanted = {
        "lengths": {feature: lengths[feature] for feature in _FEATURES},
        "seed": options.seed,
        "most": options.read_rows,
        "whole": split != TRAIN if whole is None else whole,
        "vocabulary": options.vocabulary,
    }
    key = json.dumps([task, split, options.validation_fraction, wanted])
    if key not in _known:
        found = _read_now(task, split if split in own else TRAIN, **wanted)
        if VALIDATION in there and VALIDATION not in own and split != TEST:
            ids = [str(row) for row in range(len(found))]
            held_out = selection.held_out(ids, options.validation_fraction)
            found = found.chosen(np.flatnonzero([(row in held_out) == (split == VALIDATION) for row in ids]))
        _known[key] = found
    return _known[key]


def sources(task: str, lengths: Mapping[str, int], options: DataOptions) -> dict[str, Any]:
    """Returns source, hash and number of the rows of each split, as a manifest names files."""
    found = {}
    for split in splits(task, options):
        read = rows(task, split, lengths=lengths, options=options)
        source = brief(str(seqio.TaskRegistry.get(task).source))
        found[split] = {"file": source, "sha256": read.sha256(), "counts": {"rows": len(read)}}
    return found


def graded_rows(task: str, split: str, *, lengths: Mapping[str, int], options: DataOptions) -> Iterator[dict[str, Any]]:
    """Yields what `batches.EvalExample` holds of each row: id, texts, the label, and how an answer is graded."""
    text_vocabulary = tokens.vocabulary(options.vocabulary)
    found = rows(task, split, lengths=lengths, options=options, whole=True)
    assert found.examples is not None
    for number, example in enumerate(found.examples):
        texts = {}
        for feature in _FEATURES:
            text = example.get(f"{feature}_pretokenized")
            texts[feature] = text.decode() if isinstance(text, bytes) else text
            if not isinstance(texts[feature], str):
                texts[feature] = text_vocabulary.decode(example[feature].tolist())
        yield {
            "id": f"{split}-{number}",
            "label": answer(task, texts["targets"], example=example, is_target=True),
            **texts,
            "answer": functools.partial(answer, task, example=example),
        }


def forget() -> None:
    """Drops all rows from memory."""
    _known.clear()


def save(folder: Path) -> None:
    """Writes the token tables that were read for training, so that a resumed run need not read their sources again."""
    for key, found in _known.items():
        if found.examples is not None:
            continue
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if not path.exists():
            arrays = {
                f"{name} {part}": getattr(found.tables[name], part) for name in _FEATURES for part in tokens.PARTS
            }
            folder.mkdir(exist_ok=True)
            with atomic.replacing(path) as file:
                np.savez(file, key=np.array(key), **arrays)


def take(folder: Path) -> None:
    """Takes the tables that `save` wrote for the same tasks, lengths and options. ValueError names a damaged file."""
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                tables = {
                    name: tokens.TokenTable(**{part: file[f"{name} {part}"] for part in tokens.PARTS})
                    for name in _FEATURES
                }
                _known[str(file["key"])] = Rows(tables, None)
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and the rows are read again.") from None


def _read_now(
    task_name: str,
    split: str,
    *,
    lengths: Mapping[str, int],
    seed: int,
    most: int | None,
    whole: bool,
    vocabulary: str,
) -> Rows:
    task = seqio.TaskRegistry.get(task_name)
    _check_features(task, vocabulary)
    where = f"{task_name}, {split}"
    cached = False
    try:
        cached = task.supports_caching and task.cache_dir is not None
        found = task.get_dataset(
            sequence_length=lengths,
            split=split,
            use_cached=cached,
            shuffle=False,
            seed=seed,
            try_in_mem_cache=False,
        )
    except (ValueError, TypeError, KeyError, OSError, AssertionError, tf.errors.OpError) as error:
        raise ValueError(f"{where}: SeqIO cannot read it: {brief(str(error))}") from error
    if not whole:
        found = found.map(lambda row: {feature: row[feature] for feature in _FEATURES}, tf.data.AUTOTUNE)
    if most is not None:
        found = found.take(most)
    parts: dict[str, list[np.ndarray]] = {feature: [] for feature in _FEATURES}
    examples: list[Mapping[str, Any]] = []
    total = 0
    for number, row in enumerate(_elements(found, where)):
        for feature in _FEATURES:
            ids = row[feature].astype(np.int32)
            if not ids.size or (ids <= 0).any():
                problem = "no token" if not ids.size else f"the token {ids[ids <= 0][0]}"
                raise ValueError(
                    f"{where}, row {number:,}: {feature} has {problem}; expected ids above 0, which is padding. "
                    "Filter such rows in a preprocessor of the task."
                )
            parts[feature].append(ids)
            total += ids.size
        if whole:
            examples.append(row)
        if total > _MOST_TOKENS:
            raise ValueError(
                f"{where} has more than {_MOST_TOKENS:,} tokens in its first {number:,} rows; rows are kept in memory. "
                "Set READ_ROWS to take the first ones."
            )
    count = len(parts["inputs"])
    if not count:
        raise ValueError(f"{where}: the split is empty; expected rows.")
    expected = task.source.num_input_examples(split) if most is None and not cached else None
    origin = "" if expected is None else f" from {expected:,} of its source"
    log.info("%s: read %s rows%s.", where, f"{count:,}", f" from the cache {task.cache_dir}" if cached else origin)
    tables = {feature: tokens.TokenTable.joined(each) for feature, each in parts.items()}
    return Rows(tables, tuple(examples) if whole else None)


def _elements(found: tf.data.Dataset, where: str) -> Iterator[dict[str, Any]]:
    """Yields rows as NumPy; an error of source or preprocessor names the row after which it came."""
    number, elements = 0, cast(Iterator[dict[str, Any]], found.as_numpy_iterator())
    while True:
        try:
            row = next(elements)
        except StopIteration:
            return
        except (tf.errors.OpError, ValueError, TypeError) as error:
            raise ValueError(
                f"{where}, row {number:,}: its source or a preprocessor failed: {brief(str(error))}"
            ) from error
        yield row
        number += 1


def _check_features(task: seqio.Task, vocabulary: str) -> None:
    features = task.output_features
    for name in _FEATURES:
        if name not in features:
            raise ValueError(
                f"The task {task.name} has the features {sorted(features)}; expected inputs and targets. Add them in "
                "its preprocessors and output_features."
            )
        if not features[name].dtype.is_integer or features[name].rank != 1:
            raise ValueError(
                f"The feature {name} of {task.name} is {features[name].dtype.name} of rank {features[name].rank}; "
                "expected a sequence of integer token ids."
            )
        if not vocabularies.same(features[name].vocabulary, tokens.vocabulary(vocabulary)):
            raise ValueError(
                f"The feature {name} of {task.name} has the vocabulary {features[name].vocabulary}, and VOCABULARY is "
                f"{vocabulary!r}; give the path of the task's own."
            )
