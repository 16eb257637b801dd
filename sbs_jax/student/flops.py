"""Floating-point operations of the model's definition, for model FLOP utilization."""

from sbs_jax.student import t5


def training_flops(config: t5.T5Config, *, rows: int, inputs: int, targets: int, trained: float = 1.0) -> int:
    """Counts the operations of one update: forward, and backward at twice the forward. Recomputation is not counted.

    6 x parameters of each matrix x the tokens it sees, and 12 x rows x layers x width x queries x keys of attention.
    The encoder and the cross-attentions' key and value matrices see source tokens; the rest of the decoder and the
    logits see target tokens. Padding counts as tokens; an embedding lookup costs nothing; causal attention counts all
    pairs, as is usual. `trained` is the trained fraction of parameters: a frozen matrix has no gradient, so 4 instead
    of 6.
    """
    width = config.num_heads * config.head_dim
    projection = config.emb_dim * width
    mlp = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
    source, target = rows * inputs, rows * targets
    matrices = (
        config.num_encoder_layers * (4 * projection + mlp) * source
        + config.num_decoder_layers * (2 * projection * source + (6 * projection + mlp) * target)
        + config.emb_dim * config.vocab_size * target
    )
    pairs = config.num_encoder_layers * inputs * inputs
    pairs += config.num_decoder_layers * (targets * targets + targets * inputs)
    return round((4 + 2 * min(trained, 1.0)) * matrices) + 12 * rows * width * pairs
