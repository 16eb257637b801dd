"""Real `sbs train` processes, killed or preempted at any moment and resumed, end as uninterrupted ones do.

The short forms run in the suite, the long ones with `make test-faults`, which prints figures (docs/reliability.md).
"""

import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toy
from builders import disks
from builders.finished_runs import assert_close, assert_same, contents
from processes import Process, until

from sbs_jax.data import batches, registry, tokens
from sbs_jax.hosts import preemption
from sbs_jax.run import checkpoints, directory
from sbs_jax.storage import checksums

STEPS, EVALUATED = 40, 16
# A checkpoint is nearly always being written; log lines, evaluations and checkpoints fall on different steps; 7 epochs.
MACROS = {
    "TRAIN_STEPS": STEPS,
    "LOG_PERIOD": 8,
    "EVAL_PERIOD": EVALUATED,
    "CHECKPOINT_PERIOD": 3,
    "MICRO_BATCHES": 2,
    "EVAL_BATCH_SIZE": 4,
}


LONG = (pytest.mark.faults, pytest.mark.timeout(3600))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with everything a command line needs to train on the toy dataset."""
    before = registry.options()
    yield toy.write_command(tmp_path_factory.mktemp("faults"), **MACROS)
    registry.configure(before)


@pytest.fixture(scope="module")
def reference(starter, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run by `python -m sbs_jax`, which compiles by itself and traces some steps."""
    folders = tmp_path_factory.mktemp("reference")
    run = folders / "run"
    flags = toy.train_flags(folder, run, "PROFILE_STEPS=(10, 12)")
    with starter.alone(folders, flags, path=[folder], spawn=True) as process:
        assert process.wait() == 0, process.complained()
        assert "Error" not in process.complained()
    return run


@pytest.mark.slow
def test_a_profile_has_the_steps_that_were_asked_for(reference):
    """That it changes no number is what the other tests find, which compare with this run."""
    (trace,) = (reference / "tensorboard" / "plugins" / "profile" / "steps-10-12").glob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))
    names = [event.name for plane in data.planes for line in plane.lines for event in line.events]
    assert names.count("train") == 3


def being_written(run: Path) -> set[str]:
    """Lists directories of checkpoints that are being written (or, by the other name, removed)."""
    return {path.name for path in (run / "checkpoints").glob("*.writing")}


def last_line(run: Path) -> dict[str, Any]:
    lines = directory.read_metrics(run)
    return lines[-1] if lines else {"kind": None, "step": 0}


def assert_checkpoints_are_whole(run: Path) -> None:
    for step in checkpoints.steps(run):
        assert checksums.problem(run / "checkpoints" / str(step)) is None


# ------------------------------------------------------------------------------------------ kill -9


def waited_for(moment: str, process: Process, run: Path) -> bool:
    """Waits for a moment of the run; False if the process ended before it."""
    old, begun = being_written(run), last_line(run)

    def has_come() -> bool:
        if moment == "start":
            return True
        if moment == "steps":
            return "loss" in process.complained()
        if moment == "save":
            return bool(being_written(run) - old)
        line = last_line(run)
        if moment == "evaluation":
            return line != begun and line["kind"] == "train" and line["step"] % EVALUATED == 0
        return line["kind"] == "train" and line["step"] == STEPS

    while not has_come():
        if not process.running():
            return False
        time.sleep(0.002)
    return True


# Seconds after a moment within which the kill comes.
MOMENTS = {"start": 2.5, "steps": 0.4, "save": 0.05, "evaluation": 0.2, "end": 0.7}


def stop_while_saving(process: Process, run: Path, *, after: float) -> None:
    """Stops the process (SIGSTOP) `after` some seconds of a save; sooner in a later one if this is on disk by then."""
    while waited_for("save", process, run):
        time.sleep(after)
        process.send(signal.SIGSTOP)
        while process.running() and Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
        if being_written(run):
            return
        process.send(signal.SIGCONT)
        after /= 2


WHILE_SAVING = "while a checkpoint was written"


