"""Cached decoding of any family: a decoder one target position at a time.

Letters as in t5.py, and

    N targets of a row (its beams)   G heads of keys   J joined heads (H * K, or G * K of keys)
    M queries of a row (N * H)       P cached keys (T * N)

Everything that does not depend on the position is computed once, before the loop: weights in the dtype of the
computation, the position bias, and keys and values of the source, which all beams of a row share. The target's cache
keeps each key where it was first written. When beams are reordered no key moves; a mask gives the keys of the row that
each beam may see.

A family describes its layers (`Layer`) in `step_layers` of its model; the steps are the same for all.

The memory layout of keys and values is the platform's fastest: on a TPU all heads of a key side by side, elsewhere head
by head (`layout`).
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from sbs_jax.student import attention, layers, partitioning, stacks
from sbs_jax.student.partitioning import constrain

Product = Callable[[Float[Array, "B N I"]], Float[Array, "B N O"]]
# A product whose result depends on each row's true position: queries and keys that rotate.
Placed = Callable[[Float[Array, "B N I"], Int[Array, "B"]], Float[Array, "B N O"]]

# Keys and values, [B, P, J] or, head by head, [B, G, P, K]. Typed Any because JAX transformations replace the arrays.
Pair = tuple[Any, Any]
Cache = tuple[Pair, ...]  # one pair per layer, beginning with the layer's prefix


@dataclasses.dataclass(frozen=True)
class Source:
    """Keys and values that are the same at all positions: those of the source, after those of a prefix."""

    keys: Any
    values: Any
    bias: jax.Array  # [B, 1, 1, S], MASKED on what is no token

    def take_rows(self, rows_B: Int[Array, "B"]) -> "Source":
        return Source(self.keys[rows_B], self.values[rows_B], self.bias[rows_B])


@dataclasses.dataclass(frozen=True)
class Own:
    """Products that give each position's keys and values, which go into the cache."""

    key: Placed  # D to J
    value: Product
    bias: jax.Array  # [T, H or 1, P], for a query at T: a position bias, and MASKED on keys that it does not see
    prefix: tuple[jax.Array, jax.Array] | None = None  # keys and values [X, J] before all others


@dataclasses.dataclass(frozen=True)
class Attending:
    """An attention: over the target's own keys, over those of the source, or over both in one softmax."""

    norm: Product
    query: Placed  # D to J
    out: Product  # J to D, with what follows: a norm, an adapter
    own: Own | None = None
    source: Source | None = None
    window: int | None = None  # a query sees the keys of the last so many positions; None: of all


@dataclasses.dataclass(frozen=True)
class Layer:
    """A decoder layer, as every position needs it. Just one of its attentions has keys of its own."""

    attentions: tuple[Attending, ...]
    mlp: Product  # D to D, with the norms around it


_STATE_AXES = ("batch", None, "activation_embed")


