"""Distillation from a teacher in memory, GKD (Agarwal et al. 2023, arXiv 2306.13649).

    L = (1 - share) * L_targets + share * mean JSD(beta)
    JSD(beta)(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q

P is the teacher's distribution over the whole vocabulary, Q the student's. With `probability`, the tokens of a step's
divergence are targets that the student sampled (rollouts.py), else the dataset's; L_targets is always on the dataset's.

JSD(beta) goes to 0 at both ends: JSD(beta) / beta tends to KL(P || Q) for beta to 0, and JSD(beta) / (1 - beta) to
KL(Q || P) for beta to 1. As in the paper and in other implementations, beta = 0 means the former and beta = 1 the
latter. So the ends are these limits of a quotient, and not of JSD itself.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sbs_jax import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """The term of the loss: its share, its divergence, and the targets on which it is taken."""

    share: int | float = 0.5  # of the divergence; the loss on the dataset's targets has the rest
    beta: int | float = 0.5  # 0: forward KL, 1: reverse KL
    probability: int | float = 0.5  # that a step's divergence is on sampled targets
    temperature: int | float = 1.0  # of the sampling; the divergence is of the undivided logits

    def __post_init__(self) -> None:
        checks.number("TrainConfig.jsd_share", self.share, above=0.0, most=1.0)
        checks.number("TrainConfig.jsd_beta", self.beta, least=0.0, most=1.0)
        checks.number("TrainConfig.on_policy", self.probability, least=0.0, most=1.0)
        checks.number("TrainConfig.sampling_temperature", self.temperature, above=0.0)


def divergence(
    teacher_BTV: Float[Array, "B T V"], student_BTV: Float[Array, "B T V"], *, beta: int | float
) -> Float[Array, "B T"]:
    """Computes JSD(beta) of each token in nats from two arrays of float32 logits.

    It is at most the entropy of (beta, 1 - beta) inside the interval, and unbounded at its ends.
    """
    log_p_BTV, log_q_BTV = (jax.nn.log_softmax(logits, axis=-1) for logits in (teacher_BTV, student_BTV))
    if beta == 0:
        return _kl(log_p_BTV, log_q_BTV)
    if beta == 1:
        return _kl(log_q_BTV, log_p_BTV)
    log_m_BTV = jnp.logaddexp(log_p_BTV + math.log(beta), log_q_BTV + math.log1p(-beta))
    return beta * _kl(log_p_BTV, log_m_BTV) + (1 - beta) * _kl(log_q_BTV, log_m_BTV)


def _kl(log_p_BTV: Float[Array, "B T V"], log_q_BTV: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    return jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
