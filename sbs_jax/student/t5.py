"""The student: T5 v1.0 and v1.1 in Flax NNX. `stepping.py` runs its decoder one position at a time.

Array names end in their axes. These letters are used in every file of this package:

    B batch (rows)   S source position   T target position   D model width
    H heads          K width of a head   F width of the MLP  V vocabulary

A model holds parameters and nothing else; dropout keys are arguments of a call. `split` turns a model into a flat
dictionary `{"encoder/layers/0/attention/query/kernel": array}` and `join` turns it back, so all code around the model
is plain `jax` on a plain pytree. Parameter names, shapes and initial scales are those of T5X's `network.py` (kernels
`[in, heads * head_dim]`, relative bias `[heads, buckets]`).

A packed row holds several examples, separated by segment ids (1, 2, .. per example, 0 for padding). An unpacked row is
one segment.

Adapter slots (LoRA, prefixes, ..) are None here; `adapters.py` fills them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from sbs_jax import checks
from sbs_jax.student import attention, stacking
from sbs_jax.student.layers import NOISE_KEY, Dense, Dropout, matmul
from sbs_jax.student.partitioning import constrain, gather
from sbs_jax.student.t5_layers import (
    DecoderLayer,
    EncoderLayer,
    RelativePositionBias,
    T5Config,
    norm_of,
    position_bias,
)

_saved = jax.checkpoint_policies.save_only_these_names
# Values that a layer's forward pass stores for the backward pass; the backward pass recomputes all others.
REMAT: dict[str, Any] = {
    "none": None,  # everything is stored
    "minimal": _saved("projected", "residual", *attention.SAVED),  # matrix products, except attention scores
    "attended": _saved(*attention.SAVED),  # attention outputs
    "full": jax.checkpoint_policies.nothing_saveable,  # only the layer's input
}
LAYERS = ("scanned", "unrolled")


class TokenEmbedder(nnx.Module):
    """Table of token embeddings `[V, D]` for both stacks; v1.0 also computes logits with it."""

    product_dtype: str | None = None  # like `Dense.product_dtype`, for the logits

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        value = jax.random.normal(rngs.params(), (config.vocab_size, config.emb_dim), jnp.float32)
        self.embedding = nnx.Param(value, axes=("vocab", "embed"))
        self.dtype = config.dtype

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table_VD = gather(self.embedding[...].astype(self.dtype), ("vocab", "embed"))
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
        return constrain(x_BTD, ("batch", "length", "activation_embed"))


class Encoder(nnx.Module):
    """Encoder stack; its input is the embedded source."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "shared":
            self.relpos_bias = RelativePositionBias(config, bidirectional=True, rngs=rngs)
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_encoder_layers)])
        self.encoder_norm = norm_of(config)
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

        x_BSD = _run_layers(self, dropout(x_BSD), call, dropout_key=dropout_key)
        return dropout(self.encoder_norm(x_BSD))


class Decoder(nnx.Module):
    """Decoder stack: from embedded target and encoded source to states, which `T5.logits` reads."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        if config.relative_attention_bias == "shared":
            self.relpos_bias = RelativePositionBias(config, bidirectional=False, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_decoder_layers)])
        self.decoder_norm = norm_of(config)
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
                x_BTD,
                encoded_BSD,
                bias=bias,
                segments_BT=segment_ids_BT,
                encoder_segments_BS=encoder_segment_ids_BS,
                dropout=dropout,
            )

        x_BTD = _run_layers(self, dropout(x_BTD), call, dropout_key=dropout_key)
        return dropout(self.decoder_norm(x_BTD))


def _shared_bias(stack: Encoder | Decoder, length: int) -> Float[Array, "H T T"] | None:
    """Computes the stack's relative position bias, or returns None if every layer has its own."""
    return position_bias(stack, length) if hasattr(stack, "relpos_bias") else None


