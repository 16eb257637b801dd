"""The real SDKs ask a server over loopback that answers, or misbehaves."""

import asyncio
import dataclasses
import email.utils
import functools
import gc
import gzip
import json
import re
import shlex
import time
import traceback
import tracemalloc
import urllib.parse
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from builders.teacher_requests import request
from teacher_server import Fault, served

from sbs_jax.teacher import clients, connections, gemini, openai, providers, refusals
from sbs_jax.teacher.clients import Again, Client, Failed, Fatal, Refused, Reply, Request
from sbs_jax.teacher.prompts import Prompt
from tasks import builtin

for _name in ("openai", "google.genai"):
    pytest.importorskip(_name, reason="the SDKs of hosted teachers are not installed (pip install 'sbs-jax[teacher]')")

KEY = "secret-Key-0123456789"
HOSTED = ("openai", "gemini")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "GOOGLE_API_KEY", "GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)


async def results(client: Client, *requests: Request) -> list[Reply | Exception]:
    """Asks one request after another, then closes the client."""
    found: list[Reply | Exception] = []
    for one in requests:
        try:
            found.append(await client.ask(one))
        except Exception as error:
            found.append(error)
    await client.close()
    return found


def ask(provider: str, url: str, *requests: Request, timeout: float = 5.0) -> list[Reply | Exception]:
    async def run() -> list[Reply | Exception]:
        base_url = f"{url}/v1" if provider == "openai" else url
        client = providers.make(provider, base_url=base_url, timeout=timeout, connections=4)
        return await results(client, *requests)

    return asyncio.run(run())


def ask_through(provider: str, *faults: Fault | int | str, timeout: float = 5.0) -> list[Reply | Exception]:
    """Sends one request per fault; each arrives exactly once, whatever its outcome."""
    with served(faults=faults) as server:
        found = ask(provider, server.url, *[request()] * len(faults), timeout=timeout)
        assert server.asked == len(faults)
    return found


# ------------------------------------------------------------------------------------- what is sent


def test_openai_is_asked_a_chat() -> None:
    with served() as server:
        (reply,) = ask("openai", server.url, request(temperature=0.7, top_p=0.9, stops=("Q:",)))
        assert server.bodies == [
            {
                "model": "some-model",
                "messages": [
                    {"role": "system", "content": "Answer."},
                    {"role": "user", "content": "A?"},
                    {"role": "assistant", "content": "B."},
                    {"role": "user", "content": "Will it float?"},
                ],
                "temperature": 0.7,
                "max_tokens": 100,
                "stop": ["Q:"],
                "top_p": 0.9,
                "seed": 0,
            }
        ]
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert reply == Reply(
        text="Iron sinks. So the answer is no.",
        finish="stop",
        input_tokens=6,
        output_tokens=7,
        model="some-model-2026-01-01",
    )


def test_openai_is_asked_a_completion_that_ends_at_the_prompt_s_stops() -> None:
    with served(answer=lambda text: f" Yes: {text[-6:]}\nQ: Next") as server:
        (reply,) = ask("openai", server.url, request(form="completion"))
        assert server.paths == {"POST /v1/completions": 1}
        assert server.bodies[0]["prompt"] == "Answer.\n\nA? B.\n\nWill it float?"
        assert server.bodies[0]["stop"] == ["\nQ:"]
    assert isinstance(reply, Reply)
    assert (reply.text, reply.finish) == (" Yes: float?", "stop")


def test_only_openai_itself_is_sent_max_completion_tokens_and_at_most_four_stops() -> None:
    five = request(stops=("1", "2", "3", "4", "5"))
    assert openai.openai_body(request(), official=True)["max_completion_tokens"] == 100
    assert "max_tokens" not in openai.openai_body(request(), official=True)
    assert openai.openai_body(request(form="completion"), official=True)["max_tokens"] == 100
    assert openai.openai_body(five, official=False)["stop"] == ["1", "2", "3", "4", "5"]
    with pytest.raises(Fatal, match="at most 4"):
        openai.openai_body(five, official=True)
    assert openai.is_official(None)
    assert openai.is_official("https://api.openai.com/v1")
    assert not openai.is_official("http://localhost:8000/v1")


def test_gemini_is_asked_a_chat() -> None:
    with served() as server:
        (reply,) = ask("gemini", server.url, request(temperature=0.7, top_p=0.9, stops=("Q:",), sample=3))
        assert server.paths == {"POST /v1/models/some-model:generateContent": 1}
        assert server.bodies == [
            {
                "systemInstruction": {"parts": [{"text": "Answer."}]},
                "contents": [
                    {"role": "user", "parts": [{"text": "A?"}]},
                    {"role": "model", "parts": [{"text": "B."}]},
                    {"role": "user", "parts": [{"text": "Will it float?"}]},
                ],
                "generationConfig": {
                    "temperature": 0.7,
                    "maxOutputTokens": 100,
                    "stopSequences": ["Q:"],
                    "topP": 0.9,
                    "seed": 3,
                },
            }
        ]
        assert server.headers[0]["x-goog-api-key"] == KEY
    # Seven words, and three tokens of thought, which are billed as output.
    assert reply == Reply(
        text="Iron sinks. So the answer is no.",
        finish="stop",
        input_tokens=6,
        output_tokens=10,
        model="some-model-001",
    )


def test_gemini_takes_chats_and_five_stops_only() -> None:
    with pytest.raises(Fatal, match="takes chats only"):
        gemini.gemini_body(request(form="completion"))
    with pytest.raises(Fatal, match="at most 5"):
        gemini.gemini_body(request(stops=tuple("123456")))


def ask_vertex(url: str, credentials: object, monkeypatch: pytest.MonkeyPatch) -> Reply | Exception:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "some-project")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "europe-west4")

    async def run() -> list[Reply | Exception]:
        client = gemini.Gemini(vertex=True, base_url=url, timeout=5.0, connections=1, credentials=credentials)
        return await results(client, request())

    return asyncio.run(run())[0]


