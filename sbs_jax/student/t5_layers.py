"""T5's own layers: its configuration, relative position bias, attention, and the layers of both stacks.

Names and shapes as in t5.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sbs_jax import checks
from sbs_jax.student import attention, layers
from sbs_jax.student.partitioning import constrain

# "shared": one table per stack (T5, mT5, ByT5). "per_layer": one per self-attention (UMT5).
RELATIVE_BIASES = ("shared", "per_layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Architecture of a T5, with T5X's names.

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
        checks.choice("T5Config.dtype", self.dtype, layers.DTYPES)
        checks.choice("T5Config.relative_attention_bias", self.relative_attention_bias, RELATIVE_BIASES)
        if not self.mlp_activations:
            raise ValueError("T5Config.mlp_activations is empty; expected ('relu',) or ('gelu', 'linear').")
        for name in self.mlp_activations:
            checks.choice("One of T5Config.mlp_activations", name, layers.ACTIVATIONS)

    # What all families say of themselves (families.py). T5's vocabularies and its decoder's first input are fixed.
    @property
    def eos_id(self) -> int:
        """Returns the id of the token that ends a sequence."""
        return 1

    @property
    def decoder_start(self) -> int:
        """Returns the first decoder input."""
        return 0

    @property
    def num_kv_heads(self) -> int:
        """Returns the number of heads of keys and values."""
        return self.num_heads

    @property
    def logits_scale(self) -> float | None:
        """Returns the factor on states before the logits: D^-0.5 with a tied table, as in Mesh TensorFlow."""
        return self.emb_dim**-0.5 if self.logits_via_embedding else None

    @property
    def attention_cap(self) -> None:
        """Returns the soft cap of attention scores: none."""
        return None

    @property
    def logits_cap(self) -> None:
        """Returns the soft cap of logits: none."""
        return None

    @property
    def embedding_scale(self) -> float:
        """Returns the factor on embedded tokens: none."""
        return 1.0

    @property
    def stack_layers(self) -> dict[str, int]:
        """Returns the number of layers of each stack."""
        return {"encoder": self.num_encoder_layers, "decoder": self.num_decoder_layers}

    @property
    def decoder_weights(self) -> int:
        """Counts the numbers in the matrices of the decoder's layers, those over the source not left out."""
        projection, branches = self.emb_dim * self.num_heads * self.head_dim, len(self.mlp_activations) + 1
        return self.num_decoder_layers * (6 * projection + branches * self.emb_dim * self.mlp_dim)


class RelativePositionBias(nnx.Module):
    """One learned number per head and bucket of (key position - query position)."""

    def __init__(self, config: T5Config, *, bidirectional: bool, rngs: nnx.Rngs) -> None:
        shape = (config.num_heads, config.relative_attention_num_buckets)
        value = layers.truncated_normal(rngs.params(), shape, std=config.emb_dim**-0.5)
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


class Attention(layers.Attention):
    """Multi-head attention without biases and without the factor 1/sqrt(K).

    T5 folds that factor into the initial scale of the query kernel.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        width, joined = config.emb_dim, config.num_heads * config.head_dim

        def inward(std: float) -> layers.Dense:
            axes = ("embed", "joined_kv")
            return layers.Dense((width, joined), axes=axes, std=std, dtype=config.dtype, rngs=rngs)

        self.query = inward((width * config.head_dim) ** -0.5)
        self.key = inward(width**-0.5)
        self.value = inward(width**-0.5)
        self.out = layers.Dense(
            (joined, width), axes=("joined_kv", "embed"), std=joined**-0.5, dtype=config.dtype, rngs=rngs
        )
        self.heads = (config.num_heads, config.head_dim)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        source_BSD: Float[Array, "B S D"],
        *,
        bias: Float[Array, "H T S"] | None,
        segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
        causal: bool,
        dropout: layers.Dropout,
    ) -> Float[Array, "B T D"]:
        """Attends from `x` to `source`, within segments."""
        axes = ("batch", "length", "activation_heads", None)
        q_BTHK, k_BSHK, v_BSHK = (
            checkpoint_name(constrain(kernel(x, split=self.heads, dropout=dropout), axes), "projected")
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


def norm_of(config: T5Config) -> layers.RMSNorm:
    """Builds a norm of the model's width."""
    return layers.RMSNorm(config.emb_dim, epsilon=config.layer_norm_epsilon, dtype=config.dtype)


