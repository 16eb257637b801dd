"""Floating-point operations of the model's definition, for model FLOP utilization."""

from collections.abc import Callable
from typing import Any

from sbs_jax.student import decoder_only, families, t5, t5gemma


def training_flops(config: families.ModelConfig, *, rows: int, inputs: int, targets: int, trained: float = 1.0) -> int:
    """Counts the operations of one update: forward, and backward at twice the forward. Recomputation is not counted.

    6 x parameters of each matrix x the tokens it sees, and 12 x rows x layers x width x queries x keys of attention.
    The encoder and the cross-attentions' key and value matrices see source tokens; the rest of the decoder and the
    logits see target tokens. The layers of a decoder-only student see both, but the last one's queries and MLP the
    target alone. Padding counts as tokens; an embedding lookup costs nothing; causal attention counts all pairs, as is
    usual. `trained` is the trained fraction of parameters: a frozen matrix has no gradient, so 4 instead of 6.
    """
    width = config.num_heads * config.head_dim
    count: Any = _COUNTS[type(config)]
    matrices, pairs = count(config, inputs=inputs, targets=targets)
    matrices = rows * (matrices + config.emb_dim * config.vocab_size * targets)
    return round((4 + 2 * min(trained, 1.0)) * matrices) + 12 * rows * width * pairs


def _of_t5(config: t5.T5Config, *, inputs: int, targets: int) -> tuple[int, int]:
    """Returns parameters times tokens of the layers' matrices, and pairs of query and key of all attentions."""
    projection = config.emb_dim * config.num_heads * config.head_dim
    mlp = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
    matrices = config.num_encoder_layers * (4 * projection + mlp) * inputs
    matrices += config.num_decoder_layers * (2 * projection * inputs + (6 * projection + mlp) * targets)
    pairs = config.num_encoder_layers * inputs * inputs
    return matrices, pairs + config.num_decoder_layers * (targets * targets + targets * inputs)


def _of_decoder_only(config: decoder_only.DecoderConfig, *, inputs: int, targets: int) -> tuple[int, int]:
    # The last layer's source serves as keys and values alone.
    length = inputs + targets
    unused = config.attention_weights + config.mlp_weights - 2 * config.emb_dim * config.num_kv_heads * config.head_dim
    pairs = (config.num_layers * length - inputs) * length
    return config.decoder_weights * length - unused * inputs, pairs


def _of_t5gemma(config: t5gemma.T5GemmaConfig, *, inputs: int, targets: int) -> tuple[int, int]:
    matrices = config.num_encoder_layers * (config.attention_weights + config.mlp_weights) * inputs
    matrices += config.decoder_weights * targets
    over_source = 2 * config.emb_dim * config.num_kv_heads * config.head_dim
    # Keys and values of the source: with merged attention by the target's matrices, otherwise by their own.
    extra = inputs if config.merged_attention else inputs - targets
    matrices += config.num_decoder_layers * over_source * extra
    pairs = config.num_encoder_layers * inputs * inputs
    return matrices, pairs + config.num_decoder_layers * (targets * targets + targets * inputs)


_COUNTS: dict[type, Callable[..., tuple[int, int]]] = {
    t5.T5Config: _of_t5,
    decoder_only.DecoderConfig: _of_decoder_only,
    t5gemma.T5GemmaConfig: _of_t5gemma,
}
