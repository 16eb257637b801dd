"""T5Gemma's own Flax checkpoints (Kaggle, `google/t5gemma/flax/..`; the package `gemma`, research/t5gemma), read only.

Orbax stores one array for each of these names, with a dot for each slash; N counts query heads, G those of keys:

    {encoder,decoder}/embedder/input_embedding              [256128, D], of which texts have the first 256,000
    {encoder,decoder}/layer_0/attn/qkv_einsum/w             [3, N, D, K], or, if N and G differ:
        q_einsum/w, kv_einsum/w                             [N, D, K], [2, G, D, K]
        attn_vec_einsum/w                                   [N, K, D]
    decoder/layer_0/cross_attn/{q,kv,attn_vec}_einsum/w     always apart
    {encoder,decoder}/layer_0/mlp/gating_einsum, linear     [2, D, F] or [2, F, D], [F, D]
    .../{pre,post}_{attention,cross_attention,ffw}_norm/scale, final_norm/scale

Older files of the package have "transformer/" in front and "/w" after the MLP's arrays. Shapes say all but windows,
soft caps and the rotary base, which are the same in every published size.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import tensorstore as ts

from sbs_jax.storage.json_files import part
from sbs_jax.student.t5gemma import T5GemmaConfig
from sbs_jax.weights import names, t5gemma_settings, tensor_store
from sbs_jax.weights.arrays import LazyArray, Opened, shapes

_MANIFEST = "manifest.ocdbt"
_VOCABULARY = 256_000
_PREFIX = re.compile(r"^(params/|transformer/|encoder_decoder/)*")
_LAYER = re.compile(r"(encoder|decoder)/layer_(\d{1,4})/(.+)", re.ASCII)
_MARK = "decoder/layer_0/cross_attn/kv_einsum"
_NORMS = {
    **{f"{side}_attention_norm": f"{side}_self_attention_layer_norm" for side in ("pre", "post")},
    **{f"{side}_cross_attention_norm": f"{side}_cross_attention_layer_norm" for side in ("pre", "post")},
    **{f"{side}_ffw_norm": f"{side}_mlp_layer_norm" for side in ("pre", "post")},
}
_ATTENTIONS = {"attn": "self_attention", "cross_attn": "encoder_decoder_attention"}
_TABLES = {f"{stack}/embedder/input_embedding": table for stack, table in zip(names.STACKS, names.TABLES, strict=True)}


def is_checkpoint(path: str | Path) -> bool:
    """Detects a checkpoint by the names of its arrays."""
    if "://" not in str(path):
        file = Path(path) / _MANIFEST
        if not file.is_file():
            return False
        tensor_store.check_file(file)
    url = tensor_store.url_of(path)
    if not tensor_store.has(ts.KvStore.open(url).result(), _MANIFEST):
        return False
    store = ts.KvStore.open({"driver": "ocdbt", "base": url}).result()
    return any(_plain(name) == _MARK for name in tensor_store.zarr_names(store))


def open_checkpoint(path: str | Path) -> Opened:
    """Opens the architecture and arrays; reads headers only. ValueError for shapes that contradict one another."""
    found = {_plain(name): array for name, array in tensor_store.orbax_arrays(path, complete=False).items()}
    config = _config(path, found)
    arrays: dict[str, LazyArray] = {}
    for name, array in found.items():
        arrays |= _ours(name, array, config)
    layers = {stack: names.layers_of(arrays, stack=stack) for stack in names.STACKS}
    names.check_sizes(path, shapes(arrays), config, layers=layers, kind="Flax")
    names.check(path, shapes(arrays), shapes(names.parameters(config)), kind="Flax")
    return Opened(config, arrays)


def _plain(name: str) -> str:
    return _PREFIX.sub("", name.replace(".", "/")).removesuffix("/w")


def _ours(name: str, array: LazyArray, config: T5GemmaConfig) -> dict[str, LazyArray]:
    """Returns the arrays of ours that one of theirs holds; one without a row keeps its name, so that errors show it."""
    if name in _TABLES:
        return {_TABLES[name]: array.first(config.vocab_size)}
    if name in ("encoder/final_norm/scale", "decoder/final_norm/scale"):
        stack = name.split("/")[0]
        return {f"{stack}/{stack}_norm/scale": array}
    match = _LAYER.fullmatch(name)
    if match is None:
        return {name: array}
    inside, *rest = match[3].split("/")
    kind, dimensions = rest[0] if rest else "", len(array.shape)
    layer = f"{match[1]}/layers/{int(match[2])}"
    if inside in _NORMS and kind == "scale":
        return {f"{layer}/{_NORMS[inside]}/scale": array}
    if inside == "mlp" and kind == "linear":
        return {f"{layer}/mlp/wo/kernel": array}
    if inside == "mlp" and kind == "gating_einsum" and dimensions == 3:
        pair = [array.at(i, axis=0) for i in range(min(2, array.shape[0]))]
        pair = [each if each.shape[0] == config.emb_dim else each.transposed() for each in pair]
        return {f"{layer}/mlp/wi_{i}/kernel": each for i, each in enumerate(pair)}
    held = {"q_einsum": ("query",), "kv_einsum": ("key", "value"), "qkv_einsum": ("query", "key", "value")}
    if inside in _ATTENTIONS and kind == "attn_vec_einsum" and dimensions == 3:
        return {f"{layer}/{_ATTENTIONS[inside]}/out/kernel": array.joined(0)}
    if inside in _ATTENTIONS and kind in held and dimensions == 3 + (kind != "q_einsum"):
        each = [array] if kind == "q_einsum" else [array.at(i, axis=0) for i in range(array.shape[0])]
        # [N, D, K] to [D, N K]
        return {
            f"{layer}/{_ATTENTIONS[inside]}/{ours}/kernel": part.swapped().joined(1)
            for ours, part in zip(held[kind], each, strict=False)
        }
    return {name: array}


def _config(path: object, found: Mapping[str, LazyArray]) -> T5GemmaConfig:
    """Derives the architecture from shapes; what these do not say is as in every published T5Gemma."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in found or len(found[name].shape) != dimensions or 0 in found[name].shape:
            has = found[name].shape if name in found else f"others: {part(', '.join(sorted(found)[:3]))} .."
            raise ValueError(
                f"{path} is no checkpoint of T5Gemma: {name} has {dimensions} dimensions there; got {has}."
            )
        return found[name].shape

    tables = {stack: shape(name, 2) for stack, name in zip(names.STACKS, _TABLES, strict=True)}
    if tables["encoder"] != tables["decoder"]:
        raise ValueError(
            f"{path}: the encoder's table is {tables['encoder']} and the decoder's {tables['decoder']}; expected equal "
            "ones. Take a model with two stacks of one size, such as 2b-2b."
        )
    heads, emb_dim, head_dim = shape("decoder/layer_0/cross_attn/q_einsum", 3)
    numbers = [(match[1], int(match[2])) for match in map(_LAYER.fullmatch, found) if match]
    try:
        return T5GemmaConfig(
            **t5gemma_settings.MODEL_TYPES[t5gemma_settings.T5GEMMA],
            vocab_size=min(tables["encoder"][0], _VOCABULARY),
            emb_dim=emb_dim,
            num_heads=heads,
            num_kv_heads=shape("decoder/layer_0/cross_attn/kv_einsum", 4)[1],
            head_dim=head_dim,
            mlp_dim=shape("decoder/layer_0/mlp/linear", 2)[0],
            num_encoder_layers=1 + max((number for stack, number in numbers if stack == "encoder"), default=-1),
            num_decoder_layers=1 + max((number for stack, number in numbers if stack == "decoder"), default=-1),
            shared_table=False,
            logits_via_embedding=True,
            mlp_activations=("gelu", "linear"),
            dropout_rate=0.0,
            rope_base=1e4,
            window=4096,
            global_every=2,
            attention_cap=50.0,
            logits_cap=30.0,
            eos_id=1,
            decoder_start=2,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
