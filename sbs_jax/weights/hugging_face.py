"""Hugging Face directories: `config.json`, weights in one file or in shards, the tokenizer's files.

Weights are safetensors (read and written), or what older versions wrote for Flax and PyTorch (read only).

Mapped files are read by slices. Writing streams one array at a time into a directory beside the target, which is
renamed when complete.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbs_jax.checks import nearest
from sbs_jax.data import tokens, vocabularies
from sbs_jax.run import manifest
from sbs_jax.storage import atomic, places, user_files
from sbs_jax.storage.json_files import brief, decoded, parse_json, part
from sbs_jax.student import decoder_only, families, t5, t5gemma
from sbs_jax.weights import decoder_settings, flax_msgpack, names, t5gemma_settings, tensor_files
from sbs_jax.weights.arrays import LazyArray, Opened, shapes

log = logging.getLogger(__name__)

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLAX_WEIGHTS, FLAX_INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SENTENCEPIECE = "spiece.model"
GENERATION = "generation_config.json"
_GENERATION = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
# Manifest of the exported run; with it an import becomes a run again. Hugging Face ignores the file.
ORIGIN = "sbs_run.json"
SHARD_BYTES = 5 * 10**9
_LARGEST = 2**26  # bytes of a tokenizer's file; mT5's has 16 MB

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
    # Further names that transformers has for these, and the exact GELU: "gated-gelu" is its approximation by tanh.
    "gelu": ("gelu_exact",),
    "gelu_python": ("gelu_exact",),
    "gated-gelu_python": ("gelu_exact", "linear"),
    "gelu_pytorch_tanh": ("gelu",),
    "gated-gelu_pytorch_tanh": ("gelu", "linear"),
    "swish": ("silu",),
    "gated-swish": ("silu", "linear"),
}
# Sizes and numbers of config.json: our field, and Hugging Face's default if it has one.
_SIZES = {
    "vocab_size": ("vocab_size", None),
    "d_model": ("emb_dim", None),
    "d_kv": ("head_dim", None),
    "d_ff": ("mlp_dim", None),
    "num_heads": ("num_heads", None),
    "num_layers": ("num_encoder_layers", None),
    "num_decoder_layers": ("num_decoder_layers", None),
    "relative_attention_num_buckets": ("relative_attention_num_buckets", 32),
}
_NUMBERS = {
    "dropout_rate": ("dropout_rate", 0.1),
    "relative_attention_max_distance": ("relative_attention_max_distance", 128),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-6),
}
_TABLE = "shared.weight"
# Copies of the table that older versions wrote, and a bias that no version ever used.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
# A decoder-only model's table, and the copy of it that a tied one may have.
_TIED = ("model.embed_tokens.weight", ("lm_head.weight",))
# Their names to ours.
_OURS = {theirs: (ours, transposed) for ours, (theirs, transposed) in names.TABLE.items()}
_LAYER = re.compile(r"(encoder|decoder)\.block\.(\d+)\.")
# What torch.compile, DistributedDataParallel and FSDP add to names, in front or between.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The prefix of a model inside another ("model."), and the part of the name that is a T5's.
_INSIDE = re.compile(r"((?:[^.]+\.)*?)((?:shared|lm_head|encoder|decoder)\..*)", re.DOTALL)
_INSIDE_T5GEMMA = re.compile(r"((?:[^.]+\.)*?)((?:model\.(?:encoder|decoder)|lm_head)\..*)", re.DOTALL)
_INSIDE_DECODER = re.compile(r"((?:[^.]+\.)*?)((?:model\.(?:embed_tokens|layers|norm)|lm_head)\..*)", re.DOTALL)
# Files and fields that name tokens beside a SentencePiece model; () where the whole file does.
_TOKENS = {
    "added_tokens.json": (),
    TOKENIZER_CONFIG: ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
    "special_tokens_map.json": ("additional_special_tokens",),
    "tokenizer.json": ("added_tokens",),
}
# Tokens of T5's own tokenizer.
_OWN_TOKEN = re.compile(r"\u2581?<(pad|/s|unk|extra_id_\d\d?)>")
# Name of a file of weights beside its index.
_SHARD = re.compile(r"[\w.-]{1,200}\.(safetensors|msgpack|bin)", re.ASCII)
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.")
# Forms of weights in the order of preference: (index of shards, the only file, reader).
_FORMS = (
    (INDEX, WEIGHTS, tensor_files.read_safetensors),
    (FLAX_INDEX, FLAX_WEIGHTS, flax_msgpack.read),
    (TORCH_INDEX, TORCH_WEIGHTS, tensor_files.read_torch),
)


def is_directory(path: str | Path) -> bool:
    """Detects a Hugging Face directory, also one whose configuration is missing."""
    return any((Path(path) / name).is_file() for name in (CONFIG, *(name for *pair, _ in _FORMS for name in pair)))


def needed(held: Collection[str]) -> list[str]:
    """Picks the files that are read among all of a directory; [] if configuration or weights are missing."""
    weights: list[str] = []
    for index, only, _ in _FORMS:
        stem, ending = only.rsplit(".", 1)
        shards = [name for name in held if name.startswith(f"{stem}-") and name.endswith(f".{ending}")]
        numbers = [match[2] for match in map(_NUMBERED.search, shards) if match]
        if index in held and len(numbers) == len(shards) and set(numbers) == {f"{len(shards):05d}"}:
            weights = [index, *sorted(shards)]
        elif only in held:
            weights = [only]
        if weights and CONFIG in held:
            others = (CONFIG, GENERATION, SENTENCEPIECE, ORIGIN, *_TOKENS)
            return [*(name for name in others if name in held), *weights]
    return []


def open_directory(path: str | Path) -> Opened:
    """Opens the architecture and arrays of a directory; reads headers only.

    ValueError for another kind of model, names without a row in the table, or a shape that contradicts the
    configuration; FileNotFoundError for a missing shard.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"{path} has weights and no {CONFIG}, which says their architecture. Get it from the same model; an export "
            "to StableHLO is not read."
        )
    settings = read_object(path / CONFIG)
    kind = settings.get("model_type")
    if isinstance(kind, str) and kind in {**decoder_settings.MODEL_TYPES, **t5gemma_settings.MODEL_TYPES}:
        return _open_rotary(path, settings)
    stored = _unwrapped(path, _stored(path), inside=_INSIDE)
    tied = "lm_head.weight" not in stored
    config = _config(path, settings, tied=tied)
    for name in _COPIES:
        if name in stored:
            copy = stored.pop(name)
            _expect_copy(path, stored.setdefault(_TABLE, copy), copy, name=name, of=_TABLE)
    if _TABLE not in stored:
        raise ValueError(f"{path} has no {_TABLE!r}, the token table; it holds {brief(sorted(stored))}.")
    if tied and settings.get("tie_word_embeddings") is False:
        log.warning(
            "%s has no lm_head.weight, although its config.json says tie_word_embeddings false: the token table is "
            "used in its place. If the model had two tables, get the whole checkpoint.",
            path,
        )
    if not tied and config.logits_via_embedding:
        _expect_copy(path, stored[_TABLE], stored.pop("lm_head.weight"), name="lm_head.weight", of=_TABLE)
    for name in _UNUSED:
        stored.pop(name, None)
    if tied and not config.logits_via_embedding:
        # Tied but not scaled, as transformers 5 writes new v1.1 models: the same as an untied copy.
        stored["lm_head.weight"] = stored[_TABLE]
    arrays, unknown = _renamed(stored, shared_bias=config.relative_attention_bias == "shared")
    _check(path, arrays, config, unknown=unknown, rows=names.TABLE)
    vocabulary = str(path / SENTENCEPIECE) if (path / SENTENCEPIECE).is_file() else None
    _warn_of_tokenizer(path, vocabulary)
    return Opened(config, arrays, vocabulary=vocabulary, origin=origin_beside(path))


