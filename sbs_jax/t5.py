"""The student: T5 v1.0 and v1.1 in Flax NNX. Its decoder one position at a time is `stepping.py`.

Suffix letters of array names, used in every file of this package:

    B batch (rows)   S source position   T target position   D model width
    H heads          K width of a head   F width of the MLP  V vocabulary

A model holds parameters and nothing else. Dropout keys are an argument of the call, and `split` / `join` turn a model
into a flat dictionary `{"encoder/layers/0/attention/query/kernel": array}` and back, so that everything around it is
plain `jax` on a plain pytree. Parameter names, shapes and initial scales are those of T5X's `network.py` (kernels
`[in, heads * head_dim]`, relative bias `[heads, buckets]`).

Packed rows are told apart by segment ids (1, 2, .. per example, 0 for padding); an unpacked row is one segment.

What `adapters.py` puts on a model (LoRA, prefixes, ..) are attributes that are None here.
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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from sbs_jax import attention, stacking
from sbs_jax.partitioning import constrain, gathered

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}
DTYPES = ("float32", "bfloat16")
# "shared": one table per stack, as T5, mT5 and ByT5 have it; "per_layer": one per self-attention, as UMT5 has it.
RELATIVE_BIASES = ("shared", "per_layer")
_saved = jax.checkpoint_policies.save_only_these_names
# What a layer's forward pass keeps for the backward pass, which computes the rest again: everything; the results of its
# matrix products but for attention scores; those of attention alone; nothing but its input.
REMAT: dict[str, Any] = {
    "none": None,
    "minimal": _saved("projected", "residual", *attention.SAVED),
    "attended": _saved(*attention.SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}
LAYERS = ("scanned", "unrolled")


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
    # Noise on the input embeddings in training (NEFTune, arXiv 2310.05914: 5, 10 or 15 for the encoder); 0 for none.
    neftune_alpha: float = 0.0
    neftune_decoder_alpha: float = 0.0

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
        for name in ("neftune_alpha", "neftune_decoder_alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
                raise ValueError(f"T5Config.{name} is {value!r}; expected a number of at least 0, such as 5.0.")
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


class Dropout:
    """Draws a fresh key at each use while a step is traced; holds no array between calls.

    Masks are shared along the second-to-last axis (sequence), as T5X and Mesh TensorFlow trained T5, which also makes
    them cheap to draw.
    """

    def __init__(self, rate: float, key: Key[Array, ""] | None) -> None:
        self._rate = rate
        self._key = key
        self._uses = self._own_uses = 0

    def __call__(self, x: jax.Array, *, shared: int = -2) -> jax.Array:
        """`x` with some values 0 and the others scaled up; one mask for all places along the axis `shared`."""
        if self._key is None or self._rate == 0.0:
            return x
        self._uses += 1
        shape = list(x.shape)
        shape[shared] = 1
        return _dropped(x, jax.random.fold_in(self._key, self._uses), rate=self._rate, shape=tuple(shape))

    def at(self, rate: float, x: jax.Array) -> jax.Array:
        """`x` [.., T, I] with values dropped at a rate of its own; other masks stay what they are without it.

        Shared along the sequence too: a mask for each value of each kernel's input is drawn again wherever it is used,
        and the TPU's compiler spent minutes on such operations (docs/experiments.md).
        """
        if self._key is None or rate == 0.0:
            return x
        self._own_uses += 1
        key = jax.random.fold_in(jax.random.fold_in(self._key, _OWN_RATE), self._own_uses)
        return _dropped(x, key, rate=rate, shape=(*x.shape[:-2], 1, x.shape[-1]))


# Keys are made by numbers: uses of a stack's or layer's dropout have 1, 2, .. and what is rare has numbers far off.
_OWN_RATE, _NOISE = 2**30, 2**30 + 1


def _dropped(x: jax.Array, key: Key[Array, ""], *, rate: float, shape: tuple[int, ...]) -> jax.Array:
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


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

    kernel: Any  # nnx.Param, or a quantized.Kernel in its place
    # Of adapters.py: what is added to the product; factors of what goes in, and of what comes out; a bias.
    lora: Any = None
    in_scale: nnx.Param | None = None
    out_scale: nnx.Param | None = None
    bias: nnx.Param | None = None
    # Of weights.py: the dtype of both factors of the product where it is not `dtype`, which the sums keep.
    product: str | None = None

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
        """The product over the last `contract` axes of `x`; `split` cuts its own last axis into several."""
        inner = x.shape[x.ndim - contract :]
        x = x.astype(self.dtype)
        if self.in_scale is not None:
            x = x * self.in_scale[...].astype(self.dtype).reshape((1,) * (x.ndim - contract) + inner)
        if isinstance(self.kernel, nnx.Param):
            kernel = gathered(self.kernel[...].astype(self.product or self.dtype), self.axes)
            kernel = kernel.reshape(*inner, *(split or kernel.shape[1:]))
            sums = self.dtype if self.product else None
            y = matmul(x.astype(kernel.dtype), kernel, contract=contract, dtype=sums)
        else:
            how = {"split": split, "contract": contract, "dtype": self.dtype, "product": self.product}
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
        """The kernel alone, float32 unless it is held in bfloat16."""
        return self.kernel[...] if isinstance(self.kernel, nnx.Param) else self.kernel.matrix()

    def merged(self) -> Float[Array, "I O"]:
        """Kernel, LoRA and factors as one matrix: `x @ merged()` is what a call gives, but for dropout and bias."""
        kernel = self.matrix()
        if self.in_scale is not None:
            kernel = kernel * self.in_scale[...][:, None]
        if self.lora is not None:
            kernel = kernel.astype(jnp.float32) + self.lora.matrix(self.in_scale)
        return kernel if self.out_scale is None else kernel * self.out_scale[...][None, :]


def matmul(
    x: Float[Array, "..."], kernel: Float[Array, "..."], *, contract: int = 1, dtype: Any = None
) -> Float[Array, "..."]:
    """The product over the last `contract` axes of `x` and the first of `kernel`, in `dtype` if given, else in theirs.

    Over several leading axes XLA for CPU computes the kernel's gradient from a transposed copy, and recomputes into it,
    column by column, whatever the copied value comes from: a third of a training step (docs/speed.md). There all rows
    become one axis; on a TPU it is this that costs copies, between the layouts of rows and of heads.
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

    prefix: Any = None  # of adapters.py: keys and values before those of the source

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
        """Attention of `x` over `source`, within segments."""
        axes = ("batch", "length", "activation_heads", None)
        q_BTHK, k_BSHK, v_BSHK = (
            _keep("projected", constrain(kernel(x, split=self.heads, dropout=dropout), axes))
            for kernel, x in ((self.query, x_BTD), (self.key, source_BSD), (self.value, source_BSD))
        )
        before = 0
        if self.prefix is not None:
            k_BSHK, v_BSHK = self.prefix.before(k_BSHK, v_BSHK)
            before = k_BSHK.shape[1] - source_BSD.shape[1]
        # A weight's mask is shared by all queries (as T5X and Mesh TensorFlow trained T5): the same as masking the
        # value, without a pass over the weights.
        v_BSHK = dropout(v_BSHK, shared=-1)
        y_BTHK = attention.attend(q_BTHK, k_BSHK, v_BSHK, bias, segments, causal=causal, prefix=before)
        return self.out(y_BTHK, contract=2, dropout=dropout)


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

    def __call__(self, x_BTD: Float[Array, "B T D"], *, dropout: Dropout) -> Float[Array, "B T D"]:
        axes = ("batch", "length", "activation_mlp")
        branches = tuple(
            _keep("projected", constrain(getattr(self, name)(x_BTD, dropout=dropout), axes)) for name in self.names
        )
        return self.wo(dropout(_gated(branches, self.activations)), dropout=dropout)


