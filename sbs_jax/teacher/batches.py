"""Batch jobs: a file of requests, answered within a day at half the price. OpenAI, Gemini, Vertex AI.

    job = await client.submit(requests, name="sbs-1")     # at most MOST_REQUESTS, in MOST_BYTES
    while (await client.poll(job)).state == RUNNING:
        await asyncio.sleep(30)
    read = client.reader()
    for file in await client.files(job):                  # keep what each holds before the next is read
        for key, reply in read(await client.download(file)):   # Reply, Failed for a final failure, or another Problem
            ...

Lines return in any order and carry the key of their request. A line that is missing, or without a readable key, is
skipped. A line with a reply is a reply, whatever else it reports; one with Again or Fatal has no answer: its request
may be sent again. Collect "failed" and "cancelled" jobs too: their replies have been paid for.

Calls are retried when the connection fails. A submission whose reply was lost is not repeated blindly: the job is
looked up by its name first. Exceptions are those of `sbs_jax.teacher.clients`. Subclasses are in their providers'
modules.
"""

from __future__ import annotations

import abc
import dataclasses
import io
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sbs_jax.teacher import parameters, refusals
from sbs_jax.teacher.clients import REFUSED, Again, Problem, Refused, Reply, Request
from sbs_jax.teacher.connections import HostedClient
from sbs_jax.teacher.pacing import retried

log = logging.getLogger(__name__)

RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"
ENDED = (DONE, FAILED, CANCELLED)
# Providers' words for the state of a job, without "job_state_" and the like.
_STATES = {
    **dict.fromkeys(("validating", "in_progress", "finalizing", "cancelling", "pending", "queued"), RUNNING),
    **dict.fromkeys(("running", "paused", "updating", "created", "submitted", "cancellation_requested"), RUNNING),
    **dict.fromkeys(("completed", "succeeded", "partially_succeeded", "success", "ended"), DONE),
    **dict.fromkeys(("failed", "expired", "timeout_exceeded"), FAILED),
    **dict.fromkeys(("cancelled", "canceled"), CANCELLED),
}
# OpenAI's limits per file. Gemini takes 2 GB, Vertex AI 200,000 requests.
MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000

_KEY = re.compile(r"[0-9a-f]{64}")  # `Request.key`
_T = TypeVar("_T")


