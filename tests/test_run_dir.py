"""Run directories: one writer, nothing lost when the disk fails, nothing resumed with other data or settings."""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
import pytest
import toy
from builders import disks

from sbs_jax.data import registry, selection
from sbs_jax.run import directory, settings
from sbs_jax.storage import lock
from sbs_jax.training import contents, gin_files, loop
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.step import prepare
from tasks import builtin

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "SEED = 0\n"
UNPRIVILEGED = 65534


def opened(path: Path, config_text: str = CONFIG) -> directory.RunDir:
    return directory.RunDir(path, config_text=config_text)


class Python:
    """Starts a real process, which is killed at the end."""

    def __init__(self, code: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def hear(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, line: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "Python":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


# --------------------------------------------------------------------------------- one writer

HOLDER = """
import sys
from sbs_jax.run import directory
try:
    with directory.RunDir(sys.argv[1], config_text="SEED = 0\\n") as run:
        print("in", flush=True)
        for line in sys.stdin:
            run.log("train", int(line), {})
            print("logged", flush=True)
except OSError as error:
    print("refused:", error, flush=True)
"""


def test_a_second_process_is_refused_and_a_killed_one_frees_the_directory(tmp_path, caplog):
    run = tmp_path / "run"
    with Python(HOLDER, run) as process:
        assert process.hear() == "in\n"
        host = os.uname().nodename
        with pytest.raises(lock.HeldError, match=rf"{run} is in use: process {process.pid} on {host} \(since 20"):
            opened(run).__enter__()
        assert list(run.glob("*.tmp")) == []
        process.kill()
        with caplog.at_level(logging.INFO), opened(run) as mine:
            assert f"left behind by process {process.pid} on {host}" in caplog.text
            mine.log("train", 1, {"loss": 1.0})
            with Python(HOLDER, run) as other:
                assert other.hear().startswith(f"refused: {run} is in use: process {os.getpid()} on {host}")
    assert (run / "lock").read_bytes() == b""
    assert [line["step"] for line in directory.read_metrics(run)] == [1]


def test_the_same_process_cannot_enter_twice_either(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run")
    for name in (tmp_path / "run", link):
        with opened(tmp_path / "run"), pytest.raises(lock.HeldError, match=f"process {os.getpid()} "):
            opened(name).__enter__()
    with opened(tmp_path / "run"):  # refused once, and free again
        pass


def test_of_processes_that_start_at_once_one_comes_in(tmp_path):
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Python(HOLDER, tmp_path / "run")) for _ in range(4)]
        said = sorted(process.hear()[:8] for process in processes)
    assert said == ["in\n", "refused:", "refused:", "refused:"]


@pytest.mark.parametrize("comes_back", ["stays", "removed", "given back"])
def test_a_run_that_another_process_took_over_writes_nothing_more(tmp_path, comes_back):
    """On a network file system whose flock does not reach another host, only the token in the lock file changes."""
    other = {"token": "x", "host": "elsewhere", "pid": 7, "since": "2026-11-21T00:00:00+00:00"}
    run = opened(tmp_path)
    with run:
        run.log("train", 1, {})
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
        run.check()
        (tmp_path / "new").write_text(json.dumps(other))
        (tmp_path / "new").replace(tmp_path / "lock")
        with pytest.raises(lock.TakenOverError, match=r"process 7 on elsewhere .*took over .*this one, process \d+"):
            run.log("train", 2, {})
        # Events in between are unknown, so the first process cannot continue.
        if comes_back == "removed":
            (tmp_path / "lock").unlink()
        elif comes_back == "given back":
            (tmp_path / "lock").write_bytes(b"")
        for write in (
            lambda: run.log("train", 3, {}),
            lambda: run.write_predictions("a", [{"id": "1"}]),
            lambda: run.begin({}, step=0, accept_changes=True),
            lambda: run.truncate_metrics(lines=0),
            run.check,
            run.flush,
        ):
            with pytest.raises(lock.TakenOverError):
                write()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    assert after == before
    if comes_back == "stays":
        assert json.loads((tmp_path / "lock").read_text()) == other


LEFT_BEHIND = {
    "empty": b"",
    "zeros": b"\0" * 100,
    "half": b'{"token": "x',
    "nobody": b"{}",
    "deep": b"[" * 4000,
    "list": b"[1]",
    "binary": b"\xff\xfe",
    "another host": json.dumps({"token": "x", "host": "elsewhere", "pid": 7, "since": "then"}).encode(),
}


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_lock_files_that_are_left_behind_do_not_keep_anybody_out(tmp_path, what, caplog):
    caplog.set_level(logging.INFO)
    held = LEFT_BEHIND[what]
    (tmp_path / "lock").write_bytes(held)
    (tmp_path / "config.gin.tmp").write_text("SEED")  # killed while it began
    with opened(tmp_path) as run:
        run.log("train", 1, {})
        holder = lock.read(tmp_path / "lock")
        assert holder is not None
        assert holder.pid == os.getpid()
    if what == "another host":
        assert "was not released by process 7 on elsewhere (since then). If that process still runs" in caplog.text
    elif what != "empty":
        assert "left behind by an unnamed process" in caplog.text
    else:
        assert warnings_of(caplog) == []


def test_a_lock_that_somebody_removed_is_taken_again(tmp_path):
    with opened(tmp_path) as run:
        (tmp_path / "lock").unlink()
        run.log("train", 1, {})
        with Python(HOLDER, tmp_path) as other:
            assert other.hear().startswith("refused: ")
        (tmp_path / "lock").unlink()
        with Python(HOLDER, tmp_path) as other:  # quicker than this one
            assert other.hear() == "in\n"
            with pytest.raises(lock.TakenOverError, match=rf"process {other.pid} on .* took"):
                run.log("train", 2, {})
            other.tell(3)
            assert other.hear() == "logged\n"
    assert [line["step"] for line in directory.read_metrics(tmp_path)] == [1, 3]


def test_a_lock_removed_while_it_is_taken_is_made_anew(tmp_path, monkeypatch):
    take, removed = lock.Lock._flock, []

    def slowly(self, descriptor):
        if not removed:
            removed.append(self.path.unlink())
        take(self, descriptor)

    monkeypatch.setattr(lock.Lock, "_flock", slowly)
    with opened(tmp_path), pytest.raises(lock.HeldError):
        opened(tmp_path).__enter__()


def test_a_lock_that_was_removed_and_does_not_fit_on_the_disk_waits_too(disk):
    run = disk / "run"
    with opened(run) as held:
        held.log("train", 1, {})
        (run / "lock").unlink()
        with full(disk, run):
            held.log("train", 2, {})
            held.log("train", 3, {})
            assert len(directory.read_metrics(run)) == 1
        held.log("train", 4, {})
        with pytest.raises(lock.HeldError):
            opened(run).__enter__()
    assert [line["step"] for line in directory.read_metrics(run)] == [1, 2, 3, 4]


# Two processes joined as by `hosts.join`, but for JAX, which takes seconds.
JOINED = """
import sys, time
from sbs_jax import hosts
from sbs_jax.hosts import api, link, roll
from sbs_jax.run import directory
index, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
api._place = place = hosts.Place(coordinator=f"localhost:{port}", count=2, index=index)
deadline = time.monotonic() + 20
wires = roll.call_roll(place, 20, deadline) if index == 0 else {0: roll.answer_roll(place, 20, deadline)}
api._link = link.Link(place, wires)
try:
    with directory.RunDir(folder, config_text="SEED = 0\\n") as run:
        run.log("train", 1, {})
        print(run.lines, end=" ")
        run.truncate_metrics(lines=5)
        print("in", run.lines, flush=True)
        run.begin({"mesh": {}}, step=int(sys.argv[4]), accept_changes=False)
        hosts.leave()
except (OSError, ValueError) as error:
    hosts.fail(str(error))
"""


def joined(folder: Path, step: int) -> list[tuple[int, str, str]]:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    with Python(JOINED, 0, port, folder, step) as first, Python(JOINED, 1, port, folder, step) as second:
        ended = []
        for child in (first, second):
            said, complained = child.process.communicate(timeout=60)
            ended.append((child.process.returncode, said, complained))
        return ended


def test_of_several_processes_the_first_locks_and_a_refusal_reaches_all(tmp_path):
    with opened(tmp_path / "held"):
        for status, said, complained in joined(tmp_path / "held", 0):
            assert (status, said) == (1, "")
            assert f"is in use: process {os.getpid()} on" in complained
    for status, said, complained in joined(tmp_path / "new", 0):
        assert (status, said) == (0, "1 in 1\n"), complained
    (tmp_path / "new" / "manifest.json").write_text("{")
    for status, said, complained in joined(tmp_path / "new", 3):
        assert (status, said) == (1, "2 in 2\n")
        assert "manifest.json is damaged" in complained


# ---------------------------------------------------------------------- disks that take nothing


@contextlib.contextmanager
def full(disk: Path, run: Path, *, left: int = 0) -> Iterator[None]:
    """Fills the disk up to `left` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    os.truncate(filler, filler.stat().st_size - left)
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(disk: Path, run: Path) -> Iterator[None]:
    disks.mount("--bind", run, run)
    try:
        disks.mount("-o", "remount,bind,ro", run)
        yield
    finally:
        subprocess.run(["umount", "-l", run], check=True)


@contextlib.contextmanager
def forbidden(disk: Path, run: Path) -> Iterator[None]:
    """Runs as another user with read permission, since root is never refused."""
    for path in (run, *run.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    root = os.geteuid() == 0
    if root:
        os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in (run, *run.rglob("*")):
            path.chmod(path.stat().st_mode | 0o222)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A small disk outside of pytest's folders, which other users may not enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    with disks.small_disk(folder / "disk", "size=512k") as path:
        yield path
    shutil.rmtree(folder)


def write_step(run: directory.RunDir, step: int) -> None:
    """A long line, which does not fit into what a full disk has left of its last page; predictions every third."""
    run.log("train", step, {f"loss {number}": step + number / 7 for number in range(100)})
    if step % 3 == 0:
        run.write_predictions(
            f"toy-{step}", [{"id": str(step), "text": "x\u2028é\ud800" * 200, "n": n} for n in range(3)]
        )


def files(path: Path) -> dict[str, bytes]:
    """Reads a run's files; TensorBoard events, which contain times, are compared by their values."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.parent.name != "tensorboard" and file.name != "filler"
    }


