"""Gemini, with a key or on Vertex AI, over Google's SDK.

Bodies are made and read here, not as a typed object for each of their parts, by the SDK's own way for that
(`extra_body`), because a run over 549,367 rows keeps 1,000 requests in flight.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from sbs_jax.teacher import refusals
from sbs_jax.teacher.clients import CHAT, CONTENT_FILTER, LENGTH, STOP, Again, Failed, Fatal, Reply, Request
from sbs_jax.teacher.connections import environment_key, environment_value, http_client, sdk_module
from sbs_jax.teacher.prompts import SYSTEM, USER

# Stop strings that Gemini takes at most, with a key and on Vertex AI.
_MOST_STOPS = 5

# Its words for how a reply ended.
_FINISHES = {"STOP": STOP, "MAX_TOKENS": LENGTH}
_FILTERED = {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "MODEL_ARMOR"}


class Gemini:
    """Gemini with a key, or on Vertex AI. `credentials` replace the application default ones (tests)."""

    def __init__(
        self, *, vertex: bool, base_url: str | None, timeout: float, connections: int, credentials: Any = None
    ) -> None:
        self._provider = "vertex" if vertex else "gemini"
        self._timeout = timeout
        self._types, self._errors = sdk_module("google.genai.types"), google_errors()
        # Given a client of our own, the SDK does not use aiohttp, with which it would send a request twice.
        self._http = http_client(base_url or "https://aiplatform.googleapis.com", connections)
        self.sdk, self._secret = google_client(
            vertex=vertex, base_url=base_url, http=self._http, credentials=credentials
        )

    async def ask(self, request: Request) -> Reply:
        body = gemini_body(request, provider=self._provider)
        options = self._types.HttpOptions(extra_body=body)
        config = self._types.GenerateContentConfig(http_options=options, should_return_http_response=True)
        # `contents` is overwritten by that of the body.
        models = self.sdk.aio.models
        response = await self.guarded(lambda: models.generate_content(model=request.model, contents=" ", config=config))
        return read_gemini(refusals.json_object(response.sdk_http_response.body or ""))

    async def guarded(self, call: Callable[[], Awaitable[Any]], *, seconds: float | None = None) -> Any:
        """What the SDK's `call` returns, within the time-out or `seconds`; its exceptions become ours."""
        seconds = seconds or self._timeout
        try:
            async with asyncio.timeout(seconds):
                return await call()
        except TimeoutError:
            trouble = refusals.too_slow(seconds)
        except UnicodeError:
            trouble = refusals.not_text()
        except self._errors as error:
            trouble = google_problem(error, secret=self._secret)
        except ValueError as error:
            trouble = refusals.not_read(error, secrets=(self._secret,))
        raise trouble

    async def close(self) -> None:
        await self._http.aclose()
        self.sdk.close()


def google_client(*, vertex: bool, base_url: str | None, http: Any, credentials: Any) -> tuple[Any, str]:
    """The SDK's client, without retries of its own, and the key that must not be shown ("" where there is none)."""
    genai = sdk_module("google.genai")
    options = {"base_url": base_url, "httpx_async_client": http}
    if not vertex:
        key = environment_key("GEMINI_API_KEY", "GOOGLE_API_KEY")
        return genai.Client(vertexai=False, api_key=key, http_options=options), key
    project, location = (environment_value(name) for name in ("GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION"))
    if credentials is None:
        auth = sdk_module("google.auth")
        try:
            credentials, _ = auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        except auth.exceptions.DefaultCredentialsError:
            raise ValueError(
                "There are no application default credentials for Vertex AI. Run `gcloud auth application-default "
                "login`, or let GOOGLE_APPLICATION_CREDENTIALS name the file of a service account."
            ) from None
    client = genai.Client(
        vertexai=True, project=project, location=location, credentials=credentials, http_options=options
    )
    return client, ""


