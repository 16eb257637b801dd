"""Adapters made part of the base that they were trained on: one student without them, read array by array."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sbs_jax import adapters, quantized, t5
from sbs_jax.convert.names import LazyArray

# What changes a kernel, by the end of its name; all else that can be put on a model has no place in one without it.
_OF_KERNEL = ("lora/a", "lora/b", "in_scale", "out_scale")


def merged(
    config: t5.T5Config,
    tuning: adapters.Tuning,
    trained: Mapping[str, LazyArray],
    base: Mapping[str, LazyArray],
    *,
    owner: str,
) -> dict[str, LazyArray]:
    """The parameters of a plain student: the base's, as it was held in training, with what was trained on it.

    ValueError for what no plain T5 can hold: bottlenecks, prompts, prefixes, biases.
    """
    own = adapters.own_names(config)
    extra = sorted(name for name in trained if name not in own and not name.endswith(_OF_KERNEL))
    if extra:
        raise ValueError(
            f"{owner} has {_kinds(extra)} ({extra[0]}), which cannot be merged: a T5 without adapters has no place for "
            "them. LoRA, IA3, layer norms and layers can be. Predict and evaluate with the run as it is, and its base."
        )
    shapes = adapters.abstract(config, tuning).shapes
    return {
        name: trained[name] if name in trained else _array(name, base[name], trained, tuning, shapes=shapes)
        for name in own
    }


def _array(
    name: str,
    base: LazyArray,
    trained: Mapping[str, LazyArray],
    tuning: adapters.Tuning,
    *,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> LazyArray:
    module = name.rpartition("/")[0]
    parts = {end: trained[f"{module}/{end}"] for end in _OF_KERNEL if f"{module}/{end}" in trained}
    held = _held(name, base, tuning, shapes=shapes)
    if not parts or not name.endswith("/kernel"):
        return held

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        kernel = held.read(index).astype(np.float32)
        if "lora/a" in parts:
            assert tuning.lora is not None
            a, b = parts["lora/a"].read((rows, slice(None))), parts["lora/b"].read((slice(None), columns))
            kernel = kernel + np.float32(tuning.lora.alpha / tuning.lora.rank) * (a @ b)
        if "in_scale" in parts:
            kernel = kernel * parts["in_scale"].read((rows,))[:, None]
        return kernel * parts["out_scale"].read((columns,))[None, :] if "out_scale" in parts else kernel

    return LazyArray(base.shape, np.dtype(np.float32), read)


def _held(
    name: str, base: LazyArray, tuning: adapters.Tuning, *, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> LazyArray:
    """The base's array with what holding it in fewer bits took from it."""
    if name in shapes:
        dtype = shapes[name].dtype

        def rounded(index: tuple[slice, ...]) -> np.ndarray:
            return base.read(index).astype(dtype).astype(np.float32)

        return base if dtype == jnp.float32 else LazyArray(base.shape, np.dtype(np.float32), rounded)

    def whole(index: tuple[slice, ...]) -> np.ndarray:
        parts = quantized.quantize(jnp.asarray(base.whole()), form=tuning.base)
        return np.asarray(quantized.dequantize(parts, form=tuning.base))[index]

    return LazyArray(base.shape, np.dtype(np.float32), whole)


def _kinds(names: list[str]) -> str:
    known = {"prompt": "a prompt", "prefix": "prefixes", "_adapter": "bottlenecks", "bias": "biases"}
    return " and ".join(text for part, text in known.items() if any(part in name for name in names)) or "adapters"
