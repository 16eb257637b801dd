"""Several processes as one run: they find each other, agree on what they are about to do, and end together.

`join` calls the roll on the coordinator's port, then starts `jax.distributed` there. The connections of the roll stay
open (JSON lines; process 0 in the middle). Over them the processes compare what they run (`agree`), take decisions
(`from_first`, `barrier`), stop together where one is told to end (`told_to_end`), say where they are when nothing moves
(`where_all_are`), and learn that one of them failed or is gone: JAX alone would leave the others in a collective until
a heartbeat is missed, and then abort them with a stack trace. Without `join`, every function here does what is right
for a single process.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# What has to be the same everywhere because it changes numbers or files.
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "tensorflow-text", "numpy")
_GRACE = 1.0  # seconds that a failing process waits for news of another one, which may be the cause
_DIFF_LINES = 40
_ANSWERS_WITHIN = 5.0  # seconds for a process to say where it is


class HostsError(RuntimeError):
    """Processes that do not come together, or that differ; the message says which and in what."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the coordinator (process 0) listens, how many processes there are, and which one this is."""

    coordinator: str
    count: int
    index: int

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise HostsError(f"The coordinator's address is {self.coordinator!r}; expected HOST:PORT.")
        if not 0 <= self.index < self.count:
            raise HostsError(
                f"Got process_index {self.index} of process_count {self.count}; expected a count of at least 1 and an "
                "index from 0 to count - 1."
            )

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def detect(*, timeout: float) -> Place:
    """This process's place as Cloud TPU, GKE, Slurm or Open MPI tell it. HostsError outside of them."""
    from jax._src import clusters  # what jax.distributed.initialize asks; there is no public way to ask first

    coordinator, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(timeout)
    )
    if coordinator is None or count is None or index is None:
        raise HostsError(
            "--multihost found no Cloud TPU, GKE, Slurm or Open MPI environment to learn the processes from; give "
            "--coordinator_address HOST:PORT, --process_count N and --process_index I instead."
        )
    return Place(coordinator=coordinator, count=count, index=index)


def join(place: Place, *, timeout: float, detected: bool) -> None:
    """Waits for all processes, starts `jax.distributed`, and compares code, versions and numbers of devices.

    Before any use of a device. `detected` leaves the choice of local devices to JAX as well. HostsError, on every
    process that is there, names those that are missing after `timeout` seconds, or what differs.
    """
    global _place, _link
    if _place is not None:
        raise HostsError("This process has joined already.")
    if place.count == 1:
        return
    _place = place
    deadline = time.monotonic() + timeout
    wires = _call_roll(place, timeout, deadline) if place.index == 0 else {0: _answer_roll(place, timeout, deadline)}
    _link = _Link(place, wires)
    agree({"code": source_digests(), "versions": _versions()})

    import jax

    _keep_stdout_clean()
    # Its handler of SIGTERM would swallow a second one, which is to end the process at once (see preemption.py).
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=place.coordinator,
        num_processes=place.count,
        process_id=place.index,
        initialization_timeout=max(10, int(timeout)),
        cluster_detection_method=None if detected else "deactivate",
    )
    agree({"devices": f"{jax.local_device_count()} local {jax.local_devices()[0].device_kind}"})


def leave() -> None:
    """The end of a run that went well: waits until all have come so far, so that none takes an end for a loss."""
    global _link
    if _link is not None:
        _link.leave()
        _link = None


def fail(text: str) -> None:
    """The end of a run that went wrong here: tells the other processes, which end with this text.

    Returns where there are no others. Else it does not return: a process whose neighbours wait in a collective cannot
    end in an orderly way. Where another process failed first, that is what gets printed.
    """
    if _link is not None:
        _link.fail(text)


def is_first() -> bool:
    """Whether this process writes the files of the run and talks to the user."""
    return _place is None or _place.index == 0


def waited_for() -> bool:
    """Whether other processes go on in the belief that this one does."""
    return _link is not None


