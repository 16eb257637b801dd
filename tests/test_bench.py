"""The machinery of the benchmarks: rows, their file and table, sides that work in turns, the same work for both."""

import doctest
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import toy

from sbs_jax import bench
from sbs_jax.data import batches, registry

REPOSITORY = Path(__file__).resolve().parents[1]


def row(**changes) -> bench.Row:
    fields = {"name": "speed", "unit": "1/s", "ours": 600.0, "peer": 400.0, "goal": ">= 1.5", "versions": {"jax": "1"}}
    return bench.Row(**{**fields, **changes})


@pytest.mark.parametrize(
    ("ours", "goal", "holds"),
    [
        (600.0, ">= 1.5", True),
        (599.0, ">= 1.5", False),
        (400.0, "< 1", False),
        (399.0, "< 1", True),
        (400.0, "<= 1", True),
        (400.0, "> 1", False),
    ],
)
def test_goal_is_about_the_ratio_to_the_peer(ours: float, goal: str, holds: bool) -> None:
    assert row(ours=ours, goal=goal).holds is holds


def test_without_a_peer_nothing_is_claimed() -> None:
    alone = row(peer=None)
    assert alone.ratio is None
    assert alone.holds is None
    assert "missing" in bench.table([alone])
    assert "not known" in bench.table([alone])


@pytest.mark.parametrize("goal", ["1.5", "=> 1.5", ">= fast", ">=1.5", ""])
def test_goal_that_says_nothing_is_refused(goal: str) -> None:
    with pytest.raises(ValueError, match=r"expected such as '>= 1\.5'"):
        row(goal=goal)


@pytest.mark.parametrize("peer", [0.0, -1.0, float("nan")])
def test_value_of_the_peer_is_positive(peer: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        row(peer=peer)


def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    bench.append(path, [row()])
    bench.append(path, [row(name="memory", peer=None), row()])
    rows = json.loads(path.read_text("utf-8"))
    assert [entry["name"] for entry in rows] == ["speed", "memory", "speed"]
    assert rows[0] == {
        "name": "speed",
        "unit": "1/s",
        "ours": 600.0,
        "peer": 400.0,
        "ratio": 1.5,
        "goal": ">= 1.5",
        "holds": True,
        "versions": {"jax": "1"},
    }
    assert rows[1]["ratio"] is rows[1]["holds"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize("text", ["[{", "{}", ""])
def test_file_that_holds_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"bench\.json .*name another file"):
        bench.append(path, [row()])
    assert path.read_text("utf-8") == text


def test_table_of_the_docstring() -> None:
    results = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(bench.table, "table", globs=vars(bench).copy()):
        results.run(example)
    assert results.summarize(verbose=False) == (0, 1)


def test_versions_leave_out_what_is_not_installed() -> None:
    found = bench.versions("jax", "no-such-distribution")
    assert set(found) == {"python", "machine", "jax"}


def side(name: str, body: str) -> bench.Side:
    """A side whose work is written to the file `body` names, or that does whatever `body` does."""
    return bench.Side(name, [sys.executable, "-c", f"import sys\nfrom sbs_jax import bench\n{body}"])


SERVING = """
stream = bench.protocol()
print("not part of the protocol")
def step(index):
    with open({log!r}, "a") as log:
        log.write("{name}%d " % index)
    return 10 + index
bench.serve(step, ready={{"name": {name!r}}}, stream=stream)
"""


def test_sides_work_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    log = tmp_path / "log"
    sides = []
    with bench.started(sides):
        sides += [side(name, SERVING.format(log=str(log), name=name)) for name in "ab"]
        assert [each.ready for each in sides] == [{"name": "a"}, {"name": "b"}]
        rounds = bench.in_turns(sides, rounds=2, steps=2)
        peaks = [each.finish() for each in sides]
    assert log.read_text("utf-8").split() == ["a0", "a1", "b0", "b1", "a2", "a3", "b2", "b3"]
    assert [(each.tokens, each.steps) for each in rounds["b"]] == [(10 + 11, 2), (12 + 13, 2)]
    assert all(each.tokens_per_second == each.tokens / each.seconds for each in rounds["a"])
    # An interpreter with nothing but the standard library; this process holds TensorFlow.
    assert all(5e6 < peak < 100e6 for peak in peaks)


def test_side_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    with pytest.raises(RuntimeError, match="side 'x' ended with status 3"):
        side("x", "sys.exit(3)")


def test_side_that_is_not_ready_in_time_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="side 'x' ended with status -9"):
        bench.Side("x", [sys.executable, "-c", "import time\ntime.sleep(60)"], patience=0.2)
    assert time.monotonic() - start < 30


