"""Batch mode: requests go to the provider in files, at half the price, and return within a day.

A job is recorded in the store before it is submitted, under a name that the provider gets too. If a run is killed in
between, the next run finds the job by that name. Replies are stored as they are collected; unanswered requests of a job
go into the next one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence

from sbs_jax.teacher import money, sampler
from sbs_jax.teacher.batches import CANCELLED, DONE, ENDED, FAILED, RUNNING, BatchClient, BatchState
from sbs_jax.teacher.clients import REFUSED, Failed, Fatal, Problem, Refused, Reply, Request
from sbs_jax.teacher.pacing import Budget, Reasons, Reservation, Usage
from sbs_jax.teacher.store import Failure, Store

log = logging.getLogger(__name__)

NEW, COLLECTED = "new", "collected"
POLL = 30.0  # seconds between polls
_NEWS = 600.0  # seconds after which a job that is waited for is named again
_OBSERVED = 1000  # replies whose bills are looked at for the estimate
_PATIENCE = 3600.0  # seconds in a state that we do not know
# Rounds of jobs: the first, two for truncated replies, one for hints, and spare ones for lost lines.
_ROUNDS = 6


@dataclasses.dataclass
class _Run:
    """What jobs share: the store, the account, and what this run has submitted."""

    client: BatchClient
    store: Store
    budget: Budget
    usage: Usage
    submitted: dict[str, Reservation] = dataclasses.field(default_factory=dict)  # by request key
    unanswered: Reasons = dataclasses.field(default_factory=Reasons)
    answered: bool = False


async def run(
    questions: Iterable[sampler.Asked],
    *,
    settings: sampler.Settings,
    client: BatchClient,
    store: Store,
    price: money.Price | None,
    size: int,
) -> bool:
    """Runs rounds of jobs of at most `size` requests; returns whether every row now has a reply or a failure reason.

    A round that would exceed `max_requests` or `max_cost` is not submitted: ValueError in the first one.
    """
    rows, usage = list(questions), Usage()
    limits = {"max_requests": settings.max_requests, "max_cost": settings.max_cost}
    budget = Budget(usage, model=settings.model, price=price, batch=True, **limits)
    this = _Run(client, store, budget, usage)
    list(_missing(rows, settings, this))  # looks at the replies of earlier runs
    try:
        for _ in range(_ROUNDS):
            await _finish(this)
            missing = list(_missing(rows, settings, this))
            if not missing:
                return True
            if excess := _excess(missing, settings, this):
                if not usage.asked:
                    raise ValueError(excess)
                log.warning("Ended before the last row: %s", excess)
                return False
            log.info("%d requests in %d jobs.", len(missing), -(-len(missing) // size))
            for start in range(0, len(missing), size):
                await _submit(missing[start : start + size], this)
        await _finish(this)
    finally:
        cost = "price unknown" if price is None else f"${usage.spent:.4f}"
        tokens = f"{usage.input_tokens} + {usage.output_tokens} tokens"
        log.info("%d requests in jobs of this run; %s, %s.", usage.asked, tokens, cost)
    left = sum(1 for _ in _missing(rows, settings, this))
    if left:
        reason, count = next(iter(this.unanswered.most_common(1)), ("their lines are missing.", left))
        log.warning(
            *("%d requests have no reply after %d rounds of jobs, %d times because: %s", left, _ROUNDS, count, reason)
        )
        log.warning("Repeat the command to ask them again.")
    return left == 0


async def cancel(client: BatchClient, store: Store) -> int:
    """Cancels every unfinished job, stores the replies it has (they were paid for), and returns the number of jobs."""
    found = list(store.jobs(NEW, RUNNING))
    usage = Usage()
    budget = Budget(usage, model="", price=None, max_requests=None, max_cost=None)
    this = _Run(client, store, budget, usage, answered=True)
    for name, job, _ in found:
        job = job or await client.find(name)
        if job is None:
            store.set_job(name, job=None, state=CANCELLED)
            continue
        await client.cancel(job)
        # Cancelling takes a while; the replies come after that.
        watch = _Watch(job)
        while (state := await client.poll(job)).state == RUNNING and watch.runs(state):
            await asyncio.sleep(POLL)
        await _collect(name, job, this, end=CANCELLED)
    return len(found)


def _missing(rows: Sequence[sampler.Asked], settings: sampler.Settings, this: _Run) -> Iterator[Request]:
    """Yields the next round's requests. A request with a hint waits until all samples of its row are answered."""
    look_up = this.store.get
    for row in rows:
        found = [sampler.answer_of(row, settings, look_up, sample=sample) for sample in range(settings.samples)]
        unanswered = [answer for answer in found if isinstance(answer, Request)]
        replies = [answer for answer in found if isinstance(answer, Reply)]
        this.answered |= bool(replies)
        if settings.max_cost is not None and this.budget.observed < _OBSERVED:
            estimate = this.budget.estimate(sampler.request_of(row, settings, sample=0))
            for reply in replies:
                this.budget.observe(estimate, sent=reply.input_tokens or 0, received=reply.output_tokens or 0)
        yield from unanswered
        if unanswered or not settings.hint:
            continue
        labels = [row.read(answer.text)[1] if isinstance(answer, Reply) else None for answer in found]
        if sampler.disputed(row, labels):
            hinted = sampler.answer_of(row, settings, look_up, sample=0, hint=row.label)
            if isinstance(hinted, Request):
                yield hinted


