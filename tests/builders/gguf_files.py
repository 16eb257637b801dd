"""Small GGUF files, written by the package `gguf`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NORMAL, CONTROL = 1, 3


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    architecture: str = "llama",
    values: Mapping[str, int | float | str] = {},
    tokenizer: Any = None,
    pre: str = "smollm",
    quantized: Mapping[str, str] = {},
) -> Path:
    """Writes tensors (`quantized` names the type of some), values by keys after the architecture, and a tokenizer."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in values.items():
        key = f"{architecture}.{name}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    if tokenizer is not None:
        found = json.loads(tokenizer.to_str())
        special = {token["id"] for token in found["added_tokens"]}
        pieces = sorted(found["model"]["vocab"].items(), key=lambda item: item[1])
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([piece for piece, _ in pieces])
        writer.add_token_types([CONTROL if id_ in special else NORMAL for _, id_ in pieces])
        merges = found["model"]["merges"]
        writer.add_token_merges([" ".join(each) if isinstance(each, list) else each for each in merges])
    for name, array in tensors.items():
        if name in quantized:
            kind = gguf.GGMLQuantizationType[quantized[name]]
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