def gemini_body(request: Request, *, provider: str = "gemini") -> dict[str, Any]:
    """A request as Gemini's API takes it. Fatal where it takes no such request."""
    if request.form != CHAT:
        raise Fatal(f"Gemini takes chats only; the form is {request.form!r}. Use --form chat.")
    drawn, stops = request.parameters, request.stops
    config: dict[str, Any] = {"temperature": drawn.temperature, "maxOutputTokens": drawn.max_tokens}
    if stops:
        refusals.check_stops(provider, stops, most=_MOST_STOPS)
        config["stopSequences"] = list(stops)
    if drawn.top_p is not None:
        config["topP"] = drawn.top_p
    if drawn.temperature > 0:
        config["seed"] = request.sample
    body: dict[str, Any] = {"generationConfig": config}
    system = [{"text": one.content} for one in request.prompt.messages if one.role == SYSTEM]
    if system:
        body["systemInstruction"] = {"parts": system}
    body["contents"] = [
        {"role": "user" if one.role == USER else "model", "parts": [{"text": one.content}]}
        for one in request.prompt.messages
        if one.role != SYSTEM
    ]
    return body


def read_gemini(data: Mapping[str, Any]) -> Reply:
    """The reply in a body of status 200. Raises Again or Failed where there is none."""
    try:
        blocked = (data.get("promptFeedback") or {}).get("blockReason")
        if blocked:
            raise Failed(f"The provider's content filter refuses the prompt: {blocked}.", reason=CONTENT_FILTER)
        candidates = data.get("candidates")
        if not candidates:
            raise refusals.no_reply("no candidates", data)
        candidate = candidates[0]
        finish = candidate.get("finishReason")
        if finish in _FILTERED:
            raise Failed(f"The provider's content filter stopped the reply: {finish}.", reason=CONTENT_FILTER)
        parts = (candidate.get("content") or {}).get("parts") or ()
        usage = data.get("usageMetadata") or {}
        counts = [usage.get(name) for name in ("candidatesTokenCount", "thoughtsTokenCount")]
        return refusals.reply(
            "".join(part.get("text") or "" for part in parts if not part.get("thought")),
            finish=_FINISHES.get(finish, finish and str(finish).lower()),
            input_tokens=usage.get("promptTokenCount"),
            output_tokens=None if counts == [None, None] else sum(count or 0 for count in counts),
            model=data.get("modelVersion"),
            data=data,
        )
    except (AttributeError, TypeError, KeyError, IndexError):
        raise refusals.no_reply("a body of another form", data) from None


def google_errors() -> tuple[type[Exception], ...]:
    """What the SDK raises."""
    errors, auth, http = sdk_module("google.genai.errors"), sdk_module("google.auth.exceptions"), sdk_module("httpx2")
    return errors.APIError, errors.UnknownApiResponseError, auth.GoogleAuthError, http.HTTPError, http.InvalidURL


def google_problem(error: Any, *, secret: str) -> Exception:
    """Fatal, Again or Failed for an exception of the SDK."""
    auth, http = sdk_module("google.auth.exceptions"), sdk_module("httpx2")
    if isinstance(error, sdk_module("google.genai.errors").APIError):
        details = json.dumps(error.details, default=str)
        wait = refusals.retry_after(getattr(error.response, "headers", {}))
        if wait is None and (told := re.search(r'"retryDelay": "([\d.]+)s"', details)):
            wait = float(told[1])
        # Gemini's 429 speaks of "quota" whichever limit it is; only these two are not over in a minute.
        gone = re.search(r"PerDay|credits are depleted", details)
        code = "insufficient_quota" if gone else "api_key" if "API_KEY_INVALID" in details else ""
        message = error.message or str(error)
        return refusals.problem(error.code, message, code=code, retry_after=wait, secrets=(secret,))
    if isinstance(error, auth.TransportError):
        return Again(f"Google's server of credentials cannot be reached: {refusals.short(str(error), secret)}")
    if isinstance(error, auth.GoogleAuthError):
        return Fatal(
            f"Google refuses the application default credentials ({refusals.short(str(error), secret)}); run "
            " `gcloud auth application-default login`."
        )
    if isinstance(error, http.TimeoutException):
        return Again("The teacher did not answer in time.")
    if isinstance(error, http.InvalidURL | http.UnsupportedProtocol):
        return Fatal(f"The address is not usable ({refusals.short(str(error), secret)}); check --base_url.")
    if isinstance(error, http.HTTPError):
        return refusals.disconnected(error, secrets=(secret,))
    return Again(f"The reply is not what was expected: {refusals.short(str(error), secret)}")
