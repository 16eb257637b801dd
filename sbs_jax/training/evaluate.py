"""Grading of a student on a split of a task: metrics and predictions. For other inputs see prediction/."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbs_jax import compiling, hosts
from sbs_jax.data import batches, grading, registry, selection, task_names
from sbs_jax.data.dataset import BY_LOSS, Dataset, answers_in_two_steps
from sbs_jax.data.grading import SCORE
from sbs_jax.data.tokens import TokenTable
from sbs_jax.storage import atomic, json_files, places
from sbs_jax.student import decoding, families, losses, partitioning, stacks
from sbs_jax.training import stopping
from sbs_jax.training.students import load_student

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """Metrics of a task in percent and one row per example: id, inputs, target, prediction, correct, score, scores.

    `scores` are those of metrics other than `correct`, from 0 to 1 by name, if there are any. A cascade's rows also
    have the rationale that the student wrote and read.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluator(
    *, tasks: Sequence[str], split: str, task_feature_lengths: Mapping[str, int], generators: "Generators"
) -> "Evaluators":
    """Makes the grader of tasks on a split: each by its metric functions, or by loss if it has none."""

    def one(task: str) -> "Evaluator | LossEvaluator":
        options: dict[str, Any] = {"task_name": task, "split": split, "task_feature_lengths": task_feature_lengths}
        if _by_loss(task):
            return LossEvaluator(generator=generators.of(by_loss=True), **options)
        if answers_in_two_steps(task_names.split(task)[1]):
            options["explainer"] = generators.of(length=task_feature_lengths["targets"])
        return Evaluator(generator=generators.of(), **options)

    return Evaluators({task: one(task) for task in tasks})


class Generators:
    """Programs that `evaluator` needs, compiled once for all splits and tasks: to generate, and to compute losses."""

    def __init__(self, *, max_decode_length: int, **options: Any) -> None:
        """Takes the options of `Generator`; each program is made when it is first asked for."""
        self._length, self._options = max_decode_length, options
        self._made: dict[int, Generator] = {}

    def of(self, *, length: int | None = None, by_loss: bool = False) -> "Generator":
        """Returns the program that generates up to `length` tokens (default: of an answer), or computes losses."""
        length = 0 if by_loss else length or self._length
        if length not in self._made:
            compute = _token_sums if by_loss else None
            self._made[length] = Generator(length=length, compute=compute, **self._options)
        return self._made[length]


def _by_loss(task_name: str) -> bool:
    return not task_names.dataset_of(task_name).metric_fns


def buckets(limit: int) -> tuple[int, ...]:
    """Returns lengths to pad inputs to, up to the limit; they are densest at the lengths of most real inputs.

    >>> buckets(112)
    (16, 24, 32, 40, 48, 56, 72, 88, 112)
    """
    found = [limit]
    while True:
        shorter = int(found[-1] * (0.6 if found[-1] > 128 else 0.8) / 8 + 0.5) * 8
        if shorter < 16 or shorter >= found[-1]:
            return tuple(reversed(found))
        found.append(shorter)


# Splits of fewer batches are padded to one length, because a second one compiles a second program.
_LEAST_BATCHES = 16


def grouped(lengths_N: np.ndarray, *, limit: int, batch_size: int) -> list[tuple[int, np.ndarray]]:
    """Groups rows by their lengths: returns (padded length, indices of rows); one group, or short and long rows.

    >>> grouped(np.array([9, 80, 12, 16]), limit=112, batch_size=64)
    [(112, array([0, 1, 2, 3]))]
    """
    if len(lengths_N) < _LEAST_BATCHES * batch_size:
        return [(limit, np.arange(len(lengths_N)))]
    cut = min(buckets(limit), key=lambda cut: np.where(lengths_N <= cut, cut, limit).sum())
    groups = ((cut, np.flatnonzero(lengths_N <= cut)), (limit, np.flatnonzero(lengths_N > cut)))
    return [(length, rows) for length, rows in groups if len(rows)]


