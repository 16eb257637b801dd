"""The student: T5 v1.0 and v1.1 in Flax NNX. Its decoder one position at a time is `stepping.py`.

Suffix letters of array names, used in every file of this package:

    B batch (rows)   S source position   T target position   D model width
    H heads          K width of a head   F width of the MLP  V vocabulary

A model holds parameters and nothing else. Dropout keys are an argument of the call, and `split` / `join` turn a model
into a flat dictionary `{"encoder/layers/0/attention/query/kernel": array}` and back, so that everything around it is
plain `jax` on a plain pytree. Parameter names, shapes and initial scales are those of T5X's `network.py` (kernels
`[in, heads * head_dim]`, relative bias `[heads, buckets]`).

Packed rows are told apart by segment ids (1, 2, .. per example, 0 for padding); an unpacked row is one segment.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}
DTYPES = ("float32", "bfloat16")
# "shared": one table per stack, as T5, mT5 and ByT5 have it; "per_layer": one per self-attention, as UMT5 has it.
RELATIVE_BIASES = ("shared", "per_layer")
# Added to the logits of pairs that must not attend: finite, so a row of padding gives no NaN.
MASKED = -1e10


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Shape of a T5; names are T5X's.

    v1.0 is `mlp_activations=("relu",), logits_via_embedding=True`; v1.1 is `("gelu", "linear")` and `False`.
    `dtype` is what activations are computed in; parameters are float32 always. `vocab_size` counts the rows of the
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

    def __post_init__(self) -> None:
        # gin hands over lists, and checks no types.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in (
            *("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim"),
            *("num_encoder_layers", "num_decoder_layers", "relative_attention_num_buckets"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"T5Config.{name} is {value!r}; expected a whole number of at least 1.")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"T5Config.dropout_rate is {self.dropout_rate!r}; expected 0 <= rate < 1.")
        if self.dtype not in DTYPES:
            raise ValueError(f"T5Config.dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if self.relative_attention_bias not in RELATIVE_BIASES:
            raise ValueError(
                f"T5Config.relative_attention_bias is {self.relative_attention_bias!r}; expected one of "
                f"{', '.join(RELATIVE_BIASES)}."
            )
        if not self.mlp_activations:
            raise ValueError("T5Config.mlp_activations is empty; expected ('relu',) or ('gelu', 'linear').")
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                near = difflib.get_close_matches(str(name), ACTIVATIONS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"T5Config.mlp_activations has {name!r}; expected some of {', '.join(ACTIVATIONS)}.{hint}"
                )

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "T5Config":
        """Inverse of `dataclasses.asdict`, also after JSON (which has no tuples)."""
        return cls(**{**saved, "mlp_activations": tuple(saved["mlp_activations"])})


@functools.partial(jax.jit, static_argnames=("shape", "std"))
def _normal(key: Key[Array, ""], shape: tuple[int, ...], *, std: float) -> Float[Array, "..."]:
    """Normal values cut off at two standard deviations (T5X's and Flax's `truncated_normal`), float32.

    Jitted so that the many layers of a large model, of few distinct shapes, trace it once each.
    """
    # The variance of a normal cut at 2 sigma is 0.8796^2: rescaled so that `std` is what comes out.
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) * (std / 0.87962566103423978)


class _Dropout:
    """Draws a fresh key at each use while a step is traced; holds no array between calls.

    Masks are shared along the second-to-last axis (sequence), as T5X and Mesh TensorFlow trained T5, which also makes
    them cheap to draw.
    """

    def __init__(self, rate: float, key: Key[Array, ""] | None) -> None:
        self._rate = rate
        self._key = None if rate == 0.0 else key
        self._uses = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        if self._key is None:
            return x
        self._uses += 1
        shape = (*x.shape[:-2], 1, x.shape[-1])
        keep = jax.random.bernoulli(jax.random.fold_in(self._key, self._uses), 1.0 - self._rate, shape)
        return jnp.where(keep, x / (1.0 - self._rate), jnp.zeros((), x.dtype))


class LayerNorm(nnx.Module):
    """Root-mean-square norm with a scale and no bias; the mean square is taken in float32."""

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
    """A matrix without bias, `[in, out]`, named by logical axes for the sharding table."""

    def __init__(
        self, shape: tuple[int, int], *, axes: tuple[str, str], std: float, dtype: str, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(_normal(rngs.params(), shape, std=std), axes=axes)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return _matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))


def _matmul(
    x: Float[Array, "*lead I"], kernel_IO: Float[Array, "I O"], *, dtype: Any = None
) -> Float[Array, "*lead O"]:
    """`x @ kernel`, in `dtype` if given and else in theirs; the rows of all leading axes in one.

    Over several leading axes XLA for CPU computes the kernel's gradient from a transposed copy, and recomputes into it,
    column by column, whatever the copied value comes from: a third of a training step (docs/speed.md).
    """
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel_IO, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], kernel_IO.shape[-1])


class RelativePositionBias(nnx.Module):
    """One learned number per head and bucket of (key position - query position)."""

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
        # A one-hot product: its gradient is a product too, where a gather's would be a scatter.
        one_hot = jax.nn.one_hot(bucket, self.rel_embedding.shape[1], dtype=jnp.float32)
        return jnp.einsum("hn,qpn->hqp", self.rel_embedding[...], one_hot)[None]


def relative_position_bucket(
    relative: Int[Array, "..."], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """Bucket of each relative position (key minus query), as in T5 (arXiv 1910.10683, section 2.1).

    Half of the buckets hold one small distance each, the other half grow logarithmically up to `max_distance`, beyond
    which all share the last. Causal stacks (`bidirectional=False`) put every later key in bucket 0.
    Example, causal, 32 buckets: distances 0, -1, -15, -16, -127, -500 fall in buckets 0, 1, 15, 16, 31, 31.
    """
    offset = jnp.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative > 0, num_buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = jnp.maximum(-relative, 0)
    exact = num_buckets // 2
    # float32 rounding must agree with the published models', hence this order of operations.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    logarithmic = exact + (ratio * (num_buckets - exact)).astype(relative.dtype)
    logarithmic = jnp.minimum(logarithmic, num_buckets - 1)
    return offset + jnp.where(distance < exact, distance, logarithmic)


class Attention(nnx.Module):
    """Multi-head attention without biases and without a 1/sqrt(K) factor (T5 folds it into the query's scale)."""

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

    def keys_values(self, x_BSD: Float[Array, "B S D"]) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
        """Keys and values of every position of `x`: what a cache holds."""
        shape = (*x_BSD.shape[:2], *self.heads)
        return self.key(x_BSD).reshape(shape), self.value(x_BSD).reshape(shape)

    def attend(
        self,
        x_BTD: Float[Array, "B T D"],
        k_BSHK: Float[Array, "B S H K"],
        v_BSHK: Float[Array, "B S H K"],
        *,
        bias: Float[Array, "#B #H T S"],
        dropout: _Dropout,
    ) -> Float[Array, "B T D"]:
        """Attention of `x` over given keys and values; the softmax runs in float32."""
        q_BTHK = self.query(x_BTD).reshape(*x_BTD.shape[:2], *self.heads)
        scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
        weights_BHTS = jax.nn.softmax(scores_BHTS + bias, axis=-1).astype(x_BTD.dtype)
        y_BTHK = jnp.einsum("bhts,bshk->bthk", dropout(weights_BHTS), v_BSHK)
        return self.out(y_BTHK.reshape(*y_BTHK.shape[:2], -1))


class MLP(nnx.Module):
    """`wo(act_0(wi_0 x) * act_1(wi_1 x) * ..)`; v1.0 has one branch, named `wi`."""

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

    def __call__(self, x_BTD: Float[Array, "B T D"], *, dropout: _Dropout) -> Float[Array, "B T D"]:
        branches = tuple(getattr(self, name)(x_BTD) for name in self.names)
        return self.wo(dropout(_gated(branches, self.activations)))


@functools.partial(jax.checkpoint, static_argnums=1)
def _gated(branches: tuple[Float[Array, "B T F"], ...], activations: tuple[str, ...]) -> Float[Array, "B T F"]:
    """`act_0(branch_0) * act_1(branch_1) * ..`, which the backward pass computes again from the branches.

    Kept, its inner values would add 5 % to a step's working memory, and they cost next to nothing (docs/speed.md).
    """
    values = [ACTIVATIONS[act](x_BTF) for act, x_BTF in zip(activations, branches, strict=True)]
    return math.prod(values[1:], start=values[0])


class EncoderLayer(nnx.Module):
    """Self-attention, then MLP, each normed before and added to its input."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "per_layer":
            self.relpos_bias = RelativePositionBias(config, bidirectional=True, rngs=rngs)
        self.pre_attention_layer_norm = LayerNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.pre_mlp_layer_norm = LayerNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], *, bias: Float[Array, "B H S S"], dropout: _Dropout
    ) -> Float[Array, "B S D"]:
        y_BSD = self.pre_attention_layer_norm(x_BSD)
        k_BSHK, v_BSHK = self.attention.keys_values(y_BSD)
        x_BSD = x_BSD + dropout(self.attention.attend(y_BSD, k_BSHK, v_BSHK, bias=bias, dropout=dropout))
        return x_BSD + dropout(self.mlp(self.pre_mlp_layer_norm(x_BSD), dropout=dropout))


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention over the encoder's output, then MLP."""

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
        self_bias: Float[Array, "B H T T"],
        cross_bias: Float[Array, "B 1 T S"],
        dropout: _Dropout,
    ) -> Float[Array, "B T D"]:
        y_BTD = self.pre_self_attention_layer_norm(x_BTD)
        k, v = self.self_attention.keys_values(y_BTD)
        x_BTD = x_BTD + dropout(self.self_attention.attend(y_BTD, k, v, bias=self_bias, dropout=dropout))
        k, v = self.encoder_decoder_attention.keys_values(encoded_BSD)
        return self._after_self_attention(x_BTD, k, v, cross_bias=cross_bias, dropout=dropout)

    def _after_self_attention(
        self,
        x_BTD: Float[Array, "B T D"],
        cross_key: Float[Array, "B S H K"],
        cross_value: Float[Array, "B S H K"],
        *,
        cross_bias: Float[Array, "B 1 T S"],
        dropout: _Dropout,
    ) -> Float[Array, "B T D"]:
        y_BTD = self.pre_cross_attention_layer_norm(x_BTD)
        attended = self.encoder_decoder_attention.attend(
            y_BTD, cross_key, cross_value, bias=cross_bias, dropout=dropout
        )
        x_BTD = x_BTD + dropout(attended)
        return x_BTD + dropout(self.mlp(self.pre_mlp_layer_norm(x_BTD), dropout=dropout))


