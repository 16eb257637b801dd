"""Load a student, and run it over a task: metrics and predictions. Over other inputs: prediction/."""

import dataclasses
import functools
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
    identity,
    partitioning,
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
    """Generation for any number of source rows, a fixed batch at a time: greedy, or what `compute` does.

    `compute(model, tokens [B, S], ..)` gives arrays of B rows, of other arrays of B rows besides the tokens; `run`
    needs tokens and scores. Of several processes each gives all rows and gets all answers, and puts on its devices what
    belongs there.
    """

    def __init__(
        self,
        structure: t5.Structure,
        *,
        partitioner: partitioning.Partitioner,
        batch_size: int,
        length: int,
        compute: Callable[..., Any] | None = None,
        smaller: Sequence[int] = (),
    ) -> None:
        """`smaller`: other numbers of rows to compile for; a batch that is not full takes the least that holds it."""
        pieces = partitioner.data_parallel_size
        # Rows that fill a batch up are padding, which is dropped again.
        self._batch_size = -(-batch_size // pieces) * pieces
        rounded = {-(-size // pieces) * pieces for size in smaller if size < batch_size}
        self.sizes = sorted({*rounded, self._batch_size})
        self._partitioner = partitioner
        compute = compute or functools.partial(decoding.greedy, length=length)

        def generate(parameters: t5.Parameters, *rows: jax.Array):
            with partitioner.constraining():
                return compute(t5.join(structure, parameters), *rows)

        self._generate = jax.jit(generate, out_shardings=partitioner.replicated)

    def lower(self, parameters: Mapping[str, jax.ShapeDtypeStruct], *, inputs: int) -> jax.stages.Lowered:
        """What `run` computes for a batch of rows of `inputs` tokens, to be compiled, also for devices that are absent.

        The abstract parameters carry their shardings.
        """
        tokens = jax.ShapeDtypeStruct((self._batch_size, inputs), jnp.int32, sharding=self._partitioner.batch)
        return self._generate.lower(parameters, tokens)

    def run(
        self, parameters: t5.Parameters, *rows: np.ndarray, before_batch: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[list[int], float]]:
        """(token ids without EOS and padding, natural log probability) of each source row, in order."""
        for tokens, scores in self.batches(parameters, *rows, before_batch=before_batch):
            for ids, score in zip(tokens, scores, strict=True):
                yield [int(i) for i in ids if i not in (decoding.PAD, decoding.EOS)], float(score)

    def batches(
        self, parameters: t5.Parameters, *rows: np.ndarray, before_batch: Callable[[], None] = lambda: None
    ) -> Iterator[Any]:
        """What is computed of each batch: the array, or the tuple of arrays, of its rows without those that fill it up.

        `rows` are arrays of as many rows each, tokens `[N, S]` first.
        """

        def filled(rows: np.ndarray) -> np.ndarray:
            size = next(size for size in self.sizes if size >= len(rows))
            padding = np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)
            return np.concatenate([rows, padding])[self._partitioner.local_rows(size)]

        for start in range(0, len(rows[0]), self._batch_size):
            before_batch()
            part = [each[start : start + self._batch_size] for each in rows]
            placed = self._partitioner.put_batch({str(number): filled(each) for number, each in enumerate(part)})
            found = jax.device_get(self._generate(parameters, *placed.values()))
            there = len(part[0])
            yield found[:there] if isinstance(found, np.ndarray) else tuple(each[:there] for each in found)


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
