"""Targets that a student samples in training, as the decoder's part of a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sbs_jax.student import decoding, families

# Folded into a step's key, or a micro-batch's; no micro-batch or layer has this number.
KEY = 0x5A301D


def sample(
    model: families.Model,
    encoder_input_tokens: Int[Array, "B S"],
    *,
    key: Key[Array, ""],
    length: int,
    temperature: int | float,
) -> Int[Array, "B T"]:
    """Samples one target per row from the student's whole distribution, without dropout; 0 after EOS.

    Each row draws with its own key, made for the rows of the global batch: devices do not change the draws.
    """
    keys_B2 = jax.random.bits(key, (len(encoder_input_tokens), 2), jnp.uint32)
    tokens_BT, _ = decoding.sample(
        *(model, encoder_input_tokens, keys_B2), length=length, temperature=float(temperature), top_k=0, top_p=1.0
    )
    return tokens_BT


def as_targets(
    tokens_BT: Int[Array, "B T"], task_ids_BT: Int[Array, "B T"], *, eos_id: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Returns decoder inputs and task ids of sampled tokens: every token up to EOS, included, has its row's task.

    A sample without EOS counts as a whole, and a sampled id 0 before EOS counts like any token. `task_ids_BT` are those
    of the dataset's targets, one per unpacked row; a row without any has none here either.
    """
    ends_BT = (tokens_BT == eos_id).astype(jnp.int32)
    before_B1 = jnp.cumsum(ends_BT, axis=1) - ends_BT
    row_B1 = jnp.max(task_ids_BT, axis=1, keepdims=True)
    return decoding.shifted(tokens_BT, start=decoding.PAD), jnp.where(before_B1 == 0, row_B1, 0)


def mean_length(task_ids_BT: Int[Array, "B T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the tokens and the rows of these targets, whose quotient is their mean length."""
    real_BT = (task_ids_BT > 0).astype(jnp.float32)
    return jnp.sum(real_BT), jnp.sum(jnp.max(real_BT, axis=1))
