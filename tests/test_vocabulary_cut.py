"""Cut vocabularies: the same segmentation, renumbered; tables with the right rows; a student that answers as before."""

import dataclasses
import json

import numpy as np
import pytest
import sentencepiece
import toy

from sbs_jax.cli import main
from sbs_jax.data import tokens, vocabulary_cut
from sbs_jax.data.dataset import JOINT
from sbs_jax.export import convert
from sbs_jax.student import families
from sbs_jax.weights import hugging_face, opening
from sbs_jax.weights.arrays import LazyArray, Opened
from tasks import builtin

TEXTS = ["A tiny red iron lamp.</s>Will it float?", "Iron sinks. So the answer is no."]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "made"
    return folder, vocabulary_cut.write(folder, builtin.vocabulary_path(), TEXTS, reserve=3)


def models(folder):
    old = sentencepiece.SentencePieceProcessor(model_file=builtin.vocabulary_path())
    return old, sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))


def test_texts_are_segmented_as_before_with_fewer_pieces(cut):
    folder, made = cut
    old, new = models(folder)
    assert new.GetPieceSize() == len(made.kept) == made.needed + made.characters + 3 < old.GetPieceSize()
    for text in TEXTS:
        for part in text.split(JOINT):
            ids = new.EncodeAsIds(part)
            assert [made.kept[i] for i in ids] == old.EncodeAsIds(part)
            assert new.DecodeIds(ids) == old.DecodeIds(old.EncodeAsIds(part))
    assert vocabulary_cut.read(folder) == made
    tokens.check_vocabulary(str(folder / "sentencepiece.model"))


def test_coverage_counts_what_is_lost(cut):
    folder, _ = cut
    same = vocabulary_cut.coverage(folder, builtin.vocabulary_path(), TEXTS)
    assert (same.unknown, same.changed, same.texts) == (0, 0, 3)
    other = vocabulary_cut.coverage(folder, builtin.vocabulary_path(), ["A huge white wool bell.", "是"])
    assert other.changed >= 1
    assert other.unknown == 1


def test_under_a_limit_the_most_frequent_pieces_and_those_of_labels_are_kept(tmp_path):
    corpus = ["Copper sinks."] * 9 + ["Paper floats."] * 5 + ["Wool."]
    name, labels = builtin.vocabulary_path(), ["no"]
    whole = vocabulary_cut.write(tmp_path / "all", name, [], reserve=5, corpus=corpus)
    assert vocabulary_cut.coverage(tmp_path / "all", name, corpus).changed == 0
    fixed = vocabulary_cut.write(tmp_path / "none", name, [], reserve=0, labels=labels, pieces=len(whole.kept))
    least = fixed.needed + fixed.characters
    limited = vocabulary_cut.write(
        tmp_path / "few", name, ["Iron"] * 7, reserve=5, labels=labels, corpus=corpus, pieces=least + 3
    )
    assert (len(limited.kept), limited.reserve) == (least + 3, 3)
    old, new = models(tmp_path / "few")
    pieces = [new.IdToPiece(k) for k in range(new.GetPieceSize())]
    assert {"▁copper", "▁sinks", "▁no"} <= set(pieces)
    assert "▁wool" not in pieces
    assert [limited.kept[i] for i in new.EncodeAsIds("no")] == old.EncodeAsIds("no")
    with pytest.raises(ValueError, match=f"need {least} pieces, more than --pieces {least - 1}"):
        vocabulary_cut.write(tmp_path / "fewer", name, [], reserve=5, labels=labels, pieces=least - 1)
    assert not (tmp_path / "fewer").exists()


def test_the_command_covers_records_and_text(tmp_path, capsys):
    toy.write_records(tmp_path / "records")
    text = tmp_path / "text.jsonl"
    text.write_text('"Copper sinks."\n' * 3 + '"Wool floats."\n')
    flags = ["vocabulary", "--vocabulary", builtin.vocabulary_path(), "--dataset", "toy", "--reserve", "0"]
    flags += ["--records_dir", str(tmp_path / "records"), "--text", str(text)]
    assert main.main([*flags, "--output", str(tmp_path / "all")]) == 0
    assert "Text: 0 of 12 tokens unknown; 0 of 4 texts segmented differently" in capsys.readouterr().out
    assert main.main([*flags, "--output", str(tmp_path / "few"), "--pieces", "9"]) == 1
    assert "more than --pieces 9" in capsys.readouterr().err