class TokenEmbedder(nnx.Module):
    """The table `[V, D]` that both stacks read, and that v1.0 also writes logits with."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        value = jax.random.normal(rngs.params(), (config.vocab_size, config.emb_dim), jnp.float32)
        self.embedding = nnx.Param(value, axes=("vocab", "embed"))
        self.dtype = config.dtype

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jnp.take(self.embedding[...], tokens_BT, axis=0).astype(self.dtype)


class Encoder(nnx.Module):
    """Embedded source to encoded source."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "shared":
            self.relpos_bias = RelativePositionBias(config, bidirectional=True, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_encoder_layers)])
        self.encoder_norm = LayerNorm(config)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        segment_ids_BS: Int[Array, "B S"],
        *,
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B S D"]:
        dropout = _Dropout(self.dropout_rate, dropout_key)
        positions = jnp.arange(x_BSD.shape[1])
        mask = _mask_bias(same_segment(segment_ids_BS, segment_ids_BS))
        x_BSD = dropout(x_BSD)
        for layer, bias in zip(self.layers, _biases(self, positions, positions, mask), strict=True):
            x_BSD = layer(x_BSD, bias=bias, dropout=dropout)
        return dropout(self.encoder_norm(x_BSD))


class Decoder(nnx.Module):
    """Embedded target and encoded source to the states that logits are made of."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "shared":
            self.relpos_bias = RelativePositionBias(config, bidirectional=False, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_decoder_layers)])
        self.decoder_norm = LayerNorm(config)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        encoded_BSD: Float[Array, "B S D"],
        *,
        segment_ids_BT: Int[Array, "B T"],
        encoder_segment_ids_BS: Int[Array, "B S"],
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        dropout = _Dropout(self.dropout_rate, dropout_key)
        positions = jnp.arange(x_BTD.shape[1])
        causal = positions[:, None] >= positions[None, :]
        visible = same_segment(segment_ids_BT, segment_ids_BT) & causal[None]
        cross_bias = _mask_bias(same_segment(segment_ids_BT, encoder_segment_ids_BS))
        x_BTD = dropout(x_BTD)
        for layer, self_bias in zip(self.layers, _biases(self, positions, positions, _mask_bias(visible)), strict=True):
            x_BTD = layer(x_BTD, encoded_BSD, self_bias=self_bias, cross_bias=cross_bias, dropout=dropout)
        return dropout(self.decoder_norm(x_BTD))


def _biases(
    stack: Encoder | Decoder,
    query_positions: Int[Array, "Q"],
    key_positions: Int[Array, "P"],
    mask: Float[Array, "#B 1 Q P"],
) -> list[Float[Array, "#B H Q P"]]:
    """Of each layer: relative position bias plus mask. A shared one is computed once."""
    if hasattr(stack, "relpos_bias"):
        return [stack.relpos_bias(query_positions, key_positions) + mask] * len(stack.layers)
    return [layer.relpos_bias(query_positions, key_positions) + mask for layer in stack.layers]


def same_segment(queries_BT: Int[Array, "B T"], keys_BS: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Which pairs belong to the same example. Padding (segment 0) sees padding alone, and nothing else sees it."""
    return queries_BT[:, :, None] == keys_BS[:, None, :]


