"""Hugging Face's `config.json` of decoder-only models (Llama, Qwen3, Gemma 3) as a configuration of ours, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_jax.storage.json_files import brief, part
from sbs_jax.student.decoder_only import DecoderConfig

LLAMA, QWEN3, GEMMA3 = "llama", "qwen3", "gemma3_text"
# Model types, and what sets them apart.
MODEL_TYPES: Mapping[str, Mapping[str, bool]] = {
    LLAMA: {"qk_norm": False, "post_norms": False, "norm_plus_one": False, "scale_embeddings": False},
    QWEN3: {"qk_norm": True, "post_norms": False, "norm_plus_one": False, "scale_embeddings": False},
    GEMMA3: {"qk_norm": True, "post_norms": True, "norm_plus_one": True, "scale_embeddings": True},
}
_ARCHITECTURES = {LLAMA: "LlamaForCausalLM", QWEN3: "Qwen3ForCausalLM", GEMMA3: "Gemma3ForCausalLM"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu": "gelu_exact"}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "emb_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
_HEAD_DIMS = {QWEN3: 128, GEMMA3: 256}  # where config.json has none
_BASES = {GEMMA3: 1e6}
_LOCAL_BASE = 1e4
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Settings that change the computation in a way that is not offered; each must be absent, null or false.
_REFUSED = (
    *("attention_bias", "mlp_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
    "quantization_config",
)


def read(path: Path, settings: Mapping[str, Any], *, tied: bool, eos_id: int, decoder_start: int) -> DecoderConfig:
    """Reads the settings of a `config.json` at `path`. ValueError names one that is missing or not offered."""
    kind = settings["model_type"]
    for name in _REFUSED:
        if settings.get(name):
            raise ValueError(
                f"{path}: {name} is {brief(settings[name])}, which is not computed here; expected none. Take a model "
                "without it."
            )
    sizes = {ours: _size(path, settings, name) for name, ours in _SIZES.items()}
    heads = _size(path, settings, "num_key_value_heads", default=sizes["num_heads"])
    head_dim = _size(
        *(path, settings, "head_dim"), default=_HEAD_DIMS.get(kind, max(1, sizes["emb_dim"] // sizes["num_heads"]))
    )
    name = "hidden_activation" if kind == GEMMA3 else "hidden_act"
    activation = settings.get(name, "gelu_pytorch_tanh" if kind == GEMMA3 else "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"{path}: {name} is {brief(activation)}; expected one of {', '.join(_ACTIVATIONS)}.")
    scalar = settings.get("query_pre_attn_scalar") if kind == GEMMA3 else None
    fields: dict[str, Any] = {
        **sizes,
        **MODEL_TYPES[kind],
        **_positions(path, settings, layers=sizes["num_layers"]),
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "mlp_activations": (_ACTIVATIONS[activation], "linear"),
        "logits_via_embedding": tied,
        "dropout_rate": _number(path, settings, "dropout_rate", default=0.0, least=0.0),
        "layer_norm_epsilon": _number(path, settings, "rms_norm_eps", default=1e-6),
        "eos_id": eos_id,
        "decoder_start": decoder_start,
    }
    if scalar not in (None, head_dim):
        fields["query_scale"] = _number(path, settings, "query_pre_attn_scalar") ** -0.5
    try:
        return DecoderConfig(**fields)
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
    found = {name for name, ours in _ACTIVATIONS.items() if (ours, "linear") == config.mlp_activations}
    if not found:
        raise ValueError(f"transformers has no {kind} with the activations {config.mlp_activations}.")
    activation = min(found, key=list(_ACTIVATIONS).index)
    kinds = [_FULL if config.is_global(layer) else _SLIDING for layer in range(config.num_layers)]
    rope = {_FULL: _rope(config.rope_base, config.rope_factor)}
    rope[_SLIDING] = _rope(config.local_rope_base or config.rope_base, 1.0)
    extra: dict[str, Any] = {"rope_parameters": rope[_FULL]}
    if kind == GEMMA3:
        extra = {
            "rope_parameters": rope,
            "query_pre_attn_scalar": round(config.scale**-2),
            "hidden_activation": activation,
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
        if abs(round(config.scale**-2) ** -0.5 / config.scale - 1) > 1e-6:
            raise ValueError(
                f"transformers has no {kind} with query_scale {config.scale}; expected n^-0.5 of a whole n."
            )
    elif _SLIDING in kinds:
        raise ValueError(f"transformers has no {kind} with sliding windows as in this model (window {config.window}).")
    if config.window is not None:
        extra |= {"sliding_window": config.window, "layer_types": kinds}
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **{name: getattr(config, ours) for name, ours in _SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.layer_norm_epsilon,
        "hidden_act": activation,
        "attention_bias": False,
        "tie_word_embeddings": config.logits_via_embedding,
        "dropout_rate": config.dropout_rate,
        "decoder_start_token_id": config.decoder_start,
        "bos_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": config.eos_id,
        "torch_dtype": dtype,
        "use_cache": True,
        **extra,
    }


def kind_of(config: DecoderConfig) -> str:
    """Returns the model type of an architecture. ValueError if transformers has none."""
    for kind, marks in MODEL_TYPES.items():
        if all(getattr(config, name) == value for name, value in marks.items()):
            return kind
    marks = {name: getattr(config, name) for name in MODEL_TYPES[LLAMA]}
    raise ValueError(f"transformers has no decoder with {marks}; expected those of one of {', '.join(MODEL_TYPES)}.")


def _positions(path: Path, settings: Mapping[str, Any], *, layers: int) -> dict[str, Any]:
    """Reads rotary bases and sliding windows."""
    kind = settings["model_type"]
    every = _global_every(path, settings, layers=layers)
    base, local = _BASES.get(kind, 1e4), None
    new, old = settings.get("rope_parameters"), settings.get("rope_scaling")
    if isinstance(new, dict) and {_FULL, _SLIDING} & set(new):
        base, factor = _scaling(path, new.get(_FULL), base)
        local, other = _scaling(path, new.get(_SLIDING), _LOCAL_BASE)
        if other != 1.0 and every > 1:
            raise ValueError(f"{path}: rope_parameters scale sliding layers by {other}; expected no scaling there.")
    else:
        scaling = {"rope_theta": settings.get("rope_theta", base), **_object(path, "rope_scaling", new or old)}
        base, factor = _scaling(path, scaling, base)
        if kind == GEMMA3:
            local = _number(path, settings, "rope_local_base_freq", default=_LOCAL_BASE)
    if every == 1:
        return {"rope_base": base, "rope_factor": factor}
    window = _size(path, settings, "sliding_window", default=4096 if kind == GEMMA3 else None)
    return {
        "rope_base": base,
        "rope_factor": factor,
        "global_every": every,
        "window": window,
        "local_rope_base": None if local == base else local,
    }


def _global_every(path: Path, settings: Mapping[str, Any], *, layers: int) -> int:
    """Returns how many layers there are per one that sees all positions."""
    kinds = settings.get("layer_types")
    if kinds is None:
        if settings["model_type"] == GEMMA3:
            return _size(path, settings, "sliding_window_pattern", default=6)
        if settings.get("use_sliding_window"):
            raise ValueError(f"{path}: use_sliding_window is true without layer_types; expected them, or false.")
        return 1
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(f"{path}: layer_types is {brief(kinds)}; expected one for each of {layers} layers.")
    every = kinds.index(_FULL) + 1 if _FULL in kinds else layers + 1
    expected = [_FULL if (layer + 1) % every == 0 else _SLIDING for layer in range(layers)]
    if kinds != expected:
        raise ValueError(
            f"{path}: layer_types is {brief(kinds)}; expected a {_FULL} after equally many {_SLIDING}, as in Gemma 3."
        )
    return every


def _scaling(path: Path, scaling: Any, base: float) -> tuple[float, float]:
    """Reads (base, factor) of rotary positions."""
    found = _object(path, "rope_parameters", scaling)
    base = _number(path, found, "rope_theta", default=base)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "linear") or found.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{path}: positions rotate as {brief(dict(found))}; expected 'default' or 'linear', on whole heads."
        )
    return base, _number(path, found, "factor") if kind == "linear" else 1.0


def _rope(base: float, factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    return found if factor == 1.0 else {**found, "rope_type": "linear", "factor": factor}


def _object(path: Path, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} is {brief(value)}; expected an object or null.")
    return value


def _size(path: Path, settings: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    value = settings.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{path}: {part(name)!r} is {brief(value)}; expected a whole number of at least 1.")
    return value


def _number(
    path: Path, settings: Mapping[str, Any], name: str, *, default: float | None = None, least: float = 1e-30
) -> float:
    value = settings.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not least <= value < 2**31:  # type: ignore[operator]
        raise ValueError(f"{path}: {part(name)!r} is {brief(value)}; expected a number above 0.")
    return float(value)  # type: ignore[arg-type]
