"""Batches of rows of many requests: one thread owns the model and takes the waiting rows, fairly among the requests.

While a batch is computed the next one fills, so batches grow with the load: an idle server answers a single row after
`max_wait`, a busy one takes up to `max_batch` rows at a time.

The order is that of fair queueing (Demers, Keshav and Shenker 1989): rows are taken as if the model served all waiting
requests at once, a bit of each in turn. So a request of few rows does not wait for one of many, and neither waits
forever: after the batch in progress, a first row is taken with the first rows of the other requests.
"""

import asyncio
import dataclasses
import itertools
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from sbs_jax.prediction.engine import Answer, Question

log = logging.getLogger(__name__)

_NEWEST = 0.3  # weight of the newest batch in the moving average of seconds per row


class FullError(Exception):
    """Reports that the queue has no room for these rows; it should have after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class FailedError(Exception):
    """Reports that the model failed on the batch with this row."""


class ClosedError(Exception):
    """Reports that the server is stopping."""


@dataclasses.dataclass(eq=False, slots=True)
class _Waiting:
    question: Question
    answer: "asyncio.Future[Answer]"
    since: float
    request: object
    work: int  # in rows
    turn: float  # when the row would be done if all requests were served at once; in rows of work per request


@dataclasses.dataclass
class Counts:
    """Counts the work since the start."""

    answered: int = 0  # rows
    failed: int = 0  # rows of batches on which the model failed
    dropped: int = 0  # rows whose client left or timed out before they were computed
    batches: int = 0
    seconds: float = 0.0  # of the model computing


class Batcher:
    """Queues rows and answers them on a thread of its own, a batch at a time, by `answer`.

    Only `answer` runs on the thread; everything else runs on the event loop that called `start`.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Sequence[Answer]],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        work: Callable[[Question], int] = lambda _: 1,
    ) -> None:
        """Takes a function that answers rows, and one that returns a row's work, of which a batch takes `max_batch`."""
        self._answer, self._max_batch, self._max_wait, self._max_queue = answer, max_batch, max_wait, max_queue
        self._work_of = work
        self._queue: dict[_Waiting, None] = {}  # in the order of their arrival
        self._queued_work = 0
        self._turn = 0.0  # of a request whose rows all were taken in their turn so far
        self._changed = threading.Condition()
        self._closing = False
        self._began: float | None = None
        self._row_seconds = 0.0
        self._loop: asyncio.AbstractEventLoop
        self.computing = 0  # rows of the current batch
        self.counts = Counts()

    def start(self, *, ended: Callable[[BaseException | None], None] = lambda _: None) -> None:
        """Starts the thread. When it ends, `ended` gets the error, if any, on the loop."""
        self._loop = asyncio.get_running_loop()

        def work() -> None:
            error: BaseException | None = None
            try:
                self._work()
            except BaseException as raised:
                error = raised
            on_loop(self._loop, self._ended, error, ended)

        # A daemon, so that a second signal need not wait for the current batch.
        threading.Thread(target=work, daemon=True, name="model").start()

    @property
    def waiting(self) -> int:
        """Counts the rows in the queue."""
        return len(self._queue)

    @property
    def busy_seconds(self) -> float:
        """Returns the age of the current batch in seconds; 0 if there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    async def ask(self, rows: Sequence[Question]) -> list[Answer]:
        """Returns the answers in order. When cancelled, rows that still wait are dropped.

        FullError if the queue has no room for all of them; FailedError if the model failed on one.
        """
        request, now = object(), time.monotonic()
        work = [self._work_of(row) for row in rows]
        with self._changed:
            if self._closing:
                raise ClosedError
            free = self._max_queue - len(self._queue)
            if len(rows) > free:
                raise FullError(
                    f"{len(self._queue)} rows wait and {self._max_queue} can: no room for {len(rows)} more.",
                    retry_after=self._retry_after(),
                )
            turns = [self._turn + done for done in itertools.accumulate(work)]
            waiting = [
                _Waiting(row, self._loop.create_future(), now, request, its_work, turn)
                for row, its_work, turn in zip(rows, work, turns, strict=True)
            ]
            self._queue |= dict.fromkeys(waiting)
            self._queued_work += sum(work)
            self._changed.notify()
        try:
            return await asyncio.gather(*(each.answer for each in waiting))
        finally:
            self._drop([each for each in waiting if not each.answer.done() or each.answer.cancelled()])

    def close(self) -> None:
        """Accepts no more rows; the thread ends once the waiting ones are answered."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def _retry_after(self) -> int:
        return min(max(1, math.ceil(self._row_seconds * (len(self._queue) + self.computing))), 60)

    def _drop(self, rows: Sequence[_Waiting]) -> None:
        with self._changed:
            for each in rows:
                if each in self._queue:
                    self._leave(each)
                    self.counts.dropped += 1

    def _leave(self, row: _Waiting) -> None:
        del self._queue[row]
        self._queued_work -= row.work

    # ------------------------------------------------------------------------------------- on the thread

    def _work(self) -> None:
        while rows := self._next():
            self._began = began = time.monotonic()
            answers: Sequence[Answer] | Exception
            try:
                answers = self._answer([each.question for each in rows])
                if len(answers) != len(rows):
                    raise RuntimeError(f"{len(answers)} answers to {len(rows)} rows")
            except Exception as error:
                answers = error
                _log_failure(error, len(rows))
            self._began = None
            on_loop(self._loop, self._deliver, rows, answers, time.monotonic() - began)

    def _next(self) -> list[_Waiting]:
        """Waits for a first row and for more to fill its batch; returns [] when the thread must end."""
        with self._changed:
            self.computing = 0
            while not self._closing and self._queued_work < self._max_batch:
                wait = None
                if self._queue:
                    wait = next(iter(self._queue)).since + self._max_wait - time.monotonic()
                    if wait <= 0:
                        break
                self._changed.wait(wait)
            requests = len({each.request for each in self._queue})
            taken, work = [], 0
            for each in sorted(self._queue, key=lambda each: each.turn):
                work += each.work
                if taken and work > self._max_batch:
                    break
                taken.append(each)
                self._leave(each)
                self._turn += each.work / requests
            self.computing = len(taken)
            return taken

    # --------------------------------------------------------------------------------------- on the loop

    def _ended(self, error: BaseException | None, ended: Callable[[BaseException | None], None]) -> None:
        self.close()
        _fail(list(self._queue))
        ended(error)

    def _deliver(self, rows: Sequence[_Waiting], answers: Sequence[Answer] | Exception, seconds: float) -> None:
        counts = self.counts
        counts.batches += 1
        counts.seconds += seconds
        newest = seconds / len(rows)
        self._row_seconds += _NEWEST * (newest - self._row_seconds) if self._row_seconds else newest
        if isinstance(answers, Exception):
            counts.failed += len(rows)
            _fail(rows)
            return
        counts.answered += len(rows)
        for each, answer in zip(rows, answers, strict=True):
            if not each.answer.done():
                each.answer.set_result(answer)


def on_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    """Calls on a loop, from another thread; does nothing if the loop has ended."""
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:  # the loop is closed: no request waits
        log.debug("the event loop had ended")


def _fail(rows: Sequence[_Waiting]) -> None:
    for each in rows:
        if not each.answer.done():
            each.answer.set_exception(FailedError())


def _log_failure(error: Exception, count: int) -> None:
    """Logs the stack, and the text of errors of the runtime, which quotes no row."""
    import jax

    shown = isinstance(error, jax.errors.JaxRuntimeError | MemoryError)
    log.error("The model failed on a batch of %d rows: %s", count, trace(error, text=str(error) if shown else None))


def trace(error: BaseException, *, text: str | None = None) -> str:
    """Describes an error by its type and stack. Its text is left out unless given, since it may quote a request."""
    where = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__} ({'message hidden' if text is None else text}).\n{where}"
