"""Layers of decoder-only students: their configuration, rotary positions, attention with grouped queries, the layer.

Names and shapes as in t5.py; G counts heads of keys and values, L positions of a row (source, then target).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sbs_jax import checks
from sbs_jax.student import attention, layers, partitioning
from sbs_jax.student.partitioning import constrain

# How source tokens see one another: only earlier ones, or all of their example (a prefix language model).
SOURCE_ATTENTIONS = ("causal", "bidirectional")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Architecture of a decoder-only student: Llama (SmolLM2), Qwen3, Gemma 3.

    Activations are computed in `dtype`; parameters are always float32. Every `global_every`-th layer sees all earlier
    positions; the others see those of the last `window`, and rotate by `local_rope_base`.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_kv_heads: int  # query heads share these in equal groups
    head_dim: int
    mlp_dim: int
    num_layers: int
    mlp_activations: tuple[str, ...]  # of gate and up: ("silu", "linear"), Gemma's ("gelu", "linear")
    logits_via_embedding: bool
    dropout_rate: float
    rope_base: float
    eos_id: int  # ends inputs and targets; not 0, which pads rows
    decoder_start: int  # first decoder input, which separates source and target
    dtype: str = "float32"
    layer_norm_epsilon: float = 1e-6
    source_attention: str = "causal"  # a key of SOURCE_ATTENTIONS
    qk_norm: bool = False  # norms queries and keys of each head, before they rotate (Qwen3, Gemma 3)
    post_norms: bool = False  # norms the output of attention and MLP (Gemma)
    norm_plus_one: bool = False  # a norm's parameter is added to 1 (Gemma)
    scale_embeddings: bool = False  # multiplies embedded tokens by sqrt(emb_dim) (Gemma)
    query_scale: float | None = None  # factor on queries; None: head_dim^-0.5
    rope_factor: float = 1.0  # divides the positions of layers that see all (linear scaling)
    global_every: int = 1
    window: int | None = None
    local_rope_base: float | None = None  # None: rope_base
    # Noise on the embedded source in training (NEFTune, arXiv 2310.05914: 5, 10 or 15); 0 turns it off.
    neftune_alpha: float = 0.0

    def __post_init__(self) -> None:
        # gin passes lists and does not check types.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in (
            *("vocab_size", "emb_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "num_layers"),
            *("global_every", "eos_id"),
        ):
            checks.whole_number(f"DecoderConfig.{name}", getattr(self, name), least=1)
        checks.whole_number("DecoderConfig.decoder_start", self.decoder_start, least=0)
        checks.number("DecoderConfig.dropout_rate", self.dropout_rate, least=0.0, below=1.0)
        checks.number("DecoderConfig.neftune_alpha", self.neftune_alpha, least=0.0)
        for name in ("rope_base", "rope_factor", "layer_norm_epsilon"):
            checks.number(f"DecoderConfig.{name}", getattr(self, name), above=0.0)
        for name in ("query_scale", "local_rope_base"):
            if getattr(self, name) is not None:
                checks.number(f"DecoderConfig.{name}", getattr(self, name), above=0.0)
        checks.choice("DecoderConfig.dtype", self.dtype, layers.DTYPES)
        checks.choice("DecoderConfig.source_attention", self.source_attention, SOURCE_ATTENTIONS)
        if not self.mlp_activations:
            raise ValueError("DecoderConfig.mlp_activations is empty; expected ('silu', 'linear').")
        for name in self.mlp_activations:
            checks.choice("One of DecoderConfig.mlp_activations", name, layers.ACTIVATIONS)
        if self.num_heads % self.num_kv_heads:
            near = partitioning.nearest_divisor(self.num_heads, self.num_kv_heads)
            raise ValueError(
                f"DecoderConfig has num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads}; expected a "
                f"divisor of num_heads, such as {near}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"DecoderConfig.head_dim is {self.head_dim}; expected an even number, whose halves rotate."
            )
        for name in ("eos_id", "decoder_start"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"DecoderConfig.{name} is {getattr(self, name)}; expected a token below vocab_size "
                    f"{self.vocab_size}."
                )
        if (self.window is None) != (self.global_every == 1):
            raise ValueError(
                f"DecoderConfig has window {self.window} and global_every {self.global_every}; expected a window and "
                "global_every above 1 (Gemma 3: 512 and 6), or None and 1."
            )
        if self.window is not None:
            checks.whole_number("DecoderConfig.window", self.window, least=1)

    # What all families say of themselves (families.py).
    @property
    def logits_scale(self) -> float | None:
        """Returns the factor on states before the logits: none."""
        return None

    @property
    def embedding_scale(self) -> float:
        """Returns the factor on embedded tokens."""
        return self.emb_dim**0.5 if self.scale_embeddings else 1.0

    @property
    def stack_layers(self) -> dict[str, int]:
        """Returns the number of layers of each stack."""
        return {"decoder": self.num_layers}

    @property
    def decoder_weights(self) -> int:
        """Counts the numbers in the matrices of the layers."""
        attention = 2 * self.emb_dim * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * (attention + (len(self.mlp_activations) + 1) * self.emb_dim * self.mlp_dim)

    def is_global(self, layer: int) -> bool:
        """Returns True if this layer (from 0) sees all earlier positions."""
        return (layer + 1) % self.global_every == 0

    @property
    def scale(self) -> float:
        """Returns the factor on queries."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale


Rotation = tuple[Any, Any]  # cosines and sines, float32 [.., K / 2]


