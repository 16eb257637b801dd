"""Test `sbs serve` with real servers over loopback, and its queue and reader of bodies alone."""

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import re
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fuzzing
import processes
import pytest
import students
import toy

from benchmarks import serve as serve_benchmark

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

import httpx2
import jsonschema
import openapi_spec_validator

from sbs_jax.cli.commands import serve as command
from sbs_jax.data import registry
from sbs_jax.prediction import engine
from sbs_jax.serve import batching, bodies, connections, server
from sbs_jax.serve.limits import Limits
from sbs_jax.student import adapters
from sbs_jax.training import gin_files

# Runs `sbs` with the toy dataset and a model that obeys its rows: "fail" raises, "hold FILE" waits for that file. A
# body with "break" breaks its handler and a callback of the event loop. Each compilation says "compiled". The first
# program waits for the file GATE; of the others, the second fails and the third waits for the file LATER.
PROGRAM = """
import asyncio, dataclasses, functools, pathlib, resource, sys, time
import jax, toy
from sbs_jax.cli import main
from sbs_jax.data import registry
from sbs_jax.prediction import engine
from sbs_jax.serve import bodies

def hold(path):
    pathlib.Path(f"{path}.held").touch()
    while not pathlib.Path(path).exists():
        time.sleep(0.005)

answer, programs = engine.Predictor.answer, engine.Predictor.programs

def answered(self, questions):
    for question in questions:
        if question.input == "fail":
            raise RuntimeError(f"got {question.input} secret")
        if question.input.startswith("hold "):
            hold(question.input.removeprefix("hold "))
    short = [dataclasses.replace(q, input="h") if q.input.startswith("hold ") else q for q in questions]
    return answer(self, short)

def held(path, compile):
    hold(path)
    compile()

def failing(compile):
    raise RuntimeError("no room for this program")

def held_programs(self):
    first, others = programs(self)
    if path := GATE:
        first[0] = functools.partial(held, path, first[0])
    if path := LATER:
        others[1:3] = functools.partial(failing, others[1]), functools.partial(held, path, others[2])
    return first, others

def broken(data):
    raise RuntimeError(f"got {data} secret")

def read_or_broken(data, **limits):
    if b"break" in data:
        asyncio.get_running_loop().call_soon(broken, data)
        broken(data)
    return read(data, **limits)

def timed(name, *_, **__):
    if name.endswith("backend_compile_duration"):
        print("compiled", file=sys.stderr, flush=True)

jax.monitoring.register_event_duration_secs_listener(timed)
registry.add(toy.DATASET)
read, bodies.read = bodies.read, read_or_broken
engine.Predictor.answer, engine.Predictor.programs = answered, held_programs
if most := DESCRIPTORS:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
sys.exit(main.main(sys.argv[1:]))
"""
JSON = {"content-type": "application/json"}
X = {"inputs": [{"input": "x"}]}


class Client:
    """Asks one server; checks every response against the server's OpenAPI document."""

    def __init__(self, process: processes.Process, url: str) -> None:
        self.process, self.url = process, url
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        # A connection per request: the server may close an idle one just when it is used.
        self._http = httpx2.Client(base_url=url, timeout=60, limits=httpx2.Limits(max_keepalive_connections=0))
        self.document = self._http.get("/openapi.json").json()

    def close(self) -> None:
        self._http.close()

    def send(self, method: str, path: str, **options: Any) -> httpx2.Response:
        response = self._http.request(method, path, **options)
        self.check(method, path, response)
        return response

    def check(self, method: str, path: str, response: httpx2.Response) -> None:
        operation = self.document["paths"].get(path, {}).get(method.lower())
        if operation is None:
            schema: Any = {"$ref": "#/components/schemas/Error"}
        else:
            content = operation["responses"][str(response.status_code)]["content"]
            ((kind, described),) = content.items()
            assert response.headers["content-type"].startswith(kind)
            schema = described["schema"]
        value = response.json() if response.headers["content-type"] == "application/json" else response.text
        whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **self.document, **schema}
        jsonschema.Draft202012Validator(whole).validate(value)

    def predict(self, *rows: Any, status: int = 200) -> list[dict[str, Any]]:
        """Returns the answers to rows; a text is an input."""
        asked = [{"input": row} if isinstance(row, str) else row for row in rows]
        response = self.send("POST", "/predict", json={"inputs": asked})
        assert response.status_code == status, response.text
        return response.json()["answers"]

    def metrics(self) -> dict[str, float]:
        lines = self.send("GET", "/metrics").text.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    def queue(self) -> int:
        return self.send("GET", "/health").json()["queue"]["rows"]

    def connected(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=60)

    def reply(self, data: bytes) -> tuple[int, dict[str, Any]]:
        """Sends bytes; returns the status and body of the answer."""
        with self.connected() as wire:
            wire.sendall(data)
            return answer_on(wire)