@functools.partial(jax.checkpoint, static_argnums=1)
def _gated(branches: tuple[Float[Array, "B T F"], ...], activations: tuple[str, ...]) -> Float[Array, "B T F"]:
    """`act_0(branch_0) * act_1(branch_1) * ..`, which the backward pass computes again from the branches.

    Kept, its inner values would add 5 % to a step's working memory, and they cost next to nothing (docs/speed.md).
    """
    values = [ACTIVATIONS[act](x_BTF) for act, x_BTF in zip(activations, branches, strict=True)]
    return math.prod(values[1:], start=values[0])


class EncoderLayer(nnx.Module):
    """Self-attention, then MLP, each normed before and added to its input."""

    attention_adapter: Any = None  # of adapters.py: after each of the two
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
        """`bias` is the stack's; None where every layer has its own."""
        y_BSD = self.pre_attention_layer_norm(x_BSD)
        y_BSD = self.attention(
            *(y_BSD, y_BSD),
            bias=_own_bias(self, bias, x_BSD.shape[1]),
            segments=(segments_BS, segments_BS),
            causal=False,
            dropout=dropout,
        )
        x_BSD = _residual(x_BSD, _adapted(dropout(y_BSD), self.attention_adapter))
        y_BSD = self.mlp(self.pre_mlp_layer_norm(x_BSD), dropout=dropout)
        return _residual(x_BSD, _adapted(dropout(y_BSD), self.mlp_adapter))


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention over the encoder's output, then MLP."""

    self_attention_adapter: Any = None  # of adapters.py: after each of the three
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
        """`bias` is the stack's; None where every layer has its own."""
        y_BTD = self.pre_self_attention_layer_norm(x_BTD)
        y_BTD = self.self_attention(
            *(y_BTD, y_BTD),
            bias=_own_bias(self, bias, x_BTD.shape[1]),
            segments=(segments_BT, segments_BT),
            causal=True,
            dropout=dropout,
        )
        x_BTD = _residual(x_BTD, _adapted(dropout(y_BTD), self.self_attention_adapter))
        y_BTD = self.encoder_decoder_attention(
            *(self.pre_cross_attention_layer_norm(x_BTD), encoded_BSD),
            bias=None,
            segments=(segments_BT, encoder_segments_BS),
            causal=False,
            dropout=dropout,
        )
        x_BTD = _residual(x_BTD, _adapted(dropout(y_BTD), self.encoder_decoder_attention_adapter))
        y_BTD = self.mlp(self.pre_mlp_layer_norm(x_BTD), dropout=dropout)
        return _residual(x_BTD, _adapted(dropout(y_BTD), self.mlp_adapter))


