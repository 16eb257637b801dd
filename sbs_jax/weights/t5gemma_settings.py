"""Hugging Face's `config.json` of T5Gemma 2 and T5Gemma as a configuration of ours, and back.

Images are not read. transformers builds no T5Gemma 2 without a vision tower, so an export has the smallest that it
takes: no layers, one pixel, width 1, all numbers 0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sbs_jax.storage.json_files import brief
from sbs_jax.student.t5gemma import T5GemmaConfig
from sbs_jax.weights import rotary_settings
from sbs_jax.weights.arrays import LazyArray

T5GEMMA2, T5GEMMA = "t5gemma2", "t5gemma"
_GEMMA = {"post_norms": True, "norm_plus_one": True, "scale_embeddings": True}
# Model types, and what sets them apart.
MODEL_TYPES: Mapping[str, Mapping[str, Any]] = {
    T5GEMMA2: {**_GEMMA, "qk_norm": True, "merged_attention": True, "encoder_window": "around"},
    T5GEMMA: {**_GEMMA, "qk_norm": False, "merged_attention": False, "encoder_window": "either_side"},
}
_KINDS = {
    T5GEMMA2: rotary_settings.Kind(
        fields=MODEL_TYPES[T5GEMMA2],
        defaults={**rotary_settings.GEMMA, "vocab_size": 262_208},
        activation="hidden_activation",
        every=6,
        two_bases=True,
        caps=("final_logit_softcapping",),
    ),
    T5GEMMA: rotary_settings.Kind(
        fields=MODEL_TYPES[T5GEMMA],
        defaults={
            **rotary_settings.GEMMA,
            "vocab_size": 256_000,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        activation="hidden_activation",
        every=2,
        caps=tuple(rotary_settings.CAPS),
    ),
}
_ARCHITECTURES = {T5GEMMA2: "T5Gemma2ForConditionalGeneration", T5GEMMA: "T5GemmaForConditionalGeneration"}
# The model types of the two stacks.
_STACKS = {T5GEMMA2: ("t5gemma2_text", "t5gemma2_decoder"), T5GEMMA: ("t5_gemma_module", "t5_gemma_module")}
_OF_IMAGES = ("vision_tower", "multi_modal_projector", "eoi_embedding")  # parts of arrays' names
_END_OF_IMAGE = "model.encoder.embed_tokens.eoi_embedding"
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "num_channels": 1,
    "image_size": 1,
    "patch_size": 1,
    "vision_use_head": False,
}
_TOWER, _PROJECTOR = "model.encoder.vision_tower.", "model.encoder.multi_modal_projector."
# Copies of a tied table by the table's name, the logits' last.
TIED = {
    T5GEMMA2: ("model.encoder.embed_tokens.weight", ("model.decoder.embed_tokens.weight", "lm_head.out_proj.weight")),
    T5GEMMA: ("model.decoder.embed_tokens.weight", ("lm_head.out_proj.weight",)),
}


def read(
    path: Path, settings: Mapping[str, Any], *, tied: bool, shared_table: bool, eos_id: int, decoder_start: int
) -> T5GemmaConfig:
    """Reads the settings of a `config.json` at `path`. ValueError names one that is missing or not offered."""
    kind = _KINDS[settings["model_type"]]
    rotary_settings.refuse(str(path), settings, kind)
    stacks = {f"{path}: {name}": each for name, each in _stacks(path, settings).items()}
    every = rotary_settings.global_every(
        str(path), *(rotary_settings.layer_kinds(where, each, kind) for where, each in stacks.items())
    )
    encoder, decoder = (rotary_settings.read(where, each, kind, every=every) for where, each in stacks.items())
    encoder["logits_cap"] = decoder.setdefault("logits_cap", None)
    for name in sorted({*encoder, *decoder}):
        if encoder.get(name) != decoder.get(name):
            raise ValueError(
                f"{path}: {name} is {encoder.get(name)} in the encoder and {decoder.get(name)} in the decoder; "
                "expected equal ones. Take a model with two stacks of one size, such as 2b-2b."
            )
    layers = [
        rotary_settings.size(where, {**kind.defaults, **each}, rotary_settings.LAYERS) for where, each in stacks.items()
    ]
    try:
        return T5GemmaConfig(
            **decoder,
            num_encoder_layers=layers[0],
            num_decoder_layers=layers[1],
            shared_table=shared_table,
            logits_via_embedding=tied,
            dropout_rate=rotary_settings.number(str(path), settings, "dropout_rate", default=0.0, least=0.0),
            eos_id=eos_id,
            decoder_start=decoder_start,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def ids(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings that name tokens: those of the whole model, or of its decoder."""
    return {"eos_token_id": 1, "bos_token_id": 2, **_stacks(path, settings)["decoder"], **settings}