def _mlp(config: T5Config, *, rngs: nnx.Rngs) -> layers.MLP:
    sizes, activations = (config.emb_dim, config.mlp_dim), config.mlp_activations
    return layers.MLP(*sizes, activations=activations, dtype=config.dtype, rngs=rngs)


class EncoderLayer(nnx.Module):
    """Self-attention, then the MLP; each reads its normalized input and is added to that input."""

    attention_adapter: Any = None  # adapter slots: one after each sub-layer
    mlp_adapter: Any = None

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "per_layer":
            self.relpos_bias = RelativePositionBias(config, bidirectional=True, rngs=rngs)
        self.pre_attention_layer_norm = norm_of(config)
        self.attention = Attention(config, rngs=rngs)
        self.pre_mlp_layer_norm = norm_of(config)
        self.mlp = _mlp(config, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        *,
        bias: Float[Array, "H S S"] | None,
        segments_BS: Int[Array, "B S"],
        dropout: layers.Dropout,
    ) -> Float[Array, "B S D"]:
        """Runs the layer; `bias` is that of the stack, or None if every layer has its own."""
        y_BSD = self.pre_attention_layer_norm(x_BSD)
        y_BSD = self.attention(
            y_BSD,
            y_BSD,
            bias=_layer_bias(self, bias, x_BSD.shape[1]),
            segments=(segments_BS, segments_BS),
            causal=False,
            dropout=dropout,
        )
        x_BSD = layers.add_residual(x_BSD, dropout(y_BSD), adapter=self.attention_adapter)
        y_BSD = self.mlp(self.pre_mlp_layer_norm(x_BSD), dropout=dropout)
        return layers.add_residual(x_BSD, dropout(y_BSD), adapter=self.mlp_adapter)


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention over the encoder output, then the MLP."""

    self_attention_adapter: Any = None  # adapter slots: one after each sub-layer
    encoder_decoder_attention_adapter: Any = None
    mlp_adapter: Any = None

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "per_layer":
            self.relpos_bias = RelativePositionBias(config, bidirectional=False, rngs=rngs)
        self.pre_self_attention_layer_norm = norm_of(config)
        self.self_attention = Attention(config, rngs=rngs)
        self.pre_cross_attention_layer_norm = norm_of(config)
        self.encoder_decoder_attention = Attention(config, rngs=rngs)
        self.pre_mlp_layer_norm = norm_of(config)
        self.mlp = _mlp(config, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        encoded_BSD: Float[Array, "B S D"],
        *,
        bias: Float[Array, "H T T"] | None,
        segments_BT: Int[Array, "B T"],
        encoder_segments_BS: Int[Array, "B S"],
        dropout: layers.Dropout,
    ) -> Float[Array, "B T D"]:
        """Runs the layer; `bias` is that of the stack, or None if every layer has its own."""
        y_BTD = self.pre_self_attention_layer_norm(x_BTD)
        y_BTD = self.self_attention(
            y_BTD,
            y_BTD,
            bias=_layer_bias(self, bias, x_BTD.shape[1]),
            segments=(segments_BT, segments_BT),
            causal=True,
            dropout=dropout,
        )
        x_BTD = layers.add_residual(x_BTD, dropout(y_BTD), adapter=self.self_attention_adapter)
        y_BTD = self.encoder_decoder_attention(
            self.pre_cross_attention_layer_norm(x_BTD),
            encoded_BSD,
            bias=None,
            segments=(segments_BT, encoder_segments_BS),
            causal=False,
            dropout=dropout,
        )
        x_BTD = layers.add_residual(x_BTD, dropout(y_BTD), adapter=self.encoder_decoder_attention_adapter)
        y_BTD = self.mlp(self.pre_mlp_layer_norm(x_BTD), dropout=dropout)
        return layers.add_residual(x_BTD, dropout(y_BTD), adapter=self.mlp_adapter)


def _layer_bias(
    layer: EncoderLayer | DecoderLayer, shared: Float[Array, "H T T"] | None, length: int
) -> Float[Array, "H T T"]:
    return shared if shared is not None else position_bias(layer, length)


def position_bias(owner: Any, length: int) -> Float[Array, "H T T"]:
    """Computes the relative position bias of `length` positions from the table of a layer or stack."""
    positions = jnp.arange(length)
    return owner.relpos_bias(positions, positions)[0]
