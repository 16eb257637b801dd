"""Runs and recomputes stacks of layers, for all families; embeds their inputs and computes logits of their states.

Letters as in t5.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from sbs_jax import checks
from sbs_jax.student import attention
from sbs_jax.student.layers import NOISE_KEY, Dense, Dropout, TokenEmbedder, capped, matmul
from sbs_jax.student.partitioning import constrain, gather

_saved = jax.checkpoint_policies.save_only_these_names
# Values that a layer's forward pass stores for the backward pass; the backward pass recomputes all others.
REMAT: dict[str, Any] = {
    "none": None,  # everything is stored
    "minimal": _saved("projected", "residual", *attention.SAVED),  # matrix products, except attention scores
    "attended": _saved(*attention.SAVED),  # attention outputs
    "full": jax.checkpoint_policies.nothing_saveable,  # only the layer's input
}
LAYERS = ("scanned", "unrolled")


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


def run_layers(
    stack: Any,
    x: Float[Array, "B T D"],
    call: Callable[[Any, Array, Dropout, Any], Any],
    *,
    dropout_key: Key[Array, ""] | None,
    each: Any = None,
    last: Callable[[Any, Array, Dropout, Any], Any] | None = None,
) -> tuple[Float[Array, "B _ D"], Any]:
    """Runs `x` through a stack's `layers`, unrolled or scanned, by `call(layer, x, dropout, of_layer) -> (x, found)`.

    `last` takes the place of `call` for the last of unrolled layers, and may return fewer positions.
    `each` is a pytree of arrays whose first axis is the layer; `of_layer` is the layer's part. Returns the last `x`,
    and what the layers found: a list of it, or stacked if scanned.
    """

    def runner(structure: Any, call: Any = call) -> Callable[[Array, tuple[Any, Any, Any]], tuple[Array, Any]]:
        def run(x: Array, layer: tuple[Any, Any, Any]) -> tuple[Array, Any]:
            parameters, key, of_layer = layer
            return call(nnx.merge(structure, parameters), x, Dropout(stack.dropout_rate, key), of_layer)

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
        return jax.lax.scan(runner(structure), x, (parameters, keys, each))
    found = []
    for index, (structure, parameters) in enumerate(layers):
        of_layer = jax.tree.map(lambda values, index=index: values[index], each)
        this = call if last is None or index + 1 < count else last
        x, of_this = runner(structure, this)(x, (parameters, None if keys is None else keys[index], of_layer))
        found.append(of_this)
    return x, found


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


def fold(key: Key[Array, ""] | None, number: int) -> Key[Array, ""] | None:
    """Folds a number into a dropout key, if there is one."""
    return None if key is None else jax.random.fold_in(key, number)


def is_token(tokens_BT: Int[Array, "B T"]) -> Any:
    """Returns True on tokens and False on padding, bool [B, T]: the zeros after the last other token of a row.

    Every row of ours ends in EOS, which is not 0. So a vocabulary may use id 0 for a piece of text (Qwen3's is "!").
    """
    # Counts the tokens from here on. A cumulative maximum of integers has no form in ONNX.
    return jax.lax.cumsum((tokens_BT > 0).astype(jnp.int32), axis=1, reverse=True) > 0


def source_segments(tokens_BS: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Makes segment ids of unpacked source rows: 1 on tokens, 0 on padding."""
    return is_token(tokens_BS).astype(jnp.int32)


class Student(nnx.Module):
    """Base of the families' models: from tokens to inputs, from states to logits, and the place of a prompt."""

    config: Any
    token_embedder: TokenEmbedder
    target_embedder: TokenEmbedder | None = None  # a decoder's own table; None: the same
    logits_dense: Dense  # only without a tied table
    prompt: Any = None  # adapter slot: vectors placed before the embedded source

    def states(self, *tokens: Any, **options: Any) -> Float[Array, "B T D"]:
        """Computes teacher-forced states; each family has its own."""
        raise NotImplementedError

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

    def embed(self, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Embeds tokens of the source, with Gemma times sqrt(D) in the dtype of the computation."""
        return self._scaled(self.token_embedder(tokens_BS))

    def embed_target(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds decoder inputs."""
        return self._scaled(self.output_embedder(tokens_BT))

    def _scaled(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.config.embedding_scale
        return x_BTD if scale == 1.0 else x_BTD * jnp.asarray(scale, x_BTD.dtype)

    @property
    def output_embedder(self) -> TokenEmbedder:
        """Returns the decoder's table, which is also the matrix of tied logits."""
        return self.token_embedder if self.target_embedder is None else self.target_embedder

    def places_before(self, segments_BP: Int[Array, "B P"]) -> Int[Array, "B"]:
        """Counts the positions before a target's first: none, if a target counts for itself."""
        return jnp.zeros(len(segments_BP), jnp.int32)

    def embed_source(
        self, tokens_BS: Int[Array, "B S"], segments_BS: Int[Array, "B S"], *, dropout_key: Key[Array, ""] | None
    ) -> Float[Array, "B P D"]:
        """Embeds the source, in training with NEFTune's noise; a prompt's vectors come first (P = X + S)."""
        x_BSD = self.embed(tokens_BS)
        if self.config.neftune_alpha and dropout_key is not None:
            x_BSD = add_noise(x_BSD, segments_BS, alpha=self.config.neftune_alpha, key=dropout_key)
        return x_BSD if self.prompt is None else self.prompt.prepend_to(x_BSD)

    def attended_segments(self, segment_ids: Int[Array, "B S"]) -> Int[Array, "B P"]:
        """Returns the segment ids of the encoder output: 1 for a prompt's vectors, then those of the source."""
        if self.prompt is None:
            return segment_ids
        return jnp.pad(segment_ids, ((0, 0), (self.prompt.length, 0)), constant_values=1)

    def logits(self, y_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Computes float32 logits from decoder states."""
        y_BTD, kernel_DV = self.projection(y_BTD)
        logits_BTV = constrain(matmul(y_BTD, kernel_DV, dtype=jnp.float32), ("batch", "length", "activation_vocab"))
        return capped(logits_BTV, self.config.logits_cap)

    def projection(self, y_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """Returns the factors of the logits before a cap: states, times the family's scale if any, and the matrix."""
        if self.config.logits_scale is not None:
            y_BTD = y_BTD * self.config.logits_scale
        if self.config.logits_via_embedding:
            return y_BTD, self.output_embedder.table(y_BTD.dtype).T
        return y_BTD, gather(self.logits_dense.kernel[...].astype(y_BTD.dtype), ("embed", "vocab"))


class EncoderDecoder(Student):
    """Base of students whose `states(source, target_in)` are `decode(encode(source), target_in)`."""

    encoder: Any
    decoder: Any

    @property
    def stacks(self) -> dict[str, Any]:
        """Returns the stacks of layers by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}

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
            encoder_input_tokens, segment_ids=encoder_segment_ids, dropout_key=fold(dropout_key, 0)
        )
        return self.decode(
            encoded_BPD,
            decoder_input_tokens,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            dropout_key=fold(dropout_key, 1),
        )

    def encode(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        *,
        segment_ids: Int[Array, "B S"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B P D"]:
        """Encodes the source. With a prompt, the prompt's encoded vectors come first (P = X + S)."""
        x_BPD = self.embed_source(encoder_input_tokens, segment_ids, dropout_key=dropout_key)
        return self.encoder(x_BPD, self.attended_segments(segment_ids), dropout_key=dropout_key)

    def decode(self, encoded_BPD: Float[Array, "B P D"], *tokens: Any, **options: Any) -> Float[Array, "B T D"]:
        """Computes decoder states; each family has its own."""
        raise NotImplementedError


def untied(config: Any, *, rngs: nnx.Rngs) -> Dense:
    """Makes the matrix of logits that are not tied to a table."""
    shape = (config.emb_dim, config.vocab_size)
    return Dense(shape, axes=("embed", "vocab"), std=config.emb_dim**-0.5, dtype=config.dtype, rngs=rngs)