def _open_rotary(path: Path, settings: Mapping[str, Any]) -> Opened:
    """Opens a decoder-only model or a T5Gemma. Its tokenizer.json, if there is one, says which token ends a target."""
    kind = settings["model_type"]
    images = kind in t5gemma_settings.MODEL_TYPES
    end = "ForConditionalGeneration" if images else "ForCausalLM"
    _check_architectures(path, settings, ends=(end,), expected=f"a ..{end}")
    stored = _unwrapped(path, _stored(path), inside=_INSIDE_T5GEMMA if images else _INSIDE_DECODER)
    if images:
        stored = _without_images(path, stored, expected=kind == t5gemma_settings.T5GEMMA2)
    table, copies = t5gemma_settings.TIED.get(kind, _TIED)
    tied = copies[-1] not in stored or bool(settings.get("tie_word_embeddings", images))
    for name in copies if tied else ():
        if name in stored:
            copy = stored.pop(name)
            _expect_copy(path, stored.setdefault(table, copy), copy, name=name, of=table)
    if table not in stored:
        raise ValueError(f"{path} has no {table!r}, the token table; it holds {brief(sorted(stored))}.")
    config = _rotary_config(path, settings, stored, tied=tied)
    rows = names.table_of(config)
    arrays, unknown = names.renamed(stored, rows)
    _check(path, arrays, config, unknown=unknown, rows=rows)
    vocabulary = next((path / name for name in (TOKENIZER, SENTENCEPIECE) if (path / name).is_file()), None)
    return Opened(
        config, arrays, vocabulary=None if vocabulary is None else str(vocabulary), origin=origin_beside(path)
    )


