"""Encoder-decoder students made of Gemma's layers: T5Gemma 2 (arXiv 2512.14856) and T5Gemma (arXiv 2504.06225).

Letters as in t5.py. The encoder's layers see both directions. A decoder layer of T5Gemma 2 attends to the target and to
the encoder output in one softmax, with the same queries, keys and values for both; the source's keys do not rotate.
T5Gemma has a second attention for the source instead, and a table of its own for the decoder.

Positions count within an example, so packing and padding change nothing. Images are not read: text only.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from sbs_jax import checks
from sbs_jax.student import attention, layers, rotary, stacks, stepping

# How a local layer of the encoder sees: T5Gemma 2's window is as wide as the decoder's but lies around the query, and
# T5Gemma's reaches that far to either side.
ENCODER_WINDOWS = ("around", "either_side")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5GemmaConfig(rotary.RotaryConfig):
    """Architecture of a T5Gemma 2 (`merged_attention`, one table) or a T5Gemma (without, two tables)."""

    num_encoder_layers: int
    num_decoder_layers: int
    merged_attention: bool
    shared_table: bool  # False: the decoder has its own
    encoder_window: str = "around"  # one of ENCODER_WINDOWS
    post_norms: bool = True
    norm_plus_one: bool = True
    scale_embeddings: bool = True
    neftune_decoder_alpha: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("T5GemmaConfig.encoder_window", self.encoder_window, ENCODER_WINDOWS)
        checks.number("T5GemmaConfig.neftune_decoder_alpha", self.neftune_decoder_alpha, least=0.0)

    @property
    def _layer_counts(self) -> Sequence[str]:
        return ("num_encoder_layers", "num_decoder_layers")

    @property
    def stack_layers(self) -> dict[str, int]:
        """Returns the number of layers of each stack."""
        return {"encoder": self.num_encoder_layers, "decoder": self.num_decoder_layers}

    @property
    def decoder_weights(self) -> int:
        """Counts the numbers in the matrices of the decoder's layers, those over the source not left out."""
        attentions = 1 if self.merged_attention else 2
        return self.num_decoder_layers * (attentions * self.attention_weights + self.mlp_weights)

    @property
    def encoder_reach(self) -> tuple[int, int]:
        """Returns the distances behind and ahead that end the window of the encoder's local layers."""
        window = self.window or 0
        if self.encoder_window == "around":
            return (window + 1) // 2, window // 2 + 1
        return window + 1, window + 1


class Encoder(rotary.Stack):
    """Encoder stack; its input is the embedded source."""

    name = "encoder"

    def __init__(self, config: T5GemmaConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, [rotary.Layer(config, rngs=rngs) for _ in range(config.num_encoder_layers)])
        self.encoder_norm = rotary.norm_of(config)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], segments_BS: Int[Array, "B S"], *, dropout_key: Key[Array, ""] | None
    ) -> Float[Array, "B S D"]:
        positions_BS = rotary.within(segments_BS)
        x_BSD, _ = self.run(
            x_BSD,
            positions_BL=positions_BS,
            reach=self.config.encoder_reach,
            order=attention.Order.of_row(jnp.zeros_like(positions_BS), positions_BS),
            segments=(segments_BS, segments_BS),
            dropout_key=dropout_key,
        )
        return layers.Dropout(self.dropout_rate, stacks.fold(dropout_key, 1))(self.encoder_norm(x_BSD))


class Decoder(rotary.Stack):
    """Decoder stack: from embedded target and encoded source to states, which `T5Gemma.logits` reads."""

    name = "decoder"

    def __init__(self, config: T5GemmaConfig, *, rngs: nnx.Rngs) -> None:
        kind = rotary.Layer if config.merged_attention else CrossLayer
        super().__init__(config, [kind(config, rngs=rngs) for _ in range(config.num_decoder_layers)])
        self.decoder_norm = rotary.norm_of(config)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        encoded_BPD: Float[Array, "B P D"],
        *,
        segments_BT: Int[Array, "B T"],
        source_segments_BP: Int[Array, "B P"],
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        positions_BT = rotary.within(segments_BT)
        order = attention.Order.of_row(positions_BT, positions_BT)
        of_layer: dict[str, Any] = {"source_BPD": encoded_BPD, "segments": (segments_BT, segments_BT)}
        if self.config.merged_attention:
            order = order.with_unordered(source_segments_BP.shape[1])
            of_layer["segments"] = segments_BT, jnp.concatenate([segments_BT, source_segments_BP], axis=1)
        else:
            of_layer["source_segments_BP"] = source_segments_BP
        window = self.config.window or 0
        x_BTD, _ = self.run(
            x_BTD, positions_BL=positions_BT, reach=(window, window), order=order, dropout_key=dropout_key, **of_layer
        )
        return layers.Dropout(self.dropout_rate, stacks.fold(dropout_key, 1))(self.decoder_norm(x_BTD))


