"""Measures the asking of a teacher: throughput, CPU time, memory, and how soon a long run goes on.

    make bench                                                  # after the training step; appends to bench.json
    python scripts/bench_teacher.py --rounds 1 --requests 4000  # shorter
    python scripts/bench_teacher.py --only resume memory --curator curator/bin/python

The teacher is a server on this machine, in a process of its own, that answers after 50 ms. Everything measured is a
process of its own too. What was measured, and how: docs/speed.md.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sbs_jax import bench
from sbs_jax.teacher import clients, prompts, sampler
from sbs_jax.teacher.store import Store

ROOT = Path(__file__).resolve().parents[1]
LATENCY = 0.05
REPLY = "Somebody who walks dogs along a river is outdoors with animals.\nAnswer: entailment"
ESNLI_ROWS, MISSING = 549_367, 10
PARTS = ("throughput", "memory", "resume", "curator")
COLORS = ("red", "green", "blue", "black", "white", "yellow", "brown", "grey")
MIB = 2**20


# ------------------------------------------------------------------------- rows, as long as those of e-SNLI


def text_of(number: int) -> str:
    color = COLORS[number % len(COLORS)]
    return (
        f"A man in a {color} coat walks {number} dogs along the river while two children watch from a bench.</s>"
        f"Somebody is outdoors with {number} animals."
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as the sampler asks about it, made when it is its turn."""

    template: prompts.Template
    number: int

    @property
    def id(self) -> str:
        return f"row {self.number}"

    @property
    def label(self) -> str:
        return "entailment"

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
    """Those of `sbs teach` where nothing is said, so that it finds what is stored here."""
    parameters = clients.Parameters(temperature=0.0, max_tokens=256)
    return sampler.Settings(model="some-model", form=clients.CHAT, parameters=parameters, concurrency=concurrency)


# --------------------------------------------------------- sides: each a process, which prints what it found


class Meter:
    """Counts replies. The first `after` are the start: they come in one burst, over connections still to be made."""

    def __init__(self, after: int) -> None:
        self._after, self._replies = after, 0
        self._start = self._begin = time.perf_counter(), time.process_time()

    def count(self, _: object = None) -> None:
        self._replies += 1
        if self._replies == self._after:
            self._begin = time.perf_counter(), time.process_time()

    def found(self) -> dict[str, float]:
        """Requests per second and CPU milliseconds per request after the start; seconds of all."""
        seconds, cpu = time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]
        count = self._replies - self._after
        whole = time.perf_counter() - self._start[0]
        return {"per_second": count / seconds, "cpu_ms": 1000 * cpu / count, "whole_per_second": self._replies / whole}


def side_sampler(*, url: str, requests: int, concurrency: int) -> dict[str, float]:
    """What `sbs teach` does: sampler, store, and the client with the SDK."""

    async def run(store: Store) -> dict[str, float]:
        client = clients.make("openai", base_url=f"{url}/v1", timeout=60.0, connections=concurrency)
        meter = Meter(concurrency)
        made = sampler.Sampler(
            settings=settings(concurrency), client=client, store=store, price=None, on_progress=meter.count
        )
        totals = await made.run(rows(requests))
        found = meter.found()
        await client.close()
        if totals.replies != requests or totals.retried:
            raise RuntimeError(f"{totals.replies} replies to {requests} requests, {totals.retried} repeated.")
        return found

    with tempfile.TemporaryDirectory() as folder, Store(f"{folder}/store.sqlite") as store:
        return {**asyncio.run(run(store)), "peak_mib": bench.peak_memory() / MIB}


def side_client(*, url: str, requests: int, concurrency: int) -> dict[str, float]:
    """The client alone, over requests that are there already."""

    async def run() -> dict[str, float]:
        client = clients.make("openai", base_url=f"{url}/v1", timeout=60.0, connections=concurrency)
        made = iter([sampler.request_of(row, settings(concurrency), sample=0) for row in rows(requests)])
        meter = Meter(concurrency)

        async def work() -> None:
            for request in made:
                await client.ask(request)
                meter.count()

        await asyncio.gather(*(work() for _ in range(concurrency)))
        found = meter.found()
        await client.close()
        return found

    return asyncio.run(run())


