"""Tables of parameter names: ours and Hugging Face's, one per family; T5X's; GGUF's.

Our kernels and T5X's are `[in, out]`, Hugging Face's `[out, in]`; embedding tables are `[V, D]` everywhere. T5X's names
are ours with `layers_0` for `layers/0`. Where T5X scans over layers, one array holds all layers of a stack, the layer
on its second axis: `encoder/encoder/mlp/wo/kernel`, `[F, L, D]`. The scanning network also keeps heads and their width
apart: `encoder/encoder/attention/query/kernel`, `[D, L, H, K]`; ours has the last two as one.
"""

import dataclasses
import functools
import math
import re
import types
from collections.abc import Collection, Iterable, Mapping

import jax

from sbs_jax.checks import nearest
from sbs_jax.storage.json_files import part
from sbs_jax.student import families, t5, t5gemma
from sbs_jax.weights.arrays import LazyArray, Shapes

_LAYER = "{layer}"
_NUMBER = re.compile(r"\.(\d{1,4})\.", re.ASCII)  # of a layer
_DENSE, _AS_IS = True, False

TABLES = ("token_embedder/embedding", "target_embedder/embedding")  # a row for each token

_SELF, _CROSS, _MLP = "SelfAttention", "EncDecAttention", "DenseReluDense"


def _attention(ours: str, theirs: str) -> dict[str, tuple[str, bool]]:
    short = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return {f"{ours}/{long}/kernel": (f"{theirs}.{letter}.weight", _DENSE) for long, letter in short.items()}


def _mlp(ours: str, theirs: str) -> dict[str, tuple[str, bool]]:
    return {f"{ours}/{name}/kernel": (f"{theirs}.{name}.weight", _DENSE) for name in ("wi", "wi_0", "wi_1", "wo")}


_ENCODER, _ENCODER_BLOCK = "encoder/layers/{layer}", "encoder.block.{layer}.layer"
_DECODER, _DECODER_BLOCK = "decoder/layers/{layer}", "decoder.block.{layer}.layer"
_BIAS = "relative_attention_bias.weight"
# ours: (Hugging Face's, transposed there). An architecture uses the rows of the parameters it has.
TABLE: dict[str, tuple[str, bool]] = {
    "token_embedder/embedding": ("shared.weight", _AS_IS),
    "logits_dense/kernel": ("lm_head.weight", _DENSE),
    # Hugging Face stores the bias that all layers share in layer 0.
    "encoder/relpos_bias/rel_embedding": (f"encoder.block.0.layer.0.{_SELF}.{_BIAS}", _DENSE),
    f"{_ENCODER}/relpos_bias/rel_embedding": (f"{_ENCODER_BLOCK}.0.{_SELF}.{_BIAS}", _DENSE),
    f"{_ENCODER}/pre_attention_layer_norm/scale": (f"{_ENCODER_BLOCK}.0.layer_norm.weight", _AS_IS),
    **_attention(f"{_ENCODER}/attention", f"{_ENCODER_BLOCK}.0.{_SELF}"),
    f"{_ENCODER}/pre_mlp_layer_norm/scale": (f"{_ENCODER_BLOCK}.1.layer_norm.weight", _AS_IS),
    **_mlp(f"{_ENCODER}/mlp", f"{_ENCODER_BLOCK}.1.{_MLP}"),
    "encoder/encoder_norm/scale": ("encoder.final_layer_norm.weight", _AS_IS),
    "decoder/relpos_bias/rel_embedding": (f"decoder.block.0.layer.0.{_SELF}.{_BIAS}", _DENSE),
    f"{_DECODER}/relpos_bias/rel_embedding": (f"{_DECODER_BLOCK}.0.{_SELF}.{_BIAS}", _DENSE),
    f"{_DECODER}/pre_self_attention_layer_norm/scale": (f"{_DECODER_BLOCK}.0.layer_norm.weight", _AS_IS),
    **_attention(f"{_DECODER}/self_attention", f"{_DECODER_BLOCK}.0.{_SELF}"),
    f"{_DECODER}/pre_cross_attention_layer_norm/scale": (f"{_DECODER_BLOCK}.1.layer_norm.weight", _AS_IS),
    **_attention(f"{_DECODER}/encoder_decoder_attention", f"{_DECODER_BLOCK}.1.{_CROSS}"),
    f"{_DECODER}/pre_mlp_layer_norm/scale": (f"{_DECODER_BLOCK}.2.layer_norm.weight", _AS_IS),
    **_mlp(f"{_DECODER}/mlp", f"{_DECODER_BLOCK}.2.{_MLP}"),
    "decoder/decoder_norm/scale": ("decoder.final_layer_norm.weight", _AS_IS),
}