def test_vertex_asks_with_the_platform_s_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.oauth2.credentials import Credentials

    with served(key="a-token") as server:
        reply = ask_vertex(server.gemini, Credentials("a-token"), monkeypatch)
        assert isinstance(reply, Reply)
        assert reply.text == "Iron sinks. So the answer is no."
        place = "projects/some-project/locations/europe-west4/publishers/google"
        assert server.paths == {f"POST /v1beta1/{place}/models/some-model:generateContent": 1}
        assert server.headers[0]["authorization"] == "Bearer a-token"
        assert server.bodies[0]["contents"][-1] == {"role": "user", "parts": [{"text": "Will it float?"}]}


def test_expired_platform_credentials_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth.exceptions import RefreshError
    from google.oauth2.credentials import Credentials

    class Expired(Credentials):
        def refresh(self, request: object) -> None:
            raise RefreshError("invalid_grant: Token has been expired or revoked.")

    with served() as server:
        error = ask_vertex(server.gemini, Expired(None), monkeypatch)
    assert isinstance(error, Fatal)
    assert "gcloud auth application-default login" in str(error)


# ------------------------------------------------------------------------------------ the key of a request


def test_key_changes_with_everything_that_decides_about_the_reply_and_with_nothing_else() -> None:
    first = request()
    assert first.key == request().key
    assert len(first.key) == 64
    # Neither the template's hash nor, in a chat, the text of the completion is sent.
    other = Prompt(messages=first.prompt.messages, text="other", stops=("other",), template="1" * 12)
    assert Request(**{**vars_of(first), "prompt": other}).key == first.key
    different = [
        request("Does it burn?"),
        request(temperature=0.5),
        request(max_tokens=200),
        request(stops=("Q:",)),
        request(top_p=0.5),
        request(form="completion"),
        request(sample=1),
        Request(**{**vars_of(first), "model": "another"}),
        Request(
            **{**vars_of(first), "prompt": Prompt(messages=first.prompt.messages[1:], text="", stops=(), template="")}
        ),
    ]
    assert len({one.key for one in [first, *different]}) == len(different) + 1


def test_key_does_not_depend_on_what_was_asked_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [request(text).key for text in ("a", "b")]
    short = request("a")
    short = Request(
        **{**vars_of(short), "prompt": Prompt(messages=short.prompt.messages[-1:], text="", stops=(), template="")}
    )
    assert short.key not in keys
    monkeypatch.setattr(clients, "_heads", {})
    assert [request(text).key for text in ("b", "a")] == keys[::-1]
    # Stored replies are found by it for years: it may not change with the code.
    assert request().key == "bdfbc781cc730b0f7796a47f70665d105bf4b107a8499f5952c87d4737b4f6dd"
    assert (
        request(form="completion", sample=2, temperature=0.7).key
        == "fa81a2fc1e2f8071d71dcfed36e6c8780f0763560189eaf3161af091a7843581"
    )


def vars_of(one: Request) -> dict[str, object]:
    return {name: getattr(one, name) for name in ("prompt", "model", "parameters", "form", "sample")}


# --------------------------------------------------------------------------------------- what goes wrong

AGAIN: list[tuple[Fault | int | str, str, bool]] = [
    (408, "temporary error", False),
    (409, "temporary error", False),
    (429, "Asked too often", True),
    (500, "temporary error", False),
    (502, "temporary error", False),
    (503, "temporary error", True),
    (529, "temporary error", True),
    ("reset", "connection failed", False),
    ("close", "connection failed", False),
    ("malformed", "not a JSON object", False),
    ("html", "Please sign in", False),
    ("nothing", "not a JSON object", False),
    ("empty", "no c", False),
    ("null", "no text", False),
]


@pytest.mark.parametrize("provider", HOSTED)
def test_what_passes_may_be_asked_again(provider: str) -> None:
    found = ask_through(provider, *[fault for fault, _, _ in AGAIN])
    for (fault, words, limited), error in zip(AGAIN, found, strict=True):
        assert isinstance(error, Again), (fault, error)
        assert words in str(error)
        assert (error.limited, error.retry_after) == (limited, None), fault


@pytest.mark.parametrize("provider", HOSTED)
def test_a_reply_has_to_be_whole_within_the_time(provider: str) -> None:
    began = time.monotonic()
    faults = (Fault("slow", seconds=0.05), Fault("hang"), Fault("late", seconds=5))
    for error in ask_through(provider, *faults, timeout=0.5):
        assert isinstance(error, Again), repr(error)
        assert "within 0.5 s" in str(error)
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("provider", HOSTED)
def test_retry_after_is_seconds_or_a_date(provider: str) -> None:
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    expected = {"3": (3, 3), "0.5": (0.5, 0.5), "-1": (0, 0), date: (20, 60), "soon": None, "inf": None}
    found = ask_through(provider, *[Fault(429, retry_after=value) for value in expected])
    for (value, bounds), error in zip(expected.items(), found, strict=True):
        assert isinstance(error, Again)
        if bounds is None:
            assert error.retry_after is None, value
        else:
            assert error.retry_after is not None
            assert bounds[0] <= error.retry_after <= bounds[1], value


def test_gemini_s_own_delay_is_read() -> None:
    (error,) = ask_through("gemini", Fault(429, message="RetryInfo"))
    assert isinstance(error, Again)
    assert error.retry_after == 7.0


FATAL: list[tuple[Fault | int | str, str]] = [
    (401, "refuses the credentials"),
    (402, "used up"),
    (404, "no such model"),
    (Fault(403, message="You do not have access to this project."), "refuses the credentials"),
    (Fault(403, message="Key limit exceeded."), "used up"),
    (Fault(400, message="Your credit balance is too low."), "used up"),
]


@pytest.mark.parametrize("provider", HOSTED)
def test_what_would_be_so_for_every_request_is_fatal(provider: str) -> None:
    found = ask_through(provider, *[fault for fault, _ in FATAL])
    for (fault, words), error in zip(FATAL, found, strict=True):
        assert isinstance(error, Fatal), (fault, error)
        assert words in str(error)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("provider", HOSTED)
