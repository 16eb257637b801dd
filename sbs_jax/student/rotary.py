"""Layers that tell positions by rotation (Llama, Qwen3, Gemma, T5Gemma): settings, attention, the layer, the stack.

Names and shapes as in t5.py; G counts heads of keys and values, L positions of a row.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from sbs_jax import checks
from sbs_jax.student import attention, layers, partitioning, stacks, stepping
from sbs_jax.student.partitioning import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Settings that the architectures of these families have in common.

    Activations are computed in `dtype`; parameters are always float32. Every `global_every`-th layer sees all
    positions; the others see those within `window`, and rotate by `local_rope_base`.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_kv_heads: int  # query heads share these in equal groups
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple[str, ...]  # of gate and up: ("silu", "linear"), Gemma's ("gelu", "linear")
    logits_via_embedding: bool
    dropout_rate: float
    rope_base: float
    eos_id: int  # ends inputs and targets; not 0, which pads rows
    decoder_start: int  # first decoder input
    dtype: str = "float32"
    layer_norm_epsilon: float = 1e-6
    qk_norm: bool = False  # norms queries and keys of each head, before they rotate (Qwen3, Gemma 3)
    post_norms: bool = False  # norms the output of attention and MLP (Gemma)
    norm_plus_one: bool = False  # a norm's parameter is added to 1 (Gemma)
    scale_embeddings: bool = False  # multiplies embedded tokens by sqrt(emb_dim) (Gemma)
    query_scale: float | None = None  # factor on queries; None: head_dim^-0.5
    rope_factor: float = 1.0  # divides the positions of layers that see all (linear scaling)
    global_every: int = 1
    window: int | None = None
    local_rope_base: float | None = None  # None: rope_base
    attention_cap: float | None = None  # soft cap of attention scores (Gemma 2: 50); None: none
    logits_cap: float | None = None  # soft cap of logits (Gemma 2: 30)
    # Noise on the embedded source in training (NEFTune, arXiv 2310.05914: 5, 10 or 15); 0 turns it off.
    neftune_alpha: float = 0.0

    def __post_init__(self) -> None:
        # gin passes lists and does not check types.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        kind = type(self).__name__
        for name in (
            *("vocab_size", "emb_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "global_every", "eos_id"),
            *self._layer_counts,
        ):
            checks.whole_number(f"{kind}.{name}", getattr(self, name), least=1)
        checks.whole_number(f"{kind}.decoder_start", self.decoder_start, least=0)
        checks.number(f"{kind}.dropout_rate", self.dropout_rate, least=0.0, below=1.0)
        checks.number(f"{kind}.neftune_alpha", self.neftune_alpha, least=0.0)
        for name in ("rope_base", "rope_factor", "layer_norm_epsilon"):
            checks.number(f"{kind}.{name}", getattr(self, name), above=0.0)
        for name in ("query_scale", "local_rope_base", "attention_cap", "logits_cap"):
            if getattr(self, name) is not None:
                checks.number(f"{kind}.{name}", getattr(self, name), above=0.0)
        checks.choice(f"{kind}.dtype", self.dtype, layers.DTYPES)
        if not self.mlp_activations:
            raise ValueError(f"{kind}.mlp_activations is empty; expected ('silu', 'linear').")
        for name in self.mlp_activations:
            checks.choice(f"One of {kind}.mlp_activations", name, layers.ACTIVATIONS)
        if self.num_heads % self.num_kv_heads:
            near = partitioning.nearest_divisor(self.num_heads, self.num_kv_heads)
            raise ValueError(
                f"{kind} has num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads}; expected a divisor of "
                f"num_heads, such as {near}."
            )
        if self.head_dim % 2:
            raise ValueError(f"{kind}.head_dim is {self.head_dim}; expected an even number, whose halves rotate.")
        for name in ("eos_id", "decoder_start"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"{kind}.{name} is {getattr(self, name)}; expected a token below vocab_size {self.vocab_size}."
                )
        if (self.window is None) != (self.global_every == 1):
            raise ValueError(
                f"{kind} has window {self.window} and global_every {self.global_every}; expected a window and "
                "global_every above 1 (Gemma 3: 512 and 6), or None and 1."
            )
        if self.window is not None:
            checks.whole_number(f"{kind}.window", self.window, least=1)

    @property
    def _layer_counts(self) -> Sequence[str]:
        """Returns the names of the fields that count layers."""
        raise NotImplementedError

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
        raise NotImplementedError

    @property
    def attention_weights(self) -> int:
        """Counts the numbers in the matrices of an attention."""
        return 2 * self.emb_dim * (self.num_heads + self.num_kv_heads) * self.head_dim

    @property
    def mlp_weights(self) -> int:
        """Counts the numbers in the matrices of an MLP."""
        return (len(self.mlp_activations) + 1) * self.emb_dim * self.mlp_dim

    def is_global(self, layer: int) -> bool:
        """Returns True if this layer (from 0) sees all positions."""
        return (layer + 1) % self.global_every == 0

    @property
    def scale(self) -> float:
        """Returns the factor on queries."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale


