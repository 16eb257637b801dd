"""Replay of one training step, to find the examples and parameters that caused its result: `sbs replay`.

The state before the step is the one kept with a failure (failures.py). Otherwise it is recomputed from the newest
earlier checkpoint; steps are deterministic.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from sbs_jax.data import registry
from sbs_jax.run import checkpoints
from sbs_jax.storage import places
from sbs_jax.student import families, losses
from sbs_jax.training import failures, feed, lessons, teachers
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.state import initial_state, load_base, restored_state
from sbs_jax.training.step import Batch, Trainer, TrainState, loss_and_gradients, prepare

log = logging.getLogger(__name__)

_SHOWN = 10


def replay(config: TrainConfig, run: str | Path, *, step: int | None) -> dict[str, Any]:
    """Returns metrics, examples and parameters of an update of a run; by default of its newest failure.

    {"step": 12, "metrics": {"loss": .., ..}, "examples": [{"row", "segment", "task", "id", "loss", "alone"}, ..],
    "parameters": {name: {"not finite": n, "first at": [..]}}, "gradients": {name: norm}}. Losses are means per token in
    nats: `loss` in the batch; `alone` in a separate row without dropout, which separates examples that share a row.
    Examples are sorted worst first, gradients by norm, largest first.
    """
    run = places.of(run)
    if step is None and (step := failures.newest(run)) is None:
        raise FileNotFoundError(f"{run} kept no failed step; choose the step to replay: --step N.")
    if not 1 <= step <= config.train_steps:
        raise ValueError(f"Got step {step}; expected 1 to {config.train_steps}, the steps of this run.")
    if config.rewards is not None:
        raise ValueError("`sbs replay` looks into the loss of given targets; a run with rewards samples its own.")
    registry.configure(config.data)
    trainer = prepare(config)
    state = _state_before(config, trainer, run, step=step)
    (batch,) = _batches(config, trainer, first=step, count=1)
    examples, alone = feed.batch_examples(config, step=step)
    structure, parameters = trainer.structure, trainer.parameters(state)
    trained = {name: parameters[name] for name in trainer.saved.parameters}
    others = {name: x for name, x in parameters.items() if name not in trained}

    def diagnose(
        trained: families.Parameters, others: families.Parameters, teacher: families.Parameters, batch: Batch
    ) -> tuple[Any, Any]:
        with trainer.partitioner.active():
            key, loss = jax.random.fold_in(jax.random.key(config.seed), step - 1), config.loss(step - 1)
            lesson = lessons.of(
                *(batch, {**others, **trained}, teacher),
                student=structure,
                structure=trainer.teacher,
                term=loss.on_policy,
                key=key,
            )
            _, _, gradients = loss_and_gradients(
                trained,
                batch,
                frozen=others,
                structure=structure,
                loss=loss,
                micro_batches=1,
                vocabulary_chunks=1,
                dropout_key=key,
                lesson=lesson,
            )
            norms = jax.tree.map(lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)))), gradients)
            model = families.join(structure, {**others, **trained})
            return _token_losses(model, batch, dropout_key=jax.random.fold_in(key, 0)), norms

    tokens_BT, norms = jax.device_get(jax.jit(diagnose)(trained, others, state.teacher, batch))
    in_batch = _example_losses(tokens_BT, jax.device_get(batch))
    by_itself = _alone(config, trainer, structure, parameters, alone)
    rows = [
        {
            "row": example.row,
            "segment": example.segment,
            "task": example.task,
            "id": example.id,
            "loss": in_batch[example.row, example.segment],
            "alone": by_itself[number],
        }
        for number, example in enumerate(examples)
    ]
    rows.sort(key=lambda row: [-_badness(row["alone"]), -_badness(row["loss"])])
    host = jax.device_get(parameters)
    _, metrics = trainer.step(state, batch)  # donates the state, so it comes last
    return {
        "step": step,
        "metrics": {name: float(x) for name, x in jax.device_get(metrics).items() if name != "skipped"},
        "examples": rows,
        "parameters": {name: found for name, x in host.items() if (found := _not_finite(x))},
        "gradients": {name: float(x) for name, x in sorted(norms.items(), key=lambda item: -_badness(float(item[1])))},
    }


def text(found: Mapping[str, Any], kept: Mapping[str, Any] | None) -> str:
    """Formats the result of `replay` for people; `kept` is the run's failure.json."""
    lines = [f"Step {found['step']}: " + ", ".join(f"{name} {x:.5g}" for name, x in found["metrics"].items())]
    if kept is not None:
        then = kept["steps"][-1]
        lines.append(f"  in the run: loss {then['loss']}, gradient_norm {then['gradient_norm']}")
    bad = [row for row in found["examples"] if not math.isfinite(row["alone"])]
    shown = bad or found["examples"][:_SHOWN]
    lines.append(f"{len(bad)} of {len(found['examples'])} examples give a loss that is not finite by themselves.")
    lines.append(f"{'Those' if bad else 'The largest losses'} (nats per token; in the batch, alone):")
    lines += [f"  {row['loss']:10.4g} {row['alone']:10.4g}  {row['task']} {row['id']}" for row in shown[:_SHOWN]]
    if len(shown) > _SHOWN:
        lines.append(f"  and {len(shown) - _SHOWN} more")
    for name, where in found["parameters"].items():
        lines.append(
            f"Parameter {name}: {where['not finite']} values are not finite, the first at {where['first at']}."
        )
    broken = [name for name, norm in found["gradients"].items() if not math.isfinite(norm)]
    lines.append(f"Gradients that are not finite: {len(broken)} of {len(found['gradients'])} parameters.")
    lines.append("Largest gradients:" if not broken else "Some of them:")
    lines += [f"  {found['gradients'][name]:10.4g}  {name}" for name in (broken or list(found["gradients"]))[:_SHOWN]]
    return "\n".join(lines)


