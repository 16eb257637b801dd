"""Building blocks of the student: norm, dense, dropout, relative position bias, attention, MLP, and T5's two layers.

`t5.py` explains array names, shapes and parameter names.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from sbs_jax import checks
from sbs_jax.student import attention
from sbs_jax.student.partitioning import constrain, gather

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}
DTYPES = ("float32", "bfloat16")
# "shared": one table per stack (T5, mT5, ByT5). "per_layer": one per self-attention (UMT5).
RELATIVE_BIASES = ("shared", "per_layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Describes the shape of a T5, with T5X's names.

    v1.0 is `mlp_activations=("relu",), logits_via_embedding=True`; v1.1 is `("gelu", "linear")` and `False`.
    Activations are computed in `dtype`; parameters are always float32. `vocab_size` counts the rows of the
    embedding table (32,128 for the published T5: 32,000 pieces, 100 sentinels, 28 unused).
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...]
    logits_via_embedding: bool
    dropout_rate: float
    dtype: str = "float32"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_bias: str = "shared"
    layer_norm_epsilon: float = 1e-6
    # Noise on input embeddings in training (NEFTune, arXiv 2310.05914: 5, 10 or 15 for the encoder); 0 turns it off.
    neftune_alpha: float = 0.0
    neftune_decoder_alpha: float = 0.0

    def __post_init__(self) -> None:
        # gin passes lists and does not check types.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in (
            *("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim"),
            *("num_encoder_layers", "num_decoder_layers", "relative_attention_num_buckets"),
        ):
            checks.whole_number(f"T5Config.{name}", getattr(self, name), least=1)
        checks.number("T5Config.dropout_rate", self.dropout_rate, least=0.0, below=1.0)
        for name in ("neftune_alpha", "neftune_decoder_alpha"):
            checks.number(f"T5Config.{name}", getattr(self, name), least=0.0)
        checks.choice("T5Config.dtype", self.dtype, DTYPES)
        checks.choice("T5Config.relative_attention_bias", self.relative_attention_bias, RELATIVE_BIASES)
        if not self.mlp_activations:
            raise ValueError("T5Config.mlp_activations is empty; expected ('relu',) or ('gelu', 'linear').")
        for name in self.mlp_activations:
            checks.choice("One of T5Config.mlp_activations", name, ACTIVATIONS)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "T5Config":
        """Inverts `dataclasses.asdict`, also after a trip through JSON, which has no tuples."""
        return cls(**{**saved, "mlp_activations": tuple(saved["mlp_activations"])})


@functools.partial(jax.jit, static_argnames=("shape", "std"))
def _normal(key: Key[Array, ""], shape: tuple[int, ...], *, std: float) -> Float[Array, "..."]:
    """Draws float32 normal values truncated at two standard deviations, like `truncated_normal` of T5X and Flax.

    Jitted: a large model has many layers but few distinct shapes, and each shape is traced once.
    """
    # A normal truncated at 2 sigma has standard deviation 0.8796; dividing by it gives `std`.
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) * (std / 0.87962566103423978)


class Dropout:
    """Drops values, with a fresh key at each use while a step is traced; without a key it does nothing.

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


class LayerNorm(nnx.Module):
    """Normalizes by the root mean square, with a scale and no bias; the mean square is computed in float32."""

    def __init__(self, config: T5Config) -> None:
        self.scale = nnx.Param(jnp.ones((config.emb_dim,), jnp.float32), axes=("embed",))
        self.epsilon = config.layer_norm_epsilon
        self.dtype = config.dtype

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x_BTD = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
        y_BTD = x_BTD * jax.lax.rsqrt(mean_square + self.epsilon)
        return (y_BTD * self.scale[None, None, :]).astype(self.dtype)


class Dense(nnx.Module):
    """Multiplies by a matrix `[in, out]` without bias; `axes` are its logical axes (partitioning.py)."""

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
        self.kernel = nnx.Param(_normal(rngs.params(), shape, std=std), axes=axes)
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
        """Returns the kernel alone: bfloat16 if it is stored so, otherwise float32."""
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
    On a TPU that reshape is what costs copies, between the layouts of rows and of heads.
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