class NotTaken(Again):
    """Send the line again without a parameter, which the model does not take."""

    def __init__(self, message: str, *, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


def refused_line(status: int, body: object) -> Problem:
    """Describes the error in a line of answers: `NotTaken`, or as `refusals.problem` does."""
    problem = refusals.problem(status, body)
    name = parameters.refused(status, body, parameters.ANY)
    return problem if name is None else NotTaken(str(problem), parameter=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchState:
    """Progress of a job. Counts are None if the provider reports none; `message` is the reason of a failure."""

    state: str  # a constant above, or the provider's word if it is another one
    total: int | None = None
    done: int | None = None
    failed: int | None = None
    message: str = ""


class BatchClient(abc.ABC):
    """A provider's batch jobs. Subclasses define the form of its files, lines and jobs."""

    def __init__(self, client: HostedClient) -> None:
        self.client = client
        self.left_out: set[str] = set()  # parameters that the model refused in a job

    async def submit(self, requests: Sequence[Request], *, name: str) -> str:
        """Submits requests of one model and form with distinct keys; returns the provider's name of the job."""
        source = identifier(await self.upload(lines_of(requests, self._accepted_line), name=name), "the uploaded file")

        async def create() -> str:
            try:
                job = await self.client.send(lambda: self.create(source, requests[0], name=name))
                return identifier(job, "the job")
            except Again:  # the job may exist although its reply was lost
                found = await self.find(name)
                if found is None:
                    raise
                return found

        return await retried(create)

    def reader(self) -> Callable[[bytes], Iterator[tuple[str, Reply | Problem]]]:
        """Returns a function that yields (request key, answer) of each file of answers of one job."""
        known = set(self.left_out)

        def reply_of(line: Mapping[str, Any]) -> Reply:
            try:
                return self.reply_of(line)
            except NotTaken as refusal:
                if refusal.parameter in known:
                    raise Refused(str(refusal), reason=REFUSED) from None
                if refusal.parameter not in self.left_out:
                    self.left_out.add(refusal.parameter)
                    log.warning("The next job is sent without %s: %s", refusal.parameter, refusal)
                raise

        return lambda data: answers(data, self.key_of, reply_of)

    async def find(self, name: str) -> str | None:
        """Returns the latest job that was submitted under this name, or None."""

        async def search() -> str | None:
            async for job, its_name in self.listed():
                if its_name == name:
                    return job
            return None

        return await self.call(search)

    async def call(self, call: Callable[[], Awaitable[_T]], *, transfer: bool = False) -> _T:
        """Awaits an SDK call that is safe to repeat, with retries; a file transfer has a longer timeout."""
        return await retried(lambda: self.client.send(call, transfer=transfer))

    @abc.abstractmethod
    async def poll(self, job: str) -> BatchState: ...

    @abc.abstractmethod
    async def cancel(self, job: str) -> None:
        """Asks the provider to cancel the job, unless it has ended; `poll` reports the end."""

    async def close(self) -> None:
        await self.client.close()

    def _accepted_line(self, request: Request) -> Mapping[str, Any]:
        line = dict(self.line(request))
        place = "body" if "body" in line else "request"  # OpenAI's name, and Google's
        return line | {place: parameters.without(line[place], self.left_out)}

    @abc.abstractmethod
    def line(self, request: Request) -> Mapping[str, Any]:
        """Returns the line of a job's file for a request."""

    @abc.abstractmethod
    async def upload(self, text: bytes, *, name: str) -> str:
        """Uploads a job's file and returns the provider's name of it."""

    @abc.abstractmethod
    async def create(self, source: str, first: Request, *, name: str) -> str:
        """Creates a job from an uploaded file and its first request; sent once."""

    @abc.abstractmethod
    async def files(self, job: str) -> list[str]:
        """Returns the names of the answer files of a job that has ended."""

    @abc.abstractmethod
    async def download(self, file: str) -> bytes:
        """Returns a file of answers. Raises Gone if the provider no longer has it."""

    @abc.abstractmethod
    def listed(self) -> AsyncIterator[tuple[str, str | None]]:
        """Yields (the provider's name, our name) of all jobs, latest first."""

    @staticmethod
    @abc.abstractmethod
    def key_of(line: Mapping[str, Any]) -> str:
        """Returns the request key in a line of answers."""

    @staticmethod
    @abc.abstractmethod
    def reply_of(line: Mapping[str, Any]) -> Reply:
        """Reads a line of answers. Raises Fatal, Again or Failed if it has no reply."""


def state_of(word: str | None) -> str:
    """Returns the state that a provider's word means, in any case; the word itself if it is unknown.

    >>> state_of("JOB_STATE_SUCCEEDED"), state_of("Completed"), state_of("resting")
    ('done', 'done', 'resting')
    """
    plain = re.sub(r"^(job_state|batch_state)_|^state_", "", re.sub(r"[ -]", "_", (word or "").strip().lower()))
    return _STATES.get(plain, word or "no state")


def identifier(value: object, what: str) -> str:
    """Returns a provider's name of a thing. Raises Again for what is none (null, "", a number)."""
    if isinstance(value, str) and value.strip():
        return value
    raise Again(f"The provider gives {what} no name: {value!r}.")


def status_of(value: object) -> int | None:
    """Reads a status, a number or its text ("200", "200 OK"); None for anything else."""
    found = re.match(r"\s*(\d+)\b", str(value))
    return int(found[1]) if found and len(found[1]) < 6 else None


def lines_of(requests: Sequence[Request], line: Callable[[Request], Mapping[str, Any]]) -> bytes:
    """Encodes a job's file. ValueError if the requests do not fit into one job."""
    if not requests or len(requests) > MOST_REQUESTS:
        raise ValueError(f"A batch of {len(requests)} requests; expected 1 to {MOST_REQUESTS}.")
    if len({(request.model, request.form) for request in requests}) > 1:
        raise ValueError("The batch has requests for several models or of several forms; submit one batch for each.")
    if len({request.key for request in requests}) < len(requests):
        raise ValueError("The batch has one request twice, so their replies could not be distinguished; remove one.")
    text = "".join(f"{json.dumps(line(request))}\n" for request in requests).encode()
    if len(text) > MOST_BYTES:
        raise ValueError(
            f"A batch of {len(text):,} bytes; expected at most {MOST_BYTES:,}. Take fewer requests per batch."
        )
    return text


def answers(
    data: bytes, key_of: Callable[[Mapping[str, Any]], str], reply_of: Callable[[Mapping[str, Any]], Reply]
) -> Iterator[tuple[str, Reply | Problem]]:
    """Yields (key, answer) of each line that has a readable key, and skips all others."""
    for text in io.BytesIO(data):
        try:
            line = json.loads(text)
            key = key_of(line)
        except (KeyError, TypeError, ValueError, RecursionError):
            continue
        if isinstance(key, str) and _KEY.fullmatch(key):
            yield key, _outcome(reply_of, line)


def _outcome(reply_of: Callable[[Mapping[str, Any]], Reply], line: Mapping[str, Any]) -> Reply | Problem:
    try:
        return reply_of(line)
    except Problem as problem:
        return problem
    except (AttributeError, TypeError, KeyError, IndexError, ValueError, ArithmeticError):
        return Again("The line of answers has an unknown form.", lost=True)
