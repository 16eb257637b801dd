"""Files of questions to files of answers: formats, bad rows, order, interruption, memory."""

import csv
import gzip
import json
import random
import signal
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy

from sbs_jax.cli.commands import predict as command
from sbs_jax.prediction import files, id_index, inputs
from sbs_jax.prediction.engine import Answer, Predictor, Settings
from sbs_jax.storage import lock, tables

TEXTS = ["a b", 'é "x", y', "one\ntwo", "", "\u2028z\r\nw", "名", " c "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_untrained(tmp_path_factory.mktemp("student")).parent


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.load(folder / "run", settings=Settings(batch_size=8))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def rows(count: int) -> list[dict[str, str]]:
    chosen = random.Random(0)
    return [
        {"id": f"q{number}", "input": "".join(chosen.choices("abcdefgh ", k=chosen.randrange(1, 38)))}
        for number in range(count)
    ]


def write(path: Path, questions: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in questions), "utf-8")
    return path


# ------------------------------------------------------------------------------------ formats


def test_every_format_asks_the_same_and_says_the_same(predictor, tmp_path):
    asked = [{"id": f"ü{number}", "input": text} for number, text in enumerate(TEXTS)]
    write(tmp_path / "in.jsonl", asked)
    with (tmp_path / "in.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["id", "more", "input"])
        writer.writeheader()
        writer.writerows(row | {"more": "1"} for row in asked)
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "in.parquet", row_group_size=3)
    got: dict[str, list[dict[str, Any]]] = {}
    for source in ("jsonl", "csv", "parquet"):
        entries = list(inputs.read(tmp_path / f"in.{source}"))
        assert [(e.id, e.question.input if e.question else None) for e in entries] == [
            (row["id"], row["input"]) for row in asked
        ]
        for target in ("jsonl", "csv", "parquet"):
            out = tmp_path / f"{source}.{target}"
            done = files.predict(predictor, input_path=tmp_path / f"in.{source}", output_path=out)
            assert done == files.Summary(rows=len(asked), errors=0, resumed=0)
            if target == "jsonl":
                got[out.name] = lines(out)
            elif target == "csv":
                with out.open(encoding="utf-8", newline="") as file:
                    rows = [{name: tables.read(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
                    got[out.name] = [row | {"score": float(row["score"])} for row in rows]
            else:
                got[out.name] = pq.read_table(out).to_pylist()
    want = got["jsonl.jsonl"]
    assert [row["id"] for row in want] == [row["id"] for row in asked]
    for found in got.values():
        assert [{name: row[name] for name in ("id", "prediction", "score")} for row in found] == want
    assert set(got["csv.parquet"][0]) == set(got["csv.csv"][0]) == {"id", "prediction", "score", "line", "error"}
    assert not [path.name for path in tmp_path.iterdir() if ".partial" in path.name]


def test_choices_and_adapters_come_with_any_format(tmp_path):
    asked: list[dict[str, Any]] = [
        {"id": "1", "input": "a", "choices": ["x", 'y, "z"'], "adapter": None},
        {"id": "2", "input": "b", "choices": None, "adapter": "other"},
    ]
    write(tmp_path / "in.jsonl", asked)
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "in.parquet")
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "input", "choices", "adapter"])
        writer.writeheader()
        writer.writerows(row | {"choices": json.dumps(row["choices"]) if row["choices"] else ""} for row in asked)
    for name in ("jsonl", "parquet", "csv"):
        first, second = (entry.question for entry in inputs.read(tmp_path / f"in.{name}"))
        assert first is not None
        assert second is not None
        assert (first.choices, first.adapter) == (("x", 'y, "z"'), None)
        assert (second.choices, second.adapter) == (None, "other")


def test_scores_of_choices_are_written_in_every_format(folder, tmp_path):
    choosing = Predictor.load(folder / "run", settings=Settings(batch_size=8, decoding="choices", rationale=True))
    write(tmp_path / "in.jsonl", [{"id": "1", "input": "a", "choices": ["x", "y"]}, {"id": "1", "input": "b"}])
    for name in ("jsonl", "csv", "parquet"):
        files.predict(choosing, input_path=tmp_path / "in.jsonl", output_path=tmp_path / f"out.{name}")
    good, bad = lines(tmp_path / "out.jsonl")
    assert set(good) == {"id", "prediction", "score", "rationale", "scores"}
    assert bad == {"id": "1", "line": 2, "error": "id '1' is already that of line 1; ids must be distinct."}
    with (tmp_path / "out.csv").open(newline="") as file:
        of_csv = list(csv.DictReader(file))
    assert json.loads(of_csv[0]["scores"]) == good["scores"]
    assert (of_csv[1]["line"], of_csv[1]["error"]) == ("2", bad["error"])
    of_parquet = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert dict(of_parquet[0]["scores"]) == good["scores"]
    assert (of_parquet[0]["error"], of_parquet[1]["line"], of_parquet[1]["prediction"]) == (None, 2, None)


