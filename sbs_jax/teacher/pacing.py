"""Limits of a run: money, requests in flight, requests and tokens per minute; and the wait before a retry."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sbs_jax.teacher import money
from sbs_jax.teacher.clients import Again, Reply, Request

# Seconds before the first retry, doubled with each retry, and their maximum.
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0
TRIES = 6  # calls by `retried`
_T = TypeVar("_T")


def backoff(retries: int, error: Again) -> float:
    """Returns the seconds to wait before a retry: the provider's request, else exponential back-off with jitter."""
    if error.retry_after is not None:
        return error.retry_after
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


@dataclasses.dataclass
class Usage:
    """Requests, tokens and cost of a run. `spent` is in USD, 0 if the price is unknown."""

    asked: int = 0  # requests sent
    input_tokens: int = 0
    output_tokens: int = 0
    spent: float = 0.0


def upper_bound(request: Request) -> tuple[int, int]:
    """Returns the highest expected numbers of tokens (sent, received) of a request, for reserving money."""
    return int(1.5 * money.estimate_tokens(request.prompt.sent(request.form))), request.parameters.max_tokens


class Budget:
    """Budget of a run: enforces `max_requests` and `max_cost` (USD), and books usage.

    A request that might exceed the cost waits for those in flight. `exhausted` names the limit that was reached.
    """

    def __init__(
        self,
        usage: Usage,
        *,
        model: str,
        price: money.Price | None,
        max_requests: int | None,
        max_cost: float | int | None,
    ) -> None:
        money.check_limit(max_cost, price, model=model)
        self._usage, self._price = usage, price
        self._max_requests, self._max_cost = max_requests, max_cost
        self._reserved = 0.0
        self._changed = asyncio.Event()
        self.exhausted: str | None = None

    def _cost(self, *, input_tokens: int, output_tokens: int) -> float:
        if self._price is None:
            return 0.0
        return money.cost(self._price, input_tokens=input_tokens, output_tokens=output_tokens, batch=False)

    async def reserve(self, request: Request) -> float | None:
        """Counts the request, reserves and returns its highest cost; None if a limit forbids sending it."""
        sent, got = upper_bound(request)
        amount = self._cost(input_tokens=sent, output_tokens=got)
        while True:
            if self._max_requests is not None and self._usage.asked >= self._max_requests:
                self.exhausted = f"max_requests {self._max_requests} reached"
                return None
            if self._max_cost is None or self._usage.spent + self._reserved + amount <= self._max_cost:
                self._reserved += amount
                self._usage.asked += 1
                return amount
            if self._reserved <= 1e-12:
                self.exhausted = f"max_cost ${self._max_cost:g} reached"
                return None
            self._changed.clear()
            await self._changed.wait()

    def settle(self, reserved: float, reply: Reply | None, *, estimated_input: int) -> None:
        """Releases a reservation and books the reply's tokens and cost."""
        self._reserved = max(0.0, self._reserved - reserved)
        if reply is not None:
            sent = reply.input_tokens if reply.input_tokens is not None else estimated_input
            got = reply.output_tokens if reply.output_tokens is not None else money.estimate_tokens(reply.text)
            self._usage.input_tokens += sent
            self._usage.output_tokens += got
            self._usage.spent += self._cost(input_tokens=sent, output_tokens=got)
        self._changed.set()
