"""Decoder-only weights in and out: Hugging Face directories and GGUF files, names, settings, and what they refuse."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import students
import toy
from builders import bpe, gguf_files
from builders.decoder_files import CONFIGS, GEMMA3, LLAMA, QWEN3, TEXTS, gguf_of, opened, parameters, plain

from sbs_jax.data import selection, vocabularies, vocabulary_cut
from sbs_jax.export import convert
from sbs_jax.student import families
from sbs_jax.training import loop
from sbs_jax.weights import decoder_settings, hugging_face, opening
from sbs_jax.weights.arrays import shapes


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_directory_comes_back_bit_for_bit(kind: str, shard_bytes: int, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    hugging_face.write(tmp_path / "out", opened(config), dtype="float32", shard_bytes=shard_bytes)
    assert (tmp_path / "out" / hugging_face.INDEX).exists() == (shard_bytes < 10**9)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["model_type"] == kind == decoder_settings.kind_of(config)
    again = opening.open_any(tmp_path / "out")
    assert again.config == config
    for name, value in parameters(config).items():
        np.testing.assert_array_equal(again.arrays[name].whole(), value)


def rewritten(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("llama", {"model_type": "siglip_vision_model"}, "of type 'siglip_vision_model'.*decoder for text"),
        ("llama", {"model_type": "gemma3"}, "of type 'gemma3'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "holds a LlamaForSequenceClassification"),
        ("llama", {"vocab_size": 512}, r"token_embedder/embedding: checkpoint \(400, 32\), model \(512, 32\)"),
        ("llama", {"num_hidden_layers": 10**8}, "claims 100000000 layers"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "positions rotate as"),
        ("llama", {"rope_scaling": [1], "rope_parameters": None}, r"rope_scaling is \[1\]"),
        ("llama", {"num_key_value_heads": 3}, "num_heads 4 and num_kv_heads 3"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act is 'relu2'"),
        ("llama", {"hidden_size": "32"}, "'hidden_size' is '32'"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
        ("gemma3_text", {"layer_types": ["full_attention"] + ["sliding_attention"] * 2}, "layer_types is"),
        ("qwen3", {"model_type": "llama"}, "4 arrays|6 arrays|left over"),
    ],
)
def test_what_is_not_computed_is_named(kind: str, changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    hugging_face.write(tmp_path / "out", opened(CONFIGS[kind]), dtype="float32")
    with pytest.raises(ValueError, match=match):
        opening.open_any(rewritten(tmp_path / "out", **changes))


def test_the_tokenizer_says_what_ends_a_target(tmp_path: Path) -> None:
    library = bpe.byte_level(TEXTS * 9, size=400)
    path = bpe.write(tmp_path / "own", library)
    size = library.get_vocab_size()
    config = dataclasses.replace(LLAMA, vocab_size=size, decoder_start=library.token_to_id("Ċ"))
    hugging_face.write(tmp_path / "out", opened(config, vocabulary=path), dtype="float32")
    again = opening.open_any(rewritten(tmp_path / "out", eos_token_id=0, decoder_start_token_id=None))
    assert again.config == config  # <|im_end|>, as its vocabulary ends texts, not 0
    assert again.vocabulary == str(tmp_path / "out" / "tokenizer.json")
    assert Path(str(again.vocabulary)).read_bytes() == Path(path).read_bytes()
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (written["eos_token"], written["pad_token"]) == ("<|im_end|>", "<|endoftext|>")


def test_a_cut_renumbers_the_ends_of_a_model(tmp_path: Path) -> None:
    library = bpe.byte_level(TEXTS * 9, specials=["<|endoftext|>"])
    library.add_special_tokens(["<|im_end|>"])  # after the pieces, as in Qwen3
    path, size = bpe.write(tmp_path, library), library.get_vocab_size()
    feed = library.token_to_id("Ċ")
    config = dataclasses.replace(LLAMA, vocab_size=size, eos_id=size - 1, decoder_start=feed)
    hugging_face.write(tmp_path / "whole", opened(config, vocabulary=path), dtype="float32")
    made = vocabulary_cut.write(tmp_path / "cut", path, TEXTS[:1], reserve=0)
    options = convert.Options(to_form=opening.HUGGING_FACE, cut=str(tmp_path / "cut"))
    convert.convert(str(tmp_path / "whole"), str(tmp_path / "small"), options)
    small = opening.open_any(tmp_path / "small")
    parsed = vocabularies.parse_bpe((tmp_path / "cut" / "tokenizer.json").read_bytes())
    ends = vocabularies.marks(vocabularies.pieces(parsed), eos_id=None, bos_id=None)
    assert ends == {"eos_id": made.kept.index(size - 1), "decoder_start": made.kept.index(feed)}
    assert small.config == dataclasses.replace(config, vocab_size=made.vocab_size, **ends)
    before, after = (each.arrays["token_embedder/embedding"].whole() for each in (opened(config), small))
    np.testing.assert_array_equal(after[: len(made.kept)], before[list(made.kept)])


# ------------------------------------------------------------------------------------ GGUF


def test_a_file_becomes_the_weights_that_it_was_made_of(tmp_path: Path) -> None:
    for architecture, config in (("llama", plain(LLAMA)), ("qwen3", plain(QWEN3))):
        file = gguf_of(tmp_path / f"{architecture}.gguf", config, architecture=architecture)
        found = opening.open_any(file)
        assert found.config == config
        for name, value in parameters(config).items():
            np.testing.assert_array_equal(found.arrays[name].whole(), value)
            some = tuple(slice(1, 5) for _ in value.shape)
            np.testing.assert_array_equal(found.arrays[name].read(some), value[some])
        summary = convert.convert(str(file), str(tmp_path / architecture), convert.Options(to_form="hf"))
        assert (summary["from"], summary["to"]) == ("gguf", "hf")
        assert shapes(opening.open_any(tmp_path / architecture).arrays) == shapes(found.arrays)


def test_a_gemma_s_norms_and_windows(tmp_path: Path) -> None:
    config = plain(dataclasses.replace(GEMMA3, global_every=6, rope_factor=1.0, query_scale=None))
    window: dict[str, Any] = {"attention.sliding_window": 3}
    file = gguf_of(tmp_path / "x.gguf", config, architecture="gemma3", **window)
    found = opening.open_any(file)
    assert found.config == config
    for name, value in parameters(config).items():
        np.testing.assert_allclose(found.arrays[name].whole(), value, atol=1e-6)


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.01), ("Q4_1", 0.1), ("Q5_0", 0.06), ("F16", 1e-3)])
def test_quantized_tensors_become_float32(kind: str, error: float, tmp_path: Path) -> None:
    config = plain(dataclasses.replace(LLAMA, emb_dim=64, mlp_dim=64))
    found = opening.open_any(gguf_of(tmp_path / "x.gguf", config, architecture="llama", quantized=kind))
    for name, value in parameters(config).items():
        array = found.arrays[name]
        assert array.dtype == np.float32
        assert np.abs(array.whole() - value).max() <= error * np.abs(value).max() + 1e-6


def test_what_a_file_cannot_be_is_named(tmp_path: Path) -> None:
    config = plain(LLAMA)
    good = gguf_of(tmp_path / "good.gguf", config, architecture="llama")
    cases: dict[str, tuple[Path, str]] = {}
    other = gguf_files.write(tmp_path / "other.gguf", {"x": np.ones(4, np.float32)}, architecture="mamba")
    cases["architecture"] = (other, "of the architecture 'mamba'; expected one of llama")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(good.read_bytes()[:-5_000])
    cases["cut"] = (cut, "The file is incomplete")
    unknown = tmp_path / "unknown.gguf"
    data, key = good.read_bytes(), b"blk.0.attn_q.weight"
    at = data.index(key) + len(key) + 4 + 16
    unknown.write_bytes(data[:at] + (250).to_bytes(4, "little") + data[at + 4 :])
    cases["type"] = (unknown, "of the unknown type 250")
    rope: dict[str, Any] = {"rope.scaling.type": "yarn"}
    cases["rope"] = (gguf_of(tmp_path / "rope.gguf", config, architecture="llama", **rope), "scaled by 'yarn'")
    for path, match in cases.values():
        with pytest.raises(ValueError, match=match):
            opening.open_any(path)
    shutil.copy(good, tmp_path / "named.bin")
    assert opening.form_of(tmp_path / "named.bin").name == opening.GGUF  # by its contents


# ------------------------------------------------------------------------------------ transformers


_NOT_INSTALLED = "PyTorch or transformers is not installed; `make test-parity` installs them"


@pytest.fixture
def torch() -> Any:
    """PyTorch, with transformers beside it."""
    pytest.importorskip("transformers", reason=_NOT_INSTALLED)
    return pytest.importorskip("torch", reason=_NOT_INSTALLED)


@pytest.mark.parity
@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_computes_the_same_and_writes_what_is_read(torch: Any, kind: str, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason=_NOT_INSTALLED)
    config = CONFIGS[kind]
    hugging_face.write(tmp_path / "ours", opened(config), dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    source, target = np.array([[5, 6, 7, 300, config.eos_id]]), np.array([[0, 9, 8, 7]])
    row = np.concatenate([source, np.array([[config.decoder_start, *target[0, 1:]]])], axis=1)
    with torch.no_grad():
        expected = theirs(torch.tensor(row)).logits[:, source.shape[1] :].numpy()
    model = families.join(
        families.abstract(config)[0], {n: jax.numpy.asarray(x) for n, x in parameters(config).items()}
    )
    found = jax.jit(model.__call__)(source, target)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = opening.open_any(tmp_path / "theirs")
    ends = {"eos_id": config.eos_id, "decoder_start": again.config.decoder_start}  # transformers keeps no such id
    assert again.config == dataclasses.replace(config, **ends)
    for name, value in parameters(config).items():
        np.testing.assert_array_equal(again.arrays[name].whole(), value)


# ------------------------------------------------------------------------------------ the whole path


@pytest.fixture(scope="module")
def path_of_a_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that began with a GGUF file's weights and reads its tokenizer, and its export to Hugging Face's form."""
    folder = tmp_path_factory.mktemp("path")
    model = plain(LLAMA)
    file = str(gguf_of(folder / "x.gguf", model, architecture="llama"))
    records = toy.write_records(folder / "records")
    data = selection.DataOptions(records_dir=str(records), vocabulary=file)
    changes: dict[str, Any] = {"model": model, "data": data, "initial_checkpoint_path": file, "pack": True}
    loop.train(toy.config(folder / "run", records, **changes), config_text="")
    convert.convert(str(folder / "run"), str(folder / "hf"), convert.Options(to_form=opening.HUGGING_FACE))
    return folder / "run", folder / "hf"


