"""Answers of our student to the cases of parity_cases.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity_cases as cases
import toy

from sbs_jax.student import decoding, families, losses
from sbs_jax.training.step import Batch, TrainState, prepare, root_key


def answers(config: families.ModelConfig, parameters: families.Parameters) -> dict[str, np.ndarray]:
    """Computes logits of given targets, and generates by greedy and beam search."""
    return {"logits": logits(config, parameters), **generated(config, parameters)}


def logits(config: families.ModelConfig, parameters: families.Parameters) -> np.ndarray:
    """Computes logits of given targets."""
    model = families.join(families.abstract(config)[0], parameters)
    source, target = jnp.asarray(cases.source()), jnp.asarray(cases.shifted(cases.target()))
    return np.asarray(jax.jit(model.__call__)(source, target))


def generated(config: families.ModelConfig, parameters: families.Parameters) -> dict[str, np.ndarray]:
    """Generates by greedy and beam search."""
    model = families.join(families.abstract(config)[0], parameters)
    source = jnp.asarray(cases.source())
    greedy, _ = jax.jit(lambda tokens: decoding.greedy(model, tokens, length=cases.LENGTH))(source)
    search = jax.jit(lambda tokens: decoding.beam_search(model, tokens, length=cases.LENGTH, beams=cases.BEAMS)[0])
    found = {"greedy": greedy, "beam": search(source), "more_beam": search(jnp.asarray(cases.more_sources()))}
    return {name: np.asarray(values) for name, values in found.items()}


def batch() -> Batch:
    """Makes one batch of both tasks' rows, as our trainer reads them."""
    rows = cases.training_rows()
    width = max(target.shape[1] for _, target in rows.values())
    targets = {task: cases.fitted(target, width) for task, (_, target) in rows.items()}
    numbers = {"label": losses.LABEL, "rationale": losses.RATIONALE}
    target = np.concatenate(list(targets.values()))
    whole = {
        "encoder_input_tokens": np.concatenate([source for source, _ in rows.values()]),
        "decoder_target_tokens": target,
        "decoder_input_tokens": cases.shifted(target),
        "decoder_task_ids": np.concatenate([(targets[task] != 0) * numbers[task] for task in rows]).astype(np.int32),
        "decoder_loss_weights": (target != 0).astype(np.float32),
    }
    return {name: jnp.asarray(rows) for name, rows in whole.items()}


def training(
    config: families.ModelConfig, parameters: families.Parameters, folder
) -> tuple[list[float], dict[int, families.Parameters]]:
    """Makes ten updates with our training step: losses, and the weights after the first and the last."""
    settings = toy.config(
        folder / "run",
        folder,
        model=config,
        alpha=cases.ALPHA,
        batch_size=16,
        optimizer=lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.0),
        learning_rate=optax.linear_schedule(cases.PEAK_RATE, 0.0, cases.STEPS),
    )
    trainer = prepare(settings)
    optimizer = settings.gradient_transformation().init(parameters)
    state = TrainState(jnp.int32(0), parameters, optimizer, jnp.int32(0), root_key(0))
    found, weights = [], {}
    for step in range(1, cases.STEPS + 1):
        state, metrics = trainer.step(jax.tree.map(jnp.array, state), batch())
        found.append(float(metrics["loss"]))
        if step in (1, cases.STEPS):
            weights[step] = jax.tree.map(np.asarray, state.parameters)
    return found, weights
