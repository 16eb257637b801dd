"""Training: the state, one step as a pure function, and the loop that reads from top to bottom."""

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm

from sbs_jax import hosts
from sbs_jax.data import batches, prefetch, registry, selection
from sbs_jax.hosts import preemption, watchdog
from sbs_jax.run import checkpoints, directory, settings
from sbs_jax.student import adapters, partitioning, t5
from sbs_jax.training import evaluate, failures
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.metrics_window import MetricsWindow
from sbs_jax.training.state import base_of, described, initial_state, state_of
from sbs_jax.training.step import Batch, Trainer, TrainState, prepare
from sbs_jax.weights import opening

log = logging.getLogger(__name__)


def train(config: TrainConfig, *, config_text: str, accept_changes: bool = False) -> dict[str, dict[str, Any]]:
    """Runs, or resumes, one training; returns the last line of metrics per kind (train, validation, test).

    `config_text` is the operative configuration, kept in the run directory. A directory that holds a run of another
    configuration, other data or other defaults is refused with the difference, unless `accept_changes`. The best
    checkpoint by validation is evaluated on test once, at the end. preemption.PreemptedError where the process was told
    to end and the run is saved; repeating the call goes on from there, as if it had not stopped.
    """
    registry.configure(config.data)
    dataset = registry.dataset_of_task(config.mixture_or_task_name)
    eval_task_name = graded_task(config)
    data = registry.manifest(dataset.name)
    _check_vocabulary(config)
    hosts.agree({"data": _data_text(config, data)})
    trainer = prepare(config)
    base = None if config.tuning is None else base_of(config, trainer)
    manifest = _manifest(config, data=data, trainer=trainer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preemption.listening())
        run = stack.enter_context(directory.RunDir(config.model_dir, config_text=config_text))
        watch = stack.enter_context(watchdog.Watchdog(config.stall_seconds))
        scores: dict[int, float] = {}
        saver = stack.enter_context(checkpoints.Checkpoints(run.path, retention=_retention(config), scores=scores))
        start = saver.newest_good() or 0
        run.begin(manifest, step=start, accept_changes=accept_changes)
        if start:
            log.info("Resuming at step %d of %d.", start, config.train_steps)
            restored = saver.restore(start, parameters=trainer.saved.parameters, optimizer=trainer.saved.optimizer)
            state, metadata = state_of(restored, trainer, base=base), restored.metadata
        else:
            state = initial_state(config, trainer, base=base)
            metadata = {"lines": 0, "window": [], "evaluation_due": False}
        # Its arrays are in the state now, stacked if layers are scanned: held here too, the base would be there twice.
        known, base = (base.identity if base else None), None
        if start == config.train_steps and any(line["kind"] == "test" for line in run.metrics()):
            return _last_lines(run)
        run.truncate_metrics(lines=metadata["lines"])
        scores |= dict(hosts.from_first(lambda: list(directory.read_scores(run.path).items())))
        evaluator = _evaluator(config, trainer, split=selection.VALIDATION)
        found = train_batches(config, trainer, skip=start)
        ahead = stack.enter_context(prefetch.Prefetcher(_put(found, trainer.partitioner, config.batch_size)))
        window = MetricsWindow(metadata["window"])
        progress = stack.enter_context(
            tqdm.tqdm(
                total=config.train_steps, initial=start, unit="step", desc=run.path.name, disable=not hosts.is_first()
            )
        )

        def before_batch() -> None:
            watch.at("evaluates", step=step)
            if hosts.preemption_requested():
                raise preemption.PreemptedError

        def evaluate_now() -> bool:
            """False where the process is told to end meanwhile."""
            try:
                with window.paused():
                    result = evaluator.run(trainer.parameters(state), before_batch=before_batch)
            except preemption.PreemptedError:
                return False
            run.write_predictions(f"{eval_task_name}-{step}", result.rows)
            run.log("validation", step, result.metrics)
            scores[step] = result.metrics[evaluator.primary_metric]
            return True

        def leave() -> None:
            """After a save: the others leave at the same place."""
            run.flush()
            hosts.leave()
            raise preemption.PreemptedError(
                f"This run was told to end, and stopped after step {step} of {config.train_steps}, which is saved. "
                "Repeat the command to resume it."
            )

        step = start
        if metadata["evaluation_due"] and not evaluate_now():
            leave()
        for step in range(start + 1, config.train_steps + 1):
            watch.at(watchdog.INPUT, step=step)
            batch, tokens = window.wait_for(ahead)
            watch.at(watchdog.DEVICES, step=step)
            state, metrics = trainer.step(state, batch)
            window.add(metrics, tokens)
            progress.update()
            last = step == config.train_steps
            told = hosts.preemption_requested()
            log_due = step % config.log_period == 0 or last
            evaluation_due = step % config.eval_period == 0 or last
            save_due = step % config.checkpoint_period == 0 or evaluation_due or told
            if log_due or save_due:
                skipped = _check_finite(config, window, state, trainer=trainer, run=run, base=known)
            if log_due:
                values = window.close() | {"learning_rate": float(np.asarray(config.learning_rate(step - 1 - skipped)))}
                if config.skip_non_finite:
                    values["skipped"] = float(skipped)
                run.log("train", step, values)
                loss = values.get("loss", math.nan)
                progress.set_postfix_str(f"loss {loss:.3f} {values['tokens_per_second']:.0f} tokens/s")
            if evaluation_due and not told:
                evaluation_due = told = not evaluate_now()
            if save_due:
                watch.at("saves", step=step)
                run.check()
                saved = trainer.unstacked(state)
                contents = {
                    "parameters": saved.parameters,
                    "optimizer": saved.optimizer,
                    "metadata": {
                        "step": step,
                        **described(config, known),
                        "skipped": skipped,
                        "lines": run.lines,
                        "window": window.rows(),
                        "evaluation_due": evaluation_due,
                    },
                }
                if told or last:
                    saver.finish(step, **contents, patience=config.save_patience)
                else:
                    saver.save(step, **contents)
            if told:
                leave()
        progress.close()
        if config.evaluate_test:
            try:
                others = {} if config.tuning is None else trainer.parameters(state)
                _test(config, trainer, run, frozen=others, before_batch=before_batch)
            except preemption.PreemptedError:
                leave()
        run.flush()
        return _last_lines(run)


