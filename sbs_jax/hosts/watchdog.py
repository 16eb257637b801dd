"""Who waits on whom when nothing moves: a thread that reports what each process has been doing for too long."""

import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

from sbs_jax import hosts

log = logging.getLogger(__name__)

# What the training loop is doing, as `Watchdog.at` is told.
INPUT = "waits for its input"
DEVICES = "waits for its devices"
_FRAMES = 3


class Watchdog:
    """Reports, in the log, when the loop has been at one thing for `seconds`, and again after twice that; use `with`.

    It ends nothing: a first step may be compiling for long. Of several processes the first one asks the others where
    they are, so that the report names the one for which the rest wait.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._doing, self._step, self._since = "starts", 0, time.monotonic()
        self._done = threading.Event()
        self._reporting = threading.Lock()
        self._reported = -math.inf
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def at(self, doing: str, *, step: int) -> None:
        """The loop begins something: `INPUT`, `DEVICES`, or any words that fit after "process 0"."""
        self._doing, self._step, self._since = doing, step, time.monotonic()

    def __enter__(self) -> "Watchdog":
        hosts.on_stall(self._here, self._report)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        hosts.on_stall(None, None)

    def _watch(self) -> None:
        known, patience = self._since, self._seconds
        while not self._done.wait(min(1.0, self._seconds / 4)):
            if self._since != known:
                known, patience = self._since, self._seconds
            elif time.monotonic() - known > patience:
                patience *= 2
                self._report()

    def _here(self) -> dict[str, Any]:
        said: dict[str, Any] = {"doing": self._doing, "step": self._step, "seconds": time.monotonic() - self._since}
        if self._doing == INPUT:
            said["at"] = _place_of("batches ahead")
        return said

    def _report(self) -> None:
        if self._reporting.acquire(blocking=False):  # of many stalled processes one report is enough
            try:
                if time.monotonic() - self._reported > self._seconds / 2:
                    log.warning("%s", describe(hosts.where_all_are(self._here)))
                    self._reported = time.monotonic()
            finally:
                self._reporting.release()


def describe(places: Mapping[int, Mapping[str, Any] | None]) -> str:
    """Where each process is, and which of them the others wait for, as text of a few lines."""
    lines, awaited = [], []
    for index, said in places.items():
        if said is None:
            lines.append(f"process {index} does not answer: frozen, overloaded, or cut off from the network")
        else:
            place = f" (step {said['step']}, {said['seconds']:.0f} s)" if "step" in said else ""
            lines.append(f"process {index} {said['doing']}{place}{said.get('at', '')}")
        if said is None or said["doing"] != DEVICES:
            awaited.append(index)
    if len(places) == 1:
        (line,) = lines
        return f"Nothing moves: {line}."
    if not awaited:
        ending = "All wait for their devices: a collective or the network between them is stuck."
    elif len(awaited) == len(places):
        ending = "None of them waits for another."
    else:
        ending = f"The others wait for process{'es' if len(awaited) > 1 else ''} {', '.join(map(str, awaited))}."
    return "\n  ".join(["Nothing moves:", *lines, ending])


def _place_of(thread_name: str) -> str:
    """The innermost lines of Python that a thread is executing; empty where there is no such thread."""
    for thread in threading.enumerate():
        frame = sys._current_frames().get(thread.ident or -1)
        if thread.name == thread_name and frame is not None:
            frames = traceback.extract_stack(frame)[-_FRAMES:]
            return "; its thread is in " + " < ".join(
                f"{f.name} ({f.filename.rpartition('/')[2]}:{f.lineno})" for f in reversed(frames)
            )
    return ""