def answer_on(wire: socket.socket) -> tuple[int, dict[str, Any]]:
    """Reads one response from a connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = wire.recv(65536)
        assert part, f"the connection ended after {data!r}"
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    assert length is not None
    while len(body) < int(length[1]):
        body += wire.recv(65536)
    return int(head.split()[1]), json.loads(body)


def ask_and_read_nothing(wire: socket.socket) -> None:
    wire.setblocking(False)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            wire.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        time.sleep(0.002)


def failure(response: httpx2.Response) -> tuple[int, str]:
    """Returns the status and code of a failed request."""
    return response.status_code, response.json()["error"]["code"]


def failure_on(wire: socket.socket) -> tuple[int, str]:
    status, body = answer_on(wire)
    return status, body["error"]["code"]


def posted(rows: Sequence[Any], *, headers: str = "") -> bytes:
    body = json.dumps({"inputs": rows}).encode()
    return (
        f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_untrained(tmp_path_factory.mktemp("serve"))


@contextlib.contextmanager
def started(
    starter: processes.Starter,
    folder: Path,
    run: Path,
    *flags: str,
    held: Path | None = None,
    later: Path | None = None,
    most_files: int = 0,
) -> Iterator[processes.Process]:
    text = PROGRAM
    for name, value in (("GATE", held and str(held)), ("LATER", later and str(later)), ("DESCRIPTORS", most_files)):
        text = text.replace(f":= {name}:", f":= {value!r}:")
    arguments = ["serve", str(run), "--port", "0", "--compiled", "off", *flags]
    with starter.alone(folder, arguments, command=("-c", text)) as process:
        yield process


def ready(process: processes.Process, *, wholly: bool = True) -> Client:
    """Waits until the server is ready, and has compiled everything unless not `wholly`; returns a client."""
    processes.until(lambda: "\n" in process.said(), [process])
    line = process.said()
    found = re.fullmatch(r"sbs serve: ready: (http://[\d.:]+) answers with run, step \d; warmed up in [\d.]+ s\n", line)
    assert found, line
    client = Client(process, found[1])
    if wholly:
        processes.until(lambda: len(set(programs(client).values())) == 1, [process])
    return client


def programs(client: Client) -> dict[str, int]:
    """Returns how many programs are ready, and how many there will be."""
    return client.send("GET", "/health").json()["programs"]


@pytest.fixture(scope="module")
def client(starter, run, tmp_path_factory) -> Iterator[Client]:
    """Starts the server that most tests share."""
    flags = ["--batch_size=8", "--max_inputs=16", "--max_body_bytes=20000", "--read_timeout=1", "--rationale"]
    with started(starter, tmp_path_factory.mktemp("server"), run, *flags) as process:
        client = ready(process)
        yield client
        client.close()


@pytest.fixture(scope="module")
def predictor(run: Path) -> engine.Predictor:
    before = registry.options()
    loaded = engine.Predictor.load(run, settings=engine.Settings(rationale=True, batch_size=8))
    registry.configure(before)
    return loaded


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Names the file that a held batch waits for; creates it at the end in any case."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def holding(gate: Path, client: Client, wires: contextlib.ExitStack) -> socket.socket:
    """Opens a connection whose request the model holds until the gate exists."""
    wire = wires.enter_context(client.connected())
    wire.sendall(posted([{"input": f"hold {gate}"}]))
    held = gate.with_name(f"{gate.name}.held")
    processes.until(held.exists, [client.process])
    return wire


def half_asked(client: Client, wires: contextlib.ExitStack) -> socket.socket:
    """Opens a connection with a request that the server has begun to read; its last byte, }, is missing."""
    wire = wires.enter_context(client.connected())
    head, _, body = posted([{"input": "x"}], headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    wire.sendall(head + b"\r\n\r\n")
    assert wire.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.sendall(body[:-1])
    return wire


# ------------------------------------------------------------------------------------------- answers


def test_answers_are_those_of_the_predictor(client: Client, predictor: engine.Predictor) -> None:
    texts = ["a b c", "b b d", "hello", "x", "", "日本", "k k k k", "e f g", "h", "g g g"]
    rows = [{"input": text, "rationale": number % 2 == 0} for number, text in enumerate(texts)]
    answers = client.predict(*rows)
    expected = predictor.answer([engine.Question(id=str(number), input=text) for number, text in enumerate(texts)])
    assert len({answer["score"] for answer in answers}) == len(texts)
    for number, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
        assert answer.pop("score") == pytest.approx(wanted.score, rel=1e-4)
        rationale = {"rationale": wanted.rationale} if number % 2 == 0 else {}
        assert answer == {"id": wanted.id, "prediction": wanted.prediction} | rationale


def test_an_invalid_row_gets_an_error_and_the_others_are_answered(client: Client) -> None:
    long = "a b c d e f g " * 5
    rows = [{"id": "first", "input": "a b c"}, {"id": "long", "input": long}, {"id": "first", "input": "x"}, 5]
    rows += [{"id": "half", "input": "\ud800"}, {"inptu": "x"}, {"input": ["x"]}, {"id": "", "input": "x"}]
    rows += [{"input": "x", "adapter": "esnli"}, {"input": "x", "rationale": "yes"}, {"id": "last", "input": "a b c"}]
    response = client.send("POST", "/predict", content=json.dumps({"inputs": rows}), headers=JSON)
    first, *errors, last = response.json()["answers"]
    assert (response.status_code, first["id"], last["id"]) == (200, "first", "last")
    assert first["prediction"] == last["prediction"]
    assert [error["id"] for error in errors] == ["long", "first", "3", "half", "5", "6", "", "8", "9"]
    patterns = [
        r"the input has \d\d tokens.* at most 48",
        "the id 'first' is that of row 0 already",
        'row 3 is 5; expected an object: {"input"',
        "unpaired surrogate",
        "unknown field 'inptu'.* Did you mean 'input'",
        "'input' is .*expected text",
        "'id' is empty",
        "no adapter is named 'esnli'",
        "'rationale' is \"yes\"; expected true or false",
    ]
    for error, pattern in zip(errors, patterns, strict=True):
        assert re.search(pattern, error["error"]), (pattern, error)
    # Without any answer the request fails.
    assert client.predict({"input": long}, {"input": 5}, status=422)[1]["error"].startswith("the field 'input' is 5")


def test_health_document_and_counters(client: Client) -> None:
    openapi_spec_validator.validate(client.document)
    assert client.document["components"]["schemas"]["Request"]["properties"]["inputs"]["maxItems"] == 16
    health = client.send("GET", "/health")
    assert health.status_code == 200
    body = health.json()
    assert (body["status"], body["model"], body["step"]) == ("ready", "run", 1)
    assert body["queue"] == {"rows": 0, "limit": 1024}
    before = client.metrics()
    client.predict("a", "b", "c")
    after = client.metrics()
    assert after["sbs_rows_answered_total"] - before["sbs_rows_answered_total"] == 3
    assert after['sbs_requests_total{status="200"}'] - before.get('sbs_requests_total{status="200"}', 0) == 1
    assert "access" not in client.process.complained()


def ask_much(client: Client, *, clients: int, requests: int) -> None:
    """Asks from many clients at once; each must get its own answers."""
    texts = [f"{number % 7} {number % 5}" for number in range(clients)]
    alone = {text: client.predict(text)[0] for text in set(texts)}

    def work(number: int) -> None:
        with client.connected() as wire:
            for turn in range(requests):
                name = f"{number}/{turn}"
                wire.sendall(posted([{"id": name, "input": texts[number]}]))
                status, body = answer_on(wire)
                assert status == 200, body
                (answer,) = body["answers"]
                expected = alone[texts[number]]
                assert (answer["id"], answer["prediction"]) == (name, expected["prediction"])
                assert answer["score"] == pytest.approx(expected["score"], rel=1e-4)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))


def test_many_clients_at_once_share_batches(client: Client) -> None:
    before = client.metrics()
    ask_much(client, clients=24, requests=4)
    after = client.metrics()
    rows, batches = (after[f"sbs_{name}"] - before[f"sbs_{name}"] for name in ("rows_answered_total", "batches_total"))
    assert rows >= 96
    assert batches < rows / 2
    assert client.queue() == 0


def test_the_benchmark_sends_the_given_number_of_requests(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "inputs.json"
    file.write_text(json.dumps(["a", "b", "c"]))
    before = client.metrics()
    found = serve_benchmark.side_clients(url=client.url, inputs=str(file), clients=4, requests=40, unruly=10)
    alone = serve_benchmark.side_unloaded(url=client.url, inputs=str(file), rows=8, times=2)
    after = client.metrics()
    names = [f'sbs_requests_total{{status="{status}"}}' for status in (200, 400)]
    answered, rejected = (after.get(name, 0) - before.get(name, 0) for name in names)
    # Of the 40, two have a bad body and two leave, perhaps after their answer; the 3 others are the unloaded batches.
    assert (found["errors"], rejected) == (0, 2)
    assert 36 + 3 <= answered <= 38 + 3
    assert 0 < found["p50"] <= found["p99"] <= found["longest"]
    assert 0 < alone["median"] <= alone["longest"]
    assert serve_benchmark.resident(client.process.pid) > 2**20


@pytest.mark.faults
def test_two_hundred_clients_get_their_answers(client: Client) -> None:
    ask_much(client, clients=200, requests=50)


def test_choices_and_adapters_are_answered_as_by_the_predictor(starter, run, tmp_path, monkeypatch) -> None:
    """Whatever the number of choices and their lengths, nothing is compiled after the start."""
    lora, ia3 = adapters.Tuning(lora=adapters.LoRA(rank=2, alpha=4.0)), adapters.Tuning(ia3=adapters.IA3())
    one = students.write_adapters(tmp_path / "run", lora, base=run)
    other = students.write_adapters(tmp_path / "other", ia3, base=run)
    choices = ("a", "b d", "k")
    rows = [{"input": i, "choices": choices, "adapter": adapter} for i in ("a b c", "x") for adapter in (None, "other")]
    texts = [f"{number}{'k' * (number % 7)}" for number in range(64)]
    rows.append({"input": "x", "choices": tuple(texts), "adapter": "other"})
    sizes = [(2, 1), (3, 3), (8, 2), (9, 1), (17, 2), (63, 3)]
    various = [{"input": "k" * 3 * length, "choices": texts[64 - count :]} for count, length in sizes]
    flags = ["--decoding=choices", "--batch_size=1", f"--adapters=other={other}", "--max_choices=200"]
    with started(starter, tmp_path, one, *flags) as process, contextlib.closing(ready(process)) as client:
        compiled = process.complained().count("compiled\n")
        assert compiled >= 8  # two students, two lengths of the source or of choices
        answers = client.predict(*rows)
        for row, answer in zip(various, client.predict(*various), strict=True):
            assert list(answer["scores"]) == row["choices"]
            assert sum(answer["scores"].values()) == pytest.approx(1.0)
        assert client.predict({"input": "x"})[0]["prediction"] in toy.LETTERS
        assert process.complained().count("compiled\n") == compiled
        many = client.send("POST", "/predict", json={"inputs": [{"input": "x", "choices": texts}] * 4})
        assert failure(many) == (422, "too_many_choices")
        bad = client.predict({"input": "x", "adapter": "nobody"}, {"input": "x", "choices": ["a"]}, status=422)
    before = registry.options()
    settings = engine.Settings(decoding="choices", batch_size=1)
    loaded = engine.Predictor.load(one, settings=settings, adapters={"other": other})
    questions = [engine.Question(id=str(number), **row) for number, row in enumerate(rows)]
    expected = loaded.answer(questions)
    work = [loaded.work(question) for question in (*questions, engine.Question(id="", input=""))]
    assert work == [1, 1, 1, 1, 8, 1]
    monkeypatch.setattr(loaded._answerers[None], "_choice_limit", 64)
    longer = [engine.Question(id="", input="", choices=("a", "k" * length)) for length in (17, 18, 65, 66, 1000)]
    assert [loaded.work(question) for question in longer] == [1, 4, 4, 8, 8]
    registry.configure(before)
    assert len({answer["score"] for answer in answers}) == len(rows)
    for answer, wanted in zip(answers, expected, strict=True):
        assert (answer["id"], answer["prediction"]) == (wanted.id, wanted.prediction)
        assert answer["score"] == pytest.approx(wanted.score, rel=1e-4)
        assert answer["scores"] == pytest.approx(wanted.scores, rel=1e-4)
    assert "no adapter is named 'nobody'. Known are 'other'" in bad[0]["error"]
    assert "got 1 choices; expected 2 to 64" in bad[1]["error"]


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b"", 400, "not_json", "not JSON"),
        (b"{", 400, "not_json", "not JSON"),
        (b'{"inputs": [{"input": "x"}]} x', 400, "not_json", "not JSON"),
        (b'{"inputs": [{"input": "\xff"}]}', 400, "not_utf8", r"byte 23 \(0xff\)"),
        ('{"inputs": [{"input": "x"}]}'.encode("utf-16"), 400, "not_utf8", "not UTF-8"),
        (b'{"inputs": [NaN]}', 400, "not_json", "NaN"),
        (b'{"inputs": [' + b"1" * 9_000 + b"]}", 400, "not_json", "cannot be read"),
        (b"[" * 19_000, 400, "not_json", "nested too deeply"),
        (b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}", 422, None, None),
        (b'{"inputs": [], "inputs": [{"input": "x"}]}', 400, "not_json", "'inputs' twice"),
        (b'[{"input": "x"}]', 400, "wrong_form", "expected"),
        (b'{"input": "x"}', 400, "wrong_form", "expected"),
        (b'{"inputs": [], "id": 1}', 400, "wrong_form", "'id' beside 'inputs'"),
        (b'{"inputs": []}', 400, "wrong_form", "empty list"),
        (b'{"inputs": {"0": "x"}}', 400, "wrong_form", "expected a list"),
        (json.dumps({"inputs": [{"input": "x"}] * 17}).encode(), 422, "too_many_inputs", "17 inputs; at most 16"),
    ],
)
def test_an_invalid_body_is_refused(client: Client, body: bytes, status: int, code, message) -> None:
    response = client.send("POST", "/predict", content=body, headers=JSON)
    assert response.status_code == status
    if code is not None:
        error = response.json()["error"]
        assert error["code"] == code
        assert re.search(message, error["message"]), error
    assert client.predict("x")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/predict", {}, 415),
        ("POST", "/predict", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/predict", {**JSON, "content-encoding": "gzip"}, 415),
        ("GET", "/predict", {}, 405),
        ("PUT", "/health", {}, 405),
        ("GET", "/", {}, 404),
        ("GET", "/docs", {}, 404),
        ("GET", "/../etc/passwd", {}, 404),
    ],
)
def test_other_requests_get_an_error_as_json(client: Client, method: str, path: str, headers, status: int) -> None:
    response = client.send(method, path, content=json.dumps(X) if method == "POST" else None, headers=headers)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"code", "message"}


def test_invalid_http_gets_an_error_as_json(client: Client) -> None:
    body = json.dumps(X).encode()
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    length, encoding = b"Content-Length: %d\r\n" % len(body), b"Transfer-Encoding: chunked\r\n"
    start = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for data in (
        b"\x16\x03\x01\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        # A length that two readers may read differently (RFC 9112, 6.1 and 6.3).
        start + length + encoding + b"\r\n" + chunked,
        start + encoding + length + b"\r\n" + chunked,
        start.replace(b"1.1", b"1.0") + encoding + b"\r\n" + chunked,
        start + length + length + b"\r\n" + body,
        start + length + b"content-length: 1\r\n\r\n" + body,
        start + b"Content-Length: %d, %d\r\n\r\n" % (len(body), len(body)) + body,
        start + b"Content-Length: +%d\r\n\r\n" % len(body) + body,
        start + b"Content-Length: 0x%x\r\n\r\n" % len(body) + body,
        start + b"Content-Length : %d\r\n\r\n" % len(body) + body,
        start + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked,
        start + encoding + encoding + b"\r\n" + chunked,
        start + encoding + b"\r\n" + b"x" + chunked,
        start + encoding + b"\r\n" + b"-" + chunked,
        start + encoding + b"\r\n" + b"0x" + chunked,
        start + encoding + b"\r\n" + b"f" * 21 + b"\r\n",
        # Headers on two lines, or with a bare CR.
        start + b"X: a\r\n b\r\n" + length + b"\r\n" + body,
        start + b"X: a\r\n\tTransfer-Encoding: chunked\r\n" + length + b"\r\n" + body,
        start + b"X: a\rTransfer-Encoding: chunked\r\n" + length + b"\r\n" + body,
        start + b"X: a\0b\r\n" + length + b"\r\n" + body,
        # Whole heads that are too long: docs/serving.md says 16 KiB. And one that does not end.
        start + b"X: %s\r\n" % (b"x" * 70_000) + length + b"\r\n" + body,
        start + b"X: y\r\n" * 3_000 + length + b"\r\n" + body,
        b"GET /health?%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 17_000),
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000,
    ):
        with client.connected() as wire:
            wire.sendall(data)
            status, told = answer_on(wire)
            assert (status, told["error"]["code"]) == (400, "not_http"), data[:200]
            assert "headers of at most 16 KiB" in told["error"]["message"]
            with contextlib.suppress(ConnectionError):
                assert wire.recv(100) == b"", data[:200]  # closed
    # What is well formed passes: either length, and a head of 16 KiB.
    space = 16 * 1024 - len(start + length + b"X: \r\n\r\n")
    for data in (
        start + encoding + b"\r\n" + chunked,
        start + length + b"X: %s\r\n\r\n" % (b"x" * space) + body,
    ):
        assert client.reply(data)[0] == 200
    assert client.reply(start + length + b"X: %s\r\n\r\n" % (b"x" * (space + 1)) + body)[0] == 400


def test_a_body_that_is_too_large_is_read_no_further(client: Client) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    # By its Content-Length, before a byte of it is sent.
    for length in (20_001, 10**15):
        status, body = client.reply(head + b"Content-Length: %d\r\n\r\n" % length)
        assert (status, body["error"]["code"]) == (413, "too_large")
        assert "at most 20000" in body["error"]["message"]
    # By its bytes, where no length is given.
    chunk = b"%x\r\n%s\r\n" % (1000, b" " * 1000)
    status, body = client.reply(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 30)
    assert (status, body["error"]["code"]) == (413, "too_large")
    # After the answer, only a bounded part is read.
    with client.connected() as wire:
        wire.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 2**28:
                wire.sendall(chunk * 10)
                sent += len(chunk) * 10
        assert sent < 2**25  # buffers of the sockets
    # Exactly the allowed size passes.
    whole = json.dumps(X).encode().ljust(20_000)
    assert client.send("POST", "/predict", content=whole, headers=JSON).status_code == 200
    # A client that waits for 100 Continue gets the refusal instead.
    status, body = client.reply(head + b"Expect: 100-continue\r\nContent-Length: 20001\r\n\r\n")
    assert status == 413


def test_slow_clients_time_out(client: Client) -> None:
    """Has several at once, since each takes a second; others are answered meanwhile."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with contextlib.ExitStack() as wires:
        body, headers, reader = (wires.enter_context(client.connected()) for _ in range(3))
        body.sendall(head + b'{"inputs"')
        headers.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n")
        # This one asks for much and reads nothing, until it is cut off.
        with pytest.raises(ConnectionError):
            ask_and_read_nothing(reader)
        assert client.predict("x")
        status, told = answer_on(body)
        assert (status, told["error"]["code"]) == (408, "slow_body")
        assert "9 bytes of the body came within 1 s" in told["error"]["message"]
        assert failure_on(headers) == (408, "slow_headers")


