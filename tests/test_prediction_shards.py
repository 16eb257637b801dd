"""Answers of several processes to one file: a shard each, equal to the output of one process."""

import csv
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy

from sbs_jax import hosts
from sbs_jax.cli.commands import predict as command
from sbs_jax.prediction import files, inputs
from sbs_jax.prediction.engine import Predictor, Settings
from sbs_jax.prediction.shards import Shard

BATCH = 4
ROWS = 448  # seven windows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_untrained(tmp_path_factory.mktemp("student")).parent


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.load(folder / "run", settings=Settings(batch_size=BATCH))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions, with a bad row in the first half and an id of the first half again in the second."""
    chosen = random.Random(0)
    rows: list[dict[str, Any]] = [
        {"id": f"q{number}", "input": "".join(chosen.choices("abcdefgh ", k=chosen.randrange(1, 38)))}
        for number in range(ROWS)
    ]
    rows[130] = {"id": "q130"}
    rows[400] = {"id": "q7", "input": "again"}
    path = tmp_path_factory.mktemp("questions") / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


As = Callable[[int, int], Any]


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> As:
    """Lets this process act as one of several that need not wait for each other."""
    return lambda index, count: monkeypatch.setattr(hosts, "numbered", lambda: (index, count))


@pytest.fixture(scope="module")
def whole(predictor: Predictor, source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The answers of one process."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert files.predict(predictor, input_path=source, output_path=out) == files.Summary(rows=ROWS, errors=2, resumed=0)
    return out.read_bytes()


def shards_of(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{out.name}-*"))


# ------------------------------------------------------------------------------- real processes


def test_two_processes_one_killed_write_the_shards_of_one_output(starter, folder, source, tmp_path):
    """Byte for byte, with the processes of the first start killed or ended in the middle."""
    flags = ["predict", str(folder / "run"), "--input", str(source), "--batch_size", str(BATCH)]
    options = {"command": toy.SBS, "devices": 2}
    want, out = tmp_path / "want.jsonl", tmp_path / "out.jsonl"
    done = starter.run(tmp_path, [*flags, "--output", str(want)], **options)
    assert done.returncode == command.SOME_ROWS_FAILED, done.stderr
    flags += ["--output", str(out)]
    journals = [Path(f"{out}-0000{index}-of-00002.partial") for index in range(2)]
    with starter.together(tmp_path, flags, count=2, **options) as running:
        processes.until(lambda: all(path.exists() and path.stat().st_size for path in journals), running)
        running[1].send(signal.SIGKILL)
        assert running[1].wait() == -signal.SIGKILL
        assert running[0].wait(60) == 1
        assert "Lost contact with process 1 of 2" in running[0].complained()
    assert not shards_of(out) or all(".partial" in path.name for path in shards_of(out))
    answered = sum(path.read_bytes().count(b"\n") for path in journals)
    assert 0 < answered < ROWS
    refused = starter.run(tmp_path, flags, **options)
    assert refused.returncode == 1
    assert "of an interrupted run of 2 processes, and this one has 1 process. Repeat it with 2" in refused.stderr
    with starter.together(tmp_path, flags, count=2, **options) as running:
        assert [each.wait() for each in running] == [command.SOME_ROWS_FAILED] * 2, running[0].complained()
        said = [each.said() for each in running]
    assert said == [
        f"446 predictions and 2 rows with errors in {out}-*-of-00002 ({answered} of these rows were resumed)\n",
        "",
    ]
    assert [path.name for path in shards_of(out)] == ["out.jsonl-00000-of-00002", "out.jsonl-00001-of-00002"]
    assert b"".join(path.read_bytes() for path in shards_of(out)) == want.read_bytes()
    assert b"id 'q7' is already that of line 8" in shards_of(out)[1].read_bytes()


# ----------------------------------------------------------------------------------- this process


@pytest.mark.parametrize("count", [2, 3, 9])
def test_shards_in_order_are_the_output_of_one_process(predictor, source, whole, tmp_path, as_process, count):
    """Also of more processes than there are windows: then some shards are empty."""
    out, errors = tmp_path / "out.jsonl", []
    for index in reversed(range(count)):
        as_process(index, count)
        errors.append(files.predict(predictor, input_path=source, output_path=out).errors)
    assert [path.name for path in shards_of(out)] == [f"out.jsonl-{n:05d}-of-{count:05d}" for n in range(count)]
    assert b"".join(path.read_bytes() for path in shards_of(out)) == whole
    assert sum(errors) == 2
    sizes = [path.read_bytes().count(b"\n") for path in shards_of(out)]
    assert max(sizes) == -(-7 // count) * 16 * BATCH


def test_shards_of_tables_have_the_format_of_the_output(predictor, source, whole, tmp_path, as_process):
    want = [json.loads(line) for line in whole.splitlines()]
    for index in range(2):
        as_process(index, 2)
        for ending in ("csv", "parquet"):
            for _ in range(2):  # an earlier output is replaced
                files.predict(predictor, input_path=source, output_path=tmp_path / f"out.{ending}")
    tables = [pq.read_table(path) for path in shards_of(tmp_path / "out.parquet")]
    assert pa.concat_tables(tables).column("prediction").to_pylist() == [row.get("prediction") for row in want]
    ids = []
    for path in shards_of(tmp_path / "out.csv"):
        with path.open(newline="") as file:
            ids += [row["id"] for row in csv.DictReader(file)]
    assert ids == [row["id"] for row in want]


def test_the_windows_of_shards_are_all_windows_once():
    for total in (0, 1, 7, 100):
        for count in (1, 2, 3, 16):
            blocks = [Shard(index, count).windows(total) for index in range(count)]
            assert [number for block in blocks for number in block] == list(range(total))
            assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.mark.parametrize("ended_at", [1, 2])
def test_ended_while_shards_get_their_names_no_answer_is_lost(
    predictor, source, whole, tmp_path, as_process, monkeypatch, ended_at
):
    """The first barrier is before any shard has its name, the second before any journal is removed."""
    out = tmp_path / "out.jsonl"
    as_process(1, 2)
    barriers: Iterator[int] = iter(range(1, 3))

    def barrier() -> None:
        if next(barriers) == ended_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hosts, "barrier", barrier)
        with pytest.raises(KeyboardInterrupt):
            files.predict(predictor, input_path=source, output_path=out)
    shard = tmp_path / "out.jsonl-00001-of-00002"
    assert shard.exists() == (ended_at == 2)
    done = files.predict(predictor, input_path=source, output_path=out)
    assert done.resumed == done.rows == 256
    assert whole.endswith(shard.read_bytes())
    assert shards_of(out) == [shard]


REFUSED = {
    "journal of three": ("-00002-of-00003.partial", (0, 2), "run of 3 processes, and this one has 2 processes. Repeat"),
    "journal of one": (
        ".partial",
        (1, 2),
        r"run of 1 process, and this one has 2 processes\. Repeat it with 1 process",
    ),
    "shard of three": ("-00000-of-00003", (0, 2), "is the output of 3 processes, and this run has 2 processes"),
    "output of one": (
        "",
        (0, 2),
        "is the output of 1 process, and this run has 2 processes.* remove the earlier f",
    ),
    "shard for one": ("-00000-of-00002", (0, 1), "is the output of 2 processes, and this run has 1 process, whose"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_of_another_number_of_processes_are_refused(predictor, source, tmp_path, as_process, kind):
    ending, place, message = REFUSED[kind]
    name = f"out.jsonl{ending}"
    (tmp_path / name).write_text('{"id": "a", "prediction": "b", "score": 0.0}\n')
    (tmp_path / "out.jsonl-notes").write_text("of somebody else")
    as_process(*place)
    with pytest.raises(FileExistsError, match=rf"{name} .*{message}"):
        files.predict(predictor, input_path=source, output_path=tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.jsonl-notes"])


def test_the_journal_of_another_shard_is_refused(predictor, source, tmp_path, as_process, monkeypatch):
    out = tmp_path / "out.jsonl"
    as_process(0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "barrier", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            files.predict(predictor, input_path=source, output_path=out)
    for ending in ("", ".json"):
        Path(f"{out}-00000-of-00002.partial{ending}").rename(f"{out}-00001-of-00002.partial{ending}")
    as_process(1, 2)
    with pytest.raises(ValueError, match=r"with another shard index \(0, now 1\)"):
        files.predict(predictor, input_path=source, output_path=out)


def test_each_process_reads_the_input_as_a_stream(predictor, source, tmp_path, as_process, monkeypatch):
    """No more than a window of entries is alive at a time, while windows are counted too."""
    alive, most = 0, 0

    class Counted(inputs.Entry):
        def __init__(self, **fields: Any) -> None:
            nonlocal alive, most
            super().__init__(**fields)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(inputs, "Entry", Counted)
    as_process(1, 2)
    files.predict(predictor, input_path=source, output_path=tmp_path / "out.jsonl")
    assert 16 * BATCH <= most <= 3 * 16 * BATCH
