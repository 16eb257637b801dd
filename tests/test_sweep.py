"""`sbs sweep`: its cells, what it refuses, its processes; and the cells of the paper's tables and figures."""

import contextlib
import itertools
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import toy
from builders import garden
from builders.finished_runs import unmeasured

from sbs_jax import sweep
from sbs_jax.cli import main
from sbs_jax.data import catalogue
from sbs_jax.run import directory
from sbs_jax.storage import lock
from sbs_jax.sweep import running
from sbs_jax.training import gin_files

PAPER = Path("gin_configs/experiments/paper")
METHODS = ("standard_finetuning", "step_by_step")
DATASETS = ("esnli", "anli1", "cqa", "svamp")
SIZES = ("base", "large", "xxl")
RECORDED = re.compile(r"(\d+) cells\.", re.MULTILINE)


def a_sweep(**changes: Any) -> sweep.Sweep:
    fields: dict[str, Any] = {
        "sweep_dir": "runs",
        "records_dir": "records",
        "datasets": ("svamp", "cqa"),
        "sizes": ("cpu",),
        "methods": METHODS,
        "fractions": (0.5, 1.0),
        "seeds": (0, 1),
    }
    return sweep.Sweep(**{**fields, **changes})


# ------------------------------------------------------------------------------------ the cells


def test_cells_are_every_combination_and_comparable_ones_stand_together() -> None:
    names = [cell.name for cell in a_sweep(axes={"ALPHA": (0.3, 0.5)}).cells()]
    assert len(names) == len(set(names)) == 2 * 2 * 2 * 2 * 2
    assert names[:5] == [
        "svamp-cpu-standard_finetuning-ALPHA=0.3-1-0",
        "svamp-cpu-standard_finetuning-ALPHA=0.5-1-0",
        "svamp-cpu-step_by_step-ALPHA=0.3-1-0",
        "svamp-cpu-step_by_step-ALPHA=0.5-1-0",
        "svamp-cpu-standard_finetuning-ALPHA=0.3-1-1",
    ]


def test_folds_are_cells_of_their_own() -> None:
    cells = a_sweep(datasets=("svamp",), seeds=(0,), fractions=(1.0,), folds=3).cells()
    assert [cell.name for cell in cells[:4]] == [
        "svamp-cpu-standard_finetuning-1-0-fold0",
        "svamp-cpu-standard_finetuning-1-0-fold1",
        "svamp-cpu-standard_finetuning-1-0-fold2",
        "svamp-cpu-step_by_step-1-0-fold0",
    ]
    options = cells[1].configured()[0].data
    assert (options.folds, options.fold) == (3, 1)
    assert len(sweep.check_configurations(cells)) == 2  # one of each method
    both = a_sweep(datasets=("svamp",), fractions=(1.0,), folds=2).cells()
    both = sweep.groups(both, jobs=1, together=None)
    assert both[1].name == "svamp-cpu-standard_finetuning-1-0,1-fold1"
    assert "--gin.MODEL_DIR='runs/runs/svamp-cpu-standard_finetuning-1-{seed}-fold1'" in both[1].arguments()
    assert "--gin.FOLD=1" in both[1].arguments()
    with pytest.raises(ValueError, match=r"Sweep\.folds is 1"):
        a_sweep(folds=1)
    with pytest.raises(ValueError, match="A sweep sets FOLDS itself"):
        a_sweep(bindings={"FOLDS": 3})


def test_a_cell_is_configured_as_its_name_says() -> None:
    """Texts keep their type, placeholders are filled, references stay gin's."""
    bindings = {"RATIONALES": "agreeing", "OPTIMIZER": "@optax.adafactor", "TRAIN_STEPS": 7, "LABEL_PREFIX": "(1)"}
    cells = a_sweep(
        sizes=("base",),
        axes={"ALPHA": (0.3,)},
        bindings=bindings,
        initial_checkpoint_path="points/{dataset}/t5-{size}",
        vocabulary="byte",
    ).cells()
    cell = next(c for c in cells if c.name == "cqa-base-step_by_step-ALPHA=0.3-0.5-1")
    config, _ = cell.configured()
    assert (config.alpha, config.data.fraction, config.data.seed, config.seed) == (0.3, 0.5, 1, 1)
    assert (config.data.rationales, config.train_steps, config.mixture_or_task_name) == (
        "agreeing",
        7,
        "cqa_step_by_step",
    )
    assert config.data.label_prefix == "(1)"  # which unquoted is a number of gin
    assert config.initial_checkpoint_path == "points/cqa/t5-base"
    assert config.model_dir == "runs/runs/cqa-base-step_by_step-ALPHA=0.3-0.5-1"
    assert "adafactor" in str(config.optimizer)