def scalars(path: Path) -> list[tuple[int, str, float]]:
    """Reads events with TensorBoard's own reader."""
    from tensorboard.backend.event_processing import event_file_loader
    from tensorboard.util import tensor_util

    found = []
    for file in sorted((path / "tensorboard").iterdir()):
        events = list(event_file_loader.EventFileLoader(str(file)).Load())
        assert [event.HasField("file_version") for event in events] == [True] + [False] * (len(events) - 1)
        for event in events:
            found += [
                (event.step, value.tag, float(tensor_util.make_ndarray(value.tensor))) for value in event.summary.value
            ]
    return found


OUTAGES = {"full disk": full, "read-only": read_only, "no permission": forbidden}


@pytest.mark.parametrize("outage", OUTAGES)
def test_nothing_is_lost_or_doubled_when_the_disk_takes_nothing_for_a_while(disk, tmp_path, outage, caplog):
    caplog.set_level(logging.INFO)
    run = disk / "run"
    with opened(tmp_path / "plain") as reference:
        for step in range(1, 13):
            write_step(reference, step)
    with opened(run) as tried:
        for step in range(1, 5):
            write_step(tried, step)
        before = files(run)
        with OUTAGES[outage](disk, run):
            for step in range(5, 10):
                write_step(tried, step)
                assert tried.lines == step
                seen = files(run)
                assert [line["step"] for line in directory.read_metrics(run)] == [1, 2, 3, 4]
                assert seen["metrics.jsonl"].startswith(before["metrics.jsonl"])
                assert not [name for name in seen if name.endswith(".tmp")]  # which would take the last free bytes
            assert [line["step"] for line in tried.metrics()] == list(range(1, 10))
        assert "can be written again" not in caplog.text
        for step in range(10, 13):
            write_step(tried, step)
        tried.flush()
    assert files(run) == files(tmp_path / "plain")
    rows = (run / "predictions" / "toy-9.jsonl").read_text("utf-8").split("\n")
    assert json.loads(rows[2]) == {"id": "9", "text": "x\u2028é\ud800" * 200, "n": 2}
    assert scalars(run) == scalars(tmp_path / "plain")
    assert len(scalars(run)) == 1200
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, messages
    reason = {"full disk": "No space left", "read-only": "Read-only file system", "no permission": "Permission denied"}
    assert messages[0].startswith(f"Cannot write {run / 'metrics.jsonl'}: {reason[outage]}")
    assert messages[1].startswith(f"{run} can be written again")


