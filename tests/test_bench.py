"""The machinery of the benchmarks: rows, their file and table, sides that take turns, the same work for both."""

import argparse
import doctest
import importlib
import json
import math
import time
from pathlib import Path
from typing import Any

import bench
import pytest
import toy
from builders import decoders

from benchmarks import families as suite_families
from benchmarks import harness, train
from sbs_jax.data import batches, registry
from sbs_jax.student import families
from sbs_jax.training import gin_files
from sbs_jax.weights import hugging_face


def row(**changes) -> harness.Row:
    fields = {"name": "speed", "unit": "1/s", "ours": 600.0, "peer": 400.0, "goal": ">= 1.5", "versions": {"jax": "1"}}
    return harness.Row(**{**fields, **changes})


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
    assert alone.ratio is alone.holds is None
    assert "missing" in harness.table([alone])
    assert "not known" in harness.table([alone])


@pytest.mark.parametrize("goal", ["1.5", "=> 1.5", ">= fast", ">=1.5", ""])
def test_goal_without_comparison_or_number_is_refused(goal: str) -> None:
    with pytest.raises(ValueError, match=r"expected such as '>= 1\.5'"):
        row(goal=goal)


@pytest.mark.parametrize("peer", [0.0, -1.0, float("nan")])
def test_value_of_the_peer_is_positive(peer: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        row(peer=peer)


def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    harness.append(path, [row()])
    harness.append(path, [row(name="memory", peer=None), row()])
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
def test_unusable_file_is_refused_before_the_work_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"bench\.json .*name another file"):
        bench.main(["train", "--output", str(path)])
    assert path.read_text("utf-8") == text


def test_table_of_the_docstring() -> None:
    results = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(harness.table, "table", globs=vars(harness).copy()):
        results.run(example)
    assert results.summarize(verbose=False) == (0, 1)


def test_versions_leave_out_distributions_that_are_not_installed() -> None:
    assert set(harness.versions("jax", "no-such-distribution")) == {"python", "machine", "jax"}


SIDES = """
import sys, time
from benchmarks import harness

def toy(*, name, log, first=0):
    def step(index):
        with open(log, "a") as file:
            file.write(f"{name}{index} ")
        return 10 + index
    return harness.Worker(step, {"name": name})

def dies():
    sys.exit(3)

def sleeps():
    time.sleep(60)

def once(*, text):
    return {"text": text, "peak": harness.peak_memory()}
"""