def _run_layers(
    stack: Encoder | Decoder,
    x: Float[Array, "B T D"],
    call: Callable[[Any, Array, Dropout], Array],
    *,
    dropout_key: Key[Array, ""] | None,
) -> Float[Array, "B T D"]:
    """Runs `x` through the layers of a stack, unrolled or scanned, by `call(layer, x, dropout)`."""

    def runner(structure: Structure) -> Callable[[Array, tuple[Any, Any]], tuple[Array, None]]:
        def run(x: Array, layer: tuple[Any, Any]) -> tuple[Array, None]:
            parameters, key = layer
            return call(nnx.merge(structure, parameters), x, Dropout(stack.dropout_rate, key)), None

        if stack.remat == "none":
            return run
        # Inside a scan's loop the compiler cannot merge the recomputation with the forward pass anyway.
        return jax.checkpoint(run, policy=REMAT[stack.remat], prevent_cse=not stacked)

    stacked = not isinstance(stack.layers, nnx.List)
    layers = [nnx.split(layer, nnx.Param) for layer in ([stack.layers] if stacked else stack.layers)]
    count = jax.tree.leaves(layers[0][1])[0].shape[0] if stacked else len(layers)
    keys = None if dropout_key is None else jax.random.split(jax.random.fold_in(dropout_key, 0), count)
    if stacked:
        ((structure, parameters),) = layers
        return jax.lax.scan(runner(structure), x, (parameters, keys))[0]
    for index, (structure, parameters) in enumerate(layers):
        x, _ = runner(structure)(x, (parameters, None if keys is None else keys[index]))
    return x


def prepend(prefix: Float[Array, "X *each"], rows: Float[Array, "B P *each"]) -> Float[Array, "B Q *each"]:
    """Puts the same prefix before every row, in the rows' dtype; Q = X + P."""
    repeated = jnp.broadcast_to(prefix[None].astype(rows.dtype), (len(rows), *prefix.shape))
    return jnp.concatenate([repeated, rows], axis=1)


def add_noise(
    x_BTD: Float[Array, "B T D"], segments_BT: Int[Array, "B T"], *, alpha: float, key: Key[Array, ""]
) -> Float[Array, "B T D"]:
    """Adds NEFTune's noise (arXiv 2310.05914): uniform within `alpha / sqrt(L * D)`, none on padding (segment 0).

    L counts the tokens of a token's example, not of its row. So packing and padding do not change the distribution of
    an example's noise. (Hugging Face takes the padded length.)
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    length_BT = jnp.sum(same_BTT, axis=-1).astype(jnp.float32)
    bound_BT = jnp.where(segments_BT > 0, alpha / jnp.sqrt(length_BT * x_BTD.shape[-1]), 0.0)
    noise_BTD = jax.random.uniform(jax.random.fold_in(key, NOISE_KEY), x_BTD.shape, jnp.float32, -1.0, 1.0)
    return x_BTD + (noise_BTD * bound_BT[..., None]).astype(x_BTD.dtype)


def source_segments(tokens_BS: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Makes segment ids of unpacked source rows: 1 on tokens, 0 on padding (token id 0)."""
    return (tokens_BS > 0).astype(jnp.int32)


