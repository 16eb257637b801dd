"""Batch jobs: a file of requests, answered within a day at half the price. OpenAI, Gemini, Vertex AI.

    job = await client.submit(requests, name="sbs-1")     # at most MOST_REQUESTS, in MOST_BYTES
    while (await client.poll(job)).state == RUNNING:
        await asyncio.sleep(30)
    async for key, reply in client.collect(job):          # Reply, or Failed where there will never be one
        ...

Lines come back in any order and carry the key of their request. A request whose line is missing, unreadable, or says
that the provider was in trouble is left out: it has not been answered, and may be asked again. A job whose end is
"failed" or "cancelled" can be collected too: what it answered before is there, and has been paid for.

What can be repeated without harm is repeated when the connection fails. Submitting is not: if its reply was lost, the
job is looked for by its name. Exceptions are those of `sbs_jax.teacher.clients`.

Vertex AI reads and writes a folder of Cloud Storage, `gs://<bucket>/<folder>`, with the same credentials.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from sbs_jax.checks import nearest
from sbs_jax.teacher import gemini_client, openai_client, refusals
from sbs_jax.teacher.clients import CHAT, Again, Failed, Fatal, Reply, Request

RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"
PROVIDERS = ("openai", "gemini", "vertex")
# OpenAI's limits per file; Gemini takes 2 GB, Vertex AI 200,000 requests, and half of either is a file to handle.
MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
REFUSED = "refused"

# Repetitions of what can be repeated, and seconds before the first (doubled each time).
_TRIES, _DELAY = 6, 0.5
# Seconds that a file may take, up or down.
_TRANSFER = 1800.0
# As `Request.key` makes them: a SHA-256.
_KEY = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchState:
    """How far a job is. Counts are None where the provider does not say; `message` is why it failed, or empty."""

    state: str
    total: int | None = None
    done: int | None = None
    failed: int | None = None
    message: str = ""


@runtime_checkable
class BatchClient(Protocol):
    """A provider's batch jobs."""

    async def submit(self, requests: Sequence[Request], *, name: str) -> str:
        """The provider's name of the new job. The requests share model and form; no two have one key."""
        ...

    async def poll(self, job: str) -> BatchState: ...

    def collect(self, job: str) -> AsyncIterator[tuple[str, Reply | Failed]]:
        """(request's key, what was answered), for a job that is not running any more."""
        ...

    async def cancel(self, job: str) -> None:
        """Asks for the job's end; it is over when `poll` says so, and collected after that. Nothing if it is over."""
        ...

    async def find(self, name: str) -> str | None:
        """The latest job that was submitted under this name, None where there is none."""
        ...

    async def close(self) -> None: ...


def make_batch(provider: str, *, base_url: str | None, timeout: float, folder: str | None = None) -> BatchClient:
    """The batch client of a provider. `timeout` is in seconds, per request; `folder` is Vertex AI's gs:// folder.

    Credentials are those of `clients.make`. ValueError where something is missing.
    """
    if provider == "openai":
        return OpenAIBatches(base_url=base_url, timeout=timeout)
    if provider == "gemini":
        return GeminiBatches(base_url=base_url, timeout=timeout)
    if provider == "vertex":
        return VertexBatches(base_url=base_url, timeout=timeout, folder=folder)
    raise ValueError(
        f"There are no batch jobs of {provider!r}; there are of {list(PROVIDERS)}.{nearest(provider, PROVIDERS)}"
    )


def lines_of(requests: Sequence[Request], line: Callable[[Request], Mapping[str, Any]]) -> bytes:
    """The file of a job. ValueError where its requests do not fit into one."""
    if not requests or len(requests) > MOST_REQUESTS:
        raise ValueError(f"A batch of {len(requests)} requests; expected 1 to {MOST_REQUESTS}.")
    if len({(request.model, request.form) for request in requests}) > 1:
        raise ValueError(
            "The requests of a batch are for several models or of several forms; submit one batch for each."
        )
    if len({request.key for request in requests}) < len(requests):
        raise ValueError("A request stands in the batch twice; its replies could not be told apart.")
    text = "".join(f"{json.dumps(line(request))}\n" for request in requests).encode()
    if len(text) > MOST_BYTES:
        raise ValueError(
            f"A batch of {len(text):,} bytes; expected at most {MOST_BYTES:,}. Take fewer requests per batch."
        )
    return text