@pytest.mark.parametrize("seed", range(4))
def test_many_outages_at_random_moments_leave_the_same_bytes(disk, tmp_path, seed):
    chance = random.Random(seed)
    run = disk / "run"
    with opened(tmp_path / "plain") as reference, opened(run) as tried:
        steps = itertools.count(1)
        for _ in range(8):
            with full(disk, run, left=4096 * chance.randrange(4)):
                for step in itertools.islice(steps, chance.randrange(3)):
                    write_step(reference, step)
                    write_step(tried, step)
                    whole = (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else b""
                    assert (tmp_path / "plain" / "metrics.jsonl").read_bytes().startswith(whole)
                    assert whole == b"" or whole.endswith(b"\n")
            for step in itertools.islice(steps, chance.randrange(2)):
                write_step(reference, step)
                write_step(tried, step)
        reference.flush()
        tried.flush()
    assert files(run) == files(tmp_path / "plain")
    assert scalars(run) == scalars(tmp_path / "plain")


def test_a_process_killed_in_an_outage_leaves_whole_lines(disk):
    run = disk / "run"
    with Python(HOLDER, run) as process:
        assert process.hear() == "in\n"
        with full(disk, run):
            for step in range(1, 200):
                process.tell(step)
                assert process.hear() == "logged\n"
            process.kill()
    with opened(run) as again:
        steps = [line["step"] for line in again.metrics()]
        assert steps == list(range(1, len(steps) + 1))
        again.log("train", 1000, {})
        assert [line["step"] for line in again.metrics()] == [*steps, 1000]


def test_what_is_missing_at_the_end_is_named(disk):
    run = disk / "run"
    with opened(run) as tried:
        write_step(tried, 1)
        with full(disk, run):
            write_step(tried, 2)
            tried.write_predictions("toy-2", [{"id": "1"}])
            with pytest.raises(OSError, match="are not complete") as error:
                tried.flush()
        text = str(error.value)
        for name in ("metrics.jsonl", "predictions/toy-2.jsonl"):
            assert f"{run / name}: No space left on device" in text
        assert json.loads(text.splitlines()[-1])["step"] == 2  # so that nothing is lost
    # Leaving tries once more.
    assert [line["step"] for line in directory.read_metrics(run)] == [1, 2]
    assert (run / "predictions" / "toy-2.jsonl").exists()


def test_one_file_that_cannot_be_written_does_not_hold_up_the_others(tmp_path):
    with opened(tmp_path) as run:
        (tmp_path / "tensorboard").write_text("in the way")
        (tmp_path / "predictions" / "toy-1.jsonl.tmp").mkdir(parents=True)
        run.log("train", 1, {"loss": 1.0})
        run.write_predictions("toy-1", [])
        run.write_predictions("toy-2", [{"id": "2"}])
        assert [line["step"] for line in directory.read_metrics(tmp_path)] == [1]
        assert (tmp_path / "predictions" / "toy-2.jsonl").read_text() == '{"id": "2"}\n'
        with pytest.raises(OSError, match="are not complete") as error:
            run.flush()
    named = [line.split(": ")[0].strip() for line in str(error.value).splitlines()[1:]]
    events = tmp_path / "tensorboard" / "events.out.tfevents.0000000001"
    assert named == [str(events), str(tmp_path / "predictions" / "toy-1.jsonl")]


@pytest.mark.parametrize("outage", OUTAGES)
def test_a_directory_that_cannot_be_written_to_is_refused_at_the_start(disk, outage):
    run = disk / "run"
    run.mkdir()
    reason = {"full disk": "No space left", "read-only": "Read-only", "no permission": "Permission denied"}[outage]
    with OUTAGES[outage](disk, run), pytest.raises(OSError, match=rf"{run} cannot be written to: {reason}.*MODEL_DIR"):
        opened(run).__enter__()
    with opened(run):
        pass


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="cannot be written to: File exists"):
        opened(tmp_path / "run").__enter__()
    with pytest.raises(OSError, match="cannot be written to: Not a directory"):
        opened(tmp_path / "run" / "deeper").__enter__()
    (tmp_path / "other" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "other" / "config.gin").write_text(CONFIG)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is a folder; expected a regular file"):
        opened(tmp_path / "other").__enter__()
    (tmp_path / "other" / "metrics.jsonl").rmdir()
    with opened(tmp_path / "other"):  # the lock was given back
        pass


