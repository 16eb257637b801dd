"""Measures `sbs serve`: latency under 200 clients against that of a batch on the idle server, and memory over time.

    make bench-serve                                            # appends to bench.json
    python scripts/bench_serve.py --only latency --requests 2000
    python scripts/bench_serve.py --only memory --student builtin

The server is `sbs serve` in a process of its own; the clients are another process. What was measured, and how:
docs/speed.md.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import bench

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 200
BATCH = 128  # rows that the server takes from its queue at once, as by default
UNLOADED = 5  # batches on the idle server, before and after
STUDENTS = {
    # Weights that were never trained end no answer early: every row takes the whole of its length.
    "small": {"gin": "gin_configs/models/t5_1_1_small.gin", "inputs": 64, "answer": 16},
    "builtin": {"gin": "gin_configs/experiments/builtin/student.gin", "inputs": 32, "answer": 4},
}
PARTS = ("latency", "memory")
MIB = 2**20


# ------------------------------------------------------------------------------------------ the student


def write_student(folder: Path, name: str) -> None:
    """A run directory: the embedded student as it is, or a T5 with weights that were never trained."""
    import jax

    from sbs_jax import checkpoints, configuration, datasets, t5
    from tasks import builtin

    chosen = STUDENTS[name]
    gin_files = ["gin_configs/runs/train.gin", chosen["gin"], "gin_configs/methods/step_by_step.gin"]
    lengths = {"inputs": chosen["inputs"], "targets": 32}
    bindings = {
        "DATASET": "builtin",
        "RECORDS_DIR": str(folder),
        "MODEL_DIR": str(folder),
        "VOCABULARY": builtin.vocabulary_path(),
        "TASK_FEATURE_LENGTHS": lengths,
        "EXAMPLES": 1,
        "TRAIN_STEPS": 1,
        "LEARNING_RATE": 1e-3,
        "MAX_DECODE_LENGTH": chosen["answer"],
    }
    config, _ = configuration.configure(
        "train.TrainConfig", gin_files=gin_files, bindings=[f"{key}={value!r}" for key, value in bindings.items()]
    )
    _, parameters = t5.init(config.model, seed=0)
    if name == "builtin":
        like = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for key, x in parameters.items()}
        parameters = checkpoints.load_parameters(builtin.student_path(), like=like)
    checkpoints.save_parameters(folder, parameters, config=config.model, step=1)
    run = {
        "mixture_or_task_name": config.mixture_or_task_name,
        "task_feature_lengths": lengths,
        "max_decode_length": chosen["answer"],
        "primary_metric": datasets.split_task(config.mixture_or_task_name)[0].primary_metric,
    }
    manifest = {"run": run, "data": {"options": dataclasses.asdict(config.data)}}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


@contextlib.contextmanager
def served(folder: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server of the student: its address, and its process, which must end in good order."""
    command = [sys.executable, "-m", "sbs_jax.main", "serve", "--model", str(folder), "--port", "0", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"ready: (http://\S+)", line)
        if found is None:
            raise RuntimeError(f"the server said {line!r}; what is wrong stands above.")
        print(line.strip(), file=sys.stderr)
        yield found[1], process
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        if status:
            raise RuntimeError(f"the server ended with status {status}.")
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


# ------------------------------------------------------------------------------------------ the clients


def write_inputs(folder: Path, *, count: int = 2000) -> str:
    """Questions for the clients, which import as little as they can; the file."""
    from tasks import builtin

    random_ = random.Random(0)
    file = folder / "inputs.json"
    file.write_text(json.dumps([builtin.random_problem(random_).text for _ in range(count)]))
    return str(file)


