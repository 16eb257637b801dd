"""Registry of datasets and their SeqIO tasks, and access to their records under the current options.

Each dataset has six names, for example svamp:

| SeqIO name                    | inputs                           | targets                         | task id |
|-------------------------------|----------------------------------|---------------------------------|---------|
| `svamp_label`                 | label prefix + x                 | label                           | 1       |
| `svamp_rationale`             | rationale prefix + x             | rationale                       | 2       |
| `svamp_rationale_then_label`  | label prefix + x                 | rationale + " Answer: " + label | 1       |
| `svamp_label_given_rationale` | label prefix + x + " Rationale: " + rationale | label              | 1       |
| `svamp_step_by_step`          | a mixture: `svamp_label` and `svamp_rationale` in strict turns               |
| `svamp_cascade`               | a mixture: `svamp_label_given_rationale` and `svamp_rationale`, likewise     |

Validation and test have no rationale in the inputs of `svamp_label_given_rationale`: the student writes it first.
and plain text has `corpus_span_corruption` (corpus.py), with task id 1. Mixtures of several datasets, such as
`svamp.cqa_step_by_step`, and their task ids: task_names.py.

Adding a dataset (catalogue.py) and `configure` register the tasks. `<records_dir>/<dataset>/<split>.jsonl` is read when
a task is first used.
Importing this module imports TensorFlow, which takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from sbs_jax import checks
from sbs_jax.data import catalogue, corpus, outside, records, seqio_tasks, table_cache, task_names, tokens, vocabularies
from sbs_jax.data.catalogue import add as add  # parts of this module's interface
from sbs_jax.data.catalogue import get, registered
from sbs_jax.data.catalogue import names as names
from sbs_jax.data.dataset import KINDS, MIXTURES, Dataset
from sbs_jax.data.selection import (
    ANSWER_MARKER,
    LABEL_GIVEN_RATIONALE,
    RATIONALE,
    RATIONALE_THEN_LABEL,
    TASKS,
    TEST,
    TRAIN,
    VALIDATION,
    DataOptions,
    Examples,
    Selection,
    of_dataset,
    rows_of,
    select,
)
from sbs_jax.storage import checksums, places
from sbs_jax.storage.json_files import brief

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------- registration

_options = DataOptions(records_dir="records", vocabulary=tokens.BYTE_VOCABULARY)
_MOST_OBJECTIVES = 1_000  # size of the vocabulary of task ids
_mixtures: set[str] = set()  # of several datasets, asked for so far


def configure(options: DataOptions) -> None:
    """Registers all tasks and mixtures again under these options, and clears the cached files."""
    global _options
    for name, value in (("NUMBER_SLOTS", options.number_slots), ("CORPUS", options.corpus)):
        if value:
            tokens.check_sentinels(options.vocabulary, owner=name)
    _options = options
    for cached in (_read, _read_selections, _augmentation, counts, token_tables, _corpus):
        cached.cache_clear()
    outside.forget()
    for dataset in registered().values():
        _register(dataset)
    _register_corpus()
    for name in _mixtures:
        _register_mixture(name)


def task_name(*, dataset: str | Sequence[str], kind: str) -> str:
    """Returns a name as `task_names.task_name`, and registers it if it is a mixture of several datasets.

    gin's method files use it, also those of T5X, which looks for the name in SeqIO's registry.
    """
    name = task_names.task_name(dataset=dataset, kind=kind)
    if len(task_names.parts(name)) > 1:
        _mixtures.add(name)
        _register_mixture(name)
    return name


def options() -> DataOptions:
    """Returns the current options."""
    return _options


def vocabulary(name: str) -> vocabularies.Vocabulary:
    """Checks a vocabulary, then returns it."""
    tokens.check_vocabulary(name)
    return tokens.vocabulary(name)


def _features() -> dict[str, Any]:
    text = tokens.vocabulary(_options.vocabulary)
    return {
        "inputs": seqio.Feature(vocabulary=text, add_eos=True, dtype=tf.int32),
        "targets": seqio.Feature(vocabulary=text, add_eos=True, dtype=tf.int32),
        "task_ids": seqio.Feature(
            vocabulary=seqio.PassThroughVocabulary(size=_MOST_OBJECTIVES), add_eos=False, dtype=tf.int32
        ),
    }


def _register_corpus() -> None:
    seqio.TaskRegistry.remove(corpus.TASK)
    seqio.TaskRegistry.add(
        corpus.TASK,
        source=seqio_tasks.CorpusSource(  # pyright: ignore[reportArgumentType]  # as SeqIO's own sources
            splits=functools.partial(available_splits, corpus.DATASET.name),
            table=lambda split: token_tables(corpus.TASK, split)["text"],
        ),
        preprocessors=[
            functools.partial(seqio_tasks.corrupt, options=_options),
            functools.partial(seqio_tasks.cut_and_number, task_id=task_names.TASK_IDS[corpus.SPAN_CORRUPTION]),
        ],
        output_features=_features(),
        metric_fns=[],
    )


def _register(dataset: Dataset) -> None:
    features = _features()
    for kind in TASKS:
        name = f"{dataset.name}_{kind}"
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio_tasks.RecordsSource(  # pyright: ignore[reportArgumentType]  # as SeqIO's own sources
                name,
                splits=functools.partial(available_splits, dataset.name),
                examples=examples,
                token_tables=token_tables,
            ),
            preprocessors=[functools.partial(seqio_tasks.cut_and_number, task_id=task_names.TASK_IDS[kind])],
            output_features=features,
            postprocess_fn=functools.partial(graded_text, kind=kind),
            # SeqIO's evaluator asks once; the answer of `label_given_rationale` needs two steps (evaluate.py).
            metric_fns=[] if kind in (RATIONALE, LABEL_GIVEN_RATIONALE) else list(dataset.metric_fns),
            shuffle_buffer_size=None,  # RecordsSource shuffles
        )
    for kind in MIXTURES:
        _register_mixture(f"{dataset.name}_{kind}")


def _register_mixture(name: str) -> None:
    """Registers a mixture whose tasks take the turns that `batches.train_dataset` gives them."""
    tasks = task_names.subtasks(name)
    ids = dict(zip(tasks, task_names.task_ids(name), strict=True))
    in_seqio = sorted(tasks)  # SeqIO's order
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(
        name,
        [*tasks],
        default_rate=1.0,
        sample_fn=functools.partial(
            seqio_tasks.take_turns,
            turns=lambda: np.array([in_seqio.index(task) for task in tasks])[
                task_names.turns(name, _options, rows={task: len(examples(task, TRAIN)) for task in tasks})
            ],
            task_ids=[ids[task] for task in in_seqio],
        ),
    )


def graded_text(text: str, *, kind: str, **unused: Any) -> str:
    """Returns the stripped text to grade; for `rationale_then_label`, only the part after the last "Answer:".

    >>> graded_text("Half of 84 is 42. Answer: ( 84.0 / 2.0 )", kind="rationale_then_label")
    '( 84.0 / 2.0 )'
    >>> graded_text("Half of 84 is 42.", kind="rationale_then_label")
    ''
    """
    if kind == RATIONALE_THEN_LABEL:
        text = text.rpartition(ANSWER_MARKER)[2] if ANSWER_MARKER in text else ""
    return text.strip()


# ------------------------------------------------------------------------------ reading files


def selected(name: str, split: str) -> Selection:
    """Returns the examples of a dataset's split under the current options; its file is read once per `configure`.

    FileNotFoundError names the command that writes the records; ValueError if the dataset has no such split.
    """
    return _read_selections(name, _files_of_split(name, split)[0])[split]


def read_split(name: str, split: str) -> list[records.Record]:
    """Reads the records of a split, whatever the fraction; those of training with the augmentation."""
    files, shared = _files_of_split(name, split)
    hold_out = shared and VALIDATION in available_splits(name)
    found, _ = rows_of(_read(name, files), _options, split=split, hold_out=hold_out)
    return [*found, *(_augmentation(name) if split == TRAIN else ())]


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Keeps Python from searching for cycles, which takes longer than the rest while millions of objects are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
@_without_collector()
def _read(name: str, files: tuple[str, ...]) -> list[records.Record]:
    """Reads the records of some of a dataset's files, whose ids must be distinct; once per `configure`."""
    found: list[records.Record] = []
    file_of_id: dict[str, Path] = {}
    for path in (_records_file(name, file) for file in files):
        found += (rows := _read_file(name, path))
        for row in rows if len(files) > 1 else ():
            if file_of_id.setdefault(row.id, path) != path:
                raise ValueError(
                    f"The id {brief(row.id)} is in {file_of_id[row.id]} and in {path}; folds join the rows of all "
                    "files, so make ids distinct."
                )
    return found