def _adapted(y_BTD: Float[Array, "B T D"], adapter: Any) -> Float[Array, "B T D"]:
    return y_BTD if adapter is None else adapter(y_BTD)


def _own_bias(
    layer: EncoderLayer | DecoderLayer, shared: Float[Array, "H T T"] | None, length: int
) -> Float[Array, "H T T"]:
    return shared if shared is not None else _bias_of(layer, length)


def _bias_of(owner: Any, length: int) -> Float[Array, "H T T"]:
    """The relative position bias between `length` places, from the table of a layer or a stack."""
    positions = jnp.arange(length)
    return owner.relpos_bias(positions, positions)[0]


def _keep(name: str, x: jax.Array) -> jax.Array:
    """`x`, by a name that `REMAT` knows."""
    return checkpoint_name(x, name)


def _residual(x_BTD: Float[Array, "B T D"], y_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return _keep("residual", constrain(x_BTD + y_BTD, ("batch", "length", "activation_embed")))


class TokenEmbedder(nnx.Module):
    """The table `[V, D]` that both stacks read, and that v1.0 also writes logits with."""

    product: str | None = None  # of weights.py: as `Dense.product`, of the logits

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        value = jax.random.normal(rngs.params(), (config.vocab_size, config.emb_dim), jnp.float32)
        self.embedding = nnx.Param(value, axes=("vocab", "embed"))
        self.dtype = config.dtype

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table_VD = gathered(self.embedding[...].astype(self.dtype), ("vocab", "embed"))
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
        return constrain(x_BTD, ("batch", "length", "activation_embed"))


class Encoder(nnx.Module):
    """Embedded source to encoded source."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "shared":
            self.relpos_bias = RelativePositionBias(config, bidirectional=True, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_encoder_layers)])
        self.encoder_norm = LayerNorm(config)
        self.dropout_rate = config.dropout_rate
        self.remat = "none"

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        segment_ids_BS: Int[Array, "B S"],
        *,
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B S D"]:
        dropout = Dropout(self.dropout_rate, dropout_key)
        bias = _shared_bias(self, x_BSD.shape[1])

        def call(layer: EncoderLayer, x_BSD: Array, dropout: Dropout) -> Array:
            return layer(x_BSD, bias=bias, segments_BS=segment_ids_BS, dropout=dropout)

        x_BSD = _through(self, dropout(x_BSD), call, dropout_key=dropout_key)
        return dropout(self.encoder_norm(x_BSD))


class Decoder(nnx.Module):
    """Embedded target and encoded source to the states that logits are made of."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "shared":
            self.relpos_bias = RelativePositionBias(config, bidirectional=False, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_decoder_layers)])
        self.decoder_norm = LayerNorm(config)
        self.dropout_rate = config.dropout_rate
        self.remat = "none"

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        encoded_BSD: Float[Array, "B S D"],
        *,
        segment_ids_BT: Int[Array, "B T"],
        encoder_segment_ids_BS: Int[Array, "B S"],
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        dropout = Dropout(self.dropout_rate, dropout_key)
        bias = _shared_bias(self, x_BTD.shape[1])

        def call(layer: DecoderLayer, x_BTD: Array, dropout: Dropout) -> Array:
            return layer(
                *(x_BTD, encoded_BSD),
                bias=bias,
                segments_BT=segment_ids_BT,
                encoder_segments_BS=encoder_segment_ids_BS,
                dropout=dropout,
            )

        x_BTD = _through(self, dropout(x_BTD), call, dropout_key=dropout_key)
        return dropout(self.decoder_norm(x_BTD))


