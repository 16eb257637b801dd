"""The link between joined processes: values, decisions, preemption at one step, stall reports, and failures."""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from sbs_jax.hosts.roll import Place, Wire

_GRACE = 1.0  # seconds a failing process waits for another process's failure, which may be the cause
_ANSWERS_WITHIN = 5.0  # seconds for a process to report its activity


class Link:
    """Connections kept open after the roll call: process 0 to all others, each other to process 0."""

    def __init__(self, place: Place, wires: dict[int, Wire]) -> None:
        self.place = place
        self._wires = wires
        self._stderr = os.dup(2)  # for `_end`, while descriptor 2 points elsewhere: TensorFlow's import is silenced
        self._inbox: dict[int, queue.SimpleQueue[Any]] = {index: queue.SimpleQueue() for index in wires}
        self._leaving = {index: threading.Event() for index in wires}
        self._ending = threading.Lock()
        self._stopping = Stopping()
        self._where: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.here: Callable[[], Mapping[str, Any]] | None = None
        self.report: Callable[[], None] | None = None
        for index in wires:
            threading.Thread(target=self._watch, args=(index,), daemon=True, name=f"link to process {index}").start()

    def consult(
        self, value: Any, decide: Callable[[list[Any]], Any], *, ends: Callable[[Any], bool] = lambda decided: False
    ) -> Any:
        """Returns process 0's decision from all values (JSON); `ends` tells whether the decision ends the run."""
        if self.place.index != 0:
            self._wires[0].send({"value": value})
        return self.from_first(
            lambda: decide([value, *(self._inbox[index].get() for index in sorted(self._wires))]), ends=ends
        )

    def from_first(self, compute: Callable[[], Any], *, ends: Callable[[Any], bool] = lambda decided: False) -> Any:
        if self.place.index != 0:
            return self._inbox[0].get()
        decided = json.loads(json.dumps(compute()))
        message = {"value": decided}
        if ends(decided):
            message["leaving"] = True
            for event in self._leaving.values():
                event.set()
        self._tell(message)
        return decided

    def leave(self) -> None:
        if self.place.index == 0:
            for event in self._leaving.values():
                event.wait()
            self._tell({"leaving": True})
        else:
            self._wires[0].send({"leaving": True})
            self._leaving[0].wait()

    def request_preemption(self) -> None:
        """Asks all for their number of `preemption_requested` calls; the next one blocks until the stop is fixed."""
        if self.place.index != 0:
            self._wires[0].send({"notice": True})
        elif (count := self._stopping.freeze()) is not None:
            self._tell({"halt": True})
            self._at(0, count)

    def preemption_requested(self) -> bool:
        return self._stopping.reached()

    def _at(self, index: int, count: int) -> None:
        """Records one process's call count, on process 0; after the last answer, fixes the call at which all stop."""
        stop = self._stopping.answered(index, count, of=self.place.count)
        if stop is not None:
            self._tell({"stop": stop})
            self._stopping.stop_at(stop)

    def collect_activities(self, here: Callable[[], Mapping[str, Any]]) -> dict[int, Mapping[str, Any] | None]:
        places: dict[int, Mapping[str, Any] | None] = {self.place.index: here()}
        if self.place.index != 0:
            with contextlib.suppress(OSError):
                self._wires[0].send({"stalled": True})
            return places
        while not self._where.empty():
            self._where.get()
        self._tell({"where": True})
        deadline = time.monotonic() + _ANSWERS_WITHIN
        while len(places) < self.place.count and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                index, said = self._where.get(timeout=left)
                places[index] = said
        return {index: places.get(index) for index in range(self.place.count)}

    def fail(self, text: str) -> None:
        time.sleep(_GRACE)  # an earlier failure, if reported now, ends this process from its watching thread
        self._end(f"Process {self.place.index} of {self.place.count} ended: {text}", shown=text)

    def _tell(self, message: Mapping[str, Any]) -> None:
        for wire in self._wires.values():
            with contextlib.suppress(OSError):  # lost: its watching thread reports it
                wire.send(message)

    def _watch(self, index: int) -> None:
        """Reads one process's messages; ends this process if that one failed or is lost."""
        text = (
            f"Lost contact with process {index} of {self.place.count} (killed, or its machine failed). Look at its "
            "log; repeat the command to resume the run."
        )
        try:
            while True:
                message = self._wires[index].receive()
                if "leaving" in message:
                    self._leaving[index].set()
                if "value" in message:
                    self._inbox[index].put(message["value"])
                if "failed" in message:
                    text = message["failed"]
                    break
                self._answer(index, message)
        except (EOFError, OSError):
            pass
        if not self._leaving[index].is_set():
            self._end(text, shown=text)

    def _answer(self, index: int, message: Mapping[str, Any]) -> None:
        """Handles questions and notices while the main thread may be busy."""
        if "notice" in message:
            self.request_preemption()
        if "halt" in message:
            self._wires[index].send({"at": self._stopping.freeze()})
        if "at" in message:
            self._at(index, message["at"])
        if "stop" in message:
            self._stopping.stop_at(message["stop"])
        if "where" in message:
            self._wires[index].send({"here": self.here() if self.here else {"doing": "is not in the training loop"}})
        if "here" in message:
            self._where.put((index, message["here"]))
        if "stalled" in message and self.report is not None:
            # In another thread: this one has to read the answers.
            threading.Thread(target=self.report, daemon=True, name="stall report").start()

    def _end(self, text: str, *, shown: str) -> None:
        """Forwards the failure and exits at once: the main thread may hang in a collective."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        with contextlib.suppress(OSError):
            sys.stderr.flush()
            os.write(self._stderr, f"\nsbs, process {self.place.index} of {self.place.count}: {shown}\n".encode())
        self._tell({"failed": text})
        for wire in self._wires.values():
            with contextlib.suppress(OSError):
                wire.connection.shutdown(socket.SHUT_WR)
        os._exit(1)


class Stopping:
    """Agreement on the call of `reached`, counted from 1, at which all processes stop.

    All make the same calls, not at the same time. After a preemption each reports how many it has made (`freeze`) and
    waits in its next one. Process 0 then sets the stop to the highest count plus one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._frozen: int | None = None
        self._stop: int | None = None
        self._answers: dict[int, int] = {}

    def reached(self) -> bool:
        with self._changed:
            self._calls += 1
            self._changed.wait_for(lambda: self._frozen is None or self._stop is not None)
            return self._stop is not None and self._calls >= self._stop

    def freeze(self) -> int | None:
        """Returns the number of calls made; None if called before."""
        with self._changed:
            if self._frozen is not None:
                return None
            self._frozen = self._calls
            return self._frozen

    def answered(self, index: int, count: int, *, of: int) -> int | None:
        """Returns the call at which to stop once all have answered, else None."""
        with self._changed:
            self._answers[index] = count
            return max(self._answers.values()) + 1 if len(self._answers) == of else None

    def stop_at(self, call: int) -> None:
        with self._changed:
            self._stop = call
            self._changed.notify_all()