def test_no_redirect_is_followed_and_it_is_fatal(provider: str, status: int) -> None:
    with served() as elsewhere, served(moves="POST", moved_to=elsewhere.url, moved_status=status) as server:
        (error,) = ask(provider, server.url, request())
        assert isinstance(error, Fatal), repr(error)
        assert f"moved to {elsewhere.url}/v1" in str(error)
        assert f"({status})" in str(error)
        assert "--base_url" in str(error)
        assert server.paths.total() == 1
        assert elsewhere.connections == 0


@pytest.mark.parametrize("location", [f"http://elsewhere/?key={KEY}", f"/{KEY}", "http://[", ""])
def test_an_address_that_moved_is_shown_without_the_key(location: str) -> None:
    with served(moves="POST", moved_to=location + "#") as server:
        (error,) = ask("openai", server.url, request())
    assert isinstance(error, Fatal)
    assert "moved to" in str(error)
    assert KEY not in str(error)


def test_credentials_are_refreshed_at_no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.oauth2.credentials import Credentials

    with served() as elsewhere, served(moves="token", moved_to=elsewhere.url) as server:
        token_uri = f"{server.url}/token"
        credentials = Credentials(None, token_uri=token_uri, client_id="i", client_secret="s", refresh_token="r")
        error = ask_vertex(server.gemini, credentials, monkeypatch)
        assert isinstance(error, Fatal), repr(error)
        assert f"moved to {elsewhere.url}/token" in str(error)
        assert (server.paths, elsewhere.connections) == ({"POST /token": 1}, 0)


# Bodies of errors, and what must stand in the message.
BODIES: list[tuple[object, str]] = [
    ({"object": "error", "message": {"detail": [{"loc": ["body", "n"], "msg": "Extra"}]}}, '"loc": ["body", "n"]'),
    ({"message": ["first", "second"]}, '["first", "second"]'),
    ({"detail": "Not allowed here"}, "(422: Not allowed here)"),
    ({"detail": [{"msg": "a"}, {"msg": "b"}]}, '{"msg": "b"}'),
    ({"error": "a text"}, "(422: a text)"),
    ({"error": "Bad", "message": "the reason"}, "(422: Bad: the reason)"),
    ({"error": {"error": {"message": "inner"}}}, "(422: inner)"),
    ({"error": {"message": "Provider error", "metadata": {"raw": "the reason"}}}, "the reason"),
    ([{"error": {"message": "in a list", "code": 5}}], "(422: in a list)"),
    (["a", "b"], '["a", "b"]'),
    ({"error": {"code": {"deep": 1}, "type": [2], "message": None}}, '"deep": 1'),
    ({"error": None}, '{"error": null}'),
    (b"plain text", "(422: plain text)"),
    (b"<html>a page</html>", "<html>a page</html>"),
    (b'"a JSON text"', "(422: a JSON text)"),
    (b"\xff\xfe not UTF-8", "not UTF-8"),
    (b'{"message": "\\ud800 \\u001b[31m red"}', "(422: \ufffd \ufffd[31m red)"),
    (b"[" * 100_000, "[[["),
    (b"9" * 10_000, "999"),
    (b"", "(422: no reason given)"),
    (b"x" * 1000, f"(422: {'x' * 300} ..)"),
]


@pytest.mark.parametrize("provider", HOSTED)
def test_an_error_body_of_any_form_is_quoted(provider: str) -> None:
    found = ask_through(provider, *[Fault(422, body=body) for body, _ in BODIES])
    for (body, words), error in zip(BODIES, found, strict=True):
        assert isinstance(error, Refused), (body, error)
        assert words in str(error), body
        assert len(str(error)) < 400
        str(error).encode()  # for logs and the store


# What servers say about a parameter (OpenAI, Azure, Mistral, TGI, vLLM's forms, Groq, Fireworks, Anthropic, Gemini).
REFUSED: list[tuple[str, str, object]] = [
    ("openai", "temperature", {"error": {"param": "temperature", "code": "unsupported_value", "message":
     "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."}}),
    ("openai", "max_tokens", {"error": {"param": "max_tokens", "code": "unsupported_parameter", "message":
     "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."}}),
    ("openai", "max_tokens", {"error": {"message":
     "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."}}),
    ("openai", "seed", {"object": "error", "message": {"detail": [
     {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 0}]}}),
    ("openai", "seed", {"error": {"message": "Unrecognized request argument supplied: seed", "param": None}}),
    ("openai", "seed", {"error": {"message": "property 'seed' is unsupported"}}),
    ("openai", "stop", {"error": {"message": "Unsupported parameter: 'stop' is not supported with this model."}}),
    ("openai", "stop", {"error": {"message": "Stop sequences are not supported for this model."}}),
    ("openai", "stop", {"error": {"param": "stop", "message": "Invalid 'stop': array too long. Expected at most 4."}}),
    ("openai", "top_p", {"error": {"message": "`temperature` and `top_p` cannot both be specified for this model."}}),
    ("openai", "top_p", {"detail": "top_p must be strictly between 0 and 1"}),
    ("openai", "temperature", {"error": "Input validation error: `temperature` must be strictly positive"}),
    ("gemini", "seed", {"error": {"code": 400, "message":
     "Invalid JSON payload received. Unknown name \"seed\" at 'generation_config': Cannot find field."}}),
    ("gemini", "stopSequences", {"error": {"code": 400, "message": "stop_sequences are not supported by this model."}}),
]  # fmt: skip


