"""HTTP side of the server: paths, limits, errors and counters."""

import asyncio
import collections
import contextlib
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

import pydantic
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sbs_jax.prediction.engine import Answer, Question
from sbs_jax.serve import batching, bodies, openapi, warming
from sbs_jax.serve.bodies import RequestError
from sbs_jax.serve.connections import Unread
from sbs_jax.serve.limits import Limits

log = logging.getLogger(__name__)

WARMING_UP, READY, STOPPING = "warming up", "ready", "stopping"


class Service:
    """Handles requests: holds the queue, the limits, and whether requests are accepted."""

    def __init__(
        self, batcher: batching.Batcher, compiling: warming.Warming, *, limits: Limits, model: str, step: int
    ) -> None:
        self.batcher, self._compiling, self.limits, self.model, self.step = batcher, compiling, limits, model, step
        self.state: Literal["warming up", "ready", "stopping"] = WARMING_UP
        self.in_flight = 0  # requests for predictions
        self.give_up = asyncio.Event()  # set when requests in flight are no longer waited for
        self._responses: collections.Counter[int] = collections.Counter()  # by status

    def app(self) -> ASGIApp:
        app = Starlette(
            routes=[
                Route("/predict", self.predict, methods=["POST"]),
                Route("/health", self.health, methods=["GET"]),
                Route("/metrics", self.metrics, methods=["GET"]),
                Route("/openapi.json", self.openapi, methods=["GET"]),
            ],
            middleware=[Middleware(Unread, seconds=self.limits.read_timeout)],
            exception_handlers={
                HTTPException: self._http_error,
                RequestError: self._request_error,
                Exception: self._unexpected,
            },
        )

        async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
            # Starlette raises what `_unexpected` has answered again, and uvicorn would log it with its text.
            with contextlib.suppress(Exception):
                await app(scope, receive, send)

        return quiet

    # ------------------------------------------------------------------------------------------- /predict

    async def predict(self, request: Request) -> Response:
        if self.state != READY:
            raise self._not_ready()
        self.in_flight += 1
        try:
            limits = self.limits
            rows = bodies.read(await self._body(request), most=limits.max_inputs, most_choices=limits.max_choices)
            questions = [row for row in rows if isinstance(row, Question)]
            answers = iter(await self._answers(questions, request) if questions else [])
        except _GoneError:
            return self._count(Response(status_code=499))  # nobody reads it
        finally:
            self.in_flight -= 1
        done = [next(answers) if isinstance(row, Question) else row for row in rows]
        body = bodies.Answers.model_validate({"model": self.model, "step": self.step, "answers": done})
        answered = any(isinstance(row, bodies.Answer) for row in body.answers)
        return self._count(_json(200 if answered else 422, body))

    async def _body(self, request: Request) -> bytes:
        """Reads the body within the limits of time and size."""
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            message = f"the content type is {kind!r}; expected application/json (curl: -H)."
            raise RequestError(415, "wrong_type", message)
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            message = f"the content coding is {coding!r}; send the body without compression."
            raise RequestError(415, "wrong_coding", message)
        most, seconds = self.limits.max_body_bytes, self.limits.read_timeout
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > most:
            raise _too_large(length, most)
        data = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    data += message.get("body", b"")
                    if len(data) > most:
                        raise _too_large("more", most)
                    if not message.get("more_body", False):
                        return bytes(data)
        except TimeoutError:
            got = f"{len(data)} bytes of the body came within {seconds:g} s, without its end"
            raise RequestError(408, "slow_body", f"{got}; send it faster.") from None

    async def _answers(self, questions: list[Question], request: Request) -> list[Answer]:
        """Waits for the answers. If the client leaves or time is up, rows that still wait leave the queue."""
        answers = asyncio.ensure_future(self.batcher.ask(questions))
        gone = asyncio.ensure_future(_disconnected(request))
        give_up = asyncio.ensure_future(self.give_up.wait())
        tasks, seconds = (answers, gone, give_up), self.limits.request_timeout
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return answers.result()
            if gone.done():
                raise _GoneError
            if give_up.done():
                raise batching.ClosedError
            waiting = f"no answer within {seconds:g} s; {self.batcher.waiting} rows wait"
            raise RequestError(504, "too_slow", f"{waiting}. Ask again later or for less.")
        except batching.FullError as error:
            headers = {"Retry-After": str(error.retry_after)}
            raise RequestError(503, "queue_full", f"{error} Ask again later.", headers=headers) from None
        except batching.FailedError:
            message = "the model failed on the batch with these rows; the server's log says how."
            raise RequestError(500, "model_failed", message) from None
        except batching.ClosedError:
            raise self._not_ready() from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _not_ready(self) -> RequestError:
        code = self.state.replace(" ", "_")
        return RequestError(503, code, f"the server is {self.state}.", headers={"Retry-After": "5"})

    # ------------------------------------------------------------------------------------------ the others

    async def health(self, request: Request) -> Response:
        body = bodies.Health(
            status=self.state,
            model=self.model,
            step=self.step,
            queue=bodies.Queue(rows=self.batcher.waiting, limit=self.limits.max_queue),
            batch=bodies.Batch(rows=self.batcher.computing, seconds=round(self.batcher.busy_seconds, 3)),
            programs=bodies.Programs(ready=self._compiling.ready, count=self._compiling.count),
        )
        return _json(200 if self.state == READY else 503, body)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.document(self.limits))

    async def metrics(self, request: Request) -> Response:
        counts = self.batcher.counts
        lines = []
        for name, kind, help_, values in (
            ("requests_total", "counter", "Requests for predictions, by status.", self._by_status()),
            ("rows_answered_total", "counter", "Rows answered.", {"": counts.answered}),
            ("rows_failed_total", "counter", "Rows of batches on which the model failed.", {"": counts.failed}),
            ("rows_dropped_total", "counter", "Rows dropped before they were computed.", {"": counts.dropped}),
            ("batches_total", "counter", "Batches computed.", {"": counts.batches}),
            ("batch_seconds_total", "counter", "Seconds of the model computing.", {"": round(counts.seconds, 6)}),
            ("queue_rows", "gauge", "Rows waiting.", {"": self.batcher.waiting}),
            ("in_flight_requests", "gauge", "Requests for predictions in flight.", {"": self.in_flight}),
            ("ready", "gauge", "1 if requests are accepted.", {"": int(self.state == READY)}),
        ):
            lines += [f"# HELP sbs_{name} {help_}", f"# TYPE sbs_{name} {kind}"]
            lines += [f"sbs_{name}{labels} {value}" for labels, value in values.items()]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")

    def _by_status(self) -> dict[str, int]:
        return {f'{{status="{status}"}}': count for status, count in sorted(self._responses.items())}

    def _count(self, response: Response) -> Response:
        self._responses[response.status_code] += 1
        return response

    # --------------------------------------------------------------------------------------------- errors

    async def _request_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return self._count(_json(error.status, bodies.Error.of(error.code, str(error)), headers=error.headers))

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase.lower()
        got = f"{request.method} {request.url.path[:200]!r}: {phrase}"
        message = f"{got}; there are POST /predict, GET /health, /metrics, /openapi.json."
        body = bodies.Error.of(phrase.replace(" ", "_"), message)
        return _json(error.status_code, body, headers=error.headers)

    async def _unexpected(self, request: Request, error: Exception) -> Response:
        log.error("A request failed: %s", batching.trace(error))
        return self._count(_json(500, bodies.Error.of("internal", "the server failed on this request.")))


class _GoneError(Exception):
    """Reports that the client has closed its connection."""


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(got: str, most: int) -> RequestError:
    message = f"the body has {got[:20]} bytes; at most {most}: send fewer inputs per request."
    return RequestError(413, "too_large", message)


def _json(status: int, body: pydantic.BaseModel, *, headers: Mapping[str, str] | None = None) -> Response:
    return Response(bodies.encoded(body), status, headers=dict(headers or {}), media_type="application/json")
