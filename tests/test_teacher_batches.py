"""The real SDKs submit, poll, collect and cancel batch jobs at a server over loopback."""

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.teacher_requests import request
from teacher_server import Fault, Server, served

from sbs_jax.teacher import batches, connections, gemini, jobs, openai, pacing, providers, refusals
from sbs_jax.teacher.batches import BatchClient
from sbs_jax.teacher.clients import Again, Failed, Fatal, Gone, Reply, Request
from sbs_jax.teacher.store import Failure, Store

for _name in ("openai", "google.genai"):
    pytest.importorskip(_name, reason="the SDKs of hosted teachers are not installed (pip install 'sbs-jax[teacher]')")

PROVIDERS = ("openai", "gemini", "vertex")
KEY = "secret-Key-0123456789"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "some-project")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "us-central1")
    # Cloud Storage over loopback, without the credentials of the machine that runs the test.
    for name in ("GCE_METADATA_ROOT", "GCE_METADATA_HOST"):
        monkeypatch.setenv(name, "localhost:1")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(pacing, "FIRST_DELAY", 0.01)


@contextlib.contextmanager
def prepared(**server: Any) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch, served(**server) as ready:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", ready.url)
        yield ready


def made(provider: str, server: Server) -> BatchClient:
    if provider == "vertex":
        from google.oauth2.credentials import Credentials

        return gemini.VertexBatches(
            base_url=server.gemini, timeout=5.0, folder="gs://bucket/jobs", credentials=Credentials("a-token")
        )
    base_url = server.openai if provider == "openai" else server.gemini
    return providers.make_batch(provider, base_url=base_url, timeout=5.0)


def run(client: BatchClient, work: Callable[[BatchClient], Coroutine[Any, Any, Any]]) -> Any:
    async def inside() -> Any:
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(inside())


async def results(client: BatchClient, job: str) -> dict[str, Reply | Failed]:
    """Returns the replies and final failures; requests with Again are unanswered."""
    found: dict[str, Reply | Failed] = {}
    read = client.reader()
    for file in await client.files(job):
        for key, outcome in read(await client.download(file)):
            assert key not in found
            assert isinstance(outcome, Reply | Failed | Again)
            if isinstance(outcome, Again):
                continue
            found[key] = outcome
    return found


async def ended(client: BatchClient, job: str) -> str:
    while (state := (await client.poll(job)).state) == batches.RUNNING:
        await asyncio.sleep(0.01)
    return state


def some(count: int = 5) -> list[Request]:
    return [request(f"Question {number}") for number in range(count)]


def collected(provider: str, requests: list[Request], server: Server) -> dict[str, Reply | Failed]:
    """Submits a job, waits for its end and collects it."""

    async def work(client: BatchClient) -> dict[str, Reply | Failed]:
        job = await client.submit(requests, name="sbs-1")
        assert await ended(client, job) == "done"
        return await results(client, job)

    return run(made(provider, server), work)


