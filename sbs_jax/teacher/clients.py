"""Who is asked: any OpenAI-compatible server, Gemini with a key or on Vertex AI, the built-in dataset's own teacher.

A client asks once, `await client.ask(request)`, and answers with a `Reply` or raises one of three exceptions, which say
what to do next:

    Fatal   nothing will work (wrong key, wrong model, no money): stop the run
    Again   this may pass (429, 5xx, time-out, reset connection, malformed or empty reply): wait, and ask again
    Failed  this request has no reply (content filter, longer than the context): note the reason, and go on

It never repeats a request of its own accord, and neither do the SDKs underneath: whoever counts requests and money is
the one that repeats. A credential comes from the environment or from the platform, and stands in no message.

The SDKs (`pip install 'sbs-jax[teacher]'`) know addresses, authentication and errors. Two things are done past them,
because a run over 549,367 rows keeps 1,000 requests in flight. Every connection is a pool of its own: in one pool
for all, a request looks at all of its 1,000 connections, which takes most of its time. And bodies are made and
read here, not as a typed object for each of their parts, by the SDKs' own ways for that (`post`, `extra_body`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email.utils
import functools
import hashlib
import json
import logging
import math
import os
import random
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from sbs_jax.selection import near_matches
from sbs_jax.teacher.prompts import SYSTEM, USER, Message, Prompt

CHAT, COMPLETION = "chat", "completion"
PROVIDERS = ("openai", "gemini", "vertex", "scripted")
# How a reply ended. Any other word is the provider's own.
STOP, LENGTH = "stop", "length"
CONTENT_FILTER, TOO_LONG = "content_filter", "too_long"

# Stop strings that OpenAI's own API and Gemini take at most.
_MOST_STOPS = {"openai": 4, "gemini": 5, "vertex": 5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """How a reply is drawn. `max_tokens` is its room; `stops` replace the prompt's own, which completions end at."""

    temperature: float
    max_tokens: int
    stops: tuple[str, ...] = ()
    top_p: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to ask. `form` is "chat" or "completion"; `sample` tells k replies to one prompt apart, 0, 1, ...

    Where the temperature is above 0, `sample` is also the seed that is sent.
    """

    prompt: Prompt
    model: str
    parameters: Parameters
    form: str
    sample: int

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings that are sent: the parameters', else those that a completion of this prompt needs."""
        return self.parameters.stops or (self.prompt.stops if self.form == COMPLETION else ())

    @functools.cached_property
    def key(self) -> str:
        """64 hexadecimal digits of all that decides about the reply; neither the provider nor our code is in it."""
        if self.form == CHAT:
            head, last = self.prompt.messages[:-1], [self.prompt.messages[-1].role, self.prompt.messages[-1].content]
        else:
            head, last = (), [self.prompt.text]
        whole = self._hashed(head)
        whole.update(json.dumps([last, self.sample]).encode())
        return whole.hexdigest()

    def _hashed(self, head: tuple[Message, ...]) -> Any:
        """The hash so far, of all that the rows of a dataset share; it is kept, as a run over many rows needs it."""
        which = (self.form, self.model, self.parameters, self.stops)
        known = _heads.get(which)
        # The messages are the template's own objects, so that this looks at no text.
        if known is None or known[0] != head:
            drawn = self.parameters
            shared = [self.form, self.model, float(drawn.temperature), drawn.max_tokens, drawn.top_p, self.stops]
            texts = [(message.role, message.content) for message in head]
            known = _heads[which] = head, hashlib.sha256(json.dumps([shared, texts]).encode())
        return known[1].copy()


