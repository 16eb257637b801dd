"""T5Gemma's own Flax checkpoints, written here with Orbax as the package `gemma` names and shapes their arrays."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from builders import decoders
from builders.decoder_files import parameters

from sbs_jax.export import convert
from sbs_jax.student import families
from sbs_jax.weights import opening

# Of every published size, and in no shape.
PUBLISHED = {
    "rope_base": 1e4,
    "window": 4096,
    "attention_cap": 50.0,
    "logits_cap": 30.0,
    "query_scale": None,
    "decoder_start": 2,
}


def config_of(**changes: Any) -> Any:
    return decoders.config("t5gemma", **PUBLISHED, **{"num_decoder_layers": 2, **changes})


def theirs(config: Any, *, more: int = 0, transposed: bool = False) -> dict[str, Any]:
    """Arranges our parameters as theirs, with `more` rows of tables; the MLP's as 9B has them, if `transposed`."""
    ours, c = parameters(config), config

    def heads(name: str) -> np.ndarray:
        return ours[f"{name}/kernel"].reshape(c.emb_dim, -1, c.head_dim).transpose(1, 0, 2)

    def attention(name: str, *, apart: bool) -> dict[str, Any]:
        q, k, v = (heads(f"{name}/{kind}") for kind in ("query", "key", "value"))
        out = ours[f"{name}/out/kernel"].reshape(c.num_heads, c.head_dim, c.emb_dim)
        made = {"q_einsum": q, "kv_einsum": np.stack([k, v])} if apart else {"qkv_einsum": np.stack([q, k, v])}
        return {kind: {"w": array} for kind, array in {**made, "attn_vec_einsum": out}.items()}

    def norms(layer: str, rows: dict[str, str]) -> dict[str, Any]:
        return {
            f"{side}_{their}_norm": {"scale": ours[f"{layer}/{side}_{our}_layer_norm/scale"]}
            for their, our in rows.items()
            for side in ("pre", "post")
        }

    tree: dict[str, Any] = {}
    for stack, table in (("encoder", "token_embedder"), ("decoder", "target_embedder")):
        embedding = np.pad(ours[f"{table}/embedding"], ((0, more), (0, 0)), constant_values=7.0)
        tree[stack] = {
            "embedder": {"input_embedding": embedding},
            "final_norm": {"scale": ours[f"{stack}/{stack}_norm/scale"]},
        }
        for number in range(c.stack_layers[stack]):
            layer = f"{stack}/layers/{number}"
            gates = np.stack([ours[f"{layer}/mlp/wi_{i}/kernel"] for i in range(2)])
            tree[stack][f"layer_{number}"] = {
                "attn": attention(f"{layer}/self_attention", apart=c.num_heads != c.num_kv_heads),
                "mlp": {
                    "gating_einsum": gates.swapaxes(1, 2) if transposed else gates,
                    "linear": ours[f"{layer}/mlp/wo/kernel"],
                },
                **norms(layer, {"attention": "self_attention", "ffw": "mlp"}),
            }
            if stack == "decoder":
                tree[stack][f"layer_{number}"] |= {
                    "cross_attn": attention(f"{layer}/encoder_decoder_attention", apart=True),
                    **norms(layer, {"cross_attention": "cross_attention"}),
                }
    return tree


def written(folder: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, jax.tree.map(jnp.asarray, tree))
    return folder


def found(folder: Path, config: Any) -> Any:
    """Expects the architecture and parameters in a checkpoint, whole and in parts."""
    assert opening.form_of(folder).name == opening.FLAX
    again = opening.open_any(folder)
    assert again.config == config
    for name, value in parameters(config).items():
        np.testing.assert_array_equal(again.arrays[name].whole(), value)
        some = tuple(slice(1, size - 1) for size in value.shape)
        np.testing.assert_array_equal(again.arrays[name].read(some), value[some])
    return again


@pytest.mark.parametrize(("kv_heads", "transposed"), [(2, True), (4, False), (1, False)])
def test_a_checkpoint_becomes_the_weights_that_it_was_made_of(kv_heads: int, transposed: bool, tmp_path: Path) -> None:
    config = config_of(num_kv_heads=kv_heads)
    found(written(tmp_path / "theirs", theirs(config, transposed=transposed)), config)


def test_its_student_gives_the_same_logits(tmp_path: Path) -> None:
    config = config_of()
    written(tmp_path / "theirs", theirs(config))
    convert.convert(str(tmp_path / "theirs"), str(tmp_path / "run"), convert.Options(to_form=opening.SBS))
    structure, shapes, _ = families.abstract(config)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for name, leaf in shapes.items()}
    tokens = jnp.array([[5, 6, 7, 1, 0]]), jnp.array([[0, 9, 8]])
    logits = jax.jit(lambda parameters: families.join(structure, parameters)(*tokens))
    expected = logits({name: jnp.asarray(value) for name, value in parameters(config).items()})
    for folder in ("theirs", "run"):
        loaded = opening.load_parameters(tmp_path / folder, like=like, config=config)
        np.testing.assert_array_equal(logits(loaded), expected)


def test_tables_are_cut_to_the_rows_that_texts_have(tmp_path: Path) -> None:
    sizes = {"emb_dim": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "num_encoder_layers": 1}
    config = config_of(vocab_size=256_000, **sizes, num_decoder_layers=1)
    found(written(tmp_path / "theirs", theirs(config, more=128)), config)


def test_names_of_older_files(tmp_path: Path) -> None:
    config = config_of()
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs(config)):
        *keys, last = (key.key for key in path)
        keys, last = ([*keys, last], "w") if "mlp" in keys else (keys, last)
        flat.setdefault("/".join(["transformer", *keys]), {})[last] = leaf
    found(written(tmp_path / "theirs", flat), config)


def _less(tree: Any) -> Any:
    del tree["encoder"]["layer_0"]["mlp"]["linear"]
    return tree


def _more(tree: Any) -> Any:
    tree["decoder"]["layer_1"]["attn"]["lora"] = np.ones(3)
    return tree


def _wider(tree: Any) -> Any:
    table = tree["encoder"]["embedder"]
    table["input_embedding"] = np.pad(table["input_embedding"], ((0, 0), (0, 8)))
    return tree


def _gap(tree: Any) -> Any:
    tree["encoder"]["layer_9"] = tree["encoder"].pop("layer_1")
    return tree


def _flat(tree: Any) -> Any:
    tree["decoder"]["layer_0"]["cross_attn"]["kv_einsum"]["w"] = np.ones((4, 4))
    return tree


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_less, r"missing \(1\): encoder/layers/0/mlp/wo/kernel"),
        (_more, r"left over \(1\): decoder/layer_1/attn/lora"),
        (_wider, "the encoder's table is .40, 32. and the decoder's .40, 24.*2b-2b"),
        (_gap, "claims 10 layers in its encoder and has arrays of 2"),
        (_flat, r"cross_attn/kv_einsum has 4 dimensions there; got \(4, 4\)"),
    ],
)
def test_what_is_no_t5gemma_is_named(change: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        opening.open_any(written(tmp_path / "theirs", change(theirs(config_of()))))


def test_settings_that_differ_from_the_published_ones_are_refused(tmp_path: Path) -> None:
    config = config_of()
    folder = written(tmp_path / "theirs", theirs(config))
    shapes = {name: value.shape for name, value in parameters(config).items()}
    other = dataclasses.replace(config, attention_cap=None)
    with pytest.raises(ValueError, match="attention_cap None, not 50"):
        opening.arrays_of(folder, wanted=shapes, config=other)
