"""Settings of `config.json` that models with rotary positions share: sizes, activation, bases, windows, soft caps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sbs_jax.storage.json_files import brief, part
from sbs_jax.student.rotary import RotaryConfig

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu": "gelu_exact"}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "emb_dim",
    "intermediate_size": "mlp_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}
LAYERS = "num_hidden_layers"
_FULL, _SLIDING = "full_attention", "sliding_attention"
CAPS = {"attn_logit_softcapping": "attention_cap", "final_logit_softcapping": "logits_cap"}
# Settings that change the computation in a way that is not offered; each must be absent, null or false.
_REFUSED = ("attention_bias", "mlp_bias", "use_bidirectional_attention", "quantization_config")
# Of all Gemmas in transformers, which leaves out what equals these when it saves.
GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    LAYERS: 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A model type: fields that set it apart, and values of settings that its `config.json` may leave out.

    `every` is the default number of layers per one that sees all (None: there are no windows unless `layer_types` says
    so). With `two_bases`, local layers rotate by a base of their own. `caps` are the soft caps that it computes.
    """

    fields: Mapping[str, Any]
    defaults: Mapping[str, Any]
    activation: str = "hidden_act"
    every: int | None = None
    two_bases: bool = False
    caps: tuple[str, ...] = ()

    @property
    def scaled(self) -> bool:
        """True if a setting gives the scale of queries."""
        return "query_pre_attn_scalar" in self.defaults


def refuse(where: str, settings: Mapping[str, Any], kind: Kind) -> None:
    """Requires that no setting asks for something that is not computed. ValueError names the first one."""
    for name in (*_REFUSED, *(cap for cap in CAPS if cap not in kind.caps)):
        if settings.get(name):
            raise ValueError(
                f"{where}: {name} is {brief(settings[name])}, which is not computed here; expected none. Take a model "
                "without it."
            )