class T5(nnx.Module):
    """Encoder-decoder student; `states(source, target_in)` is `decode(encode(source), target_in)`."""

    prompt: Any = None  # adapter slot: vectors placed before the embedded source

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
        """Computes teacher-forced float32 logits: `logits` of the `states`."""
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
        """Computes teacher-forced decoder states, from which `logits` follow. Without a key there is no dropout.

        Packed rows need segment ids. Without them a source row is one example padded with 0, and so is a target row
        (its padding needs no mask: no earlier position can see it).
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
        """Encodes the source. With a prompt, the prompt's encoded vectors come first (P = X + S)."""
        x_BSD = self.token_embedder(encoder_input_tokens)
        if self.config.neftune_alpha and dropout_key is not None:
            x_BSD = add_noise(x_BSD, segment_ids, alpha=self.config.neftune_alpha, key=dropout_key)
        if self.prompt is not None:
            x_BSD = self.prompt.prepend_to(x_BSD)
        return self.encoder(x_BSD, self.attended_segments(segment_ids), dropout_key=dropout_key)

    def attended_segments(self, segment_ids: Int[Array, "B S"]) -> Int[Array, "B P"]:
        """Returns the segment ids of the encoder output: 1 for a prompt's vectors, then those of the source."""
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
        """Computes decoder states; `encoder_segment_ids` are those of the source, as given to `encode`."""
        x_BTD = self.token_embedder(decoder_input_tokens)
        if self.config.neftune_decoder_alpha and dropout_key is not None:
            # Without segments, padding is known by its id 0, which is also the first token of every target.
            begins = (jnp.arange(x_BTD.shape[1]) == 0)[None, :]
            found = (decoder_input_tokens > 0) | begins if decoder_segment_ids is None else decoder_segment_ids
            alpha = self.config.neftune_decoder_alpha
            x_BTD = add_noise(x_BTD, found.astype(jnp.int32), alpha=alpha, key=dropout_key)
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
        """Computes float32 logits from decoder states."""
        y_BTD, kernel_DV = self.projection(y_BTD)
        return constrain(matmul(y_BTD, kernel_DV, dtype=jnp.float32), ("batch", "length", "activation_vocab"))

    def projection(self, y_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """Returns the two factors of the logits; with a tied table, states are scaled by D^-0.5 (as in Mesh TF)."""
        if self.config.logits_via_embedding:
            table_VD = gather(self.token_embedder.embedding[...].astype(y_BTD.dtype), ("vocab", "embed"))
            return y_BTD * self.config.emb_dim**-0.5, table_VD.T
        return y_BTD, gather(self.logits_dense.kernel[...].astype(y_BTD.dtype), ("embed", "vocab"))


def _fold(key: Key[Array, ""] | None, number: int) -> Key[Array, ""] | None:
    return None if key is None else jax.random.fold_in(key, number)


# A model outside a call: the static `Structure`, and the pytree of `Parameters` that is trained, sharded and saved.
Structure = Any
Parameters = dict[str, jax.Array]


def split(model: nnx.Module) -> tuple[Structure, Parameters]:
    """Splits a model into its structure and `{"encoder/layers/0/mlp/wo/kernel": float32 array, ..}`."""
    structure, state = nnx.split(model, nnx.Param)
    return structure, {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def join(structure: Structure, parameters: Parameters) -> T5:
    """Inverts `split`; also takes tracers or gradients in place of arrays."""
    flat = [
        (tuple(int(part) if part.isdigit() else part for part in name.split("/")), nnx.Param(x))
        for name, x in parameters.items()
    ]
    return nnx.merge(structure, nnx.from_flat_state(flat))


def init(config: T5Config, *, seed: int) -> tuple[Structure, Parameters]:
    """Initializes parameters. Traceable: `jax.eval_shape(lambda: init(config, seed=0)[1])` costs no memory."""
    return split(T5(config, rngs=nnx.Rngs(seed)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Options of a student's computation; files, results and gradients stay the same.

    `layers` "scanned" compiles one layer of a stack and loops over it, with parameters stacked in memory (stacking.py);
    "unrolled" compiles every layer. `remat` names how much the backward pass recomputes, a key of `REMAT`.
    """

    layers: str
    remat: str

    def __post_init__(self) -> None:
        checks.choice("Execution.layers", self.layers, LAYERS)
        checks.choice("Execution.remat", self.remat, REMAT)


UNROLLED = Execution(layers="unrolled", remat="none")


def abstract(
    config: T5Config, *, execution: Execution = UNROLLED, change: Callable[[T5], None] = lambda model: None
) -> tuple[Structure, dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str, ...]]]:
    """Returns structure, shapes and logical axes of all parameters without computing any; stacked if scanned.

    `change` may add or replace submodules before shapes are computed.
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
            setattr(side, "layers", side.layers[0])  # noqa: B010  (one layer in place of a list)
    return nnx.split(model, nnx.Param)[0], shapes, axes
