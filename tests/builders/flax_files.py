"""Weights as transformers' Flax T5 saved them, made of a Hugging Face directory with safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import serialization, traverse_util

_DENSE = {"q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "lm_head"}
_TABLES = {"shared", "relative_attention_bias"}


def flat(folder: Path) -> dict[str, np.ndarray]:
    """Returns Flax's arrays by their names, "shared/embedding", of a directory's safetensors."""
    found = {}
    for name, values in safetensors.numpy.load_file(folder / "model.safetensors").items():
        *modules, _ = name.split(".")
        kind = "kernel" if modules[-1] in _DENSE else "embedding" if modules[-1] in _TABLES else "weight"
        found["/".join([*modules, kind])] = np.ascontiguousarray(values.T) if kind == "kernel" else values
    return found


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Packs arrays as Flax does."""
    tree: dict[str, Any] = traverse_util.unflatten_dict(dict(arrays), sep="/")
    return serialization.msgpack_serialize(tree)


def replace_weights(folder: Path, *, shards: int = 1) -> Path:
    """Replaces a directory's safetensors by the same weights in Flax's form; returns the directory."""
    arrays = flat(folder)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        (folder / "flax_model.msgpack").write_bytes(packed(arrays))
        return folder
    names = sorted(arrays)
    weight_map = {}
    for number in range(shards):
        file = f"flax_model-{number + 1:05d}-of-{shards:05d}.msgpack"
        own = names[number::shards]
        (folder / file).write_bytes(packed({name: arrays[name] for name in own}))
        weight_map |= dict.fromkeys(own, file)
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