_heads: dict[Any, tuple[tuple[Message, ...], Any]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back. `finish` is "stop", "length" (cut short) or the provider's word; tokens are the provider's count.

    Tokens that the teacher thought with count as output, as they do on the bill.
    """

    text: str
    finish: str
    input_tokens: int | None
    output_tokens: int | None
    model: str


class Fatal(Exception):  # noqa: N818  # says what to do, not what happened
    """Nothing can be asked: wrong key, wrong model, no permission, no money. It would be the same for every request."""


class Again(Exception):  # noqa: N818  # says what to do, not what happened
    """It may work later. `limited`: we are asked to slow down; `retry_after`: seconds that we are asked to wait."""

    def __init__(self, message: str, *, retry_after: float | None = None, limited: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.limited = retry_after, limited


class Failed(Exception):  # noqa: N818  # says what to do, not what happened
    """This one request is hopeless; `reason` is a word such as "content_filter" or "too_long"."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@runtime_checkable
class Client(Protocol):
    """Whoever can be asked."""

    async def ask(self, request: Request) -> Reply:
        """One request, sent once. Raises Fatal, Again or Failed."""
        ...

    async def close(self) -> None: ...


def make(provider: str, *, base_url: str | None, timeout: float, connections: int) -> Client:
    """The client of a provider; `timeout` is in seconds for a whole reply, `connections` as many as requests in flight.

    openai: OPENAI_API_KEY; another server than OpenAI's through `base_url` or OPENAI_BASE_URL, which may need no key.
    gemini: GEMINI_API_KEY or GOOGLE_API_KEY.
    vertex: GOOGLE_CLOUD_PROJECT, GOOGLE_CLOUD_LOCATION, and Google's application default credentials.
    scripted: the built-in dataset's teacher; asks nobody.

    ValueError names the variable that is missing; ImportError where the SDKs are.
    """
    if provider == "openai":
        return OpenAI(base_url=base_url, timeout=timeout, connections=connections)
    if provider in ("gemini", "vertex"):
        return Gemini(vertex=provider == "vertex", base_url=base_url, timeout=timeout, connections=connections)
    if provider == "scripted":
        return Scripted()
    raise ValueError(
        f"There is no provider {provider!r}; there are {list(PROVIDERS)}.{near_matches(provider, PROVIDERS)}"
    )


# --------------------------------------------------------------------------------------------- OpenAI


class OpenAI:
    """OpenAI, or a server that speaks as it does (vLLM, a proxy)."""

    def __init__(self, *, base_url: str | None, timeout: float, connections: int) -> None:
        sdk = _sdk("openai")
        self._errors = sdk
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        self.official = is_official(self._base_url)
        self._timeout = timeout
        http = _http(self._base_url or "https://api.openai.com/v1", connections)
        self.sdk = sdk.AsyncOpenAI(
            api_key=openai_key(self._base_url),
            base_url=self._base_url,
            max_retries=0,
            timeout=None,  # a time-out of the whole reply: see ask
            http_client=http,
        )
        self._response, self._http_errors = _sdk("httpx2").Response, _sdk("httpx2").HTTPError

    async def ask(self, request: Request) -> Reply:
        body = openai_body(request, official=self.official)
        path = "/chat/completions" if request.form == CHAT else "/completions"
        response = await self.guarded(lambda: self.sdk.post(path, cast_to=self._response, body=body))
        return read_openai(_object(response.content))

    async def guarded(self, call: Callable[[], Awaitable[Any]], *, seconds: float | None = None) -> Any:
        """What the SDK's `call` returns, within the time-out or `seconds`; its exceptions become ours."""
        seconds = seconds or self._timeout
        # Ours is raised after the handler, not in it: no exception of the SDK, with request and headers, hangs on it.
        try:
            async with asyncio.timeout(seconds):
                return await call()
        except TimeoutError:
            trouble = _too_slow(seconds)
        except UnicodeError:
            trouble = _not_text()
        except self._errors.OpenAIError as error:
            trouble = openai_problem(error, secret=self.sdk.api_key)
        except self._http_errors as error:
            trouble = _disconnected(error, secrets=(self.sdk.api_key,))
        except ValueError as error:
            trouble = _not_read(error, secrets=(self.sdk.api_key,))
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
    return _key("OPENAI_API_KEY")


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
            _check_stops("openai", stops)
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
            raise _no_reply("no choices", data)
        choice = choices[0]
        finish = choice.get("finish_reason")
        message = choice.get("message") or {}
        text = message.get("content") if "message" in choice else choice.get("text")
        usage = data.get("usage") or {}
        if finish == CONTENT_FILTER:
            raise Failed("The provider's content filter stopped the reply.", reason=CONTENT_FILTER)
        if not text and message.get("refusal"):
            raise Failed(f"The teacher refuses: {_short(message['refusal'])}", reason="refusal")
        return _reply(
            text,
            finish=finish,
            input_tokens=usage.get("prompt_tokens"),
            output_tokens=usage.get("completion_tokens"),
            model=data.get("model"),
            data=data,
        )
    except (AttributeError, TypeError, KeyError, IndexError):
        raise _no_reply("a body of another form", data) from None


def openai_problem(error: Any, *, secret: str) -> Exception:
    """Fatal, Again or Failed for an exception of the SDK."""
    openai = _sdk("openai")
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, Mapping) else {}
        message = body.get("message") or error.message
        code = str(error.code or body.get("type") or "")
        headers = error.response.headers
        return problem(error.status_code, message, code=code, retry_after=_retry_after(headers), secrets=(secret,))
    if isinstance(error, openai.APITimeoutError):
        return Again("The teacher did not answer in time.")
    if isinstance(error, openai.APIConnectionError):
        return _disconnected(error.__cause__ or error, secrets=(secret,))
    if isinstance(error, openai.APIResponseValidationError):
        return Again(f"The reply is not what was expected: {_short(str(error), secret)}")
    return Fatal(f"{type(error).__name__}: {_short(str(error), secret)}")


