"""Hugging Face directories: `config.json`, safetensors in one file or in shards, the tokenizer's files.

Mapped files are read by slices. Writing streams one array at a time into a directory beside the target, which is
renamed when complete.
"""

import contextlib
import difflib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from sbs_jax.data import tokens
from sbs_jax.run import manifest
from sbs_jax.storage.json_files import brief, decoded, parse_json, part, read_json
from sbs_jax.student import t5
from sbs_jax.weights import names, tensor_files
from sbs_jax.weights.arrays import LazyArray, Opened

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SENTENCEPIECE = "spiece.model"
# The manifest of the exported run, which makes an import a run again. Hugging Face ignores the file.
ORIGIN = "sbs_run.json"
SHARD_BYTES = 5 * 10**9

# ByT5 is "t5" with a table of bytes; mT5 and Flan-T5 are v1.1 with other weights.
MODEL_TYPES = {"t5": "shared", "mt5": "shared", "umt5": "per_layer"}
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu_new": ("gelu",),
    "silu": ("silu",),
    "gated-relu": ("relu", "linear"),
    "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
}
# Copies of the table that older versions wrote, and a bias that no version ever used.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
# Their names to ours.
_OURS = {theirs: (ours, transposed) for ours, (theirs, transposed) in names.TABLE.items()}
_LAYER = re.compile(r"(encoder|decoder)\.block\.(\d+)\.")
# Name of a file of weights beside its index.
_SHARD = re.compile(r"[\w.-]{1,200}\.(safetensors|bin)", re.ASCII)


def is_directory(path: str | Path) -> bool:
    """Detects a Hugging Face directory."""
    return (Path(path) / CONFIG).is_file()


def open_directory(path: str | Path) -> Opened:
    """Opens the architecture and arrays of a directory; reads headers only.

    ValueError for another kind of model, names without a row in the table, or a shape that contradicts the
    configuration; FileNotFoundError for a missing shard.
    """
    path = Path(path)
    settings = _read_json(path / CONFIG)
    stored = _stored(path)
    tied = "lm_head.weight" not in stored
    config = _config(path, settings, tied=tied)
    for name in _COPIES:
        if name in stored and "shared.weight" in stored:
            _expect_copy(path, stored, name)
            del stored[name]
        elif name in stored:
            stored["shared.weight"] = stored.pop(name)
    if "shared.weight" not in stored:
        raise ValueError(f"{path} has no 'shared.weight', the table of tokens; it holds {brief(sorted(stored))}.")
    if not tied and config.logits_via_embedding:
        _expect_copy(path, stored, "lm_head.weight")
        del stored["lm_head.weight"]
    for name in _UNUSED:
        stored.pop(name, None)
    if tied and not config.logits_via_embedding:
        # Tied but not scaled (transformers 5 makes new v1.1 models so): the same as an untied copy.
        stored["lm_head.weight"] = stored["shared.weight"]
    found = _shapes(stored)
    held = {
        stack: len({name.split("/")[2] for name in found if name.startswith(f"{stack}/layers/")})
        for stack in names.STACKS
    }
    names.check_sizes(path, found, config, layers=held, kind="Hugging Face")
    shapes = names.parameters(config)
    table = {name.hugging_face: name for name in names.of(shapes)}
    unknown = sorted(set(stored) - set(table))
    if unknown:
        lines = [f"{part(name)}{_near(name[:200], table)}" for name in unknown[:5]]
        raise ValueError(
            f"{path} holds {len(unknown)} arrays that no parameter of this architecture is stored as:\n  "
            + "\n  ".join(lines)
            + ("\n  .." if len(unknown) > 5 else "")
        )
    arrays = {
        table[theirs].ours: array.transposed() if table[theirs].transposed else array
        for theirs, array in stored.items()
    }
    found = {name: array.shape for name, array in arrays.items()}
    names.check(path, found, {name: leaf.shape for name, leaf in shapes.items()}, kind="Hugging Face")
    origin = read_origin((path / ORIGIN).read_bytes(), path / ORIGIN) if (path / ORIGIN).is_file() else None
    vocabulary = str(path / SENTENCEPIECE) if (path / SENTENCEPIECE).is_file() else None
    return Opened(config, arrays, vocabulary=vocabulary, origin=origin)