class Evaluators:
    """Graders of parameters on a split of one task or several."""

    def __init__(self, graders: "Mapping[str, Evaluator | LossEvaluator]") -> None:
        self._graders = graders

    @property
    def primary_metric(self) -> str:
        """Name of the metric that picks the best checkpoint; of several tasks, `score`."""
        found = task_names.primary_metric([*self._graders])
        assert found is not None  # there is a task
        return found

    def run(
        self, parameters: families.Parameters, *, before_batch: Callable[[], None] = lambda: None
    ) -> dict[str, Result]:
        """Grades each task in turn. An exception of `before_batch` ends it."""
        return {task: each.run(parameters, before_batch=before_batch) for task, each in self._graders.items()}

    def memorized(self, results: Mapping[str, Result], token_accuracy: Mapping[str, float]) -> str | None:
        """Warns of the first task whose training rows are memorized while its validation rows are not.

        `token_accuracy` is that of the latest training steps, 0 to 1, by objective.
        """
        for task, grader in self._graders.items():
            several = len(self._graders) > 1
            objective = f"{task_names.dataset_of(task).name}/label" if several else "label"
            warning = stopping.memorized(
                token_accuracy.get(objective),
                answer_tokens=grader.answer_tokens,
                validation=results[task].metrics[grader.primary_metric],
                rows=grader.row_count,
                metric=f"{task}'s {grader.primary_metric}" if several else grader.primary_metric,
            )
            if warning is not None:
                return warning
        return None


def together(results: Mapping[str, Result]) -> dict[str, float]:
    """Joins the metrics of tasks: of one, its own; of several, each as "<dataset>/<metric>", and their mean as score.

    {"svamp/equation_accuracy": 40.0, "cqa/accuracy": 60.0, "score": 50.0}
    """
    if len(results) == 1:
        return next(iter(results.values())).metrics
    datasets = {task: task_names.dataset_of(task) for task in results}
    found = {
        f"{datasets[task].name}/{name}": value for task, each in results.items() for name, value in each.metrics.items()
    }
    primary = [each.metrics[datasets[task].primary_metric] for task, each in results.items()]
    return {**found, SCORE: float(np.mean(primary))}


