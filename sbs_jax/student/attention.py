"""Softmax attention with T5's relative position bias: forward and backward in few passes over the scores.

Letters as in t5.py; `H T S` are scores of one row. The scores are by far the largest arrays of a training step, so
neither they nor their softmax outlive a pass: the backward pass computes them again from queries and keys. Sums over
keys come out of a matrix product (a column of ones beside the values), which costs next to nothing, where a reduction
reads all scores once more (docs/experiments.md).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sbs_jax.student import partitioning

# Score of a pair that must not attend: finite, so a query that may attend to nothing gives no NaN.
MASKED = -1e10
# Names of what the backward pass needs besides queries, keys and values (see `t5.REMAT`).
SAVED = ("attended", "attention_normalizer")
# Bytes of one chip's float32 scores that are computed at a time: a v5e has 128 MiB of vector memory, and scores that do
# not fit into it cost two to three times as much.
FAST = 104 * 2**20


def attend(
    q_BTHK: Float[Array, "B T H K"],
    k_BPHK: Float[Array, "B P H K"],
    v_BPHK: Float[Array, "B P H K"],
    bias_HTS: Float[Array, "H T S"] | None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    *,
    causal: bool,
    prefix: int = 0,
) -> Float[Array, "B T H K"]:
    """`softmax(q k + bias) v` over the keys of a query's own segment; with `causal`, none later than the query.

    The first `prefix` of the P keys are seen by every query, without bias; bias and segments have the S after them.

    Scores and their softmax's normaliser are float32; weights are rounded to the values' type. There is no factor
    1/sqrt(K): T5 folds it into the query's initial scale. A query without any key takes the mean of all values.
    """
    if prefix:
        bias_HTS = None if bias_HTS is None else jnp.pad(bias_HTS, ((0, 0), (0, 0), (prefix, 0)))
        segments = segments[0], jnp.pad(segments[1], ((0, 0), (prefix, 0)))
    return _attend(q_BTHK, k_BPHK, v_BPHK, bias_HTS, segments, _Mask(causal, prefix))


@dataclasses.dataclass(frozen=True)
class _Mask:
    """What a query sees of its segment, and how many keys before it that all queries see."""

    causal: bool
    prefix: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, bias_HTS: Array | None, segments: tuple[Array, Array], mask: _Mask
) -> Array:
    return _forward(q_BTHK, k_BSHK, v_BSHK, bias_HTS, segments, mask)[0]


def _scores(q_BTHK: Array, k_BSHK: Array, bias_HTS: Array | None, segments: tuple[Array, Array], mask: _Mask) -> Array:
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    if bias_HTS is not None:
        scores_BHTS += bias_HTS[None]
    queries, keys = segments
    visible = queries[:, None, :, None] == keys[:, None, None, :]
    place = jnp.arange(keys.shape[1]) - mask.prefix
    if mask.causal:
        visible &= (jnp.arange(queries.shape[1])[:, None] >= place[None, :])[None, None]
    if mask.prefix:
        visible |= (place < 0)[None, None, None, :]
    return jnp.where(visible, scores_BHTS, MASKED)


def _forward(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, bias_HTS: Array | None, segments: tuple[Array, Array], mask: _Mask
) -> tuple[Array, tuple[Any, ...]]:
    cut = _Groups.of(q_BTHK, k_BSHK)
    groups = zip(*(cut.heads(x, axis=2) for x in (q_BTHK, k_BSHK, v_BSHK)), cut.bias(bias_HTS), strict=True)
    found = _in_turn(functools.partial(_forward_of_group, segments=segments, mask=mask), groups)
    y_BTHK, largest_BHT, total_BHT = (
        cut.joined(parts, axis=axis) for parts, axis in zip(found, (2, 1, 1), strict=True)
    )
    y_BTHK = checkpoint_name(y_BTHK, SAVED[0])
    # Kept apart from the logarithm of the total, which would be lost beside MASKED.
    largest_BHT, total_BHT = checkpoint_name(largest_BHT, SAVED[1]), checkpoint_name(total_BHT, SAVED[1])
    return y_BTHK, (q_BTHK, k_BSHK, v_BSHK, bias_HTS, segments, y_BTHK, largest_BHT, total_BHT)


def _in_turn(
    compute: Callable[..., tuple[Array, ...]], groups: Iterable[tuple[Any, ...]]
) -> Iterator[tuple[Array, ...]]:
    """Results of `compute` for each group's arrays, result by result; each group waits for the one before."""
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
    segments: tuple[Array, Array],
    mask: _Mask,
) -> tuple[Array, Array, Array]:
    """Attended values; the largest score of each query; the sum of its weights relative to that."""
    scores_BHTS = _scores(q_BTHK, k_BSHK, bias_HTS, segments, mask)
    largest_BHT = jnp.max(scores_BHTS, axis=-1)
    # Without this the maximum's pass over the scores is not shared with the product that makes them.
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