def _read_file(name: str, path: str | Path) -> list[records.Record]:
    rows = records.read_records(path, replies=False, sha256=_sha256(path))
    get(name).check_labels(rows, where=lambda number: f"{path}:{number + 1}")  # read_records refuses blank lines
    return rows


def _augmentation_file(name: str) -> Path:
    if not places.of(name).exists():
        raise FileNotFoundError(
            f"There is no augmentation {name}; write it with `sbs records --augmentation`, or set it to None."
        )
    return places.of(name)


@functools.cache
def _augmentation(name: str) -> tuple[records.Record, ...]:
    """Reads the rows of `augmentation`. ValueError if one has the id of a row of the dataset."""
    if _options.augmentation is None:
        return ()
    path = _augmentation_file(_options.augmentation)
    found = _read_file(name, path)
    ids = {row.id for row in found}
    for file in map(functools.partial(_records_file, name), (TRAIN, VALIDATION, TEST)):
        own = records.read_records(file) if file.exists() else []
        if taken := next((row.id for row in own if row.id in ids), None):
            raise ValueError(
                f"{path} has the id {brief(taken)}, which {file} has too; augmentation adds other rows, so leave it "
                "out or give it another id."
            )
    return tuple(found)


def texts(datasets: Sequence[str], split: str) -> list[str]:
    """Returns all that a student may read or write about a split's rows: inputs with each prefix, labels, rationales.

    [] if no dataset has the split. Labels of closed sets, and each row's choices, are included.
    """
    found: dict[str, None] = {}
    for name in datasets:
        if split not in available_splits(name):
            continue
        for kind in TASKS:
            chosen = selected(name, split).examples[kind]
            found |= dict.fromkeys((*chosen.texts("inputs"), *chosen.texts("targets")))
    return list(found | dict.fromkeys(labels(datasets, split)))


