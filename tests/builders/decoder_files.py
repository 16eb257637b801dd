"""Tiny models that rotate as files: their arrays, and GGUF as llama.cpp's converter writes it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from builders import bpe, gguf_files
from sbs_jax.student import families
from sbs_jax.student.decoder_only import DecoderConfig
from sbs_jax.weights import names
from sbs_jax.weights.arrays import LazyArray, Opened

LLAMA = DecoderConfig(
    vocab_size=400,
    emb_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    num_layers=3,
    mlp_activations=("silu", "linear"),
    logits_via_embedding=True,
    dropout_rate=0.0,
    rope_base=1e5,
    layer_norm_epsilon=1e-5,
    eos_id=2,
    decoder_start=198,
)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, logits_via_embedding=False, layer_norm_epsilon=1e-6)
GEMMA3 = dataclasses.replace(
    LLAMA,
    qk_norm=True,
    post_norms=True,
    norm_plus_one=True,
    scale_embeddings=True,
    query_scale=24.0**-0.5,
    mlp_activations=("gelu", "linear"),
    global_every=2,
    window=3,
    local_rope_base=1e4,
    rope_base=1e6,
    rope_factor=8.0,
    decoder_start=2,
    eos_id=1,
)
CONFIGS = {"llama": LLAMA, "qwen3": QWEN3, "gemma3_text": GEMMA3}
TEXTS = ["A tiny red iron lamp, 12 cm.", "Iron sinks. So the answer is no."]


def parameters(config: families.ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = names.parameters(config)
    return {name: random.normal(size=leaf.shape).astype(np.float32) * 0.3 for name, leaf in shapes.items()}


def opened(config: families.ModelConfig, **changes: Any) -> Opened:
    return Opened(config, {name: LazyArray.of(x) for name, x in parameters(config).items()}, **changes)


def gguf_of(
    path: Path, config: DecoderConfig, *, architecture: str, quantized: str | None = None, **values: Any
) -> Path:
    """Writes a GGUF file as llama.cpp's converter does."""
    tensors, kinds = {}, {}
    for name in names.of(names.parameters(config), names.GGUF):
        array = parameters(config)[name.ours]
        array = np.ascontiguousarray(array.T) if name.transposed else array
        if architecture == "llama" and ("attn_q." in name.hugging_face or "attn_k." in name.hugging_face):
            rows, width = array.shape
            halves = array.reshape(rows // config.head_dim, 2, config.head_dim // 2, width)
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, width)
        if config.norm_plus_one and name.ours.endswith("norm/scale"):
            array = array + 1
        tensors[name.hugging_face] = array
        if quantized is not None and array.ndim == 2:
            kinds[name.hugging_face] = quantized
    found = {
        "block_count": config.num_layers,
        "embedding_length": config.emb_dim,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "rope.freq_base": config.rope_base,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
    }
    library = bpe.byte_level(TEXTS * 9, size=config.vocab_size)
    return gguf_files.write(
        path, tensors, architecture=architecture, values=found | values, tokenizer=library, quantized=kinds
    )


def plain(config: DecoderConfig) -> DecoderConfig:
    library = bpe.byte_level(TEXTS * 9, size=400)
    ends = {"eos_id": library.token_to_id("<|im_end|>"), "decoder_start": library.token_to_id("Ċ")}
    return dataclasses.replace(config, vocab_size=library.get_vocab_size(), **ends)
