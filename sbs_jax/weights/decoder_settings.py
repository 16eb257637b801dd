"""Hugging Face's `config.json` of decoder-only models (Llama, Qwen3, Gemma 3) as a configuration of ours, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_jax.student.decoder_only import DecoderConfig
from sbs_jax.weights import rotary_settings

LLAMA, QWEN3, GEMMA3 = "llama", "qwen3", "gemma3_text"
# Model types, and what sets them apart.
MODEL_TYPES: Mapping[str, Mapping[str, bool]] = {
    LLAMA: {"qk_norm": False, "post_norms": False, "norm_plus_one": False, "scale_embeddings": False},
    QWEN3: {"qk_norm": True, "post_norms": False, "norm_plus_one": False, "scale_embeddings": False},
    GEMMA3: {"qk_norm": True, "post_norms": True, "norm_plus_one": True, "scale_embeddings": True},
}
_KINDS = {
    LLAMA: rotary_settings.Kind(fields=MODEL_TYPES[LLAMA], defaults={}),
    QWEN3: rotary_settings.Kind(fields=MODEL_TYPES[QWEN3], defaults={"head_dim": 128}),
    GEMMA3: rotary_settings.Kind(
        fields=MODEL_TYPES[GEMMA3],
        defaults={**rotary_settings.GEMMA, "vocab_size": 262_208},
        activation="hidden_activation",
        every=6,
        two_bases=True,
    ),
}
_ARCHITECTURES = {LLAMA: "LlamaForCausalLM", QWEN3: "Qwen3ForCausalLM", GEMMA3: "Gemma3ForCausalLM"}


def read(path: Path, settings: Mapping[str, Any], *, tied: bool, eos_id: int, decoder_start: int) -> DecoderConfig:
    """Reads the settings of a `config.json` at `path`. ValueError names one that is missing or not offered."""
    where, kind = str(path), _KINDS[settings["model_type"]]
    every = rotary_settings.global_every(where, rotary_settings.layer_kinds(where, settings, kind))
    fields = rotary_settings.read(where, settings, kind, every=every)
    try:
        return DecoderConfig(
            **fields,
            num_layers=rotary_settings.size(where, {**kind.defaults, **settings}, rotary_settings.LAYERS),
            logits_via_embedding=tied,
            dropout_rate=rotary_settings.number(where, settings, "dropout_rate", default=0.0, least=0.0),
            eos_id=eos_id,
            decoder_start=decoder_start,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    """Builds `config.json`. ValueError for an architecture that transformers has not."""
    kind = kind_of(config)
    if config.source_attention != "causal":
        raise ValueError(
            f"The model's source_attention is {config.source_attention!r}, which transformers does not offer; expected "
            "'causal'."
        )
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **rotary_settings.write(config, _KINDS[kind], name=kind, layers=config.num_layers),
        "tie_word_embeddings": config.logits_via_embedding,
        "dropout_rate": config.dropout_rate,
        "decoder_start_token_id": config.decoder_start,
        "bos_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": config.eos_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def kind_of(config: DecoderConfig) -> str:
    """Returns the model type of an architecture. ValueError if transformers has none."""
    for kind, marks in MODEL_TYPES.items():
        if all(getattr(config, name) == value for name, value in marks.items()):
            return kind
    marks = {name: getattr(config, name) for name in MODEL_TYPES[LLAMA]}
    raise ValueError(f"transformers has no decoder with {marks}; expected those of one of {', '.join(MODEL_TYPES)}.")
