"""Several real processes as one run: numbers and files of a single process, and clear errors at failures."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from builders.finished_runs import unmeasured
from jax._src.clusters import cloud_tpu_cluster
from processes import ROOT, free_port, until

from sbs_jax import hosts
from sbs_jax.cli import main
from sbs_jax.data import batches, prefetch, registry
from sbs_jax.hosts import api, preemption, roll, slices
from sbs_jax.run import checkpoints, directory
from sbs_jax.student import partitioning
from sbs_jax.training import gin_files

MACROS = {"TRAIN_STEPS": 12, "LOG_PERIOD": 1, "EVAL_PERIOD": 6, "CHECKPOINT_PERIOD": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with everything a command line needs to train on the toy dataset."""
    before = registry.options()
    yield toy.write_command(tmp_path_factory.mktemp("hosts"), **MACROS)
    registry.configure(before)


def assert_same_run(run: Path, reference: Path) -> None:
    """Requires equal metrics up to rounding, and equal predictions."""
    lines, expected = directory.read_metrics(run), directory.read_metrics(reference)
    assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys()
        for name in unmeasured(line).keys() - {"kind"}:
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
    """Makes a mesh with the devices in a given order, which `jax.make_mesh` would choose by itself."""
    chosen = layout.partitioner()
    devices = np.array(jax.devices())[order].reshape(tuple(chosen.sizes.values()))
    types = (jax.sharding.AxisType.Auto,) * devices.ndim
    return partitioning.Partitioner(jax.sharding.Mesh(devices, partitioning.AXES, axis_types=types), chosen.rules)


@pytest.fixture(scope="module")
def third_batch(folder: Path) -> Iterator[Callable[..., dict[str, np.ndarray]]]:
    """Gives chosen rows of the third batch, each choice computed once: meshes share many."""
    arguments = {"lengths": {"inputs": 40, "targets": 32}, "split": "train", "batch_size": 16, "seed": 1}

    @functools.cache
    def rows_of(pack: bool, rows: tuple[int, ...] | None = None) -> dict[str, np.ndarray]:
        registry.configure(toy.options(folder / "records"))
        chosen = None if rows is None else np.array(rows)
        return next(batches.train_dataset("toy_step_by_step", **arguments, pack=pack, skip_batches=2, rows=chosen))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_PLACES", 256)  # at a time; 8,192 are 170 epochs of the toy
        yield rows_of


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", MESHES, ids=lambda layout: "x".join(map(str, layout.shape.values())))
def test_no_row_is_lost_and_none_is_there_twice(third_batch, layout, count, pack):
    """The rows of `count` hosts together are the global batch, for any mesh and order of devices."""
    whole = third_batch(pack)
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
            batch = third_batch(pack, tuple(rows.tolist()))
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

    with prefetch.Prefetcher(items(5)) as ahead:
        assert [next(ahead) for _ in range(5)] == list(range(5))
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="no more"):
                next(ahead)
    with prefetch.Prefetcher(iter(range(10**9))) as ahead:  # stopped in the middle of it
        assert next(ahead) == 0
    assert not ahead._thread.is_alive()
    with prefetch.Prefetcher(iter([1])) as ahead:
        assert list(ahead) == [1]


def test_differences_are_named_by_process():
    same = {"code": "a 1\nb 2", "versions": "jax 1"}
    assert api._differences([same, same, same]) == ""
    other = {"code": "a 1\nb 3", "versions": "jax 1"}
    said = api._differences([same, other, {**same, "versions": "jax 2"}, other])
    assert said.splitlines() == [
        *("code: processes 1, 3 differ from process 0:", "--- process 0", "+++ processes 1, 3", "-b 2", "+b 3"),
        *("versions: process 2 differs from process 0:", "--- process 0", "+++ process 2", "-jax 1", "+jax 2"),
    ]


# Process 0 of 2, which imports a TensorFlow that does what the test wants.
IMPORTING = """
import socket, sys
from sbs_jax.cli import main
from sbs_jax.hosts import link, roll
wire = roll.Wire(socket.create_connection(("localhost", int(sys.argv[1]))))
held = link.Link(roll.Place(coordinator="localhost:1", count=2, index=0), {1: wire})
main.import_tensorflow()
"""


