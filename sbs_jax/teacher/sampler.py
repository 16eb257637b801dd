"""Asks the teacher about every row, as fast as it lets us, and keeps each reply.

Rows come one at a time, so their number does not matter. A fixed number of workers each take a row, ask what is not
stored yet (`Settings.samples` replies, more room where a reply was cut short, a second ask with the label as a hint
where that is wanted), and go on. Three things hold them back: the places in flight, which shrink when the teacher says
that it is asked too much and grow again while it does not; requests and tokens per minute; and what may be spent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from sbs_jax.data import parsing
from sbs_jax.teacher import money
from sbs_jax.teacher.clients import Again, Client, Failed, Fatal, Parameters, Reply, Request
from sbs_jax.teacher.prompts import Prompt
from sbs_jax.teacher.store import Failure, Store

LENGTH = parsing.CUT_SHORT
GAVE_UP = "gave_up"
# A reply that was cut short is asked again with this many times the room, this often.
ROOM_FACTOR, ROOM_STEPS = 2, 2
# Rows whose keys are looked up together.
_CHUNK = 256
# Seconds before an ask is repeated: the first time, and at most.
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 60.0
# A request that was told to wait this often is left for the next run.
_MOST_TURNS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked, and how fast. `None` is no limit.

    Attributes:
      model: the provider's name of the teacher.
      form: "chat" or "completion".
      parameters: temperature, room for a reply, stop strings.
      samples: replies per row; more than one needs a temperature above 0.
      hint: ask once more, with the human's label as a hint, where the replies' label is another one.
      concurrency: requests in flight at most.
      requests_per_minute, tokens_per_minute: the provider's limits; tokens are those sent and received.
      retries: asks of one request after errors that pass (429 does not count as one).
      max_requests, max_cost: nothing is asked beyond these; in USD.
      unusable: share of replies that no label can be read from at which the run stops (after 50 replies).
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
    unusable: float = 0.3

    def __post_init__(self) -> None:
        if self.form not in ("chat", "completion"):
            raise ValueError(f"The form is {self.form!r}; expected chat or completion.")
        for name in ("samples", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.samples > 1 and self.parameters.temperature == 0:
            raise ValueError(
                f"{self.samples} samples at temperature 0 would be one reply paid {self.samples} times; set a "
                "temperature (0.7 is usual), or one sample."
            )
        for name in ("requests_per_minute", "tokens_per_minute", "max_requests", "max_cost"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; expected more than 0, or nothing for no limit.")


@runtime_checkable
class Asked(Protocol):
    """A row as the sampler sees it: prompts, and what a reply says."""

    @property
    def id(self) -> str: ...

    @property
    def label(self) -> str | None: ...

    def prompt(self, *, hint: str | None) -> Prompt:
        """What is asked; with the label as a hint in a second ask."""
        ...

    def read(self, text: str) -> tuple[str | None, str | None]:
        """(rationale, label) of a reply, None where there is none."""
        ...

    def agrees(self, label: str) -> bool:
        """Whether a label is the human's."""
        ...


@dataclasses.dataclass
class Totals:
    """What a run has done so far. `spent` is in USD, 0 where the price is not known."""

    rows: int = 0
    found: int = 0  # replies that were in the store
    asked: int = 0  # requests sent
    replies: int = 0  # stored in this run
    retried: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    spent: float = 0.0
    failures: Counter[str] = dataclasses.field(default_factory=Counter)
    unusable: int = 0
    stopped: str | None = None  # why the run ended before its last row
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # ids and replies nothing was read from


def request_of(row: Asked, settings: Settings, *, sample: int, room: int = 0, hint: str | None = None) -> Request:
    """The request of a row: `room` 1 is the first repetition with more room, 2 the second."""
    parameters = settings.parameters
    if room:
        parameters = dataclasses.replace(parameters, max_tokens=parameters.max_tokens * ROOM_FACTOR**room)
    prompt = row.prompt(hint=hint)
    return Request(prompt=prompt, model=settings.model, parameters=parameters, form=settings.form, sample=sample)


