"""Limits of a run: money, requests in flight, requests and tokens per minute; and the wait before a retry."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import math
import random
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sbs_jax.teacher import money
from sbs_jax.teacher.clients import Again, Problem, Reply, Request

log = logging.getLogger(__name__)

# Seconds before the first retry, doubled with each retry, and their maximum.
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0
LONGEST_PAUSE = 600.0  # the maximum where the provider asks for more: then it is asked again
TRIES = 6  # calls by `retried`
_T = TypeVar("_T")


def backoff(retries: int, error: Again) -> float:
    """Returns the seconds to wait before a retry: the provider's request, else exponential back-off with jitter."""
    if error.retry_after is not None:
        return min(LONGEST_PAUSE, error.retry_after)
    return min(LONGEST_DELAY, FIRST_DELAY * 2**retries) * random.uniform(0.5, 1.0)


async def retried(call: Callable[[], Awaitable[_T]]) -> _T:
    """Awaits `call`, at most `TRIES` times while it raises Again."""
    for retries in itertools.count():
        try:
            return await call()
        except Again as error:
            if retries == TRIES - 1:
                raise
            wait = backoff(retries, error)
            log.info("Asking again in %.0f s: %s", wait, error)
        await asyncio.sleep(wait)
    raise AssertionError


class ConcurrencyLimit:
    """Limit on requests in flight, as an async context manager.

    The limit halves when the teacher asks to slow down, and grows by one with every round of replies.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._resume_at = 0.0
        self._shrunk_at = -math.inf

    @property
    def limit(self) -> int:
        return max(1, int(self._limit))

    async def __aenter__(self) -> None:
        while True:
            pause = self._resume_at - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self._in_flight < self.limit:
                self._in_flight += 1
                return
            else:
                turn = asyncio.get_running_loop().create_future()
                self._waiting.append(turn)
                await turn

    async def __aexit__(self, *_: object) -> None:
        self._in_flight -= 1
        self._wake()

    def grow(self) -> None:
        """Counts a reply towards raising the limit."""
        if self._limit < self._most:
            self._limit = min(self._most, self._limit + 1 / self._limit)
            self._wake()

    def shrink(self, pause: float, *, since: float) -> None:
        """Halves the limit and starts no request for `pause` seconds.

        `since` is the time when the refused request was sent: of requests in flight together, only the first refusal
        halves the limit.
        """
        now = time.monotonic()
        self._resume_at = max(self._resume_at, now + pause)
        if since > self._shrunk_at:
            self._limit = max(1.0, self._limit / 2)
            self._shrunk_at = now

    def _wake(self) -> None:
        free = self.limit - self._in_flight
        while self._waiting and free > 0:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1


class RateLimit:
    """Limiter that spreads requests or tokens evenly over each minute; None is no limit."""

    def __init__(self, per_minute: float | int | None) -> None:
        self._seconds = 0.0 if per_minute is None else 60.0 / per_minute
        self._next = 0.0

    async def take(self, amount: float | int) -> None:
        """Waits until `amount` is within the limit."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + amount * self._seconds
        if start > now:
            await asyncio.sleep(start - now)

    def correct(self, amount: float | int) -> None:
        """Charges the difference between actual and estimated amount."""
        self._next += amount * self._seconds


class Reasons(Counter[str]):
    """Counts reasons by the first text of each kind: ids, numbers and quoted bodies do not distinguish them."""

    def add(self, why: str) -> None:
        kind = re.split(r"[\d{'\"]", why)[0]
        self[next((known for known in self if known.startswith(kind)), why)] += 1


@dataclasses.dataclass
class Usage:
    """Requests, tokens and cost of a run. `spent` is in USD, 0 if the price is unknown.

    `presumed` is the part of `spent` for requests without an answer: what they may have cost at most.
    """

    asked: int = 0  # requests sent
    input_tokens: int = 0
    output_tokens: int = 0
    spent: float = 0.0
    presumed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Reservation:
    """The highest expected cost of a request, and what it is estimated from: tokens sent, most tokens of the reply."""

    cost: float
    sent: int
    room: int