# --------------------------------------------------------------------------------------------- Gemini


class Gemini:
    """Gemini with a key, or on Vertex AI. `credentials` replace the application default ones (tests)."""

    def __init__(
        self, *, vertex: bool, base_url: str | None, timeout: float, connections: int, credentials: Any = None
    ) -> None:
        self._provider = "vertex" if vertex else "gemini"
        self._timeout = timeout
        self._types, self._errors = _sdk("google.genai.types"), google_errors()
        # Given a client of our own, the SDK does not use aiohttp, with which it would send a request twice.
        self._http = _http(base_url or "https://aiplatform.googleapis.com", connections)
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
        return read_gemini(_object(response.sdk_http_response.body or ""))

    async def guarded(self, call: Callable[[], Awaitable[Any]], *, seconds: float | None = None) -> Any:
        """What the SDK's `call` returns, within the time-out or `seconds`; its exceptions become ours."""
        seconds = seconds or self._timeout
        try:
            async with asyncio.timeout(seconds):
                return await call()
        except TimeoutError:
            trouble = _too_slow(seconds)
        except UnicodeError:
            trouble = _not_text()
        except self._errors as error:
            trouble = google_problem(error, secret=self._secret)
        except ValueError as error:
            trouble = _not_read(error, secrets=(self._secret,))
        raise trouble

    async def close(self) -> None:
        await self._http.aclose()
        self.sdk.close()


def google_client(*, vertex: bool, base_url: str | None, http: Any, credentials: Any) -> tuple[Any, str]:
    """The SDK's client, without retries of its own, and the key that must not be shown ("" where there is none)."""
    genai = _sdk("google.genai")
    options = {"base_url": base_url, "httpx_async_client": http}
    if not vertex:
        key = _key("GEMINI_API_KEY", "GOOGLE_API_KEY")
        return genai.Client(vertexai=False, api_key=key, http_options=options), key
    project, location = (_required(name) for name in ("GOOGLE_CLOUD_PROJECT", "GOOGLE_CLOUD_LOCATION"))
    if credentials is None:
        auth = _sdk("google.auth")
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
        _check_stops(provider, stops)
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


_FINISHES = {"STOP": STOP, "MAX_TOKENS": LENGTH}
_FILTERED = {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "MODEL_ARMOR"}


