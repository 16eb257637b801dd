"""Generation: greedy, sampling and beam search with a cache, and log probabilities of given targets.

All functions take a batch of unpacked source rows. Up to rounding, a row's result does not depend on its neighbors or
padding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from sbs_jax.student import families, partitioning, stacks, stepping
from sbs_jax.student.layers import capped
from sbs_jax.student.partitioning import constrain

PAD = 0  # after the end of a sequence; EOS and the first decoder input are the model's


def greedy(
    model: families.Model, encoder_input_tokens: Int[Array, "B S"], *, length: int, drop_ended: bool = False
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:
    """Generates the most likely token at each position, until EOS or `length` tokens.

    Returns tokens (EOS included, 0 after it) and the natural log probability of each row's tokens, EOS included.
    The loop stops when every row has ended. Decoding starts from the model's `decoder_start`, as in training.

    `drop_ended` drops ended rows whenever half of the rows have ended, down to `LEAST_ROWS`. It pays where the time of
    a step is proportional to its rows (a CPU); rows must not be sharded.
    """

    def choose(logits_BV: jax.Array, position: jax.Array, rows_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        del position, rows_B
        return most_likely(logits_BV), jnp.max(logits_BV, axis=-1)

    return _generate(model, encoder_input_tokens, length=length, choose=choose, drop_ended=drop_ended)


def sample(
    model: families.Model,
    encoder_input_tokens: Int[Array, "B S"],
    keys_B2: UInt32[Array, "B 2"],
    *,
    length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    drop_ended: bool = False,
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:
    """Samples tokens from the student's distribution, until EOS or `length` tokens; returns the same as `greedy`.

    As in Hugging Face's `generate`: logits are divided by `temperature`, then the `top_k` most likely tokens are kept
    (0: all), then the smallest set of these whose probabilities sum to at least `top_p`. Each row draws with its own
    key (the data of a threefry key) folded with the position, so neighbors and padding do not change its draws. The
    log probability is the student's own, from the undivided logits over all tokens.
    """
    keys_B = jax.random.wrap_key_data(keys_B2, impl="threefry2x32")

    def choose(logits_BV: jax.Array, position: jax.Array, rows_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        kept_BV = _filter(logits_BV / temperature, top_k=top_k, top_p=top_p)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, position), kept_BV.shape[1:]))(
            keys_B[rows_B]
        )
        token_B = most_likely(kept_BV + noise_BV)
        return token_B, jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]

    return _generate(model, encoder_input_tokens, length=length, choose=choose, drop_ended=drop_ended)


def _filter(logits_BV: Float[Array, "B V"], *, top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Sets the logits of tokens outside `top_k` and `top_p` to -inf."""
    if top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p < 1.0:
        ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(ordered_BV, axis=-1)
        needed_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < top_p  # likelier tokens do not reach top_p
        least_B1 = jnp.min(jnp.where(needed_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def most_likely(logits_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Returns the index of each row's largest logit; ties go to the first."""

    def by_argmax(logits_BV: jax.Array) -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def by_comparison(logits_BV: jax.Array) -> jax.Array:
        """Computes a maximum, then a minimum: XLA for CPU vectorizes both, but not argmax."""
        most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        token_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
        # NaN equals nothing, so a row with NaN gets the last token instead of an index out of range.
        return jnp.min(jnp.where(logits_BV == most_B1, token_V[None, :], token_V[None, -1:]), axis=-1)

    return jax.lax.platform_dependent(logits_BV, tpu=by_argmax, default=by_comparison)


# Fewer rows hardly make a step faster: most of its time goes into reading the weights.
LEAST_ROWS = 4


def _generate(
    model: families.Model,
    encoder_input_tokens: Int[Array, "B S"],
    *,
    length: int,
    choose: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    drop_ended: bool,
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:
    """Generates token by token; `choose(logits [B, V], position, rows [B])` returns tokens [B] and their logits [B]."""
    batch = encoder_input_tokens.shape[0]
    stepper = _stepper(model, encoder_input_tokens, length=length)
    loop = (
        jnp.int32(0),
        jnp.full((batch,), model.config.decoder_start, jnp.int32),
        # All-padding rows, which fill up a batch, are done from the start.
        ~jnp.any(encoder_input_tokens > 0, axis=1),
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch,), jnp.float32),
        stepper.empty_cache(),
    )
    sizes = [batch]
    while drop_ended and sizes[-1] // 2 >= LEAST_ROWS:
        sizes.append(sizes[-1] // 2)
    rows = jnp.arange(batch)  # indices in the batch of the rows that remain
    found: tuple[jax.Array, jax.Array] | None = None
    for size, fewer in zip(sizes, [*sizes[1:], 0], strict=True):
        if size < batch:
            left = jnp.argsort(loop[2], stable=True)[:size]  # unfinished rows come first
            rows, stepper = rows[left], stepper.take_rows(left)
            loop = (loop[0], *jax.tree.map(lambda each, left=left: each[left], loop[1:]))
        loop = _advance(stepper, loop, rows=rows, choose=choose, length=length, until=fewer, eos=model.config.eos_id)
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
    eos: int,
) -> tuple[Any, ...]:
    """Decodes until at most `until` of these rows are unfinished, or `length` tokens are generated.

    `loop`: position, previous tokens [B], ended rows [B], tokens [B, T], log probabilities [B], caches.
    """

    def unfinished(loop):
        position, _, done, *_ = loop
        going = ~jnp.all(done) if until == 0 else jnp.sum(~done) > until
        return (position < length) & going

    def advance(loop):
        position, previous, done, tokens, score, caches = loop
        states, caches = stepper.step(previous[:, None], caches, position=position)
        logits = stepper.logits(states[:, 0])
        token, its_logit = choose(logits, position, rows)
        chosen = jnp.where(done, PAD, token)
        score = score + jnp.where(done, 0.0, its_logit - jax.nn.logsumexp(logits, axis=-1))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], position, axis=1)
        return position + 1, chosen, done | (chosen == eos), tokens, score, caches

    return jax.lax.while_loop(unfinished, advance, loop)


