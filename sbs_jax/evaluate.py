"""Run a student over a task (metrics and predictions) or over a file of inputs (predictions)."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    partitioning,
    records,
    run_dir,
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


def load_student(
    path: str | Path, *, layout: partitioning.Layout, records_dir: str | None = None, base: str | None = None
) -> Student:
    """The student of a run directory (its best step) or of one `checkpoints/<step>`; registers its tasks.

    Vocabulary, prefixes and lengths are those it was trained with; `records_dir` may have moved, and so may the `base`
    of a run that trained adapters.
    """
    directory, step = checkpoints.locate(path)
    manifest = run_dir.read_manifest(directory)
    options = manifest["data"]["options"]
    if records_dir is not None:
        options = options | {"records_dir": records_dir}
    datasets.configure(datasets.DataOptions(**options))
    metadata = checkpoints.read_metadata(directory, step)
    config, tuning = t5.T5Config.of(metadata["model"]), adapters.Tuning.of(metadata.get("tuning"))
    adapted = adapters.abstract(config, tuning)
    partitioner = layout.partitioner()
    like = partitioner.placed(adapted.shapes, parameters=adapted.shapes, axes=adapted.axes)
    checkpoint = directory / "checkpoints" / str(step)
    parameters = checkpoints.load_parameters(checkpoint, like=adapted.parts(like)[0])
    if tuning is not None:
        known = metadata["base"]
        found = frozen.load(
            *(config, tuning), path=base or known["path"], seed=known["seed"], like=like, partitioner=partitioner
        )
        frozen.check(found.identity, known, owner=str(directory))
        parameters |= found.frozen
    return Student(config, adapted.structure, parameters, partitioner, step, manifest)


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


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Grades a checkpoint on a split; writes predictions and `metrics.json` to `output_dir` if there is one."""
    student = load_student(config.checkpoint_path, layout=config.layout, records_dir=config.records_dir)
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
) -> int:
    """Answers each `{"id", "input"}` row of a file with `{"id", "prediction", "score"}`; returns their number.

    `input` is the text without prefix, which comes from the saved configuration. `score` is the natural log
    probability of the prediction. Every row is read and checked before the first is answered.
    """
    rows = list(read_inputs(input_path))
    student = load_student(model, layout=partitioning.DATA_PARALLEL)
    options, run = datasets.options(), student.manifest["run"]
    kind = datasets.split_task(run["mixture_or_task_name"])[1]
    if objective == datasets.RATIONALE and kind == datasets.LABEL:
        log.warning("This student was trained on labels alone; its rationales mean nothing.")
    if objective == datasets.RATIONALE:
        kind, prefix, length = objective, options.rationale_prefix, run["task_feature_lengths"]["targets"]
    else:
        kind = datasets.RATIONALE_THEN_LABEL if kind == datasets.RATIONALE_THEN_LABEL else datasets.LABEL
        prefix, length = options.label_prefix, run["max_decode_length"]
    vocabulary = datasets.vocabulary(options.vocabulary)
    tokens, truncated = features.encode_inputs(
        [prefix + row["input"] for row in rows],
        vocabulary=vocabulary,
        length=run["task_feature_lengths"]["inputs"],
    )
    if truncated:
        log.warning("%d of %d inputs are longer than %d tokens and were cut.", truncated, len(rows), tokens.shape[1])
    hosts.agree({"inputs": hashlib.sha256(tokens.data).hexdigest(), "student": f"{model} step {student.step}"})
    generator = Generator(student.structure, partitioner=student.partitioner, batch_size=batch_size, length=length)
    answers = (
        {"id": row["id"], "prediction": datasets.graded_text(vocabulary.decode(ids), kind=kind), "score": score}
        for row, (ids, score) in zip(rows, generator.run(student.parameters, tokens), strict=True)
    )
    if hosts.is_first():
        return write_rows(output_path, answers)
    return sum(1 for _ in answers)


def read_inputs(path: str | Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file that have the texts `id` and `input`; errors name file and line."""
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
            seen[row["id"]] = number
            yield row


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