def graded_task(config: TrainConfig) -> str:
    """The task by which a run is validated and tested."""
    name = registry.graded_task(config.mixture_or_task_name)
    if name is None:
        raise ValueError(
            f"{config.mixture_or_task_name} has rationales alone, which nothing grades; train on the mixture "
            "<dataset>_step_by_step, with alpha 0 if the labels shall not count."
        )
    return name


def _check_vocabulary(config: TrainConfig) -> None:
    """A token id beyond the table would read and train garbage without a sound: indices are clamped inside jit."""
    tokens = registry.vocabulary(config.data.vocabulary).vocab_size
    if tokens > config.model.vocab_size:
        raise ValueError(
            f"The vocabulary {config.data.vocabulary} has {tokens} ids, and the model's table "
            f"{config.model.vocab_size} rows. Set t5.T5Config.vocab_size to at least {tokens}, or "
            "give the model's own vocabulary."
        )


def _evaluator(config: TrainConfig, trainer: Trainer, *, split: str) -> evaluate.Evaluator:
    return evaluate.Evaluator(
        task_name=graded_task(config),
        split=split,
        structure=trainer.structure,
        partitioner=trainer.partitioner,
        task_feature_lengths=config.task_feature_lengths,
        batch_size=config.eval_batch_size,
        max_decode_length=config.max_decode_length,
    )


def _test(
    config: TrainConfig,
    trainer: Trainer,
    run: directory.RunDir,
    *,
    frozen: t5.Parameters,
    before_batch: Callable[[], None],
) -> None:
    """Grades the best checkpoint on test; what it has not is among `frozen`."""
    step = hosts.from_first(lambda: checkpoints.best_step(run.path))
    parameters = opening.load_parameters(run.path / "checkpoints" / str(step), like=trainer.saved.parameters)
    result = _evaluator(config, trainer, split=selection.TEST).run({**frozen, **parameters}, before_batch=before_batch)
    run.write_predictions(f"{graded_task(config)}-test-{step}", result.rows)
    run.log("test", step, result.metrics)


def _last_lines(run: directory.RunDir) -> dict[str, dict[str, Any]]:
    return {line.pop("kind"): line for line in run.metrics()}


def _retention(config: TrainConfig) -> checkpoints.Retention:
    return checkpoints.Retention(newest=config.keep_checkpoints, best=config.keep_best, period=config.keep_period)


