"""Vocabularies, the joint of premise and hypothesis, and tables of tokens."""

import re
from pathlib import Path

import buckets
import fuzzing
import numpy as np
import pytest
import seqio

from sbs_jax.data import registry, tokens
from sbs_jax.storage import places
from tasks import builtin

BYTES = tokens.vocabulary("byte")


def test_byte_vocabulary():
    assert BYTES.vocab_size == 359
    assert (BYTES.pad_id, BYTES.eos_id) == (0, 1)
    assert tokens.encode(["ab", "", "é"], BYTES) == [[100, 101, 1], [1], [198, 172, 1]]


def test_the_joint_becomes_eos():
    assert tokens.encode(["a</s>b"], BYTES) == [[100, 1, 101, 1]]
    assert tokens.encode(["a</s>b</s>"], BYTES) == [[100, 1, 101, 1, 1]]


def test_real_vocabulary(real_vocab: Path):
    vocabulary = tokens.vocabulary(str(real_vocab))
    tokens.check_vocabulary(str(real_vocab))
    assert vocabulary.vocab_size == 32_100
    assert vocabulary.encode("<extra_id_0>") == [32_099]
    assert vocabulary.encode("<extra_id_99>") == [32_000]


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", b"\x0a\x05", bytes(range(256)) * 9, None])
def test_what_is_no_sentencepiece_model_is_named(tmp_path: Path, data: bytes | None):
    path = tmp_path / "sentencepiece.model"
    whole = Path(builtin.vocabulary_path()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if data is None else data)
    for read in (registry.vocabulary, tokens.vocabulary_sha256, tokens.check_vocabulary):
        with pytest.raises(ValueError, match=re.escape(f"{path} is not a SentencePiece model (")):
            read(str(path))


@pytest.mark.parametrize("other", fuzzing.OTHERS)
def test_what_is_no_file_is_no_vocabulary(tmp_path: Path, other: str):
    path = tmp_path / "sentencepiece.model"
    fuzzing.stand(path, other)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} (is a|has \d+ bytes)"):
        tokens.check_vocabulary(str(path))


def test_the_joint_with_the_real_vocabulary(real_vocab: Path):
    """Ids of the Hugging Face tokenizer, which splits the text at "</s>" before SentencePiece."""
    vocabulary = tokens.vocabulary(str(real_vocab))
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
    alone = [[*vocabulary.encode(text), 1] for text in ("predict: A dog", "It barks")]
    assert alone == [[9689, 10, 71, 1782, 1], [94, 21696, 7, 1]]
    for joint in ("</s>", " </s> ", "</s>\n"):
        text = f"predict: A dog{joint}It barks"
        assert tokens.encode([text], vocabulary) == [[*alone[0], *alone[1]]]
    # Without the split, "</s>" is spelt out, with an unknown piece in it.
    assert vocabulary.encode("A dog</s>It barks") == [71, 1782, 2, 87, 7, 3155, 196, 17, 21696, 7]


def test_missing_vocabulary(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no SentencePiece model at .*gone\.model"):
        tokens.check_vocabulary(str(tmp_path / "gone.model"))


def test_vocabulary_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(places, "_PATIENCE", 0.1)
    with (
        buckets.connected("http://127.0.0.1:1", monkeypatch),
        pytest.raises(FileNotFoundError, match=r"Cannot reach 'gs://none/x.model' \(.*Connection refused.*VOCABULARY"),
    ):
        tokens.check_vocabulary("gs://none/x.model")


def test_cut_keeps_eos_last():
    ids = np.array([5, 6, 7, 1], np.int32)
    assert tokens.cut(ids, 5).tolist() == [5, 6, 7, 1]
    assert tokens.cut(ids, 4).tolist() == [5, 6, 7, 1]
    assert tokens.cut(ids, 3).tolist() == [5, 6, 1]
    assert tokens.cut(ids, 2).tolist() == [5, 1]
    assert tokens.cut(ids, 3).dtype == np.int32


def test_table_holds_every_row_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokens, "_CHUNK", 3)
    texts = ["yes", "no", "yes", "", "a</s>b", "no", "maybe"]
    table = tokens.TokenTable.of(texts, BYTES)
    assert len(table) == 7
    assert table.ids.dtype == np.int32
    assert table.sizes.tolist() == [4, 3, 4, 1, 4, 3, 6]
    for index, ids in enumerate(tokens.encode(texts, BYTES)):
        assert table.row(index, length=10).tolist() == ids
    assert table.row(6, length=3).tolist() == [112, 100, 1]
    assert len(tokens.TokenTable.of([], BYTES)) == 0