def test_a_folder_of_a_dataset_brings_its_experiment_and_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    garden.write_folder(Path("data/garden"))
    changes = {"datasets": ("data/garden",), "sizes": ("laptop",), "records_dir": None, "seeds": (0,)}
    cells = a_sweep(**changes, fractions={"data/garden": (1.0,)}, vocabulary="{dataset}.model").cells()
    assert [cell.name for cell in cells] == [f"garden-laptop-{method}-1-0" for method in METHODS]
    assert cells[0].configured()[0].data.vocabulary == "garden.model"
    kinds = sweep.check_configurations(a_sweep(**changes).cells())
    sweep.check_inputs(kinds)
    assert {config.data.records_dir for _, config in kinds} == {"data/garden/records"}
    given = ["sweep", "--gin_file=gin_configs/experiments/own/methods.gin", "--gin.SWEEP_DIR=runs", "--dry_run"]
    assert main.main([*given, "--dataset", "data/garden"]) == 0
    assert "6 cells: 6 new." in capsys.readouterr().out
    assert main.main([*given, "--dataset", "data/garden", "--records_dir", "elsewhere", "--print"]) == 0
    assert capsys.readouterr().out.count("RECORDS_DIR='\"'\"'elsewhere") == 6
    shutil.copytree("data/garden", "garden")
    with pytest.raises(ValueError, match=r"names of Sweep\.datasets has 'garden' twice"):
        a_sweep(**{**changes, "datasets": ("garden", "data/garden")}).cells()
    catalogue._DATASETS.pop("garden")


def test_cells_that_differ_only_in_seed_share_processes() -> None:
    cells = a_sweep(datasets=("svamp",), seeds=tuple(range(5)), fractions=(0.5,)).cells()
    names = [group.name for group in sweep.groups(cells, jobs=2, together=None)]
    kinds = [f"svamp-cpu-{method}-0.5" for method in METHODS]
    assert names == [f"{kind}-{seeds}" for kind in kinds for seeds in ("0,1,2", "3,4")]
    assert [len(group.cells) for group in sweep.groups(cells, jobs=1, together=4)] == [4, 1, 4, 1]
    single = sweep.groups(cells, jobs=8, together=None)
    assert [group.arguments() for group in single] == [group.cells[0].arguments() for group in single]
    assert sorted(group.name for group in single) == sorted(cell.name for cell in cells)
    first = sweep.groups(cells, jobs=2, together=None)[0]
    assert f"--gin.MODEL_DIR='runs/runs/{kinds[0]}-{{seed}}'" in first.arguments()
    assert first.arguments()[-1] == "--seeds=0,1,2"
    assert not any(argument.startswith("--gin.SEED") for argument in first.arguments())
    assert sweep.listed([first]) == f"3 seeds in one process: {kinds[0]}-0,1,2\n"


class Processes(sweep.Workers):
    """In the place of Workers: each process trains its seeds up to one that fails, or none."""

    def __init__(self, failing: dict[str, tuple[int, int]]) -> None:
        self.failing, self.started, self._ended = failing, [], []  # failing: seed and status, by group

    def start(self, name: str, arguments: list[str], *, log: Path) -> None:
        self.started.append(name)
        seed, status = self.failing.get(name, (None, 0))
        kind, _, seeds = name.rpartition("-")
        for number in seeds.split(","):
            if number == str(seed):
                break
            run = log.parents[1] / "runs" / f"{kind}-{number}"
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text('{"kind": "test", "step": 1, "accuracy": 50.0}\n')
        self._ended.append((name, status))

    def ended(self, *, timeout: float) -> Iterator[tuple[str, int]]:
        while self._ended:
            yield self._ended.pop()


