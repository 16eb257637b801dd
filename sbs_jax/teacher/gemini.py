"""Gemini, with a key or on Vertex AI, through Google's SDK: single requests and batch jobs.

Bodies are built and read here and sent as the SDK's `extra_body`, not as typed objects: a run over 549,367 rows keeps
1,000 requests in flight.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from sbs_jax.teacher import parameters, refusals
from sbs_jax.teacher.batches import ENDED, BatchClient, BatchState, refused_line, state_of, status_of
from sbs_jax.teacher.clients import CHAT, CONTENT_FILTER, Again, Failed, Fatal, Gone, Reply, Request
from sbs_jax.teacher.connections import (
    HostedClient,
    checked_address,
    environment_key,
    environment_value,
    http_client,
    moved,
    sdk_module,
)
from sbs_jax.teacher.prompts import SYSTEM, USER

_MOST_STOPS = 5  # with a key and on Vertex AI
_T = TypeVar("_T")


class Gemini(HostedClient):
    """Gemini with a key, or on Vertex AI. `credentials` replace the application default ones (tests)."""

    def __init__(
        self, *, vertex: bool, base_url: str | None, timeout: float, connections: int, credentials: Any = None
    ) -> None:
        super().__init__()
        self._provider, self.timeout = "vertex" if vertex else "gemini", timeout
        self._types, self._http_errors = sdk_module("google.genai.types"), sdk_module("httpx2")
        self._api_errors, self._auth_errors = sdk_module("google.genai.errors"), sdk_module("google.auth.exceptions")
        self.errors = (
            *(self._api_errors.APIError, self._api_errors.UnknownApiResponseError, self._auth_errors.GoogleAuthError),
            *(self._http_errors.HTTPError, self._http_errors.InvalidURL),
        )
        # With its default client, aiohttp, the SDK sends a request twice.
        self._http = http_client(checked_address(base_url) or "https://aiplatform.googleapis.com", connections)
        self.sdk, self.secret = google_client(
            vertex=vertex, base_url=base_url, http=self._http, credentials=credentials
        )

    async def ask(self, request: Request) -> Reply:
        body = gemini_body(request, provider=self._provider)

        def post(body: Mapping[str, Any]) -> Awaitable[Any]:
            options = self._types.HttpOptions(extra_body=dict(body))
            config = self._types.GenerateContentConfig(http_options=options, should_return_http_response=True)
            # The body's own `contents` replace the blank one.
            return self.sdk.aio.models.generate_content(model=request.model, contents=" ", config=config)

        response = await self.send_accepted(request, body, post)
        reply = read_gemini(refusals.json_object(response.sdk_http_response.body or ""))
        return parameters.cut(reply, request.stops) if "stopSequences" in self.left_out[request.model] else reply

    def problem(self, error: Any) -> Exception:
        http, auth = self._http_errors, self._auth_errors
        text = refusals.short(str(error), self.secret)
        if isinstance(error, auth.TransportError):
            return Again(f"Google's credentials server cannot be reached: {text}")
        if isinstance(error, auth.GoogleAuthError):
            return Fatal(
                f"Google refuses the application default credentials ({text}); run "
                "`gcloud auth application-default login`."
            )
        if isinstance(error, http.TimeoutException):
            return Again("The teacher did not answer in time.", lost=True)
        if isinstance(error, http.InvalidURL | http.UnsupportedProtocol):
            return Fatal(f"The address cannot be used ({text}); check --base_url.")
        if isinstance(error, http.HTTPError):
            return refusals.disconnected(error, secrets=(self.secret,))
        return Again(f"The reply has an unexpected form: {text}", lost=True)

    async def close(self) -> None:
        await self._http.aclose()
        self.sdk.close()


def credentials_given(*, vertex: bool) -> tuple[str, ...]:
    """Returns the key, or Vertex AI's project and location, from the environment. ValueError for a missing one."""
    if vertex:
        return environment_value("GOOGLE_CLOUD_PROJECT"), environment_value("GOOGLE_CLOUD_LOCATION")
    return (environment_key("GEMINI_API_KEY", "GOOGLE_API_KEY"),)


def google_client(*, vertex: bool, base_url: str | None, http: Any, credentials: Any) -> tuple[Any, str]:
    """Makes the SDK's client, without retries, and returns it with the key to hide ("" if there is none)."""
    genai = sdk_module("google.genai")
    options = {"base_url": base_url, "httpx_async_client": http}
    given = credentials_given(vertex=vertex)
    if not vertex:
        return genai.Client(vertexai=False, api_key=given[0], http_options=options), given[0]
    project, location = given
    if credentials is None:
        auth = sdk_module("google.auth")
        try:
            credentials, _ = auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        except auth.exceptions.DefaultCredentialsError:
            raise ValueError(
                "There are no application default credentials for Vertex AI. Run `gcloud auth application-default "
                "login`, or set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account."
            ) from None
    _stay(credentials)
    client = genai.Client(
        vertexai=True, project=project, location=location, credentials=credentials, http_options=options
    )
    return client, ""


