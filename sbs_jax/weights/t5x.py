"""T5X checkpoints, local or on gs://: every form that T5X has written is read, the current one is written.

    <model_dir>/checkpoint_<step>/state/manifest.ocdbt      current: written by Orbax
    <model_dir>/checkpoint_<step>/checkpoint                before: one msgpack file; arrays in it, or beside it as
    <model_dir>/checkpoint_<step>/target.encoder.../.zarray     TensorStore directories that it names

TensorStore reads buckets like folders, by slices. An array of a scanned model holds all layers of a stack; it is read
layer by layer.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import serialization

from sbs_jax.storage.json_files import brief, part
from sbs_jax.student import families, t5
from sbs_jax.weights import hugging_face, names, tensor_store
from sbs_jax.weights.arrays import LazyArray, Opened, shapes

_MSGPACK, _OCDBT, _STATE = "checkpoint", "manifest.ocdbt", "state/"
_TARGET = "target/"
_PLACEHOLDER = "PLACEHOLDER://"
_NUMBERED = re.compile(r"^(encoder|decoder)/layers_(\d+)/")
_STEP = re.compile(r"checkpoint_(\d+)/")
# From this version on, bfloat16 is stored as such; before, as its bits in uint16.
_NATIVE_BFLOAT16 = 3
_BESIDE = re.compile(r"[^/\\\x00-\x1f\ud800-\udfff]{1,240}")
_DEEPEST = 50  # nesting of names
# T5X's default; it does not follow from any shape.
_DROPOUT_RATE = 0.1


def is_checkpoint(path: str | Path) -> bool:
    """Detects a T5X model directory or one checkpoint of it."""
    return _find(str(path)) is not None


def open_checkpoint(path: str | Path) -> Opened:
    """Opens the architecture and arrays of a checkpoint, or of a model directory's newest one.

    T5X stores no configuration: sizes come from the shapes; two branches in the MLP mean gated GELU, one means ReLU, as
    in every published T5; the dropout rate is T5X's default, 0.1. Beside exports of `sbs convert` are the settings of
    their run, which take precedence. FileNotFoundError where there is no checkpoint; ValueError for names that are not
    a T5's.
    """
    url, form = _expect(str(path))
    tensor_store.check_files(url.removeprefix(tensor_store.LOCAL))
    stored = _from_orbax(url) if form == _OCDBT else _from_msgpack(url)
    scanned = any(name.startswith(("encoder/encoder/", "decoder/decoder/")) for name in stored)
    config, axis, layers = _config(path, stored, scanned=scanned)
    origin = _origin(url)
    step = int(match[1]) if (match := _STEP.search(url)) else 0
    if origin is not None:
        try:
            config = t5.T5Config(**{**origin["model"], "mlp_activations": tuple(origin["model"]["mlp_activations"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {hugging_face.ORIGIN} beside it has no valid 'model' ({part(repr(error))}). Remove that file."
            ) from None
    # Kernels may have heads and their width on two axes.
    sizes = {
        _NUMBERED.sub(r"\1/layers/\2/", name): (shape[0], shape[1] * shape[2]) if len(shape) == 3 else shape
        for name, shape in shapes(stored).items()
    }
    names.check_sizes(path, sizes, config, layers=layers, kind="T5X")
    wanted = names.parameters(config)
    arrays = {}
    used = set()
    for name in names.of(wanted):
        theirs = name.scanned if scanned else name.t5x
        if theirs in stored:
            used.add(theirs)
            array = stored[theirs]
            if scanned and name.layer is not None:
                array = array.at(name.layer, axis=axis)
            if len(array.shape) == 3:
                array = array.joined(0 if name.ours.endswith("out/kernel") else 1)
            arrays[name.ours] = array
    # Arrays without a row keep their own names, so that the error shows them.
    left_over = {name: array for name, array in stored.items() if name not in used}
    names.check(path, shapes({**arrays, **left_over}), shapes(wanted), kind="T5X")
    vocabulary = None if origin is None else origin["data"]["options"]["vocabulary"]
    return Opened(config, arrays, step=step, vocabulary=vocabulary, origin=origin)


def write(path: str | Path, parameters: families.Parameters, *, step: int) -> str:
    """Writes `<path>/checkpoint_<step>` in Orbax's form, layers unscanned, and returns that directory.

    It has no optimizer state: T5X starts from it with `utils.CheckpointConfig.restore.fallback_to_scratch = True`.
    """
    target: dict[str, Any] = {}
    for name in names.of(parameters):
        *parents, last = name.t5x.split("/")
        node = target
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = parameters[name.ours]
    tree = {"state": {"step": np.int32(step)}, "target": target}
    options = ocp.CheckpointManagerOptions(step_prefix="checkpoint", enable_async_checkpointing=False)
    home = str(path) if "://" in str(path) else str(Path(path).absolute())
    with ocp.CheckpointManager(home, options=options) as manager:
        if step in manager.all_steps():
            raise FileExistsError(f"{home}/checkpoint_{step} exists already; choose another name, or remove it.")
        manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
    return f"{home}/checkpoint_{step}"


def _find(path: str) -> tuple[str, str] | None:
    """Finds the directory that holds the arrays: (its URL, which of the two forms it has)."""
    if "://" not in path:
        if not Path(path).is_dir():
            return None
        for name in (_OCDBT, _STATE + _OCDBT, _MSGPACK):
            if (Path(path) / name).exists():
                tensor_store.check_file(Path(path) / name)
    url = tensor_store.url_of(path)
    store = ts.KvStore.open(url).result()
    for folder in ("", _STATE):
        if tensor_store.has(store, folder + _OCDBT):
            return (url + folder, _OCDBT) if folder or _is_target(url) else None
    if tensor_store.has(store, _MSGPACK):
        return url, _MSGPACK
    # A large model has tens of thousands of files, and a home folder more: list these last, and no others.
    named = store.list(ts.KvStore.KeyRange("checkpoint_", "checkpoint`")).result()
    steps = sorted({int(match[1]) for match in map(_STEP.match, map(tensor_store.text, named)) if match})
    return _find(f"{url}checkpoint_{steps[-1]}") if steps else None


def _is_target(url: str) -> bool:
    """Distinguishes a T5X train state from other arrays of Orbax, such as those of our runs."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": url}).result()
    return any(name.startswith("target.") for name in tensor_store.zarr_names(store))