def describe() -> str:
    """'process 1 of 4', for messages; empty where there is only one."""
    return "" if _place is None else f"process {_place.index} of {_place.count}"


def barrier() -> None:
    """Returns when every process has come to it."""
    if _link is not None:
        _link.consult(None, lambda values: None)


def from_first(compute: Callable[[], Any]) -> Any:
    """What `compute` returns on process 0 (JSON values), on every process; the others do not call it."""
    if _link is None:
        return compute()
    return _link.from_first(compute)


def from_all(value: Any) -> list[Any]:
    """What every process gives (a JSON value), in their order, on every process."""
    return [value] if _link is None else _link.consult(value, list)


def tell_to_end() -> None:
    """This process was told to end: `told_to_end` becomes true, at the same call on every process."""
    if _link is None:
        _told.set()
    else:
        _link.notice()


def told_to_end() -> bool:
    """Whether some process was told to end. To be asked equally often everywhere, between steps: all stop together."""
    return _told.is_set() if _link is None else _link.told_to_end()


def forget_told_to_end() -> None:
    """A new run begins in this process."""
    _told.clear()


def where_all_are(here: Callable[[], Mapping[str, Any]]) -> dict[int, Mapping[str, Any] | None]:
    """What each process says of where it is (`here`, of this one), None for one that does not answer within seconds.

    Only process 0 knows; elsewhere it asks process 0 to report, and gives this process alone.
    """
    return {0: here()} if _link is None else _link.where_all_are(here)


def on_stall(here: Callable[[], Mapping[str, Any]] | None, report: Callable[[], None] | None) -> None:
    """What this process answers when it is asked where it is; and, on process 0, what to do when another is stalled."""
    if _link is not None:
        _link.here, _link.report = here, report


def agree(things: Mapping[str, str]) -> None:
    """Returns where every process has the same texts; HostsError with the differences, on all of them, otherwise."""
    global _link
    if _link is not None:
        differences = _link.consult(dict(things), _differences, ends=bool)
        if differences:
            _link = None  # all of them end with this error; there is nothing to tell
            raise HostsError(f"The processes do not run the same thing.\n{differences}")


def _differences(values: Sequence[Mapping[str, str]]) -> str:
    """Which processes differ from process 0, and in what; empty where none does."""
    said = []
    for name, reference in values[0].items():
        others: dict[str, list[int]] = {}
        for index, value in enumerate(values):
            if value.get(name) != reference:
                others.setdefault(value.get(name, ""), []).append(index)
        for text, indices in others.items():
            many = len(indices) > 1
            who = f"process{'es' if many else ''} {', '.join(map(str, indices))}"
            diff = difflib.unified_diff(reference.splitlines(), text.splitlines(), "process 0", who, lineterm="", n=0)
            lines = [line for line in diff if not line.startswith("@@")]
            more = [f"({len(lines) - _DIFF_LINES} more lines)"] if len(lines) > _DIFF_LINES else []
            said.append(
                "\n".join([f"{name}: {who} differ{'' if many else 's'} from process 0:", *lines[:_DIFF_LINES], *more])
            )
    return "\n".join(said)


def source_digests() -> str:
    """A line per file of the installed packages: its name and a hash of its contents."""
    root = Path(__file__).parents[2]
    lines = []
    for package in ("sbs_jax", "tasks", "gin_configs"):
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                lines.append(f"{path.relative_to(root).as_posix()} {digest}")
    return "\n".join(lines)


def _versions() -> str:
    lines = [f"python {sys.version.split()[0]}"]
    return "\n".join([*lines, *(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS)])