def side_bare(*, url: str, requests: int, concurrency: int) -> dict[str, float]:
    """The same bytes again and again over open connections: as much as the server can do beside a client."""
    host, _, port = url.removeprefix("http://").partition(":")
    messages = [dataclasses.asdict(message) for message in next(rows(1)).prompt(hint=None).messages]
    asked = {"model": "some-model", "temperature": 0.0, "messages": messages, "max_tokens": 256}
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    sent = head.encode() + body

    async def run() -> dict[str, float]:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        meter = Meter(concurrency)
        left = {"to ask": requests, "to come": requests}

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                self.transport, self.buffer = transport, b""
                self.ask()

            def ask(self) -> None:
                if left["to ask"]:
                    left["to ask"] -= 1
                    self.transport.write(sent)

            def data_received(self, data: bytes) -> None:
                self.buffer += data
                top, found, rest = self.buffer.partition(b"\r\n\r\n")
                if not found or len(rest) < int(top.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]):
                    return
                self.buffer = b""
                meter.count()
                left["to come"] -= 1
                if not left["to come"]:
                    done.set_result(None)
                self.ask()

        made = await asyncio.gather(
            *(loop.create_connection(Connection, host, int(port)) for _ in range(min(concurrency, requests)))
        )
        await done
        found = meter.found()
        for transport, _ in made:
            transport.close()
        return found

    return asyncio.run(run())