class Evaluator:
    """Grader of parameters on one split of a task, by greedy generation. Tokenizes once.

    With an `explainer` the student answers in two steps: that writes a rationale from x, and `generator` the label from
    x and this rationale.
    """

    def __init__(
        self,
        *,
        task_name: str,
        split: str,
        task_feature_lengths: Mapping[str, int],
        generator: "Generator",
        explainer: "Generator | None" = None,
    ) -> None:
        self._dataset = task_names.dataset_of(task_name)
        grading.check_installed(self._dataset.metric_fns)
        self.primary_metric = self._dataset.primary_metric
        self._task_name, self._split = task_name, split
        self._examples = batches.eval_examples(task_name, split=split, lengths=task_feature_lengths)
        if not self._examples:
            raise ValueError(f"Split {split!r} of {task_name} is empty; there is nothing to evaluate.")
        self._vocabulary = registry.vocabulary(registry.options().vocabulary)
        self._prefixes = selection.of_dataset(registry.options(), self._dataset.name)
        tokens = np.stack([e.features["encoder_input_tokens"] for e in self._examples])
        if explainer is not None:
            texts = [self._prefixes.rationale_prefix + text for text in self._questions()]
            tokens = TokenTable.of(texts, self._vocabulary).padded(tokens.shape[1])
        hosts.agree({f"{task_name} {split}": hashlib.sha256(tokens.data).hexdigest()})
        self._tokens_NS = tokens
        self.row_count = len(tokens)
        answers = [np.count_nonzero(e.features["decoder_target_tokens"]) for e in self._examples]
        self.answer_tokens = float(np.mean(answers))  # of a right answer, with EOS
        lengths_N = tokens.shape[1] - np.argmax(tokens[:, ::-1] != decoding.PAD, axis=1)
        self._groups = grouped(lengths_N, limit=tokens.shape[1], batch_size=generator.sizes[-1])
        (explainer or generator).expect(length for length, _ in self._groups)
        if explainer is not None:
            generator.expect([tokens.shape[1]])
        self._generator, self._explainer = generator, explainer

    def run(self, parameters: families.Parameters, *, before_batch: Callable[[], None] = lambda: None) -> Result:
        """Generates an answer to every example and grades it. An exception of `before_batch` ends it."""
        generated = self._generated(parameters, before_batch=before_batch)
        rows, predictions = [], []
        for example, (text, score, rationale) in zip(self._examples, generated, strict=True):
            fill = example.numbers.fill
            text = fill(text)
            prediction = example.answer(text)
            predictions.append(prediction)
            row = {"id": example.id, "input": fill(example.inputs), "target": _shown(example.label)}
            row |= {"prediction": _shown(prediction), "correct": self._dataset.same_label(example.label, prediction)}
            if rationale is not None:
                row["rationale"] = fill(rationale).strip()
            if text != prediction:
                row["text"] = text
            rows.append(row | {"score": score})
        targets = [e.label for e in self._examples]
        values: dict[str, float] = {}
        for metric in self._dataset.metric_fns:
            named = {name: float(value) for name, value in metric(targets, predictions).items()}
            values |= named
            score = grading.row_score(metric)
            if score is not None and score != self._dataset.same_label:
                for row in rows:
                    found = float(score(row["target"], row["prediction"]))
                    row.setdefault("scores", {}).update(dict.fromkeys(named, found))
        if values[self.primary_metric] == 0.0 and all(isinstance(each, str) for each in (*targets, *predictions)):
            self._sound_alarm(predictions)
        return Result(values, rows)

    def _generated(
        self, parameters: families.Parameters, *, before_batch: Callable[[], None]
    ) -> list[tuple[str, float, str | None]]:
        """Returns text, its log probability, and the rationale (None in one step) of each example, slots unfilled."""
        first = self._explainer or self._generator
        found: dict[int, tuple[list[int], float]] = {}
        for length, indices in self._groups:
            tokens = self._tokens_NS[indices, :length]
            found |= zip(indices.tolist(), first.run(parameters, tokens, before_batch=before_batch), strict=True)
        texts = [(self._vocabulary.decode(ids), score) for ids, score in (found[n] for n in range(self.row_count))]
        if self._explainer is None:
            return [(text, score, None) for text, score in texts]
        rationales = [rationale for rationale, _ in texts]
        # One length for all: theirs change from one evaluation to the next, and would compile further programs.
        answers = self._generator.run(parameters, self._with(rationales), before_batch=before_batch)
        return [
            (self._vocabulary.decode(ids), score, rationale)
            for (ids, score), rationale in zip(answers, rationales, strict=True)
        ]

    def _questions(self) -> list[str]:
        return [example.inputs.removeprefix(self._prefixes.label_prefix) for example in self._examples]

    def _with(self, rationales: Sequence[str]) -> np.ndarray:
        """Encodes the questions with these rationales, cut or padded to the length of inputs; warns of cut ones."""
        joined = map(selection.with_rationale, self._questions(), rationales)
        table = TokenTable.of((self._prefixes.label_prefix + text for text in joined), self._vocabulary)
        limit = self._tokens_NS.shape[1]
        if count := int(np.sum(table.sizes > limit)):
            log.warning(
                "%s, %s: %d of %d inputs with the student's rationale are longer than %d tokens, and were cut.",
                *(self._task_name, self._split, count, len(table), limit),
            )
        return table.padded(limit)

    def _sound_alarm(self, predictions: Sequence[str]) -> None:
        possible = self._dataset.labels or self._dataset.is_label or {e.label for e in self._examples}
        alarm = grading.label_format_alarm(predictions, possible)
        if alarm:
            log.warning("%s, %s: %s", self._task_name, self._split, alarm)


def _shown(answer: Any) -> str:
    """Returns an answer as a predictions file holds it; a task from outside may have others than texts."""
    return answer if isinstance(answer, str) else json.dumps(answer, default=str)


class LossEvaluator:
    """Grader of parameters on one split of a task, by the loss in teacher forcing. Tokenizes once."""

    primary_metric = BY_LOSS

    def __init__(
        self,
        *,
        task_name: str,
        split: str,
        task_feature_lengths: Mapping[str, int],
        generator: "Generator",
    ) -> None:
        features = batches.eval_features(task_name, split=split, lengths=task_feature_lengths)
        names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        self._rows = [features[name] for name in names]
        self.row_count, self.answer_tokens = len(self._rows[0]), 1.0  # a token is an answer
        hosts.agree({f"{task_name} {split}": hashlib.sha256(self._rows[0].data).hexdigest()})
        self._generator = generator
        generator.expect([self._rows[0].shape[1]])

    def run(self, parameters: families.Parameters, *, before_batch: Callable[[], None] = lambda: None) -> Result:
        """Returns "loss" (nats per target token) and "token_accuracy" (percent). `before_batch` may end it."""
        sums = list(self._generator.batches(parameters, *self._rows, before_batch=before_batch))
        loss, correct, count = np.concatenate(sums).astype(np.float64).sum(axis=0)
        return Result({"loss": float(loss / count), BY_LOSS: float(100.0 * correct / count)}, [])


