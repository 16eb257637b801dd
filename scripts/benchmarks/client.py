"""A minimal HTTP client for measuring servers; it does little else than wait."""

import asyncio
import json
import re
from typing import Any


def request(path: str, body: Any) -> bytes:
    """Returns the bytes of a POST request with a JSON body."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


class Client:
    """One client's connection, kept open."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._host, self._port = host, int(port)

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        """Sends a request; returns the status and the body of the answer."""
        self._writer.write(data)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        assert length is not None
        return int(head.split(None, 2)[1]), await self._reader.readexactly(int(length[1]))

    async def leave(self, data: bytes) -> None:
        """Sends a request and disconnects before the answer."""
        self._writer.write(data)
        await self._writer.drain()
        await self.close()
        await self.open()

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()
