"""Softmax attention with a position bias, forward and backward, in few passes over the scores.

Letters as in t5.py. Scores are by far the largest arrays of a training step, so neither they nor their softmax are
stored: the backward pass computes them again from queries and keys. Sums over keys come from a matrix product (a column
of ones beside the values). That costs next to nothing, while a reduction would read all scores once more
(docs/experiments.md).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sbs_jax.student import layers, partitioning

# Score of a masked pair. Finite, so that a query without any key gives no NaN.
MASKED = -1e10
# Names of values that the backward pass needs besides queries, keys and values (see `stacks.REMAT`).
SAVED = ("attended", "attention_normalizer")
# Bytes of float32 scores that one chip computes at a time. A v5e has 128 MiB of vector memory; scores that do not fit
# into it cost two to three times as much.
FAST_BYTES = 104 * 2**20


def attend(
    q_BTHK: Float[Array, "B T H K"],
    k_BPHK: Float[Array, "B P H K"],
    v_BPHK: Float[Array, "B P H K"],
    bias_HTS: Float[Array, "H T S"] | None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    *,
    causal: bool,
    prefix: int = 0,
    order: "Order | None" = None,
    cap: float | None = None,
) -> Float[Array, "B T H K"]:
    """Computes `softmax(q k + bias) v` over keys of the query's segment; with `causal`, not over later keys.

    `order` may hide further keys. A `cap` turns scores into `cap * tanh(scores / cap)` (Gemma 2); not with a bias.

    Every query also sees the first `prefix` of the P keys, without bias; bias and segments cover the S keys after them.

    Scores and the softmax's normalizer are float32; weights are rounded to the dtype of the values. There is no factor
    1/sqrt(K): T5 folds it into the query's initial scale, other families multiply their queries by it. A query without
    any key takes the mean of all values.
    """
    if prefix:
        bias_HTS = None if bias_HTS is None else jnp.pad(bias_HTS, ((0, 0), (0, 0), (prefix, 0)))
        segments = segments[0], jnp.pad(segments[1], ((0, 0), (prefix, 0)))
    return _attend(q_BTHK, k_BPHK, v_BPHK, bias_HTS, _Mask(*segments, order, causal=causal, prefix=prefix), cap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Order:
    """Order of tokens: a query sees keys of no later rank and, with a window, of no greater distance.

    Positions count within an example, so packing does not change a window. Keys of rank -1 are in no order: every query
    sees them, as those of a source in one softmax with a target's own.
    """

    # Typed Any because JAX transformations replace the arrays.
    query_ranks: Any  # int32 [B, T]
    key_ranks: Any  # int32 [B, S]
    query_positions: Any  # int32 [B, T]
    key_positions: Any  # int32 [B, S]
    window: Any = None  # int32 [2]: a query sees keys less than this far behind and less than this far ahead

    @classmethod
    def of_row(cls, ranks: Any, positions: Any, window: Any = None) -> "Order":
        """Orders the tokens of a row that attends to itself."""
        return cls(ranks, ranks, positions, positions, window)

    def from_query(self, first: int) -> "Order":
        """Leaves out the queries before `first`."""
        ranks, positions = self.query_ranks[:, first:], self.query_positions[:, first:]
        return dataclasses.replace(self, query_ranks=ranks, query_positions=positions)

    def with_unordered(self, count: int) -> "Order":
        """Adds so many keys in no order after the others."""
        edges = ((0, 0), (0, count))
        ranks = jnp.pad(self.key_ranks, edges, constant_values=-1)
        return dataclasses.replace(self, key_ranks=ranks, key_positions=jnp.pad(self.key_positions, edges))

    def hides(self, *, prefix: int) -> Array:
        """Returns True for each query and hidden key, [B, 1, T, S]; keys of a prefix come first and are not hidden."""

        def pairs(queries: Array, keys: Array) -> tuple[Array, Array]:
            return queries[:, None, :, None], jnp.pad(keys, ((0, 0), (prefix, 0)))[:, None, None, :]

        query, key = pairs(self.query_ranks, self.key_ranks)
        hidden, ordered = key > query, key >= 0
        if self.window is not None:
            query, key = pairs(self.query_positions, self.key_positions)
            behind, ahead = self.window
            hidden |= ((query - key >= behind) | (key - query >= ahead)) & ordered
        return hidden


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mask:
    """Mask of the keys that each query sees; all queries see the first `prefix` keys."""

    queries: Any  # segments, int32 [B, T]
    keys: Any  # segments, int32 [B, S]; those of the prefix count
    order: Order | None
    causal: bool = dataclasses.field(metadata={"static": True})
    prefix: int = dataclasses.field(metadata={"static": True})

    def visible(self) -> Array:
        """Returns True for each query and key that it sees, [B, 1, T, S]."""
        visible = self.queries[:, None, :, None] == self.keys[:, None, None, :]
        place = jnp.arange(self.keys.shape[1]) - self.prefix
        if self.causal:
            visible &= (jnp.arange(self.queries.shape[1])[:, None] >= place[None, :])[None, None]
        if self.order is not None:
            visible &= ~self.order.hides(prefix=self.prefix)
        if self.prefix:
            visible |= (place < 0)[None, None, None, :]
        return visible


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    bias_HTS: Array | None,
    mask: _Mask,
    cap: float | None,
) -> Array:
    return _forward(q_BTHK, k_BSHK, v_BSHK, bias_HTS, mask, cap)[0]


def _scores(
    q_BTHK: Array,
    k_BSHK: Array,
    bias_HTS: Array | None,
    mask: _Mask,
    cap: float | None,
) -> Array:
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    scores_BHTS = layers.capped(scores_BHTS, cap)
    if bias_HTS is not None:
        scores_BHTS += bias_HTS[None]
    return jnp.where(mask.visible(), scores_BHTS, MASKED)


def _forward(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    bias_HTS: Array | None,
    mask: _Mask,
    cap: float | None,
) -> tuple[Array, tuple[Any, ...]]:
    groups = _Groups.of(q_BTHK, k_BSHK)
    parts = zip(*(groups.split(x, axis=2) for x in (q_BTHK, k_BSHK, v_BSHK)), groups.split_bias(bias_HTS), strict=True)
    found = _in_turn(functools.partial(_forward_of_group, mask=mask, cap=cap), parts)
    y_BTHK, largest_BHT, total_BHT = (groups.join(each, axis=axis) for each, axis in zip(found, (2, 1, 1), strict=True))
    y_BTHK = checkpoint_name(y_BTHK, SAVED[0])
    # Two arrays instead of largest + log(total): beside MASKED the logarithm would be lost to rounding.
    largest_BHT, total_BHT = checkpoint_name(largest_BHT, SAVED[1]), checkpoint_name(total_BHT, SAVED[1])
    return y_BTHK, (q_BTHK, k_BSHK, v_BSHK, bias_HTS, mask, y_BTHK, largest_BHT, total_BHT)


def _in_turn(
    compute: Callable[..., tuple[Array, ...]], groups: Iterable[tuple[Any, ...]]
) -> Iterator[tuple[Array, ...]]:
    """Computes one group after the other and collects each result over all groups.

    A barrier makes each group wait for the one before, so that only one group's scores are in memory.
    """
    found: list[tuple[Array, ...]] = []
    for q, *rest in groups:
        if found:
            q, *last = jax.lax.optimization_barrier((q, *found.pop()))
            found.append(tuple(last))
        found.append(compute(q, *rest))
    return zip(*found, strict=True)


def _forward_of_group(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    bias_HTS: Array | None,
    *,
    mask: _Mask,
    cap: float | None,
) -> tuple[Array, Array, Array]:
    """Returns attended values, each query's largest score, and its sum of exp(score - largest)."""
    scores_BHTS = _scores(q_BTHK, k_BSHK, bias_HTS, mask, cap)
    largest_BHT = jnp.max(scores_BHTS, axis=-1)
    # Without this barrier the maximum needs a separate pass over the scores, after the product that computes them.
    scores_BHTS, largest_BHT = jax.lax.optimization_barrier((scores_BHTS, largest_BHT))
    weights_BHTS = jnp.exp(scores_BHTS - largest_BHT[..., None]).astype(v_BSHK.dtype)
    ones = jnp.ones((*v_BSHK.shape[:-1], 1), v_BSHK.dtype)
    summed = jnp.einsum(
        "bhts,bshk->bthk",
        weights_BHTS,
        jnp.concatenate([v_BSHK, ones], axis=-1),
        preferred_element_type=jnp.float32,
    )
    total_BTH1 = summed[..., -1:]
    y_BTHK = (summed[..., :-1] / total_BTH1).astype(v_BSHK.dtype)
    return y_BTHK, largest_BHT, jnp.moveaxis(total_BTH1[..., 0], 1, 2)


