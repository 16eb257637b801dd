"""Measures `sbs serve`: its first answer, latency under 200 clients against that of a batch on the idle server, memory.

    make bench-serve
    python scripts/bench.py serve --only first --starts 3
    python scripts/bench.py serve --only latency --requests 2000
    python scripts/bench.py serve --only memory

The server is `sbs serve` in a separate process; the clients are another one. Results: docs/speed.md.
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
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import client, harness

CLIENTS = 200
BATCH = 128  # rows that the server takes from its queue at once, as by default
UNLOADED = 5  # batches on the idle server, before and after
STUDENTS = {
    # Untrained weights never end an answer early, so every row takes its full length.
    "small": {"gin": "gin_configs/models/t5_1_1_small.gin", "inputs": 64, "answer": 16},
    "builtin": {"gin": "gin_configs/experiments/builtin/student.gin", "inputs": 32, "answer": 4},
}
PARTS = ("first", "latency", "memory")
VERSIONS = ("jax", "jaxlib", "starlette", "uvicorn", "h11", "pydantic")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--starts", type=int, default=3, help="of the first answer, without a cache and with one")
    parser.add_argument("--student", choices=list(STUDENTS), default="small", help="of the latency")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--max_batch", type=int, default=BATCH)
    parser.add_argument(
        "--flags", nargs="*", default=[], help="more flags for sbs serve, such as --flags=--batch_size=64"
    )
    parser.add_argument("--requests", type=int, default=2000, help="of the latency")
    parser.add_argument("--memory_requests", type=int, default=50_000)


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    if "first" in arguments.only:
        with tempfile.TemporaryDirectory(prefix="sbs-bench-serve-") as folder:
            write_student(Path(folder), "builtin")
            yield from first_answers(Path(folder), arguments)
    for part, student in (("latency", arguments.student), ("memory", "builtin")):
        if part in arguments.only:
            with tempfile.TemporaryDirectory(prefix="sbs-bench-serve-") as folder:
                write_student(Path(folder), student)
                yield {"latency": latency, "memory": memory}[part](Path(folder), arguments)


# ------------------------------------------------------------------------------------------ the student


def write_student(folder: Path, name: str) -> None:
    """Writes a run directory: the embedded student, or a T5 with random weights."""
    import jax

    from sbs_jax.data import task_names
    from sbs_jax.run import checkpoints
    from sbs_jax.student import families
    from sbs_jax.training import gin_files
    from sbs_jax.weights import opening
    from tasks import builtin

    chosen = STUDENTS[name]
    files = ["gin_configs/runs/train.gin", chosen["gin"], "gin_configs/methods/step_by_step.gin"]
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
    config, _ = gin_files.configure(
        "train.TrainConfig", gin_files=files, bindings=[f"{key}={value!r}" for key, value in bindings.items()]
    )
    _, parameters = families.init(config.model, seed=0)
    if name == "builtin":
        like = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for key, x in parameters.items()}
        parameters = opening.load_parameters(builtin.student_path(), like=like)
    checkpoints.save_parameters(folder, parameters, config=config.model, step=1)
    run = {
        "mixture_or_task_name": config.mixture_or_task_name,
        "task_feature_lengths": lengths,
        "max_decode_length": chosen["answer"],
        "primary_metric": task_names.split(config.mixture_or_task_name)[0].primary_metric,
    }
    manifest = {"run": run, "data": {"options": dataclasses.asdict(config.data)}}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


@contextlib.contextmanager
def served(folder: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Starts a server of the student; yields its address and process. It must end without an error."""
    command = [*harness.SBS, "serve", str(folder), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"ready: (http://\S+)", line)
        if found is None:
            raise RuntimeError(f"the server is not ready, it printed {line!r}; its messages are above.")
        print(line.strip(), file=sys.stderr)
        while not all_programs(found[1]):
            time.sleep(0.2)
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


def all_programs(url: str) -> bool:
    """Tells whether nothing is compiled beside serving any more."""
    with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
        programs = json.load(response)["programs"]
    return programs["ready"] == programs["count"]


# ------------------------------------------------------------------------------------------ the clients


def write_inputs(folder: Path, *, count: int = 2000) -> str:
    """Writes questions for the clients, which import as little as they can; returns the file."""
    from tasks import builtin

    random_ = random.Random(0)
    file = folder / "inputs.json"
    file.write_text(json.dumps([builtin.random_problem(random_).text for _ in range(count)]))
    return str(file)


