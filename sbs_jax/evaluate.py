"""Run a student over a task (metrics and predictions) or over a file of inputs (predictions)."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbs_jax import (
    adapters,
    checkpoints,
    datasets,
    decoding,
    features,
    frozen,
    hosts,
    identity,
    partitioning,
    records,
    run_dir,
    selection,
    t5,
)
from tasks import metrics as grading

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """Metrics (accuracies in percent) and one row per example: id, inputs, target, prediction, correct, score."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


class Evaluator:
    """Grades parameters on one split of a task by greedy generation; compiles once, tokenizes once."""

    def __init__(
        self,
        *,
        task_name: str,
        split: str,
        structure: t5.Structure,
        partitioner: partitioning.Partitioner,
        task_feature_lengths: Mapping[str, int],
        batch_size: int,
        max_decode_length: int,
    ) -> None:
        self._dataset, self._kind = datasets.split_task(task_name)
        self.primary_metric = self._dataset.primary_metric
        self._task_name, self._split = task_name, split
        self._examples = features.eval_examples(task_name, split=split, lengths=task_feature_lengths)
        if not self._examples:
            raise ValueError(f"Split {split!r} of {task_name} is empty; there is nothing to evaluate.")
        tokens = np.stack([e.features["encoder_input_tokens"] for e in self._examples])
        hosts.agree({f"{task_name} {split}": hashlib.sha256(tokens.data).hexdigest()})
        self._tokens_NS = tokens
        self._generator = Generator(structure, partitioner=partitioner, batch_size=batch_size, length=max_decode_length)
        self._vocabulary = datasets.vocabulary(datasets.options().vocabulary)

    def run(self, parameters: t5.Parameters, *, before_batch: Callable[[], None] = lambda: None) -> Result:
        """Generates for every example and grades the texts. What `before_batch` raises ends it."""
        generated = self._generator.run(parameters, self._tokens_NS, before_batch=before_batch)
        rows, predictions = [], []
        for example, (ids, score) in zip(self._examples, generated, strict=True):
            text = self._vocabulary.decode(ids)
            prediction = datasets.graded_text(text, kind=self._kind)
            predictions.append(prediction)
            row = {"id": example.id, "input": example.inputs, "target": example.label}
            row |= {"prediction": prediction, "correct": self._dataset.same_label(example.label, prediction)}
            if text != prediction:
                row["text"] = text
            rows.append(row | {"score": score})
        targets = [e.label for e in self._examples]
        values: dict[str, float] = {}
        for metric in self._dataset.metric_fns:
            values |= {name: float(value) for name, value in metric(targets, predictions).items()}
        if values[self.primary_metric] == 0.0:
            self._sound_alarm(predictions)
        return Result(values, rows)

    def _sound_alarm(self, predictions: Sequence[str]) -> None:
        possible = self._dataset.labels or self._dataset.is_label or {e.label for e in self._examples}
        alarm = grading.label_format_alarm(predictions, possible)
        if alarm:
            log.warning("%s, %s: %s", self._task_name, self._split, alarm)


