"""Policy optimization: answers that the student samples, K to a prompt, are made likelier by their rewards.

    maximize  E[r(y) - beta * KL(student || reference)]

With one update per rollout, answers y_1 .. y_K of a prompt, and b prompts in the global batch:

    R_i = r_i - beta * sum over tokens of (log student(y_it) - log reference(y_it))
    A_i = R_i - mean of the other R_j             "rloo" (Ahmadian et al. 2024, arXiv 2402.14740)
        = (R_i - mean) / standard deviation       "grpo" (Shao et al. 2024, arXiv 2402.03300)
        = R_i - mean                              "dr_grpo" (Liu et al. 2025, arXiv 2503.20783)
    L   = - sum over answers and their tokens of A_i * log student(y_it) / (b K)

The penalty is inside the reward (k1): its gradient is that of the KL, which a penalty of k3 in the loss does not have.
A constant divides the sum, not the length of each answer, so that long and short answers are not weighed otherwise.
With "rloo" the gradient of L is an unbiased estimate of that of the objective (tests/test_policy.py).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sbs_jax import checks

ADVANTAGES = ("rloo", "grpo", "dr_grpo")
_LEAST_DEVIATION = 1e-4  # of the rewards of a group; equal rewards have advantage 0, not 0 / 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Settings of rewards: their weights by name, answers per prompt, the penalty, the form of the advantage."""

    rewards: tuple[tuple[str, int | float], ...]
    samples: int = 4
    kl_weight: int | float = 0.05
    advantage: str = "rloo"

    def __post_init__(self) -> None:
        checks.whole_number("TrainConfig.samples", self.samples, least=2)
        checks.number("TrainConfig.kl_weight", self.kl_weight, least=0.0)
        checks.choice("TrainConfig.advantage", self.advantage, ADVANTAGES)


def advantages(rewards_BK: Float[Array, "B K"], *, kind: str) -> Float[Array, "B K"]:
    """Compares each answer with the others of its prompt. Equal rewards give 0."""
    from_mean_BK = rewards_BK - jnp.mean(rewards_BK, axis=1, keepdims=True)
    if kind == "rloo":
        count = rewards_BK.shape[1]
        return from_mean_BK * (count / (count - 1))
    if kind == "grpo":
        return from_mean_BK / (jnp.std(rewards_BK, axis=1, keepdims=True) + _LEAST_DEVIATION)
    return from_mean_BK


def loss(
    log_p_BT: Float[Array, "B T"],
    reference_BT: Float[Array, "B T"],
    *,
    real_BT: Float[Array, "B T"],
    rewards_BR: Float[Array, "B R"],
    policy: Policy,
    prompts: int,
) -> tuple[Float[Array, ""], dict[str, tuple[Any, Any]]]:
    """Returns the sum over these answers of -A log p / (prompts * K), and metrics as (sum, count).

    Rows are answers, K of a prompt after one another. `log_p_BT` are the student's log probabilities of their tokens,
    which have a gradient, `reference_BT` the reference's (or the student's own, without a penalty), `real_BT` 1 at the
    tokens up to EOS, `rewards_BR` the rewards in the order of `policy.rewards`. `prompts` is of the global batch.
    """
    samples, now_BT = policy.samples, jax.lax.stop_gradient(log_p_BT)
    weights_R = jnp.asarray([weight for _, weight in policy.rewards], jnp.float32)
    reward_B = rewards_BR @ weights_R
    kl_B = jnp.sum(real_BT * (now_BT - reference_BT), axis=1)
    groups_BK = (reward_B - policy.kl_weight * kl_B).reshape(-1, samples)
    advantage_B = advantages(groups_BK, kind=policy.advantage).reshape(-1)
    total = -jnp.sum(advantage_B * jnp.sum(real_BT * log_p_BT, axis=1)) / (prompts * samples)
    count, tokens = jnp.float32(len(reward_B)), jnp.sum(real_BT)
    spread_B = jnp.ptp(reward_B.reshape(-1, samples), axis=1)
    found = {
        "reward": (jnp.sum(reward_B), count),
        "kl": (jnp.sum(kl_B), count),
        "entropy": (-jnp.sum(real_BT * now_BT), tokens),
        "answer_length": (tokens, count),
        "equal_groups": (jnp.sum((spread_B == 0.0).astype(jnp.float32)), jnp.float32(len(spread_B))),
    }
    for number, (name, _) in enumerate(policy.rewards):
        found[f"reward/{name}"] = (jnp.sum(rewards_BR[:, number]), count)
    return total, found