def test_a_run_from_a_file_goes_out_and_comes_back(path_of_a_file: tuple[Path, Path], tmp_path: Path) -> None:
    run, exported = path_of_a_file
    before = parameters(plain(LLAMA))
    trained = opening.open_any(run)
    changes = [np.abs(trained.arrays[name].whole() - value).max() for name, value in before.items()]
    assert all(0 < change < 0.1 for change in changes)  # six small steps from the file's numbers
    convert.convert(str(exported), str(tmp_path / "again"), convert.Options(to_form=opening.SBS))
    answers, again = (students.answers(each) for each in (run, tmp_path / "again"))
    assert [answer.prediction for answer in again] == [answer.prediction for answer in answers]
    assert len({answer.prediction for answer in answers}) > 1


@pytest.mark.parity
@pytest.mark.usefixtures("torch")
def test_transformers_answers_as_the_readme_says(path_of_a_file: tuple[Path, Path]) -> None:
    run, exported = path_of_a_file
    text = (exported / "README.md").read_text("utf-8")
    code = text[text.index("```python\n") + len("```python\n") :]
    made: dict[str, Any] = {}
    exec(code[: code.index("```")].replace("DIRECTORY", str(exported)), made)
    found = [made["answer"](each) for each in students.TEXTS]
    assert found == [answer.prediction for answer in students.answers(run)]
