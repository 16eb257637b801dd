"""Stacked layers: the same numbers as layers apart, in memory and on disk."""

import functools

import jax
import numpy as np
import optax
import pytest
import toy
from builders import decoders

from sbs_jax.student import families, stacking, stacks


@functools.cache
def parameters() -> families.Parameters:
    return families.init(toy.MODEL, seed=0)[1]


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        # Sums over a layer may be added in another order, which shows in the smallest of its updates.
        least = 1e-6 * float(np.abs(y).max(initial=0.0))
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=least, err_msg=jax.tree_util.keystr(path))


def test_stacks_are_in_the_order_of_layers_not_of_names():
    names = [f"encoder/layers/{i}/mlp/wo/kernel" for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)]
    (group,) = stacking.stacks(names).values()
    assert group == [f"encoder/layers/{i}/mlp/wo/kernel" for i in range(11)]


def test_unstack_inverts_stack():
    stacked = stacking.stack(parameters())
    shapes = families.abstract(toy.MODEL, execution=stacks.Execution(layers="scanned", remat="none"))[1]
    assert {name: x.shape for name, x in stacked.items()} == {name: x.shape for name, x in shapes.items()}
    apart = stacking.unstack(stacked)
    assert set(apart) == set(parameters())
    for name, x in parameters().items():
        np.testing.assert_array_equal(apart[name], x)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-2),
        # Its clipping, scaling and factors are per array: of a stack taken as one array they would be others.
        optax.adafactor(1e-2, min_dim_size_to_factor=8),
        pytest.param(
            optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1, momentum=0.9)), marks=pytest.mark.faults
        ),
    ],
    ids=["adamw", "adafactor", "adaptive clipping"],
)
def test_layerwise_is_the_optimiser_of_layers_apart(optimizer):
    layerwise = stacking.layerwise(optimizer)
    apart: families.Parameters = parameters()
    together: families.Parameters = stacking.stack(parameters())
    state, stacked_state = optimizer.init(apart), layerwise.init(together)
    update, stacked_update = jax.jit(optimizer.update), jax.jit(layerwise.update)
    same(stacking.unstack(stacked_state), state)
    for step in range(3):
        random = np.random.default_rng(step)
        # Layers of very different sizes, so that a norm over all would show.
        gradients = {name: random.normal(size=x.shape, scale=10.0 ** (len(name) % 3)) for name, x in apart.items()}
        gradients = {name: jax.numpy.float32(x) for name, x in gradients.items()}
        updates, state = update(gradients, state, apart)
        stacked_updates, stacked_state = stacked_update(stacking.stack(gradients), stacked_state, together)
        same(stacking.unstack(stacked_updates), updates)
        apart = jax.tree.map(jax.numpy.add, apart, updates)
        together = jax.tree.map(jax.numpy.add, together, stacked_updates)
    same(stacking.unstack(stacked_state), state)
    same(stacking.stack(state), stacked_state)


def test_an_optimiser_that_mixes_layers_is_refused():
    layerwise = stacking.layerwise(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    together = stacking.stack(parameters())
    with pytest.raises(ValueError, match=r"mixes parameters of different layers.*clip_norm"):
        layerwise.update(together, layerwise.init(together), together)


def test_unknown_ways_to_compute_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'scanned'"):
        stacks.Execution(layers="scaned", remat="none")
    with pytest.raises(ValueError, match="expected one of none, minimal, attended, full"):
        stacks.Execution(layers="scanned", remat="all")


def test_the_last_of_a_decoder_s_unrolled_layers_computes_the_target_alone():
    """Of the source nothing reads but its keys and values. The arrays are the MLP's inner ones, [B, L, F]."""
    config = decoders.config("llama", num_layers=1)
    source, target = np.full((2, 9), 7, np.int32), np.full((2, 6), 7, np.int32)
    program = str(jax.make_jaxpr(lambda *each: decoders.model(config)(*each))(source, target))
    assert f"f32[2,6,{config.mlp_dim}]" in program
    assert f"f32[2,15,{config.mlp_dim}]" not in program
