"""Watchdog of the training loop: a thread logs each process's activity when one lasts too long."""

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

# Activities of the training loop, for `Watchdog.at`.
INPUT = "waits for its input"
DEVICES = "waits for its devices"
_FRAMES = 3


class Watchdog:
    """Logger of stalls: reports when one activity has lasted `seconds`, then after each doubling; use it with `with`.

    It never ends the run, because a first step may compile for a long time. With several processes, process 0 collects
    all activities, so that its report names the process that the others wait for.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._doing, self._step, self._since = "starts", 0, time.monotonic()
        self._done = threading.Event()
        self._reporting = threading.Lock()
        self._reported = -math.inf
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def at(self, doing: str, *, step: int) -> None:
        """Records a new activity: `INPUT`, `DEVICES`, or any words that fit after "process 0"."""
        self._doing, self._step, self._since = doing, step, time.monotonic()

    def __enter__(self) -> "Watchdog":
        hosts.set_stall_handlers(self._here, self._report)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        hosts.set_stall_handlers(None, None)

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
        if self._reporting.acquire(blocking=False):  # one report is enough for many stalled processes
            try:
                if time.monotonic() - self._reported > self._seconds / 2:
                    log.warning("%s", describe(hosts.collect_activities(self._here)))
                    self._reported = time.monotonic()
            finally:
                self._reporting.release()


def describe(places: Mapping[int, Mapping[str, Any] | None]) -> str:
    """Describes each process's activity and names the ones the others wait for, in a few lines."""
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
    """Returns the innermost Python lines a thread is executing; "" if there is no such thread."""
    for thread in threading.enumerate():
        frame = sys._current_frames().get(thread.ident or -1)
        if thread.name == thread_name and frame is not None:
            frames = traceback.extract_stack(frame)[-_FRAMES:]
            return "; its thread is in " + " < ".join(
                f"{f.name} ({f.filename.rpartition('/')[2]}:{f.lineno})" for f in reversed(frames)
            )
    return ""
