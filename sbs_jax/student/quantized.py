"""Quantized frozen matrices: NF4 with quantized scales (QLoRA, arXiv 2305.14314), and int8.

Letters as in t5.py, and

    I O rows and columns of a kernel   N blocks of BLOCK rows

qwix quantizes Flax models too, but replaces JAX's functions while a module's method runs, and unpacks NF4 by a gather
over the flattened matrix. Neither works with kernels that are sharded, scanned over layers and read by `stepping.py`
(docs/decisions.md). The tests compare with qwix.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sbs_jax.student import layers, partitioning

NF4, INT8 = "nf4", "int8"
FORMS = (NF4, INT8)
# Rows that share a scale, as in QLoRA. A block's first 32 rows are packed in the low bits of its codes.
BLOCK = 64
# The 16 values of NF4: quantiles of the normal distribution from -1 to 1, with 7 below 0 and 8 above.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_LEVELS = 255  # steps of a quantized scale

Parts = dict[str, jax.Array]


def quantize(kernel_IO: Float[Array, "I O"], *, form: str) -> Parts:
    """Quantizes a kernel into its parts.

    nf4: `codes` uint8 [I / 2, O], two rows in each byte; `scale` float32 [O], a column's largest absolute value;
    `scales` uint8 [N, O], a block's largest absolute value as a fraction of `scale`, in 255 steps. 4.1 to 4.2 bits per
    value.
    int8: `codes` int8 [I, O], and `scale` float32 [O], the value of one step.
    """
    kernel_IO = kernel_IO.astype(jnp.float32)
    largest_O = jnp.max(jnp.abs(kernel_IO), axis=0)
    if form == INT8:
        step_O = largest_O / 127
        codes_IO = jnp.round(kernel_IO / jnp.where(step_O > 0, step_O, 1.0)[None, :]).astype(jnp.int8)
        return {"codes": codes_IO, "scale": step_O}
    rows, columns = kernel_IO.shape
    blocks = kernel_IO.reshape(rows // BLOCK, BLOCK, columns)
    largest_NO = jnp.max(jnp.abs(blocks), axis=1)
    unit = blocks / jnp.where(largest_NO > 0, largest_NO, 1.0)[:, None, :]
    middle = [(low + high) / 2 for low, high in itertools.pairwise(NF4_VALUES)]
    codes = jnp.zeros(unit.shape, jnp.uint8)
    for value in middle:  # ties go to the lower value
        codes += (unit > np.float32(value)).astype(jnp.uint8)
    packed = codes[:, : BLOCK // 2] | (codes[:, BLOCK // 2 :] << 4)
    share_NO = largest_NO / jnp.where(largest_O > 0, largest_O, 1.0)[None, :]
    # At least one step, so that a block of small values does not become 0.
    scales_NO = jnp.clip(jnp.round(share_NO * _LEVELS), 1, _LEVELS).astype(jnp.uint8)
    return {"codes": packed.reshape(rows // 2, columns), "scales": scales_NO, "scale": largest_O}


def dequantize(parts: Parts, *, form: str, dtype: Any = jnp.float32) -> Float[Array, "I O"]:
    """Reconstructs the matrix from its parts in float32, rounded to `dtype`."""
    if form == INT8:
        return (parts["codes"].astype(jnp.float32) * parts["scale"][None, :]).astype(dtype)
    half, columns = parts["codes"].shape
    # One broadcast unpacks both halves of a block. Concatenating two arrays takes three passes over memory on a TPU.
    packed = parts["codes"].reshape(-1, 1, BLOCK // 2, columns).astype(jnp.int32)
    codes = (packed >> (4 * jax.lax.broadcasted_iota(jnp.int32, (1, 2, 1, 1), 1))) & 15
    scales_NO = parts["scales"].astype(jnp.float32) * (parts["scale"] / _LEVELS)[None, :]
    return (_nf4_values(codes) * scales_NO[:, None, None, :]).astype(dtype).reshape(2 * half, columns)


def _nf4_values(codes: Int[Array, "..."]) -> Float[Array, "..."]:
    """Looks up codes 0 to 15 bit by bit, with selections, which fuse; a gather would not."""
    values: list[Any] = [jnp.float32(value) for value in NF4_VALUES]
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


class Kernel(nnx.Module):
    """Quantized kernel `[I, O]` of a `layers.Dense`. Parts are zeros until values are loaded by name."""

    def __init__(self, shape: tuple[int, int], *, form: str, axes: tuple[str, str]) -> None:
        self.form, self.shape = form, shape
        of = {"codes": axes, "scales": ("blocks", axes[1]), "scale": (axes[1],)}
        parts = jax.eval_shape(functools.partial(quantize, form=form), jax.ShapeDtypeStruct(shape, jnp.float32))
        self.names = tuple(sorted(parts))
        for name, leaf in parts.items():
            setattr(self, name, nnx.Param(jnp.zeros(leaf.shape, leaf.dtype), axes=of[name]))

    def parts(self) -> Parts:
        return {name: getattr(self, name)[...] for name in self.names}

    def matrix(self) -> Float[Array, "I O"]:
        return dequantize(self.parts(), form=self.form)

    def factors(self) -> tuple[Int[Array, "I O"], Float[Array, "O"]]:
        """Returns int8 codes, up to 127, which bfloat16 holds exactly, and each column's scale."""
        parts = self.parts()
        return parts["codes"], parts["scale"]

    def __call__(
        self,
        x: Float[Array, "..."],
        *,
        axes: tuple[str, str],
        split: tuple[int, ...],
        contract: int,
        dtype: str,
        product_dtype: str | None = None,
    ) -> Float[Array, "..."]:
        """Multiplies like `layers.Dense`; devices exchange quantized parts, not full matrices.

        With `product_dtype` (int8 only, no gradients), codes are multiplied in that dtype and the result is scaled.
        """
        parts = self.parts()
        parts["codes"] = partitioning.gather_frozen(parts["codes"], axes)
        outer = split or parts["codes"].shape[1:]
        if product_dtype is not None:
            codes = parts["codes"].astype(product_dtype).reshape(*x.shape[x.ndim - contract :], *outer)
            y = layers.matmul(x.astype(product_dtype), codes, contract=contract, dtype=dtype)
            return y * parts["scale"].astype(dtype).reshape((1,) * (y.ndim - len(outer)) + tuple(outer))
        return _product(x, parts, (self.form, x.shape[x.ndim - contract :], tuple(outer), dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, parts: Parts, how: tuple[Any, ...]) -> Array:
    """Multiplies `x` by the matrix. The backward pass unpacks it again: stored, it would be the full-size model."""
    return _multiplied(x, parts, how)


def _multiplied(x: Array, parts: Parts, how: tuple[Any, ...]) -> Array:
    form, inner, outer, dtype = how
    # The barrier keeps the unpacking in rows and columns; in the layout of heads it is ten times slower on a TPU.
    kernel = jax.lax.optimization_barrier(dequantize(parts, form=form, dtype=dtype))
    return layers.matmul(x, kernel.reshape(*inner, *outer), contract=len(inner))


def _forward(x: Array, parts: Parts, how: tuple[Any, ...]) -> tuple[Array, Parts]:
    return _multiplied(x, parts, how), parts


def _backward(how: tuple[Any, ...], parts: Parts, dy: Array) -> tuple[Array, None]:
    _, inner, outer, dtype = how
    rows = dy.shape[: dy.ndim - len(outer)]
    # Without this barrier the compiler would keep the forward pass's matrix, or unpack it long before it is needed.
    parts, dy = jax.lax.optimization_barrier((parts, dy))
    like = jax.ShapeDtypeStruct((*rows, *inner), dtype)
    (dx,) = jax.linear_transpose(lambda x: _multiplied(x, parts, how), like)(dy)
    return dx, None


_product.defvjp(_forward, _backward)


def error(kernel: np.ndarray, *, form: str) -> float:
    """Measures the error of quantizing a matrix: RMS of the difference / RMS of the values."""
    difference = kernel - np.asarray(dequantize(quantize(jnp.asarray(kernel), form=form), form=form))
    return math.sqrt(np.mean(np.square(difference)) / max(np.mean(np.square(kernel)), 1e-30))
