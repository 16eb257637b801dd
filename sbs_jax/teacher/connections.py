"""How a hosted teacher is reached: the SDKs, the credentials in the environment, the connections.

The SDKs (`pip install 'sbs-jax[teacher]'`) know addresses, authentication and errors. Connections are made past them,
because a run over 549,367 rows keeps 1,000 requests in flight. Every connection is a pool of its own: in one pool
for all, a request looks at all of its 1,000 connections, which takes most of its time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import urllib.parse
import urllib.request
from typing import Any


def environment_value(name: str) -> str:
    """What an environment variable holds. ValueError where it is not set."""
    value = os.environ.get(name, "").strip()
    if not value:
        raise ValueError(f"The environment variable {name} is not set; the teacher cannot be asked without it.")
    return value


def environment_key(*names: str) -> str:
    """The key in the first of these variables that is set. ValueError where none is, or where it cannot be one."""
    name = next((name for name in names if os.environ.get(name, "").strip()), None)
    if name is None:
        raise ValueError(f"No key: set the environment variable {' or '.join(names)}.")
    key = os.environ[name].strip()
    # Otherwise the exception about the header that it cannot be part of would show it.
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"The environment variable {name} holds a character that no key has; copy it again.")
    return key


def sdk_module(name: str) -> Any:
    """A module of the SDKs, which only this part of the package needs."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise ImportError(
            f"Asking a hosted teacher needs the package {missing!r}: pip install 'sbs-jax[teacher]'", name=missing
        ) from None


@functools.cache
def _certificates() -> Any:
    """Whom to trust; read once, as it takes longer than a request."""
    return sdk_module("httpx2").create_ssl_context()


def http_client(url: str, connections: int) -> Any:
    """A client with a connection for each of `connections` requests in flight; those beyond wait for one."""
    httpx2 = sdk_module("httpx2")
    for name in ("httpx2", "httpcore2", "google_genai"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line per request otherwise
    scheme, host = urllib.parse.urlsplit(url)[:2]
    proxy = urllib.request.getproxies().get(scheme)
    if proxy is not None and urllib.request.proxy_bypass(host):
        proxy = None
    context = _certificates()
    limits = httpx2.Limits(max_connections=1, max_keepalive_connections=1)
    pools = [httpx2.AsyncHTTPTransport(limits=limits, verify=context, proxy=proxy) for _ in range(connections)]
    free = list(pools)
    places = asyncio.Semaphore(connections)

    class Pools(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: Any) -> Any:
            async with places:
                pool = free.pop()
                try:
                    response = await pool.handle_async_request(request)
                    try:
                        await response.aread()  # the connection is free again when the place is
                    except BaseException:
                        await response.aclose()
                        raise
                    return response
                finally:
                    free.append(pool)

        async def aclose(self) -> None:
            for pool in pools:
                await pool.aclose()

    # `timeout`: ask has one for the whole reply, which a server that sends byte by byte cannot stretch.
    return httpx2.AsyncClient(transport=Pools(), timeout=None, follow_redirects=True, trust_env=False)