def test_a_failing_model_fails_one_batch(client: Client) -> None:
    response = client.send("POST", "/predict", json={"inputs": [{"input": "x"}, {"input": "fail"}]})
    assert failure(response) == (500, "model_failed")
    assert client.predict("x")
    said = client.process.complained()
    assert re.search(r"The model failed on a batch of \d+ rows: RuntimeError \(message hidden\)", said)
    assert "secret" not in said


def test_an_unexpected_error_is_logged_without_its_text(client: Client) -> None:
    assert failure(client.send("POST", "/predict", content="break", headers=JSON)) == (500, "internal")
    assert client.predict("x")
    said = client.process.complained()
    assert re.search(r"A request failed: RuntimeError \(message hidden\)\.\n +File .* in broken", said, re.DOTALL)
    assert re.search(r"Exception in callback .*broken.*RuntimeError \(message hidden\)", said)
    assert "secret" not in said


def test_rows_of_a_client_that_left_are_dropped(client: Client, gate: Path) -> None:
    before = client.metrics()
    with contextlib.ExitStack() as wires:
        holding(gate, client, wires)
        with client.connected() as gone:
            gone.sendall(posted([{"input": "x"}] * 3))
            processes.until(lambda: client.queue() == 3, [client.process])
        processes.until(lambda: client.queue() == 0, [client.process])
        gate.touch()
    client.predict("y")
    after = client.metrics()
    assert after["sbs_rows_dropped_total"] - before["sbs_rows_dropped_total"] == 3
    assert after["sbs_rows_answered_total"] - before["sbs_rows_answered_total"] == 2