def _stepper(model: families.Model, tokens_BS: Int[Array, "B S"], *, length: int, beams: int = 1) -> stepping.Stepper:
    """Encodes the source and returns its stepper; the rest of this module only takes steps."""
    segments_BS, encoded = stacks.source_segments(tokens_BS), _encode(model, tokens_BS)
    return stepping.Stepper(model, encoded, segments_BS, length=length, beams=beams)


# Tokens that a CPU encodes at once, so that activations stay in its cache.
_ENCODED_AT_ONCE = 2048


def _encode(model: families.Model, tokens_BS: Int[Array, "B S"]) -> Any:
    """Encodes the source: arrays of B rows. On a CPU, a large batch is encoded a few rows at a time."""

    def encode(tokens_RS: jax.Array) -> Any:
        return model.encode(tokens_RS, segment_ids=stacks.source_segments(tokens_RS))

    batch, length = tokens_BS.shape
    rows = partitioning.nearest_divisor(batch, max(_ENCODED_AT_ONCE // length, 1))
    if rows == batch or partitioning.platform() != "cpu" or partitioning.shard_count("batch") > 1:
        return encode(tokens_BS)
    encoded = jax.lax.map(encode, tokens_BS.reshape(-1, rows, length))
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), encoded)


# Log probability of an excluded choice.
_NEVER = -1e9


