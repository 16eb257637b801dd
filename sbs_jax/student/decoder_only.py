"""Decoder-only students (Llama, Qwen3, Gemma 3) behind the contract of T5: a source, then a target in the same row.

Letters as in t5.py, and G heads of keys and values, L = P + T positions of a row.

A row is read as one sequence: the source, which ends in EOS, then `decoder_start`, then the target. So a batch is that
of an encoder-decoder, and the same model elsewhere continues the prompt `source + [decoder_start]`. A source token sees
earlier source tokens of its example, or all of them (`source_attention`); a target token sees its source and earlier
target tokens. Positions count within an example, across source and target, so packing and padding change nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from sbs_jax import checks
from sbs_jax.student import attention, rotary, stacks, stepping
from sbs_jax.student.layers import Dropout, TokenEmbedder

# How source tokens see one another: only earlier ones, or all of their example (a prefix language model).
SOURCE_ATTENTIONS = ("causal", "bidirectional")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(rotary.RotaryConfig):
    """Architecture of a decoder-only student: Llama (SmolLM2), Qwen3, Gemma 3.

    `decoder_start` separates source and target.
    """

    num_layers: int
    source_attention: str = "causal"  # a key of SOURCE_ATTENTIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("DecoderConfig.source_attention", self.source_attention, SOURCE_ATTENTIONS)

    @property
    def _layer_counts(self) -> Sequence[str]:
        return ("num_layers",)

    @property
    def stack_layers(self) -> dict[str, int]:
        """Returns the number of layers of each stack."""
        return {"decoder": self.num_layers}

    @property
    def decoder_weights(self) -> int:
        """Counts the numbers in the matrices of the layers."""
        return self.num_layers * (self.attention_weights + self.mlp_weights)


class Decoder(rotary.Stack):
    """Stack of layers over a row of embedded source and target."""

    name = "decoder"

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, [rotary.Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.decoder_norm = rotary.norm_of(config)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        *,
        segments_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        ranks_BL: Int[Array, "B L"],
        dropout_key: Key[Array, ""] | None,
        keep: bool = False,
        first: int = 0,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """Runs the layers, before the final norm: see `rotary.Stack.run`."""
        window = self.config.window or 0
        return self.run(
            x_BLD,
            positions_BL=positions_BL,
            reach=(window, window),
            order=attention.Order.of_row(ranks_BL, positions_BL),
            segments=(segments_BL, segments_BL),
            dropout_key=dropout_key,
            keep=keep,
            first=first,
        )


class DecoderOnly(stacks.Student):
    """Decoder-only student; `states` reads source and target as one row."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        self.token_embedder = TokenEmbedder(c.vocab_size, c.emb_dim, std=c.emb_dim**-0.5, dtype=c.dtype, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)
        if not c.logits_via_embedding:
            self.logits_dense = stacks.untied(c, rngs=rngs)

    @property
    def stacks(self) -> dict[str, Decoder]:
        """Returns the stacks of layers by name."""
        return {"decoder": self.decoder}

    def states(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        decoder_input_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Computes teacher-forced states of the target, from which `logits` follow. Without a key there is no dropout.

        The first decoder input of each example is read as `decoder_start`, whatever it is. Packed rows need segment
        ids, ascending in both halves; without them a row is one example, padded with 0.
        """
        if encoder_segment_ids is None:
            encoder_segment_ids = stacks.source_segments(encoder_input_tokens)
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_input_tokens)
        x_BPD = self.embed_source(encoder_input_tokens, encoder_segment_ids, dropout_key=dropout_key)
        segments_BP = self.attended_segments(encoder_segment_ids)
        within_BP, within_BT = rotary.within(segments_BP), rotary.within(decoder_segment_ids)
        started_BT = rotary.started(decoder_input_tokens, decoder_segment_ids, c=self.config)
        source_BT = jnp.sum(segments_BP[:, None, :] == decoder_segment_ids[:, :, None], axis=-1, dtype=jnp.int32)
        x_BLD, _ = self.decoder(
            jnp.concatenate([x_BPD, self.embed(started_BT)], axis=1),
            segments_BL=jnp.concatenate([segments_BP, decoder_segment_ids], axis=1),
            positions_BL=jnp.concatenate([within_BP, source_BT + within_BT], axis=1),
            ranks_BL=jnp.concatenate([self._source_ranks(within_BP), source_BT + within_BT], axis=1),
            dropout_key=dropout_key,
            first=x_BPD.shape[1],
        )
        y_BTD = self.decoder.decoder_norm(x_BLD[:, -started_BT.shape[1] :])
        return Dropout(self.config.dropout_rate, stacks.fold(dropout_key, 1))(y_BTD)

    def _source_ranks(self, within_BP: Int[Array, "B P"]) -> Int[Array, "B P"]:
        """Returns the ranks of source tokens: their positions, or all the same if they see one another."""
        return within_BP if self.config.source_attention == "causal" else jnp.zeros_like(within_BP)

    def encode(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        *,
        segment_ids: Int[Array, "B S"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> list[tuple[Float[Array, "B P G K"], Float[Array, "B P G K"]]]:
        """Runs the source alone and returns each layer's keys and values, which all decoding steps read."""
        x_BPD = self.embed_source(encoder_input_tokens, segment_ids, dropout_key=dropout_key)
        segments_BP = self.attended_segments(segment_ids)
        within_BP = rotary.within(segments_BP)
        _, found = self.decoder(
            x_BPD,
            segments_BL=segments_BP,
            positions_BL=within_BP,
            ranks_BL=self._source_ranks(within_BP),
            dropout_key=dropout_key,
            keep=True,
        )
        return found

    def step_layers(
        self, encoded: list[tuple[Array, Array]], segments_BP: Int[Array, "B P"], *, length: int, beams: int
    ) -> list[stepping.Layer]:
        """Computes everything of the layers that does not depend on the position, for `stepping.Stepper`."""
        c, found = self.config, []
        for number, (layer, pair) in enumerate(zip(self.decoder.layers, encoded, strict=True)):
            joined = [each_BPGK.reshape(*each_BPGK.shape[:2], -1) for each_BPGK in pair]
            source = rotary.source_of(layer.self_attention, joined, segments_BP, c=c)
            window = None if c.is_global(number) else c.window
            attending = layer.step_attention(c, number, source, length=length, beams=beams, window=window)
            found.append(stepping.Layer((attending,), layer.step_mlp(c)))
        return found

    def places_before(self, segments_BP: Int[Array, "B P"]) -> Int[Array, "B"]:
        """Counts the positions before a target's first: its source's."""
        return jnp.sum(segments_BP == 1, axis=1)