def _shared_bias(stack: Encoder | Decoder, length: int) -> Float[Array, "H T T"] | None:
    """The stack's relative position bias; None where every layer has its own."""
    return _bias_of(stack, length) if hasattr(stack, "relpos_bias") else None


def _through(
    stack: Encoder | Decoder,
    x: Float[Array, "B T D"],
    call: Callable[[Any, Array, Dropout], Array],
    *,
    dropout_key: Key[Array, ""] | None,
) -> Float[Array, "B T D"]:
    """`x` through the layers of a stack, unrolled or scanned, each by `call(layer, x, dropout)`."""

    def of(structure: Structure) -> Callable[[Array, tuple[Any, Any]], tuple[Array, None]]:
        def one(x: Array, of_layer: tuple[Any, Any]) -> tuple[Array, None]:
            parameters, key = of_layer
            return call(nnx.merge(structure, parameters), x, Dropout(stack.dropout_rate, key)), None

        if stack.remat == "none":
            return one
        # A scan's loop keeps the compiler from undoing the recomputation by itself.
        return jax.checkpoint(one, policy=REMAT[stack.remat], prevent_cse=not stacked)

    stacked = not isinstance(stack.layers, nnx.List)
    layers = [nnx.split(layer, nnx.Param) for layer in ([stack.layers] if stacked else stack.layers)]
    count = jax.tree.leaves(layers[0][1])[0].shape[0] if stacked else len(layers)
    keys = None if dropout_key is None else jax.random.split(jax.random.fold_in(dropout_key, 0), count)
    if stacked:
        ((structure, parameters),) = layers
        return jax.lax.scan(of(structure), x, (parameters, keys))[0]
    for index, (structure, parameters) in enumerate(layers):
        x, _ = of(structure)(x, (parameters, None if keys is None else keys[index]))
    return x