def read_gemini(data: Mapping[str, Any]) -> Reply:
    """The reply in a body of status 200. Raises Again or Failed where there is none."""
    try:
        blocked = (data.get("promptFeedback") or {}).get("blockReason")
        if blocked:
            raise Failed(f"The provider's content filter refuses the prompt: {blocked}.", reason=CONTENT_FILTER)
        candidates = data.get("candidates")
        if not candidates:
            raise _no_reply("no candidates", data)
        candidate = candidates[0]
        finish = candidate.get("finishReason")
        if finish in _FILTERED:
            raise Failed(f"The provider's content filter stopped the reply: {finish}.", reason=CONTENT_FILTER)
        parts = (candidate.get("content") or {}).get("parts") or ()
        usage = data.get("usageMetadata") or {}
        counts = [usage.get(name) for name in ("candidatesTokenCount", "thoughtsTokenCount")]
        return _reply(
            "".join(part.get("text") or "" for part in parts if not part.get("thought")),
            finish=_FINISHES.get(finish, finish and str(finish).lower()),
            input_tokens=usage.get("promptTokenCount"),
            output_tokens=None if counts == [None, None] else sum(count or 0 for count in counts),
            model=data.get("modelVersion"),
            data=data,
        )
    except (AttributeError, TypeError, KeyError, IndexError):
        raise _no_reply("a body of another form", data) from None


def google_errors() -> tuple[type[Exception], ...]:
    """What the SDK raises."""
    errors, auth, http = _sdk("google.genai.errors"), _sdk("google.auth.exceptions"), _sdk("httpx2")
    return errors.APIError, errors.UnknownApiResponseError, auth.GoogleAuthError, http.HTTPError, http.InvalidURL


def google_problem(error: Any, *, secret: str) -> Exception:
    """Fatal, Again or Failed for an exception of the SDK."""
    auth, http = _sdk("google.auth.exceptions"), _sdk("httpx2")
    if isinstance(error, _sdk("google.genai.errors").APIError):
        details = json.dumps(error.details, default=str)
        wait = _retry_after(getattr(error.response, "headers", {}))
        if wait is None and (told := re.search(r'"retryDelay": "([\d.]+)s"', details)):
            wait = float(told[1])
        # Gemini's 429 speaks of "quota" whichever limit it is; only these two are not over in a minute.
        gone = re.search(r"PerDay|credits are depleted", details)
        code = "insufficient_quota" if gone else "api_key" if "API_KEY_INVALID" in details else ""
        message = error.message or str(error)
        return problem(error.code, message, code=code, retry_after=wait, secrets=(secret,))
    if isinstance(error, auth.TransportError):
        return Again(f"Google's server of credentials cannot be reached: {_short(str(error), secret)}")
    if isinstance(error, auth.GoogleAuthError):
        return Fatal(
            f"Google refuses the application default credentials ({_short(str(error), secret)}); run "
            " `gcloud auth application-default login`."
        )
    if isinstance(error, http.TimeoutException):
        return Again("The teacher did not answer in time.")
    if isinstance(error, http.InvalidURL | http.UnsupportedProtocol):
        return Fatal(f"The address is not usable ({_short(str(error), secret)}); check --base_url.")
    if isinstance(error, http.HTTPError):
        return _disconnected(error, secrets=(secret,))
    return Again(f"The reply is not what was expected: {_short(str(error), secret)}")


# ------------------------------------------------------------------------------------------- scripted


class Scripted:
    """The built-in dataset's teacher, without a network: the same reply to the same input and sample, always.

    `latency` is in seconds per reply. Tokens are words.
    """

    def __init__(self, *, latency: float = 0.0) -> None:
        self._latency = latency

    async def ask(self, request: Request) -> Reply:
        from tasks import builtin

        await asyncio.sleep(self._latency)
        asked = request.prompt.messages[-1].content
        try:
            problem_ = builtin.problem_of(asked)
        except ValueError as error:
            raise Fatal(f"The scripted teacher knows the built-in dataset only: {error}") from None
        # Where the label is given away, it is a word of what surrounds the problem.
        hints = [label for label in builtin.LABELS if re.search(rf"\b{label}\b", asked.replace(problem_.text, ""))]
        random_ = random.Random(f"{problem_.text} {hints} {request.sample}")
        text = builtin.teacher_reply(problem_, random_)
        if len(hints) == 1:
            text = f"{problem_.question.claim(problem_.value, hints[0])} {builtin.MARKER} {hints[0]}."
        for stop in request.stops:
            text = text.split(stop)[0]
        words = re.findall(r"\s*\S+", text)
        room = request.parameters.max_tokens
        sent = request.prompt.text if request.form == COMPLETION else asked
        return Reply(
            text="".join(words[:room]),
            finish=STOP if len(words) <= room else LENGTH,
            input_tokens=len(sent.split()),
            output_tokens=min(len(words), room),
            model="scripted",
        )

    async def close(self) -> None:
        pass