def test_rows_of_tables_are_pieces_sentinels_and_padding(cut):
    _, made = cut
    rows = made.rows(made.pieces + 128)
    assert len(rows) == made.vocab_size
    assert made.vocab_size % 128 == 0
    assert rows[: len(made.kept)].tolist() == list(made.kept)
    sentinels = rows[len(made.kept) : len(made.kept) + tokens.EXTRA_IDS]
    assert sentinels.tolist() == list(range(made.pieces, made.pieces + tokens.EXTRA_IDS))
    with pytest.raises(ValueError, match="expected at least"):
        made.rows(made.pieces)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"kept": [0, 1, 5, 4]}, "ascending"), ({"kept": [1, 2]}, "ascending"), ({"kept": [0, 1, 10**9]}, "less than")],
)
def test_a_damaged_list_is_refused(cut, tmp_path, change, match):
    folder, _ = cut
    found = json.loads((folder / vocabulary_cut.CUT).read_text()) | change
    (tmp_path / vocabulary_cut.CUT).write_text(json.dumps(found))
    with pytest.raises(ValueError, match=match):
        vocabulary_cut.read(tmp_path)


def test_bytes_have_no_pieces_and_a_folder_is_not_overwritten(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere has no cut\.json"):
        vocabulary_cut.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'byte'"):
        vocabulary_cut.write(tmp_path / "new", tokens.BYTE_VOCABULARY, TEXTS, reserve=0)
    with pytest.raises(FileExistsError):
        vocabulary_cut.write(tmp_path, builtin.vocabulary_path(), TEXTS, reserve=0)


def test_all_real_texts_keep_their_segmentation(real_vocab, real_data_dir, tmp_path):
    files = sorted(real_data_dir.glob("*/*_test.json"))
    texts = [line for file in files for line in file.read_text("utf-8").split("\n")[:1000]]
    made = vocabulary_cut.write(tmp_path / "cut", str(real_vocab), texts, reserve=0)  # compares every text
    assert len(made.kept) < made.pieces
    assert np.all(np.diff(made.kept) > 0)


def test_a_checkpoint_is_cut_to_the_rows_of_its_pieces(cut, tmp_path):
    folder, made = cut
    size = made.pieces + tokens.EXTRA_IDS
    config = dataclasses.replace(toy.MODEL, vocab_size=size)
    arrays = {name: LazyArray.of(np.asarray(x)) for name, x in families.init(config, seed=0)[1].items()}
    whole = Opened(architecture=config, arrays=arrays, vocabulary=builtin.vocabulary_path())
    hugging_face.write(tmp_path / "whole", whole, dtype="float32", shard_bytes=10**9)
    options = convert.Options(to_form=opening.HUGGING_FACE, cut=str(folder))
    convert.convert(str(tmp_path / "whole"), str(tmp_path / "small"), options)
    small = opening.open_any(tmp_path / "small")
    assert small.config == dataclasses.replace(config, vocab_size=made.vocab_size)
    rows = made.rows(size)
    for name, axis in (("token_embedder/embedding", 0), ("logits_dense/kernel", 1)):
        before, after = arrays[name].whole(), small.arrays[name].whole()
        np.testing.assert_array_equal(after.take(range(len(rows[rows >= 0])), axis), before.take(rows[rows >= 0], axis))
        assert not after.take(np.flatnonzero(rows < 0), axis).any()
    kept = "encoder/layers/0/attention/query/kernel"
    np.testing.assert_array_equal(small.arrays[kept].whole(), arrays[kept].whole())
    with pytest.raises(ValueError, match="cut from another vocabulary"):
        convert.convert(str(tmp_path / "small"), str(tmp_path / "again"), options)