def write(
    path: str | Path,
    opened: Opened,
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a directory that `transformers` loads: weights in `dtype`, configuration, and the tokenizer if known.

    `finish` may add files. The directory appears when it is complete; FileExistsError if there is one already.
    """
    path = Path(path)
    if opened.vocabulary is not None:
        tokens.check_vocabulary(opened.vocabulary)  # fail before gigabytes of weights are written
    with beside(path) as folder:
        _write_weights(folder, opened, dtype=np.dtype(dtype), shard_bytes=shard_bytes)
        write_json(folder / CONFIG, _settings(opened.config, dtype=dtype))
        generation = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        write_json(folder / "generation_config.json", generation)
        if opened.vocabulary is not None:
            _write_tokenizer(folder, opened)
        if opened.origin is not None:
            write_json(folder / ORIGIN, manifest.elsewhere(opened.origin))
        finish(folder)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Makes a directory that becomes `path` if the block ends without an error, and is removed otherwise.

    FileExistsError where `path` exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another name, or remove it.")
    folder = path.with_name(path.name + ".incomplete")
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted conversion
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    folder.rename(path)


def _write_weights(folder: Path, opened: Opened, *, dtype: np.dtype, shard_bytes: int) -> None:
    stored = {
        name.hugging_face: opened.arrays[name.ours].transposed() if name.transposed else opened.arrays[name.ours]
        for name in names.of(opened.arrays)
    }
    sizes = {name: int(np.prod(array.shape)) * dtype.itemsize for name, array in stored.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(stored):
        if shards[-1] and filled + sizes[name] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    for file, shard in zip(files, shards, strict=True):
        tensor_files.write_safetensors(folder / file, {name: stored[name] for name in shard}, dtype=dtype)


def _stored(path: Path) -> dict[str, LazyArray]:
    """Opens every array of the directory under its own name."""
    if (path / INDEX).is_file():
        return _sharded(path, INDEX, tensor_files.read_safetensors)
    if (path / WEIGHTS).is_file():
        return tensor_files.read_safetensors(path / WEIGHTS)
    if (path / TORCH_INDEX).is_file():
        return _sharded(path, TORCH_INDEX, tensor_files.read_torch)
    if (path / TORCH_WEIGHTS).is_file():
        return tensor_files.read_torch(path / TORCH_WEIGHTS)
    raise FileNotFoundError(f"{path} has no weights: expected {WEIGHTS}, {INDEX}, {TORCH_WEIGHTS} or {TORCH_INDEX}.")


def _sharded(path: Path, index: str, read: Any) -> dict[str, LazyArray]:
    weight_map = _read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / index}: 'weight_map' is {brief(weight_map)}; expected array names and their files.")
    for name, file in weight_map.items():
        # The index may come from anywhere: read no file outside its folder.
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise ValueError(
                f"{path / index}: {brief(name)} is said to be in {brief(file)}; expected the name of a .safetensors or "
                ".bin file in the same folder."
            )
    missing = sorted(file for file in set(weight_map.values()) if not (path / file).is_file())
    if missing:
        raise FileNotFoundError(
            f"{path} is incomplete: its index names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not there. Download the directory again."
        )
    stored: dict[str, LazyArray] = {}
    for file in sorted(set(weight_map.values())):
        stored |= read(path / file)
    lost = sorted(set(weight_map) - set(stored))
    if lost:
        file = weight_map[lost[0]]
        raise ValueError(f"{path}: the index promises {brief(lost[0])} in {file}, which does not hold it.")
    return stored


def _expect_copy(path: Path, stored: Mapping[str, LazyArray], name: str) -> None:
    """Requires a bit-identical copy of the shared table (tied models may store several)."""
    table, copy = stored["shared.weight"], stored[name]
    if len(table.shape) != 2 or 0 in table.shape:
        raise ValueError(f"{path}: 'shared.weight' has the shape {table.shape}; expected a table of two dimensions.")
    size, step = table.shape[0], max(1, 2**24 // table.shape[1])
    pieces = [(slice(start, min(start + step, size)), slice(None)) for start in range(0, size, step)]
    same = copy.shape == table.shape and all(np.array_equal(table.read(piece), copy.read(piece)) for piece in pieces)
    if not same:
        raise ValueError(
            f"{path}: {name!r} differs from 'shared.weight', although the configuration ties them. A T5 with tied and "
            "scaled logits has one table; correct tie_word_embeddings in config.json if this one has more."
        )


def _config(path: Path, settings: Mapping[str, Any], *, tied: bool) -> t5.T5Config:
    kind, architectures = settings.get("model_type"), settings.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"{path / CONFIG}: 'architectures' is {brief(architectures)}; expected a list of names.")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ValueError(
            f"{path} holds a model of type {brief(kind)} ({part(', '.join(architectures) or 'no architecture')}); "
            f"expected an encoder-decoder of type {', '.join(MODEL_TYPES)}."
        )
    for architecture in architectures:
        if "Encoder" in architecture or not architecture.endswith(("ForConditionalGeneration", "WithLMHeadModel")):
            raise ValueError(
                f"{path} holds a {part(architecture)}; expected a ..ForConditionalGeneration, which has a decoder."
            )
    activation = settings.get("feed_forward_proj", "relu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(
            f"{path}: feed_forward_proj is {brief(activation)}; expected one of {', '.join(_ACTIVATIONS)}"
            f"{_near(str(activation)[:200], _ACTIVATIONS)}."
        )
    # transformers 5 writes `tie_word_embeddings: true` for every T5; scale_decoder_outputs has the old meaning.
    scaled = settings.get("scale_decoder_outputs", settings.get("tie_word_embeddings", True))
    if kind in ("mt5", "umt5"):
        scaled = tied and scaled  # published with false; the value written by newer versions means nothing
    needed = ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers")
    missing = [name for name in needed if name not in settings]
    if missing:
        raise ValueError(f"{path / CONFIG} has no {missing[0]!r}; a T5 needs {', '.join(needed)}.")
    layers = settings["num_layers"]
    decoder_layers = settings.get("num_decoder_layers")
    sizes = {name: settings[name] for name in needed} | {
        "num_decoder_layers": layers if decoder_layers is None else decoder_layers,
        "relative_attention_num_buckets": settings.get("relative_attention_num_buckets", 32),
    }
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{path / CONFIG}: {name!r} is {brief(value)}; expected a whole number of at least 1.")
    numbers = {"dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "relative_attention_max_distance": 128}
    for name, default in numbers.items():
        value = numbers[name] = settings.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < (1 if name == "dropout_rate" else 2**31):
            raise ValueError(
                f"{path / CONFIG}: {name!r} is {brief(value)}; expected a number of a T5, such as {default}."
            )
    return t5.T5Config(
        vocab_size=sizes["vocab_size"],
        emb_dim=sizes["d_model"],
        num_heads=sizes["num_heads"],
        head_dim=sizes["d_kv"],
        mlp_dim=sizes["d_ff"],
        num_encoder_layers=layers,
        num_decoder_layers=sizes["num_decoder_layers"],
        mlp_activations=_ACTIVATIONS[activation],
        logits_via_embedding=bool(scaled),
        dropout_rate=float(numbers["dropout_rate"]),
        relative_attention_num_buckets=sizes["relative_attention_num_buckets"],
        relative_attention_max_distance=int(numbers["relative_attention_max_distance"]),
        relative_attention_bias=MODEL_TYPES[kind],
        layer_norm_epsilon=float(numbers["layer_norm_epsilon"]),
    )


def _settings(config: t5.T5Config, *, dtype: str) -> dict[str, Any]:
    """Builds `config.json`."""
    kind = "umt5" if config.relative_attention_bias == "per_layer" else "t5"
    activation = next((name for name, ours in _ACTIVATIONS.items() if ours == config.mlp_activations), None)
    if activation is None:
        known = ", ".join(str(ours) for ours in _ACTIVATIONS.values())
        raise ValueError(f"Hugging Face has no T5 with the activations {config.mlp_activations}; it has {known}.")
    return {
        "architectures": [{"t5": "T5ForConditionalGeneration", "umt5": "UMT5ForConditionalGeneration"}[kind]],
        "model_type": kind,
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": activation,
        "tie_word_embeddings": config.logits_via_embedding,
        "dropout_rate": config.dropout_rate,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _write_tokenizer(folder: Path, opened: Opened) -> None:
    extra_ids = 100  # as tokens.vocabulary adds
    settings: dict[str, Any] = {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": extra_ids,
    }
    if opened.vocabulary == "byte":
        settings["tokenizer_class"] = "ByT5Tokenizer"
    else:
        settings["tokenizer_class"] = "T5Tokenizer"
        tf.io.gfile.copy(str(opened.vocabulary), str(folder / SENTENCEPIECE))
    write_json(folder / "tokenizer_config.json", settings)


def _read_json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {brief(value)}; expected a JSON object, {{..}}.")
    return value


def read_origin(data: bytes, where: object) -> dict[str, Any]:
    """Reads the manifest of the run that was exported. ValueError if a conversion could not use it."""
    value = parse_json(decoded(data, str(where)), str(where))
    try:
        options = value["data"]["options"]
        told = isinstance(options, dict) and (options["vocabulary"] is None or isinstance(options["vocabulary"], str))
    except (KeyError, TypeError, IndexError):
        told = False
    if not told:
        raise ValueError(
            f"{where}: got {brief(value)}; expected the manifest of a run, with its data options. Remove it."
        )
    return value


def _shapes(stored: Mapping[str, LazyArray]) -> dict[str, tuple[int, ...]]:
    """Returns shapes by our names and in our layout, of the arrays that are in the table."""
    found = {}
    for theirs, array in stored.items():
        layer = _LAYER.match(theirs)
        pattern = theirs if layer is None else f"{layer[1]}.block.{{layer}}.{theirs[layer.end() :]}"
        # The bias that all layers share is stored in layer 0, under a name with that number.
        ours, transposed = _OURS.get(theirs) or _OURS.get(pattern) or (None, False)
        if ours is not None:
            name = ours if layer is None else ours.replace("{layer}", layer[2])
            found[name] = array.shape[::-1] if transposed else array.shape
    return found


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", "utf-8")


def _near(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {found[0]!r})" if found else ""