def _expect(path: str) -> tuple[str, str]:
    found = _find(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} holds no T5X checkpoint; expected a model directory with checkpoint_<step>/, or one of those."
        )
    return found


def _origin(url: str) -> dict[str, Any] | None:
    """Reads the manifest of the exported run, which is in the model directory."""
    parent = re.sub(r"checkpoint_\d+/(state/)?$", "", url)
    if parent.startswith(tensor_store.LOCAL):
        return hugging_face.origin_beside(Path(parent.removeprefix(tensor_store.LOCAL)))
    found = ts.KvStore.open(parent).result().read(hugging_face.ORIGIN).result()
    return hugging_face.read_origin(found.value, parent + hugging_face.ORIGIN) if found.state == "value" else None


def _from_orbax(url: str) -> dict[str, LazyArray]:
    """Opens parameters by T5X's names (`encoder/layers_0/mlp/wo/kernel`); leaves out optimizer state."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": url}).result()
    drivers = {name: driver for name, driver in tensor_store.zarr_names(store).items() if name.startswith("target.")}
    arrays = tensor_store.opened({"driver": "ocdbt", "base": url}, drivers)
    return {name.replace(".", "/").removeprefix(_TARGET): array for name, array in arrays.items()}


def _from_msgpack(url: str) -> dict[str, LazyArray]:
    store = ts.KvStore.open(url).result()
    try:
        contents: Any = serialization.msgpack_restore(store.read(_MSGPACK).result().value)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, MemoryError) as error:
        # flax's reader does not check a file's claims about its arrays.
        reason = part(f"{type(error).__name__}: {error}")
        raise ValueError(f"{url}{_MSGPACK} is not a T5X checkpoint: {reason}") from None
    version = contents.get("version", 0) if isinstance(contents, dict) else 0
    root = contents.get("optimizer", contents) if isinstance(contents, dict) else contents
    if not isinstance(root, dict) or not isinstance(root.get("target"), dict) or type(version) is not int:
        found = part(", ".join(map(str, root))) if isinstance(root, dict) else type(root).__name__
        raise ValueError(f"{url}{_MSGPACK} has no parameters under 'target'; it has {found}.")
    arrays: dict[str, LazyArray] = {}
    elsewhere: dict[str, str] = {}
    for name, leaf in _leaves(root["target"], where=f"{url}{_MSGPACK}"):
        if isinstance(leaf, Mapping) or (isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER)):
            elsewhere[name] = _folder(leaf, where=f"{url}{_MSGPACK}: {part(name)}")
            continue
        values = np.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic | int | float) else None
        if values is None or (values.dtype.kind not in "fiu" and values.dtype != ml_dtypes.bfloat16):
            raise ValueError(f"{url}{_MSGPACK}: {part(name)} is {brief(leaf)}; expected an array of numbers.")
        arrays[name] = LazyArray(values.shape, values.dtype, values.__getitem__)
    spec = store.spec().to_json()
    missing = [folder for folder in elsewhere.values() if not tensor_store.has(store, f"{folder}/.zarray")]
    if missing:
        raise FileNotFoundError(
            f"{url} is incomplete: {len(missing)} arrays are missing, such as {missing[0]}. Copy the whole directory."
        )
    opened = tensor_store.opened(spec, dict.fromkeys(elsewhere.values(), "zarr"))
    for name, folder in elsewhere.items():
        as_bits = version < _NATIVE_BFLOAT16 and opened[folder].dtype == np.uint16
        arrays[name] = _from_bits(opened[folder]) if as_bits else opened[folder]
    return arrays


def _from_bits(array: LazyArray) -> LazyArray:
    """Reinterprets uint16 as bfloat16."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    return LazyArray(array.shape, bfloat16, lambda index: array.read(index).view(bfloat16))