def test_inputs_are_not_logged(client: Client) -> None:
    text = "private"
    client.predict(text)
    client.predict({"input": [text]}, {text: 1}, status=422)
    client.send("POST", "/predict", content=text, headers=JSON)
    assert text not in client.process.complained() + client.process.said()


def test_a_full_queue_a_late_answer_and_a_stop(starter, run: Path, tmp_path: Path) -> None:
    """Fills the queue and the connections of a server with narrow limits, then stops it."""
    flags = ["--batch_size=8", "--max_batch=2", "--max_queue=4", "--max_inputs=4", "--max_connections=12"]
    flags += ["--request_timeout=4", "--keep_alive=3"]
    with contextlib.ExitStack() as wires:
        process = wires.enter_context(started(starter, tmp_path, run, *flags))
        client = ready(process)
        wires.callback(client.close)
        silent = wires.enter_context(client.connected())

        # The server was started without --rationale.
        (row,) = client.predict({"input": "x", "rationale": True}, status=422)
        assert "start it with --rationale" in row["error"]

        # A full queue says when to retry; a request that takes too long gets 504 and leaves the queue.
        first, gates = time.monotonic(), [tmp_path / str(number) for number in range(2)]
        held = holding(gates[0], client, wires)
        waiting = wires.enter_context(client.connected())
        waiting.sendall(posted([{"input": "x"}] * 4))
        processes.until(lambda: client.queue() == 4, [process])
        full = client.send("POST", "/predict", json=X)
        assert failure(full) == (503, "queue_full")
        assert 1 <= int(full.headers["retry-after"]) <= 60
        assert [failure_on(wire) for wire in (held, waiting)] == [(504, "too_slow")] * 2
        assert time.monotonic() - first >= 4
        assert silent.recv(100) == b""  # closed, since it never asked for anything
        assert client.queue() == 0
        gates[0].touch()
        assert client.predict("x")
        assert client.metrics()["sbs_rows_dropped_total"] == 4

        # A connection above the limit takes the place of the one that is idle longest.
        crowd = [wires.enter_context(client.connected()) for _ in range(13)]
        crowd[-1].sendall(posted([{"input": "x"}]))
        assert answer_on(crowd[-1])[0] == 200
        assert crowd[0].recv(100) == b""
        # If none is idle, it gets 503 at once, whether or not it asks for anything.
        crowd += [half_asked(client, wires) for _ in range(12)]
        for late in (b"", posted([{"input": "x"}])):
            with client.connected() as wire:
                wire.sendall(late)
                assert failure_on(wire) == (503, "too_many_connections")
                assert wire.recv(100) == b""
        crowd[-1].sendall(b"}")
        assert answer_on(crowd[-1])[0] == 200
        for wire in crowd:
            wire.close()

        # After a signal it answers what it has accepted, and accepts no more.
        held = holding(gates[1], client, wires)
        late = wires.enter_context(client.connected())
        late.sendall(posted([{"id": "late", "input": "x"}]))
        processes.until(lambda: client.queue() == 1, [process])
        process.send(signal.SIGTERM)
        processes.until(lambda: client.send("GET", "/health").status_code == 503, [process])
        assert client.send("GET", "/health").json()["status"] == "stopping"
        refused = client.send("POST", "/predict", json=X)
        assert failure(refused) == (503, "stopping")
        gates[1].touch()
        assert answer_on(held)[0] == 200
        status, body = answer_on(late)
        assert (status, body["answers"][0]["id"]) == (200, "late")
        assert process.wait() == 0
        assert "SIGTERM: no more requests are taken, 2 are finished" in process.complained()
        with pytest.raises(ConnectionError):
            client.connected()