def test_metrics_that_somebody_else_changes_are_continued_with_a_warning(tmp_path, caplog):
    with opened(tmp_path) as run:
        for step in (1, 2):
            run.log("train", step, {})
        (tmp_path / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes().splitlines(True)[0])
        run.log("train", 3, {})
    assert [line["step"] for line in directory.read_metrics(tmp_path)] == [1, 3]
    assert "was changed by another program" in caplog.text


# ------------------------------------------------------------------------------------- metrics

LINES = [
    b'{"kind": "train", "step": 2, "loss": 1.0}\n',
    b'{"step":3,"kind":"validation",  "accuracy": 12.50, "loss": NaN}\r\n',
    b'{"kind": "train", "step": 4}\n',
]
TEST = b'{"kind": "test", "step": 3, "accuracy": 1.0}\n'


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def truncated(path: Path, contents: bytes | None, *, lines: int) -> bytes | None:
    """Truncates and continues a metrics file as a resumed run does; returns what was left."""
    file = path / "metrics.jsonl"
    if contents is not None:
        file.write_bytes(contents)
    with opened(path) as run:
        run.truncate_metrics(lines=lines)
        left = file.read_bytes() if file.exists() else None
        assert run.lines == len((left or b"").splitlines())
        run.log("train", 9, {})
        assert file.read_bytes() == (left or b"") + b'{"kind": "train", "step": 9}\n'
    return left


@pytest.mark.parametrize(
    ("contents", "lines", "left"),
    [
        ([*LINES], 3, 3),
        ([*LINES], 2, 2),  # CRLF and odd spacing stay as they are
        ([*LINES], 0, 0),
        ([*LINES, b'{"kind": "train", "st'], 3, 3),
        ([*LINES, b"\0\0\0\n\xff"], 3, 3),
        ([*LINES, TEST], 3, 3),
        (["missing"], 0, None),
    ],
)
def test_metrics_are_cut_to_the_byte(tmp_path, contents, lines, left, caplog):
    (tmp_path / "config.gin").write_text(CONFIG)
    held = None if contents == ["missing"] else b"".join(contents)
    kept = truncated(tmp_path, held, lines=lines)
    assert kept == (None if left is None else b"".join(contents[:left]))
    assert warnings_of(caplog) == []


def test_a_line_cut_short_by_a_kill_is_gone_before_the_next_is_written(tmp_path):
    (tmp_path / "config.gin").write_text(CONFIG)
    (tmp_path / "metrics.jsonl").write_bytes(LINES[0] + LINES[1][:20])
    with opened(tmp_path) as run:
        assert run.lines == 1
        run.log("train", 4, {})
    assert (tmp_path / "metrics.jsonl").read_bytes() == LINES[0] + LINES[2]


@pytest.mark.parametrize("contents", [LINES[:2], [*LINES[:2], LINES[2][:-1]], []])
def test_lines_that_never_came_to_disk_are_reported(tmp_path, contents, caplog):
    (tmp_path / "config.gin").write_text(CONFIG)
    kept = truncated(tmp_path, b"".join(contents), lines=3)
    assert kept == b"".join(contents[:2])
    last = "the last is of step 3" if contents else "there is none"
    assert f"has {len(contents[:2])} lines, but the checkpoint was saved after 3 ({last})" in caplog.text


