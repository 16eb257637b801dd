"""Generation from a student: greedy and beam search with a cache, and the score of given targets.

Both take a batch of unpacked source rows; row by row they are independent of their neighbours and of how far the
source is padded.
"""

import dataclasses
import functools

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


# Log probability of what cannot be chosen.
_NEVER = -1e9


def beam_search(
    model: t5.T5,
    encoder_input_tokens: Int[Array, "B S"],
    *,
    length: int,
    beams: int,
    length_penalty: float = 1.0,
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:
    """The best of the sequences that a beam of `beams` finds, up to `length` tokens or EOS.

    The rules are those of Hugging Face's `generate(num_beams=..)` with its default `early_stopping=False`: of the
    2 * beams best continuations, those among the first `beams` that end are kept if their log probability divided by
    tokens ** length_penalty (EOS counts) is among the best; the best that go on make the next beam; a row is done when
    the first of its beam, by its present length, is no better than the worst kept. The last position ends everything.

    Returns tokens (EOS included, 0 after it) and the natural log probability of each row's tokens, not divided.
    """
    batch = encoder_input_tokens.shape[0]
    segments = t5.source_segments(encoder_input_tokens)
    encoded = model.encode(encoder_input_tokens, segment_ids=segments)
    repeat = functools.partial(jnp.repeat, repeats=beams, axis=0)
    flat_segments = repeat(segments)
    row = jnp.arange(batch)[:, None]
    only_first = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER)[None, :], (batch, beams))
    start = (
        jnp.int32(0),
        jnp.zeros((batch, beams, length), jnp.int32),  # tokens of the beam
        only_first,  # their log probabilities; all beams start alike, so one of them stands for all
        jnp.zeros((batch, beams, length), jnp.int32),  # tokens of what has ended
        jnp.full((batch, beams), _NEVER),  # their divided log probabilities
        jnp.zeros((batch, beams)),  # their log probabilities
        jnp.any(encoder_input_tokens > 0, axis=1),  # rows that can still improve; not those of padding
        jax.tree.map(repeat, model.init_cache(encoded, length=length)),
    )

    def unfinished(loop):
        position, *_, improvable, _ = loop
        return (position < length) & jnp.any(improvable)

    def advance(loop):
        position, tokens, log_p, ended, ended_score, ended_log_p, improvable, caches = loop
        previous = jnp.where(position == 0, 0, tokens[:, :, jnp.maximum(position - 1, 0)])
        logits, caches = model.decode_step(
            previous.reshape(-1), caches, position=position, encoder_segment_ids=flat_segments
        )
        vocabulary = logits.shape[-1]
        extended = jax.nn.log_softmax(logits, axis=-1).reshape(batch, beams, vocabulary) + log_p[:, :, None]
        candidate_log_p, flat = jax.lax.top_k(extended.reshape(batch, -1), 2 * beams)
        parent, token = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
        candidates = jax.lax.dynamic_update_slice_in_dim(tokens[row, parent], token[:, :, None], position, axis=2)
        ends = (token == EOS) | (position + 1 == length)
        # The first `beams` may end; the others are there so that enough remain to go on.
        keeps = ends & (jnp.arange(2 * beams) < beams)[None, :] & improvable[:, None]
        count = (position + 1).astype(jnp.float32)
        score = jnp.where(keeps, candidate_log_p / count**length_penalty, _NEVER)
        ended_score, best = jax.lax.top_k(jnp.concatenate([ended_score, score], axis=1), beams)
        ended = jnp.concatenate([ended, candidates], axis=1)[row, best]
        ended_log_p = jnp.concatenate([ended_log_p, candidate_log_p], axis=1)[row, best]
        log_p, going = jax.lax.top_k(jnp.where(ends, candidate_log_p + _NEVER, candidate_log_p), beams)
        chosen = parent[row, going]
        from_flat = (row * beams + chosen).reshape(-1)
        caches = tuple(
            dataclasses.replace(cache, self_key=cache.self_key[from_flat], self_value=cache.self_value[from_flat])
            for cache in caches
        )
        worst = jnp.min(ended_score, axis=1)  # as good as nothing while fewer than `beams` have ended
        improvable = improvable & (log_p[:, 0] / count**length_penalty > worst)
        return position + 1, candidates[row, going], log_p, ended, ended_score, ended_log_p, improvable, caches

    _, _, _, ended, _, ended_log_p, _, _ = jax.lax.while_loop(unfinished, advance, start)
    return ended[:, 0], ended_log_p[:, 0]


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