Rotation = tuple[Any, Any]  # cosines and sines, float32 [.., K / 2]
Pair = tuple[Float[Array, "B S G K"], Float[Array, "B S G K"]]  # keys and values


def rotation(c: RotaryConfig, positions: Int[Array, "..."], *, is_global: bool) -> Rotation:
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


def norm_of(c: RotaryConfig, width: int | None = None, *, axis: str = "embed") -> layers.RMSNorm:
    """Builds a norm, by default of the model's width."""
    return layers.RMSNorm(
        width or c.emb_dim, epsilon=c.layer_norm_epsilon, dtype=c.dtype, plus_one=c.norm_plus_one, axis=axis
    )


def within(segments_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Numbers the tokens of each segment from 0: segments [1, 1, 2, 2, 2, 0] give [0, 1, 0, 1, 2, 0]."""
    index_BL = jnp.broadcast_to(jnp.arange(segments_BL.shape[1])[None], segments_BL.shape)
    begins_BL = jnp.pad(segments_BL[:, 1:] != segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index_BL - jax.lax.cummax(jnp.where(begins_BL, index_BL, 0), axis=1)


def started(tokens_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"], *, c: RotaryConfig) -> Int[Array, "B T"]:
    """Replaces the first decoder input of each example by `decoder_start`."""
    return jnp.where(within(segments_BT) == 0, c.decoder_start, tokens_BT)


class Attention(layers.Attention):
    """Attention with grouped queries: over a row that rotates, over a source that does not, or over both at once."""

    def __init__(self, c: RotaryConfig, *, rngs: nnx.Rngs) -> None:
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
        by: Rotation | None,
        keys_of: Sequence[tuple[Float[Array, "B _ D"], Rotation | None]],
        order: attention.Order | None,
        segments: tuple[Int[Array, "B L"], Int[Array, "B S"]],
        dropout: layers.Dropout,
    ) -> tuple[Float[Array, "B L D"], Pair]:
        """Attends within segments, in the given order; also returns keys and values, a prefix's left out.

        Keys are those of all `keys_of` in turn, each rotated by its own angles; `segments` are of queries and keys.
        """
        c = self.config
        q_BLHK = self.finished(self._heads(self.query, x_BLD, c.num_heads, dropout), "query", by) * c.scale
        pairs = [self._pair(keys_BSD, angles, dropout) for keys_BSD, angles in keys_of]
        k_BSGK, v_BSGK = found = pairs[0] if len(pairs) == 1 else _joined(pairs)
        before = 0
        if self.prefix is not None:
            k_BSGK, v_BSGK = self.prefix.prepend_to(k_BSGK, v_BSGK)
            before = k_BSGK.shape[1] - found[0].shape[1]
        v_BSGK = dropout(v_BSGK, shared=-1)
        shared = c.num_heads // c.num_kv_heads
        k_BSHK, v_BSHK = (jnp.repeat(each, shared, axis=2) if shared > 1 else each for each in (k_BSGK, v_BSGK))
        y_BLHK = attention.attend(
            *(q_BLHK, k_BSHK, v_BSHK, None, segments),
            causal=False,
            prefix=before,
            order=order,
            cap=c.attention_cap,
        )
        return self.out(y_BLHK, contract=2, dropout=dropout), found

    def _pair(self, x_BSD: Float[Array, "B S D"], by: Rotation | None, dropout: layers.Dropout) -> Pair:
        heads = self.config.num_kv_heads
        k_BSGK = self.finished(self._heads(self.key, x_BSD, heads, dropout), "key", by)
        return k_BSGK, self._heads(self.value, x_BSD, heads, dropout)

    def source_keys(self, encoded_BPD: Float[Array, "B P D"]) -> list[Float[Array, "B P J"]]:
        """Returns keys and values of a source, which do not rotate, as all decoding steps read them."""
        dropout = layers.Dropout(0.0, None)
        return [each.reshape(*each.shape[:2], -1) for each in self._pair(encoded_BPD, None, dropout)]

    def _heads(
        self, dense: layers.Dense, x_BLD: Float[Array, "B L D"], heads: int, dropout: layers.Dropout
    ) -> Float[Array, "B L H K"]:
        divides = heads % partitioning.shard_count("activation_heads") == 0
        axes = ("batch", "length", "activation_heads" if divides else None, None)
        projected = dense(x_BLD, split=(heads, self.config.head_dim), dropout=dropout)
        return checkpoint_name(constrain(projected, axes), "projected")

    def finished(self, x: Float[Array, "... H K"], kind: str, by: Rotation | None) -> Float[Array, "... H K"]:
        """Norms and rotates projected queries or keys."""
        x = getattr(self, f"{kind}_norm")(x) if self.config.qk_norm else x
        return x if by is None else rotate(x, by)

    def placed(self, kind: str, *, is_global: bool | None) -> stepping.Placed:
        """Returns the product of a position's queries or keys, normed and rotated (None: not rotated)."""
        c = self.config
        product = stepping.inward(getattr(self, kind), c)

        def project(y_BND: Array, places_B: Array) -> Array:
            x_BNJ = product(y_BND)
            x_BNHK = x_BNJ.reshape(*x_BNJ.shape[:2], -1, c.head_dim)
            by = None if is_global is None else rotation(c, places_B[:, None], is_global=is_global)
            x_BNHK = self.finished(x_BNHK, kind, by)
            return (x_BNHK * c.scale if kind == "query" else x_BNHK).reshape(x_BNJ.shape)

        return project


def _joined(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Joins keys and values along the positions, of which each pair may have another number."""
    keys, values = zip(*pairs, strict=True)
    return jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)


class Layer(nnx.Module):
    """Self-attention, then the MLP; each reads its normed input and is added to that input, with Gemma after a norm."""

    self_attention_adapter: Any = None  # adapter slots: one after each sub-layer
    mlp_adapter: Any = None
    post_self_attention_layer_norm: layers.RMSNorm | None = None
    post_mlp_layer_norm: layers.RMSNorm | None = None

    def __init__(self, c: RotaryConfig, *, rngs: nnx.Rngs) -> None:
        self.pre_self_attention_layer_norm = norm_of(c)
        self.self_attention = Attention(c, rngs=rngs)
        self.pre_mlp_layer_norm = norm_of(c)
        self.mlp = layers.MLP(c.emb_dim, c.mlp_dim, activations=c.mlp_activations, dtype=c.dtype, rngs=rngs)
        if c.post_norms:
            self.post_self_attention_layer_norm, self.post_mlp_layer_norm = norm_of(c), norm_of(c)

    def __call__(
        self, x_BLD: Float[Array, "B L D"], *, dropout: layers.Dropout, **attending: Any
    ) -> tuple[Float[Array, "B R D"], Pair]:
        """Runs the layer; other arguments are those of `self_attend`. Also returns its keys and values."""
        x_BLD, found = self.self_attend(x_BLD, dropout=dropout, **attending)
        return self.after_attention(x_BLD, dropout), found

    def self_attend(
        self,
        x_BLD: Float[Array, "B L D"],
        *,
        by: Rotation,
        order: attention.Order,
        segments: tuple[Int[Array, "B L"], Int[Array, "B S"]],
        dropout: layers.Dropout,
        source_BPD: Float[Array, "B P D"] | None = None,
        first: int = 0,
    ) -> tuple[Float[Array, "B R D"], Pair]:
        """Runs the attention alone; also returns its keys and values.

        A source's keys come after the row's, in one softmax. Only the R positions from `first` on are computed; those
        before serve as keys and values.
        """
        y_BLD = self.pre_self_attention_layer_norm(x_BLD)
        keys_of = [(y_BLD, by)] if source_BPD is None else [(y_BLD, by), (source_BPD, None)]
        if first:
            x_BLD, y_BLD, by = jax.tree.map(lambda each: each[:, first:], (x_BLD, y_BLD, by))
            order, segments = order.from_query(first), (segments[0][:, first:], segments[1])
        y_BLD, found = self.self_attention(
            y_BLD, by=by, keys_of=keys_of, order=order, segments=segments, dropout=dropout
        )
        y_BLD = normed(self.post_self_attention_layer_norm, y_BLD)
        return layers.add_residual(x_BLD, dropout(y_BLD), adapter=self.self_attention_adapter), found

    def after_attention(self, x_BLD: Float[Array, "B L D"], dropout: layers.Dropout) -> Float[Array, "B L D"]:
        """Runs the MLP."""
        y_BLD = normed(self.post_mlp_layer_norm, self.mlp(self.pre_mlp_layer_norm(x_BLD), dropout=dropout))
        return layers.add_residual(x_BLD, dropout(y_BLD), adapter=self.mlp_adapter)

    def step_mlp(self, c: RotaryConfig) -> stepping.Product:
        """Describes the MLP for cached decoding."""
        return stepping.mlp(
            self.mlp, c, before=self.pre_mlp_layer_norm, after=[self.post_mlp_layer_norm, self.mlp_adapter]
        )

    def step_attention(
        self,
        c: RotaryConfig,
        number: int,
        source: stepping.Source | None,
        *,
        length: int,
        beams: int,
        window: int | None,
    ) -> stepping.Attending:
        """Describes the attention over own keys, and a source's, for cached decoding; `window` also hides those."""
        prefix = stepping.prefix_of(self.self_attention) if source is None else None
        own, is_global = self.self_attention, c.is_global(number)
        bias_TP = stepping.causal(length, window=None if is_global else c.window)
        return stepping.Attending(
            norm=stepping.norm(self.pre_self_attention_layer_norm),
            query=own.placed("query", is_global=is_global),
            out=stepping.outward(
                *(own.out, c), after=[self.post_self_attention_layer_norm, self.self_attention_adapter]
            ),
            own=stepping.Own(
                key=own.placed("key", is_global=is_global),
                value=stepping.inward(own.value, c),
                bias=stepping.pad_bias(jnp.repeat(bias_TP, beams, axis=-1)[:, None, :], prefix),
                prefix=prefix,
            ),
            source=source,
            window=window,
        )


def normed(norm: layers.RMSNorm | None, y_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Applies a norm, if there is one."""
    return y_BLD if norm is None else norm(y_BLD)


def source_of(
    module: Attention, pair: Sequence[Float[Array, "B P J"]], segments_BP: Int[Array, "B P"], *, c: RotaryConfig
) -> stepping.Source:
    """Arranges a source's keys and values for cached decoding, those of an attention's prefix first."""
    prefix = stepping.prefix_of(module)
    if prefix is not None:
        pair = [stacks.prepend(first, rest) for first, rest in zip(prefix, pair, strict=True)]
    keys, values = (stepping.layout(each_BPJ, c.num_kv_heads) for each_BPJ in pair)
    return stepping.Source(keys, values, stepping.pad_bias(stepping.source_bias(segments_BP), prefix))


class Stack(nnx.Module):
    """Base of stacks whose layers are local or global."""

    name: str  # of the stack, as in the configuration's stack_layers
    layers: Any
    config: Any

    def __init__(self, c: RotaryConfig, stacked: Sequence[nnx.Module]) -> None:
        self.layers = nnx.List(stacked)
        self.config = c
        self.dropout_rate = c.dropout_rate
        self.remat = "none"

    def run(
        self,
        x_BLD: Float[Array, "B L D"],
        *,
        positions_BL: Int[Array, "B L"],
        reach: tuple[int, int],
        order: attention.Order,
        dropout_key: Key[Array, ""] | None,
        keep: bool = False,
        first: int = 0,
        **of_layer: Any,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """Runs the layers, before the final norm; with `keep`, also returns each layer's keys and values.

        `reach` are the distances behind and ahead that end the window of local layers; `of_layer` goes to every layer.
        States before the position `first` are not needed: the last of unrolled layers leaves them out.
        """
        c = self.config
        # One kind of layer, or the two kinds (local, global) in this order.
        kinds = (True,) if c.window is None else (False, True)
        tables = jax.tree.map(
            lambda *each: jnp.stack(each), *(rotation(c, positions_BL, is_global=kind) for kind in kinds)
        )
        count = c.stack_layers[self.name]
        kind_of = np.array([kinds.index(c.is_global(layer)) for layer in range(count)], np.int32)
        farthest = jnp.iinfo(jnp.int32).max

        def call(layer: Any, x_BLD: Array, dropout: layers.Dropout, kind: Any, **last: Any) -> tuple[Array, Any]:
            by: Rotation = jax.tree.map(lambda table: table[kind], tables)
            window = None if c.window is None else jnp.asarray((reach, (farthest, farthest)), jnp.int32)[kind]
            seen = dataclasses.replace(order, window=window)
            x_BLD, found = layer(x_BLD, by=by, order=seen, dropout=dropout, **of_layer, **last)
            return x_BLD, found if keep else None

        dropout = layers.Dropout(self.dropout_rate, dropout_key)
        last = functools.partial(call, first=first) if first else None
        return stacks.run_layers(self, dropout(x_BLD), call, dropout_key=dropout_key, each=kind_of, last=last)