def reply_to(prompt: list[dict[str, str]]) -> str:
    return f"Reply to {prompt[-1]['content']}.\u2028It has two lines."


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_job_is_submitted_polled_and_collected(provider: str) -> None:
    with prepared(answer=reply_to, batch_polls=2) as server:

        async def work(client: BatchClient) -> tuple[list[str], dict[str, Reply | Failed]]:
            job = await client.submit(some(), name="sbs-1")
            states = [(await client.poll(job)).state for _ in range(3)]
            return states, await results(client, job)

        states, found = run(made(provider, server), work)
        assert states == ["running", "running", "done"]
        assert list(found) == [one.key for one in reversed(some())]  # the server's order is not that of the requests
        for one in some():
            reply = found[one.key]
            assert isinstance(reply, Reply)
            assert reply.text == f"Reply to {one.prompt.messages[-1].content}.\u2028It has two lines."
            assert reply.finish == "stop"
            assert reply.input_tokens == 5
        assert (server.lines, server.asked) == (5, 0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_is_sent_is_what_would_be_asked_at_once(provider: str) -> None:
    one = request(temperature=0.5, stops=("Q:",), sample=4)
    bodies: list[dict[str, Any]] = []

    def answer(prompt: object, body: dict[str, Any]) -> str:
        bodies.append(body)
        return "Yes."

    with prepared(answer=answer, batch_polls=0) as server:
        collected(provider, [one], server)
    (body,) = bodies
    body.pop("labels", None)
    wanted = openai.openai_body(one, official=False) if provider == "openai" else gemini.gemini_body(one)
    assert body == wanted


def test_completions_have_their_own_endpoint() -> None:
    with prepared(answer=lambda text: text[-10:], batch_polls=0) as server:
        (reply,) = collected("openai", [request("Question 1", form="completion")], server).values()
        (batch,) = server.batches.values()
        assert (batch["endpoint"], batch["completion_window"]) == ("/v1/completions", "24h")
    assert isinstance(reply, Reply)
    assert reply.text == "Question 1"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_lines_fail_alone_and_those_without_an_answer_are_left_out(provider: str) -> None:
    faults = [None, "missing", "filter", "too_long", "length", 500, 429, 400, "empty", None]
    if provider != "vertex":
        faults += ["malformed"]
    requests = some(len(faults))
    with prepared(line_faults=faults) as server:
        found = collected(provider, requests, server)
    told = {}
    for number, one in enumerate(requests):
        outcome = found.get(one.key)
        if isinstance(outcome, Failed):
            told[number] = outcome.reason
        elif outcome is not None:
            told[number] = outcome.finish
    assert told == {0: "stop", 2: "content_filter", 3: "too_long", 4: "length", 7: "refused", 9: "stop"}


def test_requests_that_openai_had_no_time_for_are_left_out() -> None:
    with prepared(line_faults=["expired", None]) as server:

        async def work(client: BatchClient) -> dict[str, Reply | Failed]:
            job = await client.submit(some(2), name="sbs-1")
            await ended(client, job)
            server.batches[job]["status"] = "expired"
            state = await client.poll(job)
            assert (state.state, state.message, state.total, state.done) == ("failed", "expired", 2, 1)
            return await results(client, job)

        assert list(run(made("openai", server), work)) == [some(2)[1].key]


@pytest.mark.parametrize(
    ("word", "state"),
    [
        *[(word, "done") for word in ("completed", "COMPLETED", "Succeeded", "JOB_STATE_SUCCEEDED", "SUCCESS")],
        *[(word, "failed") for word in ("FAILED", "Expired", "JOB_STATE_EXPIRED", "TIMEOUT_EXCEEDED")],
        *[(word, "cancelled") for word in ("CANCELLED", "canceled", "BATCH_STATE_CANCELLED")],
        *[(word, "running") for word in ("in progress", "In-Progress", "IN_PROGRESS", "JOB_STATE_QUEUED", "RUNNING")],
        *[("resting", "resting"), (None, "no state"), ("", "no state")],
    ],
)
def test_the_state_of_a_job_is_read_in_any_case(word: str | None, state: str) -> None:
    assert batches.state_of(word) == state


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_job_is_found_by_its_name_among_many(provider: str) -> None:
    with prepared() as server:

        async def submit(client: BatchClient) -> list[str]:
            return [await client.submit([request(f"{number}")], name=f"sbs-{number}") for number in range(12)]

        jobs = run(made(provider, server), submit)
        # More than a page of others.
        template = server.batches[jobs[-1]]
        for number in range(250):
            other = {**template, "id": f"x{number}", "metadata": None, "displayName": "", "name": f"x{number}"}
            if provider == "gemini":
                operation = {"name": f"batches/x{number}", "metadata": {"displayName": "other"}}
                other = {**template, "operation": operation}
            server.batches[f"x{number}"] = other

        async def find(client: BatchClient) -> list[str | None]:
            return [await client.find(name) for name in ("sbs-0", "sbs-7", "sbs-99")]

        assert run(made(provider, server), find) == [jobs[0], jobs[7], None]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_job_is_cancelled_and_what_it_answered_is_kept(provider: str) -> None:
    with prepared(batch_polls=1000) as server:

        async def work(client: BatchClient) -> dict[str, Reply | Failed]:
            job = await client.submit(some(4), name="sbs-1")
            await client.cancel(job)
            assert await ended(client, job) == "cancelled"
            await client.cancel(job)  # nothing happens
            assert await ended(client, job) == "cancelled"
            return await results(client, job)

        found = run(made(provider, server), work)
    assert len(found) == (2 if provider == "openai" else 0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_lines_with_a_parameter_that_the_model_refuses_are_sent_again_without_it(
    provider: str, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(number: int, body: dict[str, Any]) -> Fault | None:
        message = 'Unknown name "seed": cannot find it.' if provider != "openai" else "Unsupported parameter: 'seed'"
        return Fault(400, message=message) if "seed" in (body.get("generationConfig") or body) else None

    requests = [request(str(number), temperature=0.7) for number in range(3)]
    with prepared(line_faults=refuse) as server:

        async def work(client: BatchClient) -> list[dict[str, Reply | Failed]]:
            found = []
            for name in ("sbs-1", "sbs-2"):
                job = await client.submit(requests, name=name)
                await ended(client, job)
                found.append(await results(client, job))
            return found

        first, second = run(made(provider, server), work)
    assert first == {}
    assert all(isinstance(second[one.key], Reply) for one in requests)
    (record,) = caplog.records
    assert "The next job is sent without seed: " in record.getMessage()


def test_a_file_of_replies_is_cut_at_its_limit_and_the_lines_before_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with prepared(answer=lambda prompt: "word " * 100) as server:
        monkeypatch.setattr(connections, "MOST_FILE_BYTES", 2500)
        found = collected("openai", some(), server)
    assert 0 < len(found) < 5
    assert all(isinstance(reply, Reply) for reply in found.values())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_lost_reply_to_the_submission_does_not_submit_twice(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with prepared() as server:
        client = made(provider, server)
        inner = client.client
        send = inner.send
        lost = []

        async def losing(call: Callable[[], Any], *, transfer: bool = False) -> Any:
            before = len(server.batches)
            result = await send(call, transfer=transfer)
            if len(server.batches) > before and not lost:
                lost.append(1)
                raise Again("The connection failed after the job was made.")
            return result

        monkeypatch.setattr(inner, "send", losing)

        async def work(client: BatchClient) -> str:
            return await client.submit(some(), name="sbs-1")

        job = run(client, work)
        assert lost == [1]
        assert list(server.batches) == [job]


@pytest.mark.parametrize("provider", ["openai", "gemini"])
def test_an_unknown_key_or_model_is_fatal(provider: str) -> None:
    async def work(client: BatchClient) -> str:
        return await client.submit(some(), name="sbs-1")

    with prepared(key="another") as server, pytest.raises(Fatal) as error:
        run(made(provider, server), work)
    assert KEY not in str(error.value)
    if provider == "gemini":
        with prepared(models=["known"]) as server, pytest.raises(Fatal, match="some-model"):
            run(made(provider, server), work)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_job_that_does_not_exist_is_fatal(provider: str) -> None:
    job = {"openai": "batch_1", "gemini": "batches/1"}.get(provider, "projects/p/locations/l/batchPredictionJobs/1")
    with prepared() as server, pytest.raises(Fatal, match=r"1|not found"):
        run(made(provider, server), lambda client: client.poll(job))


def test_no_server_is_waited_for_and_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with prepared() as server:
        pass
    monkeypatch.setattr(pacing, "TRIES", 3)
    with pytest.raises(Again, match="connection failed"):
        run(made("openai", server), lambda client: client.find("sbs-1"))


def test_a_folder_that_cannot_be_written_is_fatal() -> None:
    with prepared() as server:
        server.denied.add("bucket")
        with pytest.raises(Fatal, match="gs://bucket/jobs cannot be used"):
            run(made("vertex", server), lambda client: client.submit(some(), name="sbs-1"))


def test_what_does_not_fit_into_one_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    line = lambda request: {"key": request.key}  # noqa: E731
    assert batches.lines_of(some(2), line).count(b"\n") == 2
    for requests, words in [
        ([], "0 requests"),
        ([request(), request()], "twice"),
        ([request(), request(form="completion")], "several forms"),
    ]:
        with pytest.raises(ValueError, match=words):
            batches.lines_of(requests, line)
    monkeypatch.setattr(batches, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="at most 100"):
        batches.lines_of(some(2), line)
    monkeypatch.setattr(batches, "MOST_REQUESTS", 1)
    with pytest.raises(ValueError, match="expected 1 to 1"):
        batches.lines_of(some(2), line)


@pytest.mark.parametrize(
    ("provider", "moves"),
    [
        *[("openai", moves) for moves in ("POST .*/files", "POST .*/batches", "GET .*/batches", "/content")],
        *[("gemini", moves) for moves in ("POST .*/files", "POST .*:batchG", "GET .*/batches", ":download")],
        *[("vertex", moves) for moves in ("POST .*Jobs", "GET .*Jobs")],
    ],
)
def test_batch_jobs_follow_no_redirect(provider: str, moves: str) -> None:
    with served() as elsewhere, prepared(moves=moves, moved_to=elsewhere.url, batch_polls=0) as server:
        with pytest.raises(Fatal):
            collected(provider, some(2), server)
        assert any(re.search(moves, path) for path in server.paths)
        assert elsewhere.paths.total() == 0


def test_files_are_uploaded_to_no_other_server() -> None:
    with served() as elsewhere, prepared(uploads_to=elsewhere.url) as server:
        with pytest.raises(Fatal, match=f"another server, {elsewhere.url}"):
            collected("gemini", some(2), server)
        assert elsewhere.connections == 0


def test_bad_arguments_are_told() -> None:
    with pytest.raises(ValueError, match=r"'gemni' has no batch jobs.*gemini"):
        providers.make_batch("gemni", base_url=None, timeout=1.0)
    for folder in (None, "/local", "gs://"):
        with pytest.raises(ValueError, match="gs://<bucket>/<folder>"):
            providers.make_batch("vertex", base_url=None, timeout=1.0, folder=folder)


def running(client: BatchClient, store: Store) -> jobs._Run:
    usage = pacing.Usage()
    budget = pacing.Budget(usage, model="", price=None, max_requests=None, max_cost=None)
    return jobs._Run(client, store, budget, usage, answered=True)


def outcomes(store: Store, requests: list[Request]) -> list[str | None]:
    found = store.find([one.key for one in requests])
    values = [found.get(one.key) for one in requests]
    return [value.reason if isinstance(value, Failure) else value and value.finish for value in values]


def collected_after(
    provider: str, change: Callable[[Server], None], tmp_path: Path, *, line_faults: list[str | int | None]
) -> list[str | None]:
    """Submits a job, changes what the provider has of it at its end, and collects it; returns the rows' outcomes."""
    requests = some(len(line_faults))
    with prepared(line_faults=line_faults, batch_polls=0) as server, Store(tmp_path / "store.sqlite") as store:

        async def work(client: BatchClient) -> None:
            await jobs._submit(requests, running(client, store))
            ((_, job, _),) = store.jobs("running")
            assert job is not None
            assert await ended(client, job) == "done"
            change(server)
            await jobs._finish(running(client, store))

        run(made(provider, server), work)
        assert not list(store.jobs(*jobs._OPEN))
        return outcomes(store, requests)


def set_openai(**fields: object) -> Callable[[Server], None]:
    return lambda server: next(iter(server.batches.values())).update(fields)


def remove_openai(field: str) -> Callable[[Server], None]:
    return lambda server: server.files.__delitem__(next(iter(server.batches.values()))[field])


def rewrite(old: bytes, new: bytes) -> Callable[[Server], None]:
    def change(server: Server) -> None:
        assert any(old in data for data in server.files.values())
        server.files.update({name: data.replace(old, new) for name, data in server.files.items()})

    return change


@pytest.mark.parametrize("value", ["", " ", None, 0, []], ids=repr)
def test_an_id_of_a_file_that_is_no_id_loses_nothing(value: object, tmp_path: Path) -> None:
    change = set_openai(error_file_id=value)
    assert collected_after("openai", change, tmp_path, line_faults=[None] * 3) == ["stop"] * 3


@pytest.mark.parametrize(
    ("provider", "change", "expected"),
    [
        ("openai", remove_openai("output_file_id"), ["lost", "lost", "refused"]),
        ("openai", remove_openai("error_file_id"), ["stop", "stop", "lost"]),
        ("openai", set_openai(output_file_id="", error_file_id=""), ["lost"] * 3),
        ("gemini", lambda server: server.files.clear(), ["lost"] * 3),
        ("vertex", lambda server: server.files.clear(), ["lost"] * 3),
    ],
    ids=["replies gone", "errors gone", "no ids", "gemini", "vertex"],
)
def test_rows_of_a_lost_file_fail_and_the_others_are_kept(
    provider: str, change: Callable[[Server], None], expected: list[str], tmp_path: Path
) -> None:
    """Asked again they would be paid for again, so that needs --retry_failed."""
    assert collected_after(provider, change, tmp_path, line_faults=[None, None, 400]) == expected


def test_a_folder_that_vertex_does_not_name_is_the_one_that_it_was_given(tmp_path: Path) -> None:
    def change(server: Server) -> None:
        (job,) = server.batches.values()
        job["outputInfo"] = {"gcsOutputDirectory": ""}
        job["outputConfig"] = {}

    assert collected_after("vertex", change, tmp_path, line_faults=[None] * 3) == ["stop"] * 3


@pytest.mark.parametrize(
    ("provider", "change"),
    [
        ("openai", rewrite(b'"status_code": 200', b'"status_code": "200"')),
        ("openai", rewrite(b'"status_code": 200', b'"status_code": null')),
        ("openai", rewrite(b'"error": null', b'"error": {"code": null, "message": null}')),
        ("gemini", rewrite(b'"response":', b'"error": {"code": 0}, "response":')),
        ("vertex", rewrite(b'"status": ""', b'"status": "OK"')),
        ("vertex", rewrite(b'"status": ""', b'"status": {"code": 0}')),
    ],
    ids=["text", "null", "empty error", "gemini, code 0", "vertex, OK", "vertex, code 0"],
)
def test_a_line_with_a_reply_is_a_reply_whatever_its_status(
    provider: str, change: Callable[[Server], None], tmp_path: Path
) -> None:
    assert collected_after(provider, change, tmp_path, line_faults=[None] * 3) == ["stop"] * 3


@pytest.mark.parametrize(
    ("provider", "line", "reason"),
    [
        ("openai", {"response": {"status_code": "413", "body": {"error": {"message": "so"}}}}, "too_long"),
        ("openai", {"response": {"status_code": "500", "body": "no JSON"}}, None),
        ("gemini", {"error": {"code": "3", "message": "so"}}, "refused"),
        ("gemini", {"error": {"code": "INVALID_ARGUMENT", "message": "so"}}, "refused"),
        ("gemini", {"error": {"status": "INVALID_ARGUMENT"}}, "refused"),
        ("gemini", {"error": "INVALID_ARGUMENT: so"}, "refused"),
        ("gemini", {"error": {"code": 13}}, None),
        ("vertex", {"status": {"code": 3, "message": "so"}}, "refused"),
        ("vertex", {"status": "Error: UNAVAILABLE"}, None),
    ],
)  # fmt: skip
def test_errors_of_lines_are_read_in_every_form(provider: str, line: dict[str, Any], reason: str | None) -> None:
    kinds = {"openai": openai.OpenAIBatches, "gemini": gemini.GeminiBatches, "vertex": gemini.VertexBatches}
    outcome = batches._outcome(kinds[provider].reply_of, line)
    assert (outcome.reason if isinstance(outcome, Failed) else None) == reason


def test_what_cannot_be_read_now_keeps_no_other_job_from_being_collected(tmp_path: Path) -> None:
    """One file cannot be read now, one job is unknown: all else is stored, and cancelling gives the two up."""
    requests = some(9)
    with prepared(line_faults=[400], batch_polls=0) as server, Store(tmp_path / "store.sqlite") as store:
        client = made("openai", server)
        downloaded = client.download

        async def broken(file: str) -> bytes:
            if file == next(iter(server.batches.values()))["error_file_id"]:
                raise Again("The connection failed.")
            return await downloaded(file)

        async def work(client: BatchClient) -> None:
            for start in (0, 3, 6):
                await jobs._submit(requests[start : start + 3], running(client, store))
            gone = list(server.batches)[1]
            del server.batches[gone]
            client.download = broken
            with pytest.raises((Again, Fatal), match=rf"A file of the job batch_\d+ .*|does not know the job {gone}"):
                await jobs._finish(running(client, store))
            assert outcomes(store, requests) == [None, "stop", "stop", None, None, None, "refused", "stop", "stop"]
            client.download = downloaded
            with pytest.raises(Fatal, match=f"does not know the job {gone}.*--cancel_batches"):
                await jobs._finish(running(client, store))
            assert outcomes(store, requests)[:4] == ["refused", "stop", "stop", None]
            assert await jobs.cancel(client, store) == 1
            await jobs._finish(running(client, store))

        run(client, work)


def test_a_job_or_file_without_a_name_is_looked_up_or_told() -> None:
    with prepared() as server:
        client = made("openai", server)
        create = client.create

        async def nameless(source: str, first: Request, *, name: str) -> str:
            await create(source, first, name=name)
            return ""

        client.create = nameless
        job = run(client, lambda client: client.submit(some(), name="sbs-1"))
        assert list(server.batches) == [job]
    with pytest.raises(Again, match="gives the uploaded file no name: None"):
        batches.identifier(None, "the uploaded file")


def test_a_file_that_gemini_has_removed_is_gone() -> None:
    said = "You do not have permission to access the File abc or it may not exist."
    assert isinstance(refusals.problem(403, {"message": said}), Gone)
    assert not isinstance(refusals.problem(403, {"message": "Permission denied on the project."}), Gone)
