"""The benchmark of the teacher: its sides do the stated work, and its rows have the goals' names."""

import json
import sys
from pathlib import Path

import bench
import pytest
import teacher_server

from benchmarks import harness, teacher


@pytest.mark.parametrize("side", ["sampler", "client", "bare"])
def test_sides_ask_as_often_as_told_and_as_many_at_once(side: str) -> None:
    if side != "bare":
        pytest.importorskip("openai", reason="the extra `teacher` is not installed")
    with teacher_server.served(answer=lambda prompt: teacher.REPLY, latency=0.02) as server:
        found = getattr(teacher, f"side_{side}")(url=server.url, requests=40, concurrency=8)
        assert (server.asked, server.most_in_flight) == (40, 8)
        asked = {body["messages"][-1]["content"] for body in server.bodies}
    assert len(asked) == (1 if side == "bare" else 40)
    # 32 replies come after the start of 8, in four rounds of 20 ms at least.
    assert 0 < found["per_second"] <= 32 / (4 * 0.02)
    assert found["whole_per_second"] <= 40 / (5 * 0.02)


def test_a_meter_leaves_out_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 7.0, 7.0])
    monkeypatch.setattr(teacher.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(teacher.time, "process_time", iter([0.0, 1.0, 1.5]).__next__)
    meter = teacher.Meter(2)
    for _ in range(6):
        meter.count()
    assert meter.found() == {"per_second": 4 / 2, "cpu_ms": 1000 * 0.5 / 4, "whole_per_second": 6 / 7}


def test_a_store_is_filled_up_to_the_last_rows(tmp_path: Path) -> None:
    assert teacher.side_fill(folder=str(tmp_path), requests=600) == {"stored": 590}
    # It raises unless 590 replies are found; twice, as the first run is to leave the store as it is.
    for _ in range(2):
        assert teacher.side_resume(folder=str(tmp_path), requests=600)["seconds"] > 0
    assert len((tmp_path / "esnli" / "train.jsonl").read_text("utf-8").splitlines()) == 600


@pytest.mark.slow
def test_sbs_teach_finds_what_is_stored(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the extra `teacher` is not installed")
    teacher.side_fill(folder=str(tmp_path), requests=60)
    assert teacher.first_request(str(tmp_path), 60) > 0


def test_a_side_is_a_process_of_its_own() -> None:
    peak = harness.once(teacher.side_memory, requests=20, concurrency=4)["peak_mib"]
    assert 10 < peak < 100  # this process holds TensorFlow


CURATOR = f"""#!{sys.executable}
import json, sys
given = json.load(sys.stdin)
assert sys.argv[1].endswith("curator.py")
assert (len(given["last"]), given["concurrency"]) == (20, 5)
print(json.dumps({{"whole_per_second": 20.0, "version": "0", "counted": False}}))
"""


@pytest.mark.parametrize("with_curator", [True, False])
def test_rows_are_those_of_the_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, with_curator
) -> None:
    """Runs the suite's own code with its sides replaced."""
    sides = {
        "side_sampler": {"per_second": 50.0, "whole_per_second": 40.0, "cpu_ms": 1.5, "peak_mib": 60.0},
        "side_client": {"per_second": 60.0, "cpu_ms": 1.2},
        "side_bare": {"per_second": 100.0, "cpu_ms": 0.1},
        "side_fill": {"stored": 90},
        "side_resume": {"seconds": 5.0, "peak_mib": 60.0},
    }

    def once(side, **options):
        if side is teacher.side_memory:
            return {"peak_mib": 55.0 if options["requests"] == 7 else 50.0}
        return sides[side.__name__]

    stand_in = tmp_path / "some-python"
    stand_in.write_text(CURATOR, "utf-8")
    stand_in.chmod(0o755)
    monkeypatch.setattr(harness, "once", once)
    monkeypatch.setattr(teacher, "first_request", lambda folder, count: 9.0)
    monkeypatch.setattr(teacher.importlib.util, "find_spec", lambda name: True if name == "openai" else None)
    output = tmp_path / "bench.json"
    flags = ["--requests", "20", "--concurrency", "5", "--few", "3", "--many", "7", "--output", str(output)]
    flags += ["--curator", str(stand_in)] if with_curator else []
    assert bench.main(["teacher", *flags]) == 0
    rows = json.loads(output.read_text("utf-8"))
    assert [(row["name"], row["peer"], row["holds"]) for row in rows] == [
        ("teacher_throughput_vs_ideal", 5 / 0.05, False),
        ("teacher_cpu_ms_per_request", 1.0, True),
        ("teacher_memory_100k_vs_1k", 50.0, True),
        ("teacher_resume_549k_s", 10.0, True),
        ("teacher_throughput_vs_curator", 20.0 if with_curator else None, True if with_curator else None),
    ]
    assert [row["ours"] for row in rows] == [50.0, pytest.approx(0.3), 55.0, 5.0, 40.0]
    said = capsys.readouterr().out
    assert "of the rate of a bare loop against this server: 50%; of the ideal: 50.0%" in said
    assert ("curator is not measured" in said) is not with_curator
