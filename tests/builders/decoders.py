"""Tiny decoder-only students of each type, with weights from numpy."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sbs_jax.student import decoder_only, families

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "emb_dim": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 20,
    "num_layers": 3,
    "dropout_rate": 0.0,
    "eos_id": 1,
    "decoder_start": 3,
}
LLAMA: dict[str, Any] = {
    **SIZES,
    "mlp_activations": ("silu", "linear"),
    "logits_via_embedding": True,
    "rope_base": 100.0,
}
QWEN3: dict[str, Any] = {**LLAMA, "qk_norm": True, "logits_via_embedding": False, "rope_base": 1000.0}
# Every third layer is global; a window of three is shorter than the rows of the tests.
GEMMA3: dict[str, Any] = {
    **SIZES,
    "num_kv_heads": 1,
    "mlp_activations": ("gelu", "linear"),
    "logits_via_embedding": True,
    "rope_base": 1000.0,
    "local_rope_base": 100.0,
    "rope_factor": 2.0,
    "window": 3,
    "global_every": 3,
    "query_scale": 0.25,
    "qk_norm": True,
    "post_norms": True,
    "norm_plus_one": True,
    "scale_embeddings": True,
}
TYPES = {"llama": LLAMA, "qwen3": QWEN3, "gemma3": GEMMA3, "prefix-lm": {**GEMMA3, "source_attention": "bidirectional"}}


def config(kind: str, **changes: Any) -> decoder_only.DecoderConfig:
    return decoder_only.DecoderConfig(**{**TYPES[kind], **changes})


def parameters(config: decoder_only.DecoderConfig, *, seed: int = 0) -> families.Parameters:
    """Draws every parameter, norms too, large enough that all of them show in the logits."""
    random = np.random.default_rng(seed)
    shapes = families.abstract(config)[1]
    return {name: jnp.asarray(random.normal(size=shapes[name].shape) * 0.4, jnp.float32) for name in sorted(shapes)}


def model(config: decoder_only.DecoderConfig, *, seed: int = 0) -> Any:
    return families.join(families.abstract(config)[0], parameters(config, seed=seed))
