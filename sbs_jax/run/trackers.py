"""Trackers: receivers of a run's metrics lines besides metrics.jsonl, which has them whatever becomes of these.

TensorBoard's events are files of the run directory. MLflow and Weights & Biases may wait for a server, so each has a
process of its own (tracker_process.py). Training never waits for it: lines are kept in memory while it is busy, and it
is killed if it has not finished within seconds of the end.
"""

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sbs_jax import checks
from sbs_jax.run import events, pending_writes

log = logging.getLogger(__name__)

TENSORBOARD, MLFLOW, WANDB = "tensorboard", "mlflow", "wandb"
FOLDER = "trackers"  # of a run directory: ids of its runs at the trackers
# Module of each tracker with a process, and the package that has it.
_PACKAGES = {MLFLOW: "mlflow-skinny", WANDB: "wandb"}
NAMES = (TENSORBOARD, *_PACKAGES)
# Seconds at the end for lines that were not sent: of a run that finished while the tracker works, and else. A preempted
# machine has 30.
_GRACE = {True: 60.0, False: 10.0}
LATE = 3  # exit status of a tracker's process whose time is over
_LONGEST = 2**20  # bytes of one message of a tracker's process


@runtime_checkable
class Tracker(Protocol):
    """A receiver of metrics lines; no method raises for its own troubles, or waits."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Takes one line: `values` by name, of "train", "validation" or "test" at this step."""

    def close(self, *, finished: bool) -> None:
        """Ends it, after the last line or after an error."""


def check(names: Sequence[str]) -> None:
    """Requires known trackers, each once. ValueError names another."""
    for name in names:
        checks.choice("TrainConfig.trackers", name, NAMES)
    if len(set(names)) < len(names):
        raise ValueError(f"TrainConfig.trackers is {list(names)}; expected each tracker once.")


def check_installed(names: Sequence[str]) -> None:
    """Requires the packages of trackers. ModuleNotFoundError says how to install one."""
    for name in names:
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"The tracker {name!r} needs the package {package}, which is not installed: pip install {package}, or "
                "leave it out of TRACKERS."
            )


def opened(
    names: Sequence[str], run: Path, pending: pending_writes.PendingWrites, *, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Opens the trackers of a run that begins or is resumed; `settings` are those of its manifest, flat."""
    return [
        events.TensorBoard(run / TENSORBOARD, pending) if name == TENSORBOARD else _Process(name, run, settings)
        for name in names
    ]


class _Process:
    """A tracker in a process of its own, which gets one line of JSON for each line of metrics."""

    def __init__(self, name: str, run: Path, settings: Mapping[str, Any]) -> None:
        self._name, self._waiting, self._said = name, bytearray(), bytearray()
        self._failing = False
        root = str(Path(__file__).resolve().parents[2])
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", "sbs_jax.run.tracker_process", name, str(run)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends the run, which ends this one
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])},
        )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._put({"settings": dict(settings)})

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Hands over what the process takes now; the rest waits for the next call."""
        self._put({"kind": kind, "step": step, "values": dict(values), "time": time.time()})

    def close(self, *, finished: bool) -> None:
        """Gives the process some seconds to send the rest, then ends it."""
        seconds = _GRACE[finished and not self._failing]
        self._put({"finished": finished, "seconds": seconds})
        end = time.monotonic() + seconds + 1.0
        while self._process is not None and self._waiting and time.monotonic() < end:
            time.sleep(0.02)
            self._exchange()
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
            self._listen()
        if self._process.poll() in (None, LATE):
            log.warning(
                "%s: not done %g s after the end of the run; its last lines may be missing there.", self._name, seconds
            )
        self._listen()
        self._end()

    def _put(self, message: Mapping[str, Any]) -> None:
        if self._process is not None:
            self._waiting += json.dumps(message).encode() + b"\n"
            self._exchange()

    def _exchange(self) -> None:
        """Writes what the process takes, without waiting, and logs what it says."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            while self._waiting:
                written = os.write(self._process.stdin.fileno(), self._waiting)
                del self._waiting[:written]
        except BlockingIOError:
            pass  # later
        except OSError:  # it ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            self._listen()
            self._end()
            return
        self._listen()

    def _listen(self) -> None:
        """Logs the lines that the process wrote: {"level": .., "text": ..}."""
        assert self._process is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._process.stdout.fileno(), 65536):
                self._said += data
                if len(self._said) > _LONGEST:
                    self._said.clear()
        *lines, rest = bytes(self._said).split(b"\n")
        self._said = bytearray(rest)
        for line in lines:
            message = json.loads(line)
            self._failing = message["level"] >= logging.WARNING
            log.log(message["level"], "%s: %s", self._name, message["text"])

    def _end(self) -> None:
        assert self._process is not None
        status = self._process.poll()
        if status not in (None, 0, LATE):
            log.warning(
                "%s: its process ended with status %d, so it lacks lines that metrics.jsonl has.", self._name, status
            )
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process = None