def _rotary_config(
    path: Path, settings: Mapping[str, Any], stored: Mapping[str, LazyArray], *, tied: bool
) -> families.ModelConfig:
    """Reads the architecture, and the tokens that end and begin a target."""
    is_decoder = settings["model_type"] in decoder_settings.MODEL_TYPES
    ids = read_object(path / GENERATION) if (path / GENERATION).is_file() else {}
    ids |= settings if is_decoder else t5gemma_settings.ids(path / CONFIG, settings)
    tokenizer, pieces = path / TOKENIZER, {}
    try:
        if tokenizer.is_file():
            pieces = vocabularies.pieces(vocabularies.parse_bpe(user_files.whole(tokenizer, most=_LARGEST)))
        marks = vocabularies.marks(pieces, eos_id=ids.get("eos_token_id"), bos_id=ids.get("bos_token_id"))
    except ValueError as error:
        raise ValueError(f"{tokenizer}: {error}") from None
    # Decoder inputs of a T5Gemma begin with BOS, whatever the tokenizer has.
    given = {} if is_decoder else {"decoder_start": "bos_token_id"}
    if type(settings.get("decoder_start_token_id")) is int:  # `write` made these settings
        given = {"eos_id": "eos_token_id", "decoder_start": "decoder_start_token_id"}
    marks |= {ours: ids[name] for ours, name in given.items() if type(ids.get(name)) is int}
    if is_decoder:
        return decoder_settings.read(path / CONFIG, settings, tied=tied, **marks)
    target = names.T5GEMMA["target_embedder/embedding"][0]
    is_shared = settings["model_type"] == t5gemma_settings.T5GEMMA2 and target not in stored
    return t5gemma_settings.read(path / CONFIG, settings, tied=tied, shared_table=is_shared, **marks)


def _without_images(path: Path, stored: Mapping[str, LazyArray], *, expected: bool) -> dict[str, LazyArray]:
    """Leaves out the arrays of images, and says so."""
    found, left_out = t5gemma_settings.text_only(stored)
    if any(left_out.values()):
        counts = ", ".join(f"{name} ({count} arrays)" for name, count in left_out.items() if count)
        log.info("%s: only text is read; left out are %s.", path, counts)
    if expected and not left_out["eoi_embedding"]:
        log.info("%s has no eoi_embedding, the vector of the end of an image, which texts do not need.", path)
    return found


def _check(
    path: Path,
    arrays: Mapping[str, LazyArray],
    config: families.ModelConfig,
    *,
    unknown: Sequence[str],
    rows: names.Table,
) -> None:
    """Requires the arrays of the architecture and no others."""
    layers = {stack: names.layers_of(arrays, stack=stack) for stack in names.STACKS}
    names.check_sizes(path, shapes(arrays), config, layers=layers, kind="Hugging Face")
    wanted = names.parameters(config)
    _refuse_unknown(path, unknown, [name.hugging_face for name in names.of(wanted, rows)])
    names.check(path, shapes(arrays), shapes(wanted), kind="Hugging Face")


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
    path = places.of(path)
    if opened.vocabulary is not None:
        tokens.check_vocabulary(opened.vocabulary)  # fail before gigabytes of weights are written
    settings = config_json(opened.config, dtype=dtype)
    with atomic.new_folder(path) as folder:
        _write_weights(folder, opened, dtype=np.dtype(dtype), shard_bytes=shard_bytes)
        write_json(folder / CONFIG, settings)
        write_json(folder / GENERATION, {name: settings[name] for name in _GENERATION})
        if opened.vocabulary is not None:
            _write_tokenizer(folder, opened)
        if opened.origin is not None:
            write_json(folder / ORIGIN, manifest.without_paths(opened.origin))
        finish(folder)