def labels(datasets: Sequence[str], split: str) -> list[str]:
    """Returns the labels of closed sets, and labels and choices of a split's rows; [] if no dataset has the split."""
    found: dict[str, None] = {}
    for name in datasets:
        if split not in available_splits(name):
            continue
        found |= dict.fromkeys(get(name).labels or ())
        for record in read_split(name, split):
            found |= dict.fromkeys(filter(None, (record.label, record.teacher_label, *record.choices)))
    return list(found)


def manifest(
    mixture_or_task: str, *, lengths: Mapping[str, int] = corpus.DATASET.feature_lengths, counted: bool = True
) -> dict[str, Any]:
    """Describes the data of a run for its log and manifest: options, counts, hashes of the files.

    {"dataset": "svamp", "options": {..}, "vocabulary_sha256": .., "splits": {"train": {"file": "train.jsonl",
    "sha256": .., "counts": {..}}, ..}}. Leaves out splits that the dataset does not have. The vocabulary's hash is None
    for "byte", which has no file. A task from outside has the hash of its rows under these lengths, as that of a file.

    Several datasets are {"dataset": "svamp.cqa", "parts": {"svamp_label": {as above}, ..}, "splits": {}, ..}. Unless
    `counted`, no rows of records are read.
    """
    found = {part: _of_part(part, lengths, counted=counted) for part in task_names.parts(mixture_or_task)}
    if [*found] == [mixture_or_task]:
        return found[mixture_or_task]
    first = next(iter(found.values()))
    return {
        "dataset": task_names.JOINT.join(task_names.datasets(mixture_or_task)),
        "options": first["options"] if task_names.is_outside(mixture_or_task) else dataclasses.asdict(_options),
        "vocabulary_sha256": first["vocabulary_sha256"],
        "splits": {},
        "parts": found,
    }