def request(*rows: Mapping[str, Any]) -> bytes:
    return client.request("/predict", {"inputs": rows})


def side_clients(*, url: str, inputs: str, clients: int, requests: int, unruly: int) -> dict[str, Any]:
    """Runs `clients` clients, each with one request at a time, until `requests` requests are sent.

    Every `unruly`-th request (0: none) has a bad body, or its client disconnects, in turn.
    """
    texts = json.loads(Path(inputs).read_text("utf-8"))
    numbers = itertools.count()
    latencies: list[float] = []
    errors: list[str] = []

    async def work(start: asyncio.Event) -> None:
        connection = client.Client(url)
        await connection.open()
        await start.wait()
        while (number := next(numbers)) < requests:
            row = {"id": str(number), "input": texts[number % len(texts)]}
            if unruly and number % unruly == 0:
                if number // unruly % 2:
                    await connection.leave(request(row))
                else:
                    status, body = await connection.ask(request(row)[:-1] + b"x")
                    if status != 400:
                        errors.append(f"{status} to a bad body: {body[:200]!r}")
                continue
            began = time.perf_counter()
            status, body = await connection.ask(request(row))
            latencies.append(time.perf_counter() - began)
            answer = json.loads(body).get("answers", [{}])[0]
            if status != 200 or answer.get("id") != str(number) or "prediction" not in answer:
                errors.append(f"{status}: {body[:200]!r}")
        await connection.close()

    async def run() -> float:
        start = asyncio.Event()
        tasks = [asyncio.ensure_future(work(start)) for _ in range(clients)]
        await asyncio.sleep(0.2)
        began = time.perf_counter()
        start.set()
        await asyncio.gather(*tasks)
        return time.perf_counter() - began

    seconds = asyncio.run(run())
    # The first round is one burst that waits for no earlier answer: it is left out.
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
    """Sends `times` requests of `rows` rows to an idle server, one after the other."""
    texts = json.loads(Path(inputs).read_text("utf-8"))

    async def run() -> list[float]:
        connection = client.Client(url)
        await connection.open()
        found = []
        for number in range(times + 1):
            chosen = [texts[(rows * number + place) % len(texts)] for place in range(rows)]
            data = request(*({"id": str(place), "input": text} for place, text in enumerate(chosen)))
            began = time.perf_counter()
            status, body = await connection.ask(data)
            found.append(time.perf_counter() - began)
            if status != 200:
                raise RuntimeError(f"{status}: {body[:300]!r}")
        await connection.close()
        return found[1:]

    found = asyncio.run(run())
    return {"median": statistics.median(found), "longest": max(found)}


# ------------------------------------------------------------------------------------------------- rows


def first_answers(folder: Path, arguments: argparse.Namespace) -> Iterator[harness.Row]:
    """Times starts without a cache of compiled programs, and each again with the cache that it left."""
    found: dict[str, list[First]] = {"cold": [], "warm": []}
    for number in range(arguments.starts):
        for kind, each in found.items():
            each.append(first_answer(folder, "--compiled", str(folder / f"compiled-{number}"), *arguments.flags))
            print(f"{kind}: {each[-1]}, load {os.getloadavg()[0]:.1f}", flush=True)
    versions = harness.versions(*VERSIONS)
    for kind, goal in (("cold", "<= 30"), ("warm", "<= 8")):
        seconds = statistics.median(each.seconds for each in found[kind])
        yield harness.Row(f"serve_first_answer_{kind}_s", "s", seconds, 1.0, goal, versions)


@dataclasses.dataclass(frozen=True)
class First:
    """Seconds from the start of a process to its first answer and to its last program, and those of the processor.

    `beside` are seconds of answers between the two, `after` of as many later ones.
    """

    seconds: float
    processor: float
    all_seconds: float
    all_processor: float
    beside: Sequence[float]
    after: Sequence[float]

    def __str__(self) -> str:
        first = f"first answer after {self.seconds:.1f} s ({self.processor:.1f} s of processor)"
        all_ = f"all programs after {self.all_seconds:.1f} s ({self.all_processor:.1f} s)"
        waits = (
            f"median {statistics.median(each):.3f}, longest {max(each):.3f} s" for each in (self.beside, self.after)
        )
        return f"{first}; {all_}; {len(self.beside)} answers meanwhile: {'; as many later: '.join(waits)}"


