"""What a client's connection may do to the server: uvicorn's HTTP/1.1 with limits that it has not.

uvicorn waits forever for the headers of a request and for a client that reads nothing, reads on without end after an
answer that came before the end of the body, and says what is wrong in plain text. Here each has an end, and errors are
JSON.
"""

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Bytes of a body that are read and thrown away after an early answer, so that its client gets to read it: a connection
# that is closed with unread data is reset, and the answer may be lost.
_DISCARDED = 256 * 1024


def error_body(code: str, message: str) -> dict[str, Any]:
    """What every error of a whole request is sent as."""
    return {"error": {"code": code, "message": message}}


def raw_response(status: str, code: str, message: str, *, headers: str = "") -> bytes:
    """A whole HTTP response that ends its connection."""
    body = json.dumps(error_body(code, message)).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}"
    return f"{head}Connection: close\r\n\r\n".encode("ascii") + body


class Connection(H11Protocol):
    """One connection. `limits` is set by `limited`; `look` is called for each, a few times a second."""

    max_connections: int
    read_timeout: float
    keep_alive: float
    _headers_since: float | None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._opened, self._headers_since = time.monotonic(), None
        self._unsent_since: float | None = None
        self._early_since: float | None = None
        self._discarded = 0
        self._one_too_many = len(self.connections) > self.max_connections

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._one_too_many:  # not before it has sent something: unread data would reset it
            most = self.max_connections
            self._end("503 Service Unavailable", "too_many_connections", f"{most} connections are open, the most here.")
            return
        if self._answered_early():
            self._discarded += len(data)
            if self._discarded > _DISCARDED:
                self.transport.abort()
                return
        elif self.conn.their_state is h11.IDLE and self._headers_since is None:
            self._headers_since = time.monotonic()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._headers_since = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._headers_since = self._early_since = None
        if self._answered_early():
            self._early_since = time.monotonic()
            self._discarded = 0

    def _answered_early(self) -> bool:
        """The response is sent, and the body of its request still comes."""
        return self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        self._end("400 Bad Request", "not_http", f"{msg} Expected HTTP/1.1 with headers of at most 16 KiB.")

    def _end(self, status: str, code: str, message: str) -> None:
        retry = "Retry-After: 1\r\n" if status.startswith("503") else ""
        self.transport.write(raw_response(status, code, message, headers=retry))
        self.transport.close()

    def look(self, now: float) -> None:
        """Ends the connection where its client has been slow for too long."""
        unsent = self.transport.get_write_buffer_size()
        self._unsent_since = (self._unsent_since or now) if unsent else None
        if self._unsent_since is not None and now - self._unsent_since > self.read_timeout:
            self.transport.abort()  # it does not read
        elif self.transport.is_closing():
            return
        elif self._headers_since is not None and now - self._headers_since > self.read_timeout:
            expected = f"the headers of a request within {self.read_timeout:g} s"
            self._end("408 Request Timeout", "slow_headers", f"got a part of the headers; expected {expected}.")
        elif self.cycle is None and self._headers_since is None and now - self._opened > self.keep_alive:
            self.transport.close()  # it has never asked for anything
        elif self._early_since is not None and now - self._early_since > self.read_timeout and self._answered_early():
            self.transport.abort()


def limited(**limits: int | float) -> type[Connection]:
    """The class of the connections of one server: `max_connections`, `read_timeout` and `keep_alive`."""
    return type("Connection", (Connection,), limits)
