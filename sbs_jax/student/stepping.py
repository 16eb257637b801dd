"""Cached decoding: T5's decoder one target position at a time.

Letters as in t5.py, and

    N targets of a row (its beams)   J joined heads (H * K)   M queries of a row (N * H)   P cached keys (T * N)

Everything that does not depend on the position is computed once, before the loop: weights in the dtype of the
computation, the position bias, and keys and values of the source, which all beams of a row share. The target's cache
keeps each key where it was first written. When beams are reordered no key moves; a mask gives the keys of the row that
each beam may see.

The memory layout of keys and values is the platform's fastest: on a TPU all heads of a key side by side, elsewhere head
by head (`_layout`).
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from sbs_jax.student import attention, layers, partitioning, t5, t5_layers
from sbs_jax.student.partitioning import constrain

_Product = Callable[[Float[Array, "B N I"]], Float[Array, "B N O"]]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Values of a decoder layer that every position needs. Norms and bias are float32, others have the model's dtype.

    A `_Product` multiplies the last axis by a weight.
    """

    self_norm: jax.Array  # [D]
    self_query: _Product  # D to J
    self_key: _Product
    self_value: _Product
    self_out: _Product  # J to D, with the adapter after it
    self_prefix: tuple[jax.Array, jax.Array] | None  # keys and values [X, J] before all others
    cross_norm: jax.Array  # [D]
    cross_query: _Product
    cross: "_Pair"  # keys and values of the source, after those of a prefix
    cross_bias: jax.Array  # [B, 1, 1, S]
    cross_out: _Product
    mlp_norm: jax.Array  # [D]
    mlp_in: tuple[_Product, ...]  # D to F, one per activation
    mlp_out: _Product  # F to D
    bias: jax.Array  # [T, H, P], for a query at T: relative position bias, and MASKED on keys of later positions


_STATE_AXES = ("batch", None, "activation_embed")

# Keys and values, [B, P, J] or, head by head, [B, H, P, K]. Typed Any because JAX transformations replace the arrays.
_Pair = tuple[Any, Any]
Cache = tuple[_Pair, ...]  # one pair per layer, beginning with the layer's prefix


