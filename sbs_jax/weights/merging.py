"""Merging of adapters into the base they were trained on, array by array, which gives a plain student."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbs_jax.student import adapters, quantized
from sbs_jax.weights.arrays import Index, LazyArray, Opened

# Adapters that change a kernel, by the end of their names. No other kind can be merged.
OF_KERNEL = ("lora/a", "lora/b", "in_scale", "out_scale")


def check(opened: Opened, *, owner: str) -> None:
    """Requires adapters that a plain T5 can hold. ValueError for bottlenecks, prompts, prefixes and biases."""
    extra = without_place(opened)
    if extra:
        raise ValueError(
            f"{owner} has {kinds(extra)} ({extra[0]}), which cannot be merged: a plain T5 has no place for them. "
            "Predict and evaluate with the run itself and its base."
        )


def can_merge(opened: Opened) -> bool:
    """Returns True if `merged` can make a plain T5 of a checkpoint."""
    return not without_place(opened)


def without_place(opened: Opened) -> list[str]:
    """Lists the trained parameters that a plain T5 has no place for."""
    own = adapters.base_names(opened.config)
    return sorted(name for name in opened.arrays if name not in own and not name.endswith(OF_KERNEL))


def merged(opened: Opened, base: Mapping[str, LazyArray]) -> Opened:
    """Returns the plain student: the base, in its precision during training, with the adapters merged in."""
    tuning = opened.tuning
    assert tuning is not None
    shapes = adapters.abstract(opened.config, tuning).shapes
    arrays = {
        name: _array(
            name,
            opened.arrays[name] if name in opened.arrays else _as_trained(name, base[name], tuning, shapes=shapes),
            opened.arrays,
            tuning,
        )
        for name in adapters.base_names(opened.config)
    }
    return dataclasses.replace(opened, arrays=arrays, tuning=None, base=None)


def quantization_error(opened: Opened, base: Mapping[str, LazyArray]) -> dict[str, Any]:
    """Measures the error that quantization added to the base's kernels (`quantized.error`); {} if not quantized."""
    tuning = opened.tuning
    if tuning is None or tuning.base not in quantized.FORMS:
        return {}
    shapes = adapters.abstract(opened.config, tuning).shapes
    errors = {
        name: quantized.error(array.whole().astype(np.float32), form=tuning.base)
        for name, array in base.items()
        if name not in shapes
    }
    if not errors:
        return {}
    worst = max(errors, key=errors.__getitem__)
    return {
        "form": tuning.base,
        "kernels": len(errors),
        "relative_rms_error": {"largest": errors[worst], "of": worst, "mean": float(np.mean(list(errors.values())))},
    }


def _array(name: str, kernel: LazyArray, trained: Mapping[str, LazyArray], tuning: adapters.Tuning) -> LazyArray:
    """Merges adapters into one parameter; `kernel` is the parameter without them."""
    module = name.rpartition("/")[0]
    parts = {end: trained[f"{module}/{end}"] for end in OF_KERNEL if f"{module}/{end}" in trained}
    if not parts or not name.endswith("/kernel"):
        return kernel

    def read(index: Index) -> np.ndarray:
        rows, columns = index
        values = kernel.read(index).astype(np.float32)
        if "lora/a" in parts:
            assert tuning.lora is not None
            a, b = parts["lora/a"].read((rows, slice(None))), parts["lora/b"].read((slice(None), columns))
            values = values + np.float32(tuning.lora.alpha / tuning.lora.rank) * (a @ b)
        if "in_scale" in parts:
            values = values * parts["in_scale"].read((rows,))[:, None]
        return values * parts["out_scale"].read((columns,))[None, :] if "out_scale" in parts else values

    return LazyArray(kernel.shape, np.dtype(np.float32), read)


def _as_trained(
    name: str, base: LazyArray, tuning: adapters.Tuning, *, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> LazyArray:
    """Rounds or quantizes an array of the base as training did."""
    if name in shapes and shapes[name].dtype == jnp.float32:
        return base

    def rounded(index: Index) -> np.ndarray:
        return base.read(index).astype(shapes[name].dtype).astype(np.float32)

    def quantized_and_back(index: Index) -> np.ndarray:
        parts = quantized.quantize(jnp.asarray(base.whole()), form=tuning.base)
        return np.asarray(quantized.dequantize(parts, form=tuning.base))[index]

    return LazyArray(base.shape, np.dtype(np.float32), rounded if name in shapes else quantized_and_back)


def kinds(names: list[str]) -> str:
    """Names the kinds of adapters among parameters, for a message."""
    known = {"prompt": "a prompt", "prefix": "prefixes", "_adapter": "bottlenecks", "bias": "biases"}
    return " and ".join(text for part, text in known.items() if any(part in name for name in names)) or "adapters"