def first_answer(folder: Path, *flags: str) -> First:
    """Starts a server and asks one question until it is answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    body = json.dumps({"inputs": [{"input": json.loads(Path(write_inputs(folder, count=1)).read_text())[0]}]}).encode()
    question = urllib.request.Request(f"{url}/predict", body, {"Content-Type": "application/json"})
    command = [*harness.SBS, "serve", str(folder), "--port", str(port), *flags]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}; its messages are above.")
            with contextlib.suppress(OSError):  # refused, or 503: not ready
                ask(question)
                break
            time.sleep(0.02)
        first = time.perf_counter() - began, processor(process.pid)
        beside = [ask(question)]
        while not all_programs(url):
            time.sleep(0.1)
            beside.append(ask(question))
        last = time.perf_counter() - began, processor(process.pid)
        return First(*first, *last, beside, [ask(question) for _ in beside])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ask(question: urllib.request.Request) -> float:
    """Asks a question; returns the seconds of its answer. RuntimeError for an answer without a prediction."""
    began = time.perf_counter()
    with urllib.request.urlopen(question, timeout=60) as response:
        answer = json.load(response)["answers"][0]
    if "prediction" not in answer:
        raise RuntimeError(f"the answer is {answer}.")
    return time.perf_counter() - began


def processor(pid: int) -> float:
    """Returns the processor seconds of a process so far, of all its threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def latency(folder: Path, arguments: argparse.Namespace) -> harness.Row:
    file, batch_rows = write_inputs(folder), arguments.max_batch
    with served(folder, f"--max_batch={batch_rows}", *arguments.flags) as (url, _):
        ask = functools.partial(harness.once, url=url, inputs=file)
        alone = ask(side_unloaded, rows=1, times=4 * UNLOADED)
        before = ask(side_unloaded, rows=batch_rows, times=UNLOADED)
        loaded = ask(side_clients, clients=arguments.clients, requests=arguments.requests, unruly=0)
        after = ask(side_unloaded, rows=batch_rows, times=UNLOADED)
    batch = statistics.median([before["median"], after["median"]])
    print(
        f"{arguments.clients} clients: p50 {loaded['p50']:.3f} s, p99 {loaded['p99']:.3f} s, longest "
        f"{loaded['longest']:.3f} s, {loaded['per_second']:.1f} rows/s, {loaded['errors']} errors; unloaded: one row "
        f"{alone['median']:.3f} s, {batch_rows} rows {before['median']:.3f} s before and "
        f"{after['median']:.3f} s after."
    )
    if loaded["errors"]:
        raise RuntimeError(f"{loaded['errors']} errors, the first: {loaded['first_error']}")
    return harness.Row("serve_p99_vs_unloaded", "s", loaded["p99"], batch, "<= 3", harness.versions(*VERSIONS))


def memory(folder: Path, arguments: argparse.Namespace) -> harness.Row:
    """Compares resident memory after a tenth of the requests with that after all of them."""
    sizes_after: list[tuple[int, int]] = []
    parts, warm = 50, max(arguments.memory_requests // 10, arguments.clients)
    options = {"inputs": write_inputs(folder), "clients": arguments.clients, "unruly": 50}
    with served(folder, *arguments.flags) as (url, process):
        done = 0
        for part in [warm] + [arguments.memory_requests // parts] * parts:
            found = harness.once(side_clients, url=url, requests=part, **options)
            if found["errors"]:
                raise RuntimeError(f"{found['errors']} errors, the first: {found['first_error']}")
            done += part
            sizes_after.append((done, resident(process.pid)))
    requests, sizes = zip(*sizes_after, strict=True)
    slope = statistics.linear_regression(requests, sizes).slope
    fifth = len(sizes) // 5
    first, last = statistics.median(sizes[:fifth]), statistics.median(sizes[-fifth:])
    print(
        f"memory: {sizes[0] / harness.MIB:.1f} MiB after {requests[0]} requests, {sizes[-1] / harness.MIB:.1f} MiB "
        f"after {requests[-1]}; {slope:.1f} bytes per request by least squares."
    )
    growth = (last / harness.MIB, first / harness.MIB)
    return harness.Row("serve_memory_growth", "MiB", *growth, "<= 1.02", harness.versions(*VERSIONS))


def resident(pid: int) -> int:
    """Returns the bytes that a process has resident (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no line VmRSS.")
