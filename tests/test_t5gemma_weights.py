"""T5Gemma 2 and T5Gemma as Hugging Face directories: both ways, names of two versions, tables, and what is refused."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import bpe, decoders
from builders.decoder_files import TEXTS, opened, parameters
from safetensors import numpy as safetensors

from sbs_jax.data import vocabulary_cut
from sbs_jax.export import convert, weights
from sbs_jax.prediction import precision
from sbs_jax.student import families
from sbs_jax.weights import hugging_face, opening, t5gemma_settings

TABLE = "model.encoder.embed_tokens.weight"


@pytest.mark.parametrize("kind", decoders.ENCODER_DECODERS)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_directory_comes_back_bit_for_bit(kind: str, shard_bytes: int, tmp_path: Path) -> None:
    config = decoders.config(kind, decoder_start=5, eos_id=3, num_encoder_layers=1)
    hugging_face.write(tmp_path / "out", opened(config), dtype="float32", shard_bytes=shard_bytes)
    assert (tmp_path / "out" / hugging_face.INDEX).exists() == (shard_bytes < 10**9)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["model_type"] == kind == t5gemma_settings.kind_of(config)
    found(tmp_path / "out", config)


def found(folder: Path, config: Any, *, seed: int = 0) -> None:
    """Expects the architecture and the parameters in a directory."""
    again = opening.open_any(folder)
    assert again.config == config
    for name, value in parameters(config, seed=seed).items():
        np.testing.assert_array_equal(again.arrays[name].whole(), value)


def written(folder: Path, kind: str, **changes: Any) -> Path:
    hugging_face.write(folder / "out", opened(decoders.config(kind, **changes)), dtype="float32")
    return folder / "out"


def rewritten(folder: Path, changes: dict[str, Any]) -> Path:
    """Changes settings; a name with dots is one inside."""
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    for name, value in changes.items():
        *path, last = name.split(".")
        place = settings
        for part in path:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    file.write_text(json.dumps(settings))
    return folder


def rearranged(folder: Path, change: Any) -> Path:
    """Passes the arrays through a function."""
    arrays = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file({n: np.ascontiguousarray(x) for n, x in change(arrays).items()}, folder / "model.safetensors")
    return folder


# ------------------------------------------------------------------------------------ names


def test_both_versions_of_names_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path, "t5gemma2")
    old = set(safetensors.load_file(folder / "model.safetensors"))
    assert "model.encoder.layers.0.self_attn.q_proj.weight" in old

    def renamed(arrays: dict[str, Any]) -> dict[str, Any]:
        kept = ("vision_tower", "multi_modal_projector")
        new = {
            n if any(k in n for k in kept) else n.replace("model.encoder.", "model.encoder.text_model."): x
            for n, x in arrays.items()
        }
        tower = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
        return {**new, f"model.encoder.{tower}": np.ones((2, 2), np.float32)}

    with caplog.at_level(logging.INFO):
        found(rearranged(folder, renamed), decoders.config("t5gemma2"))
    (line,) = [record.getMessage() for record in caplog.records if "only text is read" in record.getMessage()]
    assert line.endswith("vision_tower (6 arrays), multi_modal_projector (2 arrays), eoi_embedding (1 arrays).")


def test_a_vector_for_the_end_of_an_image_is_not_needed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = written(tmp_path, "t5gemma2")
    rearranged(folder, lambda arrays: {n: x for n, x in arrays.items() if "eoi" not in n and "vision" not in n})
    with caplog.at_level(logging.INFO):
        found(folder, decoders.config("t5gemma2"))
    assert sum("no eoi_embedding" in record.getMessage() for record in caplog.records) == 1


def test_an_export_of_t5gemma_has_nothing_of_images(tmp_path: Path) -> None:
    arrays = safetensors.load_file(written(tmp_path, "t5gemma") / "model.safetensors")
    assert not any("vision" in name or "eoi" in name for name in arrays)


# ------------------------------------------------------------------------------------ settings


def test_settings_that_transformers_leaves_out_have_its_defaults(tmp_path: Path) -> None:
    """It saves only what differs from the class, and older files have other names."""
    changes = {"window": 4096, "query_scale": 1 / 16, "attention_cap": 50.0, "logits_cap": 30.0, "rope_base": 1e4}
    names = ["sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"]
    names += ["rope_parameters", "layer_types", "hidden_activation", "rms_norm_eps"]
    folder = written(tmp_path / "1", "t5gemma", **changes)
    less = {f"{stack}.{name}": ... for stack in ("encoder", "decoder") for name in names}
    found(rewritten(folder, less), decoders.config("t5gemma", **changes))
    changes = {"window": 4096, "query_scale": 1 / 16, "rope_base": 1e6, "local_rope_base": 5e4}
    folder = written(tmp_path / "2", "t5gemma2", **changes)
    stacks = ("encoder.text_config", "decoder")
    less = {f"{stack}.{name}": ... for stack in stacks for name in set(names) - {"attn_logit_softcapping"}}
    old = {"rope_scaling": {"factor": 2.0, "type": "linear"}, "rope_local_base_freq": 5e4, "sliding_window_pattern": 2}
    more = {f"{stack}.{name}": value for stack in stacks for name, value in old.items()}
    found(rewritten(folder, {**less, **more}), decoders.config("t5gemma2", **changes))


def test_what_ends_and_begins_a_target(tmp_path: Path) -> None:
    """A published model: BOS begins, the first of several ends."""
    folder = written(tmp_path, "t5gemma")
    changes = {"decoder_start_token_id": ..., "eos_token_id": [7, 1], "bos_token_id": 9}
    again = opening.open_any(rewritten(folder, changes))
    assert again.config == decoders.config("t5gemma", eos_id=7, decoder_start=9)
    path = bpe.write(tmp_path, bpe.with_byte_pieces(TEXTS, size=300))  # whose <bos> is 2
    hugging_face.write(tmp_path / "named", opened(decoders.config("t5gemma"), vocabulary=path), dtype="float32")
    again = opening.open_any(rewritten(tmp_path / "named", {**changes, "eos_token_id": [1, 7]}))
    assert again.config == decoders.config("t5gemma", decoder_start=9)
    less = {f"{place}{name}_token_id": ... for place in ("", "decoder.") for name in ("eos", "bos")}
    assert opening.open_any(rewritten(folder, less)).config == decoders.config("t5gemma", decoder_start=2)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("t5gemma2", {"decoder": ...}, "decoder is None; expected the settings of its layers"),
        ("t5gemma2", {"encoder.text_config": ...}, "encoder.text_config is None"),
        ("t5gemma2", {"encoder": 3}, "encoder is 3"),
        ("t5gemma2", {"model_type": "siglip_vision_model"}, "of type 'siglip_vision_model'"),
        ("t5gemma2", {"model_type": "t5gemma2_text"}, "of type 't5gemma2_text'"),
        ("t5gemma2", {"architectures": ["T5Gemma2ForSequenceClassification"]}, "holds a T5Gemma2ForSequence"),
        ("t5gemma", {"architectures": ["T5GemmaEncoderModel"]}, "holds a T5GemmaEncoderModel"),
        ("t5gemma", {"encoder.hidden_size": 48}, "emb_dim is 48 in the encoder and 24 in the decoder.*2b-2b"),
        ("t5gemma", {"encoder.num_attention_heads": 8}, "num_heads is 8 in the encoder and 4"),
        ("t5gemma", {"encoder.vocab_size": 80}, "vocab_size is 80 in the encoder and 40"),
        ("t5gemma2", {"decoder.attn_logit_softcapping": 50.0}, "decoder: attn_logit_softcapping is 50"),
        ("t5gemma2", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("t5gemma2", {"decoder.attention_bias": True}, "decoder: attention_bias is True"),
        ("t5gemma2", {"decoder.layer_types": ["full_attention"] * 3}, "layer_types is.*sliding_attention"),
        ("t5gemma", {"encoder.rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "scale sliding layers by 2"),
        (
            "t5gemma2",
            {"decoder.num_hidden_layers": 10**8, "decoder.layer_types": ...},
            "layer_types is|claims 100000000",
        ),
        ("t5gemma", {"decoder.hidden_activation": "relu2"}, "hidden_activation is 'relu2'"),
        ("t5gemma", {"model_type": "t5gemma2"}, "differs from"),
    ],
)
def test_what_is_not_computed_is_named(kind: str, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        opening.open_any(rewritten(written(tmp_path, kind), changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"shared_table": True},
        {"post_norms": False},
        {"encoder_window": "around"},
        {"rope_factor": 2.0},
        {"qk_norm": True},
    ],
)
def test_an_architecture_that_transformers_lacks_is_not_written(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="transformers has no"):
        written(tmp_path, "t5gemma", **changes)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ tables


def test_copies_of_a_table_are_equal_or_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "2", "t5gemma2")
    copies = ("model.decoder.embed_tokens.weight", "lm_head.out_proj.weight")
    rearranged(folder, lambda arrays: {**arrays, **dict.fromkeys(copies, arrays[TABLE])})
    found(folder, decoders.config("t5gemma2"))
    rearranged(folder, lambda arrays: {n: x for n, x in arrays.items() if n not in (TABLE, copies[1])})
    found(folder, decoders.config("t5gemma2"))
    rearranged(folder, lambda arrays: {**arrays, TABLE: arrays[copies[0]] + 1})
    with pytest.raises(ValueError, match=f"'{copies[0]}' differs from '{TABLE}'"):
        opening.open_any(folder)
    folder = written(tmp_path / "1", "t5gemma")
    found(rearranged(folder, lambda arrays: {**arrays, copies[1]: arrays[copies[0]]}), decoders.config("t5gemma"))
    rearranged(folder, lambda arrays: {**arrays, copies[1]: arrays[TABLE]})
    with pytest.raises(ValueError, match=f"'{copies[1]}' differs from '{copies[0]}'"):
        opening.open_any(folder)


@pytest.mark.parametrize("kind", decoders.ENCODER_DECODERS)
def test_tables_that_are_not_tied(kind: str, tmp_path: Path) -> None:
    changes = {"logits_via_embedding": False, "shared_table": False}
    found(written(tmp_path, kind, **changes), decoders.config(kind, **changes))


def test_a_table_that_is_missing_or_too_long_is_named(tmp_path: Path) -> None:
    table = "model.decoder.embed_tokens.weight"
    folder = written(tmp_path, "t5gemma")
    rearranged(folder, lambda arrays: {**arrays, table: np.pad(arrays[table], ((0, 8), (0, 0)))})
    with pytest.raises(ValueError, match=r"target_embedder/embedding: checkpoint \(48, 24\), model \(40, 24\)"):
        opening.open_any(folder)
    rearranged(folder, lambda arrays: {n: x for n, x in arrays.items() if n != table})
    with pytest.raises(ValueError, match=f"no '{table}', the token table"):
        opening.open_any(folder)


def test_a_cut_renumbers_both_tables(tmp_path: Path) -> None:
    library = bpe.with_byte_pieces(TEXTS * 9, size=300)
    path, size = bpe.write(tmp_path, library), library.get_vocab_size()
    config = decoders.config("t5gemma", vocab_size=size, decoder_start=2)
    hugging_face.write(tmp_path / "whole", opened(config, vocabulary=path), dtype="float32")
    assert opening.open_any(tmp_path / "whole").vocabulary == str(tmp_path / "whole" / "tokenizer.json")
    settings = json.loads((tmp_path / "whole" / "tokenizer_config.json").read_text())
    kinds = ("eos", "bos", "pad", "unk")
    assert [settings[f"{name}_token"] for name in kinds] == [f"<{name}>" for name in kinds]
    assert settings["padding_side"] == "right"
    made = vocabulary_cut.write(tmp_path / "cut", path, TEXTS[:1], reserve=0)
    options = convert.Options(to_form=opening.HUGGING_FACE, cut=str(tmp_path / "cut"))
    convert.convert(str(tmp_path / "whole"), str(tmp_path / "small"), options)
    small = opening.open_any(tmp_path / "small")
    ends = {"eos_id": made.kept.index(1), "decoder_start": made.kept.index(2)}
    assert small.config == dataclasses.replace(config, vocab_size=made.vocab_size, **ends)
    for name in ("token_embedder/embedding", "target_embedder/embedding"):
        before, after = (each.arrays[name].whole() for each in (opened(config), small))
        np.testing.assert_array_equal(after[: len(made.kept)], before[list(made.kept)])


def test_both_tables_are_stored_by_row_in_int8() -> None:
    stored = weights.stored(opened(decoders.config("t5gemma")).arrays, form=weights.INT8)
    for name in ("token_embedder/embedding", "target_embedder/embedding"):
        assert stored[f"{name}/codes"].shape == (40, 24)
        assert stored[f"{name}/scale"].shape == (40,)


def test_logits_are_rounded_by_the_decoder_s_table() -> None:
    config = decoders.config("t5gemma")
    structure = families.abstract(config)[0]
    model = families.join(*precision.held(structure, decoders.parameters(config), weights="bfloat16"))
    assert model.target_embedder is not None
    assert (model.target_embedder.product_dtype, model.token_embedder.product_dtype) == ("bfloat16", None)