def beam_search(
    model: families.Model,
    encoder_input_tokens: Int[Array, "B S"],
    *,
    length: int,
    beams: int,
    length_penalty: float = 1.0,
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:
    """Searches with `beams` beams for the best sequence, until EOS or `length` tokens.

    Follows Hugging Face's `generate(num_beams=..)` with its default `early_stopping=False`. Each step takes the
    2 * beams best continuations. Those of the first `beams` that end are finished sequences; the `beams` best finished
    ones are kept, by log probability / tokens ** length_penalty (EOS counts). The best that do not end form the next
    beam. A row is done when its best beam, divided by its present length, is no better than its worst kept sequence.
    At the last position everything ends.

    Returns tokens (EOS included, 0 after it) and the natural log probability of each row's tokens, not divided.
    """
    batch = encoder_input_tokens.shape[0]
    stepper = _stepper(model, encoder_input_tokens, length=length, beams=beams)
    only_first = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER)[None, :], (batch, beams))
    # The key of beam n at position t has index t * beams + n.
    written_by = jnp.tile(jnp.arange(beams), length)[None, None, :]
    written_at = jnp.repeat(jnp.arange(length), beams)[None, None, :]
    own = written_by == jnp.arange(beams)[None, :, None]
    start = (
        jnp.int32(0),
        jnp.zeros((batch, beams, length), jnp.int32),  # tokens of the beam
        only_first,  # their log probabilities; all beams start equal, so only the first may be extended
        jnp.zeros((batch, beams, length), jnp.int32),  # tokens of finished sequences
        jnp.full((batch, beams), _NEVER),  # their divided log probabilities
        jnp.zeros((batch, beams)),  # their log probabilities
        jnp.any(encoder_input_tokens > 0, axis=1),  # rows that can still improve; all-padding rows cannot
        jnp.full((batch, beams), model.config.decoder_start, jnp.int32),  # previous tokens
        jnp.zeros((batch, beams, length * beams), bool),  # keys that each beam may see
        stepper.empty_cache(),
    )

    def unfinished(loop):
        position, improvable = loop[0], loop[6]
        return (position < length) & jnp.any(improvable)

    def advance(loop):
        position, tokens, log_p, ended, ended_score, ended_log_p, improvable, previous, visible, caches = loop
        visible |= (written_at == position) & own
        states, caches = stepper.step(previous, caches, position=position, visible_BNP=visible)
        each_log_p, each_token = continuations(
            *(states, stepper.table_DV, log_p), count=2 * beams, cap=model.config.logits_cap
        )
        per_beam = each_token.shape[-1]
        candidate_log_p, flat = largest(each_log_p.reshape(batch, -1), 2 * beams)
        parent, token = flat // per_beam, _pick(each_token.reshape(batch, -1), flat)
        here = jnp.arange(length)[None, None, :] == position
        candidates = jnp.where(here, token[:, :, None], _pick(tokens, parent))
        ends = (token == model.config.eos_id) | (position + 1 == length)
        # Only the first `beams` candidates may finish; the others make sure that enough remain to continue.
        keeps = ends & (jnp.arange(2 * beams) < beams)[None, :] & improvable[:, None]
        count = (position + 1).astype(jnp.float32)
        score = jnp.where(keeps, candidate_log_p / count**length_penalty, _NEVER)
        ended_score, best = largest(jnp.concatenate([ended_score, score], axis=1), beams)
        ended = _pick(jnp.concatenate([ended, candidates], axis=1), best)
        ended_log_p = _pick(jnp.concatenate([ended_log_p, candidate_log_p], axis=1), best)
        log_p, going = largest(jnp.where(ends, candidate_log_p + _NEVER, candidate_log_p), beams)
        visible = _pick(visible, _pick(parent, going))
        worst = jnp.min(ended_score, axis=1)  # _NEVER while fewer than `beams` have finished
        improvable = improvable & (log_p[:, 0] / count**length_penalty > worst)
        tokens, previous = _pick(candidates, going), _pick(token, going)
        return position + 1, tokens, log_p, ended, ended_score, ended_log_p, improvable, previous, visible, caches

    _, _, _, ended, _, ended_log_p, *_ = jax.lax.while_loop(unfinished, advance, start)
    return ended[:, 0], ended_log_p[:, 0]


def _pick(values: jax.Array, index: Int[Array, "B M"]) -> jax.Array:
    """Returns `values[b, index[b, m]]` of `[B, N]` or `[B, N, rest]`. Compares: N is small, gathers are slow."""
    chosen = index[:, :, None] == jnp.arange(values.shape[1])[None, None, :]
    if values.ndim == 3:
        chosen, values = chosen[..., None], values[:, None]
    else:
        values = values[:, None]
    if values.dtype == bool:
        return jnp.any(chosen & values, axis=2)
    return jnp.sum(jnp.where(chosen, values, jnp.zeros((), values.dtype)), axis=2)


