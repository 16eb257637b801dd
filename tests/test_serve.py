"""`sbs serve`: real servers over loopback, asked well and badly; their queue and reader of bodies by themselves."""

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import sys
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
from sbs_jax.serve import batching, bodies, server
from sbs_jax.serve.limits import Limits
from sbs_jax.student import adapters
from sbs_jax.training import gin_files

# What the servers of these tests run: `sbs`, which knows the toy dataset, and a model that fails and that waits when a
# row says so. "hold FILE" holds the batch until there is that file.
PROGRAM = """
import dataclasses, pathlib, sys, time
import toy
from sbs_jax.cli import main
from sbs_jax.data import registry
from sbs_jax.prediction import engine

def hold(path):
    pathlib.Path(f"{path}.held").touch()
    while not pathlib.Path(path).exists():
        time.sleep(0.005)

answer, warm_up = engine.Predictor.answer, engine.Predictor.warm_up

def answered(self, questions):
    for question in questions:
        if question.input == "fail":
            raise RuntimeError(f"got {question.input} secret")
        if question.input.startswith("hold "):
            hold(question.input.removeprefix("hold "))
    short = [dataclasses.replace(q, input="h") if q.input.startswith("hold ") else q for q in questions]
    return answer(self, short)

def warmed_up(self):
    if path := FILE:
        hold(path)
    return warm_up(self)

registry.add(toy.DATASET)
engine.Predictor.answer, engine.Predictor.warm_up = answered, warmed_up
sys.exit(main.main(sys.argv[1:]))
"""
JSON = {"content-type": "application/json"}


class Client:
    """Asks one server; every response is held against the server's own OpenAPI document."""

    def __init__(self, process: processes.Process, url: str) -> None:
        self.process, self.url = process, url
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        # A connection per request: one that is kept may be closed by the server just when it is used.
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
        """The answers to rows; a text is an input."""
        asked = [{"input": row} if isinstance(row, str) else row for row in rows]
        response = self.send("POST", "/predict", json={"inputs": asked})
        assert response.status_code == status, response.text
        return response.json()["answers"]

    def metrics(self) -> dict[str, float]:
        lines = self.send("GET", "/metrics").text.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

    def connected(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=60)

    def said(self, data: bytes) -> tuple[int, dict[str, Any]]:
        """The status and body that bytes on a connection are answered with."""
        with self.connected() as wire:
            wire.sendall(data)
            return answer_on(wire)


def answer_on(wire: socket.socket) -> tuple[int, dict[str, Any]]:
    """One response, read from a connection."""
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
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            wire.send(asked)
        time.sleep(0.002)


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
    starter: processes.Starter, folder: Path, run: Path, *flags: str, held: Path | None = None
) -> Iterator[processes.Process]:
    text = PROGRAM.replace("FILE", repr(None if held is None else str(held)))
    arguments = ["serve", "--model", str(run), "--port", "0", "--compiled", "off", *flags]
    with starter.alone(folder, arguments, command=("-c", text)) as process:
        yield process


def ready(process: processes.Process) -> Client:
    """A client, when the server has said that it is ready."""
    processes.until(lambda: "\n" in process.said(), [process])
    line = process.said()
    found = re.fullmatch(r"sbs serve: ready: (http://[\d.:]+) answers with run, step \d; warmed up in [\d.]+ s\n", line)
    assert found, line
    return Client(process, found[1])


