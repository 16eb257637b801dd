"""The roll call: every process connects to process 0, which waits for all of them."""

import contextlib
import dataclasses
import json
import logging
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sbs_jax.hosts import slices

log = logging.getLogger(__name__)


class HostsError(RuntimeError):
    """Processes are missing or differ; the message names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Address of the coordinator (process 0), number of processes, and index of this one.

    `launch` is the same for all processes that were started together and differs from other launches; "" if unknown.
    `claims` are variables of the environment that all must share.
    """

    coordinator: str
    count: int
    index: int
    launch: str = ""
    claims: Mapping[str, str] = dataclasses.field(default_factory=dict)

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


class Wire:
    """One connection that carries JSON lines in both directions."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A lost machine sends nothing: the kernel probes after 20 s of silence and gives up 40 s later.
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
        """Returns the next message. EOFError at the end, TimeoutError past `deadline` (a `time.monotonic` value)."""
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


def call_roll(place: Place, timeout: float, deadline: float) -> dict[int, Wire]:
    """Accepts a connection from each of the others, on process 0.

    A process of another launch, such as one that outlived it, is turned away: it must not take the place of ours.
    """
    wires: dict[int, Wire] = {}
    strangers: set[tuple[str, str, int]] = set()
    try:
        listener = _listen(place.port)
    except OSError as error:
        raise HostsError(
            f"Process 0 cannot listen on port {place.port} ({error.strerror}); end a process of an earlier launch, or "
            "choose another --coordinator_address."
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
                others = sorted({launch for _, launch, _ in strangers})
                called = f" Processes of launch {', '.join(map(repr, others))} called; end them." if others else ""
                raise _refusal(wires, _missing(missing, place, timeout) + called)
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
            wire = Wire(connection)
            try:
                hello = wire.receive(deadline=time.monotonic() + 2)
                index, count = int(hello["index"]), int(hello["count"])
                launch, claims = str(hello["launch"]), dict(hello["claims"])
            except (OSError, EOFError, ValueError, KeyError, TypeError):
                wire.close()  # not a process of this run
                continue
            if launch != place.launch:
                stranger = (address[0], launch, index)
                if stranger not in strangers:  # it calls again
                    called = (index, count, address[0], launch, place.launch)
                    log.warning("Turned away process %d of %d at %s: it is of launch %r, not %r.", *called)
                strangers.add(stranger)
                with contextlib.suppress(OSError):
                    wire.send({"launch": place.launch})
                wire.close()
                continue
            if claims != place.claims:
                text = (
                    f"Process {index} at {address[0]} has {_listed(claims)} in its environment, process 0 has "
                    f"{_listed(place.claims)}. Give all hosts the same, or unset what an earlier slice left."
                )
            elif count != place.count or not 0 < index < place.count:
                text = (
                    f"A process at {address[0]} says it is {index} of {count}, but process 0 expects "
                    f"{place.count}. Give every process the same --process_count and a different index."
                )
            elif index in wires:
                text = f"Two processes say they are {index} of {count}. Give every process a different index."
            else:
                wires[index] = wire
                continue
            raise _refusal({**wires, -1: wire}, text)


def _listen(port: int) -> socket.socket:
    """Listens on all addresses, as JAX's service does."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server(("", port), backlog=1024)
    listener.settimeout(0.1)
    return listener


def _refusal(wires: Mapping[int, Wire], text: str) -> HostsError:
    """Sends the error to every connected process, and returns it for raising."""
    for wire in wires.values():
        with contextlib.suppress(OSError):
            wire.send({"error": text})
        wire.close()
    return HostsError(text)


def _listed(claims: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in claims.items()) or "no MEGASCALE_* variable"


def _missing(missing: Sequence[int], place: Place, timeout: float) -> str:
    one = len(missing) == 1
    return (
        f"Process{'' if one else 'es'} {', '.join(map(str, missing))} of {place.count} did not join within "
        f"{timeout:g} s; look at {'its' if one else 'their'} log, or give more time (--join_timeout)."
        f"{slices.hint(place.claims)}"
    )


def answer_roll(place: Place, timeout: float, deadline: float) -> Wire:
    """Connects to process 0 from another process, and returns once all have joined."""
    missing, other = [0], None
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=5)
        except OSError:
            other = None
            time.sleep(0.2)
            continue
        wire = Wire(connection)
        try:
            wire.send(
                {"index": place.index, "count": place.count, "launch": place.launch, "claims": dict(place.claims)}
            )
            while True:
                message = wire.receive(deadline=deadline)
                other = message.get("launch")
                if other is not None:  # its coordinator may end soon, and ours take the address
                    wire.close()
                    time.sleep(0.5)
                    break
                if "joined" in message:
                    return wire
                if "error" in message:
                    raise HostsError(message["error"])
                missing = message["missing"]
        except (EOFError, OSError, ValueError):  # process 0 was not ready, or restarted
            wire.close()
            time.sleep(0.2)
    if other is not None:
        raise HostsError(
            f"The coordinator at {place.coordinator} is of launch {other!r}, this process of {place.launch!r}. End the "
            "processes of the earlier launch, or give all of this one the same --launch_id."
        )
    if missing == [0]:
        raise HostsError(
            f"Process 0 of {place.count}, the coordinator, did not answer at {place.coordinator} within {timeout:g} s; "
            "look at its log, check the address and that the port is open, or give more time (--join_timeout)."
        )
    raise HostsError(_missing(missing, place, timeout))