def _state_before(config: TrainConfig, trainer: Trainer, run: Path, *, step: int) -> TrainState:
    """Loads the state before an update if it was kept, or recomputes it from the newest earlier checkpoint."""
    base = None if config.tuning is None else load_base(config, trainer)
    teacher = None if config.teacher is None else teachers.load_same(config, run)

    def restored(directory: Path, number: int) -> TrainState:
        like = {"parameters": trainer.saved.parameters, "optimizer": trainer.saved.optimizer}
        return restored_state(
            config, checkpoints.restore(directory, number, **like), trainer, base=base, teacher=teacher
        )

    kept = failures.folder(run, step)
    if checkpoints.steps(kept) == [step - 1]:
        return restored(kept, step - 1)
    start = max((number for number in checkpoints.steps(run) if number < step), default=0)
    state = restored(run, start) if start else initial_state(config, trainer, base=base, teacher=teacher)
    log.info("Starting at step %d, the newest kept step before that one.", start)
    steps = _batches(config, trainer, first=start + 1, count=step - 1 - start)
    for batch in tqdm.tqdm(steps, total=step - 1 - start, unit="step", desc="replay"):
        state, _ = trainer.step(state, batch)
    return state


def _batches(config: TrainConfig, trainer: Trainer, *, first: int, count: int) -> Any:
    """Yields the batches of `count` steps, on the devices."""
    found = feed.train_batches(config, trainer, skip=first - 1)
    for _ in range(count):
        yield trainer.partitioner.put_batch(next(found))


def _token_losses(model: families.Model, batch: Batch, *, dropout_key: jax.Array | None) -> jax.Array:
    """Returns the cross-entropy of each target token in nats, [B, T]; 0 for padding."""
    states = model.states(
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        encoder_segment_ids=batch.get("encoder_segment_ids"),
        decoder_segment_ids=batch.get("decoder_segment_ids"),
        dropout_key=dropout_key,
    )
    statistics = losses.token_statistics(model.logits(states), batch["decoder_target_tokens"])
    return jnp.where(batch["decoder_task_ids"] > 0, statistics.log_z - statistics.target, 0.0)


def _example_losses(tokens_BT: np.ndarray, batch: Mapping[str, np.ndarray]) -> dict[tuple[int, int], float]:
    """Returns the mean loss per token of each (row, segment)."""
    real = batch["decoder_task_ids"] > 0
    segments = np.asarray(batch.get("decoder_segment_ids", real.astype(np.int32)))
    found = {}
    for row, segment in {(int(r), int(segments[r, t])) for r, t in zip(*np.nonzero(real), strict=True)}:
        found[row, segment] = float(np.mean(tokens_BT[row][segments[row] == segment]))
    return found


def _alone(
    config: TrainConfig,
    trainer: Trainer,
    structure: families.Structure,
    parameters: families.Parameters,
    rows: Mapping[str, np.ndarray],
) -> list[float]:
    """Returns the mean loss per token of examples in separate rows, without dropout, a batch at a time."""

    @jax.jit
    def token_losses(parameters: families.Parameters, batch: Batch) -> jax.Array:
        with trainer.partitioner.active():
            return _token_losses(families.join(structure, parameters), batch, dropout_key=None)

    size, found = config.batch_size, []
    count = len(rows["decoder_task_ids"])
    for start in range(0, count, size):
        part = {name: array[start : start + size] for name, array in rows.items()}
        filled = {name: np.pad(x, ((0, size - len(x)), (0, 0))) for name, x in part.items()}
        tokens_BT = jax.device_get(token_losses(parameters, trainer.partitioner.put_batch(filled)))
        means = _example_losses(tokens_BT, filled)
        found += [means[row, 1] for row in range(len(part["decoder_task_ids"]))]
    return found


def _not_finite(array: np.ndarray) -> dict[str, Any] | None:
    """Counts values that are not finite, with the index of the first; None if all are."""
    bad = np.argwhere(~np.isfinite(array.astype(np.float32)))
    return {"not finite": len(bad), "first at": bad[0].tolist()} if len(bad) else None


def _badness(value: float) -> float:
    return value if math.isfinite(value) else math.inf