@pytest.fixture(scope="module")
def client(starter, run, tmp_path_factory) -> Iterator[Client]:
    """A server for most tests."""
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
    """A file that a held batch waits for; made at the end in any case."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def holding(gate: Path, client: Client, wires: contextlib.ExitStack) -> socket.socket:
    """A connection whose request the model holds until the gate is there."""
    wire = wires.enter_context(client.connected())
    wire.sendall(posted([{"input": f"hold {gate}"}]))
    held = gate.with_name(f"{gate.name}.held")
    processes.until(held.exists, [client.process])
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


def test_rows_that_cannot_be_answered_leave_the_others_alone(client: Client) -> None:
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
    # Where no row is left, the request has failed.
    assert client.predict({"input": long}, {"input": 5}, status=422)[1]["error"].startswith("the field 'input' is 5")


def test_health_and_document_and_counters(client: Client) -> None:
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
    """So many clients at once, each of which asks so often; all get their own answers."""
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
    assert client.send("GET", "/health").json()["queue"]["rows"] == 0


def test_the_benchmark_s_clients_ask_as_often_as_told(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "inputs.json"
    file.write_text(json.dumps(["a", "b", "c"]))
    before = client.metrics()
    found = serve_benchmark.side_clients(url=client.url, inputs=str(file), clients=4, requests=40, unruly=10)
    alone = serve_benchmark.side_unloaded(url=client.url, inputs=str(file), rows=8, times=2)
    after = client.metrics()
    statuses = {
        status: after.get(f'sbs_requests_total{{status="{status}"}}', 0)
        - before.get(f'sbs_requests_total{{status="{status}"}}', 0)
        for status in (200, 400)
    }
    # Of 40 requests two have a bad body, and in two the client leaves, perhaps after the answer was made; then a batch
    # once to begin with, and twice.
    assert (found["errors"], statuses[400]) == (0, 2)
    assert 36 + 3 <= statuses[200] <= 38 + 3
    assert 0 < found["p50"] <= found["p99"] <= found["longest"]
    assert 0 < alone["median"] <= alone["longest"]
    assert serve_benchmark.resident(client.process.pid) > 2**20


@pytest.mark.faults
def test_two_hundred_clients_get_their_answers(client: Client) -> None:
    ask_much(client, clients=200, requests=50)


@pytest.mark.parametrize("decoding", ["choices", "beam"])
def test_other_decodings_and_adapters_answer_as_the_predictor_does(starter, run, tmp_path, decoding: str) -> None:
    lora, ia3 = adapters.Tuning(lora=adapters.LoRA(rank=2, alpha=4.0)), adapters.Tuning(ia3=adapters.IA3())
    one = students.write_adapters(tmp_path / "run", lora, base=run)
    other = students.write_adapters(tmp_path / "other", ia3, base=run)
    flags = [f"--decoding={decoding}", "--beams=2", "--batch_size=1", f"--adapters=other={other}"]
    choices = {"choices": ("a", "b d", "k")} if decoding == "choices" else {}
    rows = [{"input": text, **choices, "adapter": adapter} for text in ("a b c", "x") for adapter in (None, "other")]
    with started(starter, tmp_path, one, *flags) as process, contextlib.closing(ready(process)) as client:
        answers = client.predict(*rows)
        bad = [{"input": "x", "adapter": "nobody"}, *([{"input": "x", "choices": ["a"]}] if choices else [])]
        errors = [answer["error"] for answer in client.predict(*bad, status=422)]
    before = registry.options()
    asked = engine.Settings(decoding=decoding, beams=2, batch_size=1)
    loaded = engine.Predictor.load(one, settings=asked, adapters={"other": other})
    expected = loaded.answer([engine.Question(id=str(number), **row) for number, row in enumerate(rows)])
    registry.configure(before)
    assert len({answer["score"] for answer in answers}) == len(rows)
    for answer, wanted in zip(answers, expected, strict=True):
        assert (answer["id"], answer["prediction"]) == (wanted.id, wanted.prediction)
        assert answer["score"] == pytest.approx(wanted.score, rel=1e-4)
        assert answer.get("scores") == (wanted.scores and pytest.approx(wanted.scores, rel=1e-4))
    messages = ["no adapter is named 'nobody'. Known are 'other'", "got 1 choices; expected 2 to 64"]
    assert len(errors) == len(bad)
    for error, message in zip(errors, messages, strict=False):
        assert message in error


# ----------------------------------------------------------------------------------- what is not well


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
def test_a_body_that_is_no_request_is_refused(client: Client, body: bytes, status: int, code, message) -> None:
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
    response = client.send(
        method, path, content=b'{"inputs": [{"input": "x"}]}' if method == "POST" else None, headers=headers
    )
    assert response.status_code == status
    assert set(response.json()["error"]) == {"code", "message"}


def test_what_is_no_http_gets_an_error_as_json(client: Client) -> None:
    for data in (
        b"\x16\x03\x01\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        status, body = client.said(data)
        assert (status, body["error"]["code"]) == (400, "not_http")
    status, body = client.said(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000)
    assert status == 400
    assert "16 KiB" in body["error"]["message"]
    assert client.predict("x")


def test_a_body_that_is_too_large_is_read_no_further(client: Client) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    # By what it says: not a byte of it is sent.
    for length in (20_001, 10**15):
        status, body = client.said(head + b"Content-Length: %d\r\n\r\n" % length)
        assert (status, body["error"]["code"]) == (413, "too_large")
        assert "at most 20000" in body["error"]["message"]
    # By what comes, where nothing is said.
    chunk = b"%x\r\n%s\r\n" % (1000, b" " * 1000)
    status, body = client.said(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 30)
    assert (status, body["error"]["code"]) == (413, "too_large")
    # And what comes after the answer is not taken forever.
    with client.connected() as wire:
        wire.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 2**28:
                wire.sendall(chunk * 10)
                sent += len(chunk) * 10
        assert sent < 2**25  # what sockets hold
    # Exactly as many bytes as allowed are read.
    whole = json.dumps({"inputs": [{"input": "x"}]}).encode().ljust(20_000)
    assert client.send("POST", "/predict", content=whole, headers=JSON).status_code == 200
    # A client that asks whether to send it is told not to, and the connection ends: it may send it or not.
    status, body = client.said(head + b"Expect: 100-continue\r\nContent-Length: 20001\r\n\r\n")
    assert status == 413


def test_slow_clients_are_not_waited_for(client: Client) -> None:
    """All at once, as each takes its second; meanwhile others are answered."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with contextlib.ExitStack() as wires:
        body, headers, reader = (wires.enter_context(client.connected()) for _ in range(3))
        body.sendall(head + b'{"inputs"')
        headers.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n")
        # It asks for much and reads nothing, until it is cut off.
        with pytest.raises(ConnectionError):
            ask_and_read_nothing(reader)
        assert client.predict("x")
        status, told = answer_on(body)
        assert (status, told["error"]["code"]) == (408, "slow_body")
        assert "9 bytes of the body came within 1 s" in told["error"]["message"]
        status, told = answer_on(headers)
        assert (status, told["error"]["code"]) == (408, "slow_headers")


