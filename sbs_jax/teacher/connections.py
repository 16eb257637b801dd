"""Connections to hosted teachers: SDKs, credentials from the environment, and a pool for many requests in flight.

The SDKs (`pip install 'sbs-jax[teacher]'`) know addresses, authentication and errors. Connections are made here because
a run over 549,367 rows keeps 1,000 requests in flight. Each connection has its own pool: in a shared pool,
every request scans all 1,000 connections, which takes most of its time.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import contextvars
import functools
import io
import logging
import os
import re
import urllib.parse
import urllib.request
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from sbs_jax.teacher import parameters, refusals
from sbs_jax.teacher.clients import Again, Failed, Fatal, Request

log = logging.getLogger(__name__)

# Bytes of an answer, decoded: an answer beyond the first is not read, a file of replies is cut at the second. The
# longest real answers have 1 MB: 128,000 tokens.
MOST_BYTES, MOST_FILE_BYTES = 4 << 20, 1 << 30
_TRANSFER = 1800.0  # seconds for a file, up or down
_of_file = contextvars.ContextVar("_of_file", default=False)
_OF_CODING = (b"content-encoding", b"transfer-encoding", b"content-length")
_T = TypeVar("_T")


class HostedClient:
    """An SDK's client whose errors are all Fatal, Again or Failed. Providers subclass it."""

    sdk: Any
    secret: str  # the key, never shown in a message
    timeout: float  # seconds for a whole reply
    errors: tuple[type[Exception], ...]  # exceptions of the SDK

    def __init__(self) -> None:
        self.left_out: dict[str, set[str]] = {}  # parameters that a model does not take

    def problem(self, error: Any) -> Exception:
        """Translates one of `errors`."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError

    async def send(self, call: Callable[[], Awaitable[_T]], *, transfer: bool = False) -> _T:
        """Awaits an SDK call and translates its exceptions; a file transfer has more time and more bytes."""
        seconds = _TRANSFER if transfer else self.timeout
        before = _of_file.set(transfer)
        # Raised after the handler, so that it does not chain the SDK's exception, which has the request and headers.
        try:
            async with asyncio.timeout(seconds):
                return await call()
        except TimeoutError:
            trouble = Again(f"No whole reply within {seconds:g} s (--timeout).", lost=True)
        except UnicodeError:
            trouble = Failed("The prompt has an unpaired surrogate, which UTF-8 cannot encode.", reason="not_text")
        except Fatal as error:  # from `http_client`, with an address that the server gave
            trouble = Fatal(refusals.short(str(error), self.secret))
        except refusals.RefusedError as answer:
            trouble = refusals.problem(answer.status, answer.body, headers=answer.headers, secrets=(self.secret,))
        except self.errors as error:
            trouble = self.problem(error)
        except (ValueError, RecursionError) as error:
            trouble = refusals.not_read(error, secrets=(self.secret,))
        finally:
            _of_file.reset(before)
        raise trouble

    async def send_accepted(
        self, request: Request, body: Mapping[str, Any], post: Callable[[Mapping[str, Any]], Awaitable[_T]]
    ) -> _T:
        """Sends a request's body; if the model refuses a parameter, asks without it, now and for later requests."""
        left_out = self.left_out.setdefault(request.model, set())

        async def attempt() -> _T:
            mine, said = set(left_out), ""
            while True:
                sent = parameters.without(body, mine)
                try:
                    response = await post(sent)
                except refusals.RefusedError as answer:
                    name = parameters.refused(answer.status, answer.body, sent)
                    if name is None or name in mine:
                        raise
                    mine.add(name)
                    said = said or refusals.short(refusals.described(answer.body)[1], self.secret)
                    continue
                if not mine <= left_out:
                    left_out.update(mine)
                    log.warning(
                        "%s is asked without %s, which it refuses: %s", request.model, ", ".join(sorted(mine)), said
                    )
                return response

        return await self.send(attempt)


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


def checked_address(base_url: str | None) -> str | None:
    """Returns an address that requests can be sent to, or None. ValueError for any other text."""
    if base_url is None:
        return None
    try:
        parts = urllib.parse.urlsplit(base_url)
        host = (parts.hostname or "").encode("idna")  # raises UnicodeError, a ValueError
        usable = parts.scheme in ("http", "https") and host and parts.port != 0
        usable = usable and base_url.isprintable() and not re.search(r"[\s\\]", base_url)
    except ValueError:
        usable = False
    if not usable:
        shown = re.sub(r"^(.*//)?.*@", r"\1..@", base_url)  # without a password
        raise ValueError(
            f"The address of the teacher is {shown[:200]!r}; expected http:// or https:// and a host. Check --base_url "
            "(such as http://localhost:8000/v1) and the variables that replace it."
        )
    return base_url


