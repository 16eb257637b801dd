"""Measures asking a teacher: throughput, CPU time, memory, and the time until a resumed run asks again.

    python scripts/bench.py teacher                              # part of `make bench`
    python scripts/bench.py teacher --rounds 1 --requests 4000   # shorter
    python scripts/bench.py teacher --only resume memory --curator curator/bin/python

The teacher is a server on this machine (tests/teacher_server.py), in a separate process, that answers after 50 ms.
Every side is a separate process too. Results: docs/speed.md.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import client, harness
from sbs_jax.teacher import clients, prompts, providers, sampler
from sbs_jax.teacher.store import Store

LATENCY = 0.05
REPLY = "Somebody who walks dogs along a river is outdoors with animals.\nAnswer: entailment"
ESNLI_ROWS, MISSING = 549_367, 10
PARTS = ("throughput", "memory", "resume", "curator")
COLORS = ("red", "green", "blue", "black", "white", "yellow", "brown", "grey")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--requests", type=int, default=10_000, help="requests in a turn, at least twice --concurrency")
    parser.add_argument("--concurrency", type=int, default=1000, help="requests in flight")
    parser.add_argument("--few", type=int, default=1000, help="rows of the smaller run that measures memory")
    parser.add_argument("--many", type=int, default=100_000, help="rows of the larger run that measures memory")
    parser.add_argument("--stored", type=int, default=ESNLI_ROWS, help="rows of the resumed run")
    parser.add_argument("--curator", metavar="PYTHON", help="interpreter that has bespokelabs-curator")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    if arguments.requests < 2 * arguments.concurrency:
        raise SystemExit(f"--requests is {arguments.requests}; expected at least twice --concurrency.")
    wanted = [part for part in PARTS if part in arguments.only]
    if importlib.util.find_spec("openai") is None:
        print("Only memory is measured: the SDKs are missing; pip install 'sbs-jax[teacher]'")
        wanted = [part for part in wanted if part == "memory"]
    python = arguments.curator or (sys.executable if importlib.util.find_spec("bespokelabs") else None)
    some = {"rounds": arguments.rounds, "requests": arguments.requests, "concurrency": arguments.concurrency}
    for part in wanted:
        print(f"-- {part}; load {os.getloadavg()[0]:.1f}", flush=True)
        if part == "memory":
            yield memory(few=arguments.few, many=arguments.many, concurrency=arguments.concurrency)
        elif part == "resume":
            yield resume(count=arguments.stored, rounds=arguments.rounds)
        else:
            with harness.of_tests("teacher_server").apart(latency=LATENCY, reply=REPLY) as url:
                yield from throughput(url, **some) if part == "throughput" else curator(url, python=python, **some)


# ------------------------------------------------------------------------- rows, as long as those of e-SNLI


def text_of(number: int) -> str:
    color = COLORS[number % len(COLORS)]
    return (
        f"A man in a {color} coat walks {number} dogs along the river while two children watch from a bench.</s>"
        f"Somebody is outdoors with {number} animals."
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A row for the sampler, made on demand."""

    template: prompts.Template
    number: int
    label: str = "entailment"

    @property
    def id(self) -> str:
        return f"row {self.number}"

    def prompt(self, *, hint: str | None) -> prompts.Prompt:
        return prompts.render(self.template, text_of(self.number), hint=hint)

    def read(self, text: str) -> tuple[str | None, str | None]:
        rationale, _, label = text.rpartition("\nAnswer: ")
        return rationale, label

    def agrees(self, label: str) -> bool:
        return label == self.label


def rows(count: int) -> Iterator[Row]:
    template = prompts.read("esnli")
    return (Row(template, number) for number in range(count))


def settings(concurrency: int) -> sampler.Settings:
    """Returns the defaults of `sbs teach`, so that it finds the replies stored here."""
    parameters = clients.Parameters(temperature=0.0, max_tokens=256)
    return sampler.Settings(model="some-model", form=clients.CHAT, parameters=parameters, concurrency=concurrency)


# ------------------------------------------------------------------------------------------------- sides