def test_a_model_that_fails_fails_for_that_batch_alone(client: Client) -> None:
    response = client.send("POST", "/predict", json={"inputs": [{"input": "x"}, {"input": "fail"}]})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "model_failed")
    assert client.predict("x")
    said = client.process.complained()
    assert re.search(r"The model failed on a batch of \d+ rows: RuntimeError", said)
    assert "secret" not in said


def test_nobody_waits_for_the_rows_of_a_client_that_is_gone(client: Client, gate: Path) -> None:
    before = client.metrics()
    with contextlib.ExitStack() as wires:
        holding(gate, client, wires)
        with client.connected() as gone:
            gone.sendall(posted([{"input": "x"}] * 3))
            processes.until(lambda: client.send("GET", "/health").json()["queue"]["rows"] == 3, [client.process])
        processes.until(lambda: client.send("GET", "/health").json()["queue"]["rows"] == 0, [client.process])
        gate.touch()
    client.predict("y")
    after = client.metrics()
    assert after["sbs_rows_dropped_total"] - before["sbs_rows_dropped_total"] == 3
    assert after["sbs_rows_answered_total"] - before["sbs_rows_answered_total"] == 2


def test_nothing_of_inputs_is_logged(client: Client) -> None:
    text = "private"
    client.predict(text)
    client.predict({"input": [text]}, {text: 1}, status=422)
    client.send("POST", "/predict", content=text, headers=JSON)
    assert text not in client.process.complained() + client.process.said()


