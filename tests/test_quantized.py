"""NF4 and int8 kernels: against the definition, against qwix, in products, gradients and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from scipy import stats

from sbs_jax.student import layers, quantized

FORMS = quantized.FORMS


def kernel_of(rows: int, columns: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def test_the_values_are_the_quantiles_of_the_definition():
    """QLoRA, appendix E, as in bitsandbytes: 8 quantiles above 0, 7 below, and 0, the largest scaled to 1."""
    offset = 0.9677083
    above = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(quantized.NF4_VALUES, values / values.max(), atol=2e-7)


def unpacked(codes: np.ndarray) -> np.ndarray:
    """Returns the code of each value of a kernel."""
    blocks = codes.reshape(-1, quantized.BLOCK // 2, codes.shape[1])
    return np.concatenate([blocks & 15, blocks >> 4], axis=1).reshape(-1, codes.shape[1])


def test_codes_are_qwix_s_and_those_of_the_nearest_value():
    kernel = kernel_of(256, 24)
    parts = quantized.quantize(jnp.asarray(kernel), form="nf4")
    theirs = qwix.quantize(jnp.asarray(kernel), "nf4", channelwise_axes=(1,), tiled_axes={0: quantized.BLOCK})
    codes = unpacked(np.asarray(parts["codes"]))
    np.testing.assert_array_equal(codes, np.asarray(theirs.qvalue).astype(np.uint8))
    # bitsandbytes' blocks are 64 neighbors in a row of a [out, in] matrix: 64 rows of a column of ours.
    blocks = kernel.T.reshape(-1, quantized.BLOCK)
    unit = blocks / np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(unit[..., None] - np.asarray(quantized.NF4_VALUES, np.float32)).argmin(axis=-1)
    np.testing.assert_array_equal(codes.T.reshape(-1, quantized.BLOCK), nearest)


def test_int8_is_qwix_s():
    kernel = kernel_of(96, 24)
    parts = quantized.quantize(jnp.asarray(kernel), form="int8")
    theirs = qwix.quantize(jnp.asarray(kernel), jnp.int8, channelwise_axes=(1,))
    # qwix's steps are half a step of 255 wider.
    ours, reference = (np.asarray(x) for x in (quantized.dequantize(parts, form="int8"), qwix.dequantize(theirs)))
    np.testing.assert_allclose(ours, reference, atol=np.abs(kernel).max() / 127 * 1.01)
    np.testing.assert_allclose(ours, kernel, atol=np.abs(kernel).max() / 254 * 1.001)


def test_a_value_is_off_by_no_more_than_the_gap_around_it():
    kernel = kernel_of(512, 40)
    found = np.asarray(quantized.dequantize(quantized.quantize(jnp.asarray(kernel), form="nf4"), form="nf4"))
    largest = np.abs(kernel.reshape(8, 64, 40)).max(axis=1, keepdims=True)
    column = np.abs(kernel).max(axis=0)
    gap = np.diff(quantized.NF4_VALUES).max() / 2
    bound = gap * largest + column / 255 / 2 + 1e-6  # half a gap of values, half a step of the scale
    assert np.all(np.abs(found - kernel).reshape(8, 64, 40) <= bound)
    assert 0.08 < quantized.error(kernel, form="nf4") < 0.1
    assert quantized.error(kernel, form="int8") < 0.01


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros_and_small_columns_and_blocks_are_not_lost(form):
    kernel = kernel_of(128, 3)
    kernel[:, 0] = 0
    kernel[:, 1] *= 1e-20
    kernel[:64, 2] *= 1e-4  # a block far below its column's largest
    parts = quantized.quantize(jnp.asarray(kernel), form=form)
    found = np.asarray(quantized.dequantize(parts, form=form))
    assert np.all(np.isfinite(found))
    assert np.all(found[:, 0] == 0)
    assert quantized.error(kernel[:, 1:2], form=form) < 0.12
    if form == "nf4":
        assert np.asarray(parts["scales"])[0, 2] == 1


@pytest.mark.parametrize(("form", "bits"), [("nf4", 4.2), ("int8", 8.1)])
def test_bits_per_value(form, bits):
    parts = jax.eval_shape(lambda x: quantized.quantize(x, form=form), jax.ShapeDtypeStruct((1024, 4096), jnp.float32))
    assert 8 * sum(x.size * x.dtype.itemsize for x in parts.values()) / (1024 * 4096) <= bits


def dense_of(kernel: np.ndarray, form: str) -> tuple[layers.Dense, jax.Array]:
    """Makes a layer with a quantized kernel, and the matrix that it stands for."""
    from flax import nnx

    dense = layers.Dense(kernel.shape, axes=("embed", "mlp"), std=1.0, dtype="float32", rngs=nnx.Rngs(0))
    parts = quantized.quantize(jnp.asarray(kernel), form=form)
    del dense.kernel
    dense.kernel = quantized.Kernel(kernel.shape, form=form, axes=("embed", "mlp"))
    for name, value in parts.items():
        getattr(dense.kernel, name)[...] = value
    return dense, quantized.dequantize(parts, form=form)


@pytest.mark.parametrize("form", FORMS)
def test_products_and_gradients_are_those_of_the_matrix(form):
    dense, matrix = dense_of(kernel_of(128, 48), form)
    x = jnp.asarray(kernel_of(12, 128, seed=1)).reshape(3, 4, 2, 64)
    np.testing.assert_array_equal(dense.matrix(), matrix)

    def ours(x):
        return jnp.sum(jnp.sin(dense(x, contract=2, split=(6, 8))))

    def theirs(x):
        return jnp.sum(jnp.sin(x.reshape(3, 4, 128) @ matrix))

    (value, gradient), (wanted, wanted_gradient) = (jax.value_and_grad(f)(x) for f in (ours, theirs))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_keeps_no_matrix():
    """16 layers in a row take 17 MB less than with each unpacked matrix kept for the backward pass."""
    size, layers = 512, 16
    shape = jax.ShapeDtypeStruct((layers, size, size), jnp.float32)
    stacked = jax.eval_shape(jax.vmap(lambda x: quantized.quantize(x, form="nf4")), shape)
    how = ("nf4", (size,), (size,), "float32")

    def needed(product) -> int:
        def loss(x, stacked):
            return jnp.sum(jax.lax.scan(lambda x, one: (jnp.tanh(product(x, one, how)), None), x, stacked)[0])

        x = jax.ShapeDtypeStruct((4, size), jnp.float32)
        sizes = jax.jit(jax.grad(loss)).lower(x, stacked).compile().memory_analysis()
        assert sizes is not None
        return sizes.temp_size_in_bytes

    matrices = layers * size * size * 4
    assert needed(quantized._product) < needed(quantized._multiplied) - 0.9 * matrices