def _refuse_unknown(path: Path, unknown: Sequence[str], known: Sequence[str]) -> None:
    if unknown:
        lines = [f"  {part(name)}{nearest(name[:200], known)}" for name in unknown[:5]]
        raise ValueError(
            "\n".join([f"{path} holds {len(unknown)} arrays that this architecture does not have:", *lines])
            + ("\n  .." if len(unknown) > 5 else "")
        )


def _write_weights(folder: Path, opened: Opened, *, dtype: np.dtype, shard_bytes: int) -> None:
    stored = {
        name.hugging_face: opened.arrays[name.ours].transposed() if name.transposed else opened.arrays[name.ours]
        for name in names.of(opened.arrays, names.table_of(opened.config))
    }
    if isinstance(opened.config, t5gemma.T5GemmaConfig):
        stored |= t5gemma_settings.of_images(opened.config)
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
    for index, only, read in _FORMS:
        if (path / index).is_file():
            return _sharded(path, index, read)
        if (path / only).is_file():
            return read(path / only)
    expected = ", ".join(name for *pair, _ in _FORMS for name in pair)
    raise FileNotFoundError(f"{path} has no weights: expected one of {expected}.")


def _sharded(path: Path, index: str, read: Any) -> dict[str, LazyArray]:
    weight_map = read_object(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / index}: 'weight_map' is {brief(weight_map)}; expected array names and their files.")
    for name, file in weight_map.items():
        # The index may come from anywhere: read no file outside its folder.
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise ValueError(
                f"{path / index}: {brief(name)} is in {brief(file)}; expected a .safetensors, .msgpack or .bin "
                "file in the same folder."
            )
    missing = sorted(file for file in set(weight_map.values()) if not (path / file).is_file())
    if missing:
        raise FileNotFoundError(
            f"{path} is incomplete: its index names {', '.join(missing)}. Download the missing files."
        )
    stored: dict[str, LazyArray] = {}
    for file in sorted(set(weight_map.values())):
        stored |= read(path / file)
    lost = sorted(name for name in weight_map if not {name, flax_msgpack.torch_name(name)} & set(stored))
    if lost:
        file = weight_map[lost[0]]
        raise ValueError(f"{path}: the index promises {brief(lost[0])} in {file}, which does not hold it.")
    return stored


def _unwrapped(path: Path, stored: Mapping[str, LazyArray], *, inside: re.Pattern[str]) -> dict[str, LazyArray]:
    """Removes what wrappers of the model added to its names. ValueError if there are several models."""
    found: dict[str, LazyArray] = {}
    removed: dict[str, None] = {}
    for name, array in stored.items():
        bare = ".".join(each for each in name.split(".") if each not in _WRAPPERS)
        match = inside.fullmatch(bare)
        outer, bare = (match[1], match[2]) if match else ("", bare)
        if bare in found:
            raise ValueError(
                f"{path} holds more than one model: {part(name)!r} is a second {part(bare)!r}. Save the one to convert "
                "by itself."
            )
        found[bare] = array
        if bare != name:
            removed[".".join(each for each in name.split(".") if each in _WRAPPERS) or outer.rstrip(".")] = None
    if removed:
        log.info("%s: left out of its names, as the model was saved wrapped: %s.", path, part(", ".join(removed)))
    return found


def _warn_of_tokenizer(path: Path, vocabulary: str | None) -> None:
    """Warns of tokens that a directory adds to its SentencePiece model, and of a tokenizer that is not read."""
    if vocabulary is None and (path / "tokenizer.json").is_file():
        log.warning(
            "%s has tokenizer.json and no %s, so its tokenizer is not read. Name its SentencePiece model where one is "
            "needed (--vocabulary, --gin.VOCABULARY).",
            *(path, SENTENCEPIECE),
        )
    found = {name: read_object(path / name, most=_LARGEST) for name in _TOKENS if (path / name).is_file()}
    lists = [each for name, each in found.items() if not _TOKENS[name]]
    lists += [each.get(field) for name, each in found.items() for field in _TOKENS[name]]
    added = list(dict.fromkeys(text for each in lists for text in _texts(each) if not _OWN_TOKEN.fullmatch(text)))
    if added:
        log.warning(
            "%s adds %d tokens to its SentencePiece model (%s), which are not read: texts with them are encoded in "
            "pieces, and an export has them no more.",
            *(path, len(added), part(", ".join(added))),
        )


