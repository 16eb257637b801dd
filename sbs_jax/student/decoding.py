"""Generation from a student: greedy, sampling and beam search with a cache, and the score of given targets.

All take a batch of unpacked source rows; row by row they are independent, but for rounding, of their neighbours and of
how far the source is padded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from sbs_jax.student import partitioning, stepping, t5
from sbs_jax.student.partitioning import constrain

EOS, PAD = 1, 0


def greedy(
    model: t5.T5, encoder_input_tokens: Int[Array, "B S"], *, length: int, drop_ended: bool = False
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:
    """The most likely next token, up to `length` of them or EOS.

    Returns tokens (EOS included, 0 after it) and the natural log probability of each row's tokens, EOS included.
    The loop ends as soon as every row has ended. Decoding starts from token 0, as T5 was trained.

    `drop_ended`: once half of the rows have ended the others go on without them, and so on down to `LEAST_ROWS`. For
    where a step takes as long as it has rows (a CPU), and rows are not cut over devices.
    """

    def choose(logits_BV: jax.Array, position: jax.Array, rows_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        del position, rows_B
        return most_likely(logits_BV), jnp.max(logits_BV, axis=-1)

    return _generate(model, encoder_input_tokens, length=length, choose=choose, drop_ended=drop_ended)


def sample(
    model: t5.T5,
    encoder_input_tokens: Int[Array, "B S"],
    keys_B2: UInt32[Array, "B 2"],
    *,
    length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    drop_ended: bool = False,
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:
    """Tokens drawn from the student's distribution, up to `length` of them or EOS; returns what `greedy` does.

    The logits are divided by `temperature`; of tokens remain the `top_k` likeliest (0: all) and of those the fewest
    whose probabilities sum to at least `top_p`, as in Hugging Face's `generate`. A row draws with its own key (the data
    of a threefry key) folded with the position, so neither its neighbours nor padding change what it draws. The log
    probability is the student's own, of the undivided logits over all tokens.
    """
    keys_B = jax.random.wrap_key_data(keys_B2, impl="threefry2x32")

    def choose(logits_BV: jax.Array, position: jax.Array, rows_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept_BV = _kept(logits_BV / temperature, top_k=top_k, top_p=top_p)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, position), kept_BV.shape[1:]))(
            keys_B[rows_B]
        )
        token_B = most_likely(kept_BV + noise_BV)
        return token_B, jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]

    return _generate(model, encoder_input_tokens, length=length, choose=choose, drop_ended=drop_ended)


def _kept(logits_BV: Float[Array, "B V"], *, top_k: int, top_p: float) -> Float[Array, "B V"]:
    """The logits, -inf for tokens that may not be drawn."""
    if top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p < 1.0:
        ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(ordered_BV, axis=-1)
        needed_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < top_p  # those before it do not suffice
        least_B1 = jnp.min(jnp.where(needed_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def most_likely(logits_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The largest of each row; of equal ones the first."""

    def by_argmax(logits_BV: jax.Array) -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def by_comparison(logits_BV: jax.Array) -> jax.Array:
        """XLA for CPU reduces a pair of value and index one by one; a maximum, and then a minimum, many at a time."""
        most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        token_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
        # Not a number is equal to nothing: then the last token, rather than none there is.
        return jnp.min(jnp.where(logits_BV == most_B1, token_V[None, :], token_V[None, -1:]), axis=-1)

    return jax.lax.platform_dependent(logits_BV, tpu=by_argmax, default=by_comparison)


# With fewer rows a step takes hardly less time: it reads the weights.
LEAST_ROWS = 4