class RelativePositionBias(nnx.Module):
    """Learns one number per head and bucket of (key position - query position)."""

    def __init__(self, config: T5Config, *, bidirectional: bool, rngs: nnx.Rngs) -> None:
        shape = (config.num_heads, config.relative_attention_num_buckets)
        value = _normal(rngs.params(), shape, std=config.emb_dim**-0.5)
        self.rel_embedding = nnx.Param(value, axes=("heads", "relpos_buckets"))
        self.bidirectional = bidirectional
        self.max_distance = config.relative_attention_max_distance

    def __call__(self, query_positions: Int[Array, "Q"], key_positions: Int[Array, "P"]) -> Float[Array, "1 H Q P"]:
        relative = key_positions[None, :] - query_positions[:, None]
        bucket = relative_position_bucket(
            relative,
            bidirectional=self.bidirectional,
            num_buckets=self.rel_embedding.shape[1],
            max_distance=self.max_distance,
        )
        # A one-hot product instead of a gather: its gradient is a product too, not a scatter.
        one_hot = jax.nn.one_hot(bucket, self.rel_embedding.shape[1], dtype=jnp.float32)
        return jnp.einsum("hn,qpn->hqp", self.rel_embedding[...], one_hot)[None]


def relative_position_bucket(
    relative: Int[Array, "..."], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """Assigns each relative position (key minus query) to a bucket, as in T5 (arXiv 1910.10683, section 2.1).

    Half of the buckets hold one small distance each. The other half grow logarithmically up to `max_distance`; larger
    distances share the last bucket. Causal stacks (`bidirectional=False`) put every later key in bucket 0.
    Example, causal, 32 buckets: positions 0, -1, -15, -16, -127, -500 fall in buckets 0, 1, 15, 16, 31, 31.
    """
    offset = jnp.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative > 0, num_buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = jnp.maximum(-relative, 0)
    exact = num_buckets // 2
    # The order of operations gives the float32 rounding that the published models were trained with.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    logarithmic = exact + (ratio * (num_buckets - exact)).astype(relative.dtype)
    logarithmic = jnp.minimum(logarithmic, num_buckets - 1)
    return offset + jnp.where(distance < exact, distance, logarithmic)


class Attention(nnx.Module):
    """Computes multi-head attention without biases and without the factor 1/sqrt(K).

    T5 folds that factor into the initial scale of the query kernel.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        width, joined = config.emb_dim, config.num_heads * config.head_dim

        def inward(std: float) -> Dense:
            axes = ("embed", "joined_kv")
            return Dense((width, joined), axes=axes, std=std, dtype=config.dtype, rngs=rngs)

        self.query = inward((width * config.head_dim) ** -0.5)
        self.key = inward(width**-0.5)
        self.value = inward(width**-0.5)
        self.out = Dense((joined, width), axes=("joined_kv", "embed"), std=joined**-0.5, dtype=config.dtype, rngs=rngs)
        self.heads = (config.num_heads, config.head_dim)

    prefix: Any = None  # adapter slot: keys and values placed before those of the source

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        source_BSD: Float[Array, "B S D"],
        *,
        bias: Float[Array, "H T S"] | None,
        segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
        causal: bool,
        dropout: Dropout,
    ) -> Float[Array, "B T D"]:
        """Attends from `x` to `source`, within segments."""
        axes = ("batch", "length", "activation_heads", None)
        q_BTHK, k_BSHK, v_BSHK = (
            _named("projected", constrain(kernel(x, split=self.heads, dropout=dropout), axes))
            for kernel, x in ((self.query, x_BTD), (self.key, source_BSD), (self.value, source_BSD))
        )
        before = 0
        if self.prefix is not None:
            k_BSHK, v_BSHK = self.prefix.prepend_to(k_BSHK, v_BSHK)
            before = k_BSHK.shape[1] - source_BSD.shape[1]
        # T5X and Mesh TensorFlow share the mask of attention weights among all queries. Masking the values gives the
        # same result without a pass over the weights.
        v_BSHK = dropout(v_BSHK, shared=-1)
        y_BTHK = attention.attend(q_BTHK, k_BSHK, v_BSHK, bias, segments, causal=causal, prefix=before)
        return self.out(y_BTHK, contract=2, dropout=dropout)


class MLP(nnx.Module):
    """Computes `wo(act_0(wi_0 x) * act_1(wi_1 x) * ..)`; v1.0 has one branch, named `wi`."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        width, hidden, dtype = config.emb_dim, config.mlp_dim, config.dtype
        self.names = ("wi",)
        if len(config.mlp_activations) > 1:
            self.names = tuple(f"wi_{i}" for i in range(len(config.mlp_activations)))
        for name in self.names:
            wi = Dense((width, hidden), axes=("embed", "mlp"), std=width**-0.5, dtype=dtype, rngs=rngs)
            setattr(self, name, wi)
        self.wo = Dense((hidden, width), axes=("mlp", "embed"), std=hidden**-0.5, dtype=dtype, rngs=rngs)
        self.activations = config.mlp_activations

    def __call__(self, x_BTD: Float[Array, "B T D"], *, dropout: Dropout) -> Float[Array, "B T D"]:
        axes = ("batch", "length", "activation_mlp")
        branches = tuple(
            _named("projected", constrain(getattr(self, name)(x_BTD, dropout=dropout), axes)) for name in self.names
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


class EncoderLayer(nnx.Module):
    """Applies self-attention, then the MLP, each to its normalized input and added to that input."""

    attention_adapter: Any = None  # adapter slots: one after each sub-layer
    mlp_adapter: Any = None

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "per_layer":
            self.relpos_bias = RelativePositionBias(config, bidirectional=True, rngs=rngs)
        self.pre_attention_layer_norm = LayerNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.pre_mlp_layer_norm = LayerNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        *,
        bias: Float[Array, "H S S"] | None,
        segments_BS: Int[Array, "B S"],
        dropout: Dropout,
    ) -> Float[Array, "B S D"]:
        """Runs the layer; `bias` is that of the stack, or None if every layer has its own."""
        y_BSD = self.pre_attention_layer_norm(x_BSD)
        y_BSD = self.attention(
            *(y_BSD, y_BSD),
            bias=_layer_bias(self, bias, x_BSD.shape[1]),
            segments=(segments_BS, segments_BS),
            causal=False,
            dropout=dropout,
        )
        x_BSD = _residual(x_BSD, _apply_adapter(dropout(y_BSD), self.attention_adapter))
        y_BSD = self.mlp(self.pre_mlp_layer_norm(x_BSD), dropout=dropout)
        return _residual(x_BSD, _apply_adapter(dropout(y_BSD), self.mlp_adapter))


class DecoderLayer(nnx.Module):
    """Applies causal self-attention, attention over the encoder output, then the MLP."""

    self_attention_adapter: Any = None  # adapter slots: one after each sub-layer
    encoder_decoder_attention_adapter: Any = None
    mlp_adapter: Any = None

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "per_layer":
            self.relpos_bias = RelativePositionBias(config, bidirectional=False, rngs=rngs)
        self.pre_self_attention_layer_norm = LayerNorm(config)
        self.self_attention = Attention(config, rngs=rngs)
        self.pre_cross_attention_layer_norm = LayerNorm(config)
        self.encoder_decoder_attention = Attention(config, rngs=rngs)
        self.pre_mlp_layer_norm = LayerNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        encoded_BSD: Float[Array, "B S D"],
        *,
        bias: Float[Array, "H T T"] | None,
        segments_BT: Int[Array, "B T"],
        encoder_segments_BS: Int[Array, "B S"],
        dropout: Dropout,
    ) -> Float[Array, "B T D"]:
        """Runs the layer; `bias` is that of the stack, or None if every layer has its own."""
        y_BTD = self.pre_self_attention_layer_norm(x_BTD)
        y_BTD = self.self_attention(
            *(y_BTD, y_BTD),
            bias=_layer_bias(self, bias, x_BTD.shape[1]),
            segments=(segments_BT, segments_BT),
            causal=True,
            dropout=dropout,
        )
        x_BTD = _residual(x_BTD, _apply_adapter(dropout(y_BTD), self.self_attention_adapter))
        y_BTD = self.encoder_decoder_attention(
            *(self.pre_cross_attention_layer_norm(x_BTD), encoded_BSD),
            bias=None,
            segments=(segments_BT, encoder_segments_BS),
            causal=False,
            dropout=dropout,
        )
        x_BTD = _residual(x_BTD, _apply_adapter(dropout(y_BTD), self.encoder_decoder_attention_adapter))
        y_BTD = self.mlp(self.pre_mlp_layer_norm(x_BTD), dropout=dropout)
        return _residual(x_BTD, _apply_adapter(dropout(y_BTD), self.mlp_adapter))


def _apply_adapter(y_BTD: Float[Array, "B T D"], adapter: Any) -> Float[Array, "B T D"]:
    return y_BTD if adapter is None else adapter(y_BTD)


def _layer_bias(
    layer: EncoderLayer | DecoderLayer, shared: Float[Array, "H T T"] | None, length: int
) -> Float[Array, "H T T"]:
    return shared if shared is not None else position_bias(layer, length)


def position_bias(owner: Any, length: int) -> Float[Array, "H T T"]:
    """Computes the relative position bias of `length` positions from the table of a layer or stack."""
    positions = jnp.arange(length)
    return owner.relpos_bias(positions, positions)[0]


def _named(name: str, x: jax.Array) -> jax.Array:
    """Names `x` for the rematerialization policies of `t5.REMAT`."""
    return checkpoint_name(x, name)


def _residual(x_BTD: Float[Array, "B T D"], y_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return _named("residual", constrain(x_BTD + y_BTD, ("batch", "length", "activation_embed")))