def kill_once(starter: Any, folder: Path, run: Path, *, moment: str, after: float) -> str | None:
    """Resumes the run and kills it at a moment; returns whether it was saving then, None if it ended before."""
    with starter.alone(folder, toy.train_flags(folder, run), path=[folder]) as process:
        if moment == "save":
            stop_while_saving(process, run, after=after)
        else:
            came = waited_for(moment, process, run)
            time.sleep(after if came else 0)
        process.send(signal.SIGKILL)
        status = process.wait()
        assert status in (0, -signal.SIGKILL), process.complained()
        if status == 0:
            return None
    assert_checkpoints_are_whole(run)
    return WHILE_SAVING if being_written(run) else "at another moment"


def finish(starter: Any, folder: Path, run: Path, *bindings: str) -> None:
    with starter.alone(folder, toy.train_flags(folder, run, *bindings), path=[folder]) as process:
        assert process.wait() == 0, process.complained()


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "of_a_run"), [(4, 4), pytest.param(30, 5, marks=LONG)])
def test_killed_at_any_moment_and_resumed_a_run_ends_as_if_nothing_had_been(
    starter, folder, reference, tmp_path, kills, of_a_run
):
    chosen = random.Random(kills)
    moments = [*MOMENTS] * (kills // len(MOMENTS)) + ["start", "steps", "evaluation", "save"][: kills % len(MOMENTS)]
    chosen.shuffle(moments)
    count: collections.Counter[tuple[str, str]] = collections.Counter()
    number = 0
    while moments:
        run, killed = tmp_path / f"run-{number}", 0
        while moments and killed < of_a_run:
            # In order of time, so that the run has not ended before its last kill.
            moment = min(moments[: of_a_run - killed], key=[*MOMENTS].index)
            was = kill_once(starter, folder, run, moment=moment, after=chosen.uniform(0, MOMENTS[moment]))
            if was is None:
                break  # its remaining moments go to the next run
            moments.remove(moment)
            killed += 1
            count[moment, was] += 1
        finish(starter, folder, run)
        assert_same(run, reference)
        number += 1
    print(f"\n{sum(count.values())} kills of {number} runs, aimed at and hit:")
    for (moment, was), times in sorted(count.items()):
        print(f"  {moment}: {times} {was}")
    assert count["save", WHILE_SAVING] == sum(times for (moment, _), times in count.items() if moment == "save") > 0


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_seeds_that_share_a_process_end_after_kills_as_runs_of_their_own(starter, folder, reference, tmp_path):
    def command() -> Any:
        flags = [*toy.train_flags(folder, tmp_path / "run-{seed}"), "--seeds=1,0"]
        return starter.alone(folder, flags, path=[folder])

    first, second = tmp_path / "run-1", tmp_path / "run-0"
    for run in (first, second):  # killed within the first run, then within the second
        with command() as process:
            until(lambda run=run: bool(checkpoints.steps(run)), [process])
            process.send(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, process.complained()
        assert_checkpoints_are_whole(run)
    with command() as process:
        assert process.wait() == 0, process.complained()
    assert_same(second, reference)
    assert last_line(first)["kind"] == "test"


# ------------------------------------------------------------------------------------------ SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, pytest.param(8, marks=LONG)])
def test_told_to_end_once_it_saves_and_told_twice_it_ends_at_once(starter, folder, reference, tmp_path, times):
    chosen, statuses = random.Random(times), []
    run = tmp_path / "run"
    for number in range(times):
        with starter.alone(tmp_path, toy.train_flags(folder, run), path=[folder]) as process:
            moment = ["evaluation", "save", "steps"][number % 3]
            if not waited_for(moment, process, run):
                break
            twice = bool(number % 2)
            time.sleep(chosen.uniform(0, 0.1))
            process.send(signal.SIGTERM)
            begin = time.monotonic()
            if twice:
                time.sleep(chosen.uniform(0.001, 0.005))
                process.send(signal.SIGINT)  # a second SIGTERM is lost while the first has not arrived
                begin = time.monotonic()
            statuses.append(process.wait(20))
            seconds = time.monotonic() - begin
        assert_checkpoints_are_whole(run)
        if statuses[-1] == preemption.EXIT_STATUS:
            last = checkpoints.steps(run)[-1]
            assert not being_written(run)
            assert f"stopped after step {last} of {STEPS}, which is saved" in process.complained()
        else:
            assert twice
            # Whichever arrived last; by itself if the process was about to end.
            assert statuses[-1] in {128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT}, (
                process.complained()
            )
            assert seconds < 1
    print(f"\nstatuses: {statuses}")
    assert statuses[0] == preemption.EXIT_STATUS
    assert statuses[1] != preemption.EXIT_STATUS
    finish(starter, folder, run)
    assert_same(run, reference)


def test_a_signal_ends_a_process_that_is_about_to_end_without_python(starter, tmp_path):
    text = (
        "import atexit, sys, time\n"
        "from sbs_jax.cli import main\n"
        "atexit.register(lambda: (print('ending', flush=True), time.sleep(60)))\n"
        "sys.argv = ['sbs', '--version']\n"
        "sys.exit(main.command())\n"
    )
    with starter.alone(tmp_path, [], command=("-c", text)) as process:
        until(lambda: "ending" in process.said(), [process])
        process.send(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT
        assert "KeyboardInterrupt" not in process.complained()


# ------------------------------------------------------------------------------------ two processes


TWO = ("LOG_PERIOD=1", "TRAIN_STEPS=16", "EVAL_PERIOD=8")


@contextlib.contextmanager
def two(starter: Any, folder: Path, run: Path, *bindings: str) -> Iterator[list[Process]]:
    flags = toy.train_flags(folder, run, *(bindings or TWO))
    with starter.together(run.parent, flags, count=2, path=[folder]) as processes:
        yield processes


def steps_of(processes: list[Process], run: Path) -> int:
    """Returns the newest step logged by these processes, not by earlier ones."""
    return last_line(run)["step"] if "loss" in processes[0].complained() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "bindings"),
    [(1, TWO), pytest.param(10, (*TWO[:1], "TRAIN_STEPS=60", *TWO[2:]), marks=LONG)],
)
def test_two_processes_told_to_end_or_killed_end_as_if_nothing_had_been(starter, folder, tmp_path, signals, bindings):
    whole, one, run = (tmp_path / name / "run" for name in ("whole", "one", "interrupted"))
    for path in (whole, one, run):
        path.parent.mkdir()
    with two(starter, folder, whole, *bindings) as processes:
        assert [process.wait() for process in processes] == [0, 0], processes[0].complained()
    if signals > 1:  # as in test_hosts.py
        finish(starter, folder, one, *bindings)
        assert_close(whole, one)

    chosen = random.Random(signals)
    count = checkpoints.steps(whole)[-1]
    stops = []
    for step in sorted(chosen.sample(range(2, count - 3), signals)):
        with two(starter, folder, run, *bindings) as processes:
            until(lambda: steps_of(processes, run) >= step, processes)  # noqa: B023
            chosen.choice(processes).send(signal.SIGTERM)
            assert [process.wait() for process in processes] == [preemption.EXIT_STATUS] * 2
        stops.append(checkpoints.steps(run)[-1])
        assert f"stopped after step {stops[-1]} of {count}" in processes[0].complained()
        assert last_line(run)["step"] == stops[-1]
        assert_checkpoints_are_whole(run)
    print(f"\nstopped after steps {stops}")
    for index in (1,) if signals == 1 else (1, 0):
        with two(starter, folder, run, *bindings) as processes:
            until(lambda: steps_of(processes, run) > 0, processes)
            processes[index].send(signal.SIGKILL)
            assert processes[1 - index].wait(20) == 1
            assert "Lost contact with process" in processes[1 - index].complained()
        assert_checkpoints_are_whole(run)
    with two(starter, folder, run, *bindings) as processes:
        assert [process.wait() for process in processes] == [0, 0], processes[0].complained()
    assert_same(run, whole)


# --------------------------------------------------------------------------------- where a run goes on


@pytest.mark.parametrize(("pack", "rows_of_epoch"), [(False, 1_100_000), (True, 190_000)])
def test_to_go_on_after_three_epochs_of_550_000_rows_takes_seconds(monkeypatch, pack, rows_of_epoch):
    """e-SNLI has 549,367 rows; those already seen are neither read nor built again."""
    registry.add(toy.DATASET)
    found = {}
    for task in ("toy_label", "toy_rationale"):
        for feature, longest in (("inputs", 60), ("targets", 40)):
            sizes = np.random.default_rng(len(found)).integers(5, longest, 550_000)
            starts = np.concatenate([[0], np.cumsum(sizes)])
            ids = np.arange(starts[-1], dtype=np.int32) % 300 + 2
            found.setdefault(task, {})[feature] = tokens.TokenTable(ids=ids, starts=starts)
    monkeypatch.setattr(registry, "token_tables", lambda task, split: found[task])

    def stream(skip: int) -> Iterator[dict[str, np.ndarray]]:
        lengths = {"inputs": 512, "targets": 128} if pack else {"inputs": 60, "targets": 40}
        return batches.train_dataset(
            "toy_step_by_step", lengths=lengths, split="train", batch_size=128, pack=pack, seed=0, skip_batches=skip
        )

    steps = 3 * rows_of_epoch // 128
    begin, used = time.monotonic(), time.process_time()
    rows = stream(steps)
    next(rows)
    used = time.process_time() - used
    print(f"\n{time.monotonic() - begin:.2f} s, {used:.2f} s of CPU to step {steps:,}, packed: {pack}")
    assert used < 4
    second, after = next(rows), next(stream(steps + 1))
    for name, array in second.items():
        np.testing.assert_array_equal(after[name], array)


# --------------------------------------------------------------------------------------------- soak


SOAK = {
    "TRAIN_STEPS": 2000,
    "LOG_PERIOD": 5,
    "EVAL_PERIOD": 250,
    "CHECKPOINT_PERIOD": 10,
    "SKIP_NON_FINITE": 2000,
    "STALL_SECONDS": 1.0,
    "KEEP_CHECKPOINTS": 3,
}
EVERY = 50  # steps from fault to fault
# Faults within one process first, so that its memory can be watched; then those that end it.
OUTAGES = ("full", "read-only")
ENDING = ("killed", "told to end", "killed and damaged")
FAULTS = ["full", "frozen", "read-only", "damaged", "no data"] * 5 + [*ENDING, "frozen"] * 3
WARM_UP = 300  # steps of a process before its memory is looked at
# MB per 1,000 steps, and so per 100 saves. Each time that Orbax reads TensorStore's counters, TensorStore (0.1.86)
# loses 12 KB, 45 KB a save: 7 to 13 MB with 100 saves, 18 to 21 where 40 fail besides, 1 MB without any. One state kept
# by every save would be 60 MB.
GROWTH = 30.0
DISK = 24 << 20  # bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "disk", f"size={DISK}") as disk:
        yield disk


@contextlib.contextmanager
def fault(name: str, *, process: Process, run: Path, folder: Path) -> Iterator[Callable[[], None]]:
    """Causes a fault inside the block; the yielded function must be called from time to time."""

    def nothing() -> None:
        pass

    if name == "full":
        filler = run.parent / "somebody else's"
        with filler.open("wb", buffering=0) as file:

            def fill() -> None:  # again and again, since the run removes checkpoints too
                assert shutil.disk_usage(run).total == DISK, "somebody unmounted the small disk"
                with contextlib.suppress(OSError):
                    for _ in range(DISK // 4096 + 1):
                        file.write(bytes(4096))

            fill()
            yield fill
        filler.unlink()
    elif name == "read-only":
        subprocess.run(["mount", "--bind", run, run], check=True)
        try:
            command = ["mount", "-o", "remount,bind,ro", run]
            # Not while a file is open for writing.
            until(lambda: not subprocess.run(command, capture_output=True, check=False).returncode, [process])
            yield nothing
        finally:
            subprocess.run(["umount", "-l", run], check=True)
    elif name == "frozen":
        process.send(signal.SIGSTOP)
        time.sleep(1.5)
        process.send(signal.SIGCONT)
        yield nothing
    elif name == "damaged":
        flip(run, newest=False)
        yield nothing
    elif name == "no data":
        records = folder / "records" / "toy" / "train.jsonl"
        away = records.rename(records.with_suffix(".away"))
        yield nothing
        away.rename(records)


def flip(run: Path, *, newest: bool) -> None:
    """Changes one byte of the newest checkpoint, or of an older one that is not the best."""
    *older, step = checkpoints.steps(run)
    if not newest:
        step = max(set(older) - {checkpoints.best_step(run)})
    arrays = run / "checkpoints" / str(step) / "parameters"
    file = max((path for path in arrays.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


class Gauge:
    """Resident memory and open files of a process, by step."""

    def __init__(self, process: Process, run: Path) -> None:
        self._process, self._run = process, run
        self.readings: list[tuple[int, float, int]] = []  # step, MB, files

    def read(self) -> int:
        """Takes a reading and returns its step."""
        step = steps_of([self._process], self._run)
        with contextlib.suppress(OSError):  # it has ended
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
            files = len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))
            self.readings.append((step, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files))
        return step

    def slopes(self, *, after: int) -> tuple[float, float, float] | None:
        """Returns growth in MB and open files per 1,000 steps, and the number of steps; None if too few."""
        least: dict[int, tuple[float, int]] = {}  # of every 50 steps: between two saves
        first = next((step for step, _, _ in self.readings if step), 0)
        for step, memory, files in self.readings:
            if step >= first + after:
                before = least.get(step // EVERY, (memory, files))
                least[step // EVERY] = (min(memory, before[0]), min(files, before[1]))
        if len(least) < 5:
            return None
        least.popitem()  # cut short
        steps = np.array(list(least)) * EVERY
        memory, files = np.array(list(least.values())).T
        print(" ", *(f"{x:.0f} MB, {y:.0f} files;" for x, y in zip(memory, files, strict=True)))
        return np.polyfit(steps / 1000, memory, 1)[0], np.polyfit(steps / 1000, files, 1)[0], np.ptp(steps)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_long_run_with_a_fault_every_50_steps_ends_as_one_without(starter, small_disk, tmp_path):
    folder = tmp_path / "command"
    folder.mkdir()
    toy.write_command(folder, **{**MACROS, **SOAK})
    infinite, _ = toy.poison(folder / "records", folder / "start.npz")
    bindings = [f"INITIAL_CHECKPOINT_PATH={infinite}"]
    whole, run = tmp_path / "whole", small_disk / "run"
    finish(starter, folder, whole, *bindings)
    left_out = contents(whole).metadata["skipped"]
    assert left_out > 50

    flags = toy.train_flags(folder, run, *bindings)
    faults, gauges, processes, injected = list(FAULTS), [], [], collections.Counter()
    with contextlib.ExitStack() as stack:

        def start() -> Process:
            processes.append(starter.start(tmp_path, flags, path=[folder]))
            stack.callback(processes[-1].end)
            gauges.append(Gauge(processes[-1], run))
            return processes[-1]

        process, due = start(), EVERY
        while process.running():
            time.sleep(0.02)
            step = gauges[-1].read()
            if step < due or not faults:
                continue
            name = faults.pop(0)
            injected[name] += 1
            due += EVERY
            if name in ENDING:
                process.send(signal.SIGTERM if name == "told to end" else signal.SIGKILL)
                assert process.wait(30) == (preemption.EXIT_STATUS if name == "told to end" else -signal.SIGKILL)
                if name == "killed and damaged":
                    flip(run, newest=True)
                process = start()
            else:
                before = len(process.complained())
                with fault(name, process=process, run=run, folder=folder) as again:

                    def has_shown() -> bool:
                        again()
                        if name in OUTAGES:  # noqa: B023  (no line comes to the disk by which to count steps)
                            return "Cannot write" in process.complained()[before:]  # noqa: B023
                        return gauges[-1].read() > step  # noqa: B023

                    until(has_shown, [process])
                    end = time.monotonic() + 0.2
                    until(lambda: again() or time.monotonic() > end, [process])  # noqa: B023
        assert process.wait() == 0, process.complained()
    assert not faults
    assert_same(run, whole)
    said = "\n".join(process.complained() for process in processes)
    print(f"\n{sum(injected.values())} faults: {dict(injected)}; {left_out} of 2,000 steps left out")
    for text in ("No space left", "Read-only file system", "cannot be used", "Nothing moves"):
        print(f"  {text!r} was said {said.count(text)} times")
        assert said.count(text) > 0
    told = [gauge.slopes(after=WARM_UP) for gauge in gauges]
    for slopes in told:
        if slopes is not None:
            print("  over {2} steps: {0:+.2f} MB and {1:+.2f} open files per 1,000 steps".format(*slopes))
    assert any(slopes is not None and slopes[2] >= 500 for slopes in told)
    for slopes in told:
        assert slopes is None or (slopes[0] < GROWTH and slopes[1] < 1)