def test_patience_ends_with_the_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    body = "from sbs_jax import bench\nbench.serve(lambda index: 7, ready={}, stream=bench.protocol())"
    sides = []
    with bench.started(sides):
        sides.append(bench.Side("x", [sys.executable, "-c", body], patience=3.0))
        time.sleep(3.2)
        assert sides[0].work(1).tokens == 7


def test_sides_are_ended_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    sides = []

    def interrupted() -> None:
        with bench.started(sides):
            sides.append(side("x", "print('{}', flush=True)\nimport time\ntime.sleep(60)"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sides[0].ended


def test_both_sides_get_the_same_examples(tmp_path: Path) -> None:
    """The examples of packed batches are those of the unpacked stream, in order."""
    registry.configure(toy.options(toy.write_records(tmp_path)))

    def first(count: int, *, pack: bool, lengths: dict[str, int]) -> list[dict]:
        stream = batches.train_dataset(
            "toy_step_by_step", lengths=lengths, split="train", batch_size=4, pack=pack, seed=0, skip_batches=0
        )
        return [next(stream) for _ in range(count)]

    packed = first(3, pack=True, lengths={"inputs": 64, "targets": 48})
    expected = []
    for batch in first(12, pack=False, lengths=dict(toy.DATASET.feature_lengths)):
        for inputs, targets, tasks in zip(
            batch["encoder_input_tokens"], batch["decoder_target_tokens"], batch["decoder_task_ids"], strict=True
        ):
            expected.append((inputs[inputs > 0].tolist(), targets[targets > 0].tolist(), int(tasks[0])))
    found = [example for batch in packed for example in bench.unpacked(batch)]
    assert len(found) > 3 * 4 * 2
    assert found == expected[: len(found)]
    tokens = sum(len(inputs) + len(targets) for inputs, targets, _ in found)
    assert tokens == sum(batches.count_tokens(batch) for batch in packed)


def test_padding_is_to_the_longest_row() -> None:
    assert bench.padded([[5, 1], [4], [7, 8, 1]], padding=-100) == [[5, 1, -100], [4, -100, -100], [7, 8, 1]]
    assert bench.padded([[5, 1], [4]], padding=0, least=3) == [[5, 1, 0], [4, 0, 0]]


def test_script_measures_without_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's own part; sides are stood in for."""
    spec = importlib.util.spec_from_file_location("bench_script", REPOSITORY / "scripts" / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "bench_ours.py").write_text(
        "import sys\nfrom sbs_jax import bench\nassert '--work' in sys.argv\n"
        "bench.serve(lambda index: 100, ready={}, stream=bench.protocol())\n",
        "utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    monkeypatch.setattr(script, "PEER_NEEDS", ("no_such_package",))
    output = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "2", "--steps", "1", "--output", str(output)])
    assert script.main() == 0
    rows = json.loads(output.read_text("utf-8"))
    assert [(entry["name"], entry["goal"], entry["holds"]) for entry in rows] == [
        ("train_tokens_per_s_vs_pytorch", ">= 1.5", None),
        ("train_peak_memory_vs_pytorch", "< 1", None),
    ]
    assert all(entry["ours"] > 0 and entry["peer"] is None for entry in rows)