def _of_part(part: str, lengths: Mapping[str, int], *, counted: bool) -> dict[str, Any]:
    dataset, kind = task_names.split(part)
    if kind == outside.KIND:
        found = _facts(dataset.name, outside.sources(part, lengths, _options))
        found["options"] |= {"label_prefix": "", "rationale_prefix": ""}
    else:
        found = sources(dataset.name)
        for split, facts in found["splits"].items() if counted else ():
            if dataset == corpus.DATASET:
                facts["counts"] = corpus.counts(_corpus()[split], vocabulary(_options.vocabulary))
            else:
                facts["counts"] = dict(counts(dataset.name, split))
    # With the definition, the run needs no dataset.json; a module is named, for catalogue.restore_from.
    more = {"definition": dataset.definition, "module": dataset.module and dict(dataset.module)}
    return found | {name: value for name, value in more.items() if value is not None}


def is_of_records(part: str) -> bool:
    """Tells whether a part is made of records; plain text and tasks from outside are not."""
    return task_names.split(part)[1] in KINDS


def sources(name: str) -> dict[str, Any]:
    """Returns the manifest of a dataset without counts and definition; reads no rows."""
    found = {}
    for split in available_splits(name):
        paths = [*_options.corpus] if name == corpus.DATASET.name else _paths(name, split)
        found[split] = {
            "file": " ".join(places.of(path).name for path in paths),
            "sha256": " ".join(map(_sha256, paths)),
        }
    return _facts(name, found)


def _paths(name: str, split: str) -> list[Path]:
    """Lists the files whose rows may be in a split, with the augmentation."""
    found = [_records_file(name, file) for file in _files_of_split(name, split)[0]]
    if split == TRAIN and _options.augmentation is not None:
        found.append(_augmentation_file(_options.augmentation))
    return found


def _facts(name: str, splits: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dataset": name,
        "options": dataclasses.asdict(of_dataset(_options, name)),
        "vocabulary_sha256": tokens.vocabulary_sha256(_options.vocabulary),
        "splits": splits,
    }