def _generate(
    model: t5.T5,
    encoder_input_tokens: Int[Array, "B S"],
    *,
    length: int,
    choose: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    drop_ended: bool,
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:
    """One token after the other, by `choose(logits [B, V], position, rows [B])`: tokens [B], and their logits [B]."""
    segments = t5.source_segments(encoder_input_tokens)
    encoded = _encode(model, encoder_input_tokens)
    batch = encoder_input_tokens.shape[0]
    stepper = stepping.Stepper(model, encoded, segments, length=length)
    loop = (
        jnp.int32(0),
        jnp.zeros((batch,), jnp.int32),
        # A row of nothing but padding (it fills up a batch) is done before it starts.
        ~jnp.any(encoder_input_tokens > 0, axis=1),
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch,), jnp.float32),
        stepper.empty(),
    )
    sizes = [batch]
    while drop_ended and sizes[-1] // 2 >= LEAST_ROWS:
        sizes.append(sizes[-1] // 2)
    rows = jnp.arange(batch)  # those that are left, by their number in the batch
    found: tuple[jax.Array, jax.Array] | None = None
    for size, fewer in zip(sizes, [*sizes[1:], 0], strict=True):
        if size < batch:
            left = jnp.argsort(loop[2], stable=True)[:size]  # those that have not ended come first
            rows, stepper = rows[left], stepper.of_rows(left)
            loop = (loop[0], *jax.tree.map(lambda each, left=left: each[left], loop[1:]))
        loop = _advance(stepper, loop, rows=rows, choose=choose, length=length, until=fewer)
        tokens, score = loop[3], loop[4]
        found = (tokens, score) if found is None else (found[0].at[rows].set(tokens), found[1].at[rows].set(score))
    assert found is not None
    return found


def _advance(
    stepper: stepping.Stepper,
    loop: tuple[Any, ...],
    *,
    rows: Int[Array, "B"],
    choose: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    length: int,
    until: int,
) -> tuple[Any, ...]:
    """Goes on until no more than `until` of these rows have not ended, or `length` tokens are there.

    `loop`: position, the tokens before [B], which rows have ended [B], tokens [B, T], scores [B], caches.
    """

    def unfinished(loop):
        position, _, done, *_ = loop
        going = ~jnp.all(done) if until == 0 else jnp.sum(~done) > until
        return (position < length) & going

    def advance(loop):
        position, previous, done, tokens, score, caches = loop
        states, caches = stepper.step(previous[:, None], caches, position=position)
        logits = jnp.matmul(states[:, 0], stepper.table_DV, preferred_element_type=jnp.float32)
        token, its_logit = choose(logits, position, rows)
        chosen = jnp.where(done, PAD, token)
        score = score + jnp.where(done, 0.0, its_logit - jax.nn.logsumexp(logits, axis=-1))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], position, axis=1)
        return position + 1, chosen, done | (chosen == EOS), tokens, score, caches

    return jax.lax.while_loop(unfinished, advance, loop)


# Tokens that a CPU encodes at once: what lies between the layers then stays in its cache.
_ENCODED_AT_ONCE = 2048