def side_memory(*, requests: int, concurrency: int) -> dict[str, float]:
    """The most memory that the sampler and the store have while a teacher answers at once."""

    class Instant:
        async def ask(self, request: clients.Request) -> clients.Reply:
            await asyncio.sleep(0)
            return clients.Reply(text=REPLY, finish="stop", input_tokens=900, output_tokens=20, model=request.model)

        async def close(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder, Store(f"{folder}/store.sqlite") as store:
        made = sampler.Sampler(settings=settings(concurrency), client=Instant(), store=store, price=None)
        asyncio.run(made.run(rows(requests)))
        return {"peak_mib": bench.peak_memory() / MIB}


def side_fill(*, folder: str, requests: int) -> dict[str, float]:
    """A store with a reply to every row but the last ones, and the rows as a file."""
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
    """Seconds from the start of the run until the first request is asked."""

    class Asked:
        at: float | None = None

        async def ask(self, request: clients.Request) -> clients.Reply:
            del request
            self.at = self.at or time.perf_counter()
            raise clients.Fatal("seen")  # ends the run, and leaves the store as it is

        async def close(self) -> None:
            pass

    client = Asked()
    with Store(f"{folder}/store.sqlite") as store:
        made = sampler.Sampler(settings=settings(64), client=client, store=store, price=None)
        start = time.perf_counter()
        with contextlib.suppress(clients.Fatal):
            asyncio.run(made.run(rows(requests)))
        if client.at is None or made.totals.found != requests - MISSING:
            raise RuntimeError(f"{made.totals.found} replies were found of {requests - MISSING}.")
        return {"seconds": client.at - start, "peak_mib": bench.peak_memory() / MIB}


SIDES: dict[str, Callable[..., dict[str, float]]] = {
    "sampler": side_sampler,
    "client": side_client,
    "bare": side_bare,
    "memory": side_memory,
    "fill": side_fill,
    "resume": side_resume,
}


def measured(side: str, **options: Any) -> dict[str, Any]:
    """What a side found, in a process of its own."""
    return _last_line([sys.executable, str(Path(__file__).resolve()), "--side", side, json.dumps(options)])


def _last_line(command: list[str], **environment: str) -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _server() -> Any:
    """tests/teacher_server.py."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        return importlib.import_module("teacher_server")
    finally:
        sys.path.pop(0)


# ------------------------------------------------------------------------------------------------- parts


def median(found: list[dict[str, Any]], name: str) -> float:
    return statistics.median(each[name] for each in found)


def listed(found: list[dict[str, Any]], name: str) -> str:
    return " ".join(f"{each[name]:.4g}" for each in found)


def throughput(url: str, *, rounds: int, requests: int, concurrency: int) -> list[bench.Row]:
    """The three sides in turns, against one server."""
    found: dict[str, list[dict[str, Any]]] = {"sampler": [], "client": [], "bare": []}
    for _ in range(rounds):
        for side, results in found.items():
            results.append(measured(side, url=url, requests=requests, concurrency=concurrency))
    for side, results in found.items():
        print(
            f"{side} with {concurrency} in flight: {listed(results, 'per_second')} requests/s, "
            f"CPU ms per request {listed(results, 'cpu_ms')}",
            flush=True,
        )
    ours = median(found["sampler"], "per_second")
    ideal = concurrency / LATENCY
    share = ours / median(found["bare"], "per_second")
    print(f"of what a bare loop gets from this server: {share:.0%}; of the ideal: {ours / ideal:.1%}")
    fewer = min(64, concurrency)
    few = measured("sampler", url=url, requests=max(2 * fewer, requests // 4), concurrency=fewer)
    print(
        f"sampler with {fewer} in flight: {few['per_second']:.0f} requests/s, {few['per_second'] * LATENCY / fewer:.0%}"
    )
    small = measured("sampler", url=url, requests=2 * concurrency, concurrency=concurrency)
    print(
        f"peak memory with the SDK: {small['peak_mib']:.0f} MiB after {2 * concurrency} requests, "
        f"{median(found['sampler'], 'peak_mib'):.0f} MiB after {requests}"
    )
    total, alone = median(found["sampler"], "cpu_ms"), median(found["client"], "cpu_ms")
    versions = bench.versions("openai", "httpx2")
    return [
        bench.Row(
            name="teacher_throughput_vs_ideal",
            unit="requests/s",
            ours=ours,
            peer=ideal,
            goal=">= 0.9",
            versions=versions,
        ),
        # Beside the SDK's; the peer is the goal's 1 ms.
        bench.Row(
            name="teacher_cpu_ms_per_request",
            unit="ms",
            ours=max(0.0, total - alone),
            peer=1.0,
            goal="< 1",
            versions=versions,
        ),
    ]


def memory(*, few: int, many: int, concurrency: int) -> list[bench.Row]:
    peaks = [measured("memory", requests=count, concurrency=concurrency)["peak_mib"] for count in (many, few)]
    return [
        bench.Row(
            name="teacher_memory_100k_vs_1k",
            unit="MiB",
            ours=peaks[0],
            peer=peaks[1],
            goal="<= 1.1",
            versions=bench.versions(),
        )
    ]


def resume(*, count: int, rounds: int) -> list[bench.Row]:
    """Also of the whole command, which first imports the datasets and reads the rows."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        stored = measured("fill", folder=folder, requests=count)["stored"]
        print(f"{stored} replies stored in {time.perf_counter() - start:.0f} s", flush=True)
        found = [measured("resume", folder=folder, requests=count) for _ in range(rounds)]
        print(f"from the start of the sampler: {listed(found, 'seconds')} s; peak {found[0]['peak_mib']:.0f} MiB")
        print(f"from the start of `sbs teach`: {_first_request(folder, count):.1f} s", flush=True)
    return [
        bench.Row(
            name="teacher_resume_549k_s",
            unit="s",
            ours=median(found, "seconds"),
            peer=10.0,
            goal="<= 1",
            versions=bench.versions(),
        )
    ]


def _first_request(folder: str, count: int) -> float:
    """Seconds from the start of `sbs teach` until its first request arrives (and is refused, which ends it)."""
    arrived: list[tuple[float, str]] = []

    def refuse(number: int, body: dict[str, Any]) -> int:
        del number
        arrived.append((time.perf_counter(), body["messages"][-1]["content"]))
        return 404

    with _server().served(faults=refuse, keep=False) as server:
        start = time.perf_counter()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "sbs_jax.main", "teach", "--dataset", "esnli", "--inputs", "records"),
                *("--inputs_dir", folder, "--provider", "openai", "--model", "some-model"),
                *("--base_url", server.openai, "--store", f"{folder}/store.sqlite", "--records_dir", f"{folder}/out"),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    if not arrived:
        raise RuntimeError(f"`sbs teach` asked nothing:\n{done.stderr[-3000:]}")
    wanted = [f" {number} animals" for number in range(count - MISSING, count)]
    for _, asked in arrived:
        if not any(text in asked for text in wanted):
            raise RuntimeError(f"`sbs teach` asked about a row whose reply is stored: {asked!r}")
    return arrived[0][0] - start


