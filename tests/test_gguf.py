"""GGUF files: headers, which may claim anything, and the tokenizer in the metadata."""

import struct
from pathlib import Path

import numpy as np
import pytest
from builders import bpe, gguf_files

from sbs_jax.data import registry, tokens, vocabularies
from sbs_jax.storage import gguf

TEXTS = ["A tiny red iron lamp, 12 cm, it's 3.", "Iron sinks. So the answer is no.", "naïve 中文 🙂\t\n  x"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    tokenizer = bpe.byte_level(TEXTS * 9)
    return gguf_files.write(tmp_path / "x.gguf", tensors, values={"size": 3, "rate": 0.5}, tokenizer=tokenizer)


def test_a_header_says_where_tensors_lie(file: Path) -> None:
    header = gguf.read(file)
    assert gguf.is_file(file)
    assert header.metadata["general.architecture"] == "llama"
    assert (header.metadata["llama.size"], header.metadata["llama.rate"]) == (3, 0.5)
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {"a": (2, 3), "b": (4,)}
    data = file.read_bytes()
    start = header.tensors["a"].start
    assert np.frombuffer(data[start : start + 24], np.float32).tolist() == list(range(6))


def test_a_file_s_tokenizer_is_a_vocabulary(file: Path) -> None:
    library = bpe.byte_level(TEXTS * 9)
    vocabulary = registry.vocabulary(str(file))
    assert isinstance(vocabulary, vocabularies.Bpe)
    end = library.token_to_id("<|im_end|>")
    assert tokens.encode(TEXTS, vocabulary) == [[*library.encode(text).ids, end] for text in TEXTS]
    assert [vocabulary.decode(vocabulary.encode(text)) for text in TEXTS] == TEXTS
    exported = file.with_name("tokenizer.json")
    exported.write_bytes(tokens.read_vocabulary(str(file)))
    assert tokens.vocabulary_sha256(str(file)) == tokens.vocabulary_sha256(str(exported))


def test_a_tokenizer_of_another_kind_is_named(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "x.gguf", {}, tokenizer=bpe.byte_level(TEXTS), pre="other")
    with pytest.raises(ValueError, match=r"x\.gguf .*'gpt2' with texts split as 'other'; expected"):
        tokens.check_vocabulary(str(file))


_HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"GGUF", "has 4 bytes"),
        (b"GGML" + bytes(60), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(9), "of version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(9), f"claims {2**60} tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(9), f"claims {2**60} values"),
        (_HEAD + struct.pack("<Q", 2**62) + bytes(9), f"claims {2**62} values"),
        (_HEAD + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 2**40), f"claims {2**40} values"),
        (_HEAD + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1), "array of type 9"),
        (_HEAD + struct.pack("<Q1sI", 1, b"k", 13) + bytes(9), "value of type 13"),
        (_HEAD + struct.pack("<Q1sIQ", 1, b"\xff", 4, 1), "utf-8"),
    ],
)
def test_a_header_s_claims_are_not_followed(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.gguf .*{match}"):
        gguf.read(path)


def test_a_header_cut_anywhere_is_named(file: Path, tmp_path: Path) -> None:
    data, path = file.read_bytes(), tmp_path / "cut.gguf"
    for length in range(24, gguf.read(file).tensors["a"].start - 40, 97):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is not a GGUF file that can be read"):
            gguf.read(path)
