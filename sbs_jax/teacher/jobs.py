"""Batch mode: requests go to the provider in files, at half the price, and return within a day.

A job is recorded in the store before it is submitted, under a name that the provider gets too. If a run is killed in
between, the next run finds the job by that name. Replies are stored as they are collected; unanswered requests of a job
go into the next one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence

from sbs_jax.teacher import money, sampler
from sbs_jax.teacher.batches import CANCELLED, DONE, FAILED, RUNNING, BatchClient
from sbs_jax.teacher.clients import Failed, Reply, Request
from sbs_jax.teacher.pacing import upper_bound
from sbs_jax.teacher.store import Failure, Store

log = logging.getLogger(__name__)

NEW, COLLECTED = "new", "collected"
POLL = 30.0  # seconds between polls
# Rounds of jobs: the first, two for truncated replies, one for hints, and spare ones for lost lines.
_ROUNDS = 6


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

    Raises ValueError, before anything is submitted, if `max_requests` or `max_cost` would be exceeded.
    """
    rows = list(questions)
    for _ in range(_ROUNDS):
        await _finish(client, store)
        missing = list(_missing(rows, settings, store))
        if not missing:
            return True
        _check_limits(missing, settings, price)
        log.info("%d requests in %d jobs.", len(missing), -(-len(missing) // size))
        for start in range(0, len(missing), size):
            await _submit(missing[start : start + size], client, store)
    await _finish(client, store)
    left = sum(1 for _ in _missing(rows, settings, store))
    if left:
        log.warning("%d requests have no reply after %d rounds of jobs; repeat the command.", left, _ROUNDS)
    return left == 0


async def cancel(client: BatchClient, store: Store) -> int:
    """Cancels every unfinished job, stores the replies it has (they were paid for), and returns the number of jobs."""
    found = list(store.jobs(NEW, RUNNING))
    for name, job, _ in found:
        job = job or await client.find(name)
        if job is None:
            store.set_job(name, job=None, state=CANCELLED)
            continue
        await client.cancel(job)
        # Cancelling takes a while; the replies come after that.
        while (await client.poll(job)).state == RUNNING:
            await asyncio.sleep(POLL)
        await _collect(name, job, client, store, end=CANCELLED)
    return len(found)


def _missing(rows: Sequence[sampler.Asked], settings: sampler.Settings, store: Store) -> Iterator[Request]:
    """Yields the next round's requests. A request with a hint waits until all samples of its row are answered."""
    for row in rows:
        found = [sampler.answer_of(row, settings, store.get, sample=sample) for sample in range(settings.samples)]
        unanswered = [answer for answer in found if isinstance(answer, Request)]
        yield from unanswered
        if unanswered or not settings.hint:
            continue
        labels = [row.read(answer.text)[1] if isinstance(answer, Reply) else None for answer in found]
        if sampler.disputed(row, labels):
            hinted = sampler.answer_of(row, settings, store.get, sample=0, hint=row.label)
            if isinstance(hinted, Request):
                yield hinted


def _check_limits(missing: Sequence[Request], settings: sampler.Settings, price: money.Price | None) -> None:
    if settings.max_requests is not None and len(missing) > settings.max_requests:
        raise ValueError(
            f"{len(missing)} requests are needed and max_requests is {settings.max_requests}; a batch is paid as a "
            "whole. Raise max_requests, or take fewer rows (--limit)."
        )
    money.check_limit(settings.max_cost, price, model=settings.model)
    if settings.max_cost is None or price is None:
        return
    bounds = [upper_bound(request) for request in missing]
    sent, got = sum(sent for sent, _ in bounds), sum(got for _, got in bounds)
    cost = money.cost(price, input_tokens=sent, output_tokens=got, batch=True)
    if cost > settings.max_cost:
        raise ValueError(
            f"These {len(missing)} requests may cost up to ${cost:,.2f} (estimated with the longest replies), and "
            f"max_cost is ${settings.max_cost:g}; a batch is paid as a whole. Raise it, or take fewer rows (--limit)."
        )


async def _submit(requests: Sequence[Request], client: BatchClient, store: Store) -> None:
    keys = [request.key for request in requests]
    # A retry has the same requests in the same order, so the name includes the number of tries.
    tries = sum(1 for _ in store.jobs(NEW, RUNNING, COLLECTED, FAILED, CANCELLED))
    name = "sbs-" + hashlib.sha256(f"{tries} {' '.join(keys)}".encode()).hexdigest()[:24]
    store.add_job(name, keys)
    job = await client.submit(requests, name=name)
    store.set_job(name, job=job, state=RUNNING)
    log.info("Submitted %s with %d requests as %s.", name, len(requests), job)


async def _finish(client: BatchClient, store: Store) -> None:
    """Waits for all unfinished jobs, including those of earlier runs, and stores their answers."""
    for name, job, keys in list(store.jobs(NEW)):
        # An earlier process recorded it and died, perhaps after submitting it.
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
            ends = {DONE: COLLECTED, CANCELLED: CANCELLED}
            count = await _collect(name, job, client, store, end=ends.get(found.state, FAILED))
            if found.state == FAILED and not count:
                # The next job would fail too: a wrong model, a full queue.
                raise ValueError(f"The provider failed the job {job}: {found.message or 'it gives no reason'}.")
        if list(store.jobs(RUNNING)):
            await asyncio.sleep(POLL)


async def _collect(name: str, job: str, client: BatchClient, store: Store, *, end: str) -> int:
    """Stores the answers of a job and returns their number."""
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
