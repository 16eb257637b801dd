"""OpenAI, or any server that speaks as it does, over its SDK.

Bodies are made and read here, not as a typed object for each of their parts, by the SDK's own way for that (`post`),
because a run over 549,367 rows keeps 1,000 requests in flight.
"""

from __future__ import annotations

import asyncio
import os
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from sbs_jax.teacher import refusals
from sbs_jax.teacher.clients import CHAT, CONTENT_FILTER, Again, Failed, Fatal, Reply, Request
from sbs_jax.teacher.connections import environment_key, http_client, sdk_module

# Stop strings that OpenAI's own API takes at most.
_MOST_STOPS = 4


class OpenAI:
    """OpenAI, or a server that speaks as it does (vLLM, a proxy)."""

    def __init__(self, *, base_url: str | None, timeout: float, connections: int) -> None:
        sdk = sdk_module("openai")
        self._errors = sdk
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        self.official = is_official(self._base_url)
        self._timeout = timeout
        http = http_client(self._base_url or "https://api.openai.com/v1", connections)
        self.sdk = sdk.AsyncOpenAI(
            api_key=openai_key(self._base_url),
            base_url=self._base_url,
            max_retries=0,
            timeout=None,  # a time-out of the whole reply: see ask
            http_client=http,
        )
        self._response, self._http_errors = sdk_module("httpx2").Response, sdk_module("httpx2").HTTPError

    async def ask(self, request: Request) -> Reply:
        body = openai_body(request, official=self.official)
        path = "/chat/completions" if request.form == CHAT else "/completions"
        response = await self.guarded(lambda: self.sdk.post(path, cast_to=self._response, body=body))
        return read_openai(refusals.json_object(response.content))

    async def guarded(self, call: Callable[[], Awaitable[Any]], *, seconds: float | None = None) -> Any:
        """What the SDK's `call` returns, within the time-out or `seconds`; its exceptions become ours."""
        seconds = seconds or self._timeout
        # Ours is raised after the handler, not in it: no exception of the SDK, with request and headers, hangs on it.
        try:
            async with asyncio.timeout(seconds):
                return await call()
        except TimeoutError:
            trouble = refusals.too_slow(seconds)
        except UnicodeError:
            trouble = refusals.not_text()
        except self._errors.OpenAIError as error:
            trouble = openai_problem(error, secret=self.sdk.api_key)
        except self._http_errors as error:
            trouble = refusals.disconnected(error, secrets=(self.sdk.api_key,))
        except ValueError as error:
            trouble = refusals.not_read(error, secrets=(self.sdk.api_key,))
        raise trouble

    async def close(self) -> None:
        await self.sdk.close()


def is_official(base_url: str | None) -> bool:
    """Whether it is OpenAI's own API, which wants `max_completion_tokens` where other servers want `max_tokens`."""
    return base_url is None or urllib.parse.urlsplit(base_url).hostname == "api.openai.com"


def openai_key(base_url: str | None) -> str:
    """The key in the environment. A server of one's own may need none; one that does refuses, which says so."""
    if not os.environ.get("OPENAI_API_KEY") and not is_official(base_url):
        return "none"
    return environment_key("OPENAI_API_KEY")


def openai_body(request: Request, *, official: bool) -> dict[str, Any]:
    """A request as OpenAI's API takes it. Fatal where it takes no such request."""
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
    return body


def read_openai(data: Mapping[str, Any]) -> Reply:
    """The reply in a body of status 200. Raises Again or Failed where there is none."""
    try:
        choices = data.get("choices")
        if not choices:
            raise refusals.no_reply("no choices", data)
        choice = choices[0]
        finish = choice.get("finish_reason")
        message = choice.get("message") or {}
        text = message.get("content") if "message" in choice else choice.get("text")
        usage = data.get("usage") or {}
        if finish == CONTENT_FILTER:
            raise Failed("The provider's content filter stopped the reply.", reason=CONTENT_FILTER)
        if not text and message.get("refusal"):
            raise Failed(f"The teacher refuses: {refusals.short(message['refusal'])}", reason="refusal")
        return refusals.reply(
            text,
            finish=finish,
            input_tokens=usage.get("prompt_tokens"),
            output_tokens=usage.get("completion_tokens"),
            model=data.get("model"),
            data=data,
        )
    except (AttributeError, TypeError, KeyError, IndexError):
        raise refusals.no_reply("a body of another form", data) from None


def openai_problem(error: Any, *, secret: str) -> Exception:
    """Fatal, Again or Failed for an exception of the SDK."""
    openai = sdk_module("openai")
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, Mapping) else {}
        message = body.get("message") or error.message
        code = str(error.code or body.get("type") or "")
        wait = refusals.retry_after(error.response.headers)
        return refusals.problem(error.status_code, message, code=code, retry_after=wait, secrets=(secret,))
    if isinstance(error, openai.APITimeoutError):
        return Again("The teacher did not answer in time.")
    if isinstance(error, openai.APIConnectionError):
        return refusals.disconnected(error.__cause__ or error, secrets=(secret,))
    if isinstance(error, openai.APIResponseValidationError):
        return Again(f"The reply is not what was expected: {refusals.short(str(error), secret)}")
    return Fatal(f"{type(error).__name__}: {refusals.short(str(error), secret)}")