def _sha256(path: str | Path) -> str:
    """Hashes a file once per change, because every cell of a sweep asks for the same files."""
    status = places.of(path).stat()
    return _sha256_of_version(places.of(path), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _sha256_of_version(path: Path, changed: int, size: int) -> str:
    del changed, size
    return checksums.file_sha256(path)


def available_splits(name: str) -> tuple[str, ...]:
    """Returns the splits that the dataset's records, or the corpus, provide under the current options."""
    if name == corpus.DATASET.name:
        return corpus.splits(_options)
    found = []
    for split in (TRAIN, VALIDATION, TEST):
        try:
            _files_of_split(name, split)
        except ValueError:
            continue
        found.append(split)
    return tuple(found)


def _files_of_split(name: str, split: str) -> tuple[tuple[str, ...], bool]:
    """Returns the files a split's rows come from, by their own split, and whether train and validation share them."""
    checks.choice(f"The split of {name}", split, (TRAIN, VALIDATION, TEST))
    _check_records_exist(name)
    existing = tuple(file for file in (TRAIN, VALIDATION, TEST) if _records_file(name, file).exists())
    train_split = of_dataset(_options, name).train_split
    assert isinstance(train_split, str)
    shared = bool(_options.folds) or train_split == VALIDATION or VALIDATION not in existing
    files = (split if split == TEST or not shared else train_split,)
    if _options.folds:
        files = existing
    missing = next((file for file in files if file not in existing), None)
    if missing or (split == VALIDATION and shared and _options.validation_fraction == 0):
        why = (
            f"there is no {_records_file(name, missing)} (put it back, or write it with `sbs records`)"
            if missing
            else "validation_fraction is 0 and there is no validation file"
        )
        raise ValueError(f"{name} has no {split} split: {why}.")
    return files, shared and split != TEST


def _records_file(name: str, split: str) -> Path:
    return records.file_of(places.of(_options.records_dir) / name, split)


def _check_records_exist(name: str) -> None:
    get(name)
    records.check_exist(_options.records_dir, name)


@functools.cache
def counts(name: str, split: str) -> Mapping[str, int]:
    """Counts used and unused rows of a split as `Selection`; warns of teacher labels that cannot be one."""

    def make() -> table_cache.Entry:
        chosen = selected(name, split)
        warnings = _impossible_labels(name, _files_of_split(name, split)[0]) if split == TRAIN else ()
        return table_cache.Entry(facts=dict(chosen.counts), warnings=warnings)

    return _logged(table_cache.entry(_key(name, split), make)).facts


def _key(name: str, split: str, *, task: str | None = None) -> dict[str, Any] | None:
    """Describes all that a split's rows, or a task's tokens, depend on; None if they are not worth keeping.

    They are not kept either where a dataset's own code chooses rationales, which no hash describes.
    """
    paths = _paths(name, split)
    dataset = get(name)
    if sum(places.of(path).stat().st_size for path in paths) < table_cache.LARGE:
        return None
    if _options.rationales == "agreeing" and dataset.definition is None:
        return None
    described = dataclasses.asdict(of_dataset(_options, name))
    for file in ("records_dir", "augmentation", "vocabulary"):
        del described[file]
    found = {
        "split": split,
        "files": [(path.name, _sha256(path)) for path in paths],
        "splits": available_splits(name),
        "options": described,
        "dataset": [name, dataset.definition, dataset.module and dict(dataset.module)],
    }
    if task is not None:
        library = vocabularies.kind_of(_options.vocabulary).library
        found |= {
            "task": task,
            "vocabulary": tokens.vocabulary_sha256(_options.vocabulary),
            "library": library and importlib.metadata.version(library),
        }
    return found


def _logged(entry: table_cache.Entry) -> table_cache.Entry:
    for warning in entry.warnings:
        log.warning("Warning: %s", warning)
    return entry


def _impossible_labels(name: str, files: tuple[str, ...]) -> list[str]:
    """Warns of teacher labels that are trained on and cannot be one."""
    if _options.label_source != "teacher":
        return []
    rows = _read(name, files)
    if not (impossible := get(name).impossible_labels(rows)):
        return []
    return [
        f"{name}, {', '.join(files)}: {len(impossible):,} of "
        f"{sum(row.teacher_label is not None for row in rows):,} teacher labels are no possible label of their row, "
        f"such as {brief(impossible[0].teacher_label)} of the row {brief(impossible[0].id)}. Trained on them, the "
        "student answers so; records of the strict parser have none."
    ]


@functools.cache
@_without_collector()
def _read_selections(name: str, files: tuple[str, ...]) -> dict[str, Selection]:
    """Selects the examples of all splits that come from the same files, so that these are read once."""
    rows = _read(name, files)
    found = {}
    for split in available_splits(name):
        source, shared = _files_of_split(name, split)
        if source == files:
            hold_out = shared and VALIDATION in available_splits(name)
            further = _augmentation(name) if split == TRAIN else ()
            same = get(name).same_label
            options = of_dataset(_options, name)
            found[split] = select(rows, options, same_label=same, split=split, hold_out=hold_out, further=further)
    return found


def examples(task_name: str, split: str) -> Examples:
    """Returns a task's examples in the order of the records; ValueError if there are none."""
    dataset, kind = task_names.split(task_name)
    chosen = selected(dataset.name, split)
    if not chosen.examples.get(kind):
        why = "it is a mixture" if kind in MIXTURES else f"counts: {dict(chosen.counts)}"
        raise ValueError(f"{task_name} has no examples in {split}; {why}.")
    return chosen.examples[kind]


@functools.cache
def token_tables(task_name: str, split: str) -> Mapping[str, tokens.TokenTable]:
    """Encodes a task's examples: {"inputs": table, "targets": table}, nothing cut.

    If rows have several rationales, "targets" has all of them, and row i of a third table, `tokens.TARGETS_OF`, has the
    numbers of those of input i. If rows have weights, `tokens.WEIGHTS` has them.

    Runs once per `configure`, at about 100,000 short texts per second. Warns of pieces that the vocabulary lacks;
    ValueError if a label of a closed set has one. The texts of a corpus are {"text": table}, whose rows `corpus.Rows`
    makes.
    """
    kind = task_names.split(task_name)[1]
    if kind == corpus.SPAN_CORRUPTION:
        if split not in available_splits(corpus.DATASET.name):
            raise ValueError(f"A corpus has no {split} split; it has {' and '.join(corpus.splits(_options))}.")
        return {"text": _corpus()[split]}
    key = _key(task_names.split(task_name)[0].name, split, task=task_name)
    return _logged(table_cache.entry(key, lambda: _encoded(task_name, split))).tables


@_without_collector()
def _encoded(task_name: str, split: str) -> table_cache.Entry:
    """Encodes the examples of a task that is made of records."""
    text_vocabulary, (dataset, kind) = vocabulary(_options.vocabulary), task_names.split(task_name)
    rows = examples(task_name, split)
    _check_labels_can_be_written(dataset, text_vocabulary)
    tables, warnings = {}, []
    for feature in ("inputs", "targets"):
        table = tables[feature] = tokens.TokenTable.of(rows.texts(feature), text_vocabulary)
        if feature == "inputs" and kind == RATIONALE:
            continue  # the label task has the same inputs
        if unknown := table.rows_with(text_vocabulary.unknown_id):
            text = next(itertools.islice(rows.texts(feature), unknown[0], None))
            warnings.append(
                f"{task_name}, {split}: {len(unknown):,} of {len(table):,} {feature} "
                f"({100 * len(unknown) / len(table):.2g} %) have pieces that the vocabulary {_options.vocabulary} "
                f"lacks, such as {tokens.unknown_piece(text, text_vocabulary)!r}; the "
                f"student {'reads <unk> in their place' if feature == 'inputs' else 'cannot write them'}. Replace them "
                "in the records, or take a vocabulary and a student that have them."
            )
    if (several := rows.target_counts()) is not None:
        ends = np.cumsum([0, *several])
        tables[tokens.TARGETS_OF] = tokens.TokenTable(ids=np.arange(ends[-1], dtype=np.int32), starts=ends)
    if (weights := rows.weights()) is not None:
        tables[tokens.WEIGHTS] = tokens.TokenTable(
            ids=np.asarray(weights, np.float32), starts=np.arange(len(weights) + 1)
        )
    return table_cache.Entry(tables=tables, warnings=warnings)


def _check_labels_can_be_written(dataset: Dataset, text_vocabulary: vocabularies.Vocabulary) -> None:
    labels = list(dataset.labels or ())
    unknown = tokens.TokenTable.of(labels, text_vocabulary).rows_with(text_vocabulary.unknown_id)
    if unknown:
        piece = tokens.unknown_piece(labels[unknown[0]], text_vocabulary)
        raise ValueError(
            f"The vocabulary {_options.vocabulary} lacks {piece!r}, a piece of {len(unknown)} of the labels of "
            f"{dataset.name}, {brief(list(labels))}: no student can write them. Cut the vocabulary with this dataset's "
            "records (sbs vocabulary), or take the whole one."
        )


@functools.cache
def _corpus() -> Mapping[str, tokens.TokenTable]:
    return corpus.read(_options, vocabulary(_options.vocabulary))


catalogue.on_add(_register)