def rotation(c: DecoderConfig, positions: Int[Array, "..."], *, is_global: bool) -> Rotation:
    """Computes cosines and sines of each position's angles, [.., K / 2], for one kind of layer."""
    base = c.rope_base if is_global or c.local_rope_base is None else c.local_rope_base
    frequencies_k = base ** (-np.arange(0, c.head_dim, 2) / c.head_dim) / (c.rope_factor if is_global else 1.0)
    frequencies = jnp.asarray(frequencies_k, jnp.float32).reshape((1,) * positions.ndim + (-1,))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "... H K"], by: Rotation) -> Float[Array, "... H K"]:
    """Rotates pairs (i, i + K / 2) of each head's values, in float32; all heads of a position by the same angles."""
    cosine, sine = (each[..., None, :] for each in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


class Attention(layers.Attention):
    """Attention with rotary positions and grouped queries."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        def inward(heads: int) -> layers.Dense:
            shape, axes = (c.emb_dim, heads * c.head_dim), ("embed", "joined_kv")
            return layers.Dense(shape, axes=axes, std=c.emb_dim**-0.5, dtype=c.dtype, rngs=rngs)

        self.query, self.key, self.value = inward(c.num_heads), inward(c.num_kv_heads), inward(c.num_kv_heads)
        joined = c.num_heads * c.head_dim
        self.out = layers.Dense(
            (joined, c.emb_dim), axes=("joined_kv", "embed"), std=joined**-0.5, dtype=c.dtype, rngs=rngs
        )
        if c.qk_norm:
            self.query_norm, self.key_norm = (norm_of(c, c.head_dim, axis="kv") for _ in range(2))
        self.config = c

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        *,
        by: Rotation,
        order: attention.Order,
        segments_BL: Int[Array, "B L"],
        dropout: layers.Dropout,
    ) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]]:
        """Attends within segments, in the given order; also returns keys and values, a prefix's left out."""
        c = self.config
        q_BLHK = self.finished(self._heads(self.query, x_BLD, c.num_heads, dropout), "query", by) * c.scale
        k_BLGK = self.finished(self._heads(self.key, x_BLD, c.num_kv_heads, dropout), "key", by)
        v_BLGK = self._heads(self.value, x_BLD, c.num_kv_heads, dropout)
        found = k_BLGK, v_BLGK
        before = 0
        if self.prefix is not None:
            k_BLGK, v_BLGK = self.prefix.prepend_to(k_BLGK, v_BLGK)
            before = k_BLGK.shape[1] - x_BLD.shape[1]
        v_BLGK = dropout(v_BLGK, shared=-1)
        shared = c.num_heads // c.num_kv_heads
        k_BLHK, v_BLHK = (jnp.repeat(each, shared, axis=2) if shared > 1 else each for each in (k_BLGK, v_BLGK))
        y_BLHK = attention.attend(
            q_BLHK, k_BLHK, v_BLHK, None, (segments_BL, segments_BL), causal=False, prefix=before, order=order
        )
        return self.out(y_BLHK, contract=2, dropout=dropout), found

    def _heads(
        self, dense: layers.Dense, x_BLD: Float[Array, "B L D"], heads: int, dropout: layers.Dropout
    ) -> Float[Array, "B L H K"]:
        divides = heads % partitioning.shard_count("activation_heads") == 0
        axes = ("batch", "length", "activation_heads" if divides else None, None)
        projected = dense(x_BLD, split=(heads, self.config.head_dim), dropout=dropout)
        return checkpoint_name(constrain(projected, axes), "projected")

    def finished(self, x: Float[Array, "... H K"], kind: str, by: Rotation) -> Float[Array, "... H K"]:
        """Norms and rotates projected queries or keys."""
        return rotate(getattr(self, f"{kind}_norm")(x) if self.config.qk_norm else x, by)


def norm_of(c: DecoderConfig, width: int | None = None, *, axis: str = "embed") -> layers.RMSNorm:
    """Builds a norm, by default of the model's width."""
    return layers.RMSNorm(
        width or c.emb_dim, epsilon=c.layer_norm_epsilon, dtype=c.dtype, plus_one=c.norm_plus_one, axis=axis
    )


class DecoderLayer(nnx.Module):
    """Self-attention, then the MLP; each reads its normed input and is added to that input, with Gemma after a norm."""

    self_attention_adapter: Any = None  # adapter slots: one after each sub-layer
    mlp_adapter: Any = None
    post_self_attention_layer_norm: layers.RMSNorm | None = None
    post_mlp_layer_norm: layers.RMSNorm | None = None

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.pre_self_attention_layer_norm = norm_of(c)
        self.self_attention = Attention(c, rngs=rngs)
        self.pre_mlp_layer_norm = norm_of(c)
        self.mlp = layers.MLP(c.emb_dim, c.mlp_dim, activations=c.mlp_activations, dtype=c.dtype, rngs=rngs)
        if c.post_norms:
            self.post_self_attention_layer_norm, self.post_mlp_layer_norm = norm_of(c), norm_of(c)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        *,
        by: Rotation,
        order: attention.Order,
        segments_BL: Int[Array, "B L"],
        dropout: layers.Dropout,
    ) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]]:
        """Runs the layer; also returns its keys and values."""
        y_BLD = self.pre_self_attention_layer_norm(x_BLD)
        y_BLD, found = self.self_attention(y_BLD, by=by, order=order, segments_BL=segments_BL, dropout=dropout)
        y_BLD = _after(self.post_self_attention_layer_norm, y_BLD)
        x_BLD = layers.add_residual(x_BLD, dropout(y_BLD), adapter=self.self_attention_adapter)
        y_BLD = _after(self.post_mlp_layer_norm, self.mlp(self.pre_mlp_layer_norm(x_BLD), dropout=dropout))
        return layers.add_residual(x_BLD, dropout(y_BLD), adapter=self.mlp_adapter), found


def _after(norm: layers.RMSNorm | None, y_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    return y_BLD if norm is None else norm(y_BLD)
