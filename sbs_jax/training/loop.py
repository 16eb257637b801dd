"""The training loop: set up, open the run, restore or initialize, train, test."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from sbs_jax import compiling, hosts
from sbs_jax.data import outside, prefetch, registry, selection
from sbs_jax.hosts import preemption, watchdog
from sbs_jax.run import checkpoints, directory, settings
from sbs_jax.run import manifest as run_manifest
from sbs_jax.storage import places
from sbs_jax.training import clock, contents, evaluate, failures, feed, stopping, teachers
from sbs_jax.training.config import Checkpointing, TrainConfig
from sbs_jax.training.metrics_window import MetricsWindow
from sbs_jax.training.profile import Profiler
from sbs_jax.training.state import initial_state, load_base, restored_state
from sbs_jax.training.step import Trainer, TrainState, prepare
from sbs_jax.training.students import Student
from sbs_jax.weights import frozen, opening

log = logging.getLogger(__name__)

# Fields that no compiled program depends on.
_NOT_COMPILED = ("model_dir", "seed", "data", "initial_checkpoint_path", "trackers", "profile_steps")
ROWS = "rows"  # folder of a run with the rows of tasks from outside
_NEW = {"lines": 0, "window": [], "evaluation_due": False, "scores": {}}  # progress of a run without a checkpoint


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled programs of a configuration, for all runs that differ only in seed, records and folder.

    On a CPU, steps of a tiny student in turn are faster than a step of all seeds by `vmap` (docs/experiments.md).
    """

    config: TrainConfig
    trainer: Trainer
    generators: evaluate.Generators  # of validation and test
    progress: compiling.Progress

    @classmethod
    def of(cls, config: TrainConfig) -> "Programs":
        """Prepares the programs; each compiles at its first use."""
        trainer, progress = prepare(config), compiling.Progress(count=1)  # the step; the generators add their own
        generators = evaluate.Generators(
            structure=trainer.structure,
            eos_id=config.model.eos_id,
            partitioner=trainer.partitioner,
            batch_size=config.eval_batch_size,
            max_decode_length=config.max_decode_length,
            progress=progress,
        )
        return cls(config, trainer, generators, progress)

    def check(self, config: TrainConfig) -> None:
        """Raises ValueError if a run needs other programs."""
        mine, other = (
            {name: value for name, value in settings.describe(each).items() if name not in _NOT_COMPILED}
            for each in (self.config, config)
        )
        if different := [name for name in mine if mine[name] != other[name]]:
            raise ValueError(
                f"{config.model_dir} has another {different[0]} than {self.config.model_dir}, so they cannot share "
                "compiled programs. Train them by separate commands."
            )