def _layers(
    layer: str, *, inner: Mapping[str, str], norms: Mapping[str, str], own: str = _DECODER
) -> dict[str, tuple[str, bool]]:
    """Builds the rows of a stack's layers that rotate, called `layer` elsewhere."""
    return {
        **{f"{own}/{ours}/kernel": (f"{layer}.{theirs}.weight", _DENSE) for ours, theirs in inner.items()},
        **{f"{own}/{ours}/scale": (f"{layer}.{theirs}.weight", _AS_IS) for ours, theirs in norms.items()},
    }


_QUERY_NORM, _KEY_NORM = "self_attention/query_norm", "self_attention/key_norm"
_TO_HUGGING_FACE = {
    **{f"self_attention/{long}": f"self_attn.{long[0]}_proj" for long in ("query", "key", "value", "out")},
    "mlp/wi_0": "mlp.gate_proj",
    "mlp/wi_1": "mlp.up_proj",
    "mlp/wo": "mlp.down_proj",
}
_TO_GGUF = {
    **{f"self_attention/{long}": f"attn_{long[0]}" for long in ("query", "key", "value")},
    "self_attention/out": "attn_output",
    "mlp/wi_0": "ffn_gate",
    "mlp/wi_1": "ffn_up",
    "mlp/wo": "ffn_down",
}
_QK_NORMS = {_QUERY_NORM: "self_attn.q_norm", _KEY_NORM: "self_attn.k_norm"}
_OUTSIDE: dict[str, tuple[str, bool]] = {
    "token_embedder/embedding": ("model.embed_tokens.weight", _AS_IS),
    "logits_dense/kernel": ("lm_head.weight", _DENSE),
    "decoder/decoder_norm/scale": ("model.norm.weight", _AS_IS),
}
_BEFORE, _BEFORE_MLP = "pre_self_attention_layer_norm", "pre_mlp_layer_norm"
_AFTER, _AFTER_MLP = "post_self_attention_layer_norm", "post_mlp_layer_norm"
# Llama and Qwen3 call the norm before the MLP what Gemma 3 calls the one after attention.
LLAMA: dict[str, tuple[str, bool]] = {
    **_OUTSIDE,
    **_layers(
        "model.layers.{layer}",
        inner=_TO_HUGGING_FACE,
        norms={**_QK_NORMS, _BEFORE: "input_layernorm", _BEFORE_MLP: "post_attention_layernorm"},
    ),
}
GEMMA3: dict[str, tuple[str, bool]] = {
    **_OUTSIDE,
    **_layers(
        "model.layers.{layer}",
        inner=_TO_HUGGING_FACE,
        norms={
            **_QK_NORMS,
            _BEFORE: "input_layernorm",
            _AFTER: "post_attention_layernorm",
            _BEFORE_MLP: "pre_feedforward_layernorm",
            _AFTER_MLP: "post_feedforward_layernorm",
        },
    ),
}
_T5GEMMA_NORMS = {
    **_QK_NORMS,
    _BEFORE: "pre_self_attn_layernorm",
    _AFTER: "post_self_attn_layernorm",
    _BEFORE_MLP: "pre_feedforward_layernorm",
    _AFTER_MLP: "post_feedforward_layernorm",
}
_CROSS_NORMS = {f"{side}_cross_attention_layer_norm": f"{side}_cross_attn_layernorm" for side in ("pre", "post")}
# T5Gemma 2 as on the Hub, and T5Gemma.
T5GEMMA: dict[str, tuple[str, bool]] = {
    "token_embedder/embedding": ("model.encoder.embed_tokens.weight", _AS_IS),
    "target_embedder/embedding": ("model.decoder.embed_tokens.weight", _AS_IS),
    "logits_dense/kernel": ("lm_head.out_proj.weight", _DENSE),
    "encoder/encoder_norm/scale": ("model.encoder.norm.weight", _AS_IS),
    "decoder/decoder_norm/scale": ("model.decoder.norm.weight", _AS_IS),
    **_layers("model.encoder.layers.{layer}", inner=_TO_HUGGING_FACE, norms=_T5GEMMA_NORMS, own=_ENCODER),
    **_layers(
        "model.decoder.layers.{layer}",
        inner={
            **_TO_HUGGING_FACE,
            **{
                f"encoder_decoder_attention/{long}": f"cross_attn.{long[0]}_proj"
                for long in ("query", "key", "value", "out")
            },
        },
        norms={**_T5GEMMA_NORMS, **_CROSS_NORMS},
    ),
}
GGUF: dict[str, tuple[str, bool]] = {
    "token_embedder/embedding": ("token_embd.weight", _AS_IS),
    "logits_dense/kernel": ("output.weight", _DENSE),
    "decoder/decoder_norm/scale": ("output_norm.weight", _AS_IS),
    **_layers(
        "blk.{layer}",
        inner=_TO_GGUF,
        norms={
            _QUERY_NORM: "attn_q_norm",
            _KEY_NORM: "attn_k_norm",
            _BEFORE: "attn_norm",
            _BEFORE_MLP: "ffn_norm",
            _AFTER: "post_attention_norm",
            _AFTER_MLP: "post_ffw_norm",
        },
    ),
}
Table = Mapping[str, tuple[str, bool]]