def _stacks(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the settings of encoder and decoder. ValueError if there are none."""
    found = {name: settings.get(name) for name in ("encoder", "decoder")}
    if settings["model_type"] == T5GEMMA2:
        found["encoder"] = rotary_settings.nested(str(path), "encoder", found["encoder"]).get("text_config")
    for name, value in found.items():
        if not isinstance(value, dict):
            inner = ".text_config" if settings["model_type"] == T5GEMMA2 and name == "encoder" else ""
            raise ValueError(f"{path}: {name}{inner} is {brief(value)}; expected the settings of its layers.")
    return found  # type: ignore[return-value]


def write(config: T5GemmaConfig, *, dtype: str) -> dict[str, Any]:
    """Builds `config.json`. ValueError for an architecture that transformers has not."""
    name = kind_of(config)
    tokens = {"bos_token_id": config.decoder_start, "pad_token_id": 0, "eos_token_id": config.eos_id}
    tied = config.logits_via_embedding
    encoder, decoder = (
        {
            "model_type": model_type,
            **rotary_settings.write(config, _KINDS[name], name=name, layers=layers),
            "tie_word_embeddings": tied,
            "dropout_rate": config.dropout_rate,
            **tokens,
        }
        for model_type, layers in zip(_STACKS[name], config.stack_layers.values(), strict=True)
    )
    if name == T5GEMMA2:
        vision = {"vision_config": _VISION, "mm_tokens_per_image": 1, "tie_word_embeddings": tied}
        encoder = {"model_type": "t5gemma2_encoder", "text_config": encoder, **vision}
    return {
        "architectures": [_ARCHITECTURES[name]],
        "model_type": name,
        "is_encoder_decoder": True,
        "encoder": encoder,
        "decoder": decoder,
        "vocab_size": config.vocab_size,
        "dropout_rate": config.dropout_rate,
        "tie_word_embeddings": tied,
        "decoder_start_token_id": config.decoder_start,
        **tokens,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def kind_of(config: T5GemmaConfig) -> str:
    """Returns the model type of an architecture. ValueError if transformers has none."""
    tables = {T5GEMMA2: config.shared_table == config.logits_via_embedding, T5GEMMA: not config.shared_table}
    for kind, marks in MODEL_TYPES.items():
        if tables[kind] and all(getattr(config, name) == value for name, value in marks.items()):
            return kind
    names = [*MODEL_TYPES[T5GEMMA], "shared_table", "logits_via_embedding"]
    marks = {name: getattr(config, name) for name in names}
    raise ValueError(f"transformers has no encoder-decoder with {marks}; expected those of a T5Gemma 2 or a T5Gemma.")


def text_only(stored: Mapping[str, LazyArray]) -> tuple[dict[str, LazyArray], dict[str, int]]:
    """Names arrays as the Hub does and leaves out those of images; also returns how many of each kind there were.

    transformers 5 has `text_model` between the encoder and its layers.
    """
    found: dict[str, LazyArray] = {}
    left_out: dict[str, int] = dict.fromkeys(_OF_IMAGES, 0)
    for name, array in stored.items():
        name = name.replace("model.encoder.text_model.", "model.encoder.", 1)
        kind = next((kind for kind in left_out if kind in name.split(".")), None)
        if kind is None:
            found[name] = array
        else:
            left_out[kind] += 1
    return found, left_out


def of_images(config: T5GemmaConfig) -> dict[str, LazyArray]:
    """Makes the arrays that transformers expects for images, all 0."""
    if not config.merged_attention:
        return {}
    shapes = {
        _END_OF_IMAGE: (config.emb_dim,),
        f"{_PROJECTOR}mm_input_projection_weight": (1, config.emb_dim),
        f"{_PROJECTOR}mm_soft_emb_norm.weight": (1,),
        f"{_TOWER}vision_model.embeddings.patch_embedding.weight": (1, 1, 1, 1),
        f"{_TOWER}vision_model.embeddings.patch_embedding.bias": (1,),
        f"{_TOWER}vision_model.embeddings.position_embedding.weight": (1, 1),
        f"{_TOWER}vision_model.post_layernorm.weight": (1,),
        f"{_TOWER}vision_model.post_layernorm.bias": (1,),
    }
    return {name: LazyArray.of(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
