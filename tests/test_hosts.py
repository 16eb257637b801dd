"""Several real processes as one run: the numbers and files of one process, and plain ends where something fails."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toy

from sbs_jax import checkpoints, datasets, evaluate, features, hosts, main, partitioning, run_dir, train

ROOT = Path(__file__).resolve().parents[1]
SPEEDS = {"tokens_per_second", "seconds_per_step", "data_wait_share"}
# As tests/conftest.py sets for this process.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def gin_text() -> str:
    """The toy's training. Defaults are bound too: jaxtyping's hook hides them from gin in this process alone."""
    lines = ["from __gin__ import dynamic_registration", "import toy_task"]
    lines += ["from sbs_jax import datasets", "from sbs_jax import t5", "from sbs_jax import train"]
    for name, configurable in {
        "t5.T5Config": toy.t5.T5Config,
        "datasets.DataOptions": datasets.DataOptions,
        "train.TrainConfig": train.TrainConfig,
    }.items():
        for field in dataclasses.fields(configurable):
            if field.default is not dataclasses.MISSING:
                lines.append(f"{name}.{field.name} = {field.default!r}")
    lines += [f'include "gin_configs/{file}.gin"' for file in ("runs/train", "methods/step_by_step")]
    for name, value in dataclasses.asdict(toy.MODEL).items():
        lines.append(f"t5.T5Config.{name} = {'%DROPOUT_RATE' if name == 'dropout_rate' else repr(value)}")
    macros = {
        "DATASET": "toy",
        "TASK_FEATURE_LENGTHS": {"inputs": 40, "targets": 32},
        "PACK": True,
        "EXAMPLES": 8,
        "EXAMPLES_PER_ROW": 2,
        "TRAIN_STEPS": 12,
        "LEARNING_RATE": 3e-3,
        "VOCABULARY": "byte",
        "LOG_PERIOD": 1,
        "EVAL_PERIOD": 6,
        "CHECKPOINT_PERIOD": 2,
        "EVAL_BATCH_SIZE": 8,
        "MAX_DECODE_LENGTH": 4,
    }
    lines += [f"{name} = {value!r}" for name, value in macros.items()]
    return "\n".join([*lines, "MODEL = @t5.T5Config()", ""])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Holds records/, toy.gin, and the module by which a command line knows the toy dataset."""
    folder = tmp_path_factory.mktemp("hosts")
    before = datasets.options()
    toy.write_records(folder / "records")
    (folder / "toy.gin").write_text(gin_text())
    (folder / "toy_task.py").write_text("import toy\nfrom sbs_jax import datasets\ndatasets.add(toy.DATASET)\n")
    yield folder
    datasets.configure(before)


def train_flags(folder: Path, run: Path, *bindings: str, mesh: str = "data_parallel") -> list[str]:
    files = [f"--gin_file={folder / 'toy.gin'}", f"--gin_file=gin_configs/meshes/{mesh}.gin"]
    paths = [f"--gin.RECORDS_DIR={folder / 'records'}", f"--gin.MODEL_DIR={run}"]
    return ["train", *files, *paths, *(f"--gin.{binding}" for binding in bindings)]


