"""Building blocks of a transformer: dropout, norm, dense, MLP, residual sum.

Letters of array names as in t5.py. Values named by `checkpoint_name` are those that `stacks.REMAT` may store.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from sbs_jax.student.partitioning import constrain, gather

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}
DTYPES = ("float32", "bfloat16")


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Computes `cap * tanh(x / cap)`, which lies within +-cap (Gemma 2's soft caps); without a cap, returns `x`."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@functools.partial(jax.jit, static_argnames=("shape", "std"))
def truncated_normal(key: Key[Array, ""], shape: tuple[int, ...], *, std: float) -> Float[Array, "..."]:
    """Draws float32 normal values truncated at two standard deviations, like `truncated_normal` of T5X and Flax.

    Jitted: a large model has many layers but few distinct shapes, and each shape is traced once.
    """
    # A normal truncated at 2 sigma has standard deviation 0.8796; dividing by it gives `std`.
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) * (std / 0.87962566103423978)


class Dropout:
    """Dropout with a fresh key at each use while a step is traced; without a key it does nothing.

    One mask serves all positions of a sequence (the second-to-last axis), as when T5X and Mesh TensorFlow trained T5.
    This also makes masks cheap to draw.
    """

    def __init__(self, rate: float, key: Key[Array, ""] | None) -> None:
        self._rate = rate
        self._key = key
        self._uses = self._rate_uses = 0

    def __call__(self, x: jax.Array, *, shared: int = -2) -> jax.Array:
        """Zeroes some values and scales up the others, with one mask for all positions of axis `shared`."""
        if self._key is None or self._rate == 0.0:
            return x
        self._uses += 1
        shape = list(x.shape)
        shape[shared] = 1
        return _dropped(x, jax.random.fold_in(self._key, self._uses), rate=self._rate, shape=tuple(shape))

    def at_rate(self, rate: float, x: jax.Array) -> jax.Array:
        """Drops values of `x` [.., T, I] at its own rate, without changing the masks that other uses draw.

        Masks are shared along the sequence here too. A separate mask for every input value is recomputed wherever it
        is used, and the TPU compiler spent minutes on such operations (docs/experiments.md).
        """
        if self._key is None or rate == 0.0:
            return x
        self._rate_uses += 1
        key = jax.random.fold_in(jax.random.fold_in(self._key, _RATE_KEY), self._rate_uses)
        return _dropped(x, key, rate=rate, shape=(*x.shape[:-2], 1, x.shape[-1]))


# Numbers folded into a key. Ordinary uses of dropout in a stack or layer take 1, 2, ..; these stay far away from them.
_RATE_KEY, NOISE_KEY = 2**30, 2**30 + 1


def _dropped(x: jax.Array, key: Key[Array, ""], *, rate: float, shape: tuple[int, ...]) -> jax.Array:
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


class TokenEmbedder(nnx.Module):
    """Table of token embeddings `[V, D]`; where it is tied, also the matrix of the logits."""

    product_dtype: str | None = None  # like `Dense.product_dtype`, for the logits

    def __init__(self, vocab_size: int, width: int, *, std: float, dtype: str, rngs: nnx.Rngs) -> None:
        value = jax.random.normal(rngs.params(), (vocab_size, width), jnp.float32) * std
        self.embedding = nnx.Param(value, axes=("vocab", "embed"))
        self.dtype = dtype

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = jnp.take(self.table(self.dtype), tokens_BT, axis=0)
        return constrain(x_BTD, ("batch", "length", "activation_embed"))

    def table(self, dtype: Any) -> Float[Array, "V D"]:
        """Returns the table for use, in this dtype."""
        return gather(self.embedding[...].astype(dtype), ("vocab", "embed"))


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, with a learned scale and no bias; computed in float32.

    The scale's parameter is the factor itself (initially 1), or, with `plus_one`, what is added to 1 (initially 0).
    """

    def __init__(
        self, width: int, *, epsilon: float, dtype: str, plus_one: bool = False, axis: str | None = "embed"
    ) -> None:
        self.scale = nnx.Param(jnp.full((width,), 0.0 if plus_one else 1.0, jnp.float32), axes=(axis,))
        self.epsilon = epsilon
        self.dtype = dtype
        self.plus_one = plus_one

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.by(self.scale[...], x)

    def by(self, scale_D: Float[Array, "D"], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Norms `x` with a scale that the caller has placed."""
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(mean_square + self.epsilon)
        if self.plus_one:
            scale_D = 1.0 + scale_D
        return (y * scale_D.reshape((1,) * (x.ndim - 1) + scale_D.shape)).astype(self.dtype)


class Dense(nnx.Module):
    """Dense layer: a matrix `[in, out]` without bias; `axes` are its logical axes (partitioning.py)."""

    kernel: Any  # an nnx.Param, or a quantized.Kernel
    # Adapter slots, filled by adapters.py: a LoRA branch, factors on inputs and on outputs, a bias.
    lora: Any = None
    in_scale: nnx.Param | None = None
    out_scale: nnx.Param | None = None
    bias: nnx.Param | None = None
    # Set by prediction/precision.py: the dtype of both operands if it differs from `dtype`. Sums stay in `dtype`.
    product_dtype: str | None = None

    def __init__(
        self, shape: tuple[int, int], *, axes: tuple[str, str], std: float, dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(truncated_normal(rngs.params(), shape, std=std), axes=axes)
        self.axes = axes
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "..."],
        *,
        split: tuple[int, ...] = (),
        contract: int = 1,
        dropout: Dropout | None = None,
    ) -> Float[Array, "..."]:
        """Multiplies over the last `contract` axes of `x`; `split` reshapes the output axis into several."""
        inner = x.shape[x.ndim - contract :]
        x = x.astype(self.dtype)
        if self.in_scale is not None:
            x = x * self.in_scale[...].astype(self.dtype).reshape((1,) * (x.ndim - contract) + inner)
        if isinstance(self.kernel, nnx.Param):
            kernel = gather(self.kernel[...].astype(self.product_dtype or self.dtype), self.axes)
            kernel = kernel.reshape(*inner, *(split or kernel.shape[1:]))
            sums = self.dtype if self.product_dtype else None
            y = matmul(x.astype(kernel.dtype), kernel, contract=contract, dtype=sums)
        else:
            how = {"split": split, "contract": contract, "dtype": self.dtype, "product_dtype": self.product_dtype}
            y = self.kernel(x, axes=self.axes, **how)
        if self.lora is not None:
            added = self.lora(x.reshape(*x.shape[: x.ndim - contract], -1), dtype=self.dtype, dropout=dropout)
            y = y + added.reshape(y.shape)
        outer = y.shape[x.ndim - contract :]
        for vector, change in ((self.out_scale, jnp.multiply), (self.bias, jnp.add)):
            if vector is not None:
                values = vector[...].astype(self.dtype)
                y = change(y, values.reshape((1,) * (y.ndim - len(outer)) + outer))
        return y

    def matrix(self) -> Float[Array, "I O"]:
        """Returns the kernel without adapters: in bfloat16 if it is stored in bfloat16, otherwise in float32."""
        return self.kernel[...] if isinstance(self.kernel, nnx.Param) else self.kernel.matrix()

    def merged(self) -> Float[Array, "I O"]:
        """Merges kernel, LoRA and factors: `x @ merged()` equals a call without dropout and bias."""
        kernel = self.matrix()
        if self.in_scale is not None:
            kernel = kernel * self.in_scale[...][:, None]
        if self.lora is not None:
            kernel = kernel.astype(jnp.float32) + self.lora.matrix(self.in_scale)
        return kernel if self.out_scale is None else kernel * self.out_scale[...][None, :]


def matmul(
    x: Float[Array, "..."], kernel: Float[Array, "..."], *, contract: int = 1, dtype: Any = None
) -> Float[Array, "..."]:
    """Multiplies over the last `contract` axes of `x` and the first of `kernel`, into `dtype` (default: theirs).

    With several leading axes, XLA for CPU computes the kernel's gradient from a transposed copy, and recomputes the
    copied value column by column: a third of a training step (docs/speed.md). So on a CPU all rows become one axis.
    On a TPU it is the reshape that copies, between the layouts of rows and of heads.
    """
    rows, columns = x.shape[: x.ndim - contract], kernel.shape[contract:]

    def as_they_are(x: Array, kernel: Array) -> Array:
        axes = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
        return jax.lax.dot_general(x, kernel, (axes, ((), ())), preferred_element_type=dtype)

    def in_one(x: Array, kernel: Array) -> Array:
        y = jnp.matmul(
            x.reshape(math.prod(rows), -1), kernel.reshape(-1, math.prod(columns)), preferred_element_type=dtype
        )
        return y.reshape(*rows, *columns)

    return jax.lax.platform_dependent(x, kernel, cpu=in_one, default=as_they_are)


class Attention(nnx.Module):
    """Base of the families' attentions: what adapters and cached decoding need of each."""

    query: Dense
    key: Dense
    value: Dense
    out: Dense
    prefix: Any = None  # adapter slot: keys and values placed before all others


class MLP(nnx.Module):
    """MLP `wo(act_0(wi_0 x) * act_1(wi_1 x) * ..)`; a single branch is named `wi`."""

    def __init__(self, width: int, hidden: int, *, activations: tuple[str, ...], dtype: str, rngs: nnx.Rngs) -> None:
        self.names = ("wi",) if len(activations) == 1 else tuple(f"wi_{i}" for i in range(len(activations)))
        for name in self.names:
            wi = Dense((width, hidden), axes=("embed", "mlp"), std=width**-0.5, dtype=dtype, rngs=rngs)
            setattr(self, name, wi)
        self.wo = Dense((hidden, width), axes=("mlp", "embed"), std=hidden**-0.5, dtype=dtype, rngs=rngs)
        self.activations = activations

    def __call__(self, x_BTD: Float[Array, "B T D"], *, dropout: Dropout) -> Float[Array, "B T D"]:
        axes = ("batch", "length", "activation_mlp")
        branches = tuple(
            checkpoint_name(constrain(getattr(self, name)(x_BTD, dropout=dropout), axes), "projected")
            for name in self.names
        )
        return self.wo(dropout(_gated(branches, self.activations)), dropout=dropout)


@functools.partial(jax.checkpoint, static_argnums=1)
def _gated(branches: tuple[Float[Array, "B T F"], ...], activations: tuple[str, ...]) -> Float[Array, "B T F"]:
    """Computes `act_0(branch_0) * act_1(branch_1) * ..`, again in the backward pass.

    Storing the intermediate values would add 5 % to a step's working memory; recomputing them costs next to nothing
    (docs/speed.md).
    """
    values = [ACTIVATIONS[act](x_BTF) for act, x_BTF in zip(activations, branches, strict=True)]
    return math.prod(values[1:], start=values[0])


def add_residual(x_BTD: Float[Array, "B T D"], y_BTD: Float[Array, "B T D"], *, adapter: Any) -> Float[Array, "B T D"]:
    """Adds a sub-layer's output, after its adapter if there is one, to the sub-layer's input."""
    y_BTD = y_BTD if adapter is None else adapter(y_BTD)
    return checkpoint_name(constrain(x_BTD + y_BTD, ("batch", "length", "activation_embed")), "residual")