# --------------------------------------------------------------------------- what went wrong, in our words

_LONGER = re.compile(
    r"context[ _]length|maximum context|maximum model length|input token count|number of tokens allowed"
    r"|prompt is too long|too many (input )?tokens|input is too long",
    re.IGNORECASE,
)
_FILTER = re.compile(r"content_filter|content_policy|content management policy|content filter", re.IGNORECASE)
_NO_KEY = re.compile(r"api_key|api key (not valid|expired)", re.IGNORECASE)
_NO_MONEY = re.compile(r"insufficient_quota|billing_hard_limit|billing_not_active|credits are depleted", re.IGNORECASE)
_LOOKS_SECRET = re.compile(r"\b(?:sk|pk|rk)-[\w*.-]{6,}|\bAIza[\w*-]{6,}|\bya29\.[\w.-]+|\bBearer\s+\S+")


def problem(
    status: int,
    message: str,
    *,
    code: str = "",
    retry_after: float | None = None,
    secrets: tuple[str, ...] = (),
) -> Exception:
    """Fatal, Again or Failed for an HTTP status other than 200. `code` is the provider's word for it."""
    said = f"{status}: {_short(message, *secrets)}"
    both = f"{code} {message}"
    if status == 402 or (status == 429 and _NO_MONEY.search(both)):
        return Fatal(f"The account's money or quota is used up ({said}).")
    if status == 429:
        return Again(f"Asked too often ({said}).", retry_after=retry_after, limited=True)
    if status in (408, 409, 425) or status >= 500:
        # 529 is the word of some for what 503 says: too many are asking.
        return Again(f"The teacher is in trouble ({said}).", retry_after=retry_after, limited=status in (503, 529))
    if status in (401, 403) or (status == 400 and _NO_KEY.search(both)):
        return Fatal(f"The teacher refuses the credentials ({said}); check the key, and what it may use.")
    if status == 404:
        return Fatal(f"There is no such model or address ({said}); check --model and --base_url.")
    if status == 413 or (status in (400, 422) and _LONGER.search(both)):
        return Failed(f"The prompt is longer than the model's context ({said}).", reason=TOO_LONG)
    if status in (400, 422) and _FILTER.search(both):
        return Failed(f"The provider's content filter refuses the prompt ({said}).", reason=CONTENT_FILTER)
    return Fatal(f"The teacher refuses the request ({said}).")


def _disconnected(error: BaseException, *, secrets: tuple[str, ...]) -> Again:
    told = _short(str(error), *secrets)
    return Again(f"The connection failed: {type(error).__name__}{told and f' ({told})'}.")


def _too_slow(seconds: float) -> Again:
    return Again(f"No whole reply within {seconds:g} s (--timeout).")


def _not_read(error: ValueError, *, secrets: tuple[str, ...]) -> Exception:
    """Where the SDK reads a body that is not JSON; and its word for an argument that it does not take."""
    if isinstance(error, json.JSONDecodeError):
        return Again(f"The reply is not JSON: {_short(error.doc, *secrets)!r}")
    return Fatal(f"The SDK refuses the request: {_short(str(error), *secrets)}")


def _not_text() -> Failed:
    return Failed("The prompt holds half of a surrogate pair, which cannot be sent as UTF-8.", reason="not_text")


def _no_reply(what: str, data: object) -> Again:
    return Again(f"The reply has {what}: {_short(json.dumps(data))}")


