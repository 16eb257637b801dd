"""Soft targets: a teacher's distribution over each target token, as its K likeliest tokens and one bucket for the rest.

Of logits, `largest` takes that distribution.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftTargets:
    """Distributions of target tokens: the K likeliest tokens, the likeliest first, and all others together."""

    # Typed Any because JAX transformations replace the arrays by shapes and placeholders.
    ids_BTK: Any
    log_p_BTK: Any
    log_p_tail_BT: Any  # -inf if K is the whole vocabulary


def largest(logits_BTV: Float[Array, "B T V"], *, count: int) -> SoftTargets:
    """Returns the `count` largest probabilities of float32 logits, and the sum of the others, as logarithms.

    The others are summed themselves: 1 minus the sum of the largest would lose a tail below float32's rounding.
    """
    found_BTK, ids_BTK = jax.lax.top_k(logits_BTV, count)
    largest_BT1, smallest_BT1 = found_BTK[..., :1], found_BTK[..., -1:]
    # Of equal logits `top_k` takes the smallest ids, so these two comparisons find the others without a scatter.
    ids_11V = jnp.arange(logits_BTV.shape[-1])[None, None, :]
    tied_BTV = (logits_BTV == smallest_BT1) & (ids_11V > ids_BTK[..., -1:])
    others_BTV = jnp.where((logits_BTV < smallest_BT1) | tied_BTV, jnp.exp(logits_BTV - largest_BT1), 0.0)
    tail_BT = jnp.sum(others_BTV, axis=-1)
    log_z_BT = jnp.log(tail_BT + jnp.sum(jnp.exp(found_BTK - largest_BT1), axis=-1))
    return SoftTargets(
        ids_BTK=ids_BTK,
        log_p_BTK=found_BTK - largest_BT1 - log_z_BT[..., None],
        log_p_tail_BT=jnp.log(tail_BT) - log_z_BT,
    )