def _stay(credentials: Any) -> None:
    """Lets credentials be refreshed at their own server only; the SDK's way of doing it follows redirects."""
    session = sdk_module("requests").Session()

    def check(response: Any, *_: object, **__: object) -> None:
        if 300 <= response.status_code < 400:
            response.close()
            raise moved(response.status_code, response.url, response.headers.get("location"))

    session.hooks["response"] = [check]
    request, plain_refresh = sdk_module("google.auth.transport.requests").Request(session), credentials.refresh

    def refresh(_: object) -> None:
        with session:
            plain_refresh(request)

    credentials.refresh = refresh


def gemini_body(request: Request, *, provider: str = "gemini") -> dict[str, Any]:
    """Returns the body of a request. Raises Fatal if Gemini's API does not accept it."""
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
    return parameters.with_more(body, drawn.more)


def _usage(data: Mapping[str, Any]) -> tuple[int | None, int | None]:
    usage = data.get("usageMetadata")
    found = usage if isinstance(usage, Mapping) else {}
    received = [found.get(name) for name in ("candidatesTokenCount", "thoughtsTokenCount")]
    return refusals.billed(found.get("promptTokenCount"), *received, total=found.get("totalTokenCount"))


@refusals.counted(_usage)
def read_gemini(data: Mapping[str, Any]) -> Reply:
    """Reads the reply in a body of status 200. Raises Fatal, Again or Failed if it has none."""
    try:
        blocked = (data.get("promptFeedback") or {}).get("blockReason")
        if blocked:
            raise Failed(f"The provider's content filter refuses the prompt: {blocked}.", reason=CONTENT_FILTER)
        candidates = data.get("candidates")
        if not candidates:
            raise refusals.in_body(data) or refusals.no_reply("no candidates", data)
        candidate = candidates[0]
        parts = (candidate.get("content") or {}).get("parts") or ()
        return refusals.reply(
            "".join(part.get("text") or "" for part in parts if not part.get("thought")),
            finish=candidate.get("finishReason"),
            tokens=_usage(data),
            model=data.get("modelVersion"),
            data=data,
        )
    except (AttributeError, TypeError, KeyError, IndexError):
        raise refusals.no_reply("an unexpected form", data) from None


# ------------------------------------------------------------------------------------------------ batch jobs