def majority(labels: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
    """The index of the first reply with the label that most replies have; None where none has one.

    Labels count as one where `same` says so. Of equally frequent ones the one that came first wins.

    >>> majority([None, "no", "yes", "yes"], str.__eq__)
    2
    """
    groups: list[list[int]] = []
    for index, label in enumerate(labels):
        if label is None:
            continue
        for group in groups:
            first = labels[group[0]]
            if first is not None and same(first, label):
                group.append(index)
                break
        else:
            groups.append([index])
    return max(groups, key=len)[0] if groups else None


def disputed(row: Asked, labels: Sequence[str | None]) -> bool:
    """Whether the human's label is known, and is not what most of a row's replies say."""
    if row.label is None:
        return False
    chosen = majority(labels, lambda a, b: a == b)
    label = None if chosen is None else labels[chosen]
    return label is None or not row.agrees(label)


class _Places:
    """Places in flight: halved when the teacher is asked too much, and then one more with every round of replies."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._resume_at = 0.0
        self._shrunk_at = -math.inf

    @property
    def limit(self) -> int:
        return max(1, int(self._limit))

    async def take(self) -> None:
        while True:
            pause = self._resume_at - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self._taken < self.limit:
                self._taken += 1
                return
            else:
                place = asyncio.get_running_loop().create_future()
                self._waiting.append(place)
                await place

    def give_back(self) -> None:
        self._taken -= 1
        self._wake()

    def grow(self) -> None:
        if self._limit < self._most:
            self._limit = min(self._most, self._limit + 1 / self._limit)
            self._wake()

    def shrink(self, pause: float, *, since: float) -> None:
        """Half the places, and nobody asks for `pause` seconds.

        `since` is when the request set out that was turned away: of those in flight together, the first halves, and the
        others have nothing to add.
        """
        now = time.monotonic()
        self._resume_at = max(self._resume_at, now + pause)
        if since > self._shrunk_at:
            self._limit = max(1.0, self._limit / 2)
            self._shrunk_at = now

    def _wake(self) -> None:
        free = self.limit - self._taken
        while self._waiting and free > 0:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1


class _Pace:
    """So many per minute, evenly; `correct` charges what an estimate missed."""

    def __init__(self, per_minute: float | int | None) -> None:
        self._seconds = None if per_minute is None else 60.0 / per_minute
        self._next = 0.0

    async def take(self, amount: float | int) -> None:
        if self._seconds is None:
            return
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + amount * self._seconds
        if start > now:
            await asyncio.sleep(start - now)

    def correct(self, amount: float | int) -> None:
        if self._seconds is not None:
            self._next += amount * self._seconds


class _Purse:
    """What may be asked and spent. A request that might exceed it waits for those in flight, and then ends the run."""

    def __init__(self, settings: Settings, price: money.Price | None, totals: Totals) -> None:
        if settings.max_cost is not None and price is None:
            raise ValueError(
                f"The price of {settings.model!r} is not known, so max_cost cannot be kept; give it in USD per million "
                "tokens, --price IN,OUT, or set --max_requests."
            )
        self._settings, self._price, self._totals = settings, price, totals
        self._reserved = 0.0
        self._changed = asyncio.Event()

    async def reserve(self, *, input_tokens: int, output_tokens: int) -> float | None:
        """Counts the request, and sets aside what it may cost at most; None where it may not be sent."""
        amount = 0.0
        if self._price is not None:
            amount = money.cost(self._price, input_tokens=input_tokens, output_tokens=output_tokens, batch=False)
        while True:
            if self._settings.max_requests is not None and self._totals.asked >= self._settings.max_requests:
                self._totals.stopped = self._totals.stopped or f"max_requests {self._settings.max_requests} reached"
                return None
            limit = self._settings.max_cost
            if limit is None or self._totals.spent + self._reserved + amount <= limit:
                self._reserved += amount
                self._totals.asked += 1
                return amount
            if self._reserved <= 1e-12:
                self._totals.stopped = self._totals.stopped or f"max_cost ${limit:g} reached"
                return None
            self._changed.clear()
            await self._changed.wait()

    def settle(self, reserved: float, reply: Reply | None, *, input_tokens: int) -> None:
        """Puts back what was set aside, and takes what the reply has cost."""
        self._reserved = max(0.0, self._reserved - reserved)
        if reply is not None:
            sent = reply.input_tokens if reply.input_tokens is not None else input_tokens
            got = reply.output_tokens if reply.output_tokens is not None else money.estimate_tokens(reply.text)
            self._totals.input_tokens += sent
            self._totals.output_tokens += got
            if self._price is not None:
                self._totals.spent += money.cost(self._price, input_tokens=sent, output_tokens=got, batch=False)
        self._changed.set()


class UnusableRepliesError(ValueError):
    """Too large a share of the replies has no label that can be read."""


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
        self._places = _Places(settings.concurrency)
        self._requests, self._tokens = _Pace(settings.requests_per_minute), _Pace(settings.tokens_per_minute)
        self._purse = _Purse(settings, price, self.totals)
        self._mean_output = settings.parameters.max_tokens / 2
        self._error: BaseException | None = None
        self._cancelled = False

    async def run(self, rows: Iterable[Asked]) -> Totals:
        """Until every row has its replies or a reason, or something ends the run; what is in flight is kept.

        Raises `Fatal` (the teacher refuses us), `UnusableRepliesError`, or OSError (the disk) after that.
        """
        todo = self._missing(rows)
        workers = [asyncio.create_task(self._work(todo)) for _ in range(self._settings.concurrency)]
        await asyncio.gather(*workers)
        if self._error is not None:
            raise self._error
        return self.totals

    def stop(self) -> None:
        """Asks nothing more; `run` ends when what is in flight has come."""
        self._stop("interrupted")

    def _stop(self, why: str) -> None:
        self._cancelled = True
        if not self._done():
            self.totals.stopped = why

    def _done(self) -> bool:
        return self.totals.stopped is not None

    def _missing(self, rows: Iterable[Asked]) -> Iterator[Asked]:
        """Rows that something has to be asked about; the others are counted."""
        chunk: list[Asked] = []
        for row in rows:
            chunk.append(row)
            if len(chunk) == _CHUNK:
                yield from self._not_stored(chunk)
                chunk = []
        yield from self._not_stored(chunk)

    def _not_stored(self, rows: list[Asked]) -> Iterator[Asked]:
        samples = range(self._settings.samples)
        keys = {row.id: [request_of(row, self._settings, sample=k).key for k in samples] for row in rows}
        settled = self._store.settled([key for of_row in keys.values() for key in of_row], but=LENGTH)
        for row in rows:
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
        """The accepted reply of one sample, stored before or asked for now; None where there is none."""
        for room in range(ROOM_STEPS + 1):
            request = request_of(row, self._settings, sample=sample, room=room, hint=hint)
            key = request.key
            stored = self._store.get(key)
            if isinstance(stored, Failure):
                self.totals.failures[stored.reason] += 1
                return None
            if stored is None:
                if self._done():
                    return None
                stored = await self._ask(request, key)
                if stored is None:
                    return None
                self._judge(row, stored)
            else:
                self.totals.found += 1
            if stored.finish != LENGTH:
                return stored
        self.totals.failures[LENGTH] += 1
        return None

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
                f"{self._settings.unusable:.0%}, --unusable). They are kept. The first ones:\n{shown}\n"
                "Compare them with the prompt (--dry_run shows it) and with the parser of the dataset."
            )

    async def _ask(self, request: Request, key: str) -> Reply | None:
        """One request, repeated while its errors pass; the reply is on disk when this returns."""
        sent = money.estimate_tokens(request.prompt.sent(request.form))
        tries = turned = 0
        while True:
            await self._places.take()
            try:
                if self._done():
                    return None
                reserved = await self._purse.reserve(
                    input_tokens=int(1.5 * sent), output_tokens=request.parameters.max_tokens
                )
                if reserved is None:
                    return None
                await self._requests.take(1)
                await self._tokens.take(sent + self._mean_output)
                if self._cancelled:  # a limit that was reached stops those after this one
                    self.totals.asked -= 1
                    self._purse.settle(reserved, None, input_tokens=sent)
                    return None
                reply, error = None, None
                begin = time.monotonic()
                try:
                    reply = await self._client.ask(request)
                except (Again, Failed, Fatal) as problem:
                    error = problem
                finally:
                    self._purse.settle(reserved, reply, input_tokens=sent)
                if reply is not None:
                    await self._store.put(key, reply)
                    self._came(reply, sent)
                    return reply
            finally:
                self._places.give_back()
            if isinstance(error, Fatal):
                raise error
            if isinstance(error, Failed):
                await self._store.put(key, Failure(error.reason, str(error)))
                self.totals.failures[error.reason] += 1
                return None
            assert isinstance(error, Again)
            self.totals.retried += 1
            delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**tries) * random.uniform(0.5, 1.0)
            if error.limited:
                # Told to be slower: nobody asks for a while, and then fewer do. Not this request's fault.
                self._places.shrink(error.retry_after if error.retry_after is not None else delay, since=begin)
                turned += 1
                tries = min(tries + 1, 7)
                if turned <= _MOST_TURNS:
                    continue
            else:
                tries += 1
            if turned > _MOST_TURNS or tries > self._settings.retries:
                # Not stored: the next run tries again.
                self.totals.failures[GAVE_UP] += 1
                return None
            await asyncio.sleep(error.retry_after if error.retry_after is not None else delay)

    def _came(self, reply: Reply, sent: int) -> None:
        self._places.grow()
        self.totals.replies += 1
        tokens = (reply.input_tokens or sent) + (reply.output_tokens or 0)
        self._tokens.correct(tokens - sent - self._mean_output)
        if reply.output_tokens is not None:
            self._mean_output += (reply.output_tokens - self._mean_output) / min(self.totals.replies, 100)
