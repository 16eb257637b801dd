"""The sampler: asks the teacher about every row as fast as its limits allow, and stores each reply.

Rows are read one at a time, so memory does not grow with their number. A fixed number of workers each take a row and
send the requests without a stored reply: `Settings.samples` samples, retries of truncated replies with more tokens, and
optionally a second request with the label as a hint. Limits of concurrency, rate and budget are in `pacing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from sbs_jax.checks import choice, number, whole_number
from sbs_jax.data import parsing
from sbs_jax.data.summary import UNUSABLE
from sbs_jax.teacher import money
from sbs_jax.teacher.clients import (
    CHAT,
    COMPLETION,
    REFUSED,
    TOO_LONG,
    Again,
    Client,
    Failed,
    Fatal,
    Parameters,
    Problem,
    Refused,
    Reply,
    Request,
)
from sbs_jax.teacher.pacing import LONGEST_DELAY, Budget, ConcurrencyLimit, RateLimit, Reasons, Usage, backoff
from sbs_jax.teacher.prompts import Prompt
from sbs_jax.teacher.store import Failure, Store

log = logging.getLogger(__name__)

LENGTH = parsing.CUT_SHORT
GAVE_UP = "gave_up"
# Factor of `max_tokens` at each retry of a truncated reply, and number of such retries.
ROOM_FACTOR, ROOM_STEPS = 2, 2
_CHUNK = 256  # rows whose keys are looked up together
_MOST_TURNS = 100  # refusals for speed (429) before a request is left for the next run
# So many first rows refused, or requests given up one after the other, are no fault of single rows.
HOPELESS = 10
_OUTAGE = 1800.0  # seconds without a reply after which such requests end a run that had replies before
QUIET = 5.0  # seconds without a reply after which the run says what it waits for
# What a worker does: it may be ended while it waits, by `stop` also with a reservation, never while it asks.
_WAITS, _RESERVED, _ASKS = range(3)


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
    given_up: Reasons = dataclasses.field(default_factory=Reasons)  # why, in the provider's words
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
        if isinstance(stored, Failure) and room and stored.reason in (REFUSED, TOO_LONG):
            break  # the teacher has no more room
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
        self._error: Exception | None = None
        self._states: dict[asyncio.Task[None], int] = {}
        self._refused: dict[str, tuple[str, Failure]] = {}  # request key -> (row id, ..), until another is answered
        self._replied, self._suspended = False, 0  # any reply has come; workers in `_verdict`
        self._in_a_row = 0  # requests given up since the last reply
        self._replied_at = time.monotonic()
        self._trouble = ""

    async def run(self, rows: Iterable[Asked]) -> Totals:
        """Runs until every row has its replies or a failure, or the run is ended; completes the requests in flight.

        Then raises `Fatal` (the teacher refuses us), `UnusableRepliesError`, or OSError (the disk) if one ended it.
        """
        todo = self._missing(rows)
        self._replied_at = time.monotonic()
        workers = [asyncio.create_task(self._work(todo)) for _ in range(self._settings.concurrency)]
        self._states = dict.fromkeys(workers, _WAITS)
        reporter = asyncio.create_task(self._report())
        try:
            for ended in await asyncio.gather(*workers, return_exceptions=True):
                if isinstance(ended, BaseException) and not isinstance(ended, asyncio.CancelledError):
                    raise ended
        finally:
            reporter.cancel()
        if self._error is None:
            await self._judge_refusals()
        if self._error is not None:
            raise self._error
        return self.totals

    def stop(self) -> None:
        """Sends nothing more and ends all waiting; `run` ends when the requests in flight are answered."""
        self._end("interrupted")

    @property
    def in_flight(self) -> tuple[int, float]:
        """Returns the number of requests in flight and what they may cost, in USD."""
        return self._budget.in_flight, self._budget.reserved

    def _end(self, why: str, *, below: int = _ASKS) -> None:
        self.totals.stopped = self.totals.stopped or why
        here = asyncio.current_task()
        for worker, state in self._states.items():
            if state < below and worker is not here:
                worker.cancel()

    async def _report(self) -> None:
        """Logs what the run waits for while no reply comes: after 5 seconds, then after twice as long each time."""
        said = 0.0
        while True:
            await asyncio.sleep(QUIET / 5)
            quiet = time.monotonic() - self._replied_at
            said = 0.0 if quiet < QUIET else said
            if quiet >= max(QUIET, min(2 * said, said + LONGEST_DELAY)):
                said = quiet
                states = Counter(state for worker, state in self._states.items() if not worker.done())
                log.warning(
                    "No reply for %.0f s: %d requests at the teacher, %d waiting, %d held by the rate limits.%s",
                    *(quiet, states[_ASKS], states[_WAITS], states[_RESERVED]),
                    self._trouble and f" {self._trouble}",
                )

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
        try:
            for row in rows:
                if self._done():
                    return
                await self._row(row)
                if not self._done():
                    self.totals.rows += 1
                self._on_progress(self.totals)
        except asyncio.CancelledError:
            if not self._done():
                raise
        except Exception as error:  # also of `rows`, which reads the store
            self._error = self._error or error
            self._end(str(error))

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
            reply = None if self._done() else await self._ask(answer, row)
            if reply is None:
                return None
            if isinstance(reply, Failure):
                continue
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

    async def _ask(self, request: Request, row: Asked) -> Reply | Failure | None:
        """Asks until there is a reply, a failure, or no retry left. Replies and failures are on disk at return."""
        sent = money.estimate_tokens(request.prompt.sent(request.form))
        tries = turned = 0
        while True:
            with self._state():
                async with self._in_flight:
                    outcome, began = await self._send(request, sent)
                    if isinstance(outcome, Reply):
                        self._replied = True
                        await self._store.put(request.key, outcome)
                        self._came(outcome, sent)
                        await self._judge_refusals()
                        return outcome
                if isinstance(outcome, Failed):
                    return await self._failed(request, row, outcome)
            if outcome is None:
                return None
            if not isinstance(outcome, Again):
                raise outcome
            if self._done():
                return None
            self.totals.retried += 1
            delay = backoff(tries, outcome)
            self._trouble = f"{outcome} Asking again in {delay:.0f} s."
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
                self._give_up(str(outcome))
                return None
            await asyncio.sleep(delay)

    @contextlib.contextmanager
    def _state(self) -> Iterator[None]:
        """Lets the worker be ended again after a request, its reply stored."""
        try:
            yield
        finally:
            self._now(_WAITS)

    def _now(self, state: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._states[task] = state

    def _give_up(self, why: str) -> None:
        """Counts a request that the next run asks again: nothing is stored."""
        self.totals.failures[GAVE_UP] += 1
        self.totals.given_up.add(why)
        self._in_a_row += 1
        answered = self.totals.replies and time.monotonic() - self._replied_at < _OUTAGE
        if self._in_a_row >= HOPELESS and not answered:
            self._end(f"{self._in_a_row} requests one after the other were given up")

    async def _failed(self, request: Request, row: Asked, failed: Failed) -> Failure | None:
        """Stores a failure, or holds a refusal back until another request is answered."""
        failure = Failure(failed.reason, str(failed))
        more_room = request.parameters.max_tokens > self._settings.parameters.max_tokens
        if isinstance(failed, Refused) and not more_room and self._doubtful(failed):
            self._refused[request.key] = row.id, failure
            if len({row_id for row_id, _ in self._refused.values()}) >= HOPELESS:
                await self._verdict(request.key, failed)
            return None
        await self._store.put(request.key, failure)
        return failure

    async def _verdict(self, key: str, failed: Failed) -> None:
        """Waits until another request is answered. Raises Fatal if no worker is left that could be: all wait here."""
        self._now(_WAITS)
        self._suspended += 1
        try:
            while key in self._refused:
                if self._suspended == sum(not worker.done() for worker in self._states):
                    raise Fatal(f"{failed} {HOPELESS} rows were refused in a row, so the rows are not at fault.")
                await asyncio.sleep(0.02)
        finally:
            self._suspended -= 1

    def _doubtful(self, refused: Refused) -> bool:
        # Permissions may also be lost in the middle of a run.
        return not self._answered() or (refused.status == 403 and refused.reason == REFUSED)

    def _answered(self) -> bool:
        return self._replied or self.totals.found > 0

    async def _judge_refusals(self) -> None:
        """Records the refusals held back: another row is answered, or the provider's words are about the row."""
        if not self._refused or not (self._answered() or self.totals.stopped is None):
            return
        held, self._refused = self._refused, {}
        unexplained = next((failure for _, failure in held.values() if failure.reason == REFUSED), None)
        if unexplained is not None and not self._answered():
            self._error = Fatal(f"{unexplained.detail} No row was answered, so the rows are not at fault.")
            return
        for key, (_, failure) in held.items():
            await self._store.put(key, failure)
            self.totals.failures[failure.reason] += 1

    async def _send(self, request: Request, sent: int) -> tuple[Reply | Problem | None, float]:
        """Sends a request once, within budget and rate; returns (outcome, time of sending), None if the run ends."""
        if self._done():
            return None, 0.0
        reserved = await self._budget.reserve(request)
        if reserved is None:
            self._end(self._budget.exhausted or "", below=_RESERVED)
            return None, 0.0
        self._now(_RESERVED)
        try:
            await self._requests.take(1)
            await self._tokens.take(sent + self._mean_output)
        except asyncio.CancelledError:
            self._budget.cancel(reserved)
            raise
        outcome, began = None, time.monotonic()
        self._now(_ASKS)
        try:
            outcome = await self._client.ask(request)
        except Problem as problem:
            outcome = problem
        finally:
            self._budget.settle(reserved, outcome)
        return outcome, began

    def _came(self, reply: Reply, sent: int) -> None:
        self._in_flight.grow()
        self.totals.replies += 1
        self._replied_at, self._in_a_row, self._trouble = time.monotonic(), 0, ""
        tokens = (reply.input_tokens or sent) + (reply.output_tokens or 0)
        self._tokens.correct(tokens - sent - self._mean_output)
        if reply.output_tokens is not None:
            self._mean_output += (reply.output_tokens - self._mean_output) / min(self.totals.replies, 100)