def _manifest(config: TrainConfig, *, data: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """What a run consists of, logged and kept; and the warning about what the feature lengths cut."""
    lengths = {}
    for split, task in ((selection.TRAIN, config.mixture_or_task_name), (selection.TEST, graded_task(config))):
        if split in data["splits"]:
            lengths[split] = batches.count_truncated(task, split, config.task_feature_lengths)
    for split, of_tasks in lengths.items():
        for task, counts in of_tasks.items():
            if counts["inputs cut"] or counts["targets cut"]:
                log.warning("%s, %s: sequences longer than the feature lengths are cut: %s", task, split, counts)
    parameters = {
        name: {"shape": leaf.shape, "dtype": str(leaf.dtype), "spec": str(leaf.sharding.spec)}
        for name, leaf in {**trainer.saved.frozen, **trainer.saved.parameters}.items()
    }
    total = sum(math.prod(leaf.shape) for leaf in t5.abstract(config.model)[1].values())
    partitioner = trainer.partitioner
    devices = [str(device) for device in partitioner.mesh.devices.flat]
    log.info("Devices: %s; mesh %s.", ", ".join(devices), partitioner.sizes)
    log.info("Parameters: %s in %d arrays.", f"{total:,}", len(parameters))
    if config.tuning is not None:
        log.info("%s", adapters.summary(config.model, trainer.saved.parameters, trainer.saved.frozen))
    log.info("Data: %s", {name: split["counts"] for name, split in data["splits"].items()})
    return {
        "data": data,
        "lengths": lengths,
        "run": {
            "mixture_or_task_name": config.mixture_or_task_name,
            "task_feature_lengths": dict(config.task_feature_lengths),
            "max_decode_length": config.max_decode_length,
            "primary_metric": registry.dataset_of_task(config.mixture_or_task_name).primary_metric,
        },
        "settings": settings.settings(config),
        "model": dataclasses.asdict(config.model),
        "mesh": partitioner.sizes,
        "devices": devices,
        "parameter_count": total,
        "parameters": parameters,
    }


def train_batches(config: TrainConfig, trainer: Trainer, *, skip: int) -> Iterator[dict[str, np.ndarray]]:
    """What this host's devices get of each batch, without the first `skip`."""
    rows = trainer.partitioner.local_rows(config.batch_size)
    return batches.train_dataset(config.mixture_or_task_name, **_training_data(config), skip_batches=skip, rows=rows)


def _data_text(config: TrainConfig, data: Mapping[str, Any]) -> str:
    """What the processes compare of the data: the hashes of the records, and of the tokens they train on."""
    lines = [f"{name} {split['file']} {split['sha256']}" for name, split in data["splits"].items()]
    for task in registry.subtasks(config.mixture_or_task_name):
        for feature, table in registry.token_tables(task, selection.TRAIN).items():
            lines.append(f"{task} {feature} tokens {hashlib.sha256(table.ids.data).hexdigest()}")
    return "\n".join(lines)


def _put(
    found: Iterator[dict[str, np.ndarray]], partitioner: partitioning.Partitioner, batch_size: int
) -> Iterator[tuple[Batch, float]]:
    """Batches on the devices, each with the tokens of the global batch (of several hosts: as many as here, per row)."""
    for batch in found:
        rows = len(batch["decoder_target_tokens"])
        yield partitioner.put_batch(batch), batches.count_tokens(batch) * batch_size / rows


def batch_examples(config: TrainConfig, *, step: int) -> tuple[list[batches.BatchExample], dict[str, np.ndarray]]:
    """The examples of a step's batch, and each in a row of its own."""
    return batches.batch_examples(config.mixture_or_task_name, **_training_data(config), batch=step - 1)


def _training_data(config: TrainConfig) -> dict[str, Any]:
    """What decides which rows a step trains on; as features.py names it."""
    return {
        "lengths": config.task_feature_lengths,
        "split": selection.TRAIN,
        "batch_size": config.batch_size,
        "pack": config.pack,
        "seed": config.seed,
    }


def _check_finite(
    config: TrainConfig,
    window: MetricsWindow,
    state: TrainState,
    *,
    trainer: Trainer,
    run: directory.RunDir,
    base: dict[str, Any] | None,
) -> int:
    """The number of updates left out so far. FloatingPointError where they are too many, after saving the evidence."""
    rows = window.rows()
    skipped = int(rows[-1]["skipped"]) if rows else 0
    if skipped <= config.skip_non_finite:
        return skipped
    step = int(state.step) + 1  # the state is that before it
    first = next(index for index, row in enumerate(rows) if row["skipped"] > config.skip_non_finite)
    folder = failures.folder(run.path, step)
    failures.write(
        folder,
        step=step,
        rows=rows[: first + 1],
        examples=batch_examples(config, step=step)[0],
    )
    saved = trainer.unstacked(state)
    retention = checkpoints.Retention(newest=1, best=0, period=None)
    with checkpoints.Checkpoints(folder, retention=retention, scores={}) as saver:
        metadata = {"step": step - 1, **described(config, base), "skipped": skipped - 1}
        saver.finish(step - 1, parameters=saved.parameters, optimizer=saved.optimizer, metadata=metadata, patience=0.0)
    bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(rows[first][name])]
    left_out = f" after {config.skip_non_finite} steps left out for it" if config.skip_non_finite else ""
    raise FloatingPointError(
        f"The {' and '.join(bad)} of step {step} is not finite{left_out}. The state before it and the ids of its batch "
        f"are in {folder}; `sbs replay {run.path}` shows which examples and parameters are at fault. The newest "
        "checkpoint is good. Lower the learning rate or clip_norm, compute in float32, remove the example, or leave "
        "such steps out: SKIP_NON_FINITE=10."
    )
