"""Rows of many requests, answered together: one thread owns the model, and takes what waits.

While a batch is computed the next one fills up, so that batches grow with the load: an idle server answers a row alone
after `max_wait`, a busy one takes as many as `max_batch` at a time. First come, first answered.
"""

import asyncio
import collections
import dataclasses
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from sbs_jax.prediction.engine import Answer, Question

log = logging.getLogger(__name__)

# Of the seconds that a row took lately, how much the newest batch counts.
_NEWEST = 0.3


class FullError(Exception):
    """The queue has no room for these rows. `retry_after`: seconds after which it should have."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class FailedError(Exception):
    """The model failed on the batch that a row was in."""


class ClosedError(Exception):
    """Nothing more is answered: the server ends."""


@dataclasses.dataclass(eq=False, slots=True)
class _Waiting:
    question: Question
    answer: "asyncio.Future[Answer]"
    since: float


@dataclasses.dataclass
class Counts:
    """What was done since the start."""

    answered: int = 0  # rows
    failed: int = 0  # rows of batches in which the model failed
    dropped: int = 0  # rows that nobody waited for any more, before they were computed
    batches: int = 0
    seconds: float = 0.0  # of the model at work


class Batcher:
    """A queue of rows and the thread that answers them by `answer`, a batch at a time.

    Everything but `answer` and `prepare` runs on the event loop that called `start`. `prepare` is called first, on the
    thread; `ended` is called on the loop, with the error if there was one, when the thread ends.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Sequence[Answer]],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
    ) -> None:
        self._answer, self._max_batch, self._max_wait, self._max_queue = answer, max_batch, max_wait, max_queue
        self._queue: collections.OrderedDict[_Waiting, None] = collections.OrderedDict()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._began: float | None = None
        self._row_seconds = 0.0
        self._loop: asyncio.AbstractEventLoop
        self.ready = False
        self.computing = 0  # rows of the batch under way
        self.counts = Counts()

    def start(
        self,
        prepare: Callable[[], Any] = lambda: None,
        *,
        prepared: Callable[[Any], None] = lambda _: None,
        ended: Callable[[BaseException | None], None] = lambda _: None,
    ) -> None:
        """Starts the thread. `prepared` gets, on the loop, what `prepare` returned."""
        self._loop = asyncio.get_running_loop()

        def work() -> None:
            error: BaseException | None = None
            try:
                result = prepare()
                self._on_loop(self._is_ready, prepared, result)
                self._work()
            except BaseException as raised:
                error = raised
            self._on_loop(self._ended, error, ended)

        # A daemon: a second signal does not wait for the batch under way.
        self._thread = threading.Thread(target=work, daemon=True, name="model")
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._queue)

    @property
    def busy_seconds(self) -> float:
        """How long the batch under way has taken; 0 where there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    async def ask(self, rows: Sequence[Question]) -> list[Answer]:
        """Their answers, in order. All are taken or none: FullError. Cancelled, those that still wait are dropped.

        FailedError where the model failed on one of them.
        """
        waiting = [_Waiting(row, self._loop.create_future(), time.monotonic()) for row in rows]
        with self._changed:
            if self._closing:
                raise ClosedError
            free = self._max_queue - len(self._queue)
            if len(waiting) > free:
                raise FullError(
                    f"{len(self._queue)} rows wait and {self._max_queue} can: no room for {len(waiting)} more.",
                    retry_after=self._retry_after(),
                )
            for each in waiting:
                self._queue[each] = None
            self._changed.notify()
        try:
            return await asyncio.gather(*(each.answer for each in waiting))
        finally:
            self._drop([each for each in waiting if not each.answer.done() or each.answer.cancelled()])

    def close(self) -> None:
        """Takes no more rows; the thread ends when those that wait are answered."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def _retry_after(self) -> int:
        return min(max(1, math.ceil(self._row_seconds * (len(self._queue) + self.computing))), 60)

    def _drop(self, rows: Sequence[_Waiting]) -> None:
        if not rows:
            return
        with self._changed:
            for each in rows:
                if each in self._queue:
                    del self._queue[each]
                    self.counts.dropped += 1

    # ------------------------------------------------------------------------------------- on the thread

    def _work(self) -> None:
        while rows := self._next():
            began = time.monotonic()
            self._began = began
            answers: Sequence[Answer] | Exception
            try:
                answers = self._answer([each.question for each in rows])
                if len(answers) != len(rows):
                    raise RuntimeError(f"{len(answers)} answers to {len(rows)} rows")
            except Exception as error:
                answers = error
                _log_failure(error, len(rows))
            self._began = None
            self._on_loop(self._deliver, rows, answers, time.monotonic() - began)

    def _next(self) -> list[_Waiting]:
        """Waits for the first row, then for others; none where the thread is to end."""
        with self._changed:
            self.computing = 0
            while True:
                if len(self._queue) >= self._max_batch or (self._closing and self._queue):
                    break
                if not self._queue:
                    if self._closing:
                        return []
                    self._changed.wait()
                    continue
                left = next(iter(self._queue)).since + self._max_wait - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            count = min(self._max_batch, len(self._queue))
            rows = [self._queue.popitem(last=False)[0] for _ in range(count)]
            self.computing = count
            return rows

    def _on_loop(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed, and nobody waits
            log.debug("the event loop had ended")

    # --------------------------------------------------------------------------------------- on the loop

    def _is_ready(self, prepared: Callable[[Any], None], result: Any) -> None:
        self.ready = True
        prepared(result)

    def _ended(self, error: BaseException | None, ended: Callable[[BaseException | None], None]) -> None:
        self.ready = False
        self.close()
        for each in list(self._queue):
            if not each.answer.done():
                each.answer.set_exception(FailedError())
        ended(error)

    def _deliver(self, rows: Sequence[_Waiting], answers: Sequence[Answer] | Exception, seconds: float) -> None:
        counts = self.counts
        counts.batches += 1
        counts.seconds += seconds
        newest = seconds / len(rows)
        self._row_seconds += _NEWEST * (newest - self._row_seconds) if self._row_seconds else newest
        if isinstance(answers, Exception):
            counts.failed += len(rows)
            for each in rows:
                if not each.answer.done():
                    each.answer.set_exception(FailedError())
            return
        counts.answered += len(rows)
        for each, answer in zip(rows, answers, strict=True):
            if not each.answer.done():
                each.answer.set_result(answer)


def _log_failure(error: Exception, count: int) -> None:
    """Where it failed, and how; without texts of rows, which an error's message may hold."""
    import jax

    told = str(error) if isinstance(error, jax.errors.JaxRuntimeError | MemoryError) else "its message is not shown"
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("The model failed on a batch of %d rows: %s (%s).\n%s", count, type(error).__name__, told, where)
