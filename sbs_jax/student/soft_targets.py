"""Soft targets: a teacher's distribution over each target token, as its K likeliest tokens and one bucket for the rest.

The student's loss is the forward divergence of the two distributions over these K + 1 outcomes, p the teacher's:

    KL = sum over the K tokens of p (log p - log q) + p_rest (log p_rest - log q_rest)

It is at most the divergence over the whole vocabulary (merging outcomes loses information), grows with K, and equals it
at K = V. Its gradient leaves the proportions among the other tokens as the student has them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_GROUP = 32  # neighbouring ids
# Features of a batch: [B, T, K], [B, T, K], [B, T].
FEATURES = IDS, LOG_P, LOG_P_REST = ("decoder_soft_ids", "decoder_soft_log_p", "decoder_soft_log_p_rest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftTargets:
    """Distributions of target tokens: the K likeliest tokens, the likeliest first, and all others together.

    A token without a teacher's distribution has only probabilities of 0.
    """

    # Typed Any because JAX transformations replace the arrays by shapes and placeholders.
    ids: Any  # [B, T, K]
    log_p: Any  # [B, T, K]
    log_p_rest: Any  # [B, T]; -inf if K is the whole vocabulary

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "SoftTargets | None":
        """Returns the soft targets among the features of a batch, None if it has none."""
        return cls(*(batch[name] for name in FEATURES)) if IDS in batch else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Divergence:
    """Divergence of each target token in nats, float32 [B, T], and where there is one (1, else 0)."""

    kl: Any
    there: Any


def largest(logits_BTV: Float[Array, "B T V"], *, count: int) -> SoftTargets:
    """Returns the `count` largest probabilities of float32 logits, and the sum of the others, as logarithms.

    The others are summed themselves: 1 minus the sum of the largest would lose what is below float32's rounding.
    """
    found_BTK, ids_BTK = _top_k(logits_BTV, count)
    largest_BT1, smallest_BT1 = found_BTK[..., :1], found_BTK[..., -1:]
    # Of equal logits the smallest ids are taken, so these two comparisons find the others without a scatter.
    ids_11V = jnp.arange(logits_BTV.shape[-1])[None, None, :]
    tied_BTV = (logits_BTV == smallest_BT1) & (ids_11V > ids_BTK[..., -1:])
    others_BTV = jnp.where((logits_BTV < smallest_BT1) | tied_BTV, jnp.exp(logits_BTV - largest_BT1), 0.0)
    rest_BT = jnp.sum(others_BTV, axis=-1)
    log_z_BT = jnp.log(rest_BT + jnp.sum(jnp.exp(found_BTK - largest_BT1), axis=-1))
    return SoftTargets(
        ids=ids_BTK,
        log_p=found_BTK - largest_BT1 - log_z_BT[..., None],
        log_p_rest=jnp.log(rest_BT) - log_z_BT,
    )


def _top_k(logits_BTV: Array, count: int) -> tuple[Array, Array]:
    """Returns values and ids of the largest logits as `jax.lax.top_k`, of equal ones the smallest ids, but faster.

    The K largest lie in the K groups of neighbouring ids with the largest maxima.
    """
    groups = -(-logits_BTV.shape[-1] // _GROUP)
    if groups <= count:
        found = jax.lax.top_k(logits_BTV, count)
    else:
        ends = ((0, 0), (0, 0), (0, groups * _GROUP - logits_BTV.shape[-1]))
        grouped_BTGN = jnp.pad(logits_BTV, ends, constant_values=-jnp.inf).reshape(*logits_BTV.shape[:2], groups, -1)
        chosen_BTK = jnp.sort(jax.lax.top_k(jnp.max(grouped_BTGN, axis=-1), count)[1], axis=-1)
        some_BTKN = jnp.take_along_axis(grouped_BTGN, chosen_BTK[..., None], axis=2)
        values_BTK, places_BTK = jax.lax.top_k(some_BTKN.reshape(*logits_BTV.shape[:2], -1), count)
        group_BTK = jnp.take_along_axis(chosen_BTK, places_BTK // _GROUP, axis=-1)
        found = values_BTK, group_BTK * _GROUP + places_BTK % _GROUP
    # Without the barrier, slices of the result are merged into XLA's, which then sorts the whole vocabulary.
    return jax.lax.optimization_barrier(tuple(found))


def divergence(logits_BTV: Float[Array, "B T V"], log_z_BT: Float[Array, "B T"], *, teacher: SoftTargets) -> Divergence:
    """Computes the divergence of a teacher's distributions from those of the student's float32 logits.

    `log_z_BT` is the log of the softmax's normalizer. The teacher's probabilities, which are stored rounded, are
    normalized again. Values and gradients are finite, also where the rest is empty.
    """
    log_p_BTN = jnp.concatenate([teacher.log_p, teacher.log_p_rest[..., None]], axis=-1).astype(jnp.float32)
    there_BT = jnp.isfinite(log_p_BTN[..., 0])
    log_p_BTN = jnp.where(there_BT[..., None], log_p_BTN, 0.0)
    log_p_BTN -= jax.nn.logsumexp(log_p_BTN, axis=-1, keepdims=True)
    ids_BTK = teacher.ids.astype(jnp.int32)
    log_q_BTN = jnp.take_along_axis(logits_BTV, ids_BTK, axis=-1) - log_z_BT[..., None]
    if ids_BTK.shape[-1] < logits_BTV.shape[-1]:
        # Summed themselves: 1 minus the sum of the K would have no digits left where the student is sure.
        others_BTV = jnp.where(_contains(ids_BTK, logits_BTV.shape[-1]), -jnp.inf, logits_BTV)
        log_q_rest_BT = jax.nn.logsumexp(others_BTV, axis=-1) - log_z_BT
        log_q_BTN = jnp.concatenate([log_q_BTN, log_q_rest_BT[..., None]], axis=-1)
    else:
        log_p_BTN = log_p_BTN[..., :-1]
    # A probability of 0 has a divergence of 0, not of 0 times infinity.
    log_p_BTN, p_BTN = jnp.where(jnp.isfinite(log_p_BTN), log_p_BTN, 0.0), jnp.exp(log_p_BTN)
    there_BT = there_BT.astype(jnp.float32)
    return Divergence(kl=there_BT * jnp.sum(p_BTN * (log_p_BTN - log_q_BTN), axis=-1), there=there_BT)


def _contains(ids_BTK: Array, size: int) -> Array:
    """Returns which of `size` ids each token's set contains, bool [B, T, size]."""

    def one(ids_K: Array) -> Array:
        return jnp.zeros(size, bool).at[ids_K].set(True)

    return jax.vmap(jax.vmap(one))(ids_BTK)