def test_a_seed_that_fails_does_not_end_the_others_of_its_process(tmp_path: Path) -> None:
    cells = a_sweep(
        sweep_dir=str(tmp_path), datasets=("svamp",), methods=METHODS[:1], fractions=(1.0,), seeds=(0, 1, 2, 3)
    ).cells()
    kind = "svamp-cpu-standard_finetuning-1"
    started: Any = Processes({f"{kind}-0,1,2,3": (1, -9)})
    found = list(sweep.run(sweep.groups(cells, jobs=1, together=None), started, jobs=1))
    assert started.started == [f"{kind}-0,1,2,3", f"{kind}-2,3"]
    assert [(each.cell.seed, each.status, each.number) for each in found] == [
        (0, 0, 1),
        (1, -9, 2),
        (2, 0, 3),
        (3, 0, 4),
    ]
    assert found[3].result == "accuracy 50.0"
    assert f"{kind}-0,1,2,3.log" in found[1].last_words()
    # Preempted: all that were not trained have saved or not begun.
    shutil.rmtree(tmp_path)
    started = Processes({f"{kind}-0,1,2,3": (1, 75)})
    found = list(sweep.run(sweep.groups(cells, jobs=1, together=None), started, jobs=1))
    assert [(each.cell.seed, each.result) for each in found][1:] == [
        (seed, "preempted, and saved") for seed in (1, 2, 3)
    ]