def _backward(cap: float | None, kept: tuple[Any, ...], dy_BTHK: Array) -> tuple[Any, ...]:
    q_BTHK, k_BSHK, v_BSHK, bias_HTS, mask, y_BTHK, largest_BHT, total_BHT = kept
    # Without this barrier the compiler fuses the producers of these arrays into the passes over the scores: slower.
    q_BTHK, k_BSHK, v_BSHK, dy_BTHK = jax.lax.optimization_barrier((q_BTHK, k_BSHK, v_BSHK, dy_BTHK))
    # The softmax's gradient subtracts sum_s weights * dweights, which equals dy . y: no pass over the scores.
    mean_BTH = jnp.sum(dy_BTHK.astype(jnp.float32) * y_BTHK.astype(jnp.float32), axis=-1)
    groups = _Groups.of(q_BTHK, k_BSHK)
    parts = zip(
        *(groups.split(x, axis=2) for x in (q_BTHK, k_BSHK, v_BSHK)),
        groups.split_bias(bias_HTS),
        *(groups.split(x, axis=1) for x in (largest_BHT, total_BHT)),
        groups.split(jnp.moveaxis(mean_BTH, 1, 2), axis=1),
        groups.split(dy_BTHK, axis=2),
        strict=True,
    )
    found = _in_turn(functools.partial(_backward_of_group, mask=mask, cap=cap), parts)
    dq_BTHK, dk_BSHK, dv_BSHK, *dbias = (
        groups.join(each, axis=axis) for each, axis in zip(found, (2, 2, 2, 0), strict=False)
    )
    return dq_BTHK, dk_BSHK, dv_BSHK, dbias[0] if dbias else None, None


