"""Files that users give: hostile ones are refused by every reader, and common forms are read."""

import functools
import gzip
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzzing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbs_jax.data import records, release, tokens
from sbs_jax.data.dataset import Row
from sbs_jax.export import card
from sbs_jax.prediction import inputs
from sbs_jax.run import directory
from sbs_jax.run import manifest as run_manifest
from sbs_jax.stats import results
from sbs_jax.storage import checksums, json_files
from sbs_jax.teacher import prompts
from sbs_jax.teacher.store import Store
from sbs_jax.training import gin_files
from sbs_jax.weights import hugging_face, npz, tensor_store

PEAK, SECONDS = 160, 20  # MiB and seconds that a reader may take for any file
ROWS = [{"id": "a", "input": "é"}, {"id": "b", "input": "[{"}]


def errors(path: Path) -> list[str | None]:
    return [entry.error for entry in inputs.read(path)]


def release_inputs(path: Path) -> Any:
    return release.read_inputs(path.parents[1], "svamp", lambda row: Row(id=None, input=str(row), label=None))


def refused(path: Path, problem: str | None) -> None:
    if problem:
        raise ValueError(f"{path}: {problem}")


# Every reader of a file that a user gives, with the name under which it looks for the file.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "records": ("train.jsonl", records.read_records),
    "manifest of records": (records.MANIFEST, lambda path: records.read_manifest(path.parent)),
    "inputs of the release": ("svamp/svamp_train.json", release_inputs),
    "shards of the release": (
        "svamp/llm/train_CoT_0.json",
        lambda path: release.read_replies(path.parents[2], "svamp", "train"),
    ),
    "JSON inputs of predict": ("in.jsonl", errors),
    "CSV inputs of predict": ("in.csv", errors),
    "TSV inputs of predict": ("in.tsv", errors),
    "Parquet inputs of predict": ("in.parquet", errors),
    "prompts": ("mine.json", prompts.read),
    "samples of convert": ("samples.jsonl", lambda path: card.read_samples(path, {"input": {"prefix": ""}}, rows=9)),
    "manifest of a run": (run_manifest.NAME, lambda path: run_manifest.read(path.parent)),
    "manifest of a run, for a report": (run_manifest.NAME, lambda path: results.identify(path.parent)),
    "metrics of a run": ("metrics.jsonl", lambda path: directory.read_metrics(path.parent)),
    "predictions of a run": (
        "predictions/x-test-1.jsonl",
        lambda path: results._test_rows(path.parents[1], step=1, dataset=None),
    ),
    "any JSON": ("x.json", json_files.read_json),
    "gin files": (
        "mine.gin",
        lambda path: gin_files.configure("evaluate.EvaluateConfig", gin_files=[str(path)], bindings=[]),
    ),
    "vocabularies": ("sentencepiece.model", lambda path: tokens.check_vocabulary(str(path))),
    "lists of checksums": (checksums.FILE, lambda path: refused(path, checksums.problem(path.parent))),
    "stores of replies": ("store.sqlite", lambda path: Store(path).__enter__()),
    "arrays of NumPy": ("student.npz", npz.open_file),
    "settings of Hugging Face": (hugging_face.CONFIG, lambda path: hugging_face.open_directory(path.parent)),
}


def parquet_bombs(path: Path) -> Iterator[Path]:
    """Makes small files of texts that repeat, of zeros, of a list without end, of shared beginnings, of empty rows."""
    half = "x" * 2**19
    pq.write_table(pa.table({"id": ["a"] * 400, "input": [half] * 400}), path, compression="zstd", store_schema=False)
    yield path
    rows = pa.table({"id": ["a"] * 300, "input": [half] * 300})
    pq.write_table(rows, path, compression="zstd", use_dictionary=False)
    yield path
    endless = pa.ListArray.from_arrays([0, 18_000_000], pa.repeat("", 18_000_000))
    pq.write_table(pa.table({"id": ["a"], "input": ["a"], "choices": endless}), path)
    yield path
    shared = pa.table({"id": ["a"] * 40, "input": ["x" * 6 * 2**20] * 40})  # each is "the one before it"
    delta = {"id": "PLAIN", "input": "DELTA_BYTE_ARRAY"}
    pq.write_table(shared, path, compression="zstd", use_dictionary=False, column_encoding=delta)
    yield path
    nothing = pa.nulls(2**24, pa.string())
    pq.write_table(pa.table({"id": nothing, "input": nothing}), path)
    yield path