def _excess(missing: Sequence[Request], settings: sampler.Settings, this: _Run) -> str:
    """Says which limit these requests would exceed; "" if none."""
    asked, spent = this.usage.asked, this.usage.spent
    if settings.max_requests is not None and asked + len(missing) > settings.max_requests:
        return (
            f"{len(missing)} requests are needed after {asked}, and max_requests is {settings.max_requests}; a batch "
            "is paid as a whole. Raise max_requests, or take fewer rows (--limit)."
        )
    cost = sum(this.budget.estimate(request).cost for request in missing)
    if settings.max_cost is not None and spent + cost > settings.max_cost:
        return (
            f"These {len(missing)} requests may cost up to ${cost:,.2f} (estimated with the longest replies) after "
            f"${spent:,.2f}, and max_cost is ${settings.max_cost:g}; a batch is paid as a whole. Raise it, or take "
            "fewer rows (--limit)."
        )
    return ""


async def _submit(requests: Sequence[Request], this: _Run) -> None:
    keys = [request.key for request in requests]
    store = this.store
    # A retry has the same requests in the same order, so the name includes the number of tries.
    tries = sum(1 for _ in store.jobs(NEW, RUNNING, COLLECTED, FAILED, CANCELLED))
    name = "sbs-" + hashlib.sha256(f"{tries} {' '.join(keys)}".encode()).hexdigest()[:24]
    store.add_job(name, keys)
    this.submitted |= {request.key: this.budget.estimate(request) for request in requests}
    this.usage.asked += len(requests)
    job = await this.client.submit(requests, name=name)
    store.set_job(name, job=job, state=RUNNING)
    log.info("Submitted %s with %d requests as %s.", name, len(requests), job)


async def _finish(this: _Run) -> None:
    """Waits for all unfinished jobs, including those of earlier runs, and stores their answers."""
    client, store = this.client, this.store
    for name, job, keys in list(store.jobs(NEW)):
        # An earlier process recorded it and died, perhaps after submitting it.
        job = job or await client.find(name)
        if job is None:
            store.set_job(name, job=None, state=FAILED)
            log.info("Job %s with %d requests was never submitted.", name, len(keys))
        else:
            store.set_job(name, job=job, state=RUNNING)
    watched: dict[str, _Watch] = {}
    while waiting := list(store.jobs(RUNNING)):
        for name, job, _ in waiting:
            assert job is not None  # a running job has the provider's name
            found = await client.poll(job)
            if watched.setdefault(job, _Watch(job)).runs(found):
                continue
            ends = {DONE: COLLECTED, CANCELLED: CANCELLED}
            count = await _collect(name, job, this, end=ends.get(found.state, FAILED))
            if found.state == FAILED and not count:
                # The next job would fail too: a wrong model, a full queue.
                raise ValueError(f"The provider failed the job {job}: {found.message or 'it gives no reason'}.")
        if list(store.jobs(RUNNING)):
            await asyncio.sleep(POLL)


class _Watch:
    """Says how a job gets on, and gives up one whose state is unknown for an hour."""

    def __init__(self, job: str) -> None:
        self._job, self._said, self._at, self._known = job, "", 0.0, time.monotonic()

    def runs(self, found: BatchState) -> bool:
        """Returns whether the job has not ended. ValueError if its state stays unknown."""
        now = time.monotonic()
        if found.state in ENDED:
            return False
        if found.state == RUNNING:
            self._known = now
        elif now - self._known >= _PATIENCE:
            raise ValueError(
                f"The provider says of the job {self._job} that it is {found.state!r}, which is no state known here. "
                "The job is kept: repeat the command later, or drop it with --cancel_batches."
            )
        if found.state != self._said or now - self._at >= _NEWS:
            self._said, self._at = found.state, now
            done = "" if found.total is None else f", {found.done} of {found.total} requests done"
            log.info("Waiting for the job %s: %s%s; looking every %.0f s.", self._job, found.state, done, POLL)
        return True


async def _collect(name: str, job: str, this: _Run, *, end: str) -> int:
    """Stores the answers of a job and returns their number."""
    store, count = this.store, 0
    values: dict[str, Reply | Failure] = {}
    refused: dict[str, Failure] = {}
    unanswered: Problem | None = None
    async for key, outcome in this.client.collect(job):
        if (estimate := this.submitted.pop(key, None)) is not None:
            this.budget.book(estimate, outcome)
        if isinstance(outcome, Reply):
            values[key] = outcome
            this.answered = True
        elif isinstance(outcome, Refused):
            refused[key] = Failure(outcome.reason, str(outcome))
        elif isinstance(outcome, Failed):
            values[key] = Failure(outcome.reason, str(outcome))
        else:
            unanswered = outcome if unanswered is None or isinstance(outcome, Fatal) else unanswered
            this.unanswered.add(str(outcome))
            continue
        count += 1
        if len(values) == 1000:
            store.put_all(values)
            values = {}
    store.put_all(values)
    store.set_job(name, job=job, state=end)
    unexplained = next((failure.detail for failure in refused.values() if failure.reason == REFUSED), None)
    if refused and not this.answered and (unexplained or len(refused) >= sampler.HOPELESS):
        detail = unexplained or next(iter(refused.values())).detail
        raise Fatal(f"{detail} The job {job} has {len(refused)} refusals and no reply, so the rows are not at fault.")
    if isinstance(unanswered, Fatal) and not this.answered:
        raise unanswered
    store.put_all(refused)
    log.info("Job %s: %d answers, %d of them refusals.", name, count, len(refused))
    return count