def table_of(config: families.ModelConfig) -> Table:
    """Returns the table of Hugging Face's names of an architecture."""
    if isinstance(config, t5.T5Config):
        return TABLE
    if isinstance(config, t5gemma.T5GemmaConfig):
        return T5GEMMA
    return GEMMA3 if config.post_norms else LLAMA


# T5X's logits are part of the decoder.
_ELSEWHERE = {"logits_dense/kernel": "decoder/logits_dense/kernel"}


@dataclasses.dataclass(frozen=True)
class Name:
    """One parameter under its three names.

    `scanned` is T5X's name where it scans over layers, `layer` the index on that array's layer axis (None outside
    layers). `transposed`: Hugging Face's array is ours transposed.
    """

    ours: str
    hugging_face: str
    transposed: bool
    t5x: str
    scanned: str
    layer: int | None


def of(parameters: Collection[str], table: Table = TABLE) -> list[Name]:
    """Looks up parameters by our names, in a T5 or by another family's table. ValueError for one without a row."""
    return [_name(ours, table) for ours in parameters]


def renamed(arrays: Mapping[str, LazyArray], table: Table) -> tuple[dict[str, LazyArray], list[str]]:
    """Renames arrays of a model that rotates to our names and layout; returns the names without a row too."""
    rows = {theirs: (ours, transposed) for ours, (theirs, transposed) in table.items()}
    found, unknown = {}, []
    for theirs, array in sorted(arrays.items()):
        layer = _NUMBER.search(theirs)
        row = rows.get(theirs if layer is None else f"{theirs[: layer.start(1)]}{_LAYER}{theirs[layer.end(1) :]}")
        if row is None:
            unknown.append(theirs)
            continue
        ours, transposed = row
        found[ours if layer is None else ours.replace(_LAYER, layer[1])] = array.transposed() if transposed else array
    return found, unknown


def layers_of(names: Iterable[str], *, stack: str = "decoder") -> int:
    """Counts the layers of a stack that have arrays."""
    return len({name.split("/")[2] for name in names if name.startswith(f"{stack}/layers/")})


def _name(ours: str, table: Table) -> Name:
    parts = ours.split("/")
    layer = int(parts[2]) if len(parts) > 3 and parts[1] == "layers" else None
    pattern = ours if layer is None else "/".join([parts[0], parts[1], _LAYER, *parts[3:]])
    if pattern not in table:
        raise ValueError(f"The table of names has no row for {pattern!r}.{nearest(pattern, table)}")
    theirs, transposed = table[pattern]
    if layer is None:
        name = _ELSEWHERE.get(ours, ours)
        return Name(ours, theirs, transposed, name, name, None)
    tail = "/".join(parts[3:])
    return Name(
        ours=ours,
        hugging_face=theirs.replace(_LAYER, str(layer)),
        transposed=transposed,
        t5x=f"{parts[0]}/layers_{layer}/{tail}",
        scanned=f"{parts[0]}/{parts[0]}/{tail}",
        layer=layer,
    )


