"""GGUF files (llama.cpp's form of a decoder-only model) in: quantized tensors become float32.

The header is read by storage/gguf.py; the package `gguf` knows the types of tensors and computes their numbers, row by
row. Two things differ from Hugging Face's arrays. llama.cpp rotates neighbours (2i, 2i + 1) of a head in a Llama, and
its converter moves the rows of queries and keys accordingly; that is undone here. And it stores the norms of a Gemma
with 1 added.
"""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sbs_jax.data import vocabularies
from sbs_jax.storage import gguf
from sbs_jax.storage.json_files import brief, part
from sbs_jax.student.decoder_only import DecoderConfig
from sbs_jax.weights import decoder_settings, names
from sbs_jax.weights.arrays import Index, LazyArray, Opened, shapes

# By `general.architecture`: the model type, and whether rotation is interleaved.
_ARCHITECTURES = {
    "llama": (decoder_settings.LLAMA, True),
    "qwen3": (decoder_settings.QWEN3, False),
    "gemma3": (decoder_settings.GEMMA3, False),
}
_GLOBAL_EVERY = 6  # layers of Gemma 3, as in llama.cpp
_LOCAL_BASE = 1e4
_TIED = "output.weight"


def is_file(path: str | Path) -> bool:
    """Detects a GGUF file by its first bytes."""
    return gguf.is_file(path)


def open_file(path: str | Path) -> Opened:
    """Opens the architecture and tensors of a file; reads its header only.

    ValueError for another architecture, an unknown type of tensor, or a header that contradicts itself.
    """
    header = gguf.read(path)
    kind, interleaved = _architecture(path, header)
    config = _config(path, header, kind)
    tensors = {name: _lazy(path, header, name) for name in header.tensors}
    if not config.logits_via_embedding and _TIED not in tensors:
        raise ValueError(f"{path} has no {_TIED!r}.")
    table = names.GGUF
    arrays, unknown = names.renamed(tensors, table)
    if unknown:
        raise ValueError(
            f"{path} holds tensors that this architecture does not have: {part(', '.join(unknown[:5]))}. Take a model "
            "without them."
        )
    names.check_sizes(path, shapes(arrays), config, layers={"decoder": names.layers_of(arrays)}, kind="GGUF")
    for name, array in arrays.items():
        if interleaved and name.endswith(("self_attention/query/kernel", "self_attention/key/kernel")):
            arrays[name] = array.picked(_halves(array.shape[1], config.head_dim), axis=1)
        elif config.norm_plus_one and name.endswith("norm/scale"):
            arrays[name] = _less_one(array)
    names.check(path, shapes(arrays), shapes(names.parameters(config)), kind="GGUF")
    return Opened(config, arrays, vocabulary=str(path))


def _architecture(path: str | Path, header: gguf.Header) -> tuple[str, bool]:
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise ValueError(
            f"{path} holds a model of the architecture {brief(name)}; expected one of {', '.join(_ARCHITECTURES)}."
        )
    return _ARCHITECTURES[name]