def _texts(tokens: Any) -> list[str]:
    """Lists the texts of tokens: {text: id}, {id: {"content": text}}, or a list of either."""
    if isinstance(tokens, dict):
        tokens = [value if isinstance(value, dict) else name for name, value in tokens.items()]
    each = tokens if isinstance(tokens, list) else []
    each = [token.get("content") if isinstance(token, dict) else token for token in each]
    return [text for text in each if isinstance(text, str)]


def _expect_copy(path: Path, table: LazyArray, copy: LazyArray, *, name: str, of: str) -> None:
    """Requires a bit-identical copy of the table `of` (tied models may store several)."""
    if copy is table:
        return
    if len(table.shape) != 2 or 0 in table.shape:
        raise ValueError(f"{path}: {of!r} has the shape {table.shape}; expected a table of two dimensions.")
    size, step = table.shape[0], max(1, 2**24 // table.shape[1])
    pieces = [(slice(start, min(start + step, size)), slice(None)) for start in range(0, size, step)]
    same = copy.shape == table.shape and all(np.array_equal(table.read(piece), copy.read(piece)) for piece in pieces)
    if not same:
        raise ValueError(
            f"{path}: {name!r} differs from {of!r}, although the configuration ties them. If the model has "
            "two tables, correct tie_word_embeddings in config.json."
        )


def _check_architectures(path: Path, settings: Mapping[str, Any], *, ends: tuple[str, ...], expected: str) -> None:
    kind, architectures = settings.get("model_type"), settings.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ValueError(f"{path / CONFIG}: 'architectures' is {brief(architectures)}; expected a list of names.")
    known = (*MODEL_TYPES, *decoder_settings.MODEL_TYPES, *t5gemma_settings.MODEL_TYPES)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"{path} holds a model of type {brief(kind)} ({part(', '.join(architectures) or 'no architecture')}); "
            f"expected an encoder-decoder or decoder for text of type {', '.join(known)}."
        )
    for architecture in architectures:
        if "Encoder" in architecture or not architecture.endswith(ends):
            raise ValueError(f"{path} holds a {part(architecture)}; expected {expected}.")


