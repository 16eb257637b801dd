"""Batch mode: requests go to the provider in files, at half the price, and return within a day.

A job is recorded in the store before it is submitted, under a name that the provider gets too. If a run is killed in
between, the next run finds the job by that name. Replies are stored file by file; unanswered requests of a job go into
the next one, except where a file of answers is gone: those were paid for, so they fail as "lost" and are asked again
only with `--retry_failed`. A job that cannot be read does not keep the others from being collected.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence

from sbs_jax.data.parsing import LOST
from sbs_jax.teacher import money, sampler
from sbs_jax.teacher.batches import CANCELLED, DONE, ENDED, FAILED, RUNNING, BatchClient, BatchState
from sbs_jax.teacher.clients import REFUSED, Again, Failed, Fatal, Gone, Refused, Reply, Request
from sbs_jax.teacher.pacing import Budget, Reasons, Reservation, Usage
from sbs_jax.teacher.store import Failure, Store

log = logging.getLogger(__name__)

NEW, COLLECTED, UNREAD = "new", "collected", "unread"  # UNREAD: ended, but a file of answers could not be read
_OPEN = (NEW, RUNNING, UNREAD)
POLL = 30.0  # seconds between polls
_NEWS = 600.0  # seconds after which a job that is waited for is named again
_OBSERVED = 1000  # replies whose bills are looked at for the estimate
_PATIENCE = 3600.0  # seconds in a state that we do not know
# Rounds of jobs: the first, two for truncated replies, one for hints, and spare ones for lost lines.
_ROUNDS = 6


@dataclasses.dataclass
class _Run:
    """Store, account and submitted requests of a run, shared by its jobs."""

    client: BatchClient
    store: Store
    budget: Budget
    usage: Usage
    submitted: dict[str, Reservation] = dataclasses.field(default_factory=dict)  # by request key
    unanswered: Reasons = dataclasses.field(default_factory=Reasons)
    answered: bool = False
    watched: dict[str, _Watch] = dataclasses.field(default_factory=dict)  # by the provider's name of the job


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
    """Cancels every unfinished job, stores the replies it has (they were paid for), and returns the number of jobs.

    Gives up jobs that an earlier run could not read, if they cannot be read now.
    """
    found, unread = list(store.jobs(*_OPEN)), {name for name, _, _ in store.jobs(UNREAD)}
    usage, problems = Usage(), []
    budget = Budget(usage, model="", price=None, max_requests=None, max_cost=None)
    this = _Run(client, store, budget, usage, answered=True)
    for name, job, keys in found:
        try:
            job = job or await client.find(name)
            if job is not None:
                if (await _polled(name, job, this)).state not in ENDED:
                    await client.cancel(job)
                # Cancelling takes a while; the replies come after that.
                watch = _Watch(job)
                while (state := await _polled(name, job, this)).state == RUNNING and watch.runs(state):
                    await asyncio.sleep(POLL)
                await _collect(name, job, keys, this, state=state, end=CANCELLED)
        except (Again, Fatal) as problem:
            if name not in unread:
                problems.append(problem)
                continue
            log.warning("Job %s is given up, and its unread rows are asked again: %s", job, problem)
        store.set_job(name, job=job, state=CANCELLED)
    if problems:
        raise problems[0]
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
    tries = sum(1 for _ in store.jobs(*_OPEN, COLLECTED, FAILED, CANCELLED))
    name = "sbs-" + hashlib.sha256(f"{tries} {' '.join(keys)}".encode()).hexdigest()[:24]
    store.add_job(name, keys)
    this.submitted |= {request.key: this.budget.estimate(request) for request in requests}
    this.usage.asked += len(requests)
    job = await this.client.submit(requests, name=name)
    store.set_job(name, job=job, state=RUNNING)
    log.info("Submitted %s with %d requests as %s.", name, len(requests), job)


async def _finish(this: _Run) -> None:
    """Waits for all unfinished jobs, including those of earlier runs, and stores their answers.

    Raises the problem of a job that cannot be read or that the provider failed, after the others are collected.
    """
    problems: dict[str, Exception] = {}
    listed = list(this.store.jobs(*_OPEN))
    while True:
        waiting = False
        for name, job, keys in listed:
            try:
                waiting |= not await _ended(name, job, keys, this)
                problems.pop(name, None)
            except (Again, Fatal, ValueError) as problem:
                if name not in problems:
                    log.warning("Job %s: %s", job or name, problem)
                problems[name] = problem
        if not waiting:
            break
        await asyncio.sleep(POLL)
        listed = list(this.store.jobs(NEW, RUNNING))  # what is unread now is left for the next run
    for problem in problems.values():
        raise problem


async def _ended(name: str, job: str | None, keys: Sequence[str], this: _Run) -> bool:
    """Collects a job if it has ended, and returns whether it has."""
    if job is None:
        # An earlier process recorded it and died, perhaps after submitting it.
        job = await this.client.find(name)
        this.store.set_job(name, job=job, state=FAILED if job is None else RUNNING)
        if job is None:
            log.info("Job %s with %d requests was never submitted.", name, len(keys))
            return True
    found = await _polled(name, job, this)
    if this.watched.setdefault(job, _Watch(job)).runs(found):
        return False
    end = {DONE: COLLECTED, CANCELLED: CANCELLED}.get(found.state, FAILED)
    count = await _collect(name, job, keys, this, state=found, end=end)
    if found.state == FAILED and not count:
        # The next job would fail too: a wrong model, a full queue.
        raise ValueError(f"The provider failed the job {job}: {found.message or 'it gives no reason'}.")
    return True


async def _polled(name: str, job: str, this: _Run) -> BatchState:
    try:
        return await this.client.poll(job)
    except Gone as error:
        this.store.set_job(name, job=job, state=UNREAD)
        raise Fatal(
            f"The provider does not know the job {job}, which was submitted from here. Use the key and project of that "
            "time, or give the job up with --cancel_batches."
        ) from error


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


async def _collect(name: str, job: str, keys: Sequence[str], this: _Run, *, state: BatchState, end: str) -> int:
    """Stores the answers of a job, each file before the next one is read, and returns their number.

    If a file cannot be read now, raises its problem after the last one. If one is gone, requests without a line fail as
    LOST.
    """
    store, count = this.store, 0
    refused: dict[str, Failure] = {}
    open_keys, unanswered = set(), None
    gone, problem, read = [], None, this.client.reader()
    for file in await this.client.files(job):
        try:
            found = read(await this.client.download(file))
        except Gone:
            gone.append(file)
            continue
        except (Again, Fatal) as error:
            problem = problem or error
            continue
        while some := list(itertools.islice(found, 1000)):
            values: dict[str, Reply | Failure] = {}
            for key, outcome in some:
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
                    open_keys.add(key)
                    continue
                count += 1
            store.put_all(values)
    if problem is not None:
        store.set_job(name, job=job, state=UNREAD)
        raise type(problem)(
            f"A file of the job {job} cannot be read now: {problem} Repeat the command later; --cancel_batches gives "
            "it up."
        ) from problem
    if gone or (state.done and not count and not open_keys):
        _lose(job, gone, [key for key in keys if key not in open_keys and key not in refused], store)
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


def _lose(job: str, gone: Sequence[str], keys: Sequence[str], store: Store) -> None:
    """Records that the answers to these requests are gone, unless they are stored."""
    what = f"the provider no longer has {' and '.join(gone) or 'a file of its answers'}"
    settled = store.settled(keys, but="")
    lost = [key for key in keys if key not in settled]
    store.put_all(dict.fromkeys(lost, Failure(LOST, f"Answers of the job {job} are lost: {what}.")))
    log.warning(
        "Job %s: %s. Its %d requests without an answer may have been paid for, so they fail as %r; --retry_failed asks "
        "them again.",
        *(job, what, len(lost), LOST),
    )