def train(
    config: TrainConfig, *, config_text: str, accept_changes: bool = False, programs: Programs | None = None
) -> dict[str, dict[str, Any]]:
    """Runs or resumes one training; returns the last metrics line of each kind (train, validation, test).

    `config_text` is the operative configuration, kept in the run directory. A directory that holds a run of another
    configuration, other data or other defaults is refused with the difference, unless `accept_changes`. The best
    checkpoint by validation is tested once, at the end. preemption.PreemptedError after a preempted run is saved;
    repeating the call resumes it, and the result is bit-identical to an uninterrupted run. `programs` are those of
    another run to share; its results are the same.
    """
    # ------------------------------------------------------------------ set up: data, mesh, compiled step
    began = time.monotonic()
    config = contents.pinned(config)
    registry.configure(config.data)
    outside.take(places.of(config.model_dir) / ROWS)
    data = registry.manifest(config.mixture_or_task_name, lengths=config.task_feature_lengths)
    _check(config, data)
    hosts.agree({"data": feed.fingerprint(config, data)})
    programs = programs or Programs.of(config)
    programs.check(config)
    trainer = programs.trainer
    validator = evaluator(config, programs, split=selection.VALIDATION)
    base = None if config.tuning is None else load_base(config, trainer)
    teacher = None if config.teacher is None else teachers.load(config)
    manifest = contents.manifest(config, data=data, trainer=trainer, teacher=teacher)

    with contextlib.ExitStack() as stack:
        # -------------------------------------------------------------- open the run directory
        stack.enter_context(preemption.listening())
        run = stack.enter_context(
            directory.RunDir(config.model_dir, config_text=config_text, tracker_names=config.trackers)
        )
        watch = stack.enter_context(watchdog.Watchdog(config.stall_seconds))
        scores: dict[int, float] = {}  # validation scores by step; retention reads them
        saver = stack.enter_context(checkpoints.Checkpoints(run.path, retention=_retention(config), scores=scores))
        start = saver.newest_good() or 0
        run.begin(manifest, step=start, accept_changes=accept_changes)
        if hosts.is_first():
            outside.save(run.path / ROWS)

        # -------------------------------------------------------------- restore the newest checkpoint, or initialize
        if start:
            log.info("Resuming at step %d of %d.", start, config.train_steps)
            state, progress = _restore(config, saver, trainer, step=start, base=base, teacher=teacher)
        else:
            state, progress = initial_state(config, trainer, base=base, teacher=teacher), _NEW
        # The state holds these arrays now, stacked if layers are scanned; a second reference would keep a copy.
        identity, base, teacher = (base.identity if base else None), None, None
        saved = checkpoints.scores_of(progress, where=f"the checkpoint of step {start}")
        ended = start == config.train_steps or stopping.out_of_patience(saved or {}, config.patience)
        if ended and any(line["kind"] == "test" for line in run.metrics()):
            return directory.last_lines(run.metrics())
        run.truncate_metrics(lines=progress["lines"], step=start)
        scores |= _scores_of_metrics(run) if saved is None else saved
        spent = clock.Clock(progress.get("clock"), began=began, compiled=lambda: programs.progress.seconds)
        meters = MetricsWindow(progress["window"]), spent, stack.enter_context(Profiler.of(config, run.path))
        session = _Session(config, programs, validator, run, saver, watch, scores, identity, state, start, *meters)
        del state  # every step donates it
        if progress["evaluation_due"] and not session.validate():
            session.leave()

        # -------------------------------------------------------------- train
        batches = stack.enter_context(prefetch.Prefetcher(feed.on_devices(config, trainer, skip=start)))
        bar = stack.enter_context(_progress_bar(config, run, start=start))
        for step in session.steps():
            session.advance(batches, step=step)
            bar.update()
            last, preempted = step == config.train_steps, hosts.preemption_requested()
            log_due = step % config.log_period == 0 or last
            evaluation_due = step % config.eval_period == 0 or last
            save_due = step % config.checkpoint_period == 0 or evaluation_due or preempted
            if log_due or save_due:
                session.check_finite()
            if log_due:
                bar.set_postfix_str(session.log_metrics())
            if evaluation_due and not preempted:
                evaluation_due = preempted = not session.validate()
            if save_due:
                session.save(evaluation_due=evaluation_due, final=preempted or last or session.out_of_patience)
            if preempted:
                session.leave()
        bar.close()
        session.note_end()

        # -------------------------------------------------------------- test the best checkpoint
        if config.evaluate_test and not session.test():
            session.leave()
        run.flush()
        return directory.last_lines(run.metrics())