def test_lines_after_the_checkpoint_go_even_if_earlier_ones_were_removed(tmp_path, caplog):
    """By number alone, three lines would be kept: one of a later step, or the test."""
    for later in (b'{"kind": "train", "step": 5}\n', TEST):
        with opened(tmp_path) as run:
            (tmp_path / "metrics.jsonl").write_bytes(LINES[1] + LINES[2] + later)
            run.truncate_metrics(lines=3, step=4)
        assert (tmp_path / "metrics.jsonl").read_bytes() == LINES[1] + LINES[2]
        assert "has 2 lines, but the checkpoint was saved after 3 (the last is of step 4)" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("line", [b"garbage", b"", b"3", b'{"kind": 1, "step": 2}', b'{"kind": "train"}', b"\xff\xfe"])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    (tmp_path / "config.gin").write_text(CONFIG)
    contents = LINES[0] + line + b"\n" + LINES[2]
    says = rf"{tmp_path / 'metrics.jsonl'}:2: .*Restore the file"
    with pytest.raises(ValueError, match=says):
        truncated(tmp_path, contents, lines=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == contents
    with pytest.raises(ValueError, match=says):
        directory.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(contents)
    assert truncated(tmp_path, None, lines=1) == LINES[0]


def test_scores_are_the_primary_metric_of_validations(tmp_path):
    assert directory.read_scores(tmp_path) == {}
    rows = [("train", 1, 9.0), ("validation", 2, 3.0), ("validation", 4, 5.0), ("test", 4, 7.0)]
    lines = [json.dumps({"kind": kind, "step": step, "accuracy": value, "f1": 0.0}) for kind, step, value in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert directory.read_scores(tmp_path) == {}
    (tmp_path / "manifest.json").write_text(json.dumps({"data": {}, "run": {"primary_metric": "accuracy"}}))
    assert directory.read_scores(tmp_path) == {2: 3.0, 4: 5.0}


def test_events_of_a_later_start_stand_behind_the_earlier_ones(tmp_path, monkeypatch):
    """TensorBoard reads files in the order of their names, whatever the clock said when they were made."""
    for start, now in enumerate((2e9, 1e9, 1.5e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        with opened(tmp_path) as run:
            run.log("train", start, {"loss": float(start)})
    assert scalars(tmp_path) == [(start, "train/loss", float(start)) for start in range(3)]
    (tmp_path / "tensorboard" / "events.out.tfevents.1795286253.host.12.0").write_bytes(b"")
    with opened(tmp_path) as run:
        run.log("train", 9, {"loss": 9.0})
    assert max((tmp_path / "tensorboard").iterdir()).name.endswith(".1795286254")


# ---------------------------------------------------------------- what may change, and what not


@dataclasses.dataclass(frozen=True)
class Terms:
    """Makes the terms of a start: configuration, its text, and the manifest's part."""

    config: TrainConfig
    text: str
    contents: dict

    def begin(self, run: Path, *, step: int = 3, accept_changes: bool = False, text: str | None = None) -> dict:
        with opened(run, self.text if text is None else text) as started:
            started.begin(self.contents, step=step, accept_changes=accept_changes)
        return directory.read_manifest(run)


TEXT = """# Macros:
SEED = 0
KEEP_CHECKPOINTS = 1
KEEP_BEST = 1
LOG_PERIOD = 50
MODEL_DIR = '/here'
RECORDS_DIR = \\
    '/here'
VOCABULARY = '/here'

datasets.DataOptions.records_dir = %RECORDS_DIR
datasets.DataOptions.vocabulary = %VOCABULARY
train.TrainConfig.keep_best = %KEEP_BEST
train.TrainConfig.keep_checkpoints = %KEEP_CHECKPOINTS
train.TrainConfig.log_period = %LOG_PERIOD
train.TrainConfig.model_dir = %MODEL_DIR
train.TrainConfig.seed = %SEED
train.TrainConfig.task_feature_lengths = \\
    {'inputs': 20, 'targets': 16}
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    return prepare(toy.config(folder / "run", toy.write_records(folder / "records")))


@pytest.fixture
def terms(tmp_path, trainer):
    """Makes terms as a run has them: `changes` of the configuration, records and vocabulary as they are now."""
    toy.write_records(tmp_path / "records")
    shutil.copyfile(builtin.vocabulary_path(), tmp_path / "vocabulary")

    def make(*, records_dir: str = "records", vocabulary: str = "vocabulary", data=None, text=TEXT, **changes) -> Terms:
        options = selection.DataOptions(
            records_dir=str(tmp_path / records_dir), vocabulary=str(tmp_path / vocabulary), **(data or {})
        )
        config = dataclasses.replace(toy.config(tmp_path / "run", tmp_path / "records", data=options), **changes)
        registry.configure(options)
        return Terms(
            config,
            text,
            contents.manifest(config, data=registry.manifest(config.mixture_or_task_name), trainer=trainer),
        )

    yield make
    registry.configure(toy.options(tmp_path / "records"))


def test_a_start_under_the_same_terms_goes_on_and_is_written_down(terms, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sbs_jax.run.directory")
    run = tmp_path / "run"
    first = terms().begin(run, step=0)
    assert first["run"]["primary_metric"] == "accuracy"
    assert first["starts"] == [
        {
            **{name: first[name] for name in ("git_revision", "versions", "mesh", "devices")},
            "step": 0,
            "host": os.uname().nodename,
            "time": first["starts"][0]["time"],
        }
    ]
    again = terms().begin(run)
    assert [start["step"] for start in again["starts"]] == [0, 3]
    assert again["accepted_changes"] == []
    assert (first["checkpointed"], again["checkpointed"]) == (False, True)
    assert {**again, "starts": 0, "checkpointed": 0} == {**first, "starts": 0, "checkpointed": 0}
    assert warnings_of(caplog) == []


def damage(path: Path) -> None:
    """Flips one bit of the last label, which stays a label."""
    data = bytearray(path.read_bytes())
    place = data.rindex(b"last is ") + len("last is ")
    data[place] ^= 1
    path.write_bytes(data)


def longer(path: Path, target: Path) -> None:
    """Adds an unused field to a vocabulary."""
    target.write_bytes(path.read_bytes() + b"\xa2\x06\x00")


def rounder_schedule(step):
    return jnp.asarray(1e-3) * (1 + 1e-7)


def decay(learning_rate, *, decay_rate=0.1):
    return optax.sgd(learning_rate)


def slower_decay(learning_rate, *, decay_rate=0.2):
    return optax.sgd(learning_rate)


slower_decay.__qualname__ = "decay"


REFUSED = {
    "configuration": (lambda p, make: make(text=TEXT.replace("SEED = 0", "SEED = 1")), ["-SEED = 0", "+SEED = 1"]),
    "long binding": (lambda p, make: make(text=TEXT.replace("20", "21")), ["= {'inputs': 21, 'targets': 16}"]),
    "log period": (lambda p, make: make(text=TEXT.replace("50", "5")), ["-LOG_PERIOD = 50", "+LOG_PERIOD = 5"]),
    "train records": (
        lambda p, make: damage(p / "records/toy/train.jsonl") or make(),
        ["-data.splits.train.sha256 = ", "+data.splits.train.sha256 = "],
    ),
    "test records": (
        lambda p, make: damage(p / "records/toy/test.jsonl") or make(),
        ["-data.splits.test.sha256 = ", "+data.splits.test.sha256 = "],
    ),
    "no validation records": (
        lambda p, make: (p / "records/toy/validation.jsonl").unlink() or make(),
        ['-data.splits.validation.file = "validation.jsonl"', "records/toy/validation.jsonl is gone (SHA-256 "],
    ),
    "no test records": (
        lambda p, make: (p / "records/toy/test.jsonl").unlink() or make(),
        [
            '-data.splits.test.file = "test.jsonl"',
            "toy/test.jsonl is gone (SHA-256 ",
            "or write it again with `sbs rec",
        ],
    ),
    "vocabulary": (
        lambda p, make: longer(p / "vocabulary", p / "vocabulary") or make(),
        ["-data.vocabulary_sha256 = "],
    ),
    "another vocabulary elsewhere": (
        lambda p, make: (
            longer(p / "vocabulary", p / "other")
            or make(vocabulary="other", text=TEXT.replace("VOCABULARY = '/here'", "VOCABULARY = '/there'"))
        ),
        ["-VOCABULARY = '/here'", "-data.options.vocabulary = ", "-data.vocabulary_sha256 = "],
    ),
    "data option": (
        lambda p, make: make(data={"label_prefix": "[label] "}),
        ['-data.options.label_prefix = "predict: "', '+data.options.label_prefix = "[label] "'],
    ),
    "selection": (lambda p, make: make(data={"fraction": 0.5}), ["-data.splits.train.counts.used = 48"]),
    "lengths": (
        lambda p, make: make(task_feature_lengths={"inputs": 20, "targets": 15}),
        ["-run.task_feature_lengths.targets = 16", "+run.task_feature_lengths.targets = 15"],
    ),
    "default of the model": (
        lambda p, make: make(model=dataclasses.replace(toy.MODEL, layer_norm_epsilon=1e-5)),
        ["-settings.model.layer_norm_epsilon = 1e-06", "+settings.model.layer_norm_epsilon = 1e-05"],
    ),
    "default of the optimiser": (
        lambda p, make: make(optimizer=functools.partial(optax.adamw, eps=1e-7)),
        ["-settings.optimizer.defaults.eps = 1e-08", "+settings.optimizer.defaults.eps = 1e-07"],
    ),
    "optimiser": (
        lambda p, make: make(optimizer=optax.adafactor),
        ['+settings.optimizer.callable = "optax.adafactor"'],
    ),
    "schedule": (
        lambda p, make: make(learning_rate=optax.linear_schedule(1e-3, 0.0, 6)),
        ["+settings.learning_rate.5 = 0.00016666", "-settings.learning_rate.5 = 0.001"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_decides_the_numbers_is_refused_with_a_diff_or_written_down(terms, tmp_path, what):
    run = tmp_path / "run"
    terms().begin(run, step=0)
    held = files(run)
    change, lines = REFUSED[what]
    changed = change(tmp_path, terms)
    with pytest.raises(FileExistsError, match=r"holds a run with another configuration, other data") as error:
        changed.begin(run)
    text = str(error.value)
    for line in lines:
        assert line in text
    assert "--accept_changes" in text
    assert files(run) == held
    accepted = changed.begin(run, accept_changes=True)["accepted_changes"]
    assert [entry["step"] for entry in accepted] == [3]
    assert all(line in text for line in accepted[0]["diff"])
    assert changed.begin(run, step=4)["accepted_changes"] == accepted  # the new terms are the run's now
    assert (run / "config.gin").read_text() == changed.text


def test_where_and_how_a_run_is_computed_may_change(terms, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sbs_jax.run.directory")
    run = tmp_path / "run"
    first = terms(learning_rate=lambda step: 1e-3).begin(run, step=0)
    run.rename(tmp_path / "moved run")
    (tmp_path / "records").rename(tmp_path / "moved")
    (tmp_path / "vocabulary").rename(tmp_path / "spiece.model")
    text = TEXT.replace("/here", "/there").replace("KEEP_CHECKPOINTS = 1", "KEEP_CHECKPOINTS = 5")
    text = text.replace("keep_best = %KEEP_BEST", "keep_best = 1")  # bound directly, left to the default, or by a macro
    text += "".join(
        f"{name} = 7\n"
        for name in (
            *("train.TrainConfig.keep_period", "train.TrainConfig.checkpoint_period", "t5.Execution.layers"),
            *("train.TrainConfig.stall_seconds", "train.TrainConfig.save_patience", "partitioning.Layout.fsdp"),
        )
    )
    elsewhere = terms(
        records_dir="moved",
        vocabulary="spiece.model",
        text=text,
        model_dir=str(tmp_path / "moved run"),
        learning_rate=rounder_schedule,  # as another device may round it
        keep_checkpoints=5,
        checkpoint_period=2,
        vocabulary_chunks=2,
    )
    elsewhere.contents["mesh"] = {"data": 2}
    elsewhere.contents["devices"] = ["TPU v5e"] * 2
    elsewhere.contents["parameters"] = {
        name: {**leaf, "spec": "another"} for name, leaf in elsewhere.contents["parameters"].items()
    }
    after = elsewhere.begin(tmp_path / "moved run")
    assert after["accepted_changes"] == []
    assert [start["mesh"] for start in after["starts"]] == [first["mesh"], {"data": 2}]
    assert caplog.text.count("Changed since the last start: devices ") == 1
    assert "mesh.data 8 -> 2;" in caplog.text
    assert (tmp_path / "moved run" / "config.gin").read_text() == text


def test_versions_may_change_and_are_announced(terms, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = tmp_path / "run"
    whole = terms().begin(run, step=0)
    whole["versions"]["jax"], whole["git_revision"] = "0.1", "abc"
    (run / "manifest.json").write_text(json.dumps(whole))
    whole = terms().begin(run)
    assert f"Changed since the last start: git_revision abc -> {whole['git_revision'][:20]}" in caplog.text
    assert f"; jax 0.1 -> {whole['versions']['jax']}." in caplog.text


def test_where_the_best_is_not_kept_what_is_kept_decides_what_is_tested(terms, tmp_path):
    """Bound by hand here; the fields come with the rules of what is kept."""
    run = tmp_path / "run"
    start = terms()
    kept = start.contents["settings"]
    kept["keep_best"] = 1
    start.begin(run, step=0)
    kept |= {"keep_best": 2, "keep_checkpoints": 3}
    start.begin(run)
    kept["keep_best"] = 0
    with pytest.raises(FileExistsError, match=r"settings\.keep_best = 0"):
        start.begin(run)
    start.begin(run, accept_changes=True)
    kept["keep_checkpoints"] = 4
    with pytest.raises(FileExistsError, match=r"(?s)-settings.keep_checkpoints = 3\n\+settings.keep_checkpoints = 4"):
        start.begin(run)


def test_a_manifest_that_is_missing_beside_checkpoints_is_refused(terms, tmp_path):
    run = tmp_path / "run"
    terms().begin(run, step=0)
    (run / "manifest.json").unlink()
    terms().begin(run, step=0)  # killed before it was written: nothing has been computed
    (run / "manifest.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"manifest.json is missing, although there are checkpoints up to step 3.*--accept"
    ):
        terms().begin(run)
    assert "is missing" in terms().begin(run, accept_changes=True)["accepted_changes"][0]["diff"][0]


def test_a_damaged_manifest_is_refused_or_shows_in_the_diff(terms, tmp_path):
    """A manifest cut at many places or with one bit flipped never starts silently and never raises a traceback."""
    run = tmp_path / "run"
    start = terms()
    # Most of a manifest is the table of parameters: one is enough.
    start.contents["parameters"] = dict([next(iter(start.contents["parameters"].items()))])
    start.contents["devices"] = []
    start.begin(run, step=0)
    whole = (run / "manifest.json").read_bytes()
    cut = [whole[:length] for length in range(0, len(whole) - 2, 97)]
    turned = [whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :] for at in range(0, len(whole), 17)]
    seen, said = {"refused": 0, "diff": 0, "harmless": 0}, set()
    with opened(run, TEXT) as begun:
        for number, contents in enumerate([*cut, *turned]):
            (run / "manifest.json").write_bytes(contents)
            try:
                begun.begin(start.contents, step=3, accept_changes=False)
                seen["harmless"] += 1  # in what may change, or is not compared
            except FileExistsError:
                seen["diff"] += 1
            except ValueError as error:
                seen["refused"] += 1
                said.add(str(error).partition(" (")[0] + str(error).rpartition(")")[2])
            assert number >= len(cut) or seen["refused"] == number + 1
    assert min(seen.values()) > 10, seen
    assert len(said) == 1
    assert said.pop().startswith(f"{run / 'manifest.json'} is damaged. Restore it from a copy")
    (run / "manifest.json").write_bytes(b"garbage")
    assert "is damaged" in start.begin(run, accept_changes=True)["accepted_changes"][0]["diff"][0]
    assert start.begin(run)["accepted_changes"] != []


def test_clocks_that_went_back_and_files_of_tomorrow_change_nothing(terms, tmp_path, caplog):
    run = tmp_path / "run"
    whole = terms().begin(run, step=0)
    whole["starts"] = [{**whole["starts"][0], "step": step, "time": f"20{80 - step}-01-01"} for step in (0, 3, 6)]
    (run / "manifest.json").write_text(json.dumps(whole))
    with opened(run, TEXT) as begun:
        for step in range(1, 4):
            begun.log("train", step, {})
    for path in [*run.rglob("*"), *(tmp_path / "records").rglob("*"), tmp_path / "vocabulary"]:
        os.utime(path, (time.time() + 86400, time.time() + 86400))
    with opened(run, TEXT) as begun:
        begun.begin(terms().contents, step=6, accept_changes=False)
        begun.truncate_metrics(lines=2)
        begun.log("train", 3, {"again": 1.0})
    assert [start["step"] for start in directory.read_manifest(run)["starts"]] == [0, 3, 6, 6]
    assert [len(line) for line in directory.read_metrics(run)] == [2, 2, 3]
    assert warnings_of(caplog) == []


def test_training_data_that_vanished_are_named_with_what_to_do(tmp_path):
    records_dir = toy.write_records(tmp_path / "records")
    config = toy.config(tmp_path / "run", records_dir)
    (records_dir / "toy" / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"there is no {records_dir}/toy/train.jsonl \(put it back, or write it with"):
        loop.train(config, config_text="")
    shutil.rmtree(records_dir / "toy")
    with pytest.raises(FileNotFoundError, match=rf"(?s)no train.jsonl, .* in {records_dir}/toy. Write them with"):
        loop.train(config, config_text="")
    records_dir = toy.write_records(tmp_path / "again")
    options = dataclasses.replace(toy.options(records_dir), vocabulary=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=f"There is no SentencePiece model at '{tmp_path}/gone'; set DataOpt"):
        loop.train(dataclasses.replace(config, data=options), config_text="")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ settings


OBJECT: Any = object()


class Halving:
    """A callable object."""

    def __init__(self, learning_rate, factor=0.5):
        pass


def test_settings_of_a_configuration_that_gin_made():
    paths = ["MODEL_DIR=/nowhere/run", "RECORDS_DIR=/nowhere/records", "INITIAL_CHECKPOINT_PATH=/nowhere/t5"]
    file = "gin_configs/experiments/svamp/base.gin"
    bindings = [*paths, "OPTIMIZER=@a/optax.adamw"]
    config, _ = gin_files.configure("train.TrainConfig", gin_files=[file], bindings=bindings)
    found = json.loads(json.dumps(settings.describe(config), allow_nan=False))
    assert found["optimizer"]["callable"] == "optax.adamw"
    assert found["optimizer"]["defaults"]["b2"] == 0.999
    assert found["optimizer"] == settings.describe(dataclasses.replace(config, optimizer=optax.adamw))["optimizer"]
    assert list(found["learning_rate"]) == ["0", "1", "1000", "5000", "9999"]
    assert found["learning_rate"]["5000"] == pytest.approx(2.5e-5)
    assert found["model"]["layer_norm_epsilon"] == 1e-6
    assert found["model"]["mlp_activations"] == ["gelu", "linear"]
    assert found["execution"] == {"layers": "unrolled", "remat": "none"}


def test_settings_of_values_that_json_does_not_have():
    described = settings._json
    assert described((1, 2.5, None, float("nan"), {"a"})) == [1, 2.5, None, "nan", ["a"]]
    assert described({1: jnp.float32(0.5), "x": jnp.arange(3)}) == {"1": 0.5, "x": [0, 1, 2]}
    assert set(described(jnp.zeros(1000))) == {"shape", "dtype", "sha256"}
    assert "0x" not in json.dumps(described([object(), Halving(1.0), lambda y=OBJECT: y]))
    assert described(Halving) == {"callable": f"{__name__}.Halving", "defaults": {"factor": 0.5}}
    twice = functools.partial(functools.partial(optax.sgd, 0.1), momentum=0.9)
    assert described(twice)["arguments"] == [0.1]
    assert described(twice)["defaults"]["momentum"] == 0.9
    assert described(optax.inject_hyperparams(optax.adamw)) != described(optax.adamw)
    assert described(decay) != described(slower_decay)