def request(rows: Sequence[Mapping[str, Any]]) -> bytes:
    body = json.dumps({"inputs": list(rows)}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection:
    """One client's connection, kept open."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._host, self._port = host, int(port)

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        self._writer.write(data)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        assert length is not None
        return int(head.split(None, 2)[1]), await self._reader.readexactly(int(length[1]))

    async def leave(self, data: bytes) -> None:
        """Asks, and goes away without an answer."""
        self._writer.write(data)
        await self._writer.drain()
        self.close()
        await self.open()

    def close(self) -> None:
        self._writer.close()


def side_clients(*, url: str, inputs: str, clients: int, requests: int, unruly: int) -> dict[str, Any]:
    """So many clients, each of which asks again when it has its answer, until there were so many requests.

    Every `unruly`-th request (0: none) is not what it should be: a bad body or a client that leaves, in turn.
    """
    texts = json.loads(Path(inputs).read_text("utf-8"))
    numbers = itertools.count()
    latencies: list[float] = []
    errors: list[str] = []

    async def work(start: asyncio.Event) -> None:
        connection = Connection(url)
        await connection.open()
        await start.wait()
        while (number := next(numbers)) < requests:
            row = {"id": str(number), "input": texts[number % len(texts)]}
            if unruly and number % unruly == 0:
                if number // unruly % 2:
                    await connection.leave(request([row]))
                else:
                    status, body = await connection.ask(request([row])[:-1] + b"x")
                    if status != 400:
                        errors.append(f"{status} to a bad body: {body[:200]!r}")
                continue
            began = time.perf_counter()
            status, body = await connection.ask(request([row]))
            latencies.append(time.perf_counter() - began)
            answer = json.loads(body).get("answers", [{}])[0]
            if status != 200 or answer.get("id") != str(number) or "prediction" not in answer:
                errors.append(f"{status}: {body[:200]!r}")
        connection.close()

    async def run() -> float:
        start = asyncio.Event()
        tasks = [asyncio.ensure_future(work(start)) for _ in range(clients)]
        await asyncio.sleep(0.2)
        began = time.perf_counter()
        start.set()
        await asyncio.gather(*tasks)
        return time.perf_counter() - began

    seconds = asyncio.run(run())
    # The first round comes in one burst and waits for no answer before: it is left out.
    steady = sorted(latencies[clients:]) or sorted(latencies)
    return {
        "p50": statistics.median(steady),
        "p99": steady[min(len(steady) - 1, int(0.99 * len(steady)))],
        "longest": steady[-1],
        "per_second": len(latencies) / seconds,
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
    }


def side_unloaded(*, url: str, inputs: str, rows: int, times: int) -> dict[str, Any]:
    """Requests of so many rows on an idle server, one after the other."""
    texts = json.loads(Path(inputs).read_text("utf-8"))

    async def run() -> list[float]:
        connection = Connection(url)
        await connection.open()
        found = []
        for number in range(times + 1):
            chosen = [texts[(rows * number + place) % len(texts)] for place in range(rows)]
            data = request([{"id": str(place), "input": text} for place, text in enumerate(chosen)])
            began = time.perf_counter()
            status, body = await connection.ask(data)
            found.append(time.perf_counter() - began)
            if status != 200:
                raise RuntimeError(f"{status}: {body[:300]!r}")
        connection.close()
        return found[1:]

    found = asyncio.run(run())
    return {"median": statistics.median(found), "longest": max(found)}


SIDES = {"clients": side_clients, "unloaded": side_unloaded}


def measured(side: str, **options: Any) -> dict[str, Any]:
    """What a side found, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--options", json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise RuntimeError(f"{side} ended with status {done.returncode}; what it said stands above.")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------- rows


def latency(folder: Path, arguments: argparse.Namespace) -> list[bench.Row]:
    file, batch_rows = write_inputs(folder), arguments.max_batch
    with served(folder, f"--max_batch={batch_rows}", *arguments.flags) as (url, _):
        ask = functools.partial(measured, url=url, inputs=file)
        alone = ask("unloaded", rows=1, times=4 * UNLOADED)
        before = ask("unloaded", rows=batch_rows, times=UNLOADED)
        loaded = ask("clients", clients=arguments.clients, requests=arguments.requests, unruly=0)
        after = ask("unloaded", rows=batch_rows, times=UNLOADED)
    batch = statistics.median([before["median"], after["median"]])
    print(
        f"{arguments.clients} clients: p50 {loaded['p50']:.3f} s, p99 {loaded['p99']:.3f} s, longest "
        f"{loaded['longest']:.3f} s, {loaded['per_second']:.1f} rows/s, {loaded['errors']} errors; unloaded: one row "
        f"{alone['median']:.3f} s, {batch_rows} rows {before['median']:.3f} s before and "
        f"{after['median']:.3f} s after."
    )
    if loaded["errors"]:
        raise RuntimeError(f"{loaded['errors']} errors, the first: {loaded['first_error']}")
    return [row("serve_p99_vs_unloaded", "s", loaded["p99"], batch, "<= 3")]


def memory(folder: Path, arguments: argparse.Namespace) -> list[bench.Row]:
    """Resident memory after a tenth of the requests, and after all of them."""
    found: list[tuple[int, int]] = []
    parts, warm = 50, max(arguments.memory_requests // 10, arguments.clients)
    options = {"inputs": write_inputs(folder), "clients": arguments.clients, "unruly": 50}
    with served(folder, *arguments.flags) as (url, process):
        done = 0
        for part in [warm] + [arguments.memory_requests // parts] * parts:
            told = measured("clients", url=url, requests=part, **options)
            if told["errors"]:
                raise RuntimeError(f"{told['errors']} errors, the first: {told['first_error']}")
            done += part
            found.append((done, resident(process.pid)))
    requests, sizes = zip(*found, strict=True)
    slope = statistics.linear_regression(requests, sizes).slope
    fifth = len(sizes) // 5
    first, last = statistics.median(sizes[:fifth]), statistics.median(sizes[-fifth:])
    print(
        f"memory: {sizes[0] / MIB:.1f} MiB after {requests[0]} requests, {sizes[-1] / MIB:.1f} MiB after "
        f"{requests[-1]}; {slope:.1f} bytes per request by least squares."
    )
    return [row("serve_memory_growth", "MiB", last / MIB, first / MIB, "<= 1.02")]


def resident(pid: int) -> int:
    """Bytes of memory that a process has resident (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status tells no memory.")


def row(name: str, unit: str, ours: float, peer: float, goal: str) -> bench.Row:
    versions = bench.versions("jax", "jaxlib", "starlette", "uvicorn", "h11")
    return bench.Row(name=name, unit=unit, ours=ours, peer=peer, goal=goal, versions=versions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--student", choices=list(STUDENTS), default="small", help="of the latency")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--max_batch", type=int, default=BATCH)
    parser.add_argument(
        "--flags", nargs="*", default=[], help="more flags for sbs serve, such as --flags=--batch_size=64"
    )
    parser.add_argument("--requests", type=int, default=2000, help="of the latency")
    parser.add_argument("--memory_requests", type=int, default=50_000)
    parser.add_argument("--output", default="bench.json")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](**json.loads(arguments.options))))
        return 0
    rows = []
    for part, student in (("latency", arguments.student), ("memory", "builtin")):
        if part in arguments.only:
            with tempfile.TemporaryDirectory(prefix="sbs-bench-serve-") as folder:
                write_student(Path(folder), student)
                rows += {"latency": latency, "memory": memory}[part](Path(folder), arguments)
    bench.append(arguments.output, rows)
    print(bench.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