@dataclasses.dataclass
class _Session:
    """A training in progress: its state, and the writers of metrics, predictions and checkpoints."""

    config: TrainConfig
    programs: Programs
    evaluator: evaluate.Evaluators  # of validation
    run: directory.RunDir
    saver: checkpoints.Checkpoints
    watch: watchdog.Watchdog
    scores: dict[int, float]
    identity: dict[str, Any] | None  # of the weights under adapters
    state: TrainState
    step: int  # of the last update
    window: MetricsWindow
    clock: clock.Clock
    profiler: Profiler
    skipped: int = 0
    token_accuracy: dict[str, float] = dataclasses.field(default_factory=dict)  # by objective, in the last metrics line
    results: dict[str, evaluate.Result] = dataclasses.field(default_factory=dict)  # of the last evaluation, by task
    warned: bool = False  # that training rows are memorized

    def __post_init__(self) -> None:
        self._note_token_accuracy(directory.last_lines(self.run.metrics()).get("train", {}))

    def _note_token_accuracy(self, line: Mapping[str, Any]) -> None:
        start = "token_accuracy/"
        self.token_accuracy = {
            name.removeprefix(start): value for name, value in line.items() if name.startswith(start)
        }

    @property
    def out_of_patience(self) -> bool:
        """Tells whether the run ends early; the same on every process, and after resuming."""
        return stopping.out_of_patience(self.scores, self.config.patience)

    @property
    def trainer(self) -> Trainer:
        """Returns the compiled step and its shardings."""
        return self.programs.trainer

    def steps(self) -> Iterator[int]:
        """Yields the steps that are left, until the run is out of patience."""
        self.clock.enter("steps")
        for step in range(self.step + 1, self.config.train_steps + 1):
            if self.out_of_patience:
                return
            yield step

    def advance(self, batches: prefetch.Prefetcher[Any], *, step: int) -> None:
        """Makes one update; returns before the devices have finished it."""
        self.watch.at(watchdog.INPUT, step=step)
        with self.clock.within("data"):
            batch, tokens = self.window.wait_for(batches)
        self.watch.at(watchdog.DEVICES, step=step)
        with (
            self.profiler.step(step, ready=lambda: jax.block_until_ready(self.state)),
            self.programs.progress.compiling("the training step"),
        ):
            self.state, metrics = self.trainer.step(self.state, batch)
        self.window.add(metrics, tokens)
        self.step = step

    def check_finite(self) -> None:
        """Counts skipped updates. FloatingPointError, with the evidence saved, if they are too many."""
        rows = self.window.rows()
        self.skipped = failures.check(
            *(self.config, rows, self.state), trainer=self.trainer, run=self.run.path, base=self.identity
        )

    def log_metrics(self) -> str:
        """Writes the metrics line of the window; returns loss and speed for the progress bar."""
        # A skipped update does not advance the schedule.
        rate = self.config.learning_rate(self.step - 1 - self.skipped)
        values = self.window.close() | {"learning_rate": float(np.asarray(rate))}
        speeds = {name: values[name] for name in ("tokens_per_second", "seconds_per_step")}
        values |= clock.rates(self.config, **speeds) | self.clock.metrics()
        if self.config.skip_non_finite:
            values["skipped"] = float(self.skipped)
        self.run.log("train", self.step, values)
        self._note_token_accuracy(values)
        return f"loss {values.get('loss', math.nan):.3f} {values['tokens_per_second']:.0f} tokens/s"

    def validate(self) -> bool:
        """Grades the current parameters on validation; False if preempted meanwhile."""
        try:
            with self.window.paused(), self.clock.within("evaluation"):
                self.results = self.evaluator.run(self.trainer.parameters(self.state), before_batch=self._before_batch)
        except preemption.PreemptedError:
            return False
        metrics = self.write(self.results, kind="validation", ending=f"-{self.step}", step=self.step)
        self.scores[self.step] = metrics[self.evaluator.primary_metric]
        if not self.warned and (warning := self.memorized()) is not None:
            log.warning("Step %d: %s", self.step, warning)
            self.warned = True
        return True

    def write(self, results: Mapping[str, evaluate.Result], *, kind: str, ending: str, step: int) -> dict[str, float]:
        """Writes predictions of each task and one metrics line, which it returns."""
        for task, result in results.items():
            if result.rows:
                self.run.write_predictions(f"{task}{ending}", result.rows)
        metrics = evaluate.together(results)
        self.run.log(kind, step, metrics)
        return metrics

    def memorized(self) -> str | None:
        """Warns if training rows are memorized and those of the last evaluation are not; else None."""
        return self.evaluator.memorized(self.results, self.token_accuracy) if self.results else None

    def note_end(self) -> None:
        """Writes to the manifest why the training ended, and logs it if it ended early."""
        why = stopping.reason(
            self.scores, patience=self.config.patience, step=self.step, train_steps=self.config.train_steps
        )
        if self.step < self.config.train_steps:
            log.info("The training ended %s.", why)
        if (warning := self.memorized()) is not None:
            log.warning("%s", warning)
        self.run.note_end({"step": self.step, "why": why, "memorized": warning})

    def save(self, *, evaluation_due: bool, final: bool) -> None:
        """Saves a checkpoint in the background; a final one is on disk when this returns."""
        with self.clock.within("saving"):
            self._save(evaluation_due=evaluation_due, final=final)

    def _save(self, *, evaluation_due: bool, final: bool) -> None:
        self.watch.at("saves", step=self.step)
        self.run.check()
        saved = self.trainer.unstacked(self.state)
        metadata = {
            "step": self.step,
            **contents.student(self.config, self.identity),
            "skipped": self.skipped,
            "lines": self.run.lines,
            "window": self.window.rows(),
            "evaluation_due": evaluation_due,
            "scores": dict(self.scores),
            "clock": self.clock.state(),
        }
        arrays = {"parameters": saved.parameters, "optimizer": saved.optimizer}
        if final:
            self.saver.finish(self.step, **arrays, metadata=metadata, patience=self.config.save_patience)
        else:
            self.saver.save(self.step, **arrays, metadata=metadata)

    def test(self) -> bool:
        """Grades the best checkpoint on test; False if preempted meanwhile."""
        config, trainer = self.config, self.trainer
        step = self.saver.best_step()
        assert step is not None  # the last save is on disk
        checkpoint = self.run.path / "checkpoints" / str(step)
        base = {} if config.tuning is None else trainer.parameters(self.state)  # checkpoints hold only adapters
        parameters = {**base, **opening.load_parameters(checkpoint, like=trainer.saved.parameters)}
        grader = evaluator(config, self.programs, split=selection.TEST)
        try:
            results = grader.run(parameters, before_batch=self._before_batch)
        except preemption.PreemptedError:
            return False
        self.write(results, kind="test", ending=f"-test-{step}", step=step)
        return True

    def leave(self) -> None:
        """Ends a preempted run after its save; all processes must call this at the same step."""
        self.run.flush()
        hosts.leave()
        raise preemption.PreemptedError(
            f"Preempted: this run stopped after step {self.step} of {self.config.train_steps}, which is saved. "
            "Repeat the command to resume it."
        )

    def _before_batch(self) -> None:
        self.watch.at("evaluates", step=self.step)
        if hosts.preemption_requested():
            raise preemption.PreemptedError