def _keep_stdout_clean() -> None:
    """File descriptor 1 to standard error, `sys.stdout` to where it led: Gloo prints to the descriptor."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


# ------------------------------------------------------------------------------------ the roll


class _Wire:
    """One connection: JSON lines in both directions."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that is gone does not say so: the kernel asks after 20 s of silence, and gives up after 40 more.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.connection = connection
        self._received = b""
        self._sending = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        with self._sending:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, *, deadline: float | None = None) -> dict[str, Any]:
        """The next message. EOFError at the end, TimeoutError past the deadline (of `time.monotonic`)."""
        while b"\n" not in self._received:
            if deadline is not None:
                self.connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                piece = self.connection.recv(65536)
            finally:
                self.connection.settimeout(None)
            if not piece:
                raise EOFError
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self.connection.close()


def _call_roll(place: Place, timeout: float, deadline: float) -> dict[int, _Wire]:
    """On process 0: a connection to each of the others."""
    wires: dict[int, _Wire] = {}
    try:
        listener = _listen(place.port)
    except OSError as error:
        raise HostsError(
            f"Process 0 cannot listen on port {place.port} ({error.strerror}); choose another --coordinator_address."
        ) from error
    with listener:
        said = time.monotonic()
        while True:
            missing = [index for index in range(1, place.count) if index not in wires]
            if not missing:
                for wire in wires.values():
                    wire.send({"joined": True})
                return wires
            if time.monotonic() > deadline:
                raise _refusal(wires, _missing(missing, place, timeout))
            if time.monotonic() - said > 0.5:
                said = time.monotonic()
                for index, wire in list(wires.items()):
                    try:
                        wire.send({"missing": missing})
                    except OSError:
                        wires.pop(index).close()
            try:
                connection, address = listener.accept()
            except TimeoutError:
                continue
            wire = _Wire(connection)
            try:
                hello = wire.receive(deadline=time.monotonic() + 2)
                index, count = int(hello["index"]), int(hello["count"])
            except (OSError, EOFError, ValueError, KeyError, TypeError):
                wire.close()  # a stranger
                continue
            if count != place.count or not 0 < index < place.count:
                text = (
                    f"A process at {address[0]} says it is {index} of {count}, and process 0 was told of "
                    f"{place.count}; give every process the same --process_count, and an index of its own."
                )
            elif index in wires:
                text = f"Two processes say they are {index} of {count}; give every process an index of its own."
            else:
                wires[index] = wire
                continue
            raise _refusal({**wires, -1: wire}, text)


