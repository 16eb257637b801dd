"""The sampler: asks the teacher about every row as fast as its limits allow, and stores each reply.

Rows are read one at a time, so memory does not grow with their number. A fixed number of workers each take a row and
send the requests without a stored reply: `Settings.samples` samples, retries of truncated replies with more tokens, and
optionally a second request with the label as a hint. Limits of concurrency, rate and budget are in `pacing`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from sbs_jax.checks import choice, number, whole_number
from sbs_jax.data import parsing
from sbs_jax.data.summary import UNUSABLE
from sbs_jax.teacher import money
from sbs_jax.teacher.clients import CHAT, COMPLETION, Again, Client, Failed, Fatal, Parameters, Reply, Request
from sbs_jax.teacher.pacing import Budget, ConcurrencyLimit, RateLimit, Usage, backoff
from sbs_jax.teacher.prompts import Prompt
from sbs_jax.teacher.store import Failure, Store

LENGTH = parsing.CUT_SHORT
GAVE_UP = "gave_up"
# Factor of `max_tokens` at each retry of a truncated reply, and number of such retries.
ROOM_FACTOR, ROOM_STEPS = 2, 2
_CHUNK = 256  # rows whose keys are looked up together
_MOST_TURNS = 100  # refusals for speed (429) before a request is left for the next run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a sampling: requests and limits. None is no limit.

    Attributes:
      model: the provider's name of the teacher.
      form: "chat" or "completion".
      parameters: temperature, most tokens of a reply, stop strings.
      samples: replies per row; more than one needs a temperature above 0.
      hint: ask once more, with the human label as a hint, if the replies' label differs.
      concurrency: most requests in flight.
      requests_per_minute, tokens_per_minute: the provider's rate limits; tokens sent and received count.
      retries: retries of one request after temporary errors (429 does not count).
      max_requests, max_cost: limits of this run; cost in USD.
      unusable: share of replies without a readable label that ends the run (after 50 replies).
    """

    model: str
    form: str
    parameters: Parameters
    samples: int = 1
    hint: bool = False
    concurrency: int = 64
    requests_per_minute: float | int | None = None
    tokens_per_minute: float | int | None = None
    retries: int = 6
    max_requests: int | None = None
    max_cost: float | int | None = None
    unusable: float = UNUSABLE

    def __post_init__(self) -> None:
        choice("form", self.form, (CHAT, COMPLETION))
        whole_number("samples", self.samples, least=1)
        whole_number("concurrency", self.concurrency, least=1)
        for name in ("requests_per_minute", "tokens_per_minute", "max_requests", "max_cost"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), above=0.0)
        number("unusable", self.unusable, least=0, most=1)
        if self.samples > 1 and self.parameters.temperature == 0:
            raise ValueError(
                f"{self.samples} samples at temperature 0 would be one reply paid {self.samples} times; set a "
                "temperature (0.7 is usual), or one sample."
            )


@runtime_checkable
class Asked(Protocol):
    """Interface of a row for the sampler: its prompt, and the parser of its replies."""

    @property
    def id(self) -> str: ...

    @property
    def label(self) -> str | None: ...

    def prompt(self, *, hint: str | None) -> Prompt:
        """Renders the prompt; a second request has the label as a hint."""
        ...

    def read(self, text: str) -> tuple[str | None, str | None]:
        """Parses a reply into (rationale, label), None for a missing one."""
        ...

    def agrees(self, label: str) -> bool:
        """Returns whether a label is the human one."""
        ...


@dataclasses.dataclass
class Totals(Usage):
    """Counts of a run so far."""

    rows: int = 0
    found: int = 0  # accepted replies of earlier runs
    replies: int = 0  # stored in this run
    retried: int = 0
    failures: Counter[str] = dataclasses.field(default_factory=Counter)
    unusable: int = 0
    stopped: str | None = None  # why the run ended before its last row
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (id, reply) without a label


def request_of(row: Asked, settings: Settings, *, sample: int, room: int = 0, hint: str | None = None) -> Request:
    """Makes the request of a row; `room` 1 and 2 are the retries of a truncated reply, with more tokens."""
    parameters = settings.parameters
    if room:
        parameters = dataclasses.replace(parameters, max_tokens=parameters.max_tokens * ROOM_FACTOR**room)
    prompt = row.prompt(hint=hint)
    return Request(prompt=prompt, model=settings.model, parameters=parameters, form=settings.form, sample=sample)