def read(where: str, settings: Mapping[str, Any], kind: Kind, *, every: int) -> dict[str, Any]:
    """Reads the fields of one stack of layers. ValueError names a setting that is missing or not offered.

    `where` begins errors; `every` is that of `global_every`.
    """
    refuse(where, settings, kind)
    settings = {**kind.defaults, **settings}
    heads, width = (size(where, settings, name) for name in ("num_attention_heads", "hidden_size"))
    likely = {"num_key_value_heads": heads, "head_dim": max(1, width // heads)}
    fields = {ours: size(where, settings, name, default=likely.get(name)) for name, ours in _SIZES.items()}
    activation = settings.get(kind.activation, "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(
            f"{where}: {kind.activation} is {brief(activation)}; expected one of {', '.join(_ACTIVATIONS)}."
        )
    fields |= {
        **kind.fields,
        **_positions(where, settings, kind, every=every),
        "mlp_activations": (_ACTIVATIONS[activation], "linear"),
        "layer_norm_epsilon": number(where, settings, "rms_norm_eps", default=1e-6),
    }
    for name in kind.caps:
        if settings.get(name) is not None:
            fields[CAPS[name]] = number(where, settings, name)
    if kind.scaled and settings["query_pre_attn_scalar"] not in (None, fields["head_dim"]):
        fields["query_scale"] = number(where, settings, "query_pre_attn_scalar") ** -0.5
    return fields


def write(config: RotaryConfig, kind: Kind, *, name: str, layers: int) -> dict[str, Any]:
    """Builds the settings of one stack of layers. ValueError if transformers cannot express the architecture."""
    found = [theirs for theirs, ours in _ACTIVATIONS.items() if (ours, "linear") == config.mlp_activations]
    if not found:
        raise ValueError(f"transformers has no {name} with the activations {config.mlp_activations}.")
    refused = [field for cap, field in CAPS.items() if cap not in kind.caps and getattr(config, field) is not None]
    if refused:
        value = getattr(config, refused[0])
        raise ValueError(f"transformers computes no {name} with {refused[0]} {value}; expected None.")
    kinds = [_FULL if config.is_global(layer) else _SLIDING for layer in range(layers)]
    local = config.rope_base if config.local_rope_base is None else config.local_rope_base
    rope = {_FULL: _rope(config.rope_base, config.rope_factor), _SLIDING: _rope(local, 1.0)}
    if not kind.two_bases and _SLIDING in kinds and rope[_FULL] != rope[_SLIDING]:
        raise ValueError(
            f"transformers has no {name} whose local layers rotate otherwise: expected one base, unscaled."
        )
    settings = {
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        LAYERS: layers,
        "rms_norm_eps": config.layer_norm_epsilon,
        kind.activation: found[0],
        "attention_bias": False,
        "rope_parameters": rope if kind.two_bases else rope[_FULL],
    }
    if kind.scaled:
        scalar = settings["query_pre_attn_scalar"] = round(config.scale**-2)
        if abs(scalar**-0.5 / config.scale - 1) > 1e-6:
            raise ValueError(
                f"transformers has no {name} with query_scale {config.scale}; expected n^-0.5 of a whole n."
            )
        settings |= {cap: getattr(config, field) for cap, field in CAPS.items()}
        settings["use_bidirectional_attention"] = False
    elif _SLIDING in kinds:
        raise ValueError(f"transformers has no {name} with sliding windows as in this model (window {config.window}).")
    if kind.every is not None:
        settings["layer_types"] = kinds
    if config.window is not None:
        settings["sliding_window"] = config.window
    return settings


def layer_kinds(where: str, settings: Mapping[str, Any], kind: Kind) -> list[str]:
    """Reads which layers of a stack see all positions. ValueError if there is not one word for each layer."""
    layers = size(where, {**kind.defaults, **settings}, LAYERS)
    kinds = settings.get("layer_types")
    if kinds is None:
        every = 1
        if kind.every is not None:
            every = size(where, settings, "sliding_window_pattern", default=kind.every)
        elif settings.get("use_sliding_window"):
            raise ValueError(f"{where}: use_sliding_window is true without layer_types; expected them, or false.")
        return _pattern(every, min(layers, every + 1))  # the rest follows; a file may claim any number
    if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(each, str) for each in kinds):
        raise ValueError(f"{where}: layer_types is {brief(kinds)}; expected one for each of {layers} layers.")
    return kinds


def global_every(where: str, *stacks: list[str]) -> int:
    """Returns how many layers there are per one that sees all positions, the same in all stacks."""
    every = next((kinds.index(_FULL) + 1 for kinds in stacks if _FULL in kinds), max(map(len, stacks)) + 1)
    for kinds in stacks:
        if kinds != _pattern(every, len(kinds)):
            raise ValueError(
                f"{where}: layer_types is {brief(kinds)}; expected a {_FULL} after equally many {_SLIDING}, as in "
                "Gemma 3."
            )
    return every


def _pattern(every: int, layers: int) -> list[str]:
    return [_FULL if (layer + 1) % every == 0 else _SLIDING for layer in range(layers)]


def _positions(where: str, settings: Mapping[str, Any], kind: Kind, *, every: int) -> dict[str, Any]:
    """Reads rotary bases and sliding windows."""
    base, local = (1e6, 1e4) if kind.two_bases else (1e4, None)
    new, old = settings.get("rope_parameters"), settings.get("rope_scaling")
    if isinstance(new, dict) and {_FULL, _SLIDING} & set(new):
        base, factor = _scaling(where, new.get(_FULL), base)
        local, other = _scaling(where, new.get(_SLIDING), 1e4)
    else:
        scaling = {"rope_theta": settings.get("rope_theta", base), **nested(where, "rope_scaling", new or old)}
        base, factor = _scaling(where, scaling, base)
        other = 1.0 if kind.two_bases else factor
        if kind.two_bases:
            local = number(where, settings, "rope_local_base_freq", default=local)
    found = {"rope_base": base, "rope_factor": factor}
    if every == 1:
        return found
    if other != 1.0:
        raise ValueError(f"{where}: rope_parameters scale sliding layers by {other}; expected no scaling there.")
    return found | {
        "global_every": every,
        "window": size(where, settings, "sliding_window"),
        "local_rope_base": None if local == base else local,
    }


def _scaling(where: str, scaling: Any, base: float) -> tuple[float, float]:
    """Reads (base, factor) of rotary positions."""
    found = nested(where, "rope_parameters", scaling)
    base = number(where, found, "rope_theta", default=base)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "linear") or found.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{where}: positions rotate as {brief(dict(found))}; expected 'default' or 'linear', on whole heads."
        )
    return base, number(where, found, "factor") if kind == "linear" else 1.0


def _rope(base: float, factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    return found if factor == 1.0 else {**found, "rope_type": "linear", "factor": factor}


def nested(where: str, name: str, value: Any) -> dict[str, Any]:
    """Checks a setting that is an object; null is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name} is {brief(value)}; expected an object or null.")
    return value


def size(where: str, settings: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    """Reads a whole number of at least 1."""
    value = settings.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{where}: {part(name)!r} is {brief(value)}; expected a whole number of at least 1.")
    return value


def number(
    where: str, settings: Mapping[str, Any], name: str, *, default: float | None = None, least: float = 1e-30
) -> float:
    """Reads a number."""
    value = settings.get(name)
    value = default if value is None else value
    if type(value) not in (int, float) or not least <= value < 2**31:  # type: ignore[operator]
        raise ValueError(f"{where}: {part(name)!r} is {brief(value)}; expected a number above 0.")
    return float(value)  # type: ignore[arg-type]