class Stepper:
    """Step-by-step decoder of one batch: `beams` targets for each row, of up to `length` tokens."""

    def __init__(
        self,
        model: Any,
        encoded: Any,
        encoder_segment_ids_BS: Int[Array, "B S"],
        *,
        length: int,
        beams: int = 1,
    ) -> None:
        """Prepares a model of any family; `encoded` is what its `encode` returned for the source."""
        c = self._config = model.config
        self._embed = model.embed_target
        self._length, self._beams = length, beams
        self._final_norm = norm(model.decoder.decoder_norm)
        segments_BP = model.attended_segments(encoder_segment_ids_BS)
        self._source_length = segments_BP.shape[1]  # keys of a source after a prefix's, which every position sees
        self._before_B = model.places_before(segments_BP)
        self._layers: Sequence[Layer] = model.step_layers(encoded, segments_BP, length=length, beams=beams)
        tied = c.logits_via_embedding
        table_DV = model.output_embedder.embedding[...].T if tied else model.logits_dense.kernel[...]
        product_dtype = (model.output_embedder if tied else model.logits_dense).product_dtype
        self.table_DV = _prepare(table_DV, (None, "vocab"), c, product_dtype=product_dtype)

    def empty_cache(self) -> Cache:
        """Returns a cache without any token."""
        rows, joined = len(self._before_B), self._config.num_kv_heads * self._config.head_dim
        empty_BPJ = jnp.zeros((rows, self._length * self._beams, joined), self._config.dtype)

        def after(prefix_XJ: jax.Array | None) -> jax.Array:
            cache_BPJ = empty_BPJ if prefix_XJ is None else stacks.prepend(prefix_XJ, empty_BPJ)
            return layout(cache_BPJ, self._config.num_kv_heads)

        prefixes = [a.own.prefix or (None, None) for w in self._layers for a in w.attentions if a.own is not None]
        return tuple((after(keys_XJ), after(values_XJ)) for keys_XJ, values_XJ in prefixes)

    def take_rows(self, rows_B: Int[Array, "B"]) -> "Stepper":
        """Keeps only these rows of the batch; the caller indexes the cache the same way."""

        def taken(a: Attending) -> Attending:
            return a if a.source is None else dataclasses.replace(a, source=a.source.take_rows(rows_B))

        fewer = copy.copy(self)
        fewer._before_B = self._before_B[rows_B]
        fewer._layers = [dataclasses.replace(w, attentions=tuple(map(taken, w.attentions))) for w in self._layers]
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

        `logits` gives the next token's from the states, which have the table's dtype. The key of beam n at position t
        has index `t * N + n`. Without `visible`, a query sees all keys up to its position.
        """
        c = self._config
        x_BND = constrain(self._embed(tokens_BN), _STATE_AXES)
        hidden_BNP = None if visible_BNP is None else jnp.where(visible_BNP, 0.0, attention.MASKED)
        places_B = self._before_B + position
        updated: list[Pair] = []
        for w in self._layers:
            for a in w.attentions:
                y_BND = a.norm(x_BND)
                seen: list[tuple[Any, Any, jax.Array]] = []  # keys, values and bias
                if a.source is not None:
                    seen.append((a.source.keys, a.source.values, self._source_bias(a, position)))
                if a.own is not None:
                    # Keys and values of this position go into the cache, after a prefix.
                    keys, values = cache[len(updated)]
                    before = 0 if a.own.prefix is None else len(a.own.prefix[0])
                    at, axis = before + position * self._beams, keys.ndim - 2
                    new_key = layout(a.own.key(y_BND, places_B), c.num_kv_heads)
                    new_value = layout(a.own.value(y_BND), c.num_kv_heads)
                    keys = jax.lax.dynamic_update_slice_in_dim(keys, new_key, at, axis=axis)
                    values = jax.lax.dynamic_update_slice_in_dim(values, new_value, at, axis=axis)
                    updated.append((keys, values))
                    bias_BNHP = jax.lax.dynamic_index_in_dim(a.own.bias, position, axis=0)[:, None]
                    if hidden_BNP is not None:
                        bias_BNHP = bias_BNHP + jnp.pad(hidden_BNP, ((0, 0), (0, 0), (before, 0)))[:, :, None]
                    seen.append((keys, values, bias_BNHP))
                how = {"heads": c.num_heads, "kv_heads": c.num_kv_heads, "cap": c.attention_cap}
                x_BND += a.out(attend(a.query(y_BND, places_B), seen, **how))
            x_BND = constrain(x_BND + w.mlp(x_BND), _STATE_AXES)
        y_BND = self._final_norm(x_BND)
        y_BND = y_BND if c.logits_scale is None else y_BND * c.logits_scale
        return y_BND.astype(self.table_DV.dtype), tuple(updated)

    def logits(self, states_BND: Float[Array, "B *N D"]) -> Float[Array, "B *N V"]:
        """Computes float32 logits from the states of a step."""
        logits = jnp.matmul(states_BND, self.table_DV, preferred_element_type=jnp.float32)
        return layers.capped(logits, self._config.logits_cap)

    def _source_bias(self, a: Attending, position: Int[Array, ""]) -> Float[Array, "B 1 1 S"]:
        """Returns the bias of the source's keys, MASKED on those outside the window of a query at this position."""
        assert a.source is not None
        if a.window is None:
            return a.source.bias
        places_S = jnp.arange(a.source.bias.shape[-1]) - (a.source.bias.shape[-1] - self._source_length)
        visible_BS = ((self._before_B + position)[:, None] - places_S[None, :] < a.window) | (places_S < 0)[None, :]
        return jnp.where(visible_BS[:, None, None, :], a.source.bias, attention.MASKED)