def _config(path: Path, settings: Mapping[str, Any], *, tied: bool) -> t5.T5Config:
    ends = ("ForConditionalGeneration", "WithLMHeadModel")
    _check_architectures(path, settings, ends=ends, expected="a ..ForConditionalGeneration, which has a decoder")
    kind = settings["model_type"]
    activation = settings.get("feed_forward_proj", "relu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(  # without a nearest name, which would be another function
            f"{path}: feed_forward_proj is {brief(activation)}, which is not computed here; expected one of "
            f"{', '.join(_ACTIVATIONS)}. Take a model that has one of them."
        )
    # transformers 5 writes `tie_word_embeddings: true` for every T5; scale_decoder_outputs has the old meaning.
    scaled = settings.get("scale_decoder_outputs", settings.get("tie_word_embeddings", True))
    if kind in ("mt5", "umt5"):
        scaled = tied and scaled  # published models have false; newer versions write it without a meaning
    settings = {**settings}
    if settings.get("num_decoder_layers") is None:
        settings["num_decoder_layers"] = settings.get("num_layers")
    fields: dict[str, Any] = {}
    for name, (ours, default) in _SIZES.items():
        value = fields[ours] = settings.get(name, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{path / CONFIG}: {name!r} is {brief(value)}; expected a whole number of at least 1.")
    for name, (ours, default) in _NUMBERS.items():
        value = settings.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < (1 if name == "dropout_rate" else 2**31):
            raise ValueError(f"{path / CONFIG}: {name!r} is {brief(value)}; expected a number such as {default}.")
        fields[ours] = type(default)(value)
    return t5.T5Config(
        **fields,
        mlp_activations=_ACTIVATIONS[activation],
        logits_via_embedding=bool(scaled),
        relative_attention_bias=MODEL_TYPES[kind],
    )


def config_json(config: families.ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Builds the contents of `config.json`."""
    if isinstance(config, t5gemma.T5GemmaConfig):
        return t5gemma_settings.write(config, dtype=dtype)
    if not isinstance(config, t5.T5Config):
        return decoder_settings.write(config, dtype=dtype)
    per_layer = config.relative_attention_bias == "per_layer"
    activation = next((name for name, ours in _ACTIVATIONS.items() if ours == config.mlp_activations), None)
    if activation is None:
        known = ", ".join(str(ours) for ours in _ACTIVATIONS.values())
        raise ValueError(f"Hugging Face has no T5 with the activations {config.mlp_activations}; it has {known}.")
    return {
        "architectures": ["UMT5ForConditionalGeneration" if per_layer else "T5ForConditionalGeneration"],
        "model_type": "umt5" if per_layer else "t5",
        "is_encoder_decoder": True,
        **{name: getattr(config, ours) for name, (ours, _) in {**_SIZES, **_NUMBERS}.items()},
        "feed_forward_proj": activation,
        "tie_word_embeddings": config.logits_via_embedding,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _write_tokenizer(folder: Path, opened: Opened) -> None:
    assert opened.vocabulary is not None
    kind = vocabularies.kind_of(opened.vocabulary)
    if kind.library == "tokenizers":
        _write_bpe(folder, opened.vocabulary, opened.config)
        return
    settings: dict[str, Any] = {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": kind.extra_ids,
    }
    if kind.file is None:
        settings["tokenizer_class"] = "ByT5Tokenizer"
    else:
        settings["tokenizer_class"] = "T5Tokenizer"
        shutil.copyfile(vocabularies.located(opened.vocabulary), folder / SENTENCEPIECE)
    write_json(folder / TOKENIZER_CONFIG, settings)


def _write_bpe(folder: Path, vocabulary: str, config: families.ModelConfig) -> None:
    contents = tokens.read_vocabulary(vocabulary)
    (folder / TOKENIZER).write_bytes(contents)
    parsed = vocabularies.parse_bpe(contents)
    end = vocabularies.end_of(parsed)
    special = {id_: token for token, id_ in vocabularies.specials(parsed).items()}
    # Questions are written without a template and without BOS, as in training.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": special.get(tokens.PAD_ID, end),
        # CTranslate2 wants one, and begins decoder inputs with it. A piece of text must not become special.
        "bos_token": end if isinstance(config, t5.T5Config) else special.get(config.decoder_start, end),
        # A decoder-only model continues its prompt, so padding comes before that.
        "padding_side": "left" if isinstance(config, decoder_only.DecoderConfig) else "right",
    }
    if (unknown := parsed["model"].get("unk_token")) is not None:
        settings["unk_token"] = unknown
    write_json(folder / TOKENIZER_CONFIG, {**settings, "clean_up_tokenization_spaces": False})


def read_object(path: Path, *, most: int = user_files.LARGEST) -> dict[str, Any]:
    """Reads a JSON object from a file of at most `most` bytes. ValueError for any other value."""
    value = parse_json(decoded(user_files.whole(path, most=most), str(path)), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {brief(value)}; expected a JSON object, {{..}}.")
    return value


def origin_beside(folder: Path) -> dict[str, Any] | None:
    """Reads the manifest of the run that a directory was exported from; None if there is none."""
    file = folder / ORIGIN
    return read_origin(user_files.whole(file), file) if file.is_file() else None


def read_origin(data: bytes, where: object) -> dict[str, Any]:
    """Reads the manifest of the run that was exported. ValueError if a conversion could not use it."""
    value = parse_json(decoded(data, str(where)), str(where))
    try:
        options = value["data"]["options"]
        valid = isinstance(options, dict) and isinstance(options["vocabulary"], str | None)
    except (KeyError, TypeError, IndexError):
        valid = False
    if not valid:
        raise ValueError(
            f"{where}: got {brief(value)}; expected the manifest of a run, with its data options. Remove it."
        )
    return value


def _renamed(stored: Mapping[str, LazyArray], *, shared_bias: bool) -> tuple[dict[str, LazyArray], list[str]]:
    """Renames arrays to our names and layout; returns the names without a row too."""
    found, unknown = {}, []
    for theirs, array in sorted(stored.items()):
        layer = _LAYER.match(theirs)
        pattern = theirs if layer is None else f"{layer[1]}.block.{{layer}}.{theirs[layer.end() :]}"
        # The bias that all layers share is stored in layer 0, under a name with that number.
        ways = (theirs, pattern) if shared_bias else (pattern, theirs)
        row = _OURS.get(ways[0]) or _OURS.get(ways[1])
        if row is None:
            unknown.append(theirs)
            continue
        ours, transposed = row
        found[ours if layer is None else ours.replace("{layer}", layer[2])] = (
            array.transposed() if transposed else array
        )
    return found, unknown


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", "utf-8")
