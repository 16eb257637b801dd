"""Connections to hosted teachers: SDKs, credentials from the environment, and a pool for many requests in flight.

The SDKs (`pip install 'sbs-jax[teacher]'`) know addresses, authentication and errors. Connections are made here because
a run over 549,367 rows keeps 1,000 requests in flight. Each connection has its own pool: in a shared pool,
every request scans all 1,000 connections, which takes most of its time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from sbs_jax.teacher import refusals
from sbs_jax.teacher.clients import Again, Failed

_T = TypeVar("_T")


class HostedClient:
    """An SDK's client whose errors are all Fatal, Again or Failed. Providers subclass it."""

    sdk: Any
    secret: str  # the key, never shown in a message
    timeout: float  # seconds for a whole reply
    errors: tuple[type[Exception], ...]  # exceptions of the SDK

    def problem(self, error: Any) -> Exception:
        """Translates one of `errors`."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def send(self, call: Callable[[], Awaitable[_T]], *, seconds: float | None = None) -> _T:
        """Awaits an SDK call within `seconds` (default: the timeout) and translates its exceptions."""
        seconds = seconds or self.timeout
        # Raised after the handler, so that it does not chain the SDK's exception, which has the request and headers.
        try:
            async with asyncio.timeout(seconds):
                return await call()
        except TimeoutError:
            trouble = Again(f"No whole reply within {seconds:g} s (--timeout).")
        except UnicodeError:
            trouble = Failed("The prompt has an unpaired surrogate, which UTF-8 cannot encode.", reason="not_text")
        except self.errors as error:
            trouble = self.problem(error)
        except ValueError as error:
            trouble = refusals.not_read(error, secrets=(self.secret,))
        raise trouble


def environment_value(name: str) -> str:
    """Returns an environment variable. ValueError if it is not set."""
    value = os.environ.get(name, "").strip()
    if not value:
        raise ValueError(f"The environment variable {name} is not set; set it to ask this teacher.")
    return value


def environment_key(*names: str) -> str:
    """Returns the key in the first of these variables that is set. ValueError if none is, or the key is malformed."""
    name = next((name for name in names if os.environ.get(name, "").strip()), None)
    if name is None:
        raise ValueError(f"No key: set the environment variable {' or '.join(names)}.")
    key = os.environ[name].strip()
    # Checked here, because the exception about a malformed header would show the key.
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"The environment variable {name} has a character that is invalid in a key; copy it again.")
    return key


def sdk_module(name: str) -> Any:
    """Imports a module of the SDKs, an optional dependency."""
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
    """Loads the trusted certificates; cached, because loading takes longer than a request."""
    return sdk_module("httpx2").create_ssl_context()


def http_client(url: str, connections: int) -> Any:
    """Makes a client that keeps up to `connections` requests in flight; further ones wait."""
    httpx2 = sdk_module("httpx2")
    for name in ("httpx2", "httpcore2", "google_genai"):
        logging.getLogger(name).setLevel(logging.WARNING)  # by default it logs a line per request
    scheme, host = urllib.parse.urlsplit(url)[:2]
    proxy = urllib.request.getproxies().get(scheme)
    if proxy is not None and urllib.request.proxy_bypass(host):
        proxy = None
    context = _certificates()
    limits = httpx2.Limits(max_connections=1, max_keepalive_connections=1)
    pools = [httpx2.AsyncHTTPTransport(limits=limits, verify=context, proxy=proxy) for _ in range(connections)]
    free = list(pools)
    slots = asyncio.Semaphore(connections)

    class Pools(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: Any) -> Any:
            async with slots:
                pool = free.pop()
                try:
                    response = await pool.handle_async_request(request)
                    try:
                        await response.aread()  # frees the connection before the slot
                    except BaseException:
                        await response.aclose()
                        raise
                    return response
                finally:
                    free.append(pool)

        async def aclose(self) -> None:
            for pool in pools:
                await pool.aclose()

    # No timeout here: `send` has one for the whole reply, which a server that trickles bytes cannot extend.
    return httpx2.AsyncClient(transport=Pools(), timeout=None, follow_redirects=True, trust_env=False)