# ------------------------------------------------------------------------------------ descriptions of layers


def causal(length: int, *, window: int | None = None) -> Float[Array, "T T"]:
    """Returns 0, or MASKED on keys of later positions and on those outside the window."""
    positions = jnp.arange(length)
    hidden_TT = positions[None, :] > positions[:, None]
    if window is not None:
        hidden_TT |= positions[:, None] - positions[None, :] >= window
    return jnp.where(hidden_TT, attention.MASKED, 0.0)


def source_bias(segments_BP: Int[Array, "B P"]) -> Float[Array, "B 1 1 P"]:
    """Returns 0 on the tokens of a source, or MASKED."""
    return jnp.where(segments_BP == 1, 0.0, attention.MASKED)[:, None, None, :]


def pad_bias(bias: Float[Array, "... P"], prefix: tuple[jax.Array, jax.Array] | None) -> Float[Array, "... Q"]:
    """Pads the bias with 0 for a prefix's keys, which come before the others."""
    return bias if prefix is None else jnp.pad(bias, [(0, 0)] * (bias.ndim - 1) + [(len(prefix[0]), 0)])


def prefix_of(module: layers.Attention) -> tuple[jax.Array, jax.Array] | None:
    """Returns the keys and values [X, J] of an attention's prefix, or None."""
    return None if module.prefix is None else (module.prefix.key[...], module.prefix.value[...])


def norm(module: layers.RMSNorm) -> Product:
    """Returns the function that norms each position, with a scale on every device."""
    return functools.partial(module.by, constrain(module.scale[...], (None,)))


def inward(dense: layers.Dense, c: Any, *, axis: str = "joined_kv") -> Product:
    """Returns the product from the model's width to a sharded axis."""
    return _multiplier(dense, (None, axis), c)


def outward(dense: layers.Dense, c: Any, *, after: Sequence[Any] = (), axis: str = "joined_kv") -> Product:
    """Returns the product from a sharded axis to the model's width, and what follows it (None: nothing)."""
    product = _multiplier(dense, (axis, None), c)
    for each in after:
        if each is not None:
            product = _then(product, each)
    return product


def _then(first: Product, second: Product) -> Product:
    return lambda x: second(first(x))


def placed(product: Product) -> Placed:
    """Returns a product that is the same at all positions in the form of those that are not."""
    return lambda x, _: product(x)


def mlp(module: layers.MLP, c: Any, *, before: layers.RMSNorm, after: Sequence[Any] = ()) -> Product:
    """Returns the MLP with its norm before it and what follows."""
    first = norm(before)
    branches = [inward(getattr(module, name), c, axis="mlp") for name in module.names]
    out = outward(module.wo, c, after=after, axis="mlp")

    def compute(x_BND: jax.Array) -> jax.Array:
        y_BND = first(x_BND)
        inner = [product(y_BND) for product in branches]
        gated = [layers.ACTIVATIONS[name](branch) for name, branch in zip(c.mlp_activations, inner, strict=True)]
        return out(math.prod(gated[1:], start=gated[0]))

    return compute


def _multiplier(dense: layers.Dense, axes: tuple[str | None, str | None], c: Any) -> Product:
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
    kernel_IO: Num[Array, "I O"], axes: tuple[str | None, str | None], c: Any, *, product_dtype: str | None
) -> Float[Array, "I O"]:
    """Casts a weight to the dtype of the computation and, if the decoder fits, gathers its `fsdp` shards once.

    The weights of a larger decoder stay sharded, and the compiler moves the states of all rows at every position.
    """
    kernel_IO = kernel_IO.astype(product_dtype or c.dtype)
    return constrain(kernel_IO, axes) if _is_gathered(c) else kernel_IO