def answer_of(
    row: Asked,
    settings: Settings,
    look_up: Callable[[str], Reply | Failure | None],
    *,
    sample: int,
    hint: str | None = None,
) -> Reply | Failure | Request:
    """Returns a sample's stored answer (the first reply that is not truncated), or the next request to send."""
    for room in range(ROOM_STEPS + 1):
        request = request_of(row, settings, sample=sample, room=room, hint=hint)
        stored = look_up(request.key)
        if stored is None:
            return request
        if isinstance(stored, Failure) or stored.finish != LENGTH:
            return stored
    return Failure(LENGTH, "")


def majority(labels: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
    """Returns the index of the first reply with the most frequent label; None if no reply has a label.

    `same` compares labels. Ties go to the label that came first.

    >>> majority([None, "no", "yes", "yes"], str.__eq__)
    2
    """
    known = [label for label in labels if label is not None]
    counts = [-1 if first is None else sum(same(first, label) for label in known) for first in labels]
    return counts.index(max(counts)) if known else None


def disputed(row: Asked, labels: Sequence[str | None]) -> bool:
    """Returns whether a row has a human label that differs from its replies' majority."""
    if row.label is None:
        return False
    chosen = majority(labels, lambda a, b: a == b)
    label = None if chosen is None else labels[chosen]
    return label is None or not row.agrees(label)


class UnusableRepliesError(ValueError):
    """No label can be read from too large a share of the replies."""


class Sampler:
    """One run over some rows. `totals` can be read while it runs."""

    def __init__(
        self,
        *,
        settings: Settings,
        client: Client,
        store: Store,
        price: money.Price | None,
        on_progress: Callable[[Totals], None] = lambda totals: None,
    ) -> None:
        self.totals = Totals()
        self._settings, self._client, self._store = settings, client, store
        self._on_progress = on_progress
        self._in_flight = ConcurrencyLimit(settings.concurrency)
        self._requests, self._tokens = RateLimit(settings.requests_per_minute), RateLimit(settings.tokens_per_minute)
        self._budget = Budget(
            self.totals,
            model=settings.model,
            price=price,
            max_requests=settings.max_requests,
            max_cost=settings.max_cost,
        )
        self._mean_output = settings.parameters.max_tokens / 2
        self._error: BaseException | None = None
        self._cancelled = False

    async def run(self, rows: Iterable[Asked]) -> Totals:
        """Runs until every row has its replies or a failure, or the run is ended; completes the requests in flight.

        Then raises `Fatal` (the teacher refuses us), `UnusableRepliesError`, or OSError (the disk) if one ended it.
        """
        todo = self._missing(rows)
        workers = [asyncio.create_task(self._work(todo)) for _ in range(self._settings.concurrency)]
        await asyncio.gather(*workers)
        if self._error is not None:
            raise self._error
        return self.totals

    def stop(self) -> None:
        """Sends nothing more; `run` ends when the requests in flight are answered."""
        self._stop("interrupted")

    def _stop(self, why: str) -> None:
        self._cancelled = True
        self.totals.stopped = self.totals.stopped or why

    def _done(self) -> bool:
        return self.totals.stopped is not None

    def _missing(self, rows: Iterable[Asked]) -> Iterator[Asked]:
        """Yields rows with missing replies, and counts the others."""
        rows, samples = iter(rows), range(self._settings.samples)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            keys = {row.id: [request_of(row, self._settings, sample=k).key for k in samples] for row in chunk}
            settled = self._store.settled([key for of_row in keys.values() for key in of_row], but=LENGTH)
            for row in chunk:
                if settled.issuperset(keys[row.id]) and not self._settings.hint:
                    self.totals.rows += 1
                    self.totals.found += len(keys[row.id])
                else:
                    yield row

    async def _work(self, rows: Iterator[Asked]) -> None:
        for row in rows:
            if self._done():
                return
            try:
                await self._row(row)
            except (Fatal, UnusableRepliesError, OSError) as error:
                self._error = self._error or error
                self._stop(str(error))
                return
            if not self._done():
                self.totals.rows += 1
            self._on_progress(self.totals)

    async def _row(self, row: Asked) -> None:
        replies = [await self._reply(row, sample=sample, hint=None) for sample in range(self._settings.samples)]
        if not self._settings.hint or self._done():
            return
        if disputed(row, [None if reply is None else row.read(reply.text)[1] for reply in replies]):
            await self._reply(row, sample=0, hint=row.label)

    async def _reply(self, row: Asked, *, sample: int, hint: str | None) -> Reply | None:
        """Returns the accepted reply of one sample, from the store or the teacher; None if there is none."""
        while True:
            answer = answer_of(row, self._settings, self._store.get, sample=sample, hint=hint)
            if isinstance(answer, Failure):
                self.totals.failures[answer.reason] += 1
                return None
            if isinstance(answer, Reply):
                self.totals.found += 1
                return answer
            reply = None if self._done() else await self._ask(answer)
            if reply is None:
                return None
            self._judge(row, reply)
            if reply.finish != LENGTH:
                return reply

    def _judge(self, row: Asked, reply: Reply) -> None:
        if reply.finish == LENGTH or row.read(reply.text)[1] is not None:
            return
        self.totals.unusable += 1
        if len(self.totals.examples) < 10:
            self.totals.examples.append((row.id, reply.text))
        count = self.totals.replies
        if count >= 50 and self.totals.unusable > self._settings.unusable * count:
            shown = "\n".join(f"  {row_id}: {text[:200]!r}" for row_id, text in self.totals.examples)
            raise UnusableRepliesError(
                f"No label can be read from {self.totals.unusable} of {count} replies (limit "
                f"{self._settings.unusable:.0%}, --unusable). They are stored; the first ones:\n{shown}\n"
                "Compare them with the prompt (--dry_run shows it) and with the parser of the dataset."
            )

    async def _ask(self, request: Request) -> Reply | None:
        """Asks until there is a reply, a failure, or no retry left. Replies and failures are on disk at return."""
        sent = money.estimate_tokens(request.prompt.sent(request.form))
        tries = turned = 0
        while True:
            async with self._in_flight:
                outcome, began = await self._send(request, sent)
                if isinstance(outcome, Reply):
                    await self._store.put(request.key, outcome)
                    self._came(outcome, sent)
                    return outcome
            if outcome is None:
                return None
            if isinstance(outcome, Fatal):
                raise outcome
            if isinstance(outcome, Failed):
                await self._store.put(request.key, Failure(outcome.reason, str(outcome)))
                self.totals.failures[outcome.reason] += 1
                return None
            self.totals.retried += 1
            delay = backoff(tries, outcome)
            if outcome.limited:
                # All requests pause, then fewer are in flight. The request is not at fault, so this costs no retry.
                self._in_flight.shrink(delay, since=began)
                turned += 1
                tries = min(tries + 1, 7)
                if turned <= _MOST_TURNS:
                    continue
            else:
                tries += 1
            if turned > _MOST_TURNS or tries > self._settings.retries:
                self.totals.failures[GAVE_UP] += 1  # not stored: the next run asks again
                return None
            await asyncio.sleep(delay)

    async def _send(self, request: Request, sent: int) -> tuple[Reply | Again | Failed | Fatal | None, float]:
        """Sends a request once, within budget and rate; returns (outcome, time of sending), None if the run ends."""
        if self._done():
            return None, 0.0
        reserved = await self._budget.reserve(request)
        if reserved is None:
            self.totals.stopped = self.totals.stopped or self._budget.exhausted
            return None, 0.0
        await self._requests.take(1)
        await self._tokens.take(sent + self._mean_output)
        reply, began = None, time.monotonic()
        try:
            if self._cancelled:  # unlike a reached limit, a stop also drops requests that were reserved before it
                self.totals.asked -= 1
                return None, began
            reply = await self._client.ask(request)
            return reply, began
        except (Again, Failed, Fatal) as problem:
            return problem, began
        finally:
            self._budget.settle(reserved, reply, estimated_input=sent)

    def _came(self, reply: Reply, sent: int) -> None:
        self._in_flight.grow()
        self.totals.replies += 1
        tokens = (reply.input_tokens or sent) + (reply.output_tokens or 0)
        self._tokens.correct(tokens - sent - self._mean_output)
        if reply.output_tokens is not None:
            self._mean_output += (reply.output_tokens - self._mean_output) / min(self.totals.replies, 100)