@pytest.fixture
def toy_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "toy_sides.py").write_text(SIDES, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import toy_sides  # pyright: ignore[reportMissingImports]

    return toy_sides


def test_sides_take_turns(toy_sides, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "log"
    with harness.Sides() as sides:
        for name in "ab":
            sides.start(name, toy_sides.toy, name=name, log=str(log))
        found = sides.compare(rounds=2, steps=2)
    assert log.read_text("utf-8").split() == ["a0", "a1", "b0", "b1", "a2", "a3", "b2", "b3"]
    assert [(turn.tokens, turn.steps) for turn in found["b"].turns] == [(10 + 11, 2), (12 + 13, 2)]
    assert all(turn.per_second == turn.tokens / turn.seconds for turn in found["a"].turns)
    # An interpreter with the standard library, and with pytest as its main module; this process holds TensorFlow.
    assert all(5e6 < each.finish["peak_memory"] < 100e6 for each in found.values())
    assert capsys.readouterr().out.startswith("a: {'name': 'a'}\nb: {'name': 'b'}\na: ")


def test_a_side_without_turns_returns_its_result(toy_sides) -> None:
    assert harness.once(toy_sides.once, text="x" * 100_000)["text"] == "x" * 100_000


def test_side_that_dies_is_named(toy_sides) -> None:
    with pytest.raises(RuntimeError, match="side 'x' ended with status 3"):
        harness.Side("x", toy_sides.dies, options={})


def test_side_that_is_not_ready_in_time_is_ended(toy_sides) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="side 'x' was not ready"):
        harness.Side("x", toy_sides.sleeps, timeout=0.2, options={})
    assert time.monotonic() - start < 30


def test_sides_end_with_the_block(toy_sides, tmp_path: Path) -> None:
    sides = harness.Sides()

    def interrupted() -> None:
        with sides:
            sides.start("x", toy_sides.toy, name="x", log=str(tmp_path / "log"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sides[0].process.exitcode == -9


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
    found = [example for batch in packed for example in train.unpacked(batch)]
    assert len(found) > 3 * 4 * 2
    assert found == expected[: len(found)]
    tokens = sum(len(inputs) + len(targets) for inputs, targets, _ in found)
    assert tokens == sum(batches.count_tokens(batch) for batch in packed)


EXAMPLES: list[train.Example] = [([7, 8, 1], [5, 1], 1), ([9, 1], [6, 4, 2, 1], 1)]


def test_transformers_decoders_read_an_example_as_one_row() -> None:
    """Labels and logits begin with the last token of the shortest input, whose logits nothing needs."""
    assert train.decoder_only_batch(EXAMPLES, start=3) == {
        "input_ids": [[7, 8, 1, 3, 5, 1, 0], [9, 1, 3, 6, 4, 2, 1]],
        "attention_mask": [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]],
        "labels": [[-100, -100, 5, 1, -100], [-100, 6, 4, 2, 1]],
        "logits_to_keep": 5,
    }


def test_transformers_encoder_decoders_read_inputs_and_labels() -> None:
    assert train.encoder_decoder_batch(EXAMPLES) == {
        "input_ids": [[7, 8, 1], [9, 1, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[5, 1, -100, -100], [6, 4, 2, 1]],
    }


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "t5gemma2"])
def test_the_peer_computes_the_loss_of_the_targets(kind: str) -> None:
    """Its model is that of our configuration, and its loss the mean over all target tokens, each read by itself."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-parity` installs it")
    pytest.importorskip("transformers", reason="transformers is not installed; `make test-parity` installs it")
    config = decoders.config(kind)
    model = train.peer_model(hugging_face.config_json(config, dtype="float32"), attention="sdpa").eval()
    count = sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert count == sum(math.prod(leaf.shape) for leaf in families.abstract(config)[1].values())

    def loss(examples: list[train.Example]) -> float:
        if model.config.is_encoder_decoder:
            made = train.encoder_decoder_batch(examples)
        else:
            made = train.decoder_only_batch(examples, start=config.decoder_start)
        arguments = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in made.items()}
        return model(**arguments).loss.item()

    alone = [loss([example]) * len(example[1]) for example in EXAMPLES]
    assert loss(EXAMPLES) == pytest.approx(sum(alone) / sum(len(example[1]) for example in EXAMPLES), rel=1e-5)


def test_padding_is_to_the_longest_row() -> None:
    assert harness.padded([[5, 1], [4], [7, 8, 1]], padding=-100) == [[5, 1, -100], [4, -100, -100], [7, 8, 1]]
    assert harness.padded([[5, 1], [4]], padding=0, least=3) == [[5, 1, 0], [4, 0, 0]]


def test_a_suite_measures_without_a_peer(toy_sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the suite's own code with its side replaced."""

    def start(self, name: str, side, *, work: str, **_) -> None:
        self.append(harness.Side(name, toy_sides.toy, options={"name": name, "log": work}))

    monkeypatch.setattr(harness.Sides, "start", start)
    monkeypatch.setattr(train, "PEER_NEEDS", ("no_such_package",))
    output = tmp_path / "bench.json"
    assert bench.main(["train", "--rounds", "2", "--steps", "1", "--output", str(output)]) == 0
    rows = json.loads(output.read_text("utf-8"))
    assert [(entry["name"], entry["goal"], entry["holds"]) for entry in rows] == [
        ("train_tokens_per_s_vs_pytorch", ">= 1.5", None),
        ("train_peak_memory_vs_pytorch", "< 1", None),
    ]
    assert all(entry["ours"] > 0 and entry["peer"] is None for entry in rows)


def test_families_are_compared_by_examples_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial has fewer layers; a step is 32 examples, so 2 s a step are 16 of them a second and 4 s are 8."""
    asked: list[tuple[str, list[str]]] = []

    def compared(arguments, *, model: str, extra: list[str]) -> list[harness.Result]:
        del arguments
        asked.append((model, extra))
        return [harness.Result([harness.Turn(seconds, 1, 1)], {}) for seconds in (2.0, 4.0)]

    monkeypatch.setattr(train, "compared", compared)
    parser = argparse.ArgumentParser()
    suite_families.add_options(parser)
    rows = list(suite_families.measure(parser.parse_args(["--layers", "2", "--binding", "VOCAB_SIZE=512"])))
    assert [(each.name, each.ours, each.peer, each.holds) for each in rows] == [
        ("smollm2_train_vs_transformers", 16.0, 8.0, True),
        ("t5gemma2_270m_train_vs_transformers", 16.0, 8.0, True),
    ]
    for (model, extra), layers in zip(asked, ({"decoder": 2}, {"encoder": 2, "decoder": 2}), strict=True):
        files = [f"gin_configs/{file}.gin" for file in ("runs/train", f"models/{model}", "methods/step_by_step")]
        given = train.bindings("folder", vocabulary="byte", DTYPE="float32")
        config, _ = gin_files.configure("train.TrainConfig", gin_files=files, bindings=[*given, *extra])
        assert (config.model.stack_layers, config.model.vocab_size, config.batch_size) == (layers, 512, train.ROWS)


def test_memory_of_a_step_is_a_row_with_and_without_chunks() -> None:
    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed: pip install libtpu")
    tpu: Any = importlib.import_module("benchmarks.tpu")
    fits = {"gib": 3.0, "available_gib": 15.75, "cycles": 1, "mfu": 0.25}
    for name, chunks in (("whole", 1), ("chunked", 8)):
        work = f"t5gemma2_270m_{name}"
        assert tpu.WORK[work].config().vocabulary_chunks == chunks
        memory, mfu = tpu.rows(work, fits, {})
        assert (memory.name, memory.ours, memory.peer) == (f"t5gemma2_270m_step_gib_{name}", 3.0, 15.75)
        assert (mfu.name, mfu.ours) == (f"tpu_mfu_{work}", 0.25)
        (memory,) = tpu.rows(work, {"gib": 20.0, "available_gib": 15.75}, {})
        assert memory.holds is False
        with pytest.raises(ValueError, match="was not compiled"):
            list(tpu.rows(work, {"refused": "no"}, {}))


@pytest.mark.parametrize("suite", bench.SUITES)
def test_every_suite_has_options(suite: str, capsys: pytest.CaptureFixture) -> None:
    if suite == "tpu":
        pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed: pip install libtpu")
    with pytest.raises(SystemExit) as end:
        bench.main([suite, "--help"])
    assert end.value.code == 0
    assert "--output" in capsys.readouterr().out