def _is_gathered(c: Any) -> bool:
    """Returns True if each device has room for the decoder's weights without `fsdp`."""
    weights = c.decoder_weights + c.emb_dim * c.vocab_size
    return weights * jnp.dtype(c.dtype).itemsize // partitioning.shard_count("joined_kv") <= MAX_GATHERED_BYTES


def _matmul(x_BNI: Float[Array, "B N I"], kernel_IO: Float[Array, "I O"]) -> Float[Array, "B N O"]:
    x_MI = x_BNI.reshape(-1, x_BNI.shape[-1]).astype(kernel_IO.dtype)
    return jnp.matmul(x_MI, kernel_IO, preferred_element_type=x_BNI.dtype).reshape(*x_BNI.shape[:2], -1)


# ------------------------------------------------------------------------------------ attention of a few queries


def layout(x_BPJ: Float[Array, "B P J"], heads: int) -> jax.Array:
    """Arranges keys or values of so many heads for the platform: [B, P, J] on a TPU, [B, G, P, K] elsewhere.

    Elsewhere each row and head has its own product, and its keys are adjacent in memory: 0.5 ms instead of 4.6 for 64
    rows of 70 keys on a CPU (docs/speed.md). It is the layout of a loop's state, so it is chosen while tracing.
    """
    if partitioning.platform() == "tpu":
        return constrain(x_BPJ, ("batch", None, "joined_kv"))
    x_BGPK = x_BPJ.reshape(*x_BPJ.shape[:2], heads, -1).swapaxes(1, 2)
    divides = heads % partitioning.shard_count("joined_kv") == 0
    return constrain(x_BGPK, ("batch", "joined_kv" if divides else None, None, None))


def attend(
    q_BNJ: Float[Array, "B N J"],
    seen: Sequence[tuple[Any, Any, Any]],
    *,
    heads: int,
    kv_heads: int,
    cap: float | None,
) -> Float[Array, "B N J"]:
    """Attends with a few queries per row, in one softmax over all that is seen; the softmax is in float32.

    `seen` are keys, values (both in the layout of `layout`) and biases [B or 1, N or 1, H or 1, P]. Query head h reads
    the key head h * G // H.
    """
    by_shards = seen[0][0].ndim == 3
    shards = partitioning.shard_count("joined_kv") if by_shards else 1
    form = _Joint if by_shards else _PerHead
    form_of = form(q_BNJ, heads, kv_heads, shards if heads % shards == 0 and kv_heads % shards == 0 else 1)
    scores = [layers.capped(form_of.scores(keys), cap) + form_of.bias(bias_BNHP, keys) for keys, _, bias_BNHP in seen]
    weights = jax.nn.softmax(_joined(scores), axis=-1).astype(q_BNJ.dtype)
    parts = _split(weights, [each.shape[-1] for each in scores])
    sums = [form_of.values(part, values) for part, (_, values, _) in zip(parts, seen, strict=True)]
    return form_of.joined(sum(sums[1:], start=sums[0]))


def _joined(scores: Sequence[jax.Array]) -> jax.Array:
    return scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)


