"""Limits on clients' connections that uvicorn and h11 lack, with errors as JSON.

uvicorn waits forever for a request's headers and for a client that reads nothing, and keeps idle connections while it
has no descriptor for new ones (`Connection`); it reads the body of a request that is already answered without end
(`Unread`). h11 reads heads of any size that arrive at once, and some that another reader reads otherwise (`_Heads`).
"""

import asyncio
import contextlib
import logging
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sbs_jax.serve import bodies

log = logging.getLogger(__name__)

HEAD_BYTES = 16 * 1024
# Connections taken from the system in one turn of the event loop: they have descriptors before they can be refused.
ACCEPTED_AT_ONCE = 4
# Refused connections that stay open for a second, since closing over unread data would lose the answer.
_LINGERING, _LINGER_SECONDS = 16, 1.0
# Descriptors beside connections: those of the two numbers above (a connection takes up to four turns of the loop to be
# made or closed), and files that are open for a moment.
_RESERVED = 4 * ACCEPTED_AT_ONCE + _LINGERING + 16
# Bytes of a body that are read and discarded after an early answer, so that its client can read the answer: closing
# over unread data resets the connection and may lose it.
_DISCARDED = 256 * 1024


class Unread:
    """Closes a connection after an answer that came before the end of its request's body."""

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        announced = b"expect" in headers  # the client sends its body only once `receive` is called

        async def received() -> Message:
            nonlocal unread, announced
            announced = False
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def discard() -> None:
            size = 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    while unread and not announced and size <= _DISCARDED:
                        size += len((await received()).get("body", b""))

        async def sent(message: Message) -> None:
            if unread and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif unread and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await discard()
                message = {"type": "http.response.body"}
            await send(message)

        await self._app(scope, received, sent)


def fitting(most: int) -> int:
    """Returns how many connections, at most `most`, fit into the descriptors that this process may open.

    Raises the soft limit (`ulimit -n`) as far as needed and allowed. OSError if not one connection fits.
    """
    used = len(list(Path("/dev/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = used + _RESERVED + most
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return most
    with contextlib.suppress(ValueError, OSError):
        highest = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
        soft = highest
    fit = min(most, soft - used - _RESERVED)
    if fit < 1:
        raise OSError(
            f"this process may open {soft} files (ulimit -n) and has {used} open: no connection fits. Allow {needed}."
        )
    if fit < most:
        log.warning(
            "max_connections is %d instead of %d: this process may open %d files (ulimit -n); allow %d.",
            *(fit, most, soft, needed),
        )
    return fit


class _Heads(h11.Connection):
    """Refuses requests whose head is longer than HEAD_BYTES, or whose length can be read in two ways (RFC 9112)."""

    refused = ""  # why

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            self.refused = _head_problem(self.trailing_data[0])
            if self.refused:
                raise h11.RemoteProtocolError(self.refused)
        return super().next_event()


def _head_problem(data: bytes) -> str:
    """Returns what is wrong with the head at the beginning of `data`; "" if it is right, incomplete, or for h11."""
    blank = re.search(rb"\n\r?\n", data)
    if blank is None:
        return ""
    if blank.end() > HEAD_BYTES:
        return f"The headers have {blank.end()} bytes."
    first, *lines = data[: blank.start()].split(b"\n")
    if any(line[:1] in (b" ", b"\t") for line in lines):
        return "A header continues on a second line."
    fields = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    lengths = [value for name, value in fields if name == b"content-length"]
    if len(lengths) > 1 or any(b"," in value for value in lengths):
        return "Content-Length is given more than once."
    if any(name == b"transfer-encoding" for name, _ in fields):
        if lengths:
            return "Content-Length and Transfer-Encoding are given together."
        if first.rstrip().endswith(b"HTTP/1.0"):
            return "HTTP/1.0 knows no Transfer-Encoding."
    return ""


class Connection(H11Protocol):
    """One connection; `limited` sets its limits."""

    max_connections: int
    read_timeout: float
    admitted: dict["Connection", None]  # the server's connections, the one that has waited longest for a request first
    refused: set["Connection"]  # beyond max_connections
    conn: _Heads

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _Heads(h11.SERVER, HEAD_BYTES)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing is called once anything waits for the client
        if len(self.admitted) >= self.max_connections and not self._close_an_idle_one():
            self._refuse()
            return
        self.admitted[self] = None
        # uvicorn starts this only after a request.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _close_an_idle_one(self) -> bool:
        """Closes the connection that has waited longest for a whole head; returns whether there is one."""
        for each in self.admitted:
            if each.conn.their_state is h11.IDLE and not each.transport.get_write_buffer_size():
                each.timeout_keep_alive_handler()
                del self.admitted[each]
                return True
        return False

    def _refuse(self) -> None:
        most = self.max_connections
        close = len(self.refused) >= _LINGERING
        message = f"{most} connections are open, the most here."
        self._end("503 Service Unavailable", "too_many_connections", message, close=close)
        if not close:
            self.refused.add(self)
            with contextlib.suppress(OSError):  # the client has gone
                self.transport.write_eof()
            self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self.admitted.pop(self, None)
        self.refused.discard(self)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        if self.admitted.pop(self, self) is None:
            self.admitted[self] = None  # the last to wait
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        if self in self.refused:
            self.transport.close()
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop("headers")
        elif self.conn.trailing_data[0]:
            self._start("headers", self._slow_headers)

    def _slow_headers(self) -> None:
        expected = f"the headers of a request within {self.read_timeout:g} s"
        self._end("408 Request Timeout", "slow_headers", f"got a part of the headers; expected {expected}.")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("reading", self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("reading")

    def _start(self, name: str, call: Callable[[], Any]) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(self.read_timeout, call)

    def _stop(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        why = self.conn.refused or msg
        self._end("400 Bad Request", "not_http", f"{why} Expected HTTP/1.1 with headers of at most 16 KiB.")

    def _end(self, status: str, code: str, message: str, *, close: bool = True) -> None:
        """Sends a whole response and closes the connection."""
        if self.transport.is_closing():
            return
        body = bodies.encoded(bodies.Error.of(code, message))
        retry = "Retry-After: 1\r\n" if status.startswith("503") else ""
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{retry}"
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode("ascii") + body)
        if close:
            self.transport.close()


def limited(*, max_connections: int, read_timeout: float) -> type[Connection]:
    """Makes the class of one server's connections."""
    limits = {"max_connections": max_connections, "read_timeout": read_timeout, "admitted": {}, "refused": set()}
    return type("Connection", (Connection,), limits)