def test_fractions_may_differ_between_datasets() -> None:
    cells = a_sweep(fractions={"svamp": (0.2, 1.0), "cqa": (1.0,)}, seeds=(0,), methods=("step_by_step",)).cells()
    assert [(cell.dataset, cell.fraction) for cell in cells] == [("svamp", 1.0), ("svamp", 0.2), ("cqa", 1.0)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": (0, 1, 0)}, "seeds has 0 twice"),
        ({"methods": "step_by_step"}, "expected a tuple"),
        ({"datasets": ()}, "expected a tuple of one or more"),
        ({"fractions": (0.5, 1.5)}, "Sweep.fractions is 1.5; expected a number above 0 and at most 1"),
        ({"seeds": (0, True)}, "Sweep.seeds is True; expected a whole number"),
        ({"fractions": {"svamp": (1.0,)}}, "has none for 'cqa'"),
        ({"fractions": {"svamp": (1.0,), "cqa": (1.0,), "cqq": (1.0,)}}, "'cqq'.*Did you mean 'cqa'"),
        ({"axes": {"SEED": (1, 2)}}, "sets SEED itself"),
        ({"axes": {"ALPHA": (0.1,)}, "bindings": {"ALPHA": 0.2}}, "among axes and among bindings"),
    ],
)
def test_refuses_lists_that_make_no_table(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        a_sweep(**changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"datasets": ("svanp",)}, r"Did you mean .*experiments/svamp/cpu.gin"),
        ({"sizes": ("bass",)}, r"Did you mean .*experiments/svamp/base.gin"),
        ({"methods": ("step_by_stap",)}, r"methods/step_by_stap.gin.*Did you mean .*methods/step_by_step.gin"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        a_sweep(**changes).cells()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"axes": {"ALPHAA": (0.3,)}},
            r"ALPHAA=0.3-1-0 cannot be configured.*ALPHAA.*Did you mean 'ALPHA'",
        ),
        ({"bindings": {"TRAIN_STEPS": 0}}, "train_steps is 0"),
        ({"experiment": "gin_configs/experiments/cqa/cpu.gin"}, "trains on cqa: .* is not about svamp"),
        (
            {"methods": ("standard_finetuning", "standard_distillation"), "axes": {"LABEL_SOURCE": ("teacher",)}},
            "standard_finetuning-LABEL_SOURCE=teacher-1-0 and .*standard_distillation.* are the same run",
        ),
    ],
)
def test_every_kind_of_cell_is_configured_before_the_first_starts(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises((ValueError, gin_files.UsageError), match=f"(?s){expected}"):
        sweep.check_configurations(a_sweep(**changes).cells())


def test_records_and_checkpoints_are_looked_for_before_the_first_starts(tmp_path: Path) -> None:
    kinds = sweep.check_configurations(a_sweep(records_dir=str(tmp_path), vocabulary="byte").cells())
    with pytest.raises(FileNotFoundError, match="no records of svamp"):
        sweep.check_inputs(kinds)
    (tmp_path / "svamp").mkdir()
    (tmp_path / "svamp" / "train.jsonl").touch()
    with pytest.raises(ValueError, match="svamp-cpu-standard_finetuning-1-0 needs test rows of svamp"):
        sweep.check_inputs(kinds)
    (tmp_path / "svamp" / "test.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="no records of cqa"):  # svamp is whole now
        sweep.check_inputs(kinds)
    start = a_sweep(records_dir=str(tmp_path), vocabulary="byte", initial_checkpoint_path=str(tmp_path / "t5-{size}"))
    with pytest.raises(FileNotFoundError, match="t5-cpu, which does not exist"):
        sweep.check_inputs(sweep.check_configurations(start.cells()))


# ------------------------------------------------------------------------------ commands for a cluster


def test_printed_commands_are_what_a_shell_passes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Paths may have any characters: bash itself splits each line."""
    hostile = f'{tmp_path}/it\'s a $HOME `x` "y"'
    file = tmp_path / "one.gin"
    file.write_text(
        'from __gin__ import dynamic_registration\ninclude "gin_configs/runs/sweep.gin"\n'
        f'DATASETS = ("svamp", "cqa")\nSIZES = ("cpu",)\nMETHODS = {METHODS}\nVOCABULARY = "byte"\n'
    )
    flags = ["sweep", f"--gin_file={file}", f"--gin.SWEEP_DIR={hostile}", "--gin.RECORDS_DIR=records", "--print"]
    assert main.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = a_sweep(sweep_dir=hostile, vocabulary="byte", fractions=(1.0,), seeds=(0,)).cells()
    assert len(lines) == len(cells) == 4
    script = "sbs() { printf '%s\\0' \"$@\"; printf '\\0'; }\n" + "\n".join(lines)
    passed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0\0")
    assert [each.split("\0") for each in passed if each] == [cell.arguments() for cell in cells]
    config, _ = cells[3].configured()
    assert config.model_dir == f"{hostile}/runs/cqa-cpu-step_by_step-1-0"
    assert main.main([*flags, "--index", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [lines[2]]
    assert main.main([*flags, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["argv"] for each in listed] == [["sbs", *cell.arguments()] for cell in cells]
    assert main.main([*flags, "--index", "4"]) == 1
    assert "the sweep has 4 cells, 0 to 3" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ the paper's


def paper_cells(file: Path) -> list[sweep.Cell]:
    given = ["SWEEP_DIR=runs", "RECORDS_DIR=records", "VOCABULARY=byte"]
    return gin_files.configure("sweep.Sweep", gin_files=[str(file)], bindings=given)[0].cells()


def test_the_papers_sweeps_hold_exactly_the_cells_of_its_tables_and_figures() -> None:
    human, teacher = METHODS, ("standard_distillation", "step_by_step")
    expected = {
        "table1": (("base",), human, None),
        "table1_20b": (("base",), ("step_by_step",), None),
        "table2": (("base",), ("standard_finetuning", "single_task_rationale", "step_by_step"), None),
        "figure_data_size_human": (("base",), human, None),
        "figure_data_size_teacher": (("base",), teacher, "teacher"),
        "figure_model_size_human": (SIZES, human, None),
        "figure_model_size_teacher": (SIZES, teacher, "teacher"),
        "figure_minimum_human": (SIZES, human, None),
        "figure_minimum_teacher": (SIZES, teacher, "teacher"),
    }
    files = {file.stem: file for file in PAPER.glob("*.gin")}
    assert files.keys() == {*expected, "settings", "smallest"}
    for name, (sizes, methods, labels) in expected.items():
        cells = paper_cells(files[name])
        recorded = RECORDED.search(files[name].read_text("utf-8"))
        assert recorded is not None
        assert len({cell.name for cell in cells}) == len(cells) == int(recorded[1]), name
        found = {(c.dataset, c.size, c.method, c.axes.get("LABEL_SOURCE")) for c in cells}
        assert found == set(itertools.product(DATASETS, sizes, methods, (labels,))), name
        assert {cell.seed for cell in cells} == {0, 1, 2, 3}, name
        fractions = {(cell.dataset, cell.fraction) for cell in cells}
        # Fractions named in the paper's text are on every curve; tables and the figure of sizes use all of the data.
        named = {("esnli", 0.125), ("anli1", 0.25), ("cqa", 0.75), ("svamp", 0.8)} if "table" not in name else set()
        named = set() if "model_size" in name else named
        assert fractions >= named | {(dataset, 1.0) for dataset in DATASETS}, name
        assert named or len(fractions) == len(DATASETS), name


def test_a_cell_that_stands_in_several_of_the_papers_sweeps_is_one_run() -> None:
    one, other = paper_cells(PAPER / "table2.gin"), paper_cells(PAPER / "figure_model_size_human.gin")
    both = {cell.name for cell in one} & {cell.name for cell in other}
    assert len(both) == 32  # the base students of table 1
    for name in sorted(both)[::8]:
        texts = [next(c for c in cells if c.name == name).configured()[1] for cells in (one, other)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["table2", "figure_model_size_teacher", "smallest"])
def test_the_papers_cells_can_be_configured(name: str) -> None:
    """Checks each kind of cell once; methods differ as in the paper."""
    kinds = sweep.check_configurations(paper_cells(PAPER / f"{name}.gin"))
    for cell, config in kinds:
        rows = {"base": 64, "large": 64, "xxl": 32, "cpu": 8}[cell.size]
        if not config.pack:
            assert config.batch_size == rows * (2 if cell.method == "step_by_step" else 1)
            assert config.train_steps == (4000 if cell.size == "xxl" else 10000)
            assert config.initial_checkpoint_path == f"checkpoints/t5-v1_1-{cell.size}"
            assert config.execution.layers == "scanned"
        teacher = cell.method == "standard_distillation" or cell.axes.get("LABEL_SOURCE") == "teacher"
        assert config.data.label_source == ("teacher" if teacher else "human")


# ------------------------------------------------------------------------------------ real processes

STEPS = 30


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, starter: processes.Starter) -> Path:
    """Folder with the toy's command, its sweep file, and sweep/ with two finished cells."""
    folder = toy.write_command(tmp_path_factory.mktemp("sweep"))
    bindings = {"TRAIN_STEPS": STEPS, "LOG_PERIOD": 2, "EVAL_PERIOD": 15, "CHECKPOINT_PERIOD": 15}
    (folder / "sweep.gin").write_text(
        'from __gin__ import dynamic_registration\nimport toy_task\ninclude "gin_configs/runs/sweep.gin"\n'
        f'EXPERIMENT = "{folder / "toy.gin"}"\nDATASETS = ("toy",)\nSIZES = ("tiny",)\nMETHODS = {METHODS}\n'
        f"BINDINGS = {bindings}\n"
    )
    done = starter.run(folder, flags(folder, folder / "sweep", "--jobs", "2"), path=[folder])
    assert done.returncode == 0, done.stderr
    assert "2 cells: 2 new." in done.stdout
    assert "[2/2] toy-tiny-" in done.stdout
    assert "step-by-step minus standard fine-tuning" in done.stdout
    assert (folder / "sweep" / "index.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    return folder


def flags(folder: Path, sweep_dir: Path, *more: str) -> list[str]:
    """Returns a command line. Two jobs on two cores use one each, which rounds differently from one job on both."""
    given = [f"--gin_file={folder / 'sweep.gin'}", f"--gin.RECORDS_DIR={folder / 'records'}"]
    return ["sweep", *given, f"--gin.SWEEP_DIR={sweep_dir}", *more]


def cells_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *bindings: str) -> list[sweep.Cell]:
    monkeypatch.syspath_prepend(folder)
    given = [f"RECORDS_DIR={folder / 'records'}", f"SWEEP_DIR={folder / 'sweep'}", *bindings]
    return gin_files.configure("sweep.Sweep", gin_files=[str(folder / "sweep.gin")], bindings=given)[0].cells()


def test_finished_cells_are_skipped_and_not_touched(trained: Path, starter: processes.Starter) -> None:
    runs = trained / "sweep" / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    again = starter.run(trained, flags(trained, trained / "sweep"), path=[trained])
    assert again.returncode == 0, again.stderr
    assert "2 cells: 2 finished." in again.stdout
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_what_makes_a_finished_cell_another_one(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compares configuration and data, not their places or how the run is computed."""

    def states(*bindings: str) -> list[tuple[str, str]]:
        found = sweep.standings(cells_of(trained, monkeypatch, *bindings))
        return [(each.state, "\n".join(each.difference)) for each in found]

    assert [state for state, _ in states()] == ["finished", "finished"]
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "toy").symlink_to(trained / "records" / "toy")
    bindings = {"TRAIN_STEPS": STEPS, "LOG_PERIOD": 2, "EVAL_PERIOD": 15, "CHECKPOINT_PERIOD": 5, "REMAT": "attended"}
    assert [s for s, _ in states(f"RECORDS_DIR={moved}", f"BINDINGS={bindings}")] == ["finished", "finished"]
    longer = states(f"BINDINGS={bindings | {'TRAIN_STEPS': 50}}")
    assert [state for state, _ in longer] == ["changed", "changed"]
    assert f"-TRAIN_STEPS = {STEPS}\n+TRAIN_STEPS = 50" in longer[0][1]
    # Not tested yet.
    shutil.copytree(trained / "sweep", tmp_path / "cut")
    name = "toy-tiny-step_by_step-1-0"
    metrics = tmp_path / "cut" / "runs" / name / "metrics.jsonl"
    metrics.write_bytes(b"".join(line for line in metrics.read_bytes().splitlines(True) if b'"test"' not in line))
    assert states(f"SWEEP_DIR={tmp_path / 'cut'}") == [("finished", ""), ("begun", "")]
    # The same names, other rows.
    other = tmp_path / "other" / "toy"
    other.mkdir(parents=True)
    for file in (trained / "records" / "toy").iterdir():
        lines = file.read_text("utf-8").splitlines()
        (other / file.name).write_text("\n".join(lines[:-1] if file.name == "train.jsonl" else lines) + "\n")
    changed = states(f"RECORDS_DIR={other.parent}")
    assert all(state == "changed" and "+data.splits.train.sha256" in diff for state, diff in changed)
    assert not any("test.sha256" in diff for _, diff in changed)


def test_changed_cells_are_refused_and_moved_aside_on_request(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = tmp_path / "sweep" / "runs"
    shutil.copytree(trained / "sweep", tmp_path / "sweep")
    bindings = (f"SWEEP_DIR={tmp_path / 'sweep'}", 'METHODS=("step_by_step",)')
    name = "toy-tiny-step_by_step-1-0"
    changed = cells_of(trained, monkeypatch, *bindings, "BINDINGS={'TRAIN_STEPS': 4}")
    with pytest.raises(gin_files.UsageError, match=rf"{name}:(?s:.*)-TRAIN_STEPS = {STEPS}\n  \+TRAIN_STEPS = 4"):
        sweep.unfinished(changed)
    assert len(list(runs.iterdir())) == 2
    assert [cell.name for cell in sweep.unfinished(changed, redo_changed=True)] == [name]
    assert "1 cells: 1 new." in capsys.readouterr().out
    assert (runs / f"{name}~1" / "manifest.json").exists()
    assert not (runs / name).exists()


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Path]:
    """Folder of a sweep in which one cell cannot start, because its place is taken."""
    place = tmp_path / "sweep" / "runs" / "toy-tiny-standard_finetuning-1-0"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    yield tmp_path / "sweep"
    assert (place / "notes.txt").read_text() == "mine"


def test_a_second_sweep_of_one_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by another name: it would start the same cells, append to their logs and move changed runs aside."""
    folder, link = tmp_path / "sweep", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for name in ("Workers", "check_inputs", "check_configurations"):
        monkeypatch.setattr(running, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(running, "unfinished", lambda *_, **__: [])
    with (
        lock.Lock(folder / "lock", of=folder),
        pytest.raises(lock.HeldError, match=rf"{folder} is in use: process \d+"),
    ):
        sweep.main(a_sweep(sweep_dir=str(link)), entry=lambda _: 0, jobs=1, together=None, redo_changed=True)


def test_killed_in_the_middle_it_goes_on_and_a_failed_cell_does_not_end_the_others(
    trained: Path, starter: processes.Starter, tmp_path: Path, broken: Path
) -> None:
    name = "toy-tiny-step_by_step-1-0"
    metrics = broken / "runs" / name / "metrics.jsonl"
    with starter.alone(tmp_path, flags(trained, broken, "--jobs", "2"), path=[trained]) as process:
        processes.until(lambda: metrics.exists() and b"train" in metrics.read_bytes(), [process])
        process.send(signal.SIGKILL)
        process.wait()
    # The cell is preempted because the sweep is gone, and releases its lock.
    processes.until(lambda: not (broken / "runs" / name / "lock").exists() or _is_free(broken / "runs" / name), [])
    assert b'"test"' not in metrics.read_bytes()
    again = starter.run(tmp_path, flags(trained, broken, "--jobs", "2"), path=[trained])
    assert again.returncode == 1
    assert "1 of 2 cells failed" in again.stdout
    assert re.search(r"toy-tiny-standard_finetuning-1-0: sbs train: .* is not a run directory|not empty", again.stdout)
    assert "toy-tiny-standard_finetuning-1-0: failed, status 1" in again.stdout
    assert f"{name}: accuracy" in again.stdout
    assert "Resuming at step" in (broken / "logs" / f"{name}.log").read_text("utf-8")
    whole = trained / "sweep" / "runs" / name
    for kind in ("train", "validation", "test"):
        ours, theirs = (_numbers(path, kind) for path in (metrics.parent, whole))
        assert ours == theirs
    for file in (whole / "predictions").iterdir():
        assert (metrics.parent / "predictions" / file.name).read_bytes() == file.read_bytes()


def _is_free(folder: Path) -> bool:
    own = lock.Lock(folder / "lock", of=folder)
    try:
        own.take()
    except lock.HeldError:
        return False
    own.release()
    return True


def _numbers(path: Path, kind: str) -> list[dict[str, Any]]:
    """Returns lines of metrics without the fields that depend on the clock."""
    found = [line for line in directory.read_metrics(path) if line["kind"] == kind]
    return [unmeasured(line) for line in found]


@pytest.mark.faults
def test_told_to_end_it_passes_that_on_and_goes_on_later(
    trained: Path, starter: processes.Starter, tmp_path: Path
) -> None:
    name = "toy-tiny-step_by_step-1-0"
    folder = tmp_path / "sweep"
    metrics = folder / "runs" / name / "metrics.jsonl"
    one = ['--gin.METHODS=("step_by_step",)', "--jobs", "2"]
    with starter.alone(tmp_path, flags(trained, folder, *one), path=[trained]) as process:
        processes.until(lambda: metrics.exists() and b"train" in metrics.read_bytes(), [process])
        process.send(signal.SIGTERM)
        assert process.wait() == 75
        assert "Repeat the command to resume" in process.complained()
        assert f"{name}: preempted, and saved" in process.said()
    again = starter.run(tmp_path, flags(trained, folder, *one), path=[trained])
    assert again.returncode == 0, again.stderr
    for kind in ("train", "validation", "test"):
        assert _numbers(metrics.parent, kind) == _numbers(trained / "sweep" / "runs" / name, kind)