def prepended(prefix: Float[Array, "X *each"], rows: Float[Array, "B P *each"]) -> Float[Array, "B Q *each"]:
    """Each row with the same prefix before what it has, in the rows' type; Q = X + P."""
    repeated = jnp.broadcast_to(prefix[None].astype(rows.dtype), (len(rows), *prefix.shape))
    return jnp.concatenate([repeated, rows], axis=1)


def with_noise(
    x_BTD: Float[Array, "B T D"], segments_BT: Int[Array, "B T"], *, alpha: float, key: Key[Array, ""]
) -> Float[Array, "B T D"]:
    """NEFTune (arXiv 2310.05914): `x` plus uniform noise within `alpha / sqrt(L * D)`, and none on padding (segment 0).

    L is the number of tokens of the example a token belongs to, not of the row: the noise of an example is the same
    distribution whatever it is packed or padded with. (Hugging Face's takes the padded length.)
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    length_BT = jnp.sum(same_BTT, axis=-1).astype(jnp.float32)
    bound_BT = jnp.where(segments_BT > 0, alpha / jnp.sqrt(length_BT * x_BTD.shape[-1]), 0.0)
    noise_BTD = jax.random.uniform(jax.random.fold_in(key, _NOISE), x_BTD.shape, jnp.float32, -1.0, 1.0)
    return x_BTD + (noise_BTD * bound_BT[..., None]).astype(x_BTD.dtype)


def source_segments(tokens_BS: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Segment ids of unpacked source rows: 1 on tokens, 0 on padding (token id 0)."""
    return (tokens_BS > 0).astype(jnp.int32)


