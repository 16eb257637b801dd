"""Records files: what is written is read again, byte for byte; bad files get file and line."""

import json
import subprocess
import sys

import pytest

from sbs_jax.data import records
from sbs_jax.data.records import Record
from sbs_jax.storage import checksums

FULL = Record(
    id="a-1",
    input="Ann has 3 pens.\nHow many? \u2028 \x85 é",
    label="( 3.0 )",
    choices=("tea", "milk"),
    teacher_text="3. The answer is (3).\n\nQ: B",
    rationale="3.",
    teacher_label="(3)",
    outcome="ok",
)
BARE = Record(id="a-2", input="", label=None)


def test_records_survive_writing_and_reading(tmp_path):
    path = tmp_path / "new" / "train.jsonl"
    sha256 = records.write_records(path, [FULL, BARE])
    assert records.read_records(path) == [FULL, BARE]
    assert sha256 == checksums.file_sha256(path)
    first = path.read_bytes()
    records.write_records(path, iter([FULL, BARE]))
    assert path.read_bytes() == first
    assert first.count(b"\n") == 2
    assert "é" in first.decode()


def test_file_may_leave_out_what_has_a_default(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"id": "a-2", "input": "", "label": null}\r\n')
    assert records.read_records(path) == [BARE]


GOOD = '{"id": "a", "input": "x", "label": null}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n\n", r":2: the line is blank"),
        (f'{GOOD}\n{{"id": "b", "inp', r":2: not valid JSON: .* column 13"),
        (f"{GOOD}\n[1, 2]\n", r":2: got \[1, 2\]; expected a JSON object"),
        (f"{GOOD}\n{GOOD}\n", r":2: the id 'a' is already that of line 1"),
        ('{"id": "a", "label": null}', r":1: got the fields \['id', 'label'\]; expected those of a record: id, input"),
        ('{"id": "a", "input": "x", "label": 1}', r":1: the field 'label' is 1; expected text or null"),
        ('{"id": 3, "input": "x", "label": null}', r":1: the field 'id' is 3; expected text"),
        ('{"id": "", "input": "x", "label": null}', r":1: the field 'id' is empty"),
        ('{"id": "a", "input": null, "label": null}', r":1: the field 'input' is null; expected text\."),
        (GOOD[:-1] + ', "outcome": null}', r":1: the field 'outcome' is null"),
        (GOOD[:-1] + ', "choices": "tea"}', r":1: the field 'choices' is \"tea\"; expected a list"),
        (GOOD[:-1] + ', "choices": ["tea", 2]}', r":1: the field 'choices\[1\]' is 2"),
        (GOOD[:-1] + ', "rational": "r"}', r":1: unknown field 'rational'.* mean 'rationale'"),
        ('{"id": "\\ud83d", "input": "x", "label": null}', r":1: .*unpaired surrogate '\\ud83d'"),
        ("[" * 100_000, r":1: unreadable JSON"),
        ("", r"is empty"),
    ],
)
def test_bad_file_is_refused_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(text.encode())
    with pytest.raises(ValueError, match=f"^{path}.*{message}"):
        records.read_records(path)


def test_bytes_that_are_not_utf8_are_refused_with_their_place(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"^{path}:2: byte 11 \(0xe9\) is not UTF-8"):
        records.read_records(path)


def test_pair_of_surrogate_escapes_is_one_character(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"id": "\\ud83d\\ude00", "input": "x", "label": null}\n')
    assert records.read_records(path)[0].id == "\U0001f600"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([FULL, FULL], "Record 2 .*'a-1' occurred before"),
        ([FULL, Record(id="b", input="\ud800", label=None)], "Record 2 .*unpaired surrogate"),
        ([Record(id="", input="x", label=None)], "Record 1 .*'id' is empty"),
    ],
)
def test_refused_records_leave_the_old_file_as_it_was(tmp_path, bad, message):
    path = tmp_path / "train.jsonl"
    records.write_records(path, [BARE])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        records.write_records(path, bad)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_writing_that_is_broken_off_leaves_no_file(tmp_path):
    def broken_off():
        yield FULL
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write_records(tmp_path / "train.jsonl", broken_off())
    assert not list(tmp_path.iterdir())


def a_manifest() -> records.Manifest:
    return records.Manifest(
        format=records.FORMAT,
        dataset="svamp",
        parser="strict",
        inputs="release",
        sbs_jax="0",
        splits={},
        skipped={},
    )


def test_manifest_survives_writing_and_reading(tmp_path):
    records.write_manifest(tmp_path, a_manifest())
    assert records.read_manifest(tmp_path) == a_manifest()
    first = (tmp_path / records.MANIFEST).read_bytes()
    records.write_manifest(tmp_path, a_manifest())
    assert (tmp_path / records.MANIFEST).read_bytes() == first


def test_other_manifests_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        records.read_manifest(tmp_path)
    path = tmp_path / records.MANIFEST
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"got format \[\]; expected 1"):
        records.read_manifest(tmp_path)
    path.write_text(json.dumps({**a_manifest(), "format": 2}))
    with pytest.raises(ValueError, match="got format 2; expected 1"):
        records.read_manifest(tmp_path)


def test_reading_records_needs_the_standard_library_only():
    code = (
        "import sys, sbs_jax.data.records, sbs_jax.data.release, sbs_jax.data.parsing\n"
        "heavy = {'numpy', 'jax', 'tensorflow', 'seqio'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
