"""Families of students behind one contract; the only place that chooses among them, by the type of a configuration.

A model has `states(source, target_in)`, `logits`, `projection`, `encode`, `step_layers` (for stepping.py), `stacks` by
name and `config`. A configuration has the properties of `ModelConfig`.

`split` turns a model into a flat dictionary `{"decoder/layers/0/mlp/wo/kernel": array}` and `join` turns it back, so
all code around the model is plain `jax` on a plain pytree.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from sbs_jax.student import decoder_only, stacking, stacks, t5, t5gemma

ModelConfig = t5.T5Config | decoder_only.DecoderConfig | t5gemma.T5GemmaConfig
Model = t5.T5 | decoder_only.DecoderOnly | t5gemma.T5Gemma
_MODELS: dict[type, Callable[..., Model]] = {
    t5.T5Config: t5.T5,
    decoder_only.DecoderConfig: decoder_only.DecoderOnly,
    t5gemma.T5GemmaConfig: t5gemma.T5Gemma,
}
# A field that only this family's configuration has; T5 is the one without.
_MARKS: dict[str, type] = {"num_layers": decoder_only.DecoderConfig, "merged_attention": t5gemma.T5GemmaConfig}

# A model outside a call: the static `Structure`, and the pytree of `Parameters` that is trained, sharded and saved.
Structure = Any
Parameters = dict[str, jax.Array]


def config_of(saved: Mapping[str, Any]) -> ModelConfig:
    """Inverts `dataclasses.asdict` of a configuration, also after a JSON round trip, which turns tuples into lists."""
    kind = config_type(saved)
    return kind(**{**saved, "mlp_activations": tuple(saved["mlp_activations"])})


def config_type(saved: Mapping[str, Any]) -> type[ModelConfig]:
    """Tells the family of a saved configuration by a field that only it has."""
    return next((kind for mark, kind in _MARKS.items() if mark in saved), t5.T5Config)


# What a run chooses for itself; all else belongs to the weights.
_CHOICES = {
    *("dtype", "dropout_rate", "neftune_alpha", "neftune_decoder_alpha", "source_attention"),
    *("vocab_size", "eos_id", "decoder_start"),
}


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Names the settings by which the same weights compute something else: `["rope_base 1e4, not 1e5", ..]`."""
    if type(ours) is not type(theirs):
        return [f"a {type(ours).__name__}, not a {type(theirs).__name__}"]

    def value(config: ModelConfig, name: str) -> Any:
        if name == "query_scale":
            return getattr(config, "scale")  # noqa: B009  (of the families that have the field)
        if name == "local_rope_base":
            return getattr(config, name) or getattr(config, "rope_base")  # noqa: B009
        return getattr(config, name)

    found = []
    for field in dataclasses.fields(ours):
        mine, other = value(ours, field.name), value(theirs, field.name)
        numbers = isinstance(mine, int | float) and isinstance(other, int | float)
        same = math.isclose(mine, other, rel_tol=1e-5) if numbers else mine == other
        if field.name not in _CHOICES and not same:
            found.append(f"{field.name} {mine}, not {other}")
    return found


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """Makes the model of a configuration, with initial parameters."""
    return _MODELS[type(config)](config, rngs=rngs)


def split(model: nnx.Module) -> tuple[Structure, Parameters]:
    """Splits a model into its structure and `{"decoder/layers/0/mlp/wo/kernel": float32 array, ..}`."""
    structure, state = nnx.split(model, nnx.Param)
    return structure, {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def join(structure: Structure, parameters: Parameters) -> Model:
    """Inverts `split`; also takes tracers or gradients in place of arrays."""
    flat = [
        (tuple(int(part) if part.isdigit() else part for part in name.split("/")), nnx.Param(x))
        for name, x in parameters.items()
    ]
    return nnx.merge(structure, nnx.from_flat_state(flat))


def init(config: ModelConfig, *, seed: int) -> tuple[Structure, Parameters]:
    """Initializes parameters. Traceable: `jax.eval_shape(lambda: init(config, seed=0)[1])` costs no memory."""
    return split(build(config, rngs=nnx.Rngs(seed)))


def abstract(
    config: ModelConfig,
    *,
    execution: stacks.Execution = stacks.UNROLLED,
    change: Callable[[Model], None] = lambda model: None,
) -> tuple[Structure, dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str, ...]]]:
    """Returns structure, shapes and logical axes of all parameters without computing any; stacked if scanned.

    `change` may add or replace submodules before shapes are computed.
    """

    def changed() -> Model:
        model = build(config, rngs=nnx.Rngs(0))
        change(model)
        return model

    model = nnx.eval_shape(changed)
    _, state = nnx.split(model, nnx.Param)
    shapes, axes = {}, {}
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        shapes[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        axes[name] = leaf.axes
    for stack in model.stacks.values():
        stack.remat = execution.remat
    if execution.layers == "scanned":
        axes = {
            name: ("layers", *axes[of[0]]) if stacking.is_stacked(name) else axes[name]
            for name, of in stacking.stacks(shapes).items()
        }
        shapes = jax.eval_shape(stacking.stack, shapes)
        for stack in model.stacks.values():
            setattr(stack, "layers", stack.layers[0])  # noqa: B010  (one layer in place of a list)
    return nnx.split(model, nnx.Param)[0], shapes, axes