@pytest.mark.parametrize(("provider", "name", "body"), REFUSED)
def test_a_parameter_that_a_model_refuses_is_left_out(
    provider: str, name: str, body: object, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(number: int, sent: dict[str, object]) -> Fault | None:
        given = sent.get("generationConfig") or sent
        assert isinstance(given, dict)
        return Fault(422 if number % 2 else 400, body=body) if name in given else None

    # A temperature of 0 is our default; the seed is sent with another one only.
    one = request(
        temperature=0.0 if name == "temperature" else 0.7, stops=("answer",), top_p=0.0 if name == "top_p" else None
    )
    with served(faults=refuse) as server:
        found = ask(provider, server.url, *[one] * 3)
        assert server.asked == 4  # refused once only
        sent = server.bodies[-1].get("generationConfig") or server.bodies[-1]
        assert name not in sent
        assert name != "max_tokens" or sent["max_completion_tokens"] == 100
    # The reply ends at the stop string, whoever sees to that.
    assert [(reply.text, reply.finish) for reply in found if isinstance(reply, Reply)] == [
        ("Iron sinks. So the ", "stop")
    ] * 3
    (record,) = caplog.records
    assert f"some-model is asked without {name}, which it refuses: " in record.getMessage()


def test_another_refusal_is_not_about_a_parameter() -> None:
    for body in (
        {"error": {"message": "temperature: 2.5 is invalid, expected at most 2", "param": "temperature"}},
        {"error": {"message": "max_tokens is too large: 256. This model supports at most 16.", "param": "max_tokens"}},
        {"error": {"message": "Unsupported content: please stop asking about the seed.", "param": None}},
        {"error": {"message": "Unknown model 'seed-1'.", "param": "model"}},
    ):
        with served(faults=[Fault(400, body=body)]) as server:
            (error,) = ask("openai", server.url, request(temperature=2.5, stops=("Q:",)))
            assert isinstance(error, Refused), body
            assert server.asked == 1


def test_more_parameters_are_merged_into_the_body_and_change_the_key() -> None:
    more = request(temperature=0.7, more='{"seed": null, "reasoning_effort": "low"}')
    assert openai.openai_body(more, official=False) == {
        **{k: v for k, v in openai.openai_body(request(temperature=0.7), official=False).items() if k != "seed"},
        "reasoning_effort": "low",
    }
    thinking = request(more='{"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}}')
    assert gemini.gemini_body(thinking)["generationConfig"] == {
        "temperature": 0.0,
        "maxOutputTokens": 100,
        "thinkingConfig": {"thinkingBudget": 0},
    }
    assert len({more.key, request(temperature=0.7).key, request(more='{"a": 1, "b": 2}').key}) == 3
    assert request(more='{"a": 1, "b": 2}').key == request(more='{"b":2,"a":1}').key
    for wrong in ("{", "[]", '{"max_tokens": 9}', '{"generationConfig": {"maxOutputTokens": 9}}', '{"model": "x"}'):
        with pytest.raises(ValueError, match="The parameters are"):
            request(more=wrong)


def test_no_money_is_fatal_and_gemini_s_limits_per_minute_are_not() -> None:
    (error,) = ask_through("openai", "quota")
    assert isinstance(error, Fatal)
    assert "used up" in str(error)
    # The same words for requests per minute.
    minute, gone = ask_through("gemini", "quota", Fault(429, message="Your prepayment credits are depleted."))
    assert isinstance(minute, Again)
    assert isinstance(gone, Fatal)


@pytest.mark.parametrize("provider", HOSTED)
def test_an_unknown_model_is_fatal_with_the_provider_s_words(provider: str) -> None:
    with served(models=["known"]) as server:
        (error,) = ask(provider, server.url, request())
    assert isinstance(error, Fatal)
    assert "some-model" in str(error)
    assert "--model" in str(error)


HOPELESS: list[tuple[Fault | int | str, str]] = [
    ("filter", "content_filter"),
    ("prompt_filter", "content_filter"),
    # From here on refusals: the row's fault if another row is answered.
    ("too_long", "too_long"),
    (413, "too_long"),
    (400, "refused"),
    (422, "refused"),
    (Fault(400, message="Unsupported value: 'tools' does not support 0."), "refused"),
    (Fault(400, message="The response was filtered by our content management policy."), "content_filter"),
    (Fault(400, message="Invalid prompt: it was flagged as potentially violating our usage policy."), "content_filter"),
    (Fault(403, message="Your input was flagged."), "content_filter"),
    (Fault(400, message="The decoder prompt is longer than the maximum model length of 9."), "too_long"),
    (Fault(400, message="request (82 tokens) exceeds the available context size (40 tokens)"), "too_long"),
    (Fault(422, message="`inputs` tokens + `max_new_tokens` must be <= 40. Given: 82."), "too_long"),
]


@pytest.mark.parametrize("provider", HOSTED)
def test_a_hopeless_request_says_why_and_a_truncated_one_is_a_reply(provider: str) -> None:
    *found, reply = ask_through(provider, *[fault for fault, _ in HOPELESS], "length")
    for number, ((fault, reason), error) in enumerate(zip(HOPELESS, found, strict=True)):
        assert isinstance(error, Failed), (fault, error)
        assert error.reason == reason, fault
        assert isinstance(error, Refused) == (number > 1), fault
    assert isinstance(reply, Reply)
    assert (reply.text, reply.finish) == ("Iron sinks. So", "length")


def test_a_403_without_a_reason_may_be_the_row_s_fault_at_openai_and_is_a_missing_permission_at_google() -> None:
    (error,) = ask_through("openai", 403)
    assert isinstance(error, Refused)
    assert (error.status, error.reason) == (403, "refused")
    (error,) = ask_through("gemini", 403)
    assert isinstance(error, Fatal)
    assert "check the key and its permissions" in str(error)


USAGE = {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 37}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        ({"code": 402, "message": "Insufficient credits."}, Fatal, "used up (402: Insufficient credits.)"),
        ({"code": 429, "message": "Slow down."}, Again, "too often (429: Slow down.)"),
        ({"code": "502", "message": "Provider returned error"}, Again, "Provider returned error"),
        ({"code": "insufficient_quota", "message": "No."}, Fatal, "used up"),
        ({"code": 403, "message": "Your input was flagged."}, Refused, "flagged"),
        ({"message": "Out of order."}, Again, "Out of order."),
        ("Out of order.", Again, "Out of order."),
    ],
)
def test_an_error_in_a_body_of_status_200_is_that_error(error: object, kind: type[Exception], words: str) -> None:
    for read in (openai.read_openai, gemini.read_gemini):
        with pytest.raises(kind) as found:
            read({"error": error})
        assert words in str(found.value)
        assert not getattr(found.value, "lost", None)
    with pytest.raises(Again, match="Out of order") as found:
        openai.read_openai({"object": "error", "message": "Out of order.", "code": 500, "usage": USAGE})
    assert found.value.billed == (30, 7)