def _restore(
    config: TrainConfig,
    saver: checkpoints.Checkpoints,
    trainer: Trainer,
    *,
    step: int,
    base: frozen.Base | None,
    teacher: Student | None,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and metadata of a checkpoint. Its arrays in the layout of the disk are released."""
    found = saver.restore(step, parameters=trainer.saved.parameters, optimizer=trainer.saved.optimizer)
    return restored_state(config, found, trainer, base=base, teacher=teacher), found.metadata


def evaluator(config: TrainConfig, programs: Programs, *, split: str) -> evaluate.Evaluators:
    """Makes the evaluator of a run's validation or test split."""
    return evaluate.evaluator(
        tasks=config.eval_task_names,
        split=split,
        task_feature_lengths=config.task_feature_lengths,
        generators=programs.generators,
    )


def _check(config: TrainConfig, data: Mapping[str, Any]) -> None:
    """Refuses a run that nothing can grade or that has no rows to test on, or a vocabulary or teacher that misfits."""
    _ = config.eval_task_names
    _check_vocabulary(config)
    feed.check_teacher(config)
    teachers.check(config)
    for name, part in run_manifest.data_of_parts(data, whole=config.mixture_or_task_name).items():
        if config.evaluate_test and selection.TEST not in part["splits"] and not registry.is_of_records(name):
            raise ValueError(f"{name} has no test split; set EVALUATE_TEST = False.")


def _check_vocabulary(config: TrainConfig) -> None:
    """Refuses a vocabulary of another EOS, or larger than the table: jit clamps indices and reports no error."""
    vocabulary = registry.vocabulary(config.data.vocabulary)
    tokens = vocabulary.vocab_size
    if vocabulary.eos_id != config.model.eos_id:
        raise ValueError(
            f"The vocabulary {config.data.vocabulary} ends texts with id {vocabulary.eos_id}, and the model with id "
            f"{config.model.eos_id}. Set {type(config.model).__name__}.eos_id to {vocabulary.eos_id}, or give the "
            "model's own vocabulary."
        )
    if tokens > config.model.vocab_size:
        raise ValueError(
            f"The vocabulary {config.data.vocabulary} has {tokens} ids, and the model's table "
            f"{config.model.vocab_size} rows. Set {type(config.model).__name__}.vocab_size to at least {tokens}, or "
            "give the model's own vocabulary."
        )


def _retention(config: Checkpointing) -> checkpoints.Retention:
    return checkpoints.Retention(newest=config.keep_checkpoints, best=config.keep_best, period=config.keep_period)


def _progress_bar(config: TrainConfig, run: directory.RunDir, *, start: int) -> tqdm.tqdm:
    hidden = not hosts.is_first()
    return tqdm.tqdm(total=config.train_steps, initial=start, unit="step", desc=run.path.name, disable=hidden)


def _scores_of_metrics(run: directory.RunDir) -> dict[int, float]:
    return dict(hosts.from_first(lambda: list(directory.read_scores(run.path).items())))