def test_a_signal_during_warm_up_and_a_second_signal(starter, run: Path, tmp_path: Path, gate: Path) -> None:
    port = processes.free_port()
    with started(starter, tmp_path, run, "--batch_size=8", f"--port={port}", held=gate) as process:
        processes.until(gate.with_name("gate.held").exists, [process])
        cold = Client(process, f"http://127.0.0.1:{port}")
        health = cold.send("GET", "/health")
        assert (health.status_code, health.json()["status"]) == (503, "warming up")
        refused = cold.send("POST", "/predict", json=X)
        assert failure(refused) == (503, "warming_up")
        assert refused.headers["retry-after"]
        cold.close()
        assert process.said() == ""
        process.send(signal.SIGINT)
        processes.until(lambda: "SIGINT: no more requests are taken" in process.complained(), [process])
        # It does not wait for the compilation.
        assert process.wait() == 0
    second = tmp_path / "second"
    with started(starter, tmp_path, run, "--batch_size=8", most_files=128) as process, contextlib.ExitStack() as wires:
        client = ready(process)
        wires.callback(client.close)
        # More idle connections than the process can have files: the oldest are closed, and all else goes on.
        said = re.search(r"max_connections is (\d+) instead of 1024: .* 128 files", process.complained())
        assert said is not None
        most = int(said[1])
        assert 20 < most < 128
        crowd = [wires.enter_context(client.connected()) for _ in range(200)]
        began = time.monotonic()
        assert client.send("GET", "/health").status_code == 200
        assert client.predict("x")
        assert time.monotonic() - began < 10
        crowd[-1].sendall(posted([{"input": "x"}]))
        assert answer_on(crowd[-1])[0] == 200
        # As many busy ones: the rest gets 503 at once.
        for wire in crowd[:most]:
            wire.close()
        busy = [half_asked(client, wires) for _ in range(most)]
        began = time.monotonic()
        for wire in [wires.enter_context(client.connected()) for _ in range(100)]:
            with contextlib.suppress(ConnectionError):
                assert failure_on(wire) == (503, "too_many_connections")
        assert time.monotonic() - began < 10
        assert "Too many open files" not in process.complained()
        for wire in busy:
            wire.sendall(b"}")
            assert answer_on(wire)[0] == 200
        held = holding(second, client, wires)
        process.send(signal.SIGTERM)
        processes.until(lambda: "SIGTERM" in process.complained(), [process])
        process.send(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        with contextlib.suppress(ConnectionError):
            assert held.recv(100) == b""


def test_questions_are_answered_while_programs_are_compiled(
    starter, run: Path, tmp_path: Path, gate: Path, predictor: engine.Predictor
) -> None:
    """One program fails and the next one takes forever: neither holds an answer, and a stop waits for neither."""
    texts = ["a b c", "b b d", "hello", "x", "", "k k k k", "e f g h e f g h e f g h"]
    expected = predictor.answer([engine.Question(id=str(number), input=text) for number, text in enumerate(texts)])
    cache, scratch = tmp_path / "cache", Path(tempfile.gettempdir())
    flags = ["--batch_size=8", "--compiled", str(cache)]
    with started(starter, tmp_path, run, *flags, later=gate) as process:
        with contextlib.closing(ready(process, wholly=False)) as client:
            processes.until(gate.with_name("gate.held").exists, [process])
            said, there = process.complained(), programs(client)
            assert there["ready"] == 2
            assert there["count"] > 4
            assert f"compiling {there['count']} more programs beside serving (first run, cached afterwards)" in said
            assert re.search("could not be compiled, so a larger one .*: RuntimeError .no room for this program", said)
            compiled = said.count("compiled\n")
            for answer, wanted in zip(client.predict(*texts), expected, strict=True):
                assert (answer["id"], answer["prediction"]) == (wanted.id, wanted.prediction)
                assert answer["score"] == pytest.approx(wanted.score, rel=1e-4)
            assert process.complained().count("compiled\n") == compiled
            assert list(scratch.glob(f"sbs-jax-compiled-{process.pid}-*"))
        process.send(signal.SIGTERM)
        assert process.wait(20) == 0
    # What was compiled until then is kept, and nothing else.
    assert len(list(cache.glob("*/*-cache"))) >= 2
    assert not list(scratch.glob(f"sbs-jax-compiled-{process.pid}-*"))


# ------------------------------------------------------------------------------------------ units


def test_an_unavailable_address_is_reported_before_the_model_loads(tmp_path: Path) -> None:
    def served(*, host: str = "127.0.0.1", port: int = 0) -> int:
        return server.serve(tmp_path, settings=engine.Settings(), limits=Limits(), host=host, port=port)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(server.ServeError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: .*Choose another"):
            served(port=port)
    for host, port in (("127.0.0.1", 70_000), ("no.such.host.invalid", 1), ("x" * 300, 1)):
        with pytest.raises(server.ServeError, match=r"host|port"):
            served(host=host, port=port)
    with pytest.raises(FileNotFoundError):
        served()
    with server._bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # or asyncio leaves TCP_NODELAY off


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0; expected a whole number of at least 1"),
        ({"max_body_bytes": -1}, "max_body_bytes is -1"),
        ({"request_timeout": 0.0}, "request_timeout is 0"),
        ({"read_timeout": float("nan")}, "read_timeout is nan"),
        ({"max_wait": -0.1}, "max_wait is -0.1"),
        ({"max_inputs": 9, "max_queue": 8}, "would never find room"),
    ],
)
def test_invalid_limits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**changes)