def _listen(port: int) -> socket.socket:
    """All addresses, as JAX's service."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server(("", port), backlog=1024)
    listener.settimeout(0.1)
    return listener


def _refusal(wires: Mapping[int, _Wire], text: str) -> HostsError:
    """Tells all who came, and is to be raised."""
    for wire in wires.values():
        with contextlib.suppress(OSError):
            wire.send({"error": text})
        wire.close()
    return HostsError(text)


def _missing(missing: Sequence[int], place: Place, timeout: float) -> str:
    one = len(missing) == 1
    return (
        f"Process{'' if one else 'es'} {', '.join(map(str, missing))} of {place.count} did not join within "
        f"{timeout:g} s; look at {'its' if one else 'their'} log, or give more time (--join_timeout)."
    )


def _answer_roll(place: Place, timeout: float, deadline: float) -> _Wire:
    """On the other processes: the connection to process 0, once all are there."""
    missing = [0]
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=5)
        except OSError:
            time.sleep(0.2)
            continue
        wire = _Wire(connection)
        try:
            wire.send({"index": place.index, "count": place.count})
            while True:
                message = wire.receive(deadline=deadline)
                if "joined" in message:
                    return wire
                if "error" in message:
                    raise HostsError(message["error"])
                missing = message["missing"]
        except (EOFError, OSError, ValueError):  # process 0 was not ready, or has started anew
            wire.close()
            time.sleep(0.2)
    if missing == [0]:
        raise HostsError(
            f"Process 0 of {place.count}, the coordinator, did not answer at {place.coordinator} within {timeout:g} s; "
            "look at its log, check the address and that the port is open, or give more time (--join_timeout)."
        )
    raise HostsError(_missing(missing, place, timeout))


# ------------------------------------------------------------------------------------ the link


class _Link:
    """The connections after the roll: to all others on process 0, to process 0 elsewhere."""

    def __init__(self, place: Place, wires: dict[int, _Wire]) -> None:
        self.place = place
        self._wires = wires
        self._inbox: dict[int, queue.SimpleQueue[Any]] = {index: queue.SimpleQueue() for index in wires}
        self._leaving = {index: threading.Event() for index in wires}
        self._ending = threading.Lock()
        self._stopping = _Stopping()
        self._where: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.here: Callable[[], Mapping[str, Any]] | None = None
        self.report: Callable[[], None] | None = None
        for index in wires:
            threading.Thread(target=self._watch, args=(index,), daemon=True, name=f"link to process {index}").start()

    def consult(
        self, value: Any, decide: Callable[[list[Any]], Any], *, ends: Callable[[Any], bool] = lambda decided: False
    ) -> Any:
        """What process 0 decides from everybody's value (all JSON values); `ends` says whether all leave after it."""
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

    def notice(self) -> None:
        """Asks all how often they have called `told_to_end`; none gets further until it is known where all stop."""
        if self.place.index != 0:
            self._wires[0].send({"notice": True})
        elif (count := self._stopping.freeze()) is not None:
            self._tell({"halt": True})
            self._at(0, count)

    def told_to_end(self) -> bool:
        return self._stopping.reached()

    def _at(self, index: int, count: int) -> None:
        """On process 0: one process has made so many calls. After the last answer all stop at the next call of any."""
        stop = self._stopping.answered(index, count, of=self.place.count)
        if stop is not None:
            self._tell({"stop": stop})
            self._stopping.stop_at(stop)

    def where_all_are(self, here: Callable[[], Mapping[str, Any]]) -> dict[int, Mapping[str, Any] | None]:
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
        time.sleep(_GRACE)  # the news of another one's failure ends this process from its watching thread
        self._end(f"Process {self.place.index} of {self.place.count} ended: {text}", shown=text)

    def _tell(self, message: Mapping[str, Any]) -> None:
        for wire in self._wires.values():
            with contextlib.suppress(OSError):  # gone: its thread says so
                wire.send(message)

    def _watch(self, index: int) -> None:
        """Reads what one process says; ends this one where that one failed or is gone."""
        text = (
            f"Process {index} of {self.place.count} is gone without a word (killed, or its machine is lost); look at "
            "its log. The run can be resumed by repeating the command."
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
        """To what is asked or said while the main thread may be busy."""
        if "notice" in message:
            self.notice()
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
            # Not in this thread, which has to read the answers.
            threading.Thread(target=self.report, daemon=True, name="stall report").start()

    def _end(self, text: str, *, shown: str) -> None:
        """Passes the word on and ends the process at once: its main thread may be in a collective for good."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it
        print(f"\nsbs, {describe()}: {shown}", file=sys.stderr, flush=True)
        self._tell({"failed": text})
        for wire in self._wires.values():
            with contextlib.suppress(OSError):
                wire.connection.shutdown(socket.SHUT_WR)
        os._exit(1)


class _Stopping:
    """At which call of `reached`, counted from 1, all processes stop; they make the same calls, at times of their own.

    Once one is told to end, each says how many calls it has made (`freeze`), and waits in its next one until process 0
    has told the number at which all stop: the one after the last that any has made.
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
        """The number of calls made; None if it was asked before."""
        with self._changed:
            if self._frozen is not None:
                return None
            self._frozen = self._calls
            return self._frozen

    def answered(self, index: int, count: int, *, of: int) -> int | None:
        """Where to stop, after the last answer."""
        with self._changed:
            self._answers[index] = count
            return max(self._answers.values()) + 1 if len(self._answers) == of else None

    def stop_at(self, call: int) -> None:
        with self._changed:
            self._stop = call
            self._changed.notify_all()


_place: Place | None = None  # from `join` on
_link: _Link | None = None  # from `join` to `leave`
_told = threading.Event()  # in a single process