class Budget:
    """Budget of a run: enforces `max_requests` and `max_cost` (USD), and books usage.

    A request is estimated by the worst of what was observed before: tokens billed per estimated token sent, and per
    token of `max_tokens`, which thinking may exceed. So that there is something to observe, a limited run begins with
    one request and has one more in flight with each reply. A request that might exceed the cost waits for those in
    flight. `exhausted` names the limit that was reached.
    """

    def __init__(
        self,
        usage: Usage,
        *,
        model: str,
        price: money.Price | None,
        max_requests: int | None,
        max_cost: float | int | None,
        batch: bool = False,
    ) -> None:
        money.check_limit(max_cost, price, model=model)
        self._usage, self._price, self._batch = usage, price, batch
        self._max_requests, self._max_cost = max_requests, max_cost
        self._sent_ratio, self._received_ratio = 1.5, 1.0
        self.observed = 0
        self.in_flight, self.reserved = 0, 0.0  # requests, USD
        self._changed = asyncio.Event()
        self.exhausted: str | None = None

    def _cost(self, *, input_tokens: int, output_tokens: int) -> float:
        if self._price is None:
            return 0.0
        return money.cost(self._price, input_tokens=input_tokens, output_tokens=output_tokens, batch=self._batch)

    def estimate(self, request: Request) -> Reservation:
        """Estimates the highest cost of a request."""
        sent, room = money.estimate_tokens(request.prompt.sent(request.form)), request.parameters.max_tokens
        most = math.ceil(self._sent_ratio * sent), math.ceil(self._received_ratio * room)
        return Reservation(self._cost(input_tokens=most[0], output_tokens=most[1]), sent, room)

    async def reserve(self, request: Request) -> Reservation | None:
        """Counts the request and reserves its highest cost; None if a limit forbids sending it."""
        while True:
            reserved = self.estimate(request)
            if self._max_requests is not None and self._usage.asked >= self._max_requests:
                self.exhausted = f"max_requests {self._max_requests} reached"
                return None
            fits = self._max_cost is None or self._usage.spent + self.reserved + reserved.cost <= self._max_cost
            if fits and (self._max_cost is None or self.in_flight <= self.observed):
                self.reserved += reserved.cost
                self.in_flight += 1
                self._usage.asked += 1
                return reserved
            if not self.in_flight:
                self.exhausted = (
                    f"max_cost ${self._max_cost:g} reached (${self._usage.spent:.4f} spent, and the next request may "
                    f"cost ${reserved.cost:.4f})"
                )
                return None
            self._changed.clear()
            await self._changed.wait()

    def cancel(self, reserved: Reservation) -> None:
        """Releases the reservation of a request that was not sent."""
        self._usage.asked -= 1
        self._release(reserved)

    def settle(self, reserved: Reservation, outcome: Reply | Problem | None) -> None:
        """Releases a reservation and books what the request has cost; None is a request that was dropped in flight."""
        self._release(reserved)
        self.book(reserved, outcome)

    def book(self, estimate: Reservation, outcome: Reply | Problem | None) -> None:
        """Books the provider's count of tokens, an estimate where it gives none, or the most if no answer arrived."""
        if isinstance(outcome, Reply):
            billed = outcome.input_tokens, outcome.output_tokens
        elif outcome is not None and (outcome.billed is not None or not outcome.lost):
            billed = outcome.billed or (0, 0)
        else:
            self._usage.spent += estimate.cost
            self._usage.presumed += estimate.cost
            return
        sent, got = billed
        if got is None:
            got = money.estimate_tokens(outcome.text) if isinstance(outcome, Reply) else estimate.room
        sent = estimate.sent if sent is None else sent
        self.observe(estimate, sent=sent, received=got)
        self._usage.input_tokens += sent
        self._usage.output_tokens += got
        self._usage.spent += self._cost(input_tokens=sent, output_tokens=got)

    def observe(self, estimate: Reservation, *, sent: int, received: int) -> None:
        """Raises later estimates to what a request of this estimate has been billed."""
        self._sent_ratio = max(self._sent_ratio, sent / max(1, estimate.sent))
        self._received_ratio = max(self._received_ratio, received / max(1, estimate.room))
        self.observed += 1

    def _release(self, reserved: Reservation) -> None:
        self.in_flight -= 1
        self.reserved = self.reserved - reserved.cost if self.in_flight else 0.0
        self._changed.set()