def test_connections_fit_the_files_that_the_process_may_open(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    limits = [100, 10_000]
    used = len(list(Path("/dev/fd").iterdir()))
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    assert connections.fitting(1024) == 1024
    assert (1024 + used < limits[0] < 1200 + used, limits[1]) == (True, 10_000)  # raised as far as needed
    assert not caplog.messages
    limits[:] = [100 + used, 300 + used]
    fit = connections.fitting(1024)
    assert limits == [300 + used] * 2
    assert 200 < fit < 300
    assert f"max_connections is {fit} instead of 1024" in caplog.text
    limits[:] = [resource.RLIM_INFINITY] * 2
    assert connections.fitting(1024) == 1024
    limits[:] = [used + 10] * 2
    with pytest.raises(OSError, match=rf"may open {used + 10} files \(ulimit -n\).*no connection fits. Allow \d+"):
        connections.fitting(1024)


def test_a_model_that_fails_to_warm_up_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing() -> None:
        raise MemoryError("no room for the batch")

    predictor = engine.Predictor({}, settings=engine.Settings())
    monkeypatch.setattr(predictor, "programs", lambda: ([compile_nothing], []))
    student = server.Student("broken", 1, predictor, "off")
    with server._bind("127.0.0.1", 0) as listener:
        made = server._Server(student, limits=Limits(), listener=listener, say=print)
        with pytest.raises(server.ServeError, match="the model failed: MemoryError: no room for the batch"):
            asyncio.run(made.run())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(gin_files.UsageError, match=r"uvicorn .*pip install 'sbs-jax\[serve\]'"):
        command.check(argparse.Namespace())


class Model:
    """Records its batches; each waits for a permit."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Semaphore(0)

    def __call__(self, rows: Sequence[engine.Question]) -> list[engine.Answer]:
        self.batches.append([row.id for row in rows])
        assert self.go.acquire(timeout=60)
        if any(row.input == "fail" for row in rows):
            raise RuntimeError("no")
        return [engine.Answer(id=row.id, prediction="y", score=0.0) for row in rows]


def asked(*names: str, input: str = "x") -> list[engine.Question]:  # noqa: A002  (the field's name)
    return [engine.Question(id=name, input=input, rationale=False) for name in names]


def queue_test(test: Callable[[batching.Batcher, Model], Any], **options: Any) -> Model:
    async def main() -> None:
        batcher = batching.Batcher(model, **{"max_batch": 3, "max_wait": 0.0, "max_queue": 8, **options})
        ended = asyncio.Event()
        batcher.start(ended=lambda _: ended.set())
        await test(batcher, model)
        batcher.close()
        model.go.release(100)
        await asyncio.wait_for(ended.wait(), 60)
        with pytest.raises(batching.ClosedError):
            await batcher.ask(asked("late"))

    model = Model()
    asyncio.run(main())
    return model


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within a minute")


def test_batches_fill_while_one_is_computed_and_a_queue_takes_all_rows_of_a_request_or_none() -> None:
    async def test(batcher: batching.Batcher, model: Model) -> None:
        waiting = [asyncio.ensure_future(batcher.ask(asked("a")))]
        await until(lambda: model.batches)
        waiting += [asyncio.ensure_future(batcher.ask(asked(*names))) for names in ("bc", "d", "e", "fg")]
        await until(lambda: batcher.waiting == 6)
        with pytest.raises(batching.FullError, match="6 rows wait and 8 can: no room for 3 more") as caught:
            await batcher.ask(asked(*"hij"))
        assert caught.value.retry_after >= 1
        waiting.append(asyncio.ensure_future(batcher.ask(asked(*"hi"))))
        await until(lambda: batcher.waiting == 8)
        model.go.release(4)
        answers = await asyncio.gather(*waiting)
        assert ["".join(answer.id for answer in each) for each in answers] == ["a", "bc", "d", "e", "fg", "hi"]
        assert (batcher.waiting, batcher.counts.answered, batcher.counts.batches) == (0, 9, 4)

    # One row of each request in turn.
    assert queue_test(test).batches == [["a"], ["b", "d", "e"], ["f", "h", "c"], ["g", "i"]]


def test_a_large_request_does_not_hold_small_ones_and_is_not_held_by_them() -> None:
    """A row of capitals is the work of two rows."""

    async def test(batcher: batching.Batcher, model: Model) -> None:
        waiting = [asyncio.ensure_future(batcher.ask(asked("a")))]
        await until(lambda: model.batches)
        waiting += [asyncio.ensure_future(batcher.ask(asked(*names))) for names in ("BCDEFGHI", "JK")]
        await until(lambda: batcher.waiting == 10)
        for name in "pqrstu":
            # It comes while a batch is computed, and is in the next one; the large requests get the rest.
            before = len(model.batches)
            waiting.append(asyncio.ensure_future(batcher.ask(asked(name))))
            await asyncio.sleep(0.01)
            model.go.release()
            await until(lambda: len(model.batches) > before)  # noqa: B023
            assert name in model.batches[-1]
        model.go.release(100)
        await asyncio.gather(*waiting)
        assert batcher.waiting == 0

    batches = queue_test(test, max_batch=4, max_queue=20, work=lambda row: 2 if row.id.isupper() else 1).batches
    assert "".join(name for batch in batches for name in batch if name in "BCDEFGHI") == "BCDEFGHI"
    assert all(sum(2 if name.isupper() else 1 for name in batch) <= 4 for batch in batches)
    assert any("K" in batch for batch in batches[:5])  # the shorter of the two is done before the longer
    assert len(batches) <= 9


def test_an_idle_model_waits_max_wait_for_more_rows() -> None:
    async def test(batcher: batching.Batcher, model: Model) -> None:
        model.go.release(10)
        began = time.monotonic()
        one = asyncio.ensure_future(batcher.ask(asked("a")))
        await asyncio.sleep(0.01)
        assert [answer.id for answer in await batcher.ask(asked("b"))] == ["b"]
        assert (await one)[0].id == "a"
        assert time.monotonic() - began >= 0.3
        began = time.monotonic()
        await batcher.ask(asked("c", "d", "e"))  # full: nothing to wait for
        assert time.monotonic() - began < 0.3

    assert queue_test(test, max_wait=0.3).batches == [["a", "b"], ["c", "d", "e"]]


def test_cancelled_rows_are_not_computed_and_a_failure_fails_its_batch() -> None:
    async def test(batcher: batching.Batcher, model: Model) -> None:
        first = asyncio.ensure_future(batcher.ask(asked("a")))
        await until(lambda: model.batches)
        cancelled = asyncio.ensure_future(batcher.ask(asked(*"bcd")))
        failing = asyncio.ensure_future(batcher.ask(asked("e", input="fail")))
        beside = asyncio.ensure_future(batcher.ask(asked("f", "g", "h")))
        await until(lambda: batcher.waiting == 7)
        cancelled.cancel()
        first.cancel()  # it is being computed already
        await until(lambda: batcher.waiting == 4)
        model.go.release(10)
        with pytest.raises(batching.FailedError):
            await failing
        with pytest.raises(batching.FailedError):
            await beside
        assert (await batcher.ask(asked("i")))[0].prediction == "y"
        # "h" waited when its request failed by "f" and "g": dropped, unless it was taken in the same moment.
        assert batcher.counts.dropped in (3, 4)
        assert batcher.counts.failed == 3

    batches = queue_test(test).batches
    assert batches[:2] == [["a"], ["e", "f", "g"]]
    assert [name for batch in batches[2:] for name in batch] in (["h", "i"], ["i"])


ROWS = {
    "inputs": [
        {"id": "a", "input": "Ann has 3 pens.", "choices": ["yes", "no"], "rationale": True, "adapter": "esnli"},
        {"id": "b", "input": "\u00e9\u4e2d", "choices": None, "adapter": None},
        {"input": "A dog barks."},
    ]
}


def test_bodies(fuzz: Callable[[Callable[[fuzzing.Tape], None]], None]) -> None:
    """Reads any bytes as questions, rejected rows or a rejected body; each can be answered."""

    def case(tape: fuzzing.Tape) -> None:
        data = fuzzing.scratched(tape, fuzzing.encoded(fuzzing.written(fuzzing.damaged(tape, ROWS))))
        found = fuzzing.read(
            lambda: bodies.read(data, most=4, most_choices=3),
            raises=bodies.RequestError,
            names=["the body", "the rows have"],
        )
        if isinstance(found, bodies.RequestError):
            json.loads(bodies.encoded(bodies.Error.of(found.code, str(found))))
            return
        questions = [row for row in found if isinstance(row, engine.Question)]
        assert 0 < len(found) <= 4
        assert len({row.id for row in questions}) == len(questions)
        for row in questions:
            assert row.id
            "".join((row.id, row.input, row.adapter or "", *(row.choices or ()))).encode()
        for row in found:
            if isinstance(row, bodies.RowError):
                assert 0 < len(row.error) < fuzzing.LONGEST_MESSAGE
                json.loads(bodies.encoded(row))

    fuzz(case)


def test_a_valid_body_is_read() -> None:
    assert bodies.read(json.dumps(ROWS).encode(), most=3, most_choices=2) == [
        engine.Question(id="a", input="Ann has 3 pens.", adapter="esnli", choices=("yes", "no"), rationale=True),
        engine.Question(id="b", input="\u00e9\u4e2d", rationale=False),
        engine.Question(id="2", input="A dog barks.", rationale=False),
    ]
    with pytest.raises(bodies.RequestError, match="2 choices together; at most 1 per request") as caught:
        bodies.read(json.dumps(ROWS).encode(), most=3, most_choices=1)
    assert (caught.value.status, caught.value.code) == (422, "too_many_choices")


def test_minus_infinity_is_null_in_json() -> None:
    """Replaces an unpaired surrogate too, which an error may quote from a request."""
    rows = [
        engine.Answer(id="0", prediction="a", score=float("-inf"), scores={"a": float("-inf"), "b": -1.5}),
        engine.Answer(id="1", prediction=None, score=None, error="too long"),
        bodies.RowError(id="\ud800", error="wrong"),
    ]
    answers = bodies.Answers.model_validate({"model": "run", "step": 1, "answers": rows})
    assert json.loads(bodies.encoded(answers))["answers"] == [
        {"id": "0", "prediction": "a", "score": None, "scores": {"a": None, "b": -1.5}},
        {"id": "1", "error": "too long"},
        {"id": "?", "error": "wrong"},
    ]