class Stepper:
    """Step-by-step decoder of one batch: `beams` targets for each row, of up to `length` tokens."""

    def __init__(
        self,
        model: t5.T5,
        encoded_BPD: Float[Array, "B P D"],
        encoder_segment_ids_BS: Int[Array, "B S"],
        *,
        length: int,
        beams: int = 1,
    ) -> None:
        self._config, self._embed = model.config, model.token_embedder
        self._length, self._beams = length, beams
        self._final_norm_D = constrain(model.decoder.decoder_norm.scale[...], (None,))
        segments_BP = model.attended_segments(encoder_segment_ids_BS)
        self._layers = _prepare_layers(model, encoded_BPD, segments_BP, length=length, beams=beams)
        tied = model.config.logits_via_embedding
        table_DV = model.token_embedder.embedding[...].T if tied else model.logits_dense.kernel[...]
        product_dtype = (model.token_embedder if tied else model.logits_dense).product_dtype
        self.table_DV = _prepare(table_DV, (None, "vocab"), model.config, product_dtype=product_dtype)

    def empty_cache(self) -> Cache:
        """Returns a cache without any token."""
        rows, joined = len(self._layers[0].cross[0]), self._config.num_heads * self._config.head_dim
        empty_BPJ = jnp.zeros((rows, self._length * self._beams, joined), self._config.dtype)

        def after(prefix_XJ: jax.Array | None) -> jax.Array:
            cache_BPJ = empty_BPJ if prefix_XJ is None else t5.prepend(prefix_XJ, empty_BPJ)
            return _layout(cache_BPJ, self._config.num_heads)

        prefixes = [layer.self_prefix or (None, None) for layer in self._layers]
        return tuple((after(keys_XJ), after(values_XJ)) for keys_XJ, values_XJ in prefixes)

    def take_rows(self, rows_B: Int[Array, "B"]) -> "Stepper":
        """Keeps only these rows of the batch; the caller indexes the cache the same way."""
        fewer = copy.copy(self)
        fewer._layers = [
            dataclasses.replace(w, cross=(w.cross[0][rows_B], w.cross[1][rows_B]), cross_bias=w.cross_bias[rows_B])
            for w in self._layers
        ]
        return fewer

    def step(
        self,
        tokens_BN: Int[Array, "B N"],
        cache: Cache,
        *,
        position: Int[Array, ""],
        visible_BNP: Bool[Array, "#B N P"] | None = None,
    ) -> tuple[Float[Array, "B N D"], Cache]:
        """Decodes `tokens` at `position`: returns states and the updated cache.

        The next token's logits are `states @ table_DV`; states have the table's dtype. The key of beam n at position t
        has index `t * N + n`. Without `visible`, a query sees all keys up to its position.
        """
        c = self._config
        x_BND = constrain(self._embed(tokens_BN), _STATE_AXES)
        hidden_BNP = None if visible_BNP is None else jnp.where(visible_BNP, 0.0, attention.MASKED)
        updated = []
        for w, (keys, values) in zip(self._layers, cache, strict=True):
            # Self-attention: keys and values of this position go into the cache, after a prefix.
            y_BND = self._norm(x_BND, w.self_norm)
            before = 0 if w.self_prefix is None else len(w.self_prefix[0])
            at, axis = before + position * self._beams, keys.ndim - 2
            new_key, new_value = (_layout(product(y_BND), c.num_heads) for product in (w.self_key, w.self_value))
            keys = jax.lax.dynamic_update_slice_in_dim(keys, new_key, at, axis=axis)
            values = jax.lax.dynamic_update_slice_in_dim(values, new_value, at, axis=axis)
            updated.append((keys, values))
            bias_BNHP = jax.lax.dynamic_index_in_dim(w.bias, position, axis=0)[:, None]
            if hidden_BNP is not None:
                bias_BNHP = bias_BNHP + jnp.pad(hidden_BNP, ((0, 0), (0, 0), (before, 0)))[:, :, None]
            y_BNJ = attend(w.self_query(y_BND), keys, values, bias_BNHP=bias_BNHP, heads=c.num_heads)
            x_BND += w.self_out(y_BNJ)
            # Attention over the source.
            q_BNJ = w.cross_query(self._norm(x_BND, w.cross_norm))
            y_BNJ = attend(q_BNJ, *w.cross, bias_BNHP=w.cross_bias, heads=c.num_heads)
            x_BND += w.cross_out(y_BNJ)
            # MLP.
            y_BND = self._norm(x_BND, w.mlp_norm)
            inner = [product(y_BND) for product in w.mlp_in]
            gated = [layers.ACTIVATIONS[name](branch) for name, branch in zip(c.mlp_activations, inner, strict=True)]
            x_BND = constrain(x_BND + w.mlp_out(math.prod(gated[1:], start=gated[0])), _STATE_AXES)
        y_BND = self._norm(x_BND, self._final_norm_D)
        y_BND = y_BND * c.emb_dim**-0.5 if c.logits_via_embedding else y_BND
        return y_BND.astype(self.table_DV.dtype), tuple(updated)

    def _norm(self, x_BND: Float[Array, "B N D"], scale_D: Float[Array, "D"]) -> Float[Array, "B N D"]:
        return layers.rms_norm(x_BND, scale_D, epsilon=self._config.layer_norm_epsilon, dtype=self._config.dtype)


def _prepare_layers(
    model: t5.T5, encoded_BPD: Float[Array, "B P D"], segments_BP: Int[Array, "B P"], *, length: int, beams: int
) -> list[_Layer]:
    """Computes everything that does not depend on the position, for every decoder layer."""
    positions = jnp.arange(length)
    future_TP = jnp.where(positions[None, :] > positions[:, None], attention.MASKED, 0.0)

    def position_bias(module: t5_layers.RelativePositionBias) -> Float[Array, "T H P"]:
        bias_HTP = module(positions, positions)[0] + future_TP[None]
        return jnp.repeat(bias_HTP.swapaxes(0, 1), beams, axis=-1)

    def inward(dense: layers.Dense, axis: str = "joined_kv") -> _Product:
        return _multiplier(dense, (None, axis), model.config)

    def outward(dense: layers.Dense, adapter: Any, axis: str = "joined_kv") -> _Product:
        product = _multiplier(dense, (axis, None), model.config)
        return product if adapter is None else lambda x: adapter(product(x))

    def source(dense: layers.Dense, prefix_XJ: jax.Array | None) -> jax.Array:
        found_BPJ = dense(encoded_BPD)
        if prefix_XJ is not None:
            found_BPJ = t5.prepend(prefix_XJ, found_BPJ)
        return _layout(found_BPJ, model.config.num_heads)

    source_bias = jnp.where(segments_BP == 1, 0.0, attention.MASKED)[:, None, None, :]
    found, shared = [], None
    if hasattr(model.decoder, "relpos_bias"):
        shared = position_bias(model.decoder.relpos_bias)
    for layer in model.decoder.layers:
        self_attention, cross_attention = layer.self_attention, layer.encoder_decoder_attention
        branches = [getattr(layer.mlp, name) for name in layer.mlp.names]
        self_prefix, cross_prefix = (
            None if each.prefix is None else (each.prefix.key[...], each.prefix.value[...])
            for each in (self_attention, cross_attention)
        )
        bias_THP = position_bias(layer.relpos_bias) if shared is None else shared
        cross_keys, cross_values = cross_prefix or (None, None)
        found.append(
            _Layer(
                self_norm=constrain(layer.pre_self_attention_layer_norm.scale[...], (None,)),
                self_query=inward(self_attention.query),
                self_key=inward(self_attention.key),
                self_value=inward(self_attention.value),
                self_out=outward(self_attention.out, layer.self_attention_adapter),
                self_prefix=self_prefix,
                cross_norm=constrain(layer.pre_cross_attention_layer_norm.scale[...], (None,)),
                cross_query=inward(cross_attention.query),
                cross=(source(cross_attention.key, cross_keys), source(cross_attention.value, cross_values)),
                cross_bias=_pad_bias(source_bias, cross_prefix),
                cross_out=outward(cross_attention.out, layer.encoder_decoder_attention_adapter),
                mlp_norm=constrain(layer.pre_mlp_layer_norm.scale[...], (None,)),
                mlp_in=tuple(inward(branch, "mlp") for branch in branches),
                mlp_out=outward(layer.mlp.wo, layer.mlp_adapter, "mlp"),
                bias=_pad_bias(bias_THP, self_prefix),
            )
        )
    return found