def curator(url: str, *, python: str | None, rounds: int, requests: int, concurrency: int) -> list[bench.Row]:
    """Ours and bespokelabs-curator in turns, whole runs: connecting and storing are part of them."""
    ours: list[dict[str, Any]] = []
    peer: list[dict[str, Any]] = []
    if python is None:
        print("curator is not measured: bespokelabs-curator is not installed; name an interpreter with --curator.")
    for _ in range(rounds):
        ours.append(measured("sampler", url=url, requests=requests, concurrency=concurrency))
        if python is not None:
            script = str(Path(__file__).resolve().with_name("bench_teacher_curator.py"))
            options = {"url": url, "requests": requests, "concurrency": concurrency, **_messages(requests)}
            with tempfile.TemporaryDirectory() as folder:
                given = Path(folder) / "options.json"
                given.write_text(json.dumps(options), "utf-8")
                peer.append(_last_line([python, script, str(given)], CURATOR_CACHE_DIR=folder))
    print(f"sampler, whole runs with {concurrency} in flight: {listed(ours, 'whole_per_second')} requests/s")
    if peer:
        if not peer[0]["counted"]:
            print("curator guesses tokens instead of counting them (tiktoken is offline), which is less work for it")
        print(f"curator, whole runs with {concurrency} in flight: {listed(peer, 'whole_per_second')} requests/s")
    return [
        bench.Row(
            name="teacher_throughput_vs_curator",
            unit="requests/s",
            ours=median(ours, "whole_per_second"),
            peer=median(peer, "whole_per_second") if peer else None,
            goal=">= 1",
            versions=bench.versions("openai", "httpx2") | ({"bespokelabs-curator": peer[0]["version"]} if peer else {}),
        )
    ]


def _messages(count: int) -> dict[str, Any]:
    """What all prompts share, and how each ends."""
    made = [row.prompt(hint=None).messages for row in rows(count)]
    return {
        "head": [dataclasses.asdict(message) for message in made[0][:-1]],
        "last": [messages[-1].content for messages in made],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--requests", type=int, default=10_000, help="requests in a turn")
    parser.add_argument("--concurrency", type=int, default=1000, help="requests in flight")
    parser.add_argument("--few", type=int, default=1000, help="rows, for memory")
    parser.add_argument("--many", type=int, default=100_000, help="rows, for memory")
    parser.add_argument("--stored", type=int, default=ESNLI_ROWS, help="rows of the run that goes on")
    parser.add_argument("--curator", metavar="PYTHON", help="interpreter that has bespokelabs-curator")
    parser.add_argument("--output", default="bench.json", help="file to append the results to")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        name, options = arguments.side
        print(json.dumps(SIDES[name](**json.loads(options))))
        return 0
    if arguments.requests < 2 * arguments.concurrency:
        parser.error(f"--requests is {arguments.requests}; expected at least twice --concurrency.")
    peer = arguments.curator or (sys.executable if importlib.util.find_spec("bespokelabs") else None)
    wanted = [part for part in PARTS if part in arguments.only]
    if importlib.util.find_spec("openai") is None:
        print("Only memory is measured: the SDKs are missing; pip install 'sbs-jax[teacher]'")
        wanted = [part for part in wanted if part == "memory"]
    some = {"rounds": arguments.rounds, "requests": arguments.requests, "concurrency": arguments.concurrency}
    found: list[bench.Row] = []
    for part in wanted:
        print(f"-- {part}; load {os.getloadavg()[0]:.1f}", flush=True)
        if part == "memory":
            found += memory(few=arguments.few, many=arguments.many, concurrency=arguments.concurrency)
        elif part == "resume":
            found += resume(count=arguments.stored, rounds=arguments.rounds)
        else:
            with _server().apart(latency=LATENCY, reply=REPLY) as url:
                if part == "throughput":
                    found += throughput(url, **some)
                else:
                    found += curator(url, python=peer, **some)
    bench.append(arguments.output, found)
    print(bench.table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