def train_here(folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same training in this process, on its 8 devices."""
    monkeypatch.syspath_prepend(folder)
    config, text = main.configure(
        "train.TrainConfig",
        gin_files=[str(folder / "toy.gin")],
        bindings=[f"RECORDS_DIR={folder / 'records'}", f"MODEL_DIR={run}"],
    )
    return train.train(config, config_text=text)


class Process:
    """A started process; what it says goes to files."""

    def __init__(self, command: Sequence[str], *, folder: Path, environment: Mapping[str, str], cwd: Path) -> None:
        self._files = [(folder / name).open("w+") for name in ("out", "err")]
        self._popen = subprocess.Popen(
            command, stdout=self._files[0], stderr=self._files[1], cwd=cwd, env={**os.environ, **environment}
        )

    def kill(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout: float = 200) -> int:
        return self._popen.wait(timeout)

    def running(self) -> bool:
        return self._popen.poll() is None

    def end(self) -> None:
        if self.running():
            self._popen.kill()
            self._popen.wait()
        for file in self._files:
            file.close()

    def said(self) -> str:
        self._files[0].seek(0)
        return self._files[0].read()

    def complained(self) -> str:
        self._files[1].seek(0)
        return self._files[1].read()


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def started(
    tmp_path: Path,
    arguments: Sequence[str] | Callable[[int], Sequence[str]],
    *,
    count: int,
    devices: int = 1,
    present: Sequence[int] | None = None,
    timeout: float = 200,
    folder: Path = ROOT,
    roots: Mapping[int, Path] | None = None,
    slurm: bool = False,
    command: Sequence[str] = ("-m", "sbs_jax.main"),
) -> Iterator[list[Process]]:
    """`sbs` with these arguments in several processes; all are ended afterwards."""
    port, job = free_port(), 61_440 + os.getpid() % 4096
    processes = []
    try:
        for index in range(count) if present is None else present:
            root = (roots or {}).get(index, ROOT)
            environment = {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "XLA_FLAGS": QUICK,
                "PYTHONPATH": os.pathsep.join(map(str, (root, ROOT / "tests", folder))),
            }
            flags = ["--join_timeout", f"{timeout:g}"]
            if slurm:
                environment |= {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
                environment |= {"SLURM_NTASKS": str(count), "SLURM_PROCID": str(index), "SLURM_STEP_NUM_NODES": "1"}
                flags.append("--multihost")
            else:
                flags += ["--coordinator_address", f"localhost:{port}"]
                flags += ["--process_count", str(count), "--process_index", str(index)]
            own = arguments(index) if callable(arguments) else arguments
            place = tmp_path / f"process-{index}-{len(list(tmp_path.iterdir()))}"
            place.mkdir()
            line = [sys.executable, *command, *own, *flags]
            processes.append(Process(line, folder=place, environment=environment, cwd=root))
        yield processes
    finally:
        for process in processes:
            process.end()


def until(condition: Callable[[], bool], processes: Sequence[Process], *, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [process.complained() for process in processes if not process.running()]
        assert not ended, ended
        assert time.monotonic() < deadline, [process.complained() for process in processes]
        time.sleep(0.02)


def steps_logged(run: Path) -> int:
    return max((line["step"] for line in run_dir.read_metrics(run)), default=0)


def assert_same_run(run: Path, reference: Path) -> None:
    """The same metrics to rounding, and the same predictions."""
    lines, expected = run_dir.read_metrics(run), run_dir.read_metrics(reference)
    assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys()
        for name in set(line) - SPEEDS - {"kind"}:
            assert line[name] == pytest.approx(wanted[name], rel=2e-4, abs=1e-6), (name, line["step"])
    names = [sorted(path.name for path in (of / "predictions").iterdir()) for of in (run, reference)]
    assert names[0] == names[1]
    for name in names[0]:
        assert_same_predictions(run / "predictions" / name, reference / "predictions" / name)


def assert_same_predictions(path: Path, reference: Path) -> None:
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in (path, reference)]
    for row, wanted in zip(*rows, strict=True):
        assert row.pop("score") == pytest.approx(wanted.pop("score"), rel=1e-3)
        assert row == wanted


# ---------------------------------------------------------------------------- rows and decisions

MESHES = [
    partitioning.Layout(slice=1, data=-1, fsdp=1, tensor=1),
    partitioning.Layout(slice=1, data=1, fsdp=4, tensor=2),
    partitioning.Layout(slice=2, data=1, fsdp=2, tensor=2),
    partitioning.Layout(slice=1, data=2, fsdp=1, tensor=4),
    partitioning.Layout(slice=1, data=1, fsdp=1, tensor=8),
    partitioning.Layout(slice=1, data=4, fsdp=2, tensor=1, rules={"batch": "fsdp"}),
]


def partitioner_of(layout: partitioning.Layout, order: np.ndarray) -> partitioning.Partitioner:
    """The layout on the devices in any order, which `jax.make_mesh` would choose by itself."""
    chosen = layout.partitioner()
    devices = np.array(jax.devices())[order].reshape(tuple(chosen.sizes.values()))
    types = (jax.sharding.AxisType.Auto,) * devices.ndim
    return partitioning.Partitioner(jax.sharding.Mesh(devices, partitioning.AXES, axis_types=types), chosen.rules)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", MESHES, ids=lambda layout: "x".join(map(str, layout.shape.values())))
def test_no_row_is_lost_and_none_is_there_twice(folder, layout, count, pack):
    """What the devices of `count` hosts hold, put together, is the global batch, whatever the mesh and the order."""
    datasets.configure(toy.options(folder / "records"))
    arguments = {"lengths": {"inputs": 40, "targets": 32}, "split": "train", "batch_size": 16, "pack": pack, "seed": 1}
    whole = next(features.train_dataset("toy_step_by_step", **arguments, skip_batches=2))
    for seed in range(3):
        random = np.random.default_rng((seed, count))
        partitioner = partitioner_of(layout, random.permutation(8) if seed else np.arange(8))
        hosts_of_devices = random.permutation(np.arange(8) % count) if seed else np.arange(8) // (8 // count)
        places = partitioner.batch.devices_indices_map((16,))
        held: dict[int, list[int]] = {}
        for host in range(count):
            devices = [d for d, of in zip(jax.devices(), hosts_of_devices, strict=True) if of == host]
            rows = partitioner.local_rows(16, devices=devices)
            wanted = sorted({row for device in devices for row in range(16)[places[device][0]]})
            assert rows.tolist() == wanted  # all that its devices hold, once each, and no more
            batch = next(features.train_dataset("toy_step_by_step", **arguments, skip_batches=2, rows=rows))
            for device in devices:
                held[device.id] = list(range(16)[places[device][0]])
            for name, array in batch.items():
                np.testing.assert_array_equal(array, whole[name][rows])
        times = np.bincount(np.concatenate(list(held.values())), minlength=16)
        assert set(times) == {8 // partitioner.data_parallel_size}


@pytest.mark.parametrize("layout", MESHES, ids=lambda layout: "x".join(map(str, layout.shape.values())))
def test_put_batch_puts_every_row_where_it_belongs(layout):
    for seed in range(3):
        partitioner = partitioner_of(layout, np.random.default_rng(seed).permutation(8))
        batch = {"a": np.arange(16 * 3).reshape(16, 3), "b": np.arange(16)}
        put = partitioner.put_batch(batch)
        for name, array in put.items():
            np.testing.assert_array_equal(array, batch[name])
            assert array.sharding == partitioner.batch
    if partitioner.data_parallel_size > 1:
        with pytest.raises(ValueError, match=r"Got 3 rows; expected a multiple of this process's"):
            partitioner.put_batch({"a": np.zeros((3, 2))})


def test_batches_ahead_are_the_same_and_errors_arrive():
    def items(count: int) -> Iterator[int]:
        yield from range(count)
        raise FileNotFoundError("no more")

    with features.Ahead(items(5)) as ahead:
        assert [next(ahead) for _ in range(5)] == list(range(5))
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="no more"):
                next(ahead)
    with features.Ahead(iter(range(10**9))) as ahead:  # stopped in the middle of it
        assert next(ahead) == 0
    assert not ahead._thread.is_alive()
    with features.Ahead(iter([1])) as ahead:
        assert list(ahead) == [1]


def test_differences_are_named_by_process():
    same = {"code": "a 1\nb 2", "versions": "jax 1"}
    assert hosts._differences([same, same, same]) == ""
    other = {"code": "a 1\nb 3", "versions": "jax 1"}
    said = hosts._differences([same, other, {**same, "versions": "jax 2"}, other])
    assert said.splitlines() == [
        *("code: processes 1, 3 differ from process 0:", "--- process 0", "+++ processes 1, 3", "-b 2", "+b 3"),
        *("versions: process 2 differs from process 0:", "--- process 0", "+++ process 2", "-jax 1", "+jax 2"),
    ]


def test_slurm_tells_the_place(monkeypatch):
    told = {"JOB_ID": "5000", "STEP_NODELIST": "node[07-08]", "LOCALID": "0", "NTASKS": "2", "PROCID": "1"}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = hosts.detect(timeout=1.0)
    assert (place.coordinator, place.count, place.index) == (f"node07:{61_440 + 5000 % 4096}", 2, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--multihost"], "--multihost found no Cloud TPU, GKE, Slurm or Open MPI environment"),
        (["--multihost", "--process_count=2"], "--multihost finds out what --process_count would say"),
        (["--process_count=2", "--process_index=1"], "--coordinator_address, --process_count and --process_index go"),
        (["--coordinator_address=here", "--process_count=2", "--process_index=1"], "'here'; expected HOST:PORT"),
        (["--coordinator_address=h:1", "--process_count=2", "--process_index=2"], "process_index 2 of process_count 2"),
        (
            ["--coordinator_address=h:1", "--process_count=2", "--process_index=0", "--join_timeout=0"],
            "--join_timeout is 0; expected seconds above 0",
        ),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    parser, _ = main._parser()
    arguments = parser.parse_args(["predict", "--model=x", "--input=y", "--output=z", *flags])
    with pytest.raises((main.UsageError, hosts.HostsError), match=re.escape(message)):
        main._join(arguments)


# ----------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing interrupts."""
    run = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train_here(folder, run, patch)
    return run


@pytest.mark.slow
def test_a_run_passes_from_one_process_to_two_to_four_and_back(folder, reference, tmp_path, monkeypatch):
    """One process, stopped; two with the matrices split between them, one of them killed; four, told to end; one."""
    run = tmp_path / "run"
    wait_for, steps = train._Window.wait_for, []

    def stop_after_three(self, batches):
        steps.append(1)
        if len(steps) > 3:
            raise KeyboardInterrupt
        return wait_for(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(train._Window, "wait_for", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            train_here(folder, run, patch)
    assert checkpoints.steps(run) == [2]

    flags = train_flags(folder, run, mesh="fsdp_tensor")
    with started(tmp_path, flags, count=2, devices=1, folder=folder) as processes:
        until(lambda: steps_logged(run) >= 5 and checkpoints.steps(run)[-1] >= 4, processes)
        processes[1].kill(signal.SIGKILL)
        assert processes[0].wait(20) == 1
        last = processes[0].complained().splitlines()[-1]
    assert last.startswith("sbs, process 0 of 2: Process 1 of 2 is gone without a word (killed, or")
    assert checkpoints.steps(run)[-1] >= 4

    flags = train_flags(folder, run, mesh="fsdp")
    with started(tmp_path, flags, count=4, devices=2, folder=folder, slurm=True) as processes:
        until(lambda: steps_logged(run) >= 8, processes)
        processes[3].kill(signal.SIGTERM)
        assert [process.wait() for process in processes] == [1] * 4
        (told,) = {process.complained().splitlines()[-1] for process in processes}
        assert "step/s" in processes[0].complained()
        assert "step/s" not in processes[1].complained()
    last = checkpoints.steps(run)[-1]
    assert told.startswith(f"sbs train: A process was told to end; all stopped after step {last} of 12, which is saved")

    train_here(folder, run, monkeypatch)
    assert_same_run(run, reference)
    assert len(list((run / "tensorboard").iterdir())) == 4  # one writer per start


@pytest.mark.slow
def test_two_processes_evaluate_like_one(folder, reference, tmp_path):
    (tmp_path / "evaluate.gin").write_text(
        'from __gin__ import dynamic_registration\nimport toy_task\ninclude "gin_configs/runs/evaluate.gin"\n'
    )
    flags = ["evaluate", f"--gin_file={tmp_path / 'evaluate.gin'}", "--gin_file=gin_configs/meshes/fsdp_tensor.gin"]
    flags += [f"--gin.CHECKPOINT_PATH={reference}", "--gin.SPLIT=test", "--gin.BATCH_SIZE=12"]
    out = tmp_path / "out"
    with started(tmp_path, [*flags, f"--gin.EVAL_OUTPUT_DIR={out}"], count=2, devices=4, folder=folder) as processes:
        assert [process.wait() for process in processes] == [0] * 2, processes[0].complained()
        said = [process.said() for process in processes]
    step = checkpoints.best_step(reference)
    tested = [line for line in run_dir.read_metrics(reference) if line["kind"] == "test"]
    assert json.loads(said[0])["accuracy"] == tested[0]["accuracy"]
    assert said[1] == ""
    files = [out / f"toy_label-test-{step}.jsonl", reference / "predictions" / f"toy_label-test-{step}.jsonl"]
    assert_same_predictions(*files)


@pytest.mark.slow
def test_two_processes_predict_like_one(folder, reference, tmp_path):
    rows = [{"id": f"q{n}", "input": f"{a} b c"} for n, a in enumerate("abcdefghabc")]  # does not fill its last batch
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    predict = {"input_path": tmp_path / "in.jsonl", "objective": "label", "batch_size": 8}
    assert evaluate.predict(reference, output_path=here, **predict) == len(rows)
    flags = ["predict", "--model", str(reference), "--input", str(tmp_path / "in.jsonl"), "--batch_size", "8"]

    def arguments(index: int) -> list[str]:  # only process 0 can write where it is told to
        return [*flags, "--output", str(there if index == 0 else tmp_path / "nowhere" / "there.jsonl")]

    # `sbs predict` itself knows the datasets of tasks/ alone.
    command = ["-c", "import sys, toy_task; from sbs_jax import main; sys.exit(main.main())"]
    with started(tmp_path, arguments, count=2, devices=2, folder=folder, command=command) as processes:
        assert [process.wait() for process in processes] == [0, 0], processes[0].complained()
        assert [process.said() for process in processes] == [f"11 predictions in {there}\n", ""]
    assert_same_predictions(there, here)


# --------------------------------------------------------------------------------- what is refused


def test_a_process_that_never_joins_is_named(folder, tmp_path):
    flags = train_flags(folder, tmp_path / "run")
    begin = time.monotonic()
    with started(tmp_path, flags, count=4, present=[0, 2], timeout=3) as processes:
        assert [process.wait(30) for process in processes] == [1, 1]
        for process in processes:
            assert process.complained() == (
                "sbs train: Processes 1, 3 of 4 did not join within 3 s; look at their log, or give more time "
                "(--join_timeout).\n"
            )
    assert time.monotonic() - begin < 20
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there_is_named(folder, tmp_path):
    flags = train_flags(folder, tmp_path / "run")
    with started(tmp_path, flags, count=2, present=[1], timeout=1) as processes:
        assert processes[0].wait(30) == 1
        assert "Process 0 of 2, the coordinator, did not answer at localhost:" in processes[0].complained()
        assert "within 1 s" in processes[0].complained()


def test_two_processes_with_one_index_are_refused(folder, tmp_path):
    flags = train_flags(folder, tmp_path / "run")
    with started(tmp_path, flags, count=3, present=[0, 1, 1]) as processes:
        assert [process.wait(30) for process in processes] == [1, 1, 1]
        for process in processes:
            assert "Two processes say they are 1 of 3" in process.complained()


def test_other_code_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    for package in ("sbs_jax", "tasks", "gin_configs"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "sbs_jax" / "losses.py").open("a") as file:
        file.write("# one line more\n")
    with started(tmp_path, train_flags(folder, tmp_path / "run"), count=3, roots={2: copy}) as processes:
        assert [process.wait(60) for process in processes] == [1, 1, 1]
        for process in processes:
            lines = process.complained().splitlines()
            assert lines[:4] == [
                "sbs train: The processes do not run the same thing.",
                "code: process 2 differs from process 0:",
                "--- process 0",
                "+++ process 2",
            ]
            assert [line.split()[0] for line in lines[4:]] == ["-sbs_jax/losses.py", "+sbs_jax/losses.py"]
    assert not (tmp_path / "run").exists()


# A process that joins, agrees, and meets a run directory which is not that of process 0.
APART = """
import argparse, pathlib, sys, time
from sbs_jax import hosts, run_dir

parser = argparse.ArgumentParser()
for name in ("coordinator_address", "process_count", "process_index", "join_timeout", "folder"):
    parser.add_argument("--" + name)
given = parser.parse_args()
index, count = int(given.process_index), int(given.process_count)
place = hosts.Place(coordinator=given.coordinator_address, count=count, index=index)
hosts.join(place, timeout=float(given.join_timeout), detected=False)
import jax
assert (jax.process_count(), jax.process_index(), jax.device_count()) == (count, index, 2 * count)
assert hosts.is_first() == (index == 0)
assert hosts.from_first(lambda: {"from": index}) == {"from": 0}
hosts.agree({"data": "the same"})
folder = pathlib.Path(given.folder)
with run_dir.RunDir(folder / "shared", config_text="SEED = 0") as run:
    run.log("train", 1, {"loss": float(index)})
    assert run.metrics() == [{"kind": "train", "step": 1, "loss": 0.0}]
    hosts.barrier()
print("shared", flush=True)
run_dir._SEEN_WITHIN = 1.0
try:
    with run_dir.RunDir(folder / str(index == 2), config_text="SEED = 0"):
        time.sleep(100)
except FileNotFoundError as error:
    hosts.fail(str(error))
"""


def test_one_process_that_fails_ends_all_with_its_reason(tmp_path):
    arguments = ["--folder", str(tmp_path)]
    with started(tmp_path, arguments, count=3, devices=2, command=["-c", APART]) as processes:
        assert [process.wait(60) for process in processes] == [1, 1, 1]
        complaints = [process.complained().splitlines()[-1] for process in processes]
        assert [process.said() for process in processes] == ["shared\n"] * 3
    reason = f"{tmp_path / 'True'} on process 2 of 3 is not the folder that process 0 writes to; MODEL_DIR must be"
    assert complaints[2].startswith(f"sbs, process 2 of 3: {reason}")
    for index in (0, 1):
        assert complaints[index].startswith(f"sbs, process {index} of 3: Process 2 of 3 ended: {reason}")


@pytest.mark.slow
def test_another_configuration_is_refused(folder, tmp_path):
    def arguments(index: int) -> list[str]:
        records = [] if index == 0 else [f"--gin.RECORDS_DIR={folder / 'elsewhere'}"]  # not a difference by itself
        return [*train_flags(folder, tmp_path / "run", f"SEED={index}"), *records]

    with started(tmp_path, arguments, count=2, folder=folder) as processes:
        assert [process.wait() for process in processes] == [1, 1]
        for process in processes:
            assert process.complained().splitlines()[-6:] == [
                "sbs train: The processes do not run the same thing.",
                "configuration: process 1 differs from process 0:",
                "--- process 0",
                "+++ process 1",
                "-SEED = 0",
                "+SEED = 1",
            ]
    assert not (tmp_path / "run").exists()