def _token_sums(model: families.Model, inputs_BS: jax.Array, shifted_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns cross-entropy, correct tokens and tokens of each row, [B, 3]."""
    statistics = losses.token_statistics(model.logits(model.states(inputs_BS, shifted_BT)), targets_BT)
    real_BT = stacks.is_token(targets_BT).astype(jnp.float32)
    of_token = (statistics.log_z - statistics.target, statistics.correct, 1.0)
    return jnp.stack([jnp.sum(each * real_BT, axis=1) for each in of_token], axis=1)


class Generator:
    """Generator for any number of source rows, a fixed batch at a time: greedy, or by `compute`.

    `compute(model, tokens [B, S], ..)` returns arrays of B rows and may take further arrays of B rows; `run` needs
    tokens and scores from it. Every process passes all rows, computes its share, and gets all answers.
    """

    def __init__(
        self,
        structure: families.Structure,
        *,
        eos_id: int,
        partitioner: partitioning.Partitioner,
        batch_size: int,
        length: int,
        compute: Callable[..., Any] | None = None,
        smaller: Sequence[int] = (),
        progress: compiling.Progress | None = None,
    ) -> None:
        """Prepares `batch_size` and the `smaller` sizes; a partial batch takes the smallest size that holds it.

        `progress` counts its programs together with those of other generators.
        """
        pieces = partitioner.data_parallel_size
        # Padding rows fill a batch up, and are dropped from its results.
        self._batch_size = -(-batch_size // pieces) * pieces
        rounded = {-(-size // pieces) * pieces for size in smaller if size < batch_size}
        self.sizes = sorted({*rounded, self._batch_size})
        self._partitioner, self._eos_id = partitioner, eos_id
        self.progress = progress or compiling.Progress()
        self._lengths: set[int] = set()
        compute = compute or functools.partial(decoding.greedy, length=length)

        def generate(parameters: families.Parameters, *rows: jax.Array):
            with partitioner.active():
                return compute(families.join(structure, parameters), *rows)

        self._generate = jax.jit(generate, out_shardings=partitioner.replicated)

    def lower(self, parameters: Mapping[str, jax.ShapeDtypeStruct], *, inputs: int) -> jax.stages.Lowered:
        """Lowers a full batch of rows of `inputs` tokens, for compiling; the devices may be absent.

        The abstract parameters carry their shardings.
        """
        tokens = jax.ShapeDtypeStruct((self._batch_size, inputs), jnp.int32, sharding=self._partitioner.batch)
        return self._generate.lower(parameters, tokens)

    def expect(self, lengths: Iterable[int]) -> None:
        """Counts the programs of full batches of sources of these lengths, before they are compiled."""
        self.progress.count += len(set(lengths) - self._lengths)
        self._lengths |= set(lengths)

    def run(
        self,
        parameters: families.Parameters,
        *rows: np.ndarray,
        before_batch: Callable[[], None] = lambda: None,
        sizes: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], float]]:
        """Yields (token ids without EOS and padding, natural log probability) of each source row, in order."""
        for tokens, scores in self.batches(parameters, *rows, before_batch=before_batch, sizes=sizes):
            for ids, score in zip(tokens, scores, strict=True):
                yield before_eos(ids, eos_id=self._eos_id), float(score)

    def batches(
        self,
        parameters: families.Parameters,
        *rows: np.ndarray,
        before_batch: Callable[[], None] = lambda: None,
        sizes: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """Yields the result of each batch, an array or a tuple of arrays, without padding rows.

        `rows` are arrays of equally many rows, tokens `[N, S]` first. `sizes`, ascending, are the only batch sizes to
        use (default: all of `self.sizes`).
        """
        allowed = sizes or self.sizes

        def filled(rows: np.ndarray) -> np.ndarray:
            size = next(size for size in allowed if size >= len(rows))
            padding = np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)
            return np.concatenate([rows, padding])[self._partitioner.local_rows(size)]

        for start in range(0, len(rows[0]), allowed[-1]):
            before_batch()
            part = [each[start : start + allowed[-1]] for each in rows]
            placed = self._partitioner.put_batch({str(number): filled(each) for number, each in enumerate(part)})
            found = jax.device_get(self._computed(parameters, *placed.values()))
            there = len(part[0])
            yield found[:there] if isinstance(found, np.ndarray) else tuple(each[:there] for each in found)

    def _computed(self, parameters: families.Parameters, *rows: jax.Array) -> Any:
        shapes = tuple(each.shape for each in rows)
        count, length, *_ = shapes[0]
        program = f"{count} row{'s' * (count > 1)} of {length} tokens"
        with self.progress.compiling(program, key=(id(self), shapes)):
            return self._generate(parameters, *rows)


def before_eos(ids: np.ndarray, *, eos_id: int) -> list[int]:
    """Returns a row's tokens before its EOS, or all of them if it has none."""
    ends = np.flatnonzero(ids == eos_id)
    return ids[: ends[0] if len(ends) else None].tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `sbs evaluate`. None means: as in the run."""

    checkpoint_path: str  # a run directory (its best checkpoint), or one <run>/checkpoints/<step>
    split: str = "test"
    mixture_or_task_name: str | None = None
    records_dir: str | None = None
    batch_size: int = 64
    max_decode_length: int | None = None
    output_dir: str | None = None  # receives predictions and metrics.json
    layout: partitioning.Layout
    base: str | None = None  # the base of an adapter run, if it has moved


def evaluate(
    config: EvaluateConfig, *, describe: Callable[[Result, Dataset], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Grades a checkpoint on a split; writes predictions and `metrics.json` to `output_dir`, if given.

    Returns the metrics, with what `describe` adds to them; it is called on the first process alone.
    """
    if config.output_dir is not None and hosts.is_first():
        _refuse_others(places.of(config.output_dir) / "metrics.json")
    student = load_student(
        config.checkpoint_path, layout=config.layout, records_dir=config.records_dir, base=config.base
    )
    run = student.manifest["run"]
    name = config.mixture_or_task_name or run["mixture_or_task_name"]
    tasks = task_names.graded(name)
    if not tasks:
        raise ValueError(f"{name} generates rationales, which cannot be graded; choose a label task.")
    grader = evaluator(
        tasks=tasks,
        split=config.split,
        task_feature_lengths=run["task_feature_lengths"],
        generators=Generators(
            structure=student.structure,
            eos_id=student.config.eos_id,
            partitioner=student.partitioner,
            batch_size=config.batch_size,
            max_decode_length=config.max_decode_length or run["max_decode_length"],
        ),
    )
    results = grader.run(student.parameters)
    found: dict[str, Any] = together(results)
    if describe is not None and hosts.is_first():
        for task, result in results.items():
            more = describe(result, task_names.dataset_of(task))
            prefix = f"{task_names.dataset_of(task).name}/" if len(results) > 1 else ""
            found |= {f"{prefix}{name}": value for name, value in more.items()}
    if config.output_dir is not None and hosts.is_first():
        directory = places.of(config.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        for task, result in results.items():
            if result.rows:
                write_rows(directory / f"{task}-{config.split}-{student.step}.jsonl", result.rows)
        summary = {"task": "+".join(tasks), "split": config.split, "step": student.step, **found}
        atomic.replace(directory / "metrics.json", (json.dumps(summary, indent=1) + "\n").encode(), ours=False)
    return found


def _refuse_others(path: Path) -> None:
    """Raises FileExistsError for a file that no evaluation wrote."""
    if not path.exists():
        return
    with contextlib.suppress(ValueError):
        found = json_files.read_json(path)
        if isinstance(found, dict) and {"task", "split", "step"} <= found.keys():
            return
    raise FileExistsError(f"{path} exists and was written by no evaluation; choose another OUTPUT_DIR.")


def write_rows(path: Path, rows: Any) -> None:
    """Writes JSON lines, atomically."""
    with atomic.replacing(path) as file:
        file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
