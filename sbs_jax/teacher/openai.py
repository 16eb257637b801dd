"""OpenAI and compatible servers (vLLM, proxies), through OpenAI's SDK: single requests and batch jobs.

Bodies are built and read here and sent with the SDK's raw `post`, not as typed objects: a run over 549,367 rows keeps
1,000 requests in flight.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from typing import Any

from sbs_jax.teacher import parameters, refusals
from sbs_jax.teacher.batches import ENDED, BatchClient, BatchState, refused_line, state_of, status_of
from sbs_jax.teacher.clients import CHAT, STOP, Again, Failed, Fatal, Reply, Request
from sbs_jax.teacher.connections import HostedClient, checked_address, environment_key, http_client, sdk_module

NO_KEY = "none"
_MOST_STOPS = 4  # of OpenAI's own API


class OpenAI(HostedClient):
    """OpenAI's API, or a compatible server.

    Every request has the query of `base_url`; with `api-version` in it the key is Azure's header `api-key`.
    """

    def __init__(self, *, base_url: str | None, timeout: float, connections: int) -> None:
        super().__init__()
        sdk, httpx2 = sdk_module("openai"), sdk_module("httpx2")
        base_url = address(base_url)
        key = openai_key(base_url)
        base_url, query = divided(base_url)
        self.official, self.timeout, self.secret = is_official(base_url), timeout, "" if key == NO_KEY else key
        self.errors, self._response = (sdk.OpenAIError, httpx2.HTTPError), httpx2.Response
        http = http_client(base_url or "https://api.openai.com/v1", connections)
        # `send` applies the timeout.
        kept = {"api_key": key, "base_url": base_url, "max_retries": 0, "timeout": None, "http_client": http}
        if version := query.pop("api-version", None):
            self.sdk = sdk.AsyncAzureOpenAI(api_version=version, default_query=query, **kept)
        else:
            self.sdk = sdk.AsyncOpenAI(default_query=query, **kept)

    async def ask(self, request: Request) -> Reply:
        body = openai_body(request, official=self.official)
        path = "/chat/completions" if request.form == CHAT else "/completions"
        post, kind = self.sdk.post, self._response
        response = await self.send_accepted(request, body, lambda body: post(path, cast_to=kind, body=body))
        reply = read_openai(body_of(response.content))
        return parameters.cut(reply, request.stops) if "stop" in self.left_out[request.model] else reply

    def problem(self, error: Any) -> Exception:
        sdk, secrets = sdk_module("openai"), (self.secret,)
        if isinstance(error, sdk.APITimeoutError):
            return Again("The teacher did not answer in time.", lost=True)
        if isinstance(error, sdk.APIConnectionError):
            return refusals.disconnected(error.__cause__ or error, secrets=secrets)
        if isinstance(error, sdk.APIResponseValidationError):
            return Again(f"The reply has an unexpected form: {refusals.short(str(error), *secrets)}", lost=True)
        if isinstance(error, sdk.OpenAIError):
            return Fatal(f"{type(error).__name__}: {refusals.short(str(error), *secrets)}")
        return refusals.disconnected(error, secrets=secrets)

    async def close(self) -> None:
        await self.sdk.close()


def address(base_url: str | None) -> str | None:
    """Returns the address of the server, from the flag or OPENAI_BASE_URL; None for OpenAI's own API."""
    return checked_address(base_url or os.environ.get("OPENAI_BASE_URL") or None)


def divided(base_url: str | None) -> tuple[str | None, dict[str, str]]:
    """Divides an address into the part before its query, and the query."""
    if base_url is None:
        return None, {}
    parts = urllib.parse.urlsplit(base_url)
    return urllib.parse.urlunsplit(parts._replace(query="", fragment="")), dict(urllib.parse.parse_qsl(parts.query))


def is_official(base_url: str | None) -> bool:
    """Returns whether this is OpenAI's own API, whose chats take `max_completion_tokens` instead of `max_tokens`."""
    return base_url is None or urllib.parse.urlsplit(base_url).hostname == "api.openai.com"


def openai_key(base_url: str | None) -> str:
    """Returns the key in the environment; `NO_KEY` for another server, which rejects it if it needs a key."""
    if not os.environ.get("OPENAI_API_KEY") and not is_official(base_url):
        return NO_KEY
    return environment_key("OPENAI_API_KEY")


def openai_body(request: Request, *, official: bool) -> dict[str, Any]:
    """Returns the body of a request. Raises Fatal if OpenAI's API does not accept it."""
    drawn, stops = request.parameters, request.stops
    body: dict[str, Any] = {"model": request.model, "temperature": drawn.temperature}
    if request.form == CHAT:
        body["messages"] = [{"role": one.role, "content": one.content} for one in request.prompt.messages]
    else:
        body["prompt"] = request.prompt.text
    body["max_completion_tokens" if official and request.form == CHAT else "max_tokens"] = drawn.max_tokens
    if stops:
        if official:
            refusals.check_stops("openai", stops, most=_MOST_STOPS)
        body["stop"] = list(stops)
    if drawn.top_p is not None:
        body["top_p"] = drawn.top_p
    if drawn.temperature > 0:
        body["seed"] = request.sample
    return parameters.with_more(body, drawn.more)