class Meter:
    """Counter of replies. The first `after` are the start: one burst, over connections that are not open yet."""

    def __init__(self, after: int) -> None:
        self._after, self._replies = after, 0
        self._start = self._begin = time.perf_counter(), time.process_time()

    def count(self, _: object = None) -> None:
        self._replies += 1
        if self._replies == self._after:
            self._begin = time.perf_counter(), time.process_time()

    def found(self) -> dict[str, float]:
        """Returns requests/s and CPU ms per request after the start, and requests/s of all."""
        seconds, cpu = time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]
        count = self._replies - self._after
        whole = time.perf_counter() - self._start[0]
        return {"per_second": count / seconds, "cpu_ms": 1000 * cpu / count, "whole_per_second": self._replies / whole}


def side_sampler(*, url: str, requests: int, concurrency: int) -> dict[str, float]:
    """Asks as `sbs teach` does: sampler, store, and the client with the SDK."""

    async def run(store: Store) -> dict[str, float]:
        teacher = providers.make("openai", base_url=f"{url}/v1", timeout=60.0, connections=concurrency)
        meter = Meter(concurrency)
        made = sampler.Sampler(
            settings=settings(concurrency), client=teacher, store=store, price=None, on_progress=meter.count
        )
        totals = await made.run(rows(requests))
        found = meter.found()
        await teacher.close()
        if totals.replies != requests or totals.retried:
            raise RuntimeError(f"{totals.replies} replies to {requests} requests, {totals.retried} repeated.")
        return found

    with tempfile.TemporaryDirectory() as folder, Store(f"{folder}/store.sqlite") as store:
        return {**asyncio.run(run(store)), "peak_mib": harness.peak_memory() / harness.MIB}


def side_client(*, url: str, requests: int, concurrency: int) -> dict[str, float]:
    """Asks with the client alone; its requests are made beforehand."""

    async def run() -> dict[str, float]:
        teacher = providers.make("openai", base_url=f"{url}/v1", timeout=60.0, connections=concurrency)
        made = iter([sampler.request_of(row, settings(concurrency), sample=0) for row in rows(requests)])
        meter = Meter(concurrency)

        async def work() -> None:
            for request in made:
                await teacher.ask(request)
                meter.count()

        await asyncio.gather(*(work() for _ in range(concurrency)))
        found = meter.found()
        await teacher.close()
        return found

    return asyncio.run(run())


def side_bare(*, url: str, requests: int, concurrency: int) -> dict[str, float]:
    """Sends the same bytes repeatedly over open connections: roughly the server's highest rate."""
    messages = [dataclasses.asdict(message) for message in next(rows(1)).prompt(hint=None).messages]
    asked = {"model": "some-model", "temperature": 0.0, "messages": messages, "max_tokens": 256}
    data = client.request("/v1/chat/completions", asked)

    async def run() -> dict[str, float]:
        opened = [client.Client(url) for _ in range(concurrency)]
        await asyncio.gather(*(each.open() for each in opened))
        left, meter = iter(range(requests)), Meter(concurrency)

        async def work(connection: client.Client) -> None:
            for _ in left:
                await connection.ask(data)
                meter.count()

        await asyncio.gather(*map(work, opened))
        found = meter.found()
        await asyncio.gather(*(each.close() for each in opened))
        return found

    return asyncio.run(run())