# gRPC's error numbers as HTTP statuses; any other number is a provider error.
_HTTP = {3: 400, 5: 404, 7: 403, 8: 429, 9: 400, 11: 400, 16: 401}
_HTTP_NAMES = {"INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 400, "NOT_FOUND": 404, "PERMISSION_DENIED": 403}


class _GoogleBatches(BatchClient):
    """Code shared by batch jobs of Gemini and Vertex AI."""

    def __init__(self, *, vertex: bool, base_url: str | None, timeout: float, credentials: Any = None) -> None:
        client = Gemini(vertex=vertex, base_url=base_url, timeout=timeout, connections=4, credentials=credentials)
        super().__init__(client)
        self._api = client.sdk.aio

    async def poll(self, job: str) -> BatchState:
        found = await self.call(lambda: self._api.batches.get(name=job))
        counts = found.completion_stats
        good, bad = (counts.successful_count, counts.failed_count) if counts is not None else (None, None)
        return BatchState(
            state=state_of(found.state and found.state.name),
            total=None if good is None else good + (bad or 0),
            done=good,
            failed=bad,
            message=(found.error and found.error.message) or "",
        )

    async def create(self, source: str, first: Request, *, name: str) -> str:
        return (await self._api.batches.create(model=first.model, src=source, config=self._config(name))).name

    def _config(self, name: str) -> dict[str, Any]:
        return {"display_name": name}

    async def cancel(self, job: str) -> None:
        if (await self.poll(job)).state not in ENDED:
            await self.call(lambda: self._api.batches.cancel(name=job))

    async def listed(self) -> AsyncIterator[tuple[str, str | None]]:
        async for job in await self._api.batches.list(config={"page_size": 100}):
            yield job.name, job.display_name


class GeminiBatches(_GoogleBatches):
    """Batch jobs of Gemini with a key, through uploaded files."""

    def __init__(self, *, base_url: str | None, timeout: float) -> None:
        super().__init__(vertex=False, base_url=base_url, timeout=timeout)

    def line(self, request: Request) -> dict[str, Any]:
        return {"key": request.key, "request": gemini_body(request)}

    async def upload(self, text: bytes, *, name: str) -> str:
        config, upload = {"display_name": name, "mime_type": "jsonl"}, self._api.files.upload
        return (await self.call(lambda: upload(file=io.BytesIO(text), config=config), transfer=True)).name

    async def files(self, job: str) -> list[str]:
        found = await self.call(lambda: self._api.batches.get(name=job))
        name = found.dest and found.dest.file_name
        return [name] if isinstance(name, str) and name.strip() else []

    async def download(self, file: str) -> bytes:
        return await self.call(lambda: self._api.files.download(file=file), transfer=True)

    @staticmethod
    def key_of(line: Mapping[str, Any]) -> str:
        return line["key"]

    @staticmethod
    def reply_of(line: Mapping[str, Any]) -> Reply:
        return _line_reply(line.get("response"), line.get("error"))


class VertexBatches(_GoogleBatches):
    """Batch jobs of Vertex AI, through a folder of Cloud Storage, `gs://<bucket>/<folder>`, with the same credentials.

    It reads `<folder>/<name>.jsonl` and writes below `<folder>/<name>/`. Its lines are identified only by
    the request that they return, so the key is stored in two of the request's labels (of at most 63 characters each).
    """

    def __init__(self, *, base_url: str | None, timeout: float, folder: str | None, credentials: Any = None) -> None:
        if folder is None or not re.fullmatch(r"gs://[^/]+(/.*)?", folder):
            raise ValueError(
                f"Batch jobs of Vertex AI need a folder in Cloud Storage, gs://<bucket>/<folder>; got {folder!r}."
            )
        super().__init__(vertex=True, base_url=base_url, timeout=timeout, credentials=credentials)
        self._folder = folder.rstrip("/")

    def line(self, request: Request) -> dict[str, Any]:
        body = gemini_body(request, provider="vertex")
        body["labels"] = {"sbs-key-0": request.key[:32], "sbs-key-1": request.key[32:]}
        return {"request": body}

    async def upload(self, text: bytes, *, name: str) -> str:
        await self._storage(lambda: _folder(self._folder).write(f"{name}.jsonl", text))
        return f"{self._folder}/{name}.jsonl"

    def _config(self, name: str) -> dict[str, Any]:
        return {"display_name": name, "dest": f"{self._folder}/{name}/"}

    async def files(self, job: str) -> list[str]:
        found = await self.call(lambda: self._api.batches.get(name=job))
        place = found.dest and found.dest.gcs_uri
        folder = place if isinstance(place, str) and place.strip() else f"{self._folder}/{found.display_name}"
        folder = folder.rstrip("/")
        names = sorted(name.decode() for name in await self._storage(lambda: _folder(folder).list()))
        return [f"{folder}/{name}" for name in names if name.endswith(".jsonl")]

    async def download(self, file: str) -> bytes:
        folder, _, name = file.rpartition("/")
        found = await self._storage(lambda: _folder(folder).read(name))
        if found.state == "missing":
            raise Gone(f"There is no such file ({file}).")
        return found.value

    async def _storage(self, call: Callable[[], Awaitable[_T]]) -> _T:
        try:
            return await call()
        except ValueError as error:  # TensorStore's exception for any error of Cloud Storage, after its own retries
            reason = str(error).split(" [")[0]
        raise Fatal(f"The folder {self._folder} cannot be used: {reason}")

    @staticmethod
    def key_of(line: Mapping[str, Any]) -> str:
        labels = line["request"]["labels"]
        return f"{labels['sbs-key-0']}{labels['sbs-key-1']}"

    @staticmethod
    def reply_of(line: Mapping[str, Any]) -> Reply:
        return _line_reply(line.get("response"), line.get("status"))


def _line_reply(response: object, error: object) -> Reply:
    """Reads a line's response; without a reply in it, its error: text or an object of Google's, with either's codes."""
    response = response if isinstance(response, dict) else {}
    if response.get("candidates") or not error:
        return read_gemini(response)
    fields = error if isinstance(error, dict) else {"message": str(error)}
    # gRPC's number, an HTTP status, or a name: "INVALID_ARGUMENT" in the object or the text.
    number = status_of(fields.get("code"))
    if number is None:
        number = next((code for word, code in _HTTP_NAMES.items() if word in json.dumps(error)), 500)
    raise refused_line(number if number >= 100 else _HTTP.get(number, 500), fields)


def _folder(url: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.open(f"{url}/").result()