def _pad_bias(bias: Float[Array, "... P"], prefix: tuple[jax.Array, jax.Array] | None) -> Float[Array, "... Q"]:
    """Pads the bias with 0 for a prefix's keys, which come before the others."""
    return bias if prefix is None else jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(len(prefix[0]), 0)])


def _multiplier(dense: layers.Dense, axes: tuple[str | None, str | None], c: t5.T5Config) -> _Product:
    """Returns the function that multiplies by a dense layer's weight at every position.

    Adapters are merged into the weight and a quantized weight is unpacked, once, before the loop. If the decoder is too
    large for that (`_is_gathered`), every position repeats this.
    """
    adapted = not isinstance(dense.kernel, nnx.Param) or any(
        each is not None for each in (dense.lora, dense.in_scale, dense.out_scale)
    )
    if adapted and not _is_gathered(c):
        return dense
    scale_O = None
    if dense.product_dtype is not None and not isinstance(dense.kernel, nnx.Param):
        kernel_IO, scale_O = dense.kernel.factors()  # prediction/precision.py sets it only without adapters
    else:
        kernel_IO = dense.merged()
    kernel_IO = _prepare(kernel_IO, axes, c, product_dtype=dense.product_dtype)
    bias_O = None if dense.bias is None else dense.bias[...].astype(c.dtype)

    def multiply(x_BNI: jax.Array) -> jax.Array:
        y_BNO = _matmul(x_BNI, kernel_IO)
        if scale_O is not None:
            y_BNO = y_BNO * scale_O[None, None, :].astype(c.dtype)
        return y_BNO if bias_O is None else y_BNO + bias_O[None, None, :]

    return multiply


# Decoder weights up to this many bytes per device are gathered before the loop: XL has 2.7 GiB in bfloat16.
MAX_GATHERED_BYTES = 4 * 2**30


def _prepare(
    kernel_IO: Num[Array, "I O"], axes: tuple[str | None, str | None], c: t5.T5Config, *, product_dtype: str | None
) -> Float[Array, "I O"]:
    """Casts a weight to the dtype of the computation and, if the decoder fits, gathers its `fsdp` shards once.

    The weights of a larger decoder stay sharded, and the compiler moves the states of all rows at every position.
    """
    kernel_IO = kernel_IO.astype(product_dtype or c.dtype)
    return constrain(kernel_IO, axes) if _is_gathered(c) else kernel_IO


def _is_gathered(c: t5.T5Config) -> bool:
    """Returns True if each device has room for the decoder's weights without `fsdp`."""
    attention, mlp = 6 * c.emb_dim * c.num_heads * c.head_dim, (len(c.mlp_activations) + 1) * c.emb_dim * c.mlp_dim
    weights = c.num_decoder_layers * (attention + mlp) + c.emb_dim * c.vocab_size
    return weights * jnp.dtype(c.dtype).itemsize // partitioning.shard_count("joined_kv") <= MAX_GATHERED_BYTES


def _matmul(x_BNI: Float[Array, "B N I"], kernel_IO: Float[Array, "I O"]) -> Float[Array, "B N O"]:
    x_MI = x_BNI.reshape(-1, x_BNI.shape[-1]).astype(kernel_IO.dtype)
    return jnp.matmul(x_MI, kernel_IO, preferred_element_type=x_BNI.dtype).reshape(*x_BNI.shape[:2], -1)