# ------------------------------------------------------------------------------------ bad rows


BAD_LINES = [
    (b'{"id": "a", "input": "x"', "not valid JSON", None),
    (b'{"id": "b", "input": "\xff"}', "is not UTF-8", None),
    (b'{"id": "c"}', "'input' is missing", "c"),
    (b'{"input": "x"}', "'id' is missing", None),
    (b'{"id": 5, "input": "x"}', "'id' is 5; expected a text", None),
    (b'{"id": "d", "input": ["x"]}', "'input' is ['x']; expected a text", "d"),
    (b"[1]", "expected {", None),
    (b'{"id": "e", "input": "' + b"x" * 99 + b'"}', "the input has 109 tokens", "e"),
    (b'{"id": "good 1", "input": "again"}', "id 'good 1' is already that of line 1", "good 1"),
    (b'{"id": "f", "input": "x", "choices": "y"}', "'choices' is 'y'; expected a list", "f"),
    (b'{"id": "g", "input": "x", "adapter": "h"}', "no adapter is named 'h'", "g"),
    (b'{"id": "h", "input": "' + b"y" * 2**20 + b'"}', "the line is longer than 1048576 bytes", None),
]


def test_a_bad_row_is_an_error_with_its_line_and_the_rest_goes_on(predictor, tmp_path, caplog):
    data, expected = [b'{"id": "good 1", "input": "a"}', b""], []
    for number, (line, message, row_id) in enumerate(BAD_LINES):
        expected.append((len(data) + 1, message, row_id))
        data += [line, f'{{"id": "good {number + 2}", "input": "b {number}"}}'.encode(), b" "]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(data))
    done = files.predict(predictor, input_path=tmp_path / "in.jsonl", output_path=tmp_path / "out.jsonl")
    found = lines(tmp_path / "out.jsonl")
    assert done == files.Summary(rows=2 * len(BAD_LINES) + 1, errors=len(BAD_LINES), resumed=0)
    assert [row["id"] for row in found if "error" not in row] == [f"good {n + 1}" for n in range(len(BAD_LINES) + 1)]
    wrong = [row for row in found if "error" in row]
    for row, (line, message, row_id) in zip(wrong, expected, strict=True):
        assert set(row) == {"id", "line", "error"}
        assert (row["line"], row["id"]) == (line, row_id)
        assert message in row["error"]
    # Each answer is in its row's place.
    assert ["error" in row for row in found] == [False, *[True, False] * len(BAD_LINES)]
    assert [f"line {row['line']}: {row['error']}" for row in wrong[:5]] == caplog.messages