def test_a_full_queue_a_late_answer_and_a_stop(starter, run: Path, tmp_path: Path) -> None:
    """One server with narrow limits, until its end."""
    flags = [
        "--batch_size=8",
        "--max_batch=2",
        "--max_queue=4",
        "--max_inputs=4",
        "--max_connections=12",
        "--request_timeout=4",
        "--keep_alive=3",
    ]
    with contextlib.ExitStack() as wires:
        process = wires.enter_context(started(starter, tmp_path, run, *flags))
        client = ready(process)
        wires.callback(client.close)

        def queue() -> int:
            return client.send("GET", "/health").json()["queue"]["rows"]

        silent = wires.enter_context(client.connected())

        # Rationales were not prepared for.
        (row,) = client.predict({"input": "x", "rationale": True}, status=422)
        assert "start it with --rationale" in row["error"]

        # The queue is full, and says when to come again; what comes late is told so, and gives up its place.
        first, gates = time.monotonic(), [tmp_path / str(number) for number in range(2)]
        held = holding(gates[0], client, wires)
        waiting = wires.enter_context(client.connected())
        waiting.sendall(posted([{"input": "x"}] * 4))
        processes.until(lambda: queue() == 4, [process])
        full = client.send("POST", "/predict", json={"inputs": [{"input": "x"}]})
        assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
        assert 1 <= int(full.headers["retry-after"]) <= 60
        for wire in (held, waiting):
            status, body = answer_on(wire)
            assert (status, body["error"]["code"]) == (504, "too_slow")
        assert time.monotonic() - first >= 4
        assert silent.recv(100) == b""  # it never asked for anything
        assert queue() == 0
        gates[0].touch()
        assert client.predict("x")
        assert client.metrics()["sbs_rows_dropped_total"] == 4

        # One connection too many is told so.
        crowd = [wires.enter_context(client.connected()) for _ in range(12)]
        crowd[-1].sendall(posted([{"input": "x"}]))
        status, body = answer_on(crowd[-1])
        assert (status, body["error"]["code"]) == (503, "too_many_connections")
        for wire in crowd:
            wire.close()

        # Told to end, it answers what it has taken, and takes no more.
        held = holding(gates[1], client, wires)
        late = wires.enter_context(client.connected())
        late.sendall(posted([{"id": "late", "input": "x"}]))
        processes.until(lambda: queue() == 1, [process])
        process.send(signal.SIGTERM)
        processes.until(lambda: client.send("GET", "/health").status_code == 503, [process])
        assert client.send("GET", "/health").json()["status"] == "stopping"
        refused = client.send("POST", "/predict", json={"inputs": [{"input": "x"}]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        gates[1].touch()
        assert answer_on(held)[0] == 200
        status, body = answer_on(late)
        assert (status, body["answers"][0]["id"]) == (200, "late")
        assert process.wait() == 0
        assert "SIGTERM: no more requests are taken, 2 are finished" in process.complained()
        with pytest.raises(ConnectionError):
            client.connected()


def test_a_server_that_warms_up_and_is_told_to_end_twice(starter, run: Path, tmp_path: Path, gate: Path) -> None:
    port = processes.free_port()
    with started(starter, tmp_path, run, "--batch_size=8", f"--port={port}", held=gate) as process:
        processes.until(gate.with_name("gate.held").exists, [process])
        cold = Client(process, f"http://127.0.0.1:{port}")
        health = cold.send("GET", "/health")
        assert (health.status_code, health.json()["status"]) == (503, "warming up")
        refused = cold.send("POST", "/predict", json={"inputs": [{"input": "x"}]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "warming_up")
        assert refused.headers["retry-after"]
        cold.close()
        assert process.said() == ""
        process.send(signal.SIGINT)
        processes.until(lambda: "SIGINT: no more requests are taken" in process.complained(), [process])
        # It does not wait for what is compiled, and ends in good order.
        assert process.wait() == 0
    second = tmp_path / "second"
    with started(starter, tmp_path, run, "--batch_size=8") as process, contextlib.ExitStack() as wires:
        client = ready(process)
        wires.callback(client.close)
        held = holding(second, client, wires)
        process.send(signal.SIGTERM)
        processes.until(lambda: "SIGTERM" in process.complained(), [process])
        process.send(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        with contextlib.suppress(ConnectionError):
            assert held.recv(100) == b""


# ---------------------------------------------------------------------------- by themselves


def served(run: Path, *, limits: Limits | None = None, port: int = 0, host: str = "127.0.0.1") -> int:
    return server.serve(run, settings=engine.Settings(), limits=limits or Limits(), host=host, port=port)


def test_an_address_that_cannot_be_had_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(server.ServeError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: .*Choose another"):
            served(tmp_path, port=port)
    for host, port in (("127.0.0.1", 70_000), ("no.such.host.invalid", 1), ("x" * 300, 1)):
        with pytest.raises(server.ServeError, match=r"host|port"):
            served(tmp_path, host=host, port=port)
    with pytest.raises(FileNotFoundError):
        served(tmp_path / "no-run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0; expected at least 1"),
        ({"max_body_bytes": -1}, "max_body_bytes is -1"),
        ({"request_timeout": 0.0}, "request_timeout is 0"),
        ({"read_timeout": float("nan")}, "read_timeout is nan"),
        ({"max_wait": -0.1}, "max_wait is -0.1"),
        ({"max_inputs": 9, "max_queue": 8}, "would never find room"),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**changes)


class Broken(engine.Predictor):
    """A model that cannot be compiled."""

    def __init__(self) -> None:
        super().__init__({}, settings=engine.Settings())

    def warm_up(self) -> float:
        raise MemoryError("no room for the batch")


def test_a_model_that_cannot_be_made_ready_ends_the_server() -> None:
    student = server.Student("broken", 1, Broken(), "off")
    with server._bind("127.0.0.1", 0) as listener:
        made = server._Server(student, limits=Limits(), listener=listener, say=print)
        with pytest.raises(server.ServeError, match="gave out: MemoryError: no room for the batch"):
            asyncio.run(made.run())


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(gin_files.UsageError, match=r"uvicorn .*pip install 'sbs-jax\[serve\]'"):
        command.run(argparse.Namespace())


class Model:
    """Answers that say with whom a row was computed; held until told."""

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


def test_batches_fill_up_while_one_is_computed_first_come_first() -> None:
    async def test(batcher: batching.Batcher, model: Model) -> None:
        first = asyncio.ensure_future(batcher.ask(asked("a")))
        await until(lambda: model.batches)
        others = [asyncio.ensure_future(batcher.ask(asked(*names))) for names in ("bc", "d", "e", "fg")]
        await until(lambda: batcher.waiting == 6)
        model.go.release(3)
        answers = await asyncio.gather(first, *others)
        assert ["".join(answer.id for answer in each) for each in answers] == ["a", "bc", "d", "e", "fg"]
        assert (batcher.counts.answered, batcher.counts.batches) == (7, 3)

    assert queue_test(test).batches == [["a"], ["b", "c", "d"], ["e", "f", "g"]]


def test_an_idle_model_waits_for_others_but_not_for_long() -> None:
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


def test_a_queue_takes_all_rows_of_a_request_or_none() -> None:
    async def test(batcher: batching.Batcher, model: Model) -> None:
        first = asyncio.ensure_future(batcher.ask(asked("a")))
        await until(lambda: model.batches)
        waiting = asyncio.ensure_future(batcher.ask(asked(*"bcdefg")))
        await until(lambda: batcher.waiting == 6)
        with pytest.raises(batching.FullError, match="6 rows wait and 8 can: no room for 3 more") as caught:
            await batcher.ask(asked(*"hij"))
        assert caught.value.retry_after >= 1
        last = asyncio.ensure_future(batcher.ask(asked(*"hi")))
        model.go.release(10)
        await asyncio.gather(first, waiting, last)
        assert batcher.waiting == 0

    queue_test(test)


def test_what_is_cancelled_is_not_computed_and_a_failure_is_that_of_its_batch() -> None:
    async def test(batcher: batching.Batcher, model: Model) -> None:
        first = asyncio.ensure_future(batcher.ask(asked("a")))
        await until(lambda: model.batches)
        cancelled = asyncio.ensure_future(batcher.ask(asked(*"bcd")))
        failing = asyncio.ensure_future(batcher.ask(asked("e", input="fail")))
        beside = asyncio.ensure_future(batcher.ask(asked("f", "g", "h")))
        after = asyncio.ensure_future(batcher.ask(asked("i")))
        await until(lambda: batcher.waiting == 8)
        cancelled.cancel()
        first.cancel()  # it is being computed already
        await until(lambda: batcher.waiting == 5)
        model.go.release(10)
        with pytest.raises(batching.FailedError):
            await failing
        with pytest.raises(batching.FailedError):
            await beside
        assert (await after)[0].prediction == "y"
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
    """Any bytes are rows, rows that are refused, or a body that is: and each can be answered."""

    def case(tape: fuzzing.Tape) -> None:
        data = fuzzing.scratched(tape, fuzzing.encoded(fuzzing.written(fuzzing.damaged(tape, ROWS))))
        found = fuzzing.read(lambda: bodies.read(data, most=4), raises=bodies.BodyError, names=["the body"])
        if isinstance(found, bodies.BodyError):
            json.loads(bodies.written({"code": found.code, "message": str(found)}))
            return
        assert 0 < len(found) <= 4
        names = [row.id for row in found if isinstance(row, engine.Question)]
        assert len(set(names)) == len(names)
        for row in found:
            if isinstance(row, engine.Question):
                assert row.id
                texts = (row.id, row.input, row.adapter or "", *(row.choices or ()))
                "".join(texts).encode()
            else:
                assert 0 < len(row.message) < fuzzing.LONGEST_MESSAGE
                json.loads(bodies.written({"id": row.id, "error": row.message}))

    fuzz(case)


def test_a_body_is_read_as_it_is_meant() -> None:
    rows = bodies.read(json.dumps(ROWS).encode(), most=3)
    first, second, third = (row for row in rows if isinstance(row, engine.Question))
    assert first == engine.Question(
        id="a", input="Ann has 3 pens.", adapter="esnli", choices=("yes", "no"), rationale=True
    )
    assert second == engine.Question(id="b", input="\u00e9\u4e2d", rationale=False)
    assert third == engine.Question(id="2", input="A dog barks.", rationale=False)


def test_numbers_that_json_has_not_are_null() -> None:
    value = {"scores": {"a": float("-inf"), "b": -1.5}, "list": [float("nan"), "\ud800"]}
    assert json.loads(bodies.written(value)) == {"scores": {"a": None, "b": -1.5}, "list": [None, "?"]}