class CrossLayer(rotary.Layer):
    """Layer of T5Gemma's decoder: self-attention, attention over the source, then the MLP."""

    encoder_decoder_attention_adapter: Any = None

    def __init__(self, c: T5GemmaConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        self.pre_cross_attention_layer_norm, self.post_cross_attention_layer_norm = (
            rotary.norm_of(c) for _ in range(2)
        )
        self.encoder_decoder_attention = rotary.Attention(c, rngs=rngs)

    def __call__(
        self,
        x_BLD: Float[Array, "B T D"],
        *,
        dropout: layers.Dropout,
        source_BPD: Float[Array, "B P D"],
        source_segments_BP: Int[Array, "B P"],
        **attending: Any,
    ) -> tuple[Float[Array, "B T D"], rotary.Pair]:
        """Runs the layer; other arguments are those of `self_attend`."""
        x_BLD, found = self.self_attend(x_BLD, dropout=dropout, **attending)
        y_BLD, _ = self.encoder_decoder_attention(
            self.pre_cross_attention_layer_norm(x_BLD),
            by=None,
            keys_of=[(source_BPD, None)],
            order=None,
            segments=(attending["segments"][0], source_segments_BP),
            dropout=dropout,
        )
        y_BLD = self.post_cross_attention_layer_norm(y_BLD)
        x_BLD = layers.add_residual(x_BLD, dropout(y_BLD), adapter=self.encoder_decoder_attention_adapter)
        return self.after_attention(x_BLD, dropout), found

    def step_over_source(self, c: T5GemmaConfig, source: stepping.Source) -> stepping.Attending:
        """Describes the attention over the source for cached decoding."""
        cross = self.encoder_decoder_attention
        after = [self.post_cross_attention_layer_norm, self.encoder_decoder_attention_adapter]
        return stepping.Attending(
            norm=stepping.norm(self.pre_cross_attention_layer_norm),
            query=cross.placed("query", is_global=None),
            out=stepping.outward(cross.out, c, after=after),
            source=source,
        )


class T5Gemma(stacks.EncoderDecoder):
    """T5Gemma 2 or T5Gemma."""

    def __init__(self, config: T5GemmaConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config

        def table() -> layers.TokenEmbedder:
            return layers.TokenEmbedder(c.vocab_size, c.emb_dim, std=c.emb_dim**-0.5, dtype=c.dtype, rngs=rngs)

        self.token_embedder = table()
        if not c.shared_table:
            self.target_embedder = table()
        self.encoder, self.decoder = Encoder(c, rngs=rngs), Decoder(c, rngs=rngs)
        if not c.logits_via_embedding:
            self.logits_dense = stacks.untied(c, rngs=rngs)

    def decode(
        self,
        encoded_BPD: Float[Array, "B P D"],
        decoder_input_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"],
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Computes decoder states; `encoder_segment_ids` are those of the source, as given to `encode`.

        The first decoder input of each example is read as `decoder_start`, whatever it is.
        """
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_input_tokens)
        x_BTD = self.embed_target(rotary.started(decoder_input_tokens, decoder_segment_ids, c=self.config))
        if self.config.neftune_decoder_alpha and dropout_key is not None:
            alpha = self.config.neftune_decoder_alpha
            x_BTD = stacks.add_noise(x_BTD, decoder_segment_ids, alpha=alpha, key=dropout_key)
        return self.decoder(
            x_BTD,
            encoded_BPD,
            segments_BT=decoder_segment_ids,
            source_segments_BP=self.attended_segments(encoder_segment_ids),
            dropout_key=dropout_key,
        )

    def step_layers(
        self, encoded_BPD: Float[Array, "B P D"], segments_BP: Int[Array, "B P"], *, length: int, beams: int
    ) -> list[stepping.Layer]:
        """Computes everything of the decoder's layers that does not depend on the position, for `stepping.Stepper`."""
        c, found = self.config, []

        def source(module: rotary.Attention) -> stepping.Source:
            return rotary.source_of(module, module.source_keys(encoded_BPD), segments_BP, c=c)

        for number, layer in enumerate(self.decoder.layers):
            how: dict[str, Any] = {"length": length, "beams": beams, "window": None}
            if c.merged_attention:
                attentions = (layer.step_attention(c, number, source(layer.self_attention), **how),)
            else:
                cross = source(layer.encoder_decoder_attention)
                attentions = layer.step_attention(c, number, None, **how), layer.step_over_source(c, cross)
            found.append(stepping.Layer(attentions, layer.step_mlp(c)))
        return found