@pytest.mark.parametrize(
    ("then", "status", "last_words"),
    [
        ("time.sleep(60)", 1, r"sbs, process 0 of 2: Lost contact with process 1 of 2 \(killed, or"),
        ("os.abort()", -signal.SIGABRT, r"Fatal Python error: Aborted(?s:.*)tensorflow\.py"),
    ],
    ids=["another process is lost", "it crashes"],
)
def test_a_process_that_dies_in_the_silenced_import_says_why(tmp_path, then, status, last_words):
    (tmp_path / "tensorflow.py").write_text(f"import os, time\nos.write(2, b'noise')\nopen('here', 'w')\n{then}\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with socket.create_server(("localhost", 0)) as listener:
        command = [sys.executable, "-c", IMPORTING, str(listener.getsockname()[1])]
        with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = listener.accept()
            while process.poll() is None and not (tmp_path / "here").exists():
                time.sleep(0.01)
            connection.close()
            said = process.communicate(timeout=30)[1]
    assert process.returncode == status, said
    assert re.search(last_words, said)
    assert "noise" not in said


def test_slurm_tells_the_place(monkeypatch):
    told = {"JOB_ID": "5000", "STEP_NODELIST": "node[07-08]", "LOCALID": "0", "NTASKS": "2", "PROCID": "1"}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = hosts.detect(timeout=1.0)
    assert (place.coordinator, place.count, place.index) == (f"node07:{61_440 + 5000 % 4096}", 2, 1)
    assert place.launch == "5000.0"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert hosts.detect(timeout=1.0).launch == "5000.2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--multihost"], "--multihost found no Cloud TPU, GKE, Slurm or Open MPI environment"),
        (["--multihost", "--process_count=2"], "--multihost detects --process_count"),
        (["--process_count=2", "--process_index=1"], "got --process_count, --process_index alone"),
        (["--coordinator_address=here", "--process_count=2", "--process_index=1"], "'here'; expected HOST:PORT"),
        (["--coordinator_address=h:1", "--process_count=2", "--process_index=2"], "process_index 2 of process_count 2"),
        (
            ["--coordinator_address=h:1", "--process_count=2", "--process_index=0", "--join_timeout=0"],
            "--join_timeout is 0; expected seconds above 0",
        ),
        (["--launch_id=a"], "--launch_id is a without other processes; give --multihost"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    parser, _ = main._parser()
    arguments = parser.parse_args(["predict", "x", "--input=y", "--output=z", *flags])
    with pytest.raises((gin_files.UsageError, hosts.HostsError), match=re.escape(message)):
        main._join(arguments)


# ------------------------------------------------------------------------------ slices and launches

SLICES = {"NUM_SLICES": "2", "SLICE_ID": "1", "COORDINATOR_ADDRESS": "a:8080"}
EXPLICIT = ["--coordinator_address=localhost:1", "--process_count=3", "--process_index=0"]


@pytest.mark.parametrize(
    ("changed", "flags", "message"),
    [
        ({}, [], "MEGASCALE_NUM_SLICES is 2, but the run has 1 process; expected a multiple of 2. Start one on every"),
        ({}, EXPLICIT, "MEGASCALE_NUM_SLICES is 2, but the run has 3 processes; expected a multiple of 2"),
        ({"NUM_SLICES": ""}, ["--multihost"], "COORDINATOR_ADDRESS came without MEGASCALE_NUM_SLICES; expected all"),
        ({"NUM_SLICES": "two"}, [], "MEGASCALE_NUM_SLICES is 'two'; expected a whole number of at least 1. Unset the"),
        ({"SLICE_ID": "2"}, ["--multihost"], "is 2, with MEGASCALE_SLICE_ID '2' and MEGASCALE_COORDINATOR_ADDRESS 'a:"),
        ({"COORDINATOR_ADDRESS": ""}, [], "MEGASCALE_COORDINATOR_ADDRESS ''; expected an index below 2 and an address"),
    ],
)
def test_slices_that_an_earlier_launch_left_are_named(monkeypatch, changed, flags, message):
    for name, value in {**SLICES, **changed}.items():
        monkeypatch.setenv(f"MEGASCALE_{name}", value)
    arguments = main._parser()[0].parse_args(["predict", "x", "--input=y", "--output=z", *flags])
    with pytest.raises(ValueError, match=re.escape(message)):
        main._join(arguments)


def test_slices_of_this_launch_are_counted(monkeypatch):
    for name, value in SLICES.items():
        monkeypatch.setenv(f"MEGASCALE_{name}", value)
    slices.check(4)
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    slices.check(1)
    place = hosts.Place(coordinator=f"localhost:{free_port()}", count=6, index=0, claims={"MEGASCALE_NUM_SLICES": "3"})
    with pytest.raises(
        hosts.HostsError, match=r"1, 2, 3, 4, 5 of 6 did not join .*NUM_SLICES asks for 3 slices\. Unset"
    ):
        roll.call_roll(place, 0.1, time.monotonic() + 0.1)


def test_a_coordinator_whose_name_is_gone_is_named(monkeypatch):
    """As JAX sees GKE, where a slice that replaces a preempted one carries the address of the old one."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    given = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    given |= {f"MEGASCALE_{name}": value for name, value in SLICES.items()}
    for name, value in {**given, "MEGASCALE_COORDINATOR_ADDRESS": "gone.invalid:8080"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(
        hosts.HostsError, match=r"place: Failed to recognize .* gone\.invalid.*asks for 2 slices\. Unset"
    ):
        hosts.detect(timeout=1.0)


def test_hosts_with_other_slices_are_refused(starter, folder, tmp_path):
    def claims(index: int) -> dict[str, str]:
        return {f"MEGASCALE_{name}": value for name, value in {**SLICES, "COORDINATOR_ADDRESS": f"h{index}"}.items()}

    flags = toy.train_flags(folder, tmp_path / "run")
    with starter.together(tmp_path, flags, count=2, more=claims) as processes:
        assert [process.wait(30) for process in processes] == [1, 1]
        for process in processes:
            assert re.search(
                r"Process 1 at \S+ has MEGASCALE_NUM_SLICES=2, MEGASCALE_COORDINATOR_ADDRESS=h1 in its environment, "
                r"process 0 has MEGASCALE_NUM_SLICES=2, MEGASCALE_COORDINATOR_ADDRESS=h0\. Give all hosts the same",
                process.complained(),
            )
    assert not (tmp_path / "run").exists()


def test_a_process_of_an_earlier_launch_does_not_take_a_place(caplog):
    """It comes first, as one that outlived its launch does."""
    old = hosts.Place(coordinator=f"localhost:{free_port()}", count=2, index=1, launch="monday")
    new = dataclasses.replace(old, launch="tuesday")
    with futures.ThreadPoolExecutor() as threads:
        stranger = threads.submit(roll.answer_roll, old, 3.0, time.monotonic() + 3)
        first = threads.submit(roll.call_roll, dataclasses.replace(new, index=0), 60.0, time.monotonic() + 60)
        end = time.monotonic() + 30
        while not (turned := [text for text in caplog.messages if text.startswith("Turned away")]):
            assert time.monotonic() < end
            time.sleep(0.02)
        joined = threads.submit(roll.answer_roll, new, 60.0, time.monotonic() + 60).result()
        (wire,) = first.result().values()
        wire.send({"hello": "tuesday"})
        assert joined.receive() == {"hello": "tuesday"}
        with pytest.raises(hosts.HostsError):
            stranger.result()
        wire.close()
        joined.close()
    assert re.fullmatch(r"Turned away process 1 of 2 at \S+: it is of launch 'monday', not 'tuesday'\.", turned[0])


def test_processes_of_two_launches_do_not_meet(starter, folder, tmp_path):
    def arguments(index: int) -> list[str]:
        return [*toy.train_flags(folder, tmp_path / "run"), "--launch_id", "monday" if index else "tuesday"]

    with starter.together(tmp_path, arguments, count=2, timeout=3) as processes:
        assert [process.wait(30) for process in processes] == [1, 1]
        said = [process.complained() for process in processes]
    assert "Process 1 of 2 did not join within 3 s" in said[0]
    assert "Processes of launch 'monday' called; end them." in said[0]
    assert "is of launch 'tuesday', this process of 'monday'. End the" in said[1] or "did not answer" in said[1]


# ----------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def reference(starter, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process with 8 devices."""
    folders = tmp_path_factory.mktemp("reference")
    run = folders / "run"
    with starter.alone(folders, toy.train_flags(folder, run), devices=8, path=[folder]) as process:
        assert process.wait() == 0, process.complained()
    return run


@pytest.mark.slow
def test_a_run_passes_from_one_process_to_two_to_four_and_back(starter, folder, reference, tmp_path):
    """One process, killed; two that share the matrices, one killed; four, preempted; then one."""
    run = tmp_path / "run"
    with starter.alone(tmp_path, toy.train_flags(folder, run), devices=8, path=[folder]) as process:
        until(lambda: 2 in checkpoints.steps(run), [process])
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    first = checkpoints.steps(run)[-1]
    assert first < 12

    flags = toy.train_flags(folder, run, mesh="fsdp_tensor")
    with starter.together(tmp_path, flags, count=2, devices=1, path=[folder]) as processes:
        until(lambda: checkpoints.steps(run)[-1] > first, processes)
        processes[1].send(signal.SIGKILL)
        assert processes[0].wait(20) == 1
        last = processes[0].complained().splitlines()[-1]
    assert last.startswith("sbs, process 0 of 2: Lost contact with process 1 of 2 (killed, or")
    second = checkpoints.steps(run)[-1]
    assert first < second < 10

    flags = toy.train_flags(folder, run, mesh="fsdp")
    with starter.together(tmp_path, flags, count=4, devices=2, path=[folder], slurm=True) as processes:
        until(lambda: "loss" in processes[0].complained(), processes)
        processes[3].send(signal.SIGTERM)
        assert [process.wait() for process in processes] == [preemption.EXIT_STATUS] * 4
        assert "step/s" in processes[0].complained()
        assert all("step/s" not in process.complained() for process in processes[1:])
        told = processes[0].complained().splitlines()[-1]
    last = checkpoints.steps(run)[-1]
    assert f"stopped after step {last} of 12, which is saved" in told

    with starter.alone(tmp_path, toy.train_flags(folder, run), devices=8, path=[folder]) as process:
        assert process.wait() == 0, process.complained()
    assert_same_run(run, reference)
    assert len(list((run / "tensorboard").iterdir())) == 4  # one writer per start


@pytest.mark.slow
def test_two_processes_end_early_together(starter, folder, tmp_path):
    run = tmp_path / "run"
    flags = toy.train_flags(folder, run, "TRAIN_STEPS=200", "EVAL_PERIOD=2", "PATIENCE=1", "EVALUATE_TEST=False")
    with starter.together(tmp_path, flags, count=2, devices=2, path=[folder]) as processes:
        assert [process.wait() for process in processes] == [0] * 2, processes[0].complained()
    ended = directory.read_manifest(run)["ended"]
    assert ended["step"] == checkpoints.steps(run)[-1] < 200
    assert ended["why"].startswith("early, ")


@pytest.mark.slow
def test_two_processes_evaluate_like_one(starter, folder, reference, tmp_path):
    (tmp_path / "evaluate.gin").write_text(
        'from __gin__ import dynamic_registration\nimport toy_task\ninclude "gin_configs/runs/evaluate.gin"\n'
    )
    flags = ["evaluate", f"--gin_file={tmp_path / 'evaluate.gin'}", "--gin_file=gin_configs/meshes/fsdp_tensor.gin"]
    flags += [f"--gin.CHECKPOINT_PATH={reference}", "--gin.SPLIT=test", "--gin.BATCH_SIZE=12"]
    out = tmp_path / "out"
    with starter.together(
        tmp_path, [*flags, f"--gin.EVAL_OUTPUT_DIR={out}"], count=2, devices=4, path=[folder]
    ) as processes:
        assert [process.wait() for process in processes] == [0] * 2, processes[0].complained()
        said = [process.said() for process in processes]
    step = checkpoints.best_step(reference)
    tested = [line for line in directory.read_metrics(reference) if line["kind"] == "test"]
    assert json.loads(said[0])["accuracy"] == tested[0]["accuracy"]
    assert said[1] == ""
    files = [out / f"toy_label-test-{step}.jsonl", reference / "predictions" / f"toy_label-test-{step}.jsonl"]
    assert_same_predictions(*files)


# --------------------------------------------------------------------------------- what is refused


def test_a_process_that_never_joins_is_named(starter, folder, tmp_path):
    flags = toy.train_flags(folder, tmp_path / "run")
    begin = time.monotonic()
    with starter.together(tmp_path, flags, count=4, present=[0, 2], timeout=3) as processes:
        assert [process.wait(30) for process in processes] == [1, 1]
        for process in processes:
            assert process.complained() == (
                "sbs train: Processes 1, 3 of 4 did not join within 3 s; look at their log, or give more time "
                "(--join_timeout).\n"
            )
    assert time.monotonic() - begin < 20
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there_is_named(starter, folder, tmp_path):
    flags = toy.train_flags(folder, tmp_path / "run")
    with starter.together(tmp_path, flags, count=2, present=[1], timeout=1) as processes:
        assert processes[0].wait(30) == 1
        assert "Process 0 of 2, the coordinator, did not answer at localhost:" in processes[0].complained()
        assert "within 1 s" in processes[0].complained()


def test_two_processes_with_one_index_are_refused(starter, folder, tmp_path):
    flags = toy.train_flags(folder, tmp_path / "run")
    with starter.together(tmp_path, flags, count=3, present=[0, 1, 1]) as processes:
        assert [process.wait(30) for process in processes] == [1, 1, 1]
        for process in processes:
            assert "Two processes say they are 1 of 3" in process.complained()


def test_other_code_is_refused(starter, folder, tmp_path):
    copy = tmp_path / "copy"
    for package in ("sbs_jax", "tasks", "gin_configs"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "sbs_jax" / "student" / "losses.py").open("a") as file:
        file.write("# one line more\n")
    with starter.together(tmp_path, toy.train_flags(folder, tmp_path / "run"), count=3, roots={2: copy}) as processes:
        assert [process.wait(60) for process in processes] == [1, 1, 1]
        for process in processes:
            lines = process.complained().splitlines()
            assert lines[:4] == [
                "sbs train: The processes do not run the same thing.",
                "code: process 2 differs from process 0:",
                "--- process 0",
                "+++ process 2",
            ]
            assert [line.split()[0] for line in lines[4:]] == [
                "-sbs_jax/student/losses.py",
                "+sbs_jax/student/losses.py",
            ]
    assert not (tmp_path / "run").exists()


# A process that joins and agrees, but has another run directory than process 0.
APART = """
import argparse, pathlib, sys, time
from sbs_jax import hosts
from sbs_jax.run import directory

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
with directory.RunDir(folder / "shared", config_text="SEED = 0") as run:
    run.log("train", 1, {"loss": float(index)})
    assert run.metrics() == [{"kind": "train", "step": 1, "loss": 0.0}]
    hosts.barrier()
print("shared", flush=True)
directory._SEEN_WITHIN = 1.0
try:
    with directory.RunDir(folder / str(index == 2), config_text="SEED = 0"):
        time.sleep(100)
except FileNotFoundError as error:
    hosts.fail(str(error))
"""


def test_one_process_that_fails_ends_all_with_its_reason(starter, tmp_path):
    arguments = ["--folder", str(tmp_path)]
    with starter.together(tmp_path, arguments, count=3, devices=2, command=["-c", APART]) as processes:
        assert [process.wait(60) for process in processes] == [1, 1, 1]
        complaints = [process.complained().splitlines()[-1] for process in processes]
        assert [process.said() for process in processes] == ["shared\n"] * 3
    reason = f"{tmp_path / 'True'} on process 2 of 3 is not the folder that process 0 writes to; MODEL_DIR must be"
    assert complaints[2].startswith(f"sbs, process 2 of 3: {reason}")
    for index in (0, 1):
        assert complaints[index].startswith(f"sbs, process {index} of 3: Process 2 of 3 ended: {reason}")


@pytest.mark.slow
def test_another_configuration_is_refused(starter, folder, tmp_path):
    elsewhere = shutil.copytree(folder / "records", tmp_path / "elsewhere")

    def arguments(index: int) -> list[str]:
        records = [] if index == 0 else [f"--gin.RECORDS_DIR={elsewhere}"]  # not a difference by itself
        return [*toy.train_flags(folder, tmp_path / "run", f"SEED={index}"), *records]

    with starter.together(tmp_path, arguments, count=2, path=[folder]) as processes:
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
