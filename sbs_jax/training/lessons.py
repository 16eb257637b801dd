"""Lessons of a teacher in memory: the targets of a step on which it is asked, and the student's divergence from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sbs_jax.student import families, losses, on_policy, rollouts, stacking


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lesson:
    """The targets of a global batch on which a teacher is asked in a step, and the teacher."""

    inputs: Any  # of the decoder, [B, T]
    task_ids: Any
    shares: Any  # how much each token counts beside the others of its objective
    sampled: Any  # True if the student has sampled them in this step; a scalar
    teacher: Any  # its families.Parameters
    structure: Any = dataclasses.field(metadata={"static": True})  # its families.Structure


def of(
    batch: Mapping[str, Any],
    parameters: families.Parameters,
    teacher: families.Parameters,
    *,
    student: families.Structure,
    structure: families.Structure | None,
    term: on_policy.OnPolicy | None,
    key: jax.Array,
) -> Lesson | None:
    """Chooses the targets of a step by its key, and samples them if they are the student's; None without a teacher.

    `parameters` are the student's, stacked or not, and `student` is its structure with separate layers; `structure` is
    the teacher's.
    """
    if term is None:
        return None
    of_dataset = batch["decoder_input_tokens"], batch["decoder_task_ids"], batch["decoder_loss_weights"]
    model = families.join(student, stacking.unstack(parameters))
    choice, sampling = jax.random.split(jax.random.fold_in(key, rollouts.KEY))

    def sampled() -> tuple[jax.Array, jax.Array, jax.Array]:
        length = batch["decoder_input_tokens"].shape[1]
        tokens_BT = rollouts.sample(
            model, batch["encoder_input_tokens"], key=sampling, length=length, temperature=term.temperature
        )
        inputs, task_ids = rollouts.as_targets(tokens_BT, batch["decoder_task_ids"], eos_id=model.config.eos_id)
        of_row = jnp.max(of_dataset[2], axis=1, keepdims=True)  # the one weight of its tokens
        return inputs, task_ids, jnp.broadcast_to(of_row, task_ids.shape)

    def lesson(found: Any, on: jax.Array) -> Lesson:
        inputs, task_ids, shares = found
        return Lesson(inputs, task_ids, shares, on, teacher, structure)

    if term.probability in (0, 1):  # nothing to choose, so the step holds one branch
        found = sampled() if term.probability else of_dataset
        return lesson(found, jnp.bool_(term.probability))
    on = jax.random.uniform(choice) < term.probability
    return lesson(jax.lax.cond(on, sampled, lambda: of_dataset), on)


# Features of a batch from its lesson, cut into micro-batches like the others.
_INPUTS, _TASK_IDS, _WEIGHTS = ("lesson_inputs", "lesson_task_ids", "lesson_weights")


def rows(lesson: Lesson, loss: losses.Loss) -> dict[str, jax.Array]:
    """Returns the features of a global batch's lesson, with the weight of each token."""
    weights = losses.token_weights(lesson.task_ids, loss.objectives, shares_BT=lesson.shares)
    return {_INPUTS: lesson.inputs, _TASK_IDS: lesson.task_ids, _WEIGHTS: weights}


def divergence(
    model: families.Model,
    rows: Mapping[str, Any],
    logits_BTV: Any,
    *,
    lesson: Lesson,
    loss: losses.Loss,
    key: jax.Array,
) -> tuple[Float[Array, ""], dict[str, losses.Mean]]:
    """Returns the weighted divergence of these rows from the teacher, and its metrics.

    `logits_BTV` are the student's on the dataset's targets; on sampled ones it runs again.
    """
    term, source = loss.on_policy, rows["encoder_input_tokens"]
    assert term is not None

    def again() -> jax.Array:
        return model(source, rows[_INPUTS], dropout_key=jax.random.fold_in(key, rollouts.KEY))

    if term.probability in (0, 1):
        student = again() if term.probability else logits_BTV
    else:
        student = jax.lax.cond(lesson.sampled, again, lambda: logits_BTV)
    teacher = jax.lax.stop_gradient(families.join(lesson.structure, lesson.teacher)(source, rows[_INPUTS]))
    jsd_BT = on_policy.divergence(teacher, student, beta=term.beta)
    sums = {}
    for number, objective in enumerate(loss.objectives, start=1):
        mine = (rows[_TASK_IDS] == number).astype(jnp.float32)
        sums[f"jsd/{objective.name}"] = losses.Mean(jnp.sum(mine * jsd_BT), jnp.sum(mine))
    tokens, count = rollouts.mean_length(rows[_TASK_IDS])
    on = lesson.sampled.astype(jnp.float32)
    sums |= {"on_policy": losses.Mean(on, jnp.float32(1.0)), "sampled_length": losses.Mean(on * tokens, count)}
    return jnp.sum(rows[_WEIGHTS] * jsd_BT), sums
