"""The student: T5 v1.0 and v1.1 in Flax NNX. `stepping.py` runs its decoder one position at a time.

Array names end in their axes. These letters are used in every file of this package:

    B batch (rows)   S source position   T target position   D model width
    H heads          K width of a head   F width of the MLP  V vocabulary

A model holds parameters and nothing else; dropout keys are arguments of a call (families.py splits and joins models).
Parameter names, shapes and initial scales are those of T5X's `network.py` (kernels `[in, heads * head_dim]`, relative
bias `[heads, buckets]`).

A packed row holds several examples, separated by segment ids (1, 2, .. per example, 0 for padding). An unpacked row is
one segment.

Adapter slots (LoRA, prefixes, ..) are None here; `adapters.py` fills them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from sbs_jax.student import stacks, stepping
from sbs_jax.student.layers import Dense, Dropout, TokenEmbedder
from sbs_jax.student.stacks import Execution as Execution  # gin files call it t5.Execution
from sbs_jax.student.t5_layers import (
    DecoderLayer,
    EncoderLayer,
    RelativePositionBias,
    T5Config,
    norm_of,
    position_bias,
)


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

        def call(layer: EncoderLayer, x_BSD: Array, dropout: Dropout, _: None) -> tuple[Array, None]:
            return layer(x_BSD, bias=bias, segments_BS=segment_ids_BS, dropout=dropout), None

        x_BSD, _ = stacks.run_layers(self, dropout(x_BSD), call, dropout_key=dropout_key)
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

        def call(layer: DecoderLayer, x_BTD: Array, dropout: Dropout, _: None) -> tuple[Array, None]:
            x_BTD = layer(
                x_BTD,
                encoded_BSD,
                bias=bias,
                segments_BT=segment_ids_BT,
                encoder_segments_BS=encoder_segment_ids_BS,
                dropout=dropout,
            )
            return x_BTD, None

        x_BTD, _ = stacks.run_layers(self, dropout(x_BTD), call, dropout_key=dropout_key)
        return dropout(self.decoder_norm(x_BTD))


def _shared_bias(stack: Encoder | Decoder, length: int) -> Float[Array, "H T T"] | None:
    """Computes the stack's relative position bias, or returns None if every layer has its own."""
    return position_bias(stack, length) if hasattr(stack, "relpos_bias") else None


class T5(stacks.EncoderDecoder):
    """T5 v1.0 or v1.1."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.token_embedder = TokenEmbedder(config.vocab_size, config.emb_dim, std=1.0, dtype=config.dtype, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        if not config.logits_via_embedding:
            self.logits_dense = stacks.untied(config, rngs=rngs)

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
            x_BTD = stacks.add_noise(x_BTD, found.astype(jnp.int32), alpha=alpha, key=dropout_key)
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_input_tokens)
        return self.decoder(
            x_BTD,
            encoded_BPD,
            segment_ids_BT=decoder_segment_ids,
            encoder_segment_ids_BS=self.attended_segments(encoder_segment_ids),
            dropout_key=dropout_key,
        )

    def step_layers(
        self, encoded_BPD: Float[Array, "B P D"], segments_BP: Int[Array, "B P"], *, length: int, beams: int
    ) -> list[stepping.Layer]:
        """Computes everything of the decoder's layers that does not depend on the position, for `stepping.Stepper`."""
        c, positions = self.config, jnp.arange(length)

        def position_bias(module: RelativePositionBias) -> Float[Array, "T H P"]:
            bias_HTP = module(positions, positions)[0] + stepping.causal(length)[None]
            return jnp.repeat(bias_HTP.swapaxes(0, 1), beams, axis=-1)

        def source(dense: Dense, prefix_XJ: jax.Array | None) -> jax.Array:
            found_BPJ = dense(encoded_BPD)
            if prefix_XJ is not None:
                found_BPJ = stacks.prepend(prefix_XJ, found_BPJ)
            return stepping.layout(found_BPJ, c.num_heads)

        source_bias = stepping.source_bias(segments_BP)
        shared = position_bias(self.decoder.relpos_bias) if hasattr(self.decoder, "relpos_bias") else None
        found = []
        for layer in self.decoder.layers:
            own, cross = layer.self_attention, layer.encoder_decoder_attention
            own_prefix, cross_prefix = map(stepping.prefix_of, (own, cross))
            bias_THP = position_bias(layer.relpos_bias) if shared is None else shared
            cross_keys, cross_values = cross_prefix or (None, None)
            attending = stepping.Attending(
                norm=stepping.norm(layer.pre_self_attention_layer_norm),
                query=stepping.placed(stepping.inward(own.query, c)),
                out=stepping.outward(own.out, c, after=[layer.self_attention_adapter]),
                own=stepping.Own(
                    key=stepping.placed(stepping.inward(own.key, c)),
                    value=stepping.inward(own.value, c),
                    bias=stepping.pad_bias(bias_THP, own_prefix),
                    prefix=own_prefix,
                ),
            )
            over_source = stepping.Attending(
                norm=stepping.norm(layer.pre_cross_attention_layer_norm),
                query=stepping.placed(stepping.inward(cross.query, c)),
                out=stepping.outward(cross.out, c, after=[layer.encoder_decoder_attention_adapter]),
                source=stepping.Source(
                    keys=source(cross.key, cross_keys),
                    values=source(cross.value, cross_values),
                    bias=stepping.pad_bias(source_bias, cross_prefix),
                ),
            )
            mlp = stepping.mlp(layer.mlp, c, before=layer.pre_mlp_layer_norm, after=[layer.mlp_adapter])
            found.append(stepping.Layer((attending, over_source), mlp))
        return found