def body_of(content: bytes) -> Mapping[str, Any]:
    """Parses a body of status 200; joins the chunks of an event stream, which some servers send unasked."""
    lines = content.split(b"\n")
    if not content.lstrip().startswith((b"data:", b"event:", b":")):
        return refusals.json_object(content)
    data = [line[5:].strip() for line in lines if line.startswith(b"data:")]
    chunks = [refusals.json_object(line) for line in data if line != b"[DONE]"]
    whole: dict[str, Any] = {}
    for chunk in chunks:
        whole |= {name: value for name, value in chunk.items() if value and name != "choices"}
    try:
        choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
        parts = [(choice.get("delta") or {}).get("content") or choice.get("text") or "" for choice in choices]
        ends = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
        if not ends and "error" not in whole:
            raise refusals.no_reply("no end", whole)
        return whole | {"choices": [{"text": "".join(parts), "finish_reason": ends[-1]}] if ends else []}
    except (AttributeError, TypeError, KeyError, IndexError):
        raise refusals.no_reply("an unexpected form", whole) from None


def _usage(data: Mapping[str, Any]) -> tuple[int | None, int | None]:
    usage = data.get("usage")
    found = usage if isinstance(usage, Mapping) else {}
    return refusals.billed(found.get("prompt_tokens"), found.get("completion_tokens"), total=found.get("total_tokens"))


@refusals.counted(_usage)
def read_openai(data: Mapping[str, Any]) -> Reply:
    """Reads the reply in a body of status 200. Raises Fatal, Again or Failed if it has none."""
    try:
        choices = data.get("choices")
        if not choices:
            raise refusals.in_body(data) or refusals.no_reply("no choices", data)
        choice = choices[0]
        finish = choice.get("finish_reason")
        message = choice.get("message") or {}
        text = refusals.text_of(message.get("content") if "message" in choice else choice.get("text"))
        if not text and message.get("refusal"):
            raise Failed(f"The teacher refuses: {refusals.short(message['refusal'])}", reason="refusal")
        thought = message.get("reasoning_content") or message.get("reasoning")
        if not text and thought and refusals.ended(finish) == STOP:
            raise refusals.no_reply("reasoning and no text", data)
        return refusals.reply(text, finish=finish, tokens=_usage(data), model=data.get("model"), data=data)
    except (AttributeError, TypeError, KeyError, IndexError):
        raise refusals.no_reply("an unexpected form", data) from None


class OpenAIBatches(BatchClient):
    """OpenAI's files and /v1/batches."""

    def __init__(self, *, base_url: str | None, timeout: float) -> None:
        client = OpenAI(base_url=base_url, timeout=timeout, connections=4)
        super().__init__(client)
        self._official, self._sdk = client.official, client.sdk

    def line(self, request: Request) -> dict[str, Any]:
        body = openai_body(request, official=self._official)
        return {"custom_id": request.key, "method": "POST", "url": _endpoint(request), "body": body}

    async def upload(self, text: bytes, *, name: str) -> str:
        files = self._sdk.files
        return (await self.call(lambda: files.create(file=(f"{name}.jsonl", text), purpose="batch"), transfer=True)).id

    async def create(self, source: str, first: Request, *, name: str) -> str:
        job = {"input_file_id": source, "endpoint": _endpoint(first), "completion_window": "24h"}
        return (await self._sdk.batches.create(**job, metadata={"name": name})).id

    async def poll(self, job: str) -> BatchState:
        batch = await self.call(lambda: self._sdk.batches.retrieve(job))
        counts = batch.request_counts
        errors = [error.message or error.code for error in (batch.errors and batch.errors.data) or ()]
        return BatchState(
            state=state_of(batch.status),
            total=counts and counts.total,
            done=counts and counts.completed,
            failed=counts and counts.failed,
            message="; ".join(str(error) for error in errors[:3]) or ("expired" if batch.status == "expired" else ""),
        )

    async def files(self, job: str) -> list[str]:
        batch = await self.call(lambda: self._sdk.batches.retrieve(job))
        return [name for name in (batch.output_file_id, batch.error_file_id) if isinstance(name, str) and name.strip()]

    async def download(self, file: str) -> bytes:
        return (await self.call(lambda: self._sdk.files.content(file), transfer=True)).content

    async def cancel(self, job: str) -> None:
        if (await self.poll(job)).state not in ENDED:
            await self.call(lambda: self._sdk.batches.cancel(job))

    async def listed(self) -> AsyncIterator[tuple[str, str | None]]:
        async for batch in self._sdk.batches.list(limit=100):
            yield batch.id, (batch.metadata or {}).get("name")

    @staticmethod
    def key_of(line: Mapping[str, Any]) -> str:
        return line["custom_id"]

    @staticmethod
    def reply_of(line: Mapping[str, Any]) -> Reply:
        error, response = line.get("error"), line.get("response")
        response = response if isinstance(response, dict) else {}
        body = response.get("body")
        if isinstance(body, str) and body.lstrip().startswith("{"):
            body = refusals.json_object(body)
        if isinstance(body, dict) and body.get("choices"):
            return read_openai(body)
        status = status_of(response.get("status_code"))
        if error or status is None:  # expired or cancelled: it was never answered
            raise Again(f"The line has no response: {error!r}")
        raise refused_line(500 if status == 200 else status, body)


def _endpoint(request: Request) -> str:
    return "/v1/chat/completions" if request.form == CHAT else "/v1/completions"