def _backward(mask: _Mask, kept: tuple[Any, ...], dy_BTHK: Array) -> tuple[Any, ...]:
    q_BTHK, k_BSHK, v_BSHK, bias_HTS, segments, y_BTHK, largest_BHT, total_BHT = kept
    # Keeps what made these out of the passes over the scores, which would slow them down.
    q_BTHK, k_BSHK, v_BSHK, dy_BTHK = jax.lax.optimization_barrier((q_BTHK, k_BSHK, v_BSHK, dy_BTHK))
    # The mean of the weights' gradients under the weights is dy . y: no pass over the scores.
    mean_BTH = jnp.sum(dy_BTHK.astype(jnp.float32) * y_BTHK.astype(jnp.float32), axis=-1)
    cut = _Groups.of(q_BTHK, k_BSHK)
    groups = zip(
        *(cut.heads(x, axis=2) for x in (q_BTHK, k_BSHK, v_BSHK)),
        cut.bias(bias_HTS),
        *(cut.heads(x, axis=1) for x in (largest_BHT, total_BHT)),
        cut.heads(jnp.moveaxis(mean_BTH, 1, 2), axis=1),
        cut.heads(dy_BTHK, axis=2),
        strict=True,
    )
    found = _in_turn(functools.partial(_backward_of_group, segments=segments, mask=mask), groups)
    dq_BTHK, dk_BSHK, dv_BSHK, *dbias = (
        cut.joined(parts, axis=axis) for parts, axis in zip(found, (2, 2, 2, 0), strict=False)
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
    segments: tuple[Array, Array],
    mask: _Mask,
) -> tuple[Array, ...]:
    """Gradients of queries, keys, values and, if there is one, bias."""
    scores_BHTS = _scores(q_BTHK, k_BSHK, bias_HTS, segments, mask)
    weights_BHTS = jnp.exp(scores_BHTS - largest_BHT[..., None]) / total_BHT[..., None]
    dv_BSHK = jnp.einsum("bhts,bthk->bshk", weights_BHTS.astype(v_BSHK.dtype), dy_BTHK)
    dweights_BHTS = jnp.einsum("bthk,bshk->bhts", dy_BTHK, v_BSHK, preferred_element_type=jnp.float32)
    dscores_BHTS = weights_BHTS * (dweights_BHTS - mean_BHT[..., None])
    dbias = () if bias_HTS is None else (jnp.sum(dscores_BHTS, axis=0),)
    dscores_BHTS = dscores_BHTS.astype(q_BTHK.dtype)
    dq_BTHK = jnp.einsum("bhts,bshk->bthk", dscores_BHTS, k_BSHK)
    dk_BSHK = jnp.einsum("bhts,bthk->bshk", dscores_BHTS, q_BTHK)
    return dq_BTHK, dk_BSHK, dv_BSHK, *dbias


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Heads in groups whose scores fit into a chip's fast memory. A group takes heads of every shard alike."""

    count: int
    shards: int

    @classmethod
    def of(cls, q_BTHK: Array, k_BSHK: Array) -> "_Groups":
        shards = partitioning.pieces("activation_heads")
        heads = q_BTHK.shape[2] // shards
        rows = q_BTHK.shape[0] / partitioning.pieces("batch")
        needed = 4 * rows * heads * q_BTHK.shape[1] * k_BSHK.shape[1]
        return cls(min(g for g in range(1, heads + 1) if heads % g == 0 and (needed <= g * FAST or g == heads)), shards)

    def heads(self, x: Array, *, axis: int) -> list[Array]:
        """Each group's part of an array, whose heads are this axis."""
        if self.count == 1:
            return [x]
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        apart = x.reshape(*before, self.shards, self.count, -1, *after)
        return [
            jax.lax.index_in_dim(apart, group, axis + 1, keepdims=False).reshape(*before, -1, *after)
            for group in range(self.count)
        ]

    def bias(self, bias_HTS: Array | None) -> list[Array] | list[None]:
        """Each group's part of the bias, if there is one."""
        return [None] * self.count if bias_HTS is None else self.heads(bias_HTS, axis=0)

    def joined(self, parts: tuple[Array, ...], *, axis: int) -> Array:
        """Inverse of `heads`."""
        if self.count == 1:
            return parts[0]
        before, after = parts[0].shape[:axis], parts[0].shape[axis + 1 :]
        apart = [part.reshape(*before, self.shards, -1, *after) for part in parts]
        return jnp.concatenate(apart, axis=axis + 1).reshape(*before, -1, *after)


_attend.defvjp(_forward, _backward)