def _backward_of_group(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    bias_HTS: Array | None,
    largest_BHT: Array,
    total_BHT: Array,
    mean_BHT: Array,
    dy_BTHK: Array,
    *,
    mask: _Mask,
    cap: float | None,
) -> tuple[Array, ...]:
    """Returns the gradients of queries, keys, values and, if there is one, of the bias."""
    scores_BHTS = _scores(q_BTHK, k_BSHK, bias_HTS, mask, cap)
    weights_BHTS = jnp.exp(scores_BHTS - largest_BHT[..., None]) / total_BHT[..., None]
    dv_BSHK = jnp.einsum("bhts,bthk->bshk", weights_BHTS.astype(v_BSHK.dtype), dy_BTHK)
    dweights_BHTS = jnp.einsum("bthk,bshk->bhts", dy_BTHK, v_BSHK, preferred_element_type=jnp.float32)
    dscores_BHTS = weights_BHTS * (dweights_BHTS - mean_BHT[..., None])
    if cap is not None:
        assert bias_HTS is None  # no family has both; scores hold no bias
        dscores_BHTS *= jnp.where(mask.visible(), 1 - jnp.square(scores_BHTS / cap), 0.0)
    dbias = () if bias_HTS is None else (jnp.sum(dscores_BHTS, axis=0),)
    dscores_BHTS = dscores_BHTS.astype(q_BTHK.dtype)
    dq_BTHK = jnp.einsum("bhts,bshk->bthk", dscores_BHTS, k_BSHK)
    dk_BSHK = jnp.einsum("bhts,bthk->bshk", dscores_BHTS, q_BTHK)
    return dq_BTHK, dk_BSHK, dv_BSHK, *dbias


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Groups of heads whose scores fit into a chip's fast memory; each group has heads of every shard."""

    count: int
    shards: int

    @classmethod
    def of(cls, q_BTHK: Array, k_BSHK: Array) -> "_Groups":
        shards = partitioning.shard_count("activation_heads")
        heads = q_BTHK.shape[2] // shards
        rows = q_BTHK.shape[0] / partitioning.shard_count("batch")
        needed = 4 * rows * heads * q_BTHK.shape[1] * k_BSHK.shape[1]
        return cls(
            min(g for g in range(1, heads + 1) if heads % g == 0 and (needed <= g * FAST_BYTES or g == heads)), shards
        )

    def split(self, x: Array, *, axis: int) -> list[Array]:
        """Cuts an array with heads at `axis` into one part per group."""
        if self.count == 1:
            return [x]
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        apart = x.reshape(*before, self.shards, self.count, -1, *after)
        return [
            jax.lax.index_in_dim(apart, group, axis + 1, keepdims=False).reshape(*before, -1, *after)
            for group in range(self.count)
        ]

    def split_bias(self, bias_HTS: Array | None) -> list[Array] | list[None]:
        """Cuts the bias into one part per group, None for each if there is no bias."""
        return [None] * self.count if bias_HTS is None else self.split(bias_HTS, axis=0)

    def join(self, parts: tuple[Array, ...], *, axis: int) -> Array:
        """Inverts `split`."""
        if self.count == 1:
            return parts[0]
        before, after = parts[0].shape[:axis], parts[0].shape[axis + 1 :]
        apart = [part.reshape(*before, self.shards, -1, *after) for part in parts]
        return jnp.concatenate(apart, axis=axis + 1).reshape(*before, -1, *after)


_attend.defvjp(_forward, _backward)
