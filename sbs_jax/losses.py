"""The step-by-step loss: one weight per target token, one weighted sum.

    L = alpha * mean CE over label tokens + (1 - alpha) * mean CE over rationale tokens

(Hsieh et al. 2023, Eq. 3, in the weighting of the official code.) Both means run over the tokens of the *global*
batch, so the weights are computed once, from the task ids of the whole batch, before it is cut into micro-batches or
laid over devices; from there on everything is a plain sum, which no cutting, laying out or packing can change.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Values of the `task_ids` feature; 0 is padding.
LABEL, RATIONALE = 1, 2
TASK_NAMES = {LABEL: "label", RATIONALE: "rationale"}


def token_weights(task_ids_BT: Int[Array, "B T"], *, alpha: float) -> Float[Array, "B T"]:
    """Weight of each target token: alpha / N_label, (1 - alpha) / N_rationale, 0 on padding.

    Must be called on the whole global batch. A task without a single token in the batch contributes nothing (its
    mean is undefined), and the other keeps its own weight.

    >>> token_weights(jnp.array([[1, 1, 0, 0], [2, 2, 2, 2]]), alpha=0.5)
    [[0.25 0.25 0. 0.] [0.125 0.125 0.125 0.125]]
    """
    weights = jnp.zeros(task_ids_BT.shape, jnp.float32)
    for task, share in ((LABEL, alpha), (RATIONALE, 1.0 - alpha)):
        mine = (task_ids_BT == task).astype(jnp.float32)
        weights += mine * (share / jnp.maximum(mine.sum(), 1.0))
    return weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TaskSums:
    """Plain sums over the target tokens of one task: they add up over micro-batches."""

    # Any, not array types: transformations put shapes and placeholders in place of the scalars.
    cross_entropy: Any
    correct: Any
    tokens: Any

    def means(self, name: str) -> dict[str, Float[Array, ""]]:
        """`{"loss/label": nats per token, "token_accuracy/label": 0..1, "tokens/label": count}`."""
        # 0 / 0 would print NaN for a task that is not in the run; a count of 0 says it better.
        count = jnp.maximum(self.tokens, 1.0)
        return {
            f"loss/{name}": self.cross_entropy / count,
            f"token_accuracy/{name}": self.correct / count,
            f"tokens/{name}": self.tokens,
        }


def weighted_cross_entropy(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    *,
    task_ids_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    z_loss: float,
) -> tuple[Float[Array, ""], dict[int, TaskSums]]:
    """Sum of weight * (CE + z_loss * log(Z)^2), and unweighted sums per task.

    `z_loss` is T5X's auxiliary term (1e-4 there, 0 in the official code): it pulls log(Z), the log of the softmax's
    normaliser, to 0, and takes the weights of the tokens it belongs to. Logits are float32, losses in nats.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A masked sum in place of a gather: it fuses, and stays local where the vocabulary is sharded.
    is_target = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[..., None]
    target_logit_BT = jnp.sum(jnp.where(is_target, logits_BTV, 0.0), axis=-1)
    cross_entropy_BT = log_z_BT - target_logit_BT
    loss = jnp.sum(weights_BT * (cross_entropy_BT + z_loss * jnp.square(log_z_BT)))
    # Ties count as wrong only if the target is not the first of them: argmax, as greedy decoding picks.
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    sums = {}
    for task in TASK_NAMES:
        mine = (task_ids_BT == task).astype(jnp.float32)
        sums[task] = TaskSums(
            cross_entropy=jnp.sum(mine * cross_entropy_BT),
            correct=jnp.sum(mine * correct_BT),
            tokens=jnp.sum(mine),
        )
    return loss, sums
