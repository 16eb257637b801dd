"""Limits on a client's connection that uvicorn lacks, with errors as JSON.

uvicorn waits forever for a request's headers and for a client that reads nothing (`Connection`), and reads the body of
a request that is already answered without end (`Unread`).
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sbs_jax.serve import bodies

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


class Connection(H11Protocol):
    """One connection; `limited` sets its limits."""

    max_connections: int
    read_timeout: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing is called once anything waits for the client
        self._one_too_many = len(self.connections) > self.max_connections
        self._timers: dict[str, asyncio.TimerHandle] = {}
        # uvicorn starts this only after a request.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._one_too_many:  # not earlier: closing over unread data would reset the connection
            most = self.max_connections
            self._end("503 Service Unavailable", "too_many_connections", f"{most} connections are open, the most here.")
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
        self._end("400 Bad Request", "not_http", f"{msg} Expected HTTP/1.1 with headers of at most 16 KiB.")

    def _end(self, status: str, code: str, message: str) -> None:
        """Sends a whole response and closes the connection."""
        if self.transport.is_closing():
            return
        body = bodies.encoded(bodies.Error.of(code, message))
        retry = "Retry-After: 1\r\n" if status.startswith("503") else ""
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{retry}"
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode("ascii") + body)
        self.transport.close()


def limited(*, max_connections: int, read_timeout: float) -> type[Connection]:
    """Makes the class of one server's connections."""
    return type("Connection", (Connection,), {"max_connections": max_connections, "read_timeout": read_timeout})