def _config(path: str | Path, header: gguf.Header, kind: str) -> DecoderConfig:
    found = header.metadata
    family = found["general.architecture"]

    def size(name: str, default: int | None = None) -> int:
        value = found.get(f"{family}.{name}", default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"{path}: {family}.{name} is {brief(value)}; expected a whole number of at least 1.")
        return value

    def number(name: str, default: float | None = None) -> float:
        value = found.get(f"{family}.{name}", default)
        if not isinstance(value, int | float) or not 0 < value < 2**31:
            raise ValueError(f"{path}: {family}.{name} is {brief(value)}; expected a number above 0.")
        return float(str(np.float32(value)))  # 1e-5, not the float32 nearest to it

    scaling = found.get(f"{family}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"{path}: positions are scaled by {brief(scaling)}; expected 'none' or 'linear'.")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if found.get(f"{family}.{name}"):
            raise ValueError(f"{path}: {name} is {brief(found[f'{family}.{name}'])}; expected none.")
    heads, width = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", max(1, width // heads))
    base = number("rope.freq_base", 1e4)
    if size("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{path}: only {size('rope.dimension_count')} of {head_dim} values of a head rotate.")
    table = header.tensors.get("token_embd.weight")
    if table is None:
        raise ValueError(f"{path} has no 'token_embd.weight', the token table.")
    positions: dict[str, Any] = {"rope_base": base, "rope_factor": 1.0}
    if scaling == "linear":
        positions["rope_factor"] = number("rope.scaling.factor")
    if kind == decoder_settings.GEMMA3:
        positions |= {"window": size("attention.sliding_window"), "global_every": _GLOBAL_EVERY}
        positions["local_rope_base"] = _LOCAL_BASE
    try:
        marks: dict[str, Any] = {**decoder_settings.MODEL_TYPES[kind], **_tokens(found)}
        return DecoderConfig(
            **marks,
            **positions,
            vocab_size=table.shape[0],
            emb_dim=width,
            num_heads=heads,
            num_kv_heads=size("attention.head_count_kv", heads),
            head_dim=head_dim,
            mlp_dim=size("feed_forward_length"),
            num_layers=size("block_count"),
            mlp_activations=("gelu" if kind == decoder_settings.GEMMA3 else "silu", "linear"),
            logits_via_embedding=_TIED not in header.tensors,
            dropout_rate=0.0,
            layer_norm_epsilon=number("attention.layer_norm_rms_epsilon"),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Returns the tokens that end and begin a target."""
    texts = metadata.get("tokenizer.ggml.tokens")
    found = {text: i for i, text in enumerate(texts) if isinstance(text, str)} if isinstance(texts, list) else {}
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "bos")]
    return vocabularies.marks(found, eos_id=ids[0], bos_id=ids[1])


def _lazy(path: str | Path, header: gguf.Header, name: str) -> LazyArray:
    """Opens a tensor, which is mapped and computed by rows. ValueError if the file cannot hold it."""
    tensor, package = header.tensors[name], _package()
    try:
        kind = package.GGMLQuantizationType(tensor.kind)
        block, width = package.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise ValueError(
            f"{path}: the tensor {brief(name)} is of the unknown type {tensor.kind}. Install a newer gguf, or take "
            "another quantization, such as Q8_0."
        ) from None
    count = math.prod(tensor.shape)
    size = count // block * width
    if count > names.MOST_NUMBERS or tensor.shape[-1] % block or tensor.start + size > header.size:
        raise ValueError(
            f"{path}: the tensor {brief(name)} claims {tensor.shape} numbers as {kind.name} at {tensor.start} in "
            f"{header.size} bytes. The file is incomplete: get it again."
        )
    data = np.memmap(path, np.uint8, "r", tensor.start, (size,)) if size else np.zeros(0, np.uint8)
    rows = data.reshape(*tensor.shape[:-1], -1) if size else data

    def read(index: Index) -> np.ndarray:
        found = np.ascontiguousarray(rows[index[:-1]])
        return package.quants.dequantize(found, kind).astype(np.float32, copy=False)[..., index[-1]]

    try:
        package.quants.dequantize(np.zeros(width, np.uint8), kind)
    except NotImplementedError:
        raise ValueError(
            f"{path}: the tensor {brief(name)} is {kind.name}, which gguf cannot compute. Take another quantization, "
            "such as Q8_0."
        ) from None
    return LazyArray(tensor.shape, np.dtype(np.float32), read)


def _halves(rows: int, head_dim: int) -> np.ndarray:
    """Returns, for each row of a kernel whose halves rotate, its place in one whose neighbours rotate."""
    place = np.arange(rows).reshape(-1, head_dim // 2, 2)
    return place.swapaxes(1, 2).reshape(-1)


def _less_one(array: LazyArray) -> LazyArray:
    return LazyArray(array.shape, array.dtype, lambda index: array.read(index) - 1)


def _package() -> Any:
    """Imports `gguf`. ModuleNotFoundError says how to install it."""
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A GGUF file needs gguf, which is not installed: pip install 'sbs-jax[decoders]'."
        ) from error