def largest(values_BN: Float[Array, "B N"], count: int) -> tuple[Float[Array, "B M"], Int[Array, "B M"]]:
    """Computes `jax.lax.top_k` of a few values: the largest and their indices, in order; ties go to the first."""

    def by_rank(values_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Counts the values before each one, because a TPU sorts slowly."""
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


# Tokens per block of logits. On a TPU, only the blocks with the largest maxima are searched for the largest logits.
_BLOCK = 128


def continuations(
    states_BND: Float[Array, "B N D"],
    table_DV: Float[Array, "D V"],
    log_p_BN: Float[Array, "B N"],
    *,
    count: int,
    cap: float | None = None,
) -> tuple[Float[Array, "B N count"], Int[Array, "B N count"]]:
    """Returns each beam's `count` best continuations: total log probabilities (`log_p` included) and tokens.

    Largest first; ties go to the first token. A vocabulary smaller than `count` gives all its tokens. `cap` is the soft
    cap of the logits.
    """
    batch, beams, width = states_BND.shape
    count = min(count, table_DV.shape[1])

    def by_sorting(states_BND: jax.Array, table_DV: jax.Array, log_p_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BNV = jnp.matmul(states_BND, table_DV, preferred_element_type=jnp.float32)
        log_p_BNV = jax.nn.log_softmax(capped(logits_BNV, cap), axis=-1) + log_p_BN[:, :, None]
        found, token = jax.lax.top_k(log_p_BNV, count)
        return found, token

    def by_blocks(states_BND: jax.Array, table_DV: jax.Array, log_p_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Finds the largest without sorting, and reads the logits at most three times. M: beams of all rows, G: blocks.

        The `count` largest lie in the `count` blocks with the largest maxima. Subtracting the log sum keeps the order
        but can round two logits to equal values, of which the first must win. So log probabilities are compared.
        """
        states_MD, log_p_M = states_BND.reshape(-1, width), log_p_BN.reshape(-1)
        logits_VM = jnp.einsum("md,dv->vm", states_MD, table_DV, preferred_element_type=jnp.float32)
        logits_GCM = constrain(capped(logits_VM, cap), (None, "batch")).reshape(-1, _BLOCK, batch * beams)
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
    """Returns the `count` largest of each column, in order, and their names; ties go to the smallest name."""
    values, names = [], []
    for _ in range(count):
        values.append(jnp.max(values_XM, axis=0))
        # Not `argmax`: if only its index is used, XLA for TPU keeps its values in bfloat16.
        names.append(jnp.min(jnp.where(values_XM == values[-1][None], names_XM, jnp.iinfo(jnp.int32).max), axis=0))
        values_XM = jnp.where(names_XM == names[-1][None], -jnp.inf, values_XM)
    return values, names


def score(
    model: families.Model,
    encoder_input_tokens: Int[Array, "B S"],
    decoder_target_tokens: Int[Array, "B T"],
) -> Float[Array, "B"]:
    """Computes the natural log probability of each target: the sum over its non-padding tokens, with EOS if present."""
    before = shifted(decoder_target_tokens, start=model.config.decoder_start)
    log_p = jax.nn.log_softmax(model(encoder_input_tokens, before), axis=-1)
    chosen = jnp.take_along_axis(log_p, decoder_target_tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(stacks.is_token(decoder_target_tokens), chosen, 0.0), axis=-1)


def shifted(targets: Int[Array, "*rows T"], *, start: int) -> Int[Array, "*rows T"]:
    """Returns the decoder's inputs for given targets: each token's predecessor, first `start`."""
    edges = [(0, 0)] * (targets.ndim - 1) + [(1, 0)]
    return jnp.pad(targets, edges, constant_values=start)[..., :-1]


def score_choices(
    model: families.Model, encoder_input_tokens: Int[Array, "B S"], choices_BNT: Int[Array, "B N T"]
) -> Float[Array, "B N"]:
    """Computes the natural log probability of each of a row's N targets, like `score` (0 for an all-padding target).

    The source is encoded once, and all targets of a row share its keys and values.
    """
    batch, count, length = choices_BNT.shape
    stepper = _stepper(model, encoder_input_tokens, length=length, beams=count)
    # The key of target n at position t has index t * N + n; the stepper masks later positions.
    own_1NP = (jnp.arange(length * count)[None, :] % count == jnp.arange(count)[:, None])[None]
    before_BNT = shifted(choices_BNT, start=model.config.decoder_start)
    real_BNT = stacks.is_token(choices_BNT.reshape(-1, length)).reshape(choices_BNT.shape)

    def advance(carry, at):
        caches, log_p_BN = carry
        position, previous_BN, token_BN, real_BN = at
        states, caches = stepper.step(previous_BN, caches, position=position, visible_BNP=own_1NP)
        logits = stepper.logits(states)
        its_logit = jnp.take_along_axis(logits, token_BN[:, :, None], axis=-1)[:, :, 0]
        added = jnp.where(real_BN, its_logit - jax.nn.logsumexp(logits, axis=-1), 0.0)
        return (caches, log_p_BN + added), None

    steps = jnp.arange(length), *(jnp.moveaxis(each, 2, 0) for each in (before_BNT, choices_BNT, real_BNT))
    (_, log_p_BN), _ = jax.lax.scan(advance, (stepper.empty_cache(), jnp.zeros((batch, count))), steps)
    return log_p_BN