def test_bad_rows_of_csv(tmp_path):
    (tmp_path / "in.csv").write_bytes(
        b'\xef\xbb\xbfid,input,choices\r\n1,a,\r\n2,\xff,\r\n3\r\n\r\n4,"two\r\nlines",\r\n5,x,[\r\n6,"y" z,\r\n,w,\r\n'
        + b"7,"
        + b"x" * 2**20
        + b',\r\n8,b,\r\n9,"never closed\r\n'
        + b"10,c,\r\n"
    )
    found = [(e.line, e.id if e.question else e.error) for e in inputs.read(tmp_path / "in.csv")]
    assert found[0] == (2, "1")
    assert found[1] == (3, "byte 2 (0xff) of line 3 is not UTF-8.")
    assert found[2] == (4, "got 1 fields; expected 3, as in the header.")
    assert found[3] == (6, "4")
    assert found[4] == (8, "'choices' is '['; expected a JSON list of texts.")
    assert found[5][0] == 9
    assert str(found[5][1]).startswith("not valid CSV: ',' expected after '\"'")
    assert found[6] == (10, "'id' is missing; a row has the texts 'id' and 'input'.")
    assert found[7] == (11, f"the line is longer than {2**20} bytes and was skipped; shorten it.")
    assert found[8] == (12, "8")
    assert found[9][0] == 13
    assert "not valid CSV" in str(found[9][1])
    assert len(found) == 10


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("in.csv", b"id,text\n1,a\n", "got the columns 'id', 'text' without 'input'; expected 'id' and 'input'"),
        ("in.csv", b"id,input,id\n", "got 2 columns 'id'; expected one"),
        ("in.csv", b"\xffid,input\n", "the header cannot be read: byte 0 "),
        ("in.parquet", b"PAR1 no, not really", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_refused(predictor, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        files.predict(predictor, input_path=tmp_path / name, output_path=tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_columns_of_parquet_have_types_and_rows_may_be_bad(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": [1], "input": ["a"]}), path)
    with pytest.raises(ValueError, match=r"in\.parquet: column 'id' is int64; expected string"):
        inputs.read(path)
    pq.write_table(pa.table({"id": ["1"], "input": ["a"], "choices": ["b"]}), path)
    with pytest.raises(ValueError, match=r"column 'choices' is string; expected list<string>"):
        inputs.read(path)
    pq.write_table(pa.table({"id": ["1", "2", "3"], "input": [None, "x" * 2**20 + "x", "a"]}), path)
    found = list(inputs.read(path))
    assert [entry.line for entry in found] == [1, 2, 3]
    assert (found[0].error or "").startswith("'input' is missing")
    assert (found[1].error or "").startswith("the row has more than 1048576 characters")
    assert found[2].question is not None


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.parquet"])
def test_an_empty_file_has_no_rows(predictor, tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    done = files.predict(predictor, input_path=tmp_path / name, output_path=tmp_path / "out.csv")
    assert done == files.Summary(rows=0, errors=0, resumed=0)
    assert (tmp_path / "out.csv").read_text() == "id,prediction,score,line,error\n"


def test_ids_are_known_again_wherever_they_stood(tmp_path):
    with id_index.IdIndex(tmp_path / "ids") as known:
        assert known.first_lines([("a", 1), ("b", 2), ("a", 3)]) == [1, 2, 1]
        assert known.first_lines([("c", 4), ("b", 5), ("\ud800", 6)]) == [4, 2, 6]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "ids").write_bytes(b"left behind")
    with id_index.IdIndex(tmp_path / "ids") as known:
        assert known.first_lines([("b", 7)]) == [7]


# ------------------------------------------------------------------------------------ interrupted


def test_an_index_that_the_disk_refuses_is_told(tmp_path):
    with id_index.IdIndex(tmp_path / "ids") as known:
        known._connection.execute("PRAGMA max_page_count=2")  # as a disk that is full after so many pages
        with pytest.raises(OSError, match=r"index of ids in .*ids fails: .*full"):
            known.first_lines([(f"q{number}", number) for number in range(1000)])


@pytest.fixture(scope="module")
def whole(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Three windows and a half of rows, bad ones among them, and their answers."""
    path = tmp_path_factory.mktemp("whole") / "in.jsonl"
    questions: list[dict[str, Any]] = [*rows(448)]
    questions[130] = {"id": "q130"}
    questions[300] = {"id": "q7", "input": "again"}
    write(path, questions)
    out = path.with_name("out.jsonl")
    done = files.predict(predictor, input_path=path, output_path=out)
    assert (done.rows, done.errors) == (448, 2)
    return path, out.read_bytes()


def interrupted(
    monkeypatch: pytest.MonkeyPatch, predictor: Predictor, source: Path, out: Path, *, windows: int
) -> None:
    """Interrupts after so many windows."""
    answer, calls = predictor.answer, iter(range(1000))

    def answering(questions: Any) -> Any:
        if next(calls) == windows:
            raise KeyboardInterrupt
        return answer(questions)

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "answer", answering)
        with pytest.raises(KeyboardInterrupt):
            files.predict(predictor, input_path=source, output_path=out)


@pytest.mark.parametrize("lost", [0, 1, 40, 10**9, -1])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(predictor, whole, tmp_path, monkeypatch, lost):
    source, want = whole
    out = tmp_path / "out.jsonl"
    earlier = json.dumps({"id": "of an earlier run", "prediction": "", "score": 0.0}) + "\n"
    out.write_text(earlier)
    interrupted(monkeypatch, predictor, source, out, windows=2)
    assert out.read_text() == earlier
    partial = Path(f"{out}.partial")
    written = partial.read_bytes()
    assert want.startswith(written)
    assert written.count(b"\n") == 256
    # A killed process, or a disk that lost its last blocks, may leave a torn line or an overlong one.
    partial.write_bytes(written[: max(0, len(written) - lost)] if lost >= 0 else written + b"\0" * 10**5)
    done = files.predict(predictor, input_path=source, output_path=out)
    assert done == files.Summary(rows=448, errors=2, resumed={0: 256, -1: 256, 1: 128, 40: 128}.get(lost, 0))
    assert out.read_bytes() == want
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "jsonl.gz", "parquet"])
def test_an_edited_input_is_refused(predictor, tmp_path, monkeypatch, ending):
    """The middle of a long input is changed, with the size, the ids and both ends as they were."""
    questions = rows(448)
    for row in questions:
        row["input"] = row["input"].ljust(38)

    def written(asked: list[dict[str, Any]]) -> Path:
        path = tmp_path / f"in.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(asked), path, compression="none", use_dictionary=False)
        elif ending == "csv":
            path.write_text("id,input\n" + "".join(f"{row['id']},{row['input']}\n" for row in asked))
        else:
            write(path, asked)
            if ending.endswith("gz"):
                path.write_bytes(gzip.compress(path.read_bytes(), 0, mtime=0))
        return path

    path, out = written(questions), tmp_path / "out.jsonl"
    size, interrupted_at = path.stat().st_size, 2
    monkeypatch.setattr(files, "_END", 8, raising=False)  # as if the input had megabytes
    interrupted(monkeypatch, predictor, path, out, windows=interrupted_at)
    before = Path(f"{out}.partial").read_bytes()
    questions[100]["input"] = questions[100]["input"][::-1]
    assert written(questions).stat().st_size == size
    with pytest.raises(ValueError, match=r"with another input sha256 \('\w{64}', now '\w{64}'\)\. Repeat that command"):
        files.predict(predictor, input_path=path, output_path=out)
    assert Path(f"{out}.partial").read_bytes() == before


def test_an_input_that_changes_while_it_is_read_is_refused(predictor, tmp_path, monkeypatch):
    path, out = write(tmp_path / "in.jsonl", rows(448)), tmp_path / "out.jsonl"
    answer, seen = predictor.answer, []

    def answering(questions: Any) -> Any:
        seen.append(len(questions))
        if len(seen) == 2:
            write(path, [*rows(447), {"id": "q447", "input": "edited"}])
        return answer(questions)

    monkeypatch.setattr(predictor, "answer", answering)
    with pytest.raises(ValueError, match=r"in\.jsonl was changed while it was being answered"):
        files.predict(predictor, input_path=path, output_path=out)
    assert Path(f"{out}.partial").read_bytes().count(b"\n") == seen[0]  # the window before
    assert not out.exists()


def test_a_journal_of_an_earlier_version_is_refused(predictor, whole, tmp_path, monkeypatch):
    """It has a hash of both ends of the input, and its answers may belong to other questions."""
    out = tmp_path / "out.jsonl"
    interrupted(monkeypatch, predictor, whole[0], out, windows=2)
    about = Path(f"{out}.partial.json")
    found = json.loads(about.read_text())
    found["input"] = {"bytes": found["input"]["bytes"], "sha256 of both ends": "ab" * 32}
    about.write_text(json.dumps(found))
    with pytest.raises(
        ValueError, match=r"of an earlier version, which did not record the whole input.*Remove .*partial"
    ):
        files.predict(predictor, input_path=whole[0], output_path=out)


def test_what_belongs_to_another_run_is_refused(predictor, whole, folder, tmp_path, monkeypatch):
    source, _ = whole
    out = tmp_path / "out.jsonl"
    interrupted(monkeypatch, predictor, source, out, windows=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = tmp_path / "other.jsonl"
    other.write_bytes(source.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"with another input bytes \(.*Repeat that command .* or remove .*partial"):
        files.predict(predictor, input_path=other, output_path=out)
    other.unlink()
    sampling = Predictor.load(folder / "run", settings=Settings(batch_size=8, seed=3, too_long="cut"))
    with pytest.raises(
        ValueError, match=r"another settings seed \(0, now 3\); another settings too_long \('error', now 'cut'\)"
    ):
        files.predict(sampling, input_path=source, output_path=out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # Answers that were changed meanwhile.
    partial = Path(f"{out}.partial")
    partial.write_bytes(before["out.jsonl.partial"].replace(b'"q5"', b'"x5"'))
    with pytest.raises(ValueError, match=r"lacks the answer to line 6 \(id 'q5'\).*Remove .*partial to start"):
        files.predict(predictor, input_path=source, output_path=out)


def test_two_processes_do_not_write_one_output(predictor, whole, tmp_path):
    """Nor by another name; a link stays one, and its file gets the answers."""
    out, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(out)
    with lock.Lock(Path(f"{out}.partial.lock"), of=out):
        for name in (out, link):
            with pytest.raises(lock.HeldError, match=rf"{name} is in use: process \d+"):
                files.predict(predictor, input_path=whole[0], output_path=name)
    files.predict(predictor, input_path=whole[0], output_path=link)
    assert link.is_symlink()
    assert out.read_bytes() == whole[1]


@pytest.mark.slow
def test_killed_anywhere_it_ends_as_if_it_had_not_been(starter, folder, tmp_path):
    """`sbs predict`, killed by SIGKILL as soon as something is written, again and again."""
    source = write(tmp_path / "in.jsonl", [*rows(3000), {"id": "q1", "input": "again"}])
    flags = ["predict", str(folder / "run"), "--input", str(source), "--batch_size", "8"]

    def start(out: Path) -> Any:
        return starter.alone(tmp_path, [*flags, "--output", str(out)], command=toy.SBS)

    with start(tmp_path / "want.jsonl") as process:
        assert process.wait() == command.SOME_ROWS_FAILED, process.complained()
        assert process.said() == f"3000 predictions and 1 rows with errors in {tmp_path / 'want.jsonl'}\n"
        assert "line 3001: id 'q1' is already that of line 2" in process.complained()
    out = tmp_path / "out.jsonl"
    partial = Path(f"{out}.partial")
    for kill in range(2):
        had = partial.stat().st_size if kill else 0
        with start(out) as process:
            processes.until(lambda had=had: partial.exists() and partial.stat().st_size > had, [process])
            process.send(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    with start(out) as process:
        assert process.wait() == command.SOME_ROWS_FAILED, process.complained()
        assert "of these rows were resumed" in process.said()
    assert out.read_bytes() == (tmp_path / "want.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out.jsonl"]


# ------------------------------------------------------------------------------------ other files


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_input_is_never_the_output(predictor, tmp_path, monkeypatch):
    """Also by another name, and where it has a name of the files that lie beside the output."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "in.jsonl", rows(3))
    (tmp_path / "linked.jsonl").symlink_to("in.jsonl")
    (tmp_path / "again.jsonl").hardlink_to(path)
    (tmp_path / "out.jsonl.partial").hardlink_to(path)
    (tmp_path / "other.csv.partial.ids").symlink_to(path)
    before = contents(tmp_path)
    for name in ("in.jsonl", "./in.jsonl", "linked.jsonl", "again.jsonl", "out.jsonl", "other.csv"):
        with pytest.raises(
            ValueError, match=r"is the input, and would be written for the output .*; choose another name"
        ):
            files.predict(predictor, input_path=path, output_path=name)
    with pytest.raises(ValueError, match="is the input"):
        files.predict(predictor, input_path="linked.jsonl", output_path="in.jsonl")
    assert contents(tmp_path) == before


OF_OTHERS = {
    "notes.txt": b"do not lose me\n",
    "rows.jsonl": b'{"id": "a", "input": "b"}\n',
    "graded.jsonl": b'{"id": "a", "input": "b", "target": "c", "prediction": "d", "correct": true, "score": 0.0}\n',
    "rows.csv": b"id,input\na,b\n",
    "out.tsv": b"id,prediction,score\n",
    "out.parquet": b"PAR1 not really",
    "new.jsonl.partial": b'{"id": "a", "input": "b"}\n',
    "other.jsonl.partial.json": b'{"mine": 1}',
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_file_of_others_is_never_replaced(predictor, tmp_path, name):
    path = write(tmp_path / "in.jsonl", rows(3))
    (tmp_path / name).write_bytes(OF_OTHERS[name])
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=rf"{name} exists, and is not what|{name} exists and is no output"):
        files.predict(predictor, input_path=path, output_path=tmp_path / name.partition(".partial")[0])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.tsv", "out.parquet"])
def test_an_earlier_output_is_replaced(predictor, tmp_path, name):
    path, out = write(tmp_path / "in.jsonl", [{"id": "a"}, *rows(3)]), tmp_path / name
    (tmp_path / f"{name}.tmp").write_text("mine")
    out.touch()
    for _ in range(2):
        assert files.predict(predictor, input_path=path, output_path=out).errors == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl", name, f"{name}.tmp"]
    with pytest.raises(FileExistsError, match="is no output of sbs predict"):
        files.predict(predictor, input_path=path, output_path=tmp_path)
    with pytest.raises(ValueError, match="an output is not packed"):
        files.predict(predictor, input_path=path, output_path=tmp_path / f"{name}.gz")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_no_answer_becomes_a_formula_and_every_text_comes_back(predictor, tmp_path, monkeypatch, ending):
    texts = [
        "=HYPERLINK(1)",
        "'=1",
        "+1",
        "-1",
        "@a",
        "\tb",
        "\rc",
        "\nd",
        "\uff1d1",
        "it's",
        "'quoted'",
        "",
        "( 1 - 2 )",
    ]
    asked = [{"id": text, "input": "a"} for text in texts if text]

    def answering(questions: Any) -> list[Answer]:
        return [Answer(id=each.id, prediction=each.id, score=-1.5) for each in questions]

    monkeypatch.setattr(predictor, "answer", answering)
    out = tmp_path / f"out.{ending}"
    files.predict(predictor, input_path=write(tmp_path / "in.jsonl", asked), output_path=out)
    with out.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="," if ending == "csv" else "\t"))
    assert not [row for row in found for name in ("id", "prediction") if row[name][:1] in tuple("=+-@\t\r\n\uff1d")]
    assert [tables.read(row["id"]) for row in found] == [tables.read(row["prediction"]) for row in found]
    assert [tables.read(row["id"]) for row in found] == [row["id"] for row in asked]
    assert {row["score"] for row in found} == {"-1.5"}


# ------------------------------------------------------------------------------------ size


def test_a_line_of_any_length_takes_little_memory(tmp_path):
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": "1", "input": "')
        for _ in range(48):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"id": "2", "input": "y"}\n')
    tracemalloc.start()
    first, second = inputs.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "longer than" in (first.error or "")
    assert (second.line, second.id) == (2, "2")
    assert peak < 6 * 2**20


def peak_of(starter: Any, folder: Path, tmp_path: Path, count: int) -> tuple[float, float]:
    """Measures predicting so many rows: peak MiB, and rows per second."""
    with (tmp_path / "in.jsonl").open("w") as file:
        for number in range(count):
            file.write(json.dumps({"id": f"row {number}", "input": f"{number} a b c"}) + "\n")
    program = (
        "import toy, sys; from benchmarks import harness; from sbs_jax.cli import main; status = main.main(); "
        "print(harness.peak_memory(), file=sys.stderr); sys.exit(status)"
    )
    flags = ["--model", str(folder / "run"), "--input", str(tmp_path / "in.jsonl"), "--batch_size", "64"]
    begin = time.monotonic()
    with starter.alone(
        tmp_path,
        ["predict", *flags, "--output", str(tmp_path / f"{count}.parquet")],
        path=[folder, processes.ROOT / "scripts"],
        command=["-c", program],
    ) as process:
        assert process.wait(1000) == 0, process.complained()
        peak = int(process.complained().split()[-1]) / 2**20
    assert pq.read_metadata(tmp_path / f"{count}.parquet").num_rows == count
    return peak, count / (time.monotonic() - begin)


@pytest.mark.faults
def test_memory_does_not_grow_with_the_file(starter, folder, tmp_path):
    peaks = {count: peak_of(starter, folder, tmp_path, count) for count in (20_000, 200_000)}
    for count, (peak, speed) in peaks.items():
        print(f"{count} rows: peak {peak:.0f} MiB, {speed:.0f} rows/s")
    assert peaks[200_000][0] - peaks[20_000][0] < 64


def test_rows_are_read_as_they_are_needed(tmp_path):
    """No reader reads more than one batch ahead of its consumer."""
    write(tmp_path / "in.jsonl", rows(2000))
    pq.write_table(pa.Table.from_pylist(rows(2000)), tmp_path / "in.parquet")
    for name, most in (("in.jsonl", 200), ("in.parquet", 256)):
        reader = inputs.read(tmp_path / name)
        entries: Iterator[inputs.Entry] = iter(reader)
        next(entries)
        assert reader.total >= 2000
        assert 0 < reader.done < most