async def _patiently(call: Callable[[], Awaitable[_T]]) -> _T:
    """What `call` returns, which is repeated while it raises Again."""
    for attempt in range(_TRIES):
        try:
            return await call()
        except Again as error:
            if attempt == _TRIES - 1:
                raise
            wait = _DELAY * 2**attempt if error.retry_after is None else error.retry_after
        await asyncio.sleep(wait)
    raise AssertionError


async def _created(create: Callable[[], Awaitable[str]], find: Callable[[], Awaitable[str | None]]) -> str:
    """Submits once: where it is not known whether that has worked, the job is looked for before it is repeated."""

    async def once() -> str:
        try:
            return await create()
        except Again:
            found = await find()
            if found is None:
                raise
            return found

    return await _patiently(once)


def _read_lines(data: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, without the lines that are none."""
    for line in io.BytesIO(data):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _answers(
    data: bytes, key_of: Callable[[Mapping[str, Any]], str], read: Callable[[Mapping[str, Any]], Reply]
) -> Iterator[tuple[str, Reply | Failed]]:
    """(key, what was answered) of each line of a file that has both; lines of any other form are left out."""
    for line in _read_lines(data):
        try:
            key = key_of(line)
        except (KeyError, TypeError):
            continue
        outcome = _outcome(lambda line=line: read(line))
        if outcome is not None and isinstance(key, str) and _KEY.fullmatch(key):
            yield key, outcome


def _outcome(read: Callable[[], Reply]) -> Reply | Failed | None:
    """What a line says: a reply, or that there will be none; None where it may be asked again."""
    try:
        return read()
    except Failed as error:
        return error
    except Again:
        return None
    except Fatal as error:
        return Failed(str(error), reason=REFUSED)
    except (AttributeError, TypeError, KeyError, IndexError, ValueError, ArithmeticError):
        return None  # a line of another form


# --------------------------------------------------------------------------------------------- OpenAI

_OPENAI_STATES = {"completed": DONE, "failed": FAILED, "expired": FAILED, "cancelled": CANCELLED}


class OpenAIBatches:
    """OpenAI's files and /v1/batches."""

    def __init__(self, *, base_url: str | None, timeout: float) -> None:
        self._openai = openai_client.OpenAI(base_url=base_url, timeout=timeout, connections=4)
        self.sdk = self._openai.sdk

    async def submit(self, requests: Sequence[Request], *, name: str) -> str:
        url = "/v1/chat/completions" if requests and requests[0].form == CHAT else "/v1/completions"
        official = self._openai.official

        def line(request: Request) -> dict[str, Any]:
            body = openai_client.openai_body(request, official=official)
            return {"custom_id": request.key, "method": "POST", "url": url, "body": body}

        text = lines_of(requests, line)
        files, batches = self.sdk.files, self.sdk.batches
        file = await self._call(lambda: files.create(file=(f"{name}.jsonl", text), purpose="batch"), seconds=_TRANSFER)
        job = {"input_file_id": file.id, "endpoint": url, "completion_window": "24h", "metadata": {"name": name}}

        async def created() -> str:
            return (await self._openai.guarded(lambda: batches.create(**job))).id

        return await _created(created, lambda: self.find(name))

    async def poll(self, job: str) -> BatchState:
        batch = await self._call(lambda: self.sdk.batches.retrieve(job))
        counts = batch.request_counts
        errors = [error.message or error.code for error in (batch.errors and batch.errors.data) or ()]
        return BatchState(
            state=_OPENAI_STATES.get(batch.status, RUNNING),
            total=counts and counts.total,
            done=counts and counts.completed,
            failed=counts and counts.failed,
            message="; ".join(str(error) for error in errors[:3]) or ("expired" if batch.status == "expired" else ""),
        )

    async def collect(self, job: str) -> AsyncIterator[tuple[str, Reply | Failed]]:
        batch = await self._call(lambda: self.sdk.batches.retrieve(job))
        for name in (batch.output_file_id, batch.error_file_id):
            if name is None:
                continue
            file = await self._call(lambda name=name: self.sdk.files.content(name), seconds=_TRANSFER)
            for answer in _answers(file.content, _openai_key, _openai_line):
                yield answer

    async def cancel(self, job: str) -> None:
        batch = await self._call(lambda: self.sdk.batches.retrieve(job))
        if batch.status not in _OPENAI_STATES:
            await self._call(lambda: self.sdk.batches.cancel(job))

    async def find(self, name: str) -> str | None:
        async def search() -> str | None:
            async for batch in self.sdk.batches.list(limit=100):
                if (batch.metadata or {}).get("name") == name:
                    return batch.id
            return None

        return await self._call(search)

    async def close(self) -> None:
        await self._openai.close()

    async def _call(self, call: Callable[[], Awaitable[_T]], *, seconds: float | None = None) -> _T:
        return await _patiently(lambda: self._openai.guarded(call, seconds=seconds))


def _openai_key(line: Mapping[str, Any]) -> str:
    return line["custom_id"]


def _openai_line(line: Mapping[str, Any]) -> Reply:
    error, response = line.get("error"), line.get("response")
    if error:
        # Expired or cancelled: it was never asked.
        raise Again(str(error.get("message")))
    if not isinstance(response, dict):
        raise Again("A line without a response.")
    body = response.get("body") or {}
    if response.get("status_code") != 200:
        error = body.get("error") or {}
        code = str(error.get("code") or error.get("type") or "")
        raise refusals.problem(int(response.get("status_code") or 500), str(error.get("message")), code=code)
    return openai_client.read_openai(body)


# --------------------------------------------------------------------------------------------- Google

_GOOGLE_STATES = {
    "JOB_STATE_SUCCEEDED": DONE,
    "JOB_STATE_PARTIALLY_SUCCEEDED": DONE,
    "JOB_STATE_FAILED": FAILED,
    "JOB_STATE_EXPIRED": FAILED,
    "JOB_STATE_CANCELLED": CANCELLED,
}
# gRPC's numbers of errors as HTTP's; any other is the provider's trouble.
_HTTP = {3: 400, 5: 404, 7: 403, 8: 429, 9: 400, 11: 400, 16: 401}


class _GoogleBatches:
    """What Gemini's and Vertex AI's batch jobs have in common."""

    def __init__(self, *, vertex: bool, base_url: str | None, timeout: float, credentials: Any = None) -> None:
        self._google = gemini_client.Gemini(
            vertex=vertex, base_url=base_url, timeout=timeout, connections=4, credentials=credentials
        )
        self._api = self._google.sdk.aio

    async def poll(self, job: str) -> BatchState:
        found = await self._call(lambda: self._api.batches.get(name=job))
        counts = found.completion_stats
        good, bad = (counts.successful_count, counts.failed_count) if counts is not None else (None, None)
        return BatchState(
            state=_GOOGLE_STATES.get(found.state.name if found.state is not None else "", RUNNING),
            total=None if good is None else good + (bad or 0),
            done=good,
            failed=bad,
            message=(found.error and found.error.message) or "",
        )

    async def cancel(self, job: str) -> None:
        if (await self.poll(job)).state == RUNNING:
            await self._call(lambda: self._api.batches.cancel(name=job))

    async def find(self, name: str) -> str | None:
        async def search() -> str | None:
            async for job in await self._api.batches.list(config={"page_size": 100}):
                if job.display_name == name:
                    return job.name
            return None

        return await self._call(search)

    async def close(self) -> None:
        await self._google.close()

    async def _call(self, call: Callable[[], Awaitable[_T]], *, seconds: float | None = None) -> _T:
        return await _patiently(lambda: self._google.guarded(call, seconds=seconds))

    async def _create(self, *, model: str, source: str, config: Mapping[str, Any]) -> str:
        async def created() -> str:
            create = self._api.batches.create
            return (await self._google.guarded(lambda: create(model=model, src=source, config=dict(config)))).name

        return await _created(created, lambda: self.find(config["display_name"]))


class GeminiBatches(_GoogleBatches):
    """Batch jobs of Gemini with a key, as uploaded files."""

    def __init__(self, *, base_url: str | None, timeout: float) -> None:
        super().__init__(vertex=False, base_url=base_url, timeout=timeout)

    async def submit(self, requests: Sequence[Request], *, name: str) -> str:
        text = lines_of(requests, lambda request: {"key": request.key, "request": gemini_client.gemini_body(request)})
        config = {"display_name": name, "mime_type": "jsonl"}
        upload = self._api.files.upload
        file = await self._call(lambda: upload(file=io.BytesIO(text), config=config), seconds=_TRANSFER)
        return await self._create(model=requests[0].model, source=file.name, config={"display_name": name})

    async def collect(self, job: str) -> AsyncIterator[tuple[str, Reply | Failed]]:
        found = await self._call(lambda: self._api.batches.get(name=job))
        if found.dest is None or found.dest.file_name is None:
            return
        name = found.dest.file_name
        data = await self._call(lambda: self._api.files.download(file=name), seconds=_TRANSFER)
        for answer in _answers(data, _gemini_key, _gemini_line):
            yield answer


def _gemini_key(line: Mapping[str, Any]) -> str:
    return line["key"]


def _gemini_line(line: Mapping[str, Any]) -> Reply:
    error, response = line.get("error"), line.get("response")
    if error:
        code = int(error.get("code") or 13)
        raise refusals.problem(code if code >= 100 else _HTTP.get(code, 500), str(error.get("message")))
    if not isinstance(response, dict):
        raise Again("A line without a response.")
    return gemini_client.read_gemini(response)


class VertexBatches(_GoogleBatches):
    """Batch jobs of Vertex AI, which reads `<folder>/<name>.jsonl` and writes below `<folder>/<name>/`.

    Its lines come back with the request as it was sent and with nothing else that would tell them apart, so that the
    key is among the request's labels (at most 63 characters each, hence two).
    """

    def __init__(self, *, base_url: str | None, timeout: float, folder: str | None, credentials: Any = None) -> None:
        if folder is None or not re.fullmatch(r"gs://[^/]+(/.*)?", folder):
            raise ValueError(
                f"Batch jobs of Vertex AI need a folder in Cloud Storage, gs://<bucket>/<folder>; got {folder!r}."
            )
        super().__init__(vertex=True, base_url=base_url, timeout=timeout, credentials=credentials)
        self._folder = folder.rstrip("/")

    async def submit(self, requests: Sequence[Request], *, name: str) -> str:
        def line(request: Request) -> dict[str, Any]:
            body = gemini_client.gemini_body(request, provider="vertex")
            body["labels"] = {"sbs-key-0": request.key[:32], "sbs-key-1": request.key[32:]}
            return {"request": body}

        text = lines_of(requests, line)
        await self._storage(lambda: _folder(self._folder).write(f"{name}.jsonl", text))
        config = {"display_name": name, "dest": f"{self._folder}/{name}/"}
        return await self._create(model=requests[0].model, source=f"{self._folder}/{name}.jsonl", config=config)

    async def collect(self, job: str) -> AsyncIterator[tuple[str, Reply | Failed]]:
        found = await self._call(lambda: self._api.batches.get(name=job))
        if found.dest is None or found.dest.gcs_uri is None:
            return
        folder = _folder(found.dest.gcs_uri.rstrip("/"))
        names = await self._storage(folder.list)
        for name in sorted(name.decode() for name in names):
            if not name.endswith(".jsonl"):
                continue
            read = await self._storage(lambda name=name: folder.read(name))
            for answer in _answers(read.value, _vertex_key, _vertex_line):
                yield answer

    async def _storage(self, call: Callable[[], Awaitable[_T]]) -> _T:
        try:
            return await call()
        except ValueError as error:  # TensorStore's word for whatever Cloud Storage says; it has repeated it itself
            told = str(error).split(" [")[0]
        raise Fatal(f"The folder {self._folder} cannot be used: {told}")


def _folder(url: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.open(f"{url}/").result()


def _vertex_key(line: Mapping[str, Any]) -> str:
    """The key among the labels of the request that a line repeats."""
    labels = line["request"]["labels"]
    return f"{labels['sbs-key-0']}{labels['sbs-key-1']}"


def _vertex_line(line: Mapping[str, Any]) -> Reply:
    if status := line.get("status"):
        # "Error: INVALID_ARGUMENT: ..", or the same as an object.
        told = status if isinstance(status, str) else json.dumps(status)
        codes = {"INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "NOT_FOUND": 404, "PERMISSION_DENIED": 403}
        raise refusals.problem(next((code for word, code in codes.items() if word in told), 500), told)
    return gemini_client.read_gemini(line.get("response") or {})