class Generator:
    """Greedy generation for any number of source rows, a fixed batch at a time.

    Of several processes each gives all rows and gets all answers, and puts on its devices what belongs there.
    """

    def __init__(
        self, structure: t5.Structure, *, partitioner: partitioning.Partitioner, batch_size: int, length: int
    ) -> None:
        pieces = partitioner.data_parallel_size
        # Rows that fill the last batch up are padding, which costs nothing and is dropped again.
        self._batch_size = -(-batch_size // pieces) * pieces
        self._partitioner = partitioner

        def generate(parameters: t5.Parameters, tokens: jax.Array):
            with partitioner.constraining():
                return decoding.greedy(t5.join(structure, parameters), tokens, length=length)

        self._generate = jax.jit(generate, out_shardings=partitioner.replicated)

    def lower(self, parameters: Mapping[str, jax.ShapeDtypeStruct], *, inputs: int) -> jax.stages.Lowered:
        """What `run` computes for a batch of rows of `inputs` tokens, to be compiled, also for devices that are absent.

        The abstract parameters carry their shardings.
        """
        tokens = jax.ShapeDtypeStruct((self._batch_size, inputs), jnp.int32, sharding=self._partitioner.batch)
        return self._generate.lower(parameters, tokens)

    def run(
        self, parameters: t5.Parameters, tokens_NS: np.ndarray, *, before_batch: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[list[int], float]]:
        """(token ids without EOS and padding, natural log probability) of each source row, in order."""
        mine = self._partitioner.local_rows(self._batch_size)
        for start in range(0, len(tokens_NS), self._batch_size):
            before_batch()
            rows = tokens_NS[start : start + self._batch_size]
            filled = np.zeros((self._batch_size, tokens_NS.shape[1]), np.int32)
            filled[: len(rows)] = rows
            batch = self._partitioner.put_batch({"tokens": filled[mine]})["tokens"]
            tokens, scores = jax.device_get(self._generate(parameters, batch))
            for ids, score in zip(tokens[: len(rows)], scores, strict=False):
                yield [int(i) for i in ids if i not in (decoding.PAD, decoding.EOS)], float(score)


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained model of a run directory, with the options it was trained under."""

    config: t5.T5Config
    structure: t5.Structure
    parameters: t5.Parameters
    partitioner: partitioning.Partitioner
    step: int
    manifest: dict[str, Any]
    options: datasets.DataOptions


def load_student(
    path: str | Path, *, layout: partitioning.Layout, records_dir: str | None = None, base: str | None = None
) -> Student:
    """The student of a run directory (its best step) or of one `checkpoints/<step>`; registers its tasks.

    Vocabulary, prefixes and lengths are those it was trained with; `records_dir` may have moved, and so may the `base`
    of a run that trained adapters.
    """
    return _load_sharing(path, {}, layout=layout, records_dir=records_dir, base=base)[0]


def load_students(
    path: str | Path, others: Mapping[str, str | Path], *, layout: partitioning.Layout, base: str | None = None
) -> tuple[Student, dict[str, Student]]:
    """A run that trained adapters, and others by name, over one base, which is read and held once.

    Registers the tasks of the first. ValueError where they were trained on different bases, or hold theirs otherwise.
    """
    return _load_sharing(path, others, layout=layout, records_dir=None, base=base)


@dataclasses.dataclass(frozen=True)
class _Trained:
    """What a run trained, and the shapes of all that its student has."""

    owner: str
    config: t5.T5Config
    tuning: adapters.Tuning | None
    adapted: adapters.Adapted
    like: dict[str, jax.ShapeDtypeStruct]
    parameters: t5.Parameters
    base: dict[str, Any] | None
    step: int
    manifest: dict[str, Any]

    def student(
        self, frozen: Mapping[str, jax.Array], *, partitioner: partitioning.Partitioner, options: datasets.DataOptions
    ) -> Student:
        parameters = {**{name: frozen[name] for name in self.like if name in frozen}, **self.parameters}
        return Student(
            *(self.config, self.adapted.structure, parameters, partitioner, self.step, self.manifest, options)
        )


def _load_sharing(
    path: str | Path,
    others: Mapping[str, str | Path],
    *,
    layout: partitioning.Layout,
    records_dir: str | None,
    base: str | None,
) -> tuple[Student, dict[str, Student]]:
    partitioner = layout.partitioner()
    first = _read_trained(path, partitioner)
    named = {name: _read_trained(place, partitioner) for name, place in others.items()}
    held: t5.Parameters = {}
    for each in (first, *named.values()):
        if each.tuning is None and (named or base is not None):
            raise ValueError(
                f"{each.owner} has no adapters: everything was trained, and it needs no base. Only runs that trained "
                "adapters share one; predict with this one by itself."
            )
    if first.tuning is not None and first.base is not None:
        for each in named.values():
            _check_shared(first, each)
        found = frozen.load(
            *(first.config, first.tuning),
            path=identity.place(first.base, base, owner=first.owner),
            seed=first.base["seed"],
            like=first.like,
            partitioner=partitioner,
        )
        identity.check(found.identity, first.base, owner=first.owner)
        held = {**found.frozen, **found.trained}
    options = _options(first)
    if records_dir is not None:
        options = dataclasses.replace(options, records_dir=records_dir)
    datasets.configure(options)
    return (
        first.student(held, partitioner=partitioner, options=options),
        {name: each.student(held, partitioner=partitioner, options=_options(each)) for name, each in named.items()},
    )


def _options(trained: _Trained) -> datasets.DataOptions:
    return datasets.DataOptions(**trained.manifest["data"]["options"])


def _read_trained(path: str | Path, partitioner: partitioning.Partitioner) -> _Trained:
    directory, step = checkpoints.locate(path)
    manifest = run_dir.read_manifest(directory)
    metadata = checkpoints.read_metadata(directory, step)
    config, tuning = t5.T5Config.of(metadata["model"]), adapters.Tuning.of(metadata.get("tuning"))
    adapted = adapters.abstract(config, tuning)
    like = partitioner.placed(adapted.shapes, parameters=adapted.shapes, axes=adapted.axes)
    checkpoint = directory / "checkpoints" / str(step)
    parameters = checkpoints.load_parameters(checkpoint, like=adapted.parts(like)[0])
    base = metadata.get("base")
    return _Trained(str(directory), config, tuning, adapted, like, parameters, base, step, manifest)


def _check_shared(first: _Trained, other: _Trained) -> None:
    """ValueError unless the base, as the first run holds it, serves the other as well."""
    assert first.base is not None
    assert other.base is not None
    if first.base["fingerprint"] != other.base["fingerprint"]:
        raise ValueError(
            f"{first.owner} and {other.owner} have adapters of different bases: {identity.described(first.base)} "
            f"(fingerprint {first.base['fingerprint'][:16]}) and {identity.described(other.base)} "
            f"({other.base['fingerprint'][:16]}). Adapters of one base are answered with together; the others by "
            "themselves."
        )
    needed = other.adapted.parts(other.like)[1]
    for name, leaf in needed.items():
        held = first.like.get(name)
        if held is None or (held.shape, held.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{first.owner} and {other.owner} hold their base in different ways ({_holding(first)}, "
                f"{_holding(other)}), which differ in {name}. Adapters of a base that is held alike are answered with "
                "together; predict with these runs by themselves."
            )


def _holding(trained: _Trained) -> str:
    assert trained.tuning is not None
    return trained.tuning.base


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `sbs evaluate` grades. Bound by `gin_configs/runs/evaluate.gin`; None means: as in the run."""

    checkpoint_path: str
    split: str
    mixture_or_task_name: str | None
    records_dir: str | None
    batch_size: int
    max_decode_length: int | None
    output_dir: str | None
    layout: partitioning.Layout
    base: str | None = None  # where the base of a run that trained adapters lies, if it has moved


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Grades a checkpoint on a split; writes predictions and `metrics.json` to `output_dir` if there is one."""
    student = load_student(
        config.checkpoint_path, layout=config.layout, records_dir=config.records_dir, base=config.base
    )
    run = student.manifest["run"]
    task = datasets.graded_task(config.mixture_or_task_name or run["mixture_or_task_name"])
    if task is None:
        raise ValueError(
            f"{config.mixture_or_task_name} generates rationales, which nothing grades; name a label task."
        )
    evaluator = Evaluator(
        task_name=task,
        split=config.split,
        structure=student.structure,
        partitioner=student.partitioner,
        task_feature_lengths=run["task_feature_lengths"],
        batch_size=config.batch_size,
        max_decode_length=config.max_decode_length or run["max_decode_length"],
    )
    result = evaluator.run(student.parameters)
    if config.output_dir is not None and hosts.is_first():
        directory = Path(config.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        write_rows(directory / f"{task}-{config.split}-{student.step}.jsonl", result.rows)
        summary = {"task": task, "split": config.split, "step": student.step, **result.metrics}
        (directory / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    return result.metrics


def predict(
    model: str | Path,
    *,
    input_path: str | Path,
    output_path: str | Path,
    objective: str,
    batch_size: int,
    base: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> int:
    """Answers each `{"id", "input"}` row of a file with `{"id", "prediction", "score"}`; returns their number.

    `input` is the text without prefix, which comes from the saved configuration. `score` is the natural log
    probability of the prediction. Every row is read and checked before the first is answered. A row may name one of
    `adapters`, runs over the same base as `model`, in "adapter"; it is answered with that run, by that run's
    vocabulary, prefix and lengths.
    """
    named = adapters or {}
    rows = list(read_inputs(input_path, adapters=named))
    student, others = load_students(model, named, layout=partitioning.DATA_PARALLEL, base=base)
    places = {None: str(model), **{name: str(place) for name, place in named.items()}}
    asked = {}
    for name, each in {None: student, **others}.items():
        texts = {number: row["input"] for number, row in enumerate(rows) if row.get("adapter") == name}
        if texts:
            asked[name] = _Asked.of(texts, each, owner=places[name], objective=objective)
    hosts.agree(
        {
            "inputs": hashlib.sha256(b"".join(each.tokens.tobytes() for each in asked.values())).hexdigest(),
            "student": ", ".join(f"{places[name]} step {each.student.step}" for name, each in asked.items()),
        }
    )
    answers: dict[int, dict[str, Any]] = {}
    for each in asked.values():
        for number, (text, score) in zip(each.numbers, each.answers(batch_size), strict=True):
            answers[number] = {"id": rows[number]["id"], "prediction": text, "score": score}
    return write_rows(output_path, (answers[number] for number in range(len(rows)))) if hosts.is_first() else len(rows)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The rows of a file that one student answers, by their numbers."""

    student: Student
    numbers: list[int]
    tokens: np.ndarray
    kind: str
    length: int  # of an answer, in tokens

    @classmethod
    def of(cls, texts: Mapping[int, str], student: Student, *, owner: str, objective: str) -> "_Asked":
        options, run = student.options, student.manifest["run"]
        kind = datasets.split_task(run["mixture_or_task_name"])[1]
        if objective == datasets.RATIONALE and kind == datasets.LABEL:
            log.warning("%s was trained on labels alone; its rationales mean nothing.", owner)
        if objective == datasets.RATIONALE:
            kind, prefix, length = objective, options.rationale_prefix, run["task_feature_lengths"]["targets"]
        else:
            kind = datasets.RATIONALE_THEN_LABEL if kind == datasets.RATIONALE_THEN_LABEL else datasets.LABEL
            prefix, length = options.label_prefix, run["max_decode_length"]
        tokens, truncated = features.encode_inputs(
            [prefix + text for text in texts.values()],
            vocabulary=datasets.vocabulary(options.vocabulary),
            length=run["task_feature_lengths"]["inputs"],
        )
        if truncated:
            cut = truncated, len(texts), tokens.shape[1]
            log.warning("%d of %d inputs are longer than %d tokens and were cut.", *cut)
        return cls(student, list(texts), tokens, kind, length)

    def answers(self, batch_size: int) -> Iterator[tuple[str, float]]:
        student, vocabulary = self.student, datasets.vocabulary(self.student.options.vocabulary)
        generator = Generator(
            student.structure, partitioner=student.partitioner, batch_size=batch_size, length=self.length
        )
        for ids, score in generator.run(student.parameters, self.tokens):
            yield datasets.graded_text(vocabulary.decode(ids), kind=self.kind), score


def read_inputs(path: str | Path, *, adapters: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file that have the texts `id` and `input`, and perhaps `adapter`, one of those named.

    ValueError, with file and line, for another row.
    """
    seen: dict[str, int] = {}
    with Path(path).open("rb") as file:
        # Bytes are split at "\n" alone: text may hold other characters that end a line elsewhere.
        for number, data in enumerate(file, start=1):
            where = f"{path}:{number}"
            line = records.decoded(data, where)
            if not line.strip():
                continue
            row = records.parse_json(line, where)
            if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("id", "input")):
                raise ValueError(f'{where}: expected {{"id": text, "input": text}}, got {line[:80].rstrip()}')
            if row["id"] in seen:
                shown = records.brief(row["id"])
                raise ValueError(f"{where}: id {shown} stands in line {seen[row['id']]} already.")
            if row.get("adapter") is not None:
                _check_adapter(row["adapter"], adapters, where)
            seen[row["id"]] = number
            yield row


def _check_adapter(name: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(name, str) or name not in known:
        listed = ", ".join(map(repr, known))
        there = f"There are {listed}" if listed else "There are none: give some by --adapters NAME=RUN"
        near = selection.near_matches(str(name)[:200], known)
        raise ValueError(f"{where}: no adapter is named {records.brief(name)}.{near} {there}.")


def write_rows(path: str | Path, rows: Any) -> int:
    """Writes JSON lines, then moves the file into place; returns their number."""
    temporary = Path(f"{path}.tmp")
    count = 0
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    temporary.replace(path)
    return count