def side_memory(*, requests: int, concurrency: int) -> dict[str, float]:
    """Measures the peak memory of sampler and store with a teacher that answers at once."""

    class Instant:
        async def ask(self, request: clients.Request) -> clients.Reply:
            await asyncio.sleep(0)
            return clients.Reply(text=REPLY, finish="stop", input_tokens=900, output_tokens=20, model=request.model)

        async def close(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder, Store(f"{folder}/store.sqlite") as store:
        made = sampler.Sampler(settings=settings(concurrency), client=Instant(), store=store, price=None)
        asyncio.run(made.run(rows(requests)))
        return {"peak_mib": harness.peak_memory() / harness.MIB}


def side_fill(*, folder: str, requests: int) -> dict[str, float]:
    """Writes a store with a reply to every row but the last ones, and the rows as a file."""
    some: dict[str, clients.Reply] = {}
    place = Path(folder) / "esnli"
    place.mkdir()
    with Store(f"{folder}/store.sqlite") as store, (place / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in rows(requests):
            file.write(json.dumps({"id": row.id, "input": text_of(row.number), "label": row.label}) + "\n")
            if row.number < requests - MISSING:
                key = sampler.request_of(row, settings(1), sample=0).key
                some[key] = clients.Reply(
                    text=f"{row.number} dogs. {REPLY}", finish="stop", input_tokens=900, output_tokens=20, model="m"
                )
            if len(some) == 50_000:
                store.put_all(some)
                some = {}
        store.put_all(some)
        return {"stored": store.counts()["replies"]}


def side_resume(*, folder: str, requests: int) -> dict[str, float]:
    """Measures the seconds from the start of the run to its first request."""

    class Asked:
        at: float | None = None

        async def ask(self, request: clients.Request) -> clients.Reply:
            del request
            self.at = self.at or time.perf_counter()
            raise clients.Fatal("seen")  # ends the run without changing the store

        async def close(self) -> None:
            pass

    teacher = Asked()
    with Store(f"{folder}/store.sqlite") as store:
        made = sampler.Sampler(settings=settings(64), client=teacher, store=store, price=None)
        start = time.perf_counter()
        with contextlib.suppress(clients.Fatal):
            asyncio.run(made.run(rows(requests)))
        if teacher.at is None or made.totals.found != requests - MISSING:
            raise RuntimeError(f"{made.totals.found} replies were found of {requests - MISSING}.")
        return {"seconds": teacher.at - start, "peak_mib": harness.peak_memory() / harness.MIB}


# ------------------------------------------------------------------------------------------------- parts


def median(found: list[dict[str, Any]], name: str) -> float:
    return statistics.median(each[name] for each in found)


def listed(found: list[dict[str, Any]], name: str) -> str:
    return harness.listed([each[name] for each in found])


def throughput(url: str, *, rounds: int, requests: int, concurrency: int) -> Iterator[harness.Row]:
    """Measures the three sides in turns, against one server."""

    def asked(side: Any, *, requests: int = requests, concurrency: int = concurrency) -> dict[str, Any]:
        return harness.once(side, url=url, requests=requests, concurrency=concurrency)

    sides = {"sampler": side_sampler, "client": side_client, "bare": side_bare}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(asked(side))
    for side, results in found.items():
        rates, cpu = listed(results, "per_second"), listed(results, "cpu_ms")
        print(f"{side} with {concurrency} in flight: {rates} requests/s, CPU ms per request {cpu}", flush=True)
    ours, ideal = median(found["sampler"], "per_second"), concurrency / LATENCY
    share = ours / median(found["bare"], "per_second")
    print(f"of the rate of a bare loop against this server: {share:.0%}; of the ideal: {ours / ideal:.1%}")
    fewer = min(64, concurrency)
    rate = asked(side_sampler, requests=max(2 * fewer, requests // 4), concurrency=fewer)["per_second"]
    print(f"sampler with {fewer} in flight: {rate:.0f} requests/s, {rate * LATENCY / fewer:.0%} of the ideal")
    small, large = asked(side_sampler, requests=2 * concurrency)["peak_mib"], median(found["sampler"], "peak_mib")
    print(f"peak memory with the SDK: {small:.0f} MiB after {2 * concurrency} requests, {large:.0f} after {requests}")
    versions = harness.versions("openai", "httpx2")
    yield harness.Row("teacher_throughput_vs_ideal", "requests/s", ours, ideal, ">= 0.9", versions)
    # In addition to the SDK's; the peer is the goal's 1 ms.
    cpu_ms = max(0.0, median(found["sampler"], "cpu_ms") - median(found["client"], "cpu_ms"))
    yield harness.Row("teacher_cpu_ms_per_request", "ms", cpu_ms, 1.0, "< 1", versions)


def memory(*, few: int, many: int, concurrency: int) -> harness.Row:
    many_peak, few_peak = (
        harness.once(side_memory, requests=count, concurrency=concurrency)["peak_mib"] for count in (many, few)
    )
    return harness.Row("teacher_memory_100k_vs_1k", "MiB", many_peak, few_peak, "<= 1.1", harness.versions())


def resume(*, count: int, rounds: int) -> harness.Row:
    """Measures the sampler, and the whole command, which first imports the datasets and reads the rows."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        stored = harness.once(side_fill, folder=folder, requests=count)["stored"]
        print(f"{stored} replies stored in {time.perf_counter() - start:.0f} s", flush=True)
        found = [harness.once(side_resume, folder=folder, requests=count) for _ in range(rounds)]
        print(f"from the start of the sampler: {listed(found, 'seconds')} s; peak {found[0]['peak_mib']:.0f} MiB")
        print(f"from the start of `sbs teach`: {first_request(folder, count):.1f} s", flush=True)
    return harness.Row("teacher_resume_549k_s", "s", median(found, "seconds"), 10.0, "<= 1", harness.versions())


def first_request(folder: str, count: int) -> float:
    """Returns seconds from the start of `sbs teach` until its first request arrives (and is refused: it ends)."""
    arrived: list[tuple[float, str]] = []

    def refuse(number: int, body: dict[str, Any]) -> int:
        del number
        arrived.append((time.perf_counter(), body["messages"][-1]["content"]))
        return 404

    flags = ["--dataset", "esnli", "--inputs", "records", "--inputs_dir", folder, "--provider", "openai"]
    flags += ["--model", "some-model", "--store", f"{folder}/store.sqlite", "--records_dir", f"{folder}/out"]
    with harness.of_tests("teacher_server").served(faults=refuse, keep=False) as server:
        start = time.perf_counter()
        command = [*harness.SBS, "teach", *flags, "--base_url", server.openai]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not arrived:
        raise RuntimeError(f"`sbs teach` asked nothing:\n{done.stderr[-3000:]}")
    wanted = [f" {number} animals" for number in range(count - MISSING, count)]
    for _, asked in arrived:
        if not any(text in asked for text in wanted):
            raise RuntimeError(f"`sbs teach` asked about a row whose reply is stored: {asked!r}")
    return arrived[0][0] - start


def curator(url: str, *, python: str | None, rounds: int, requests: int, concurrency: int) -> Iterator[harness.Row]:
    """Measures whole runs of ours and of bespokelabs-curator in turns, connecting and storing included."""
    if python is None:
        print("curator is not measured: bespokelabs-curator is not installed; name an interpreter with --curator.")
    made = [row.prompt(hint=None).messages for row in rows(requests)]
    messages = {
        "head": [dataclasses.asdict(message) for message in made[0][:-1]],  # shared by all prompts
        "last": [message[-1].content for message in made],
    }
    ours: list[dict[str, Any]] = []
    peer: list[dict[str, Any]] = []
    for _ in range(rounds):
        ours.append(harness.once(side_sampler, url=url, requests=requests, concurrency=concurrency))
        if python is not None:
            given = json.dumps({"url": url, "concurrency": concurrency, **messages})
            command = [python, str(Path(__file__).with_name("curator.py"))]
            done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True)
            peer.append(json.loads(done.stdout.splitlines()[-1]))
    versions = harness.versions("openai", "httpx2")
    print(f"sampler, whole runs with {concurrency} in flight: {listed(ours, 'whole_per_second')} requests/s")
    if peer:
        versions["bespokelabs-curator"] = peer[0]["version"]
        if not peer[0]["counted"]:
            print("curator guesses tokens instead of counting them (tiktoken is offline), which is less work for it")
        print(f"curator, whole runs with {concurrency} in flight: {listed(peer, 'whole_per_second')} requests/s")
    rate, its_rate = median(ours, "whole_per_second"), median(peer, "whole_per_second") if peer else None
    yield harness.Row("teacher_throughput_vs_curator", "requests/s", rate, its_rate, ">= 1", versions)