@functools.cache
def packed() -> bytes:
    return gzip.compress(b"x" * 2**24)


def out_of_time(*_: object) -> None:
    raise fuzzing.HangError(f"not read within {SECONDS} s")


def hostile(path: Path) -> Iterator[str]:
    """Makes files at a path, one after the other: everything that would take memory or time without end."""
    os.mkfifo(path)
    yield "a pipe"
    path.unlink()
    path.symlink_to("/dev/zero")
    yield "a device"
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    beginning = b"id,input\na," if path.suffix in (".csv", ".tsv") else b'{"id": "a", "input": "'
    with path.open("wb") as file:
        file.write(beginning + b"x" * 2**16)
        file.truncate(2**28)  # the rest is a hole that takes no space on disk
    yield "a line of 256 MiB"
    for first in (beginning, b'["'):
        path.write_bytes(gzip.compress(first) + packed() * 16)  # members of gzip follow one another
        yield f"gzip that unfolds to 256 MiB after {first!r}"
    path.unlink()
    if path.suffix == ".parquet":
        for number, _ in enumerate(parquet_bombs(path)):
            yield f"Parquet {number}"
        path.unlink()


def memory(name: str) -> int:
    """Reads a figure of this process in MiB: VmHWM is the peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) // 1024


@pytest.mark.parametrize("name", READERS)
def test_no_file_makes_a_reader_hang_or_take_the_memory(name: str, tmp_path: Path) -> None:
    place, read = READERS[name]
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, out_of_time)
    for kind in hostile(path):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, begin = memory("VmHWM"), time.monotonic()
        signal.alarm(SECONDS)
        try:
            found = read(path)
            told = ""
        except (ValueError, OSError, gin_files.UsageError) as error:
            found, told = [], str(error)
        finally:
            signal.alarm(0)
        if told:
            assert str(tmp_path) in told or "/dev/zero is" in told, kind
            assert len(told) < 1000, kind
        else:  # rows with errors; metrics without a whole line are none
            assert name.endswith("of predict") or (name == "metrics of a run" and not found), kind
        assert memory("VmHWM") - before < PEAK, kind
        assert time.monotonic() - begin < SECONDS, kind


def test_lists_in_lists_take_little_memory(tmp_path: Path) -> None:
    """Two bytes of JSON may take a hundred in memory."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"[[" + b"[]," * 2**22)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmHWM")
    for read in (records.read_records, json_files.read_json, json_files.read_texts, errors):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)
    assert memory("VmHWM") - before < 2 * PEAK


# ------------------------------------------------------------------------------------ forms

LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMMON = {
    "a byte order mark": b"\xef\xbb\xbf" + LINES,
    "gzip": gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
    "gzip and a byte order mark": gzip.compress(b"\xef\xbb\xbf" + LINES),
    "an array on one line": json.dumps(ROWS).encode(),
    "an array of several lines": json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n",
    "an array, gzip and a byte order mark": gzip.compress(b"\xef\xbb\xbf " + json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("form", COMMON)
def test_common_forms_of_json_are_read(form: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(COMMON[form])
    assert [row for _, row in json_files.read_json_lines(path)] == ROWS
    found = [(entry.id, entry.question.input if entry.question else entry.error) for entry in inputs.read(path)]
    assert found == [(row["id"], row["input"]) for row in ROWS]


def test_records_and_the_release_may_be_packed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"id": "a", "input": "b", "label": null}\n'))
    (record,) = records.read_records(records.file_of(tmp_path, "train"))
    assert record.id == "a"
    folder = tmp_path / "svamp"
    (folder / "llm").mkdir(parents=True)
    (folder / "svamp_train.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (folder / "llm" / "train_CoT_0.json.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf["x", "y"]'))
    assert list(release.read_replies(tmp_path, "svamp", "train").values()) == [["x", "y"]]
    assert [row.input for row in release_inputs(folder / "svamp_train.json")["train"]] == [str(row) for row in ROWS]


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "tsv.gz"])
def test_tables_of_text_are_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"in.{ending}"
    between = "," if ending.startswith("csv") else "\t"
    data = f'\ufeffid{between}input\r\na{between}"é, ""x""\ty\nz"\r\n'.encode()
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    (entry,) = inputs.read(path)
    assert entry.question is not None
    assert (entry.id, entry.question.input) == ("a", 'é, "x"\ty\nz')


UNREAD = {
    "is UTF-16 text; save it as UTF-8": LINES.decode().encode("utf-16"),
    "is UTF-16 text or no text; save it as UTF-8": LINES.decode().encode("utf-16-le"),
    "is a zip archive or a spreadsheet; unpack it, or save it as CSV": b"PK\x03\x04..",
    "is Parquet; give it the ending .parquet": b"PAR1..",
    "is packed by gzip twice; unpack it once": gzip.compress(gzip.compress(LINES)),
    "is not a whole gzip file (Compressed file ended": gzip.compress(LINES)[:-9],
    "has carriage returns alone at the ends of its lines; save it with line feeds": LINES.replace(b"\n", b"\r"),
    "has objects of several lines; write each on one line": json.dumps(ROWS[0], indent=1).encode(),
    "begins with 'id,input'; expected a JSON object, {..}, on every line": b"id,input\na,b\n",
    "more follows the array": json.dumps(ROWS).encode() + LINES,
    "not valid JSON: got '{' in the array; expected ','": b'[{"a": 1} {"a": 2}]',
    "not valid JSON: got 'the end' in the array; expected ','": json.dumps(ROWS).encode()[:-1],
    "byte 7 (0xff) is not UTF-8": b'[{"a": \xff}]',
}


@pytest.mark.parametrize("message", UNREAD)
def test_other_forms_are_named_in_one_message(message: str, tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_bytes(UNREAD[message])
    for read in (lambda: list(json_files.read_json_lines(path)), lambda: errors(path)):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}:? {re.escape(message)}"):
            read()


@pytest.mark.parametrize("name", ["in.csv", "in.tsv"])
def test_other_forms_of_tables_are_named_too(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for data, message in (
        ("id,input\na,b\n".encode("utf-16"), "is UTF-16 text"),
        (b"id,input\ra,b\r", "carriage returns alone"),
        (b"PK\x03\x04", "a spreadsheet"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            inputs.read(path)


def test_items_of_a_long_array_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    rows = [{"id": str(number), "input": "é" * 300} for number in range(20_000)]
    path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmHWM")
    assert [entry.id for entry in inputs.read(path)] == [row["id"] for row in rows]
    assert memory("VmHWM") - before < 16


def test_a_row_of_csv_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LONGEST_LINE", 2**12)
    path = tmp_path / "in.csv"
    path.write_text("id,input\n" + 'a,"\n",' + '"\n",' * 2**12 + '"\nb,c\n')
    first, *_, last = inputs.read(path)
    assert first.error == "not valid CSV: the row is longer than 4096 bytes."
    assert last.id == "b"


def test_a_footer_of_lists_in_lists_is_refused(tmp_path: Path) -> None:
    """Parquet's own footer nests six deep; recursion would end in an error that names no file."""
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.table({"id": ["a"], "input": ["Is it?"]}), path)
    deep = bytes([0x19]) + bytes([0x19]) * 5000 + b"\0"  # field 1: a list of one list of one list ...
    path.write_bytes(path.read_bytes() + deep + len(deep).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match=r"questions\.parquet cannot be read as Parquet: .*footer is damaged.*deeply"):
        inputs.read(path)


def test_a_description_of_arrays_larger_than_any_real_one_is_refused(tmp_path: Path) -> None:
    """TensorStore reads it whole, in a thread whose lack of memory ends the process."""
    folder = tmp_path / "target.embedding"
    folder.mkdir()
    (folder / "0.0").touch()
    os.truncate(folder / "0.0", 2**33)  # values may be of any size
    (folder / ".zarray").touch()
    tensor_store.check_files(tmp_path)
    os.truncate(folder / ".zarray", 2**26 + 1)
    with pytest.raises(ValueError, match=r"\.zarray has 67108865 bytes.*Copy the checkpoint again"):
        tensor_store.check_files(tmp_path)