def moved(status: int, url: str, location: str | None) -> Fatal:
    """Describes an answer that sends the request on to another address: key and rows go nowhere else."""
    try:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(url, location or ""))
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        place = repr(location)
    return Fatal(
        f"The teacher's address moved to {refusals.short(place)} ({status}); nothing was sent there. If you trust it, "
        "give it as --base_url."
    )


async def _read(response: Any) -> bytes:
    """Reads an answer and unpacks gzip, at most `MOST_BYTES`. A file is cut, so that the replies before are kept."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise Again(
            f"The reply is packed as {refusals.short(coding)!r}; expected gzip, which was asked for.", lost=True
        )
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32) if coding not in ("", "identity") else None
    most = MOST_FILE_BYTES if _of_file.get() else MOST_BYTES
    whole, received = io.BytesIO(), 0
    async for part in response.aiter_raw():
        received += len(part)
        try:
            whole.write(part if unpack is None else unpack.decompress(part, most + 1 - whole.tell()))
        except zlib.error as error:
            raise Again(f"The reply cannot be unpacked ({error}).", lost=True) from None
        if max(received, whole.tell()) > most:
            if not _of_file.get():
                raise Again(f"The reply has more than {most >> 20} MiB and was not read.", lost=True)
            log.warning("A file of replies has more than %d MiB; the replies behind are asked again.", most >> 20)
            whole.truncate(most)
            break
    else:
        if unpack is not None and (unpack.unused_data or not unpack.eof):
            raise Again("The reply cannot be unpacked: its packed data end too early or too late.", lost=True)
    return whole.getvalue()


def _sent_keys(headers: Mapping[str, str]) -> Iterator[str]:
    """Yields the key, token or password in a request's headers."""
    for name in ("authorization", "x-goog-api-key"):
        kind, _, key = headers.get(name, "").rpartition(" ")
        yield key
        if kind == "Basic":
            with contextlib.suppress(binascii.Error, UnicodeError):
                yield base64.b64decode(key).decode().partition(":")[2]


def masked(body: bytes, *keys: str) -> bytes:
    """Replaces keys in an answer by "[key]", also where JSON escapes their characters.

    A key below 8 characters or of letters only is not replaced: it may be a placeholder for servers that need none
    ("EMPTY"), which may also be a word of a reply.
    """
    for key in keys:
        if len(key) >= 8 and not key.isalpha():
            body = body.replace(key.encode(), b"[key]")
            if b"\\u00" in body or not re.fullmatch(r"[\w.-]*", key):
                body = _escaped(key).sub(b"[key]", body)
    return body


@functools.lru_cache(maxsize=8)
def _escaped(key: str) -> re.Pattern[bytes]:
    characters = (rf"(?:\\?{re.escape(each)}|\\u(?i:{ord(each):04x}))" for each in key)
    return re.compile("".join(characters).encode())


def http_client(url: str, connections: int) -> Any:
    """Makes a client that keeps up to `connections` requests in flight; further ones wait.

    It reads at most `MOST_BYTES` of an answer, decoded, without the keys that were sent. Raises `RefusedError` for a
    status of 400 or more, Again for an answer that is longer, and Fatal for a status 3xx and for a request to another
    server than the first request's.
    """
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

    home: Any = None

    class Pools(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: Any) -> Any:
            nonlocal home
            # SDKs also go where an answer tells them, to upload and to download files.
            here = request.url.scheme, request.url.host, request.url.port
            home = home or here
            if here != home:
                raise Fatal(
                    f"The teacher names another server, {request.url.copy_with(raw_path=b'/')}, for its files; nothing "
                    "was sent there. Check --base_url."
                )
            request.headers["accept-encoding"] = "gzip"
            async with slots:
                pool = free.pop()
                try:
                    response = await pool.handle_async_request(request)
                    try:
                        if 300 <= response.status_code < 400:
                            raise moved(response.status_code, str(request.url), response.headers.get("location"))
                        body = await _read(response)
                    finally:
                        await response.aclose()  # frees the connection before the slot
                finally:
                    free.append(pool)
            body = masked(body, *_sent_keys(request.headers))
            if response.status_code >= 400:
                raise refusals.RefusedError(response.status_code, body, response.headers)
            headers = [pair for pair in response.headers.raw if pair[0].lower() not in _OF_CODING]
            return httpx2.Response(
                response.status_code, headers=headers, content=body, request=request, extensions=response.extensions
            )

        async def aclose(self) -> None:
            for pool in pools:
                await pool.aclose()

    # No timeout here: `send` has one for the whole reply, which a server that trickles bytes cannot extend.
    return httpx2.AsyncClient(transport=Pools(), timeout=None, follow_redirects=False, trust_env=False)
