"""BPE tokenizers as vocabularies: the library's own ids, ends, errors; exact under a cut."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import students
import tensorflow as tf
import tokenizers
from builders import bpe
from builders.exported import answered, converted

from sbs_jax.data import registry, selection, tokens, vocabularies, vocabulary_cut
from sbs_jax.data.dataset import JOINT
from tasks import builtin

TEXTS = [
    "predict: A tiny red iron lamp, 12 cm.</s>Will it float?",
    "Iron sinks. So the answer is no.",
    "naïve 中文 🙂\t\n",
]

ADDED = {"content": "<eos>", "id": 9_999, "special": True}
ADDED |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


@pytest.fixture(scope="module", params=["byte_level", "with_byte_pieces"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    made = getattr(bpe, request.param)([*TEXTS * 9, *builtin_texts()])
    return bpe.write(tmp_path_factory.mktemp(request.param), made), made


def builtin_texts() -> list[str]:
    return [line for line in Path(builtin.__file__).read_text("utf-8").splitlines() if line]


def test_ids_are_those_of_the_library_with_its_end(written: tuple[str, Any]) -> None:
    path, library = written
    vocabulary = registry.vocabulary(path)
    end = library.token_to_id("<|im_end|>") or library.token_to_id("<eos>")
    assert vocabulary.eos_id == end > 0
    assert vocabulary.vocab_size == library.get_vocab_size()
    texts = [text.replace(JOINT, " ") for text in (*TEXTS, *builtin_texts())]
    found = tokens.encode(texts, vocabulary)
    assert found == [[*library.encode(text, add_special_tokens=False).ids, end] for text in texts]
    assert [vocabulary.decode(ids) for ids in found] == texts
    table = tokens.TokenTable.of(texts, vocabulary)
    assert table.row(2, length=5).tolist() == [*found[2][:4], end]
    assert pickle.loads(pickle.dumps(vocabulary)).encode(texts[0]) == found[0][:-1]


def test_the_joint_becomes_the_end_and_special_tokens_are_read(written: tuple[str, Any]) -> None:
    path, library = written
    vocabulary = registry.vocabulary(path)
    one, two = (library.encode(text).ids for text in ("a", "b"))
    assert tokens.encode(["a</s>b"], vocabulary) == [[*one, vocabulary.eos_id, *two, vocabulary.eos_id]]
    special = next(token for token in ("<|im_start|>", "<bos>") if library.token_to_id(token) is not None)
    assert vocabulary.encode(f"{special}a") == [library.token_to_id(special), *one]


def test_a_character_cut_in_its_bytes_is_decoded_as_the_library_does(written: tuple[str, Any]) -> None:
    path, library = written
    vocabulary = registry.vocabulary(path)
    ids = vocabulary.encode("a\U0001f9ff")  # in no training text, so in four bytes
    for length in range(1, len(ids) + 1):
        assert vocabulary.decode(ids[:length]) == library.decode(ids[:length], skip_special_tokens=True)
    assert vocabulary.decode(ids[:-1]).startswith("a\ufffd")


def test_seqio_encodes_within_tensorflow(written: tuple[str, Any]) -> None:
    vocabulary = registry.vocabulary(written[0])
    ids = vocabulary.encode_tf(tf.constant(TEXTS[2]))
    assert ids.numpy().tolist() == vocabulary.encode(TEXTS[2])
    assert vocabulary.decode_tf(ids).numpy().decode() == TEXTS[2]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model of type 'WordPiece'; expected 'BPE'"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "its 'vocab' is"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}, "one of its 'merges' is 'a'"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "is not a BPE tokenizer"),
        ({"added_tokens": []}, "expected one that ends a text"),
        ({"added_tokens": [{"content": "<eos>"}]}, "a text and its id"),
        ({"pre_tokenizer": {"type": "Unknown"}}, "is not a BPE tokenizer"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.1}}, "drops merges at random"),
        ({"added_tokens": [ADDED]}, "added token '<eos>' has the id of"),
    ],
)
def test_other_files_are_named(written: tuple[str, Any], tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(Path(written[0]).read_text("utf-8")) | change))
    for check in (tokens.check_vocabulary, tokens.vocabulary_sha256, registry.vocabulary):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(match)}"):
            check(str(path))


def test_sentinels_are_for_other_vocabularies(written: tuple[str, Any], tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {"NUMBER_SLOTS": {"number_slots": True}, "CORPUS": {"corpus": "text.txt"}}
    for owner, options in changes.items():
        with pytest.raises(ValueError, match=f"{owner} needs a vocabulary with 100 sentinels"):
            registry.configure(selection.DataOptions(records_dir=str(tmp_path), vocabulary=written[0], **options))


def test_a_cut_keeps_the_segmentation_of_its_texts(written: tuple[str, Any], tmp_path: Path) -> None:
    path, library = written
    made = vocabulary_cut.write(tmp_path / "cut", path, TEXTS, reserve=5)  # compares every text
    assert len(made.kept) < library.get_vocab_size()
    assert made.vocab_size % 128 == 0
    found = registry.vocabulary(str(tmp_path / "cut" / "tokenizer.json"))
    assert isinstance(found, vocabularies.Bpe)
    assert found.vocab_size == len(made.kept)
    assert made.kept[found.eos_id] == registry.vocabulary(path).eos_id
    other = "Wholly other words: zygote \U0001f9ff"
    assert found.decode(found.encode(other)) == other  # in smaller pieces, none unknown
    assert vocabulary_cut.coverage(tmp_path / "cut", path, [*TEXTS, other]) == vocabulary_cut.Coverage(
        5, sum(map(len, map(found.encode, (*TEXTS[0].split(JOINT), *TEXTS[1:], other)))), 0, 1
    )
    assert np.array_equal(made.rows(library.get_vocab_size())[: len(made.kept)], made.kept)


def test_a_limited_cut_has_the_labels_whole(written: tuple[str, Any], tmp_path: Path) -> None:
    path, library = written
    least = vocabulary_cut.write(tmp_path / "least", path, ["no"], reserve=0)
    made = vocabulary_cut.write(*(tmp_path / "few", path, TEXTS), reserve=9, labels=["no"], pieces=len(least.kept) + 20)
    assert len(least.kept) < len(made.kept) <= len(least.kept) + 20
    found = registry.vocabulary(str(tmp_path / "few" / "tokenizer.json"))
    assert [made.kept[i] for i in found.encode("no")] == library.encode("no").ids


def test_a_template_s_tokens_are_renumbered(tmp_path: Path) -> None:
    library = bpe.with_byte_pieces(TEXTS)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", library.token_to_id("<bos>"))]
    )
    library.add_tokens(["ZZZ"])
    vocabulary_cut.write(tmp_path / "cut", bpe.write(tmp_path, library), TEXTS[:1], reserve=0)
    found = tokenizers.Tokenizer.from_file(str(tmp_path / "cut" / "tokenizer.json"))
    assert found.encode("ZZZ").tokens == ["<bos>", "ZZZ"]


def test_an_exported_program_reads_and_writes_texts_as_the_student(tmp_path: Path) -> None:
    path = bpe.write(tmp_path, bpe.with_byte_pieces([*TEXTS, *students.TEXTS] * 9, size=400))
    run = students.write(tmp_path / "run", vocabulary=path, vocab_size=512)
    converted(run, tmp_path / "out", check=0, vocabulary=path)
    assert json.loads((tmp_path / "out" / "sbs_student.json").read_text())["tokenizer"]["kind"] == "bpe"
    found = answered(tmp_path / "out", also_refused=("sentencepiece",))
    labels = [text for text, _ in found["answer"]]
    assert labels == [answer.prediction for answer in students.answers(run)]
    assert len(set(labels)) > 3
    converted(run, tmp_path / "again", "sbs")
    (copy,) = (tmp_path / "again").glob("tokenizer.json")
    assert copy.read_bytes() == Path(path).read_bytes()