def _mask_bias(visible: Bool[Array, "B T S"]) -> Float[Array, "B 1 T S"]:
    return jnp.where(visible, 0.0, MASKED)[:, None].astype(jnp.float32)


def source_segments(tokens_BS: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Segment ids of unpacked source rows: 1 on tokens, 0 on padding (token id 0)."""
    return (tokens_BS > 0).astype(jnp.int32)


class T5(nnx.Module):
    """Encoder-decoder student. `model(source, target_in)` is `decode(encode(source), target_in)`."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.token_embedder = TokenEmbedder(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        if not config.logits_via_embedding:
            self.logits_dense = Dense(
                (config.emb_dim, config.vocab_size),
                axes=("embed", "vocab"),
                std=config.emb_dim**-0.5,
                dtype=config.dtype,
                rngs=rngs,
            )

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        decoder_input_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T V"]:
        """Teacher-forced logits, float32. No key, no dropout.

        Segment ids are given for packed rows; without them a source row is one example padded with 0, and the target
        is one example (its padding needs no mask: no earlier position can see it).
        """
        if encoder_segment_ids is None:
            encoder_segment_ids = source_segments(encoder_input_tokens)
        encoded_BSD = self.encode(
            encoder_input_tokens, segment_ids=encoder_segment_ids, dropout_key=_fold(dropout_key, 0)
        )
        return self.decode(
            encoded_BSD,
            decoder_input_tokens,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            dropout_key=_fold(dropout_key, 1),
        )

    def encode(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        *,
        segment_ids: Int[Array, "B S"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B S D"]:
        x_BSD = self.token_embedder(encoder_input_tokens)
        return self.encoder(x_BSD, segment_ids, dropout_key=dropout_key)

    def decode(
        self,
        encoded_BSD: Float[Array, "B S D"],
        decoder_input_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"],
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T V"]:
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_input_tokens)
        y_BTD = self.decoder(
            self.token_embedder(decoder_input_tokens),
            encoded_BSD,
            segment_ids_BT=decoder_segment_ids,
            encoder_segment_ids_BS=encoder_segment_ids,
            dropout_key=dropout_key,
        )
        return self.logits(y_BTD)

    def logits(self, y_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Decoder states to float32 logits; a tied table is scaled by D^-0.5 (Mesh TensorFlow's convention)."""
        if self.config.logits_via_embedding:
            y_BTD = y_BTD * self.config.emb_dim**-0.5
            table_DV = self.token_embedder.embedding[...].T
        else:
            table_DV = self.logits_dense.kernel[...]
        return _matmul(y_BTD, table_DV.astype(y_BTD.dtype), dtype=jnp.float32)


def _fold(key: Key[Array, ""] | None, number: int) -> Key[Array, ""] | None:
    return None if key is None else jax.random.fold_in(key, number)


# A student between calls: `Structure` is static, `Parameters` is the pytree that is trained, sharded and saved.
Structure = Any
Parameters = dict[str, jax.Array]


def split(model: nnx.Module) -> tuple[Structure, Parameters]:
    """Model to (structure, `{"encoder/layers/0/mlp/wo/kernel": float32 array, ..}`)."""
    structure, state = nnx.split(model, nnx.Param)
    return structure, {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def join(structure: Structure, parameters: Parameters) -> T5:
    """Inverse of `split`; also takes tracers or gradients in place of the arrays."""
    flat = [
        (tuple(int(part) if part.isdigit() else part for part in name.split("/")), nnx.Param(x))
        for name, x in parameters.items()
    ]
    return nnx.merge(structure, nnx.from_flat_state(flat))


def init(config: T5Config, *, seed: int) -> tuple[Structure, Parameters]:
    """Fresh parameters. Traceable: `jax.eval_shape(lambda: init(config, seed=0)[1])` costs no memory."""
    return split(T5(config, rngs=nnx.Rngs(seed)))


def abstract(config: T5Config) -> tuple[Structure, dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str, ...]]]:
    """Structure, shapes and logical axes of every parameter, without computing any."""
    model = nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0)))
    structure, state = nnx.split(model, nnx.Param)
    shapes, axes = {}, {}
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        shapes[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        axes[name] = leaf.axes
    return structure, shapes, axes