def _encode(model: t5.T5, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B P D"]:
    """The encoded source; on a CPU, if it is large, some rows after others."""

    def encode(tokens_RS: jax.Array) -> jax.Array:
        return model.encode(tokens_RS, segment_ids=t5.source_segments(tokens_RS))

    batch, length = tokens_BS.shape
    rows = partitioning.nearest_divisor(batch, max(_ENCODED_AT_ONCE // length, 1))
    if rows == batch or partitioning.platform() != "cpu" or partitioning.pieces("batch") > 1:
        return encode(tokens_BS)
    encoded = jax.lax.map(encode, tokens_BS.reshape(-1, rows, length))
    return encoded.reshape(batch, *encoded.shape[2:])


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
    encoded = _encode(model, encoder_input_tokens)
    stepper = stepping.Stepper(model, encoded, segments, length=length, beams=beams)
    only_first = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER)[None, :], (batch, beams))
    # Of beam n at position t, the key is number t * beams + n.
    written_by = jnp.tile(jnp.arange(beams), length)[None, None, :]
    written_at = jnp.repeat(jnp.arange(length), beams)[None, None, :]
    own = written_by == jnp.arange(beams)[None, :, None]
    start = (
        jnp.int32(0),
        jnp.zeros((batch, beams, length), jnp.int32),  # tokens of the beam
        only_first,  # their log probabilities; all beams start alike, so one of them stands for all
        jnp.zeros((batch, beams, length), jnp.int32),  # tokens of what has ended
        jnp.full((batch, beams), _NEVER),  # their divided log probabilities
        jnp.zeros((batch, beams)),  # their log probabilities
        jnp.any(encoder_input_tokens > 0, axis=1),  # rows that can still improve; not those of padding
        jnp.zeros((batch, beams), jnp.int32),  # the tokens before
        jnp.zeros((batch, beams, length * beams), bool),  # keys of the tokens of the beam
        stepper.empty(),
    )

    def unfinished(loop):
        position, improvable = loop[0], loop[6]
        return (position < length) & jnp.any(improvable)

    def advance(loop):
        position, tokens, log_p, ended, ended_score, ended_log_p, improvable, previous, visible, caches = loop
        visible |= (written_at == position) & own
        states, caches = stepper.step(previous, caches, position=position, visible_BNP=visible)
        each_log_p, each_token = continuations(states, stepper.table_DV, log_p, count=2 * beams)
        per_beam = each_token.shape[-1]
        candidate_log_p, flat = largest(each_log_p.reshape(batch, -1), 2 * beams)
        parent, token = flat // per_beam, _pick(each_token.reshape(batch, -1), flat)
        here = jnp.arange(length)[None, None, :] == position
        candidates = jnp.where(here, token[:, :, None], _pick(tokens, parent))
        ends = (token == EOS) | (position + 1 == length)
        # The first `beams` may end; the others are there so that enough remain to go on.
        keeps = ends & (jnp.arange(2 * beams) < beams)[None, :] & improvable[:, None]
        count = (position + 1).astype(jnp.float32)
        score = jnp.where(keeps, candidate_log_p / count**length_penalty, _NEVER)
        ended_score, best = largest(jnp.concatenate([ended_score, score], axis=1), beams)
        ended = _pick(jnp.concatenate([ended, candidates], axis=1), best)
        ended_log_p = _pick(jnp.concatenate([ended_log_p, candidate_log_p], axis=1), best)
        log_p, going = largest(jnp.where(ends, candidate_log_p + _NEVER, candidate_log_p), beams)
        visible = _pick(visible, _pick(parent, going))
        worst = jnp.min(ended_score, axis=1)  # as good as nothing while fewer than `beams` have ended
        improvable = improvable & (log_p[:, 0] / count**length_penalty > worst)
        tokens, previous = _pick(candidates, going), _pick(token, going)
        return position + 1, tokens, log_p, ended, ended_score, ended_log_p, improvable, previous, visible, caches

    _, _, _, ended, _, ended_log_p, *_ = jax.lax.while_loop(unfinished, advance, start)
    return ended[:, 0], ended_log_p[:, 0]


def _pick(values: jax.Array, index: Int[Array, "B M"]) -> jax.Array:
    """`values[b, index[b, m]]` of `[B, N]` or `[B, N, rest]`, by comparison: N is small, and gathers are slow."""
    chosen = index[:, :, None] == jnp.arange(values.shape[1])[None, None, :]
    if values.ndim == 3:
        chosen, values = chosen[..., None], values[:, None]
    else:
        values = values[:, None]
    if values.dtype == bool:
        return jnp.any(chosen & values, axis=2)
    return jnp.sum(jnp.where(chosen, values, jnp.zeros((), values.dtype)), axis=2)


def largest(values_BN: Float[Array, "B N"], count: int) -> tuple[Float[Array, "B M"], Int[Array, "B M"]]:
    """`jax.lax.top_k` of a few values: the largest and their indices, in order; of equal ones the first."""

    def by_rank(values_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A TPU sorts slowly; it counts how many come before each."""
        index = jnp.arange(values_BN.shape[1])
        this, other = values_BN[:, :, None], values_BN[:, None, :]
        before = (other > this) | ((other == this) & (index[None, :] < index[:, None])[None])
        rank_BN = jnp.sum(before, axis=-1)
        here = rank_BN[:, None, :] == jnp.arange(count)[None, :, None]
        ordered = jnp.sum(jnp.where(here, values_BN[:, None, :], 0.0), axis=-1)
        return ordered, jnp.sum(jnp.where(here, index[None, None, :], 0), axis=-1).astype(jnp.int32)

    def by_sorting(values_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        found, index = jax.lax.top_k(values_BN, count)
        return found, index

    return jax.lax.platform_dependent(values_BN, tpu=by_rank, default=by_sorting)


# Logits that divide into blocks of this many tokens: the largest are found by way of the blocks that hold them.
_BLOCK = 128


def continuations(
    states_BND: Float[Array, "B N D"], table_DV: Float[Array, "D V"], log_p_BN: Float[Array, "B N"], *, count: int
) -> tuple[Float[Array, "B N count"], Int[Array, "B N count"]]:
    """Of each beam, the likeliest next tokens and the log probabilities (`log_p` included) of the beam with each.

    In order; of equally likely tokens the first. At most `count`, no more than there are.
    """
    batch, beams, width = states_BND.shape
    count = min(count, table_DV.shape[1])

    def by_sorting(states_BND: jax.Array, table_DV: jax.Array, log_p_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BNV = jnp.matmul(states_BND, table_DV, preferred_element_type=jnp.float32)
        log_p_BNV = jax.nn.log_softmax(logits_BNV, axis=-1) + log_p_BN[:, :, None]
        found, token = jax.lax.top_k(log_p_BNV, count)
        return found, token

    def by_blocks(states_BND: jax.Array, table_DV: jax.Array, log_p_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Without sorting, and reading the logits no more than three times. M is beams of all rows, G blocks.

        The `count` largest lie in the `count` blocks with the largest maxima. What is subtracted from logits does not
        change their order but can make equals of them, of which the first is due: so everything compares the results.
        """
        states_MD, log_p_M = states_BND.reshape(-1, width), log_p_BN.reshape(-1)
        logits_VM = jnp.einsum("md,dv->vm", states_MD, table_DV, preferred_element_type=jnp.float32)
        logits_GCM = constrain(logits_VM, (None, "batch")).reshape(-1, _BLOCK, batch * beams)
        most_GM = jnp.max(logits_GCM, axis=1)
        most_M = jnp.max(most_GM, axis=0)
        log_sum_M = jnp.log(jnp.sum(jnp.exp(logits_GCM - most_M[None, None]), axis=(0, 1)))

        def log_p(logits_XM: jax.Array) -> jax.Array:
            return ((logits_XM - most_M[None]) - log_sum_M[None]) + log_p_M[None]

        number_G, number_C = jnp.arange(len(logits_GCM))[:, None], jnp.arange(_BLOCK)[:, None]
        _, blocks = _first_largest(log_p(most_GM), number_G, min(count, len(logits_GCM)))
        inside = [
            jnp.max(jnp.where(number_G[:, None] == g_M[None, None], logits_GCM, -jnp.inf), axis=0) for g_M in blocks
        ]
        tokens = jnp.concatenate([g_M[None] * _BLOCK + number_C for g_M in blocks])
        found = _first_largest(log_p(jnp.concatenate(inside)), tokens, count)
        best_log_p, best_token = (jnp.stack(each, axis=-1).reshape(batch, beams, count) for each in found)
        return best_log_p, best_token

    if table_DV.shape[1] % _BLOCK:
        return by_sorting(states_BND, table_DV, log_p_BN)
    return jax.lax.platform_dependent(states_BND, table_DV, log_p_BN, tpu=by_blocks, default=by_sorting)


def _first_largest(
    values_XM: Float[Array, "X M"], names_XM: Int[Array, "X #M"], count: int
) -> tuple[list[Float[Array, "M"]], list[Int[Array, "M"]]]:
    """The `count` largest of each column, in order, and their names; of equal ones the least name."""
    values, names = [], []
    for _ in range(count):
        values.append(jnp.max(values_XM, axis=0))
        # Not `argmax`: where only its index is used, XLA for TPU keeps its values in bfloat16.
        names.append(jnp.min(jnp.where(values_XM == values[-1][None], names_XM, jnp.iinfo(jnp.int32).max), axis=0))
        values_XM = jnp.where(names_XM == names[-1][None], -jnp.inf, values_XM)
    return values, names


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


def score_choices(
    model: t5.T5, encoder_input_tokens: Int[Array, "B S"], choices_BNT: Int[Array, "B N T"]
) -> Float[Array, "B N"]:
    """Natural log probability of each of a row's N targets, as `score` gives it (0 for one of nothing but padding).

    The source is encoded once, and all targets of a row share its keys and values.
    """
    batch, count, length = choices_BNT.shape
    segments = t5.source_segments(encoder_input_tokens)
    encoded = _encode(model, encoder_input_tokens)
    stepper = stepping.Stepper(model, encoded, segments, length=length, beams=count)
    # Of target n at position t, the key is number t * N + n; what is later than the query is masked there.
    own_1NP = (jnp.arange(length * count)[None, :] % count == jnp.arange(count)[:, None])[None]
    before_BNT = jnp.pad(choices_BNT, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]

    def advance(carry, at):
        caches, log_p_BN = carry
        position, previous_BN, token_BN = at
        states, caches = stepper.step(previous_BN, caches, position=position, visible_BNP=own_1NP)
        logits = jnp.matmul(states, stepper.table_DV, preferred_element_type=jnp.float32)
        its_logit = jnp.take_along_axis(logits, token_BN[:, :, None], axis=-1)[:, :, 0]
        added = jnp.where(token_BN > 0, its_logit - jax.nn.logsumexp(logits, axis=-1), 0.0)
        return (caches, log_p_BN + added), None

    steps = jnp.arange(length), jnp.moveaxis(before_BNT, 2, 0), jnp.moveaxis(choices_BNT, 2, 0)
    (_, log_p_BN), _ = jax.lax.scan(advance, (stepper.empty(), jnp.zeros((batch, count))), steps)
    return log_p_BN