def _folder(leaf: Any, *, where: str) -> str:
    """Returns an array's folder, which must be beside the file. ValueError for any other place."""
    try:
        # The description's key for the path differs by version. The folder is always beside the file.
        named = (
            leaf.removeprefix(_PLACEHOLDER) if isinstance(leaf, str) else leaf["kvstore"].get("path") or leaf["path"]
        )
        folder = named.strip("/")
    except (KeyError, TypeError, AttributeError):
        folder = ""
    if not _BESIDE.fullmatch(folder) or folder in (".", ".."):
        raise ValueError(f"{where} is stored in {brief(leaf)}; expected a folder beside the file.")
    return folder


def _leaves(tree: Mapping[str, Any], prefix: str = "", *, where: str) -> list[tuple[str, Any]]:
    if prefix.count("/") > _DEEPEST:
        raise ValueError(f"{where} has names nested more than {_DEEPEST} deep; expected those of a T5.")
    found = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and "driver" not in value:
            found += _leaves(value, f"{prefix}{key}/", where=where)
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _config(path: object, stored: Mapping[str, LazyArray], *, scanned: bool) -> tuple[t5.T5Config, int, dict[str, int]]:
    """Derives the architecture, the layer axis of scanned arrays, and the number of layers that have arrays."""

    def shape(*choices: str, dimensions: int) -> tuple[int, ...]:
        for name in choices:
            if name in stored:
                found = stored[name].shape
                if len(found) < dimensions or 0 in found:
                    raise ValueError(f"{path}: {name} has the shape {found}; expected {dimensions} dimensions.")
                return found
        raise ValueError(
            f"{path} is not an encoder-decoder T5 of T5X: it has no {choices[0]!r}. It has {len(stored)} "
            f"parameters: {part(', '.join(sorted(stored)[:5]))} .."
        )

    vocab_size, emb_dim = shape("token_embedder/embedding", dimensions=2)[:2]
    axis = 1
    if scanned:
        scale = {stack: shape(f"{stack}/{stack}/pre_mlp_layer_norm/scale", dimensions=2) for stack in names.STACKS}
        if all(each[1] == emb_dim and each[0] != emb_dim for each in scale.values()):
            axis = 0
        layers = stored_layers = {stack: each[axis] for stack, each in scale.items()}
        first = {stack: f"{stack}/{stack}" for stack in scale}
    else:
        numbers: dict[str, set[int]] = {stack: set() for stack in names.STACKS}
        for match in filter(None, map(_NUMBERED.match, stored)):
            numbers[match[1]].add(int(match[2][:9]))
        layers = {stack: 1 + max(found, default=-1) for stack, found in numbers.items()}
        stored_layers = {stack: len(found) for stack, found in numbers.items()}
        first = {stack: f"{stack}/layers_0" for stack in layers}

    def without_layers(full: tuple[int, ...]) -> tuple[int, ...]:
        return full[:axis] + full[axis + 1 :] if scanned else full

    more = int(scanned)
    joined = math.prod(without_layers(shape(f"{first['encoder']}/attention/query/kernel", dimensions=2 + more))[1:])
    gated = f"{first['encoder']}/mlp/wi_0/kernel" in stored
    inner = f"{first['encoder']}/mlp/{'wi_0' if gated else 'wi'}/kernel"
    mlp_dim = without_layers(shape(inner, dimensions=2 + more))[-1]
    per_layer = f"{first['encoder']}/relpos_bias/rel_embedding"
    bias = shape("encoder/relpos_bias/rel_embedding", per_layer, dimensions=2)
    heads, buckets = (without_layers(bias) if per_layer in stored else bias)[:2]
    try:
        config = t5.T5Config(
            vocab_size=vocab_size,
            emb_dim=emb_dim,
            num_heads=heads,
            head_dim=joined // heads,
            mlp_dim=mlp_dim,
            num_encoder_layers=layers["encoder"],
            num_decoder_layers=layers["decoder"],
            mlp_activations=("gelu", "linear") if gated else ("relu",),
            logits_via_embedding="decoder/logits_dense/kernel" not in stored,
            dropout_rate=_DROPOUT_RATE,
            relative_attention_num_buckets=buckets,
            relative_attention_bias="per_layer" if per_layer in stored else "shared",
        )
    except ValueError as error:
        raise ValueError(f"{path} is not an encoder-decoder T5 of T5X: {error}") from None
    return config, axis, stored_layers