def _split(weights: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Inverts `_joined`."""
    return [weights] if len(sizes) == 1 else jnp.split(weights, list(itertools.accumulate(sizes[:-1])), axis=-1)


class _PerHead:
    """A product for each row and head of keys; R query heads share it, so it has R * N queries."""

    def __init__(self, q_BNJ: jax.Array, heads: int, kv_heads: int, _: int) -> None:
        self._rows, self._beams, self._joined = q_BNJ.shape
        self._kv_heads, self._shared = kv_heads, heads // kv_heads
        # With one query head per head of keys, the transpositions are those of [B, N, H, K] alone.
        q_BHNK = q_BNJ.reshape(self._rows, self._beams, heads, -1).swapaxes(1, 2)
        self._q_BGXK = q_BHNK.reshape(self._rows, kv_heads, self._shared * self._beams, -1)

    def scores(self, keys: jax.Array) -> jax.Array:
        return jnp.einsum("bhnk,bhpk->bhnp", self._q_BGXK, keys, preferred_element_type=jnp.float32)

    def bias(self, bias_BNHP: jax.Array, keys: jax.Array) -> jax.Array:
        bias_BHNP = bias_BNHP.swapaxes(1, 2)
        if self._shared == 1:
            return bias_BHNP
        shape = (len(bias_BHNP), self._kv_heads * self._shared, self._beams, keys.shape[-2])
        return jnp.broadcast_to(bias_BHNP, shape).reshape(len(bias_BHNP), self._kv_heads, -1, keys.shape[-2])

    def values(self, weights: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("bhnp,bhpk->bhnk", weights, values)

    def joined(self, y_BGXK: jax.Array) -> jax.Array:
        y_BHNK = y_BGXK.reshape(self._rows, self._kv_heads * self._shared, self._beams, -1)
        return y_BHNK.swapaxes(1, 2).reshape(self._rows, self._beams, self._joined)


class _Joint:
    """All heads of a row in one product, in which each query is zero outside the columns of its key head.

    For a TPU: a product per head would have a few vectors on one side, which its matrix unit cannot use. If heads are
    sharded, each of the Z shards (h query heads, g key heads and j columns each) has its own product, so nothing is
    summed over devices.
    """

    def __init__(self, q_BNJ: jax.Array, heads: int, kv_heads: int, shards: int) -> None:
        self._rows, self._beams, self._joined = q_BNJ.shape
        self._heads, self._shards, self._shared = heads, shards, heads // kv_heads
        width, mine = self._joined // heads, kv_heads // shards
        own_hg = jnp.repeat(jnp.eye(mine, dtype=bool), self._shared, axis=0)
        self._own_hj = jnp.repeat(own_hg, width, axis=1)[None, None, None]
        self._zero = jnp.zeros((), q_BNJ.dtype)
        if self._shared == 1:
            q_BNZhj = q_BNJ.reshape(self._rows, self._beams, shards, 1, -1)
        else:
            q_BNZhj = jnp.tile(q_BNJ.reshape(self._rows, self._beams, shards, heads // shards, width), mine)
        self._q_BZMj = self._per_query(jnp.where(self._own_hj, q_BNZhj, self._zero))

    def _per_query(self, x_BNZhx: jax.Array) -> jax.Array:
        return x_BNZhx.swapaxes(1, 2).reshape(len(x_BNZhx), self._shards, -1, x_BNZhx.shape[-1])

    def _apart(self, x_BPJ: jax.Array) -> jax.Array:
        return x_BPJ.reshape(self._rows, x_BPJ.shape[1], self._shards, -1)

    def scores(self, k_BPJ: jax.Array) -> jax.Array:
        return jnp.einsum("bgmj,bpgj->bgmp", self._q_BZMj, self._apart(k_BPJ), preferred_element_type=jnp.float32)

    def bias(self, bias_BNHP: jax.Array, k_BPJ: jax.Array) -> jax.Array:
        rows, keys = len(bias_BNHP), k_BPJ.shape[1]
        bias_BNHP = jnp.broadcast_to(bias_BNHP, (rows, self._beams, self._heads, keys))
        return self._per_query(bias_BNHP.reshape(rows, self._beams, self._shards, -1, keys))

    def values(self, weights_BZMP: jax.Array, v_BPJ: jax.Array) -> jax.Array:
        return jnp.einsum("bgmp,bpgj->bgmj", weights_BZMP, self._apart(v_BPJ))

    def joined(self, y_BZMj: jax.Array) -> jax.Array:
        y_BZNhj = y_BZMj.reshape(self._rows, self._shards, self._beams, self._heads // self._shards, -1)
        y_BZNhj = jnp.where(self._own_hj, y_BZNhj, self._zero)
        if self._shared == 1:
            y_BZNx = jnp.sum(y_BZNhj, axis=3)
        else:
            width = self._joined // self._heads
            y_BZNx = jnp.sum(y_BZNhj.reshape(*y_BZNhj.shape[:-1], -1, width), axis=-2)
        return y_BZNx.swapaxes(1, 2).reshape(self._rows, self._beams, self._joined)
