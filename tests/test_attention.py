"""Attention against its textbook form, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbs_jax.student import attention


def textbook(q, k, v, bias, segments, *, causal, cap=None):
    scores = jnp.einsum("bthk,bshk->bhts", q, k)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias[None]
    visible = segments[0][:, None, :, None] == segments[1][:, None, None, :]
    if causal:
        visible &= jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None]
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(visible, scores, -1e10), axis=-1), v)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("biased", "cap"), [(False, None), (True, None), (False, 2.0)])
def test_values_and_gradients(causal, biased, cap, groups, monkeypatch):
    monkeypatch.setattr(attention, "FAST_BYTES", 4 * 2 * 3 * 10 * 10 / groups)
    random = np.random.default_rng(int(causal) * 2 + int(biased))

    def normal(*shape):
        return jnp.float32(random.normal(size=shape))

    length = 10
    assert attention._Groups.of(jnp.zeros((2, length, 3, 4)), jnp.zeros((2, length, 3, 4))).count == groups
    q, k, v = normal(2, length, 3, 4), 3 * normal(2, length, 3, 4), normal(2, length, 3, 4)
    bias = normal(3, length, length) if biased else None
    # Two segments and padding; the second row's last query has no key of its segment at all.
    segments = (
        jnp.array([[1] * 4 + [2] * 4 + [0] * 2, [1] * 9 + [7]]),
        jnp.array([[1] * 4 + [2] * 4 + [0] * 2, [1] * 10]),
    )
    weights = normal(2, length, 3, 4).at[1, -1].set(0.0)  # as a loss treats such a query

    def loss(attend):
        return lambda *arguments: jnp.sum(weights * attend(*arguments, segments, **how))

    how = {"causal": causal, "cap": cap}
    want = textbook(q, k, v, bias, segments, **how)
    np.testing.assert_allclose(attention.attend(q, k, v, bias, segments, **how), want, atol=2e-6)
    which = (0, 1, 2, 3) if biased else (0, 1, 2)
    ours = jax.grad(loss(attention.attend), which)(q, k, v, bias)
    theirs = jax.grad(loss(textbook), which)(q, k, v, bias)
    for got, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_order_hides_later_ranks_and_positions_outside_a_window():
    """Values and gradients equal autodiff's of a mask that is written out; a prefix is never hidden."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.float32(random.normal(size=(2, size, 2, 4))) for size in (9, 11, 11))  # two keys of a prefix
    segments = jnp.array([[1] * 5 + [2] * 4, [1] * 9])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3], range(9)])
    ranks = jnp.where(positions < 3, 0, positions)  # the first three see one another
    order = attention.Order.of_row(ranks, positions, jnp.int32([3, 3]))
    visible = np.zeros((2, 9, 11), bool)
    visible[:, :, :2] = True
    for b, i, j in np.ndindex(2, 9, 9):
        near = abs(int(positions[b, i] - positions[b, j])) < 3
        visible[b, i, 2 + j] = segments[b, i] == segments[b, j] and ranks[b, j] <= ranks[b, i] and near

    def ours(q, k, v):
        return attention.attend(q, k, v, None, (segments, segments), causal=False, prefix=2, order=order)

    def written_out(q, k, v):
        scores = jnp.where(visible[:, None], jnp.einsum("bthk,bshk->bhts", q, k), -1e10)
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v)

    np.testing.assert_allclose(ours(q, k, v), written_out(q, k, v), atol=2e-6)
    weights = jnp.float32(random.normal(size=q.shape))
    for got, want in zip(
        *(jax.grad(lambda *x, f=f: jnp.sum(weights * f(*x)), (0, 1, 2))(q, k, v) for f in (ours, written_out)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_large_scores_neither_overflow_nor_lose_a_query_without_keys():
    q = jnp.full((1, 2, 1, 2), 200.0)
    k = jnp.array([[[[200.0, 200.0]], [[-200.0, -200.0]]]])
    v = jnp.array([[[[1.0, 2.0]], [[3.0, 6.0]]]])
    y = attention.attend(q, k, v, None, (jnp.array([[1, 5]]), jnp.array([[1, 1]])), causal=False)
    np.testing.assert_allclose(y[0, :, 0], [[1.0, 2.0], [2.0, 4.0]])


def test_bfloat16_follows_float32():
    random = np.random.default_rng(0)
    q, k, v = (jnp.float32(random.normal(size=(1, 16, 2, 8))) for _ in range(3))
    segments = (jnp.ones((1, 16), jnp.int32), jnp.ones((1, 16), jnp.int32))
    half = jnp.bfloat16
    rounded = attention.attend(q.astype(half), k.astype(half), v.astype(half), None, segments, causal=True)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        rounded.astype(jnp.float32), attention.attend(q, k, v, None, segments, causal=True), atol=0.05
    )


def test_heads_that_are_sharded_stay_on_their_shards_in_groups():
    x = jnp.arange(8)
    groups = attention._Groups(count=2, shards=2)
    first, second = groups.split(x, axis=0)
    assert (first.tolist(), second.tolist()) == ([0, 1, 4, 5], [2, 3, 6, 7])
    assert groups.join((first, second), axis=0).tolist() == x.tolist()