def _reply(text: Any, *, finish: Any, data: object, **fields: Any) -> Reply:
    """A reply, unless it is empty. One that was cut short before its first word (in thought) is a reply: of no text."""
    finish = STOP if finish is None else str(finish)
    if finish != LENGTH and not (text and text.strip()):
        raise _no_reply("no text", data)
    return Reply(text=text or "", finish=finish, **{**fields, "model": fields["model"] or ""})


def _object(content: str | bytes) -> Mapping[str, Any]:
    """The JSON object that a body of status 200 has to be."""
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
        raise Again(f"The reply is not a JSON object: {_short(text)!r}")
    return value


def _short(text: str, *secrets: str) -> str:
    """At most 300 characters of one line, without any of `secrets` and without what looks like one."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[key]")
    text = " ".join(_LOOKS_SECRET.sub("[key]", text).split())
    return text if len(text) <= 300 else f"{text[:300]} .."


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from `retry-after-ms`, or `retry-after` as a number or as a date; None where neither says."""
    with contextlib.suppress(KeyError, ValueError):
        return _seconds(float(headers["retry-after-ms"]) / 1000)
    told = headers.get("retry-after")
    if told is None:
        return None
    with contextlib.suppress(ValueError):
        return _seconds(float(told))
    with contextlib.suppress(ValueError, TypeError):
        return _seconds(email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    return None


def _seconds(value: float) -> float | None:
    return max(0.0, value) if math.isfinite(value) else None


def _check_stops(provider: str, stops: tuple[str, ...]) -> None:
    most = _MOST_STOPS[provider]
    if len(stops) > most:
        raise Fatal(f"There are {len(stops)} stop strings; {provider} takes at most {most}. Name fewer with --stop.")


# -------------------------------------------------------------------------- credentials and connections


def _required(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise ValueError(f"The environment variable {name} is not set; the teacher cannot be asked without it.")
    return value


def _key(*names: str) -> str:
    """The key in the first of these variables that is set. ValueError where none is, or where it cannot be one."""
    name = next((name for name in names if os.environ.get(name, "").strip()), None)
    if name is None:
        raise ValueError(f"No key: set the environment variable {' or '.join(names)}.")
    key = os.environ[name].strip()
    # Otherwise the exception about the header that it cannot be part of would show it.
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"The environment variable {name} holds a character that no key has; copy it again.")
    return key


def _sdk(name: str) -> Any:
    """A module of the SDKs, which only this part of the package needs."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise ImportError(
            f"Asking a hosted teacher needs the package {missing!r}: pip install 'sbs-jax[teacher]'", name=missing
        ) from None


@functools.cache
def _certificates() -> Any:
    """Whom to trust; read once, as it takes longer than a request."""
    return _sdk("httpx2").create_ssl_context()


def _http(url: str, connections: int) -> Any:
    """A client with a connection for each of `connections` requests in flight; those beyond wait for one."""
    httpx2 = _sdk("httpx2")
    for name in ("httpx2", "httpcore2", "google_genai"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a line per request otherwise
    scheme, host = urllib.parse.urlsplit(url)[:2]
    proxy = urllib.request.getproxies().get(scheme)
    if proxy is not None and urllib.request.proxy_bypass(host):
        proxy = None
    context = _certificates()
    limits = httpx2.Limits(max_connections=1, max_keepalive_connections=1)
    pools = [httpx2.AsyncHTTPTransport(limits=limits, verify=context, proxy=proxy) for _ in range(connections)]
    free = list(pools)
    places = asyncio.Semaphore(connections)

    class Pools(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: Any) -> Any:
            async with places:
                pool = free.pop()
                try:
                    response = await pool.handle_async_request(request)
                    try:
                        await response.aread()  # the connection is free again when the place is
                    except BaseException:
                        await response.aclose()
                        raise
                    return response
                finally:
                    free.append(pool)

        async def aclose(self) -> None:
            for pool in pools:
                await pool.aclose()

    # `timeout`: ask has one for the whole reply, which a server that sends byte by byte cannot stretch.
    return httpx2.AsyncClient(transport=Pools(), timeout=None, follow_redirects=True, trust_env=False)
