"""Decoder-only students (Llama, Qwen3, Gemma 3) behind the contract of T5: a source, then a target in the same row.

Letters as in t5.py, and G heads of keys and values, L = P + T positions of a row.

A row is read as one sequence: the source, which ends in EOS, then `decoder_start`, then the target. So a batch is that
of an encoder-decoder, and the same model elsewhere continues the prompt `source + [decoder_start]`. A source token sees
earlier source tokens of its example, or all of them (`source_attention`); a target token sees its source and earlier
target tokens. Positions count within an example, across source and target, so packing and padding change nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from sbs_jax.student import attention, stacks, stepping
from sbs_jax.student.decoder_layers import DecoderConfig, DecoderLayer, Rotation, norm_of, rotation
from sbs_jax.student.layers import Dense, Dropout, TokenEmbedder


class Decoder(nnx.Module):
    """Stack of layers over a row of embedded source and target."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.decoder_norm = norm_of(config)
        self.config = config
        self.dropout_rate = config.dropout_rate
        self.remat = "none"

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        *,
        segments_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        ranks_BL: Int[Array, "B L"],
        dropout_key: Key[Array, ""] | None,
        keep: bool = False,
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Runs the layers, before the final norm; with `keep`, also returns each layer's keys and values."""
        c = self.config
        # One kind of layer, or the two kinds (local, global) in this order.
        kinds = (True,) if c.window is None else (False, True)
        tables = jax.tree.map(
            lambda *each: jnp.stack(each), *(rotation(c, positions_BL, is_global=kind) for kind in kinds)
        )
        kind_of = np.array([kinds.index(c.is_global(layer)) for layer in range(c.num_layers)], np.int32)

        def call(layer: DecoderLayer, x_BLD: Array, dropout: Dropout, kind: Any) -> tuple[Array, Any]:
            by: Rotation = jax.tree.map(lambda table: table[kind], tables)
            window = None if c.window is None else jnp.asarray((c.window, jnp.iinfo(jnp.int32).max))[kind]
            order = attention.Order(ranks_BL, positions_BL, window)
            x_BLD, found = layer(x_BLD, by=by, order=order, segments_BL=segments_BL, dropout=dropout)
            return x_BLD, found if keep else None

        dropout = Dropout(self.dropout_rate, dropout_key)
        return stacks.run_layers(self, dropout(x_BLD), call, dropout_key=dropout_key, each=kind_of)


class DecoderOnly(stacks.Student):
    """Decoder-only student; `states` reads source and target as one row."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        std = c.emb_dim**-0.5
        self.token_embedder = TokenEmbedder(c.vocab_size, c.emb_dim, std=std, dtype=c.dtype, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)
        if not c.logits_via_embedding:
            self.logits_dense = Dense(
                (c.emb_dim, c.vocab_size), axes=("embed", "vocab"), std=std, dtype=c.dtype, rngs=rngs
            )

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
        within_BP, within_BT = within(segments_BP), within(decoder_segment_ids)
        started_BT = jnp.where(within_BT == 0, self.config.decoder_start, decoder_input_tokens)
        source_BT = jnp.sum(segments_BP[:, None, :] == decoder_segment_ids[:, :, None], axis=-1, dtype=jnp.int32)
        x_BLD, _ = self.decoder(
            jnp.concatenate([x_BPD, self.embed(started_BT)], axis=1),
            segments_BL=jnp.concatenate([segments_BP, decoder_segment_ids], axis=1),
            positions_BL=jnp.concatenate([within_BP, source_BT + within_BT], axis=1),
            ranks_BL=jnp.concatenate([self._source_ranks(within_BP), source_BT + within_BT], axis=1),
            dropout_key=dropout_key,
        )
        y_BTD = self.decoder.decoder_norm(x_BLD[:, x_BPD.shape[1] :])
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
        within_BP = within(segments_BP)
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
        c = self.config
        source_bias = stepping.source_bias(segments_BP)
        found = []
        for number, (layer, pair) in enumerate(zip(self.decoder.layers, encoded, strict=True)):
            own, prefix = layer.self_attention, stepping.prefix_of(layer.self_attention)
            window = None if c.is_global(number) else c.window
            source = [each_BPGK.reshape(*each_BPGK.shape[:2], -1) for each_BPGK in pair]
            if prefix is not None:
                source = [stacks.prepend(first, rest) for first, rest in zip(prefix, source, strict=True)]
            keys, values = (stepping.layout(each_BPJ, c.num_kv_heads) for each_BPJ in source)
            bias_TP = jnp.repeat(stepping.causal(length, window=window), beams, axis=-1)
            attending = stepping.Attending(
                norm=stepping.norm(layer.pre_self_attention_layer_norm),
                query=self._placed(layer, number, "query"),
                out=stepping.outward(
                    *(own.out, c), after=[layer.post_self_attention_layer_norm, layer.self_attention_adapter]
                ),
                own=stepping.Own(
                    key=self._placed(layer, number, "key"),
                    value=stepping.inward(own.value, c),
                    bias=bias_TP[:, None, :],
                ),
                source=stepping.Source(keys, values, stepping.pad_bias(source_bias, prefix)),
                window=window,
            )
            after = [layer.post_mlp_layer_norm, layer.mlp_adapter]
            mlp = stepping.mlp(layer.mlp, c, before=layer.pre_mlp_layer_norm, after=after)
            found.append(stepping.Layer((attending,), mlp))
        return found

    def _placed(self, layer: DecoderLayer, number: int, kind: str) -> stepping.Placed:
        """Returns the product of a position's queries or keys, which it norms and rotates."""
        c, module = self.config, layer.self_attention
        product = stepping.inward(getattr(module, kind), c)

        def project(y_BND: Array, places_B: Array) -> Array:
            x_BNJ = product(y_BND)
            x_BNHK = x_BNJ.reshape(*x_BNJ.shape[:2], -1, c.head_dim)
            by = rotation(c, places_B[:, None], is_global=c.is_global(number))
            x_BNHK = module.finished(x_BNHK, kind, by)
            return (x_BNHK * c.scale if kind == "query" else x_BNHK).reshape(x_BNJ.shape)

        return project


def within(segments_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Numbers the tokens of each segment from 0: segments [1, 1, 2, 2, 2, 0] give [0, 1, 0, 1, 2, 0]."""
    index_BL = jnp.broadcast_to(jnp.arange(segments_BL.shape[1])[None], segments_BL.shape)
    begins_BL = jnp.pad(segments_BL[:, 1:] != segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index_BL - jax.lax.cummax(jnp.where(begins_BL, index_BL, 0), axis=1)