def test_a_text_in_parts_is_joined() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Iron "}]
    parts += [{"type": "text", "text": "sinks."}]
    reply = openai.read_openai({"choices": [{"message": {"content": parts}, "finish_reason": "stop"}], "usage": USAGE})
    assert (reply.text, reply.output_tokens) == ("Iron sinks.", 7)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_without_a_text_says_so_and_what_it_cost(name: str) -> None:
    choice = {"message": {"content": None, name: "Hm."}, "finish_reason": "stop"}
    with pytest.raises(Again, match="reasoning and no text") as error:
        openai.read_openai({"choices": [choice], "usage": USAGE})
    assert (error.value.billed, error.value.lost) == ((30, 7), False)
    choice["finish_reason"] = "length"
    assert openai.read_openai({"choices": [choice], "usage": USAGE}).finish == "length"


def test_a_reply_without_a_bill_may_have_been_billed() -> None:
    with pytest.raises(Again) as error:
        openai.read_openai({"choices": [{"message": {"content": ""}}]})
    assert (error.value.billed, error.value.lost) == (None, True)


def test_an_end_that_is_no_word_is_named_by_its_type() -> None:
    end: list[object] = []
    for _ in range(1500):
        end = [end]
    choice = {"message": {"content": "Yes."}, "finish_reason": end}
    reply = openai.read_openai({"choices": [choice], "usage": USAGE})
    assert isinstance(reply, clients.Reply)
    assert (reply.text, reply.finish) == ("Yes.", "list")


def test_thinking_that_only_the_total_counts_is_output() -> None:
    choice = {"message": {"content": "Yes."}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 237}
    assert openai.read_openai({"choices": [choice], "usage": usage}).output_tokens == 207
    strange = openai.read_openai({"choices": [choice], "usage": [1]})
    assert (strange.text, strange.input_tokens, strange.output_tokens) == ("Yes.", None, None)