def _layout(x_BPJ: Float[Array, "B P J"], heads: int) -> jax.Array:
    """Arranges keys or values for the platform: [B, P, J] on a TPU, [B, H, P, K] elsewhere.

    Elsewhere each row and head has its own product, and its keys are adjacent in memory: 0.5 ms instead of 4.6 for 64
    rows of 70 keys on a CPU (docs/speed.md). It is the layout of a loop's state, so it is chosen while tracing.
    """
    if partitioning.platform() == "tpu":
        return constrain(x_BPJ, ("batch", None, "joined_kv"))
    x_BHPK = x_BPJ.reshape(*x_BPJ.shape[:2], heads, -1).swapaxes(1, 2)
    divides = heads % partitioning.shard_count("joined_kv") == 0
    return constrain(x_BHPK, ("batch", "joined_kv" if divides else None, None, None))


def attend(
    q_BNJ: Float[Array, "B N J"],
    keys: Float[Array, "B *H P X"],
    values: Float[Array, "B *H P X"],
    *,
    bias_BNHP: Float[Array, "#B #N #H P"],
    heads: int,
) -> Float[Array, "B N J"]:
    """Attends with a few queries per row to keys and values in the layout of `_layout`; softmax in float32."""
    if keys.ndim == 3:
        return _attend_jointly(q_BNJ, keys, values, bias_BNHP=bias_BNHP, heads=heads)
    rows, beams, joined = q_BNJ.shape
    q_BHNK = q_BNJ.reshape(rows, beams, heads, -1).swapaxes(1, 2)
    scores_BHNP = jnp.einsum("bhnk,bhpk->bhnp", q_BHNK, keys, preferred_element_type=jnp.float32)
    weights_BHNP = jax.nn.softmax(scores_BHNP + bias_BNHP.swapaxes(1, 2), axis=-1).astype(q_BNJ.dtype)
    return jnp.einsum("bhnp,bhpk->bhnk", weights_BHNP, values).swapaxes(1, 2).reshape(rows, beams, joined)


def _attend_jointly(
    q_BNJ: Float[Array, "B N J"],
    k_BPJ: Float[Array, "B P J"],
    v_BPJ: Float[Array, "B P J"],
    *,
    bias_BNHP: Float[Array, "#B #N #H P"],
    heads: int,
) -> Float[Array, "B N J"]:
    """Attends with all heads of a row in one product, in which each query is zero outside its head's columns.

    For a TPU: a product per head would have a few vectors on one side, which its matrix unit cannot use. If heads are
    sharded, each of the G shards (h heads and j columns each) has its own product, so nothing is summed over devices.
    """
    (rows, beams, joined), keys = q_BNJ.shape, k_BPJ.shape[1]
    shards = partitioning.shard_count("joined_kv")
    shards = shards if heads % shards == 0 else 1

    def per_query(x_BNGhx: jax.Array) -> jax.Array:
        return x_BNGhx.swapaxes(1, 2).reshape(len(x_BNGhx), shards, -1, x_BNGhx.shape[-1])

    own_hj = jnp.repeat(jnp.eye(heads // shards, dtype=bool), joined // heads, axis=1)[None, None, None]
    zero = jnp.zeros((), q_BNJ.dtype)
    q_BGMj = per_query(jnp.where(own_hj, q_BNJ.reshape(rows, beams, shards, 1, -1), zero))
    k_BPGj, v_BPGj = k_BPJ.reshape(rows, keys, shards, -1), v_BPJ.reshape(rows, keys, shards, -1)
    scores_BGMP = jnp.einsum("bgmj,bpgj->bgmp", q_BGMj, k_BPGj, preferred_element_type=jnp.float32)
    bias_BNHP = jnp.broadcast_to(bias_BNHP, (len(bias_BNHP), beams, heads, keys))
    bias_BGMP = per_query(bias_BNHP.reshape(len(bias_BNHP), beams, shards, -1, keys))
    weights_BGMP = jax.nn.softmax(scores_BGMP + bias_BGMP, axis=-1).astype(q_BNJ.dtype)
    y_BGMj = jnp.einsum("bgmp,bpgj->bgmj", weights_BGMP, v_BPGj)
    y_BGNhj = y_BGMj.reshape(rows, shards, beams, heads // shards, -1)
    return jnp.sum(jnp.where(own_hj, y_BGNhj, zero), axis=3).swapaxes(1, 2).reshape(rows, beams, joined)