class T5(nnx.Module):
    """Encoder-decoder student. `model(source, target_in)` is `decode(encode(source), target_in)`."""

    prompt: Any = None  # of adapters.py: vectors before the embedded source

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
        """Teacher-forced logits, float32: `logits` of the `states`."""
        return self.logits(
            self.states(
                encoder_input_tokens,
                decoder_input_tokens,
                encoder_segment_ids=encoder_segment_ids,
                decoder_segment_ids=decoder_segment_ids,
                dropout_key=dropout_key,
            )
        )

    def states(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        decoder_input_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Teacher-forced decoder states, of which logits are made. No key, no dropout.

        Segment ids are given for packed rows; without them a source row is one example padded with 0, and the target
        is one example (its padding needs no mask: no earlier position can see it).
        """
        if encoder_segment_ids is None:
            encoder_segment_ids = source_segments(encoder_input_tokens)
        encoded_BPD = self.encode(
            encoder_input_tokens, segment_ids=encoder_segment_ids, dropout_key=_fold(dropout_key, 0)
        )
        return self.decode(
            encoded_BPD,
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
    ) -> Float[Array, "B P D"]:
        """The encoded source; before it, where there is a prompt, what became of that: `attended_segments`."""
        x_BSD = self.token_embedder(encoder_input_tokens)
        if self.config.neftune_alpha and dropout_key is not None:
            x_BSD = with_noise(x_BSD, segment_ids, alpha=self.config.neftune_alpha, key=dropout_key)
        if self.prompt is not None:
            x_BSD = self.prompt.before(x_BSD)
        return self.encoder(x_BSD, self.attended_segments(segment_ids), dropout_key=dropout_key)

    def attended_segments(self, segment_ids: Int[Array, "B S"]) -> Int[Array, "B P"]:
        """Segment ids of what the encoder gives: those of the source, after a prompt's."""
        if self.prompt is None:
            return segment_ids
        return jnp.pad(segment_ids, ((0, 0), (self.prompt.length, 0)), constant_values=1)

    def decode(
        self,
        encoded_BPD: Float[Array, "B P D"],
        decoder_input_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"],
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Decoder states; `encoder_segment_ids` are those of the source, as `encode` had them."""
        x_BTD = self.token_embedder(decoder_input_tokens)
        if self.config.neftune_decoder_alpha and dropout_key is not None:
            # Without segments padding is not told apart but by its id, which a target also begins with.
            begins = (jnp.arange(x_BTD.shape[1]) == 0)[None, :]
            found = (decoder_input_tokens > 0) | begins if decoder_segment_ids is None else decoder_segment_ids
            alpha = self.config.neftune_decoder_alpha
            x_BTD = with_noise(x_BTD, found.astype(jnp.int32), alpha=alpha, key=dropout_key)
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_input_tokens)
        return self.decoder(
            x_BTD,
            encoded_BPD,
            segment_ids_BT=decoder_segment_ids,
            encoder_segment_ids_BS=self.attended_segments(encoder_segment_ids),
            dropout_key=dropout_key,
        )

    def logits(self, y_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Decoder states to float32 logits."""
        y_BTD, kernel_DV = self.projection(y_BTD)
        return constrain(matmul(y_BTD, kernel_DV, dtype=jnp.float32), ("batch", "length", "activation_vocab"))

    def projection(self, y_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """What logits are the product of; a tied table is scaled by D^-0.5 (Mesh TensorFlow's convention)."""
        if self.config.logits_via_embedding:
            table_VD = gathered(self.token_embedder.embedding[...].astype(y_BTD.dtype), ("vocab", "embed"))
            return y_BTD * self.config.emb_dim**-0.5, table_VD.T
        return y_BTD, gathered(self.logits_dense.kernel[...].astype(y_BTD.dtype), ("embed", "vocab"))


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a student is computed; parameters on disk, results and gradients are the same whichever is chosen.

    `layers` "scanned" compiles one layer of a stack and loops over it: its parameters are stacked in memory
    (stacking.py). `remat` is what the backward pass computes again, of `REMAT`: "none", "minimal" or "full".
    """

    layers: str
    remat: str

    def __post_init__(self) -> None:
        for name, known in (("layers", LAYERS), ("remat", tuple(REMAT))):
            value = getattr(self, name)
            if value not in known:
                near = difflib.get_close_matches(str(value), known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"Execution.{name} is {value!r}; expected one of {', '.join(known)}.{hint}")


UNROLLED = Execution(layers="unrolled", remat="none")


def abstract(
    config: T5Config, *, execution: Execution = UNROLLED, change: Callable[[T5], None] = lambda model: None
) -> tuple[Structure, dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str, ...]]]:
    """Structure, shapes and logical axes of every parameter, without computing any; stacked if layers are scanned.

    `change` may put something on the model, or in the place of something, before its parameters are looked at.
    """

    def build() -> T5:
        model = T5(config, rngs=nnx.Rngs(0))
        change(model)
        return model

    model = nnx.eval_shape(build)
    _, state = nnx.split(model, nnx.Param)
    shapes, axes = {}, {}
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        shapes[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        axes[name] = leaf.axes
    model.encoder.remat = model.decoder.remat = execution.remat
    if execution.layers == "scanned":
        axes = {
            name: ("layers", *axes[of[0]]) if stacking.is_stacked(name) else axes[name]
            for name, of in stacking.stacks(shapes).items()
        }
        shapes = jax.eval_shape(stacking.stack, shapes)
        for side in (model.encoder, model.decoder):
            setattr(side, "layers", side.layers[0])  # noqa: B010  (one layer in the place of a list of them)
    return nnx.split(model, nnx.Param)[0], shapes, axes