def stream(*chunks: dict[str, object]) -> bytes:
    return "".join(f"event: x\r\ndata: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks).encode()


def test_an_event_stream_that_nobody_asked_for_is_joined() -> None:
    first = {"model": "m", "choices": [{"delta": {"role": "assistant", "content": "Iron "}, "finish_reason": None}]}
    last = {"choices": [{"delta": {"content": "sinks."}, "finish_reason": "stop"}], "usage": None}
    whole = stream(first, last, {"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n"
    reply = openai.read_openai(openai.body_of(whole))
    assert reply == Reply(text="Iron sinks.", finish="stop", input_tokens=30, output_tokens=7, model="m")
    with pytest.raises(Again, match="no end"):
        openai.body_of(stream(first))
    with pytest.raises(Again, match="not a JSON object"):
        openai.body_of(whole[:80])
    with pytest.raises(Fatal, match="used up"):
        openai.read_openai(openai.body_of(stream(first, {"error": {"code": 402, "message": "No credits."}})))


def test_a_reply_that_was_all_thought_is_cut_short_and_not_empty() -> None:
    chat = {"choices": [{"finish_reason": "length", "message": {"content": None}}], "model": "m"}
    assert openai.read_openai(chat) == Reply(text="", finish="length", input_tokens=None, output_tokens=None, model="m")
    thought = {"candidates": [{"finishReason": "MAX_TOKENS"}], "usageMetadata": {"thoughtsTokenCount": 100}}
    assert gemini.read_gemini(thought) == Reply(
        text="", finish="length", input_tokens=None, output_tokens=100, model=""
    )


def test_gemini_s_thoughts_are_no_part_of_the_reply() -> None:
    parts = [{"text": "Hm.", "thought": True}, {"text": "Iron "}, {"text": "sinks."}]
    data = {"candidates": [{"finishReason": "STOP", "content": {"parts": parts}}]}
    reply = gemini.read_gemini(data)
    assert (reply.text, reply.finish) == ("Iron sinks.", "stop")


# The words of OpenAI, Gemini, Mistral, Cohere, Anthropic, TGI, vLLM, SGLang, llama.cpp, DeepSeek and GLM.
ENDS = {
    "stop": "stop STOP eos eos_token stop_sequence end_turn COMPLETE completed FINISH_REASON_STOP {'type':'stop'}",
    "length": "length max_tokens MAX_TOKENS maxTokens model_length limit max_output_tokens truncated "
    "incomplete ERROR_LIMIT",
    "content_filter": "content_filter SAFETY RECITATION BLOCKLIST PROHIBITED_CONTENT SPII IMAGE_SAFETY MODEL_ARMOR "
    "guardrail_intervened sensitive ERROR_TOXIC refusal",
    "again": "error ERROR abort cancelled USER_CANCEL tool_calls function_call MALFORMED_FUNCTION_CALL OTHER LANGUAGE "
    "insufficient_system_resource network_error timeout timed_out",
}


@pytest.mark.parametrize("provider", HOSTED)
@pytest.mark.parametrize(("meaning", "words"), ENDS.items(), ids=list(ENDS))
def test_every_provider_s_words_for_the_end_of_a_reply_have_one_meaning(
    provider: str, meaning: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    for word in words.split():
        if provider == "openai":
            read, data = openai.read_openai, {"choices": [{"message": {"content": "A."}, "finish_reason": word}]}
        else:
            parts = {"parts": [{"text": "A."}]}
            read, data = gemini.read_gemini, {"candidates": [{"content": parts, "finishReason": word}]}
        try:
            found = read(data).finish
        except Failed as error:
            found = error.reason
        except Again:
            found = "again"
        assert found == meaning, word
    assert not caplog.records


def test_an_unknown_word_for_the_end_counts_as_whole_and_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refusals, "_unknown_ends", set())
    data = {"choices": [{"message": {"content": "A."}, "finish_reason": "zapped"}]}
    assert [openai.read_openai(data).finish for _ in range(3)] == ["zapped"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "The teacher ended a reply with 'zapped', a word we do not know; such replies count as whole."
    ]


@pytest.mark.parametrize(
    "data",
    [
        {"choices": "text"},
        {"choices": [None]},
        {"choices": [{"message": "x"}]},
        {"choices": [{"message": {"content": 3}}]},
        {"choices": {"a": 1}},
    ],
)
def test_a_body_of_another_form_may_be_asked_again(data: dict[str, object]) -> None:
    with pytest.raises(Again):
        openai.read_openai(data)
    text = json.dumps(data).replace("choices", "candidates").replace("message", "content")
    with pytest.raises(Again):
        gemini.read_gemini(json.loads(text))


def test_a_refusal_is_no_reply() -> None:
    with pytest.raises(Failed, match="I cannot help") as error:
        openai.read_openai({"choices": [{"message": {"content": None, "refusal": "I cannot help."}}]})
    assert error.value.reason == "refusal"


@pytest.mark.parametrize("provider", HOSTED)
def test_text_that_cannot_be_sent_fails_alone(provider: str) -> None:
    with served() as server:
        broken, whole = ask(provider, server.url, request("\ud800"), request("\u2028 \U0001f600"))
        if isinstance(broken, Failed):
            assert broken.reason == "not_text"
        else:  # the SDK writes it as an escape
            assert isinstance(broken, Reply)
    assert isinstance(whole, Reply)


# ------------------------------------------------------------------------------------------- no key anywhere


@pytest.mark.parametrize("provider", HOSTED)
def test_the_key_is_in_no_message_no_repr_and_no_traceback(provider: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="sbs_jax")
    leak = Fault(400, message=f"Bad key {KEY} and sk-proj-abcdef***xyz and Bearer {KEY}")
    faults: list[Fault | int | str] = [leak, 401, 429, 500, "reset", "close", "html", "malformed", "empty"]
    found = ask_through(provider, *faults)
    with served(key="another") as server:  # OpenAI's server repeats the key
        (refused,) = ask(provider, server.url, request())
        assert server.paths.total() == 1
    assert isinstance(refused, Fatal)
    assert "check the key" in str(refused)
    (nobody,) = ask(provider, "http://127.0.0.1:9", request())
    assert isinstance(nobody, Again)
    assert "connection failed" in str(nobody)
    for one in [*found, refused, nobody]:
        assert isinstance(one, Fatal | Again | Failed)
        chain: BaseException | None = one
        while chain is not None:
            text = "".join(traceback.format_exception(chain)) + repr(chain) + str(chain) + repr(vars(chain))
            assert KEY not in text
            assert "sk-proj" not in text
            chain = chain.__cause__ or chain.__context__
    assert KEY not in caplog.text
    client = providers.make(provider, base_url=None, timeout=1.0, connections=1)
    assert KEY not in repr(client)
    asyncio.run(client.close())


@pytest.mark.parametrize("provider", HOSTED)
def test_a_key_that_a_reply_repeats_is_masked(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    escaped = "".join(f"\\u{ord(each):04X}" for each in KEY).encode()
    with served(answer=lambda prompt: f"Authorization: Bearer {KEY}. So the answer is no.") as server:
        (reply,) = ask(provider, server.url, request())
        assert isinstance(reply, Reply)
        assert reply.text == "Authorization: Bearer [key]. So the answer is no."
    assert connections.masked(b'{"a": "' + escaped + b'"}', KEY) == b'{"a": "[key]"}'
    assert connections.masked(rb'"key/of+base64\u003d" "key\/of+base64="', "key/of+base64=") == b'"[key]" "[key]"'
    # What a server without keys is given may be a word of a reply.
    assert connections.masked(b"EMPTY none anything", "EMPTY", "none", "anything", "") == b"EMPTY none anything"


def test_a_token_or_password_that_a_reply_repeats_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.oauth2.credentials import Credentials

    with served(answer=lambda prompt: "ya29-token-1 hunter2-9") as server:
        reply = ask_vertex(server.gemini, Credentials("ya29-token-1"), monkeypatch)
        assert isinstance(reply, Reply)
        assert reply.text == "[key] hunter2-9"
        (reply,) = ask("openai", server.url.replace("://", "://user:hunter2-9@"), request())
        assert isinstance(reply, Reply)
        assert reply.text == "ya29-token-1 [key]"


# ---------------------------------------------------------------------------------------- the size of a reply


@functools.cache
def bomb(*, window: int, megabytes: int) -> bytes:
    """Packs zeros: window 31 is gzip, 15 is zlib's form of deflate, -15 the raw one."""
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(megabytes)), packer.flush()])


@pytest.mark.parametrize("provider", HOSTED)
def test_a_reply_of_any_size_takes_little_memory(provider: str) -> None:
    faults = [
        Fault(200, body=bomb(window=31, megabytes=64), headers={"Content-Encoding": "gzip"}),
        Fault(500, body=bomb(window=31, megabytes=64), headers={"Content-Encoding": "gzip"}),
        Fault(200, body=bomb(window=15, megabytes=64), headers={"Content-Encoding": "deflate"}),
        Fault(200, body=gzip.compress(bomb(window=31, megabytes=64)), headers={"Content-Encoding": "gzip, gzip"}),
        Fault(200, body=gzip.compress(b"{}") + bytes(1 << 20), headers={"Content-Encoding": "gzip"}),
        Fault(200, body=gzip.compress(b"{}" * 1000)[:-9], headers={"Content-Encoding": "gzip"}),
        Fault(200, body=b"no gzip", headers={"Content-Encoding": "gzip"}),
        Fault(200, body=b"\x8b" * 100, headers={"Content-Encoding": "br"}),
        Fault(200, body=b"[" + b" " * (5 << 20) + b"]"),
        Fault("endless"),
    ]
    words = ["4 MiB"] * 3 + ["packed as 'gzip, gzip'"] + ["unpacked"] * 3 + ["packed as 'br'"] + ["4 MiB"] * 2
    tracemalloc.start()
    try:
        found = ask_through(provider, *faults, timeout=20.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    for expected, error in zip(words, found, strict=True):
        assert isinstance(error, Again), error
        assert expected in str(error)
    assert peak < 40 << 20  # the test's server shares the process


@pytest.mark.parametrize("provider", HOSTED)
def test_a_reply_may_be_packed(provider: str) -> None:
    with served() as server:
        (plain,) = ask(provider, server.url, request())
        assert server.headers[0]["accept-encoding"] == "gzip"
    openai_s = {"choices": [{"message": {"content": "Iron sinks."}, "finish_reason": "stop"}]}
    gemini_s = {"candidates": [{"content": {"parts": [{"text": "Iron sinks."}]}}]}
    body = gzip.compress(json.dumps(openai_s if provider == "openai" else gemini_s).encode())
    (reply,) = ask_through(provider, Fault(200, body=body, headers={"Content-Encoding": "gzip"}))
    assert isinstance(plain, Reply)
    assert isinstance(reply, Reply)
    assert reply.text == "Iron sinks."


# ------------------------------------------------------------------------------------------------ making one


@pytest.mark.parametrize(
    ("provider", "variable"),
    [("openai", "OPENAI_API_KEY"), ("gemini", "GEMINI_API_KEY or GOOGLE_API_KEY"), ("vertex", "GOOGLE_CLOUD_PROJECT")],
)
def test_a_missing_credential_is_named(provider: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=variable):
        providers.make(provider, base_url=None, timeout=1.0, connections=1)


def test_missing_platform_credentials_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    def none(**_: object) -> None:
        raise DefaultCredentialsError("no credentials")

    monkeypatch.setattr(google.auth, "default", none)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p")
    with pytest.raises(ValueError, match="GOOGLE_CLOUD_LOCATION"):
        providers.make("vertex", base_url=None, timeout=1.0, connections=1)
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "l")
    with pytest.raises(ValueError, match="gcloud auth application-default login"):
        providers.make("vertex", base_url=None, timeout=1.0, connections=1)


def test_a_server_of_one_s_own_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with served() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.openai)

        async def run() -> list[Reply | Exception]:
            return await results(providers.make("openai", base_url=None, timeout=5.0, connections=1), request())

        (reply,) = asyncio.run(run())
        assert isinstance(reply, Reply)
        assert "max_tokens" in server.bodies[0]


