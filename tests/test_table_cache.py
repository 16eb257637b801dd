"""Token tables of large records are kept between starts."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.cats import configure, register, row, write

from sbs_jax.data import records, registry, table_cache, tokens


@pytest.fixture
def records_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with 20 training and 4 test records of `cats`, each of which is worth keeping."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(table_cache, "LARGE", 0)
    write(tmp_path, [row(number) for number in range(20)])
    write(tmp_path, [row(number) for number in range(100, 104)], split="test")
    register(tmp_path, monkeypatch)
    return tmp_path


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "sbs_jax" / "tables").glob("*"))


def start(folder: Path, **options) -> tuple[dict, dict[str, list[list[int]]]]:
    """Returns what a new process would have: the manifest and the tokens of a task."""
    configure(folder, **options)
    tables = registry.token_tables("cats_rationale", "train")
    return registry.manifest("cats_label"), {
        feature: [table.row(index, length=99).tolist() for index in range(len(table))]
        for feature, table in tables.items()
    }


def test_a_later_start_has_the_same_data_and_reads_no_training_row(records_dir: Path, monkeypatch):
    first = start(records_dir)
    kept = entries(records_dir)
    read = records.read_records

    def refused(path, **options):
        assert Path(path).name != "train.jsonl"
        return read(path, **options)

    monkeypatch.setattr(records, "read_records", refused)
    assert start(records_dir) == first
    assert entries(records_dir) == kept
    tables = registry.token_tables("cats_rationale", "train")
    assert isinstance(tables["inputs"].ids.base, np.memmap)


@pytest.mark.parametrize(
    ("options", "tokens_differ"),
    [({"fraction": 0.5}, True), ({"rationale_prefix": "why: "}, True), ({"label_source": "teacher"}, False)],
)
def test_other_options_have_entries_of_their_own(records_dir: Path, options, tokens_differ):
    first = start(records_dir)
    before = entries(records_dir)
    other = start(records_dir, **options)
    assert (other[1] != first[1]) == tokens_differ
    assert other[0]["options"] != first[0]["options"]
    assert set(entries(records_dir)) > set(before)
    assert start(records_dir) == first


def test_other_records_have_entries_of_their_own(records_dir: Path):
    first = start(records_dir)
    write(records_dir, [row(number, rationale="because") for number in range(20)])
    assert start(records_dir)[1] != first[1]


def test_a_damaged_entry_is_made_again(records_dir: Path, caplog):
    first = start(records_dir)
    for file in (records_dir / "cache").rglob("inputs.ids.npy"):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    assert start(records_dir) == first
    assert "inputs.ids.npy" in caplog.text
    assert "it is made again" in caplog.text
    caplog.clear()
    assert start(records_dir) == first
    assert not caplog.records


def test_warnings_come_at_every_start(records_dir: Path, caplog):
    write(records_dir, [row(number, teacher_label="17", choices=("0", f"{number}")) for number in range(20)])
    for _ in range(2):
        caplog.clear()
        start(records_dir, label_source="teacher")
        assert caplog.text.count("19 of 20 teacher labels are no possible label") == 1


def test_what_was_unused_for_longest_makes_room(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = tokens.TokenTable(ids=np.zeros(1_000, np.int32), starts=np.arange(2) * 1_000)
    made: list[str] = []

    def entry(name: str) -> None:
        def make() -> table_cache.Entry:
            made.append(name)
            return table_cache.Entry(tables={"inputs": table})

        table_cache.entry({"name": name}, make)

    entry("old")
    entry("used")
    entry("old")
    monkeypatch.setattr(table_cache, "MOST", 11_000)  # two entries of 5 kB fit
    entry("new")
    assert made == ["old", "used", "new"]
    assert len(entries(tmp_path)) == 2
    entry("old")
    assert made == ["old", "used", "new"]  # it had been used last


def test_a_cache_that_cannot_be_written_costs_time_alone(records_dir: Path, monkeypatch, caplog):
    (records_dir / "cache").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        first = start(records_dir)
    assert "cannot be kept" in caplog.text
    assert start(records_dir) == first


def test_rationales_that_code_chooses_are_not_kept(records_dir: Path):
    start(records_dir, rationales="agreeing")
    assert not [path for path in entries(records_dir) if path.is_dir()]


def test_records_that_a_manifest_describes_are_those_that_were_written(tmp_path: Path):
    rows = [row(number, teacher_text="Meow.", choices=("a", "b"), votes=(2, 3)) for number in range(5)]
    sha256 = records.write_records(tmp_path / "train.jsonl", rows)
    counts = {"rows": 5, "outcomes": {}, "rationales": 5, "teacher_labels": 5, "labelled": 5, "teacher_right": 5}
    summary = {**counts, "teacher_accuracy": None, "sha256": sha256, "sources": {}}
    about = {"format": records.FORMAT, "dataset": "cats", "parser": "strict", "inputs": "records", "sbs_jax": "0"}
    manifest: Any = {**about, "splits": {"train": summary}, "skipped": {}}
    records.write_manifest(tmp_path, manifest)
    assert records.read_records(tmp_path / "train.jsonl", sha256=sha256) == rows
    without = records.read_records(tmp_path / "train.jsonl", sha256=sha256, replies=False)
    assert without == [dataclasses.replace(each, teacher_text=None) for each in rows]
    (tmp_path / "train.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes().replace(b'"ok"', b"7", 1))
    with pytest.raises(ValueError, match=r"train.jsonl:1: the field 'outcome' is 7"):
        records.read_records(tmp_path / "train.jsonl", sha256="of another file")
