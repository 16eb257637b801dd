"""Batch mode: requests go to the provider in files, at half the price, and come back within a day.

A job is noted in the store before it is submitted, under a name that the provider is told too: a run that was killed
between the two finds it by that name. Replies are stored as they are collected; what a job did not answer goes into the
next one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence

from sbs_jax.data import parsing
from sbs_jax.teacher import money, sampler
from sbs_jax.teacher.batches import BatchClient
from sbs_jax.teacher.clients import Failed, Reply, Request
from sbs_jax.teacher.store import Failure, Store

log = logging.getLogger(__name__)

NEW, RUNNING, COLLECTED, FAILED, CANCELLED = "new", "running", "collected", "failed", "cancelled"
# Seconds between looks at the jobs.
POLL = 30.0
# Rounds of jobs: the first, those for replies cut short (two), for hints, and one for what was lost.
_ROUNDS = 6


async def run(
    questions: Iterable[sampler.Asked],
    *,
    settings: sampler.Settings,
    client: BatchClient,
    store: Store,
    price: money.Price | None,
    size: int,
    poll: float | None = None,
) -> bool:
    """Whether every row has a reply or a reason now. Rows are gone through once per round, so they must be repeatable.

    ValueError, before anything is submitted, where `max_requests` or `max_cost` would be exceeded.
    """
    poll = POLL if poll is None else poll
    rows = list(questions)
    for _ in range(_ROUNDS):
        await _finish(client, store, poll=poll)
        missing = list(_missing(rows, settings, store))
        if not missing:
            return True
        _check_limits(missing, settings, price)
        log.info("%d requests in %d jobs.", len(missing), -(-len(missing) // size))
        for start in range(0, len(missing), size):
            await _submit(missing[start : start + size], client, store)
    await _finish(client, store, poll=poll)
    left = sum(1 for _ in _missing(rows, settings, store))
    if left:
        log.warning("%d requests have no reply after %d rounds of jobs; repeat the command.", left, _ROUNDS)
    return left == 0


async def cancel(client: BatchClient, store: Store, *, poll: float | None = None) -> int:
    """Cancels every job that is under way, keeps what it has answered (and been paid for), and returns their number."""
    poll = POLL if poll is None else poll
    count = 0
    for name, job, _ in list(store.jobs(NEW, RUNNING)):
        job = job or await client.find(name)
        if job is None:
            store.set_job(name, job=None, state=CANCELLED)
        else:
            await client.cancel(job)
            # A provider takes its time to cancel, and delivers what was answered after that.
            while (await client.poll(job)).state == RUNNING:
                await asyncio.sleep(poll)
            await _collect(name, job, client, store, end=CANCELLED)
        count += 1
    return count


def _missing(rows: Sequence[sampler.Asked], settings: sampler.Settings, store: Store) -> Iterator[Request]:
    """What the next round has to ask. A second ask with a hint waits until its row's samples are there."""
    for row in rows:
        complete = True
        labels: list[str | None] = []
        for sample in range(settings.samples):
            request, reply = _latest(row, settings, store, sample=sample, hint=None)
            if request is not None:
                complete = False
                yield request
            labels.append(row.read(reply.text)[1] if reply is not None else None)
        if complete and settings.hint and sampler.disputed(row, labels):
            request, _ = _latest(row, settings, store, sample=0, hint=row.label)
            if request is not None:
                yield request


def _latest(
    row: sampler.Asked, settings: sampler.Settings, store: Store, *, sample: int, hint: str | None
) -> tuple[Request | None, Reply | None]:
    """(what to ask next, None where nothing; the accepted reply, None where there is none)."""
    for room in range(sampler.ROOM_STEPS + 1):
        request = sampler.request_of(row, settings, sample=sample, room=room, hint=hint)
        stored = store.get(request.key)
        if stored is None:
            return request, None
        if isinstance(stored, Failure):
            return None, None
        if stored.finish != parsing.CUT_SHORT:
            return None, stored
    return None, None


def _check_limits(missing: Sequence[Request], settings: sampler.Settings, price: money.Price | None) -> None:
    if settings.max_requests is not None and len(missing) > settings.max_requests:
        raise ValueError(
            f"{len(missing)} requests are needed and max_requests is {settings.max_requests}; a batch is paid as a "
            "whole. Raise it, or take fewer rows (--limit)."
        )
    if settings.max_cost is None:
        return
    if price is None:
        raise ValueError(
            f"The price of {settings.model!r} is not known, so max_cost cannot be kept; give --price IN,OUT."
        )
    sent = sum(money.estimate_tokens(request.prompt.sent(request.form)) for request in missing)
    most = sum(request.parameters.max_tokens for request in missing)
    cost = money.cost(price, input_tokens=int(1.5 * sent), output_tokens=most, batch=True)
    if cost > settings.max_cost:
        raise ValueError(
            f"These {len(missing)} requests may cost up to ${cost:,.2f} (estimated, every reply as long as it may be), "
            f"and max_cost is ${settings.max_cost:g}; a batch is paid as a whole. Raise it, or take fewer rows "
            "(--limit)."
        )


async def _submit(requests: Sequence[Request], client: BatchClient, store: Store) -> None:
    keys = [request.key for request in requests]
    # The same requests in the same order would be the same job: its name says what it holds, and which try it is.
    tries = sum(1 for _ in store.jobs(NEW, RUNNING, COLLECTED, FAILED, CANCELLED))
    name = "sbs-" + hashlib.sha256(f"{tries} {' '.join(keys)}".encode()).hexdigest()[:24]
    store.add_job(name, keys)
    job = await client.submit(requests, name=name)
    store.set_job(name, job=job, state=RUNNING)
    log.info("Submitted %s with %d requests as %s.", name, len(requests), job)


async def _finish(client: BatchClient, store: Store, *, poll: float) -> None:
    """Waits for the jobs under way, those of earlier runs too, and stores what they answer."""
    for name, job, keys in list(store.jobs(NEW)):
        # Noted, and then this process or its predecessor died: was it submitted?
        job = job or await client.find(name)
        if job is None:
            store.set_job(name, job=None, state=FAILED)
            log.info("Job %s with %d requests was never submitted.", name, len(keys))
        else:
            store.set_job(name, job=job, state=RUNNING)
    while waiting := list(store.jobs(RUNNING)):
        for name, job, _ in waiting:
            assert job is not None  # a running job has the provider's name
            found = await client.poll(job)
            if found.state == RUNNING:
                continue
            ends = {"done": COLLECTED, "cancelled": CANCELLED}
            count = await _collect(name, job, client, store, end=ends.get(found.state, FAILED))
            if found.state == FAILED and not count:
                # As a whole, for a reason that the next one would fail for too: a wrong model, a full queue.
                raise ValueError(f"The provider failed the job {job}: {found.message or 'it gives no reason'}.")
        if list(store.jobs(RUNNING)):
            await asyncio.sleep(poll)


async def _collect(name: str, job: str, client: BatchClient, store: Store, *, end: str) -> int:
    """Stores what a job has answered, and returns how much that is."""
    count = failed = 0
    values: dict[str, Reply | Failure] = {}
    async for key, reply in client.collect(job):
        if isinstance(reply, Failed):
            failed += 1
            values[key] = Failure(reply.reason, str(reply))
        else:
            values[key] = reply
        count += 1
        if len(values) == 1000:
            store.put_all(values)
            values = {}
    store.put_all(values)
    store.set_job(name, job=job, state=end)
    log.info("Job %s: %d replies, %d failures.", name, count - failed, failed)
    return count