# What each endpoint of docs/teacher.md demands, by the host in its line.
_ENDPOINTS: dict[str, dict[str, Any]] = {
    "api.anthropic.com": {"models": ["claude-haiku-4-5"]},
    "RESOURCE.openai.azure.com/openai/v1": {"root": "/openai/v1", "models": ["DEPLOYMENT"]},
    "RESOURCE.openai.azure.com/openai/deployments": {
        "root": "/openai/deployments/DEPLOYMENT",
        "query": "api-version=2024-10-21",
        "key_header": "api-key",
    },
    "bedrock-runtime": {"root": "/openai/v1", "models": ["openai.gpt-oss-120b-1:0"]},
    "localhost:8000": {"key": None},
    "localhost:8080": {"key": None},
    "localhost:11434": {"key": None},
}
_LINES = [
    line
    for line in (Path(__file__).parents[1] / "docs" / "teacher.md").read_text("utf-8").splitlines()
    if "sbs teach .. --provider openai" in line
]


def test_the_documented_endpoints_are_those_that_are_tried() -> None:
    assert len(_LINES) == len(_ENDPOINTS)
    assert all(sum(host in line for line in _LINES) == 1 for host in _ENDPOINTS)


@pytest.mark.parametrize("host", _ENDPOINTS)
def test_a_documented_endpoint_gets_what_it_demands(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the docs as it stands, but for the address of the server."""
    demands: dict[str, Any] = {"key": KEY} | _ENDPOINTS[host]
    words = shlex.split(next(line for line in _LINES if host in line), comments=True)
    model, address = (words[words.index(flag) + 1] for flag in ("--model", "--base_url"))
    if demands["key"] is None:
        monkeypatch.delenv("OPENAI_API_KEY")
        assert not words[0].startswith("OPENAI_API_KEY=")
    else:
        assert re.fullmatch(r"OPENAI_API_KEY=\$[A-Z_]+", words[0])
    with served(**demands) as server:
        url = urllib.parse.urlsplit(address)
        address = urllib.parse.urlunsplit(url._replace(scheme="http", netloc=server.url.removeprefix("http://")))
        client = providers.make("openai", base_url=address, timeout=5.0, connections=1)
        asked = dataclasses.replace(request(stops=("Q:",)), model=model)
        (reply,) = asyncio.run(results(client, asked))
        assert isinstance(reply, Reply), reply
        assert server.bodies[0]["model"] == model
        assert server.asked == 1
        if demands["key"] is None:
            assert KEY not in str(server.headers)


def test_azure_by_deployment_refuses_a_wrong_key_and_a_missing_version() -> None:
    demands = _ENDPOINTS["RESOURCE.openai.azure.com/openai/deployments"]
    with served(key="another", **demands) as server:
        client = providers.make("openai", base_url=server.openai, timeout=5.0, connections=1)
        (refused,) = asyncio.run(results(client, request()))
        assert isinstance(refused, Fatal), refused
        assert KEY not in str(refused)
    with served(key=KEY, **demands) as server:
        client = providers.make("openai", base_url=server.openai.partition("?")[0], timeout=5.0, connections=1)
        (refused,) = asyncio.run(results(client, request()))
        assert isinstance(refused, Exception)
        assert server.asked == 0


@pytest.mark.parametrize("key", ["sk-with space", "sk-…", "sk-\x07"])
def test_a_key_that_cannot_be_one_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        providers.make("openai", base_url=None, timeout=1.0, connections=1)
    assert key not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    "address",
    [
        *("localhost:8000/v1", "127.0.0.1:8000", "//host/v1", "http://", "http:///v1", "ftp://host/v1", "host"),
        *("http://host:99999/v1", "http://host:port/v1", "http://[::1/v1", "http://ho st/v1", "http://host/v1\n"),
        *("http://a..b/v1", "http://user:hidden@", "file:///etc/passwd", "http://:8000/v1", "http://ho\\st/v1"),
    ],
)
@pytest.mark.parametrize("provider", HOSTED)
def test_an_address_that_cannot_be_used_is_refused_before_the_first_request(provider: str, address: str) -> None:
    with pytest.raises(ValueError, match="expected http:// or https:// and a host") as error:
        providers.make(provider, base_url=address, timeout=1.0, connections=1)
    assert "hidden" not in str(error.value)


def test_an_unknown_provider_is_named_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"no provider 'opnai'.*openai"):
        providers.make("opnai", base_url=None, timeout=1.0, connections=1)


def test_without_the_sdk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'sbs-jax\[teacher\]'"):
        providers.make("openai", base_url=None, timeout=1.0, connections=1)


# ------------------------------------------------------------------------------------------------ many at once


@pytest.mark.parametrize("provider", HOSTED)
def test_as_many_requests_are_in_flight_as_there_are_connections(provider: str) -> None:
    count = 200

    async def run(url: str) -> Sequence[Reply]:
        client = providers.make(provider, base_url=url, timeout=60.0, connections=count)
        replies = await asyncio.gather(*[client.ask(request(f"{number}")) for number in range(count)])
        replies += await asyncio.gather(*[client.ask(request(f"{number}")) for number in range(5)])
        await client.close()
        return replies

    with served(answer=lambda prompt: f"Reply to {prompt[-1]['content']}", latency=1.5) as server:
        replies = asyncio.run(run(server.openai if provider == "openai" else server.gemini))
        assert server.most_in_flight == count
        assert server.connections <= count
    # Every reply is the one to its own request.
    assert [reply.text for reply in replies[:count]] == [f"Reply to {number}" for number in range(count)]


def test_requests_beyond_the_connections_wait_and_a_cancelled_one_gives_its_place_back() -> None:
    async def run(url: str) -> None:
        client = providers.make("openai", base_url=url, timeout=10.0, connections=1)
        first = [asyncio.create_task(client.ask(request())) for _ in range(20)]
        await asyncio.sleep(0.05)
        for task in first[:10]:
            task.cancel()
        found = await asyncio.gather(*first, return_exceptions=True)
        assert sum(isinstance(one, Reply) for one in found) == 10
        assert sum(isinstance(one, asyncio.CancelledError) for one in found) == 10
        await client.close()

    with served(latency=0.1) as server:
        asyncio.run(run(server.openai))
        # The cancelled one that was being answered, and the one after it.
        assert server.most_in_flight <= 2


def test_a_connection_is_used_again_and_replaced_after_a_reset() -> None:
    with served(faults=[None, None, "reset", None]) as server:
        found = ask("openai", server.url, *[request()] * 4)
        assert [type(one) for one in found] == [Reply, Reply, Again, Reply]
        assert server.connections == 2


@pytest.mark.parametrize("provider", HOSTED)
def test_no_connection_is_left_open_whatever_happened(provider: str) -> None:
    faults: list[Fault | int | str] = [429, "reset", "close", "malformed", "html", Fault("slow", seconds=0.05), "hang"]
    with served(faults=faults) as server:
        found = ask(provider, server.url, *[request()] * 8, timeout=0.3)
        assert [type(one) for one in found] == [*[Again] * 7, Reply]
        deadline = time.monotonic() + 5
        while server.open_now and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.open_now == 0
    gc.collect()  # what was left open warns here, and a warning is an error


# ----------------------------------------------------------------------------------------------- scripted


def scripted(*requests: Request) -> list[Reply]:
    async def run() -> list[Reply]:
        client = providers.make("scripted", base_url=None, timeout=1.0, connections=1)
        return [await client.ask(one) for one in requests]

    return asyncio.run(run())


def problems(count: int) -> list[builtin.Problem]:
    import random

    random_ = random.Random(5)
    return [builtin.random_problem(random_) for _ in range(count)]


def test_the_scripted_teacher_answers_the_same_always_and_otherwise_for_another_sample() -> None:
    asked = [f"Q: {one.text}\nA:" for one in problems(20)]
    first = scripted(*[request(text) for text in asked])
    assert scripted(*[request(text) for text in reversed(asked)])[::-1] == first
    second = scripted(*[request(text, sample=1) for text in asked])
    assert [one.text for one in second] != [one.text for one in first]


def test_the_scripted_teacher_is_as_often_right_as_the_dataset_says() -> None:
    some = problems(600)
    replies = scripted(*[request(f"Q: {one.text}\nA:", stops=("\n\nQ:",)) for one in some])
    right = [f"So the answer is {one.label}." in reply.text for one, reply in zip(some, replies, strict=True)]
    assert abs(sum(right) / 600 - (1 - builtin.WRONG - builtin.UNUSABLE)) < 0.05
    assert not any("Q:" in reply.text for reply in replies)


def test_the_scripted_teacher_argues_for_the_label_that_is_given_away() -> None:
    for problem in problems(20):
        hinted = request(f"Q: {problem.text}\n(The correct answer is known to be no.)\nA:")
        (reply,) = scripted(hinted)
        assert reply.text.endswith("So the answer is no.")


def test_the_scripted_teacher_has_room_for_so_many_words() -> None:
    (problem,) = problems(1)
    (reply,) = scripted(request(f"Q: {problem.text}\nA:", max_tokens=2))
    assert (reply.finish, len(reply.text.split()), reply.output_tokens) == ("length", 2, 2)


def test_the_scripted_teacher_knows_nothing_else() -> None:
    with pytest.raises(Fatal, match="built-in dataset only"):
        scripted(request("Premise: a dog. Hypothesis: an animal."))


def test_a_problem_is_read_back_from_its_text() -> None:
    for problem in problems(300):
        read = builtin.problem_of(f"Q: {problems(1)[0].text}\nA: Wood floats.\n\nQ: {problem.text}\nA:")
        assert (read.text, read.label) == (problem.text, problem.label)
    with pytest.raises(ValueError, match="contains no problem such as"):
        builtin.problem_of("Will it float?")
