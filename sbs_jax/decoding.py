"""Generation from a student: greedy with a cache, and the score of given targets.

Both take a batch of unpacked source rows; row by row they are independent of their neighbours and of how far the
source is padded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sbs_jax import t5

EOS, PAD = 1, 0


def greedy(
    model: t5.T5, encoder_input_tokens: Int[Array, "B S"], *, length: int
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:
    """The most likely next token, up to `length` of them or EOS.

    Returns tokens (EOS included, 0 after it) and the natural log probability of each row's tokens, EOS included.
    The loop ends as soon as every row has ended. Decoding starts from token 0, as T5 was trained.
    """
    segments = t5.source_segments(encoder_input_tokens)
    encoded = model.encode(encoder_input_tokens, segment_ids=segments)
    batch = encoder_input_tokens.shape[0]
    start = (
        jnp.int32(0),
        jnp.zeros((batch,), jnp.int32),
        # A row of nothing but padding (it fills up a batch) is done before it starts.
        ~jnp.any(encoder_input_tokens > 0, axis=1),
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch,), jnp.float32),
        model.init_cache(encoded, length=length),
    )

    def unfinished(loop):
        position, _, done, *_ = loop
        return (position < length) & ~jnp.all(done)

    def advance(loop):
        position, previous, done, tokens, score, caches = loop
        logits, caches = model.decode_step(previous, caches, position=position, encoder_segment_ids=segments)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        chosen = jnp.where(done, PAD, best)
        log_p = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        score = score + jnp.where(done, 0.0, log_p)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], position, axis=1)
        return position + 1, chosen, done | (chosen == EOS), tokens, score, caches

    _, _, _, tokens, score, _ = jax.lax.while_loop(unfinished, advance, start)
    return tokens, score


def score(
    model: t5.T5,
    encoder_input_tokens: Int[Array, "B S"],
    decoder_target_tokens: Int[Array, "B T"],
) -> Float[Array, "B"]:
    """Natural log probability of each given target (its non-padding tokens, EOS included when it is there)."""
    shifted = jnp.pad(decoder_target_tokens, ((0, 0), (1, 0)))[:, :-1]
    log_p = jax.nn.log_softmax(model(encoder_input_tokens, shifted), axis=-1)
    chosen = jnp.take_along_axis(log_p, decoder_target_tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(decoder_target_tokens > 0, chosen, 0.0), axis=-1)