def check(path: object, found: Shapes, wanted: Shapes, *, kind: str) -> None:
    """Requires equal names and shapes. ValueError lists missing, left-over and differently shaped arrays."""
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    reshaped = [
        f"{name}: checkpoint {tuple(found[name])}, model {tuple(wanted[name])}"
        for name in sorted(set(wanted) & set(found))
        if tuple(found[name]) != tuple(wanted[name])
    ]
    lines = []
    for title, names in (("shapes differ", reshaped), ("missing", missing), ("left over", extra)):
        if names:
            shown = "; ".join(map(part, names[:5]))
            lines.append(f"  {title} ({len(names)}): {shown}{' ..' if len(names) > 5 else ''}")
    lines += [f"  {name!r}:{near}" for name in missing[:3] if (near := nearest(name, [part(each) for each in extra]))]
    if lines:
        raise ValueError(
            f"{path} ({kind}) is a checkpoint of another architecture than the configured model.\n"
            + "\n".join(lines)
            + "\nInclude the gin file of the model that the checkpoint was trained with (gin_configs/models/)."
        )


# Far above any T5; a header can claim anything.
MOST_LAYERS = 1_000
MOST_NUMBERS = 2**40
STACKS = ("encoder", "decoder")


def check_sizes(
    path: object, found: Shapes, config: families.ModelConfig, *, layers: Mapping[str, int], kind: str
) -> None:
    """Requires plausible sizes that match the architecture, as far as one layer shows them.

    Call it before `parameters`, whose time and memory grow with sizes that a file from outside claims. `found` is by
    our names; `layers` counts the layers of each stack that have arrays.
    """
    for name, shape in found.items():
        if math.prod(shape) > MOST_NUMBERS:
            raise ValueError(
                f"{path} ({kind}): {part(name)} has the shape {shape}; expected at most {MOST_NUMBERS:,} numbers. The "
                "file is damaged: get it again."
            )
    for stack, count in config.stack_layers.items():
        if count > min(layers[stack], MOST_LAYERS):
            raise ValueError(
                f"{path} ({kind}) claims {count} layers in its {stack} and has arrays of {layers[stack]}; expected "
                f"arrays of each, and at most {MOST_LAYERS:,} layers. Get the whole checkpoint again."
            )
    joined, inner = config.num_heads * config.head_dim, "wi" if len(config.mlp_activations) == 1 else "wi_0"
    like = {
        **dict.fromkeys(TABLES, (config.vocab_size, config.emb_dim)),
        "encoder/layers/0/attention/query/kernel": (config.emb_dim, joined),
        "decoder/layers/0/self_attention/query/kernel": (config.emb_dim, joined),
        f"encoder/layers/0/mlp/{inner}/kernel": (config.emb_dim, config.mlp_dim),
        f"decoder/layers/0/mlp/{inner}/kernel": (config.emb_dim, config.mlp_dim),
    }
    if isinstance(config, t5.T5Config):
        biases = (config.num_heads, config.relative_attention_num_buckets)
        like |= dict.fromkeys(
            ("encoder/relpos_bias/rel_embedding", "encoder/layers/0/relpos_bias/rel_embedding"), biases
        )
    else:
        for stack in config.stack_layers:
            like[f"{stack}/layers/0/self_attention/query/kernel"] = (config.emb_dim, joined)
            like[f"{stack}/layers/0/self_attention/key/kernel"] = (
                config.emb_dim,
                config.num_kv_heads * config.head_dim,
            )
    like = {name: shape for name, shape in like.items() if name in found}
    check(path, {name: found[name] for name in like}, like, kind=kind)


@functools.lru_cache(maxsize=64)
def parameters(config: families.ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Computes the shapes of an architecture's parameters."""
    return types.MappingProxyType(families.abstract(config)[1])


def size(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Counts the numbers in arrays of these shapes."""
    return sum(math.prod(leaf.shape) for leaf in shapes.values())
