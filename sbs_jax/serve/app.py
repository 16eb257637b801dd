"""The HTTP side of a server: what each path answers, and what a request may ask for."""

import asyncio
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sbs_jax.prediction.engine import Answer, Question
from sbs_jax.serve import batching, bodies, openapi
from sbs_jax.serve.connections import error_body
from sbs_jax.serve.limits import Limits

log = logging.getLogger(__name__)

WARMING_UP, READY, STOPPING = "warming up", "ready", "stopping"


class ProblemError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})

    def response(self) -> Response:
        return _json(self.status, error_body(self.code, str(self)), headers=self.headers)


class Service:
    """What the handlers share: the queue, the limits, and whether requests are taken."""

    def __init__(self, batcher: batching.Batcher, *, limits: Limits, model: str, step: int) -> None:
        self.batcher, self.limits, self.model, self.step = batcher, limits, model, step
        self.state = WARMING_UP
        self.in_flight = 0  # requests for predictions
        self.cut = asyncio.Event()  # set where those in flight are not waited for any longer
        self._responses: dict[int, int] = {}  # by status

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/predict", self.predict, methods=["POST"]),
                Route("/health", self.health, methods=["GET"]),
                Route("/metrics", self.metrics, methods=["GET"]),
                Route("/openapi.json", self.openapi, methods=["GET"]),
            ],
            exception_handlers={
                HTTPException: self._http_error,
                ProblemError: self._problem,
                Exception: self._unforeseen,
            },
        )

    # ------------------------------------------------------------------------------------------- /predict

    async def predict(self, request: Request) -> Response:
        if self.state != READY:
            raise self._not_ready()
        self.in_flight += 1
        try:
            return await self._predict(request)
        except _GoneError:
            return self._count(Response(status_code=499))  # nobody reads it
        finally:
            self.in_flight -= 1

    async def _predict(self, request: Request) -> Response:
        data = await self._body(request)
        try:
            rows = bodies.read(data, most=self.limits.max_inputs)
        except bodies.BodyError as error:
            raise ProblemError(422 if error.code == "too_many_inputs" else 400, error.code, str(error)) from None
        asked = [row for row in rows if isinstance(row, Question)]
        answers = iter(await self._answers(asked, request) if asked else [])
        found = [_row(row if isinstance(row, bodies.Refused) else next(answers)) for row in rows]
        status = 200 if any("error" not in row for row in found) else 422
        response = _json(status, {"model": self.model, "step": self.step, "answers": found})
        return self._count(response)

    async def _body(self, request: Request) -> bytes:
        """The body, of no more bytes and in no more time than allowed; no more than that is read."""
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise self._early(
                request, 415, "wrong_type", f"the content type is {kind!r}; expected application/json (curl: -H)."
            )
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise self._early(
                request, 415, "wrong_coding", f"the content coding is {coding!r}; send the body as it is."
            )
        most = self.limits.max_body_bytes
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > most:
            raise self._too_large(request, length)
        data = bytearray()
        try:
            async with asyncio.timeout(self.limits.read_timeout):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    data += message.get("body", b"")
                    if len(data) > most:
                        raise self._too_large(request, "more")
                    if not message.get("more_body", False):
                        return bytes(data)
        except TimeoutError:
            seconds = f"{self.limits.read_timeout:g} s"
            raise ProblemError(
                408,
                "slow_body",
                f"{len(data)} bytes of the body came within {seconds}, and not its end; send it faster.",
                headers={"Connection": "close"},
            ) from None

    def _too_large(self, request: Request, got: str) -> "ProblemError":
        most = self.limits.max_body_bytes
        return self._early(
            request, 413, "too_large", f"the body has {got[:20]} bytes; at most {most}: send fewer inputs per request."
        )

    @staticmethod
    def _early(request: Request, status: int, code: str, message: str) -> "ProblemError":
        """An answer before the body was read. A client that waits to be told to send it may never do."""
        close = {"Connection": "close"} if "expect" in request.headers else None
        return ProblemError(status, code, message, headers=close)

    async def _answers(self, asked: list[Question], request: Request) -> list[Answer]:
        """Answers, unless the client goes away, or it takes too long: then rows that still wait are dropped."""
        work = asyncio.ensure_future(self.batcher.ask(asked))
        gone = asyncio.ensure_future(_disconnected(request))
        cut = asyncio.ensure_future(self.cut.wait())
        seconds = self.limits.request_timeout
        try:
            await asyncio.wait((work, gone, cut), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise _GoneError
            if cut.done():
                raise batching.ClosedError
            raise ProblemError(
                504,
                "too_slow",
                f"no answer within {seconds:g} s; {self.batcher.waiting} rows wait. Ask again later or for less.",
            )
        except batching.FullError as error:
            raise ProblemError(
                503, "queue_full", f"{error} Ask again later.", headers={"Retry-After": str(error.retry_after)}
            ) from None
        except batching.FailedError:
            raise ProblemError(
                500, "model_failed", "the model failed on the batch with these rows; the server's log says how."
            ) from None
        except batching.ClosedError:
            raise self._not_ready() from None
        finally:
            for task in (work, gone, cut):
                task.cancel()
            await asyncio.gather(work, gone, cut, return_exceptions=True)

    def _not_ready(self) -> ProblemError:
        code = self.state.replace(" ", "_")
        return ProblemError(503, code, f"the server is {self.state}.", headers={"Retry-After": "5"})

    # ------------------------------------------------------------------------------------------ the others

    async def health(self, request: Request) -> Response:
        body = {
            "status": self.state,
            "model": self.model,
            "step": self.step,
            "queue": {"rows": self.batcher.waiting, "limit": self.limits.max_queue},
            "batch": {"rows": self.batcher.computing, "seconds": round(self.batcher.busy_seconds, 3)},
        }
        return _json(200 if self.state == READY else 503, body)

    async def openapi(self, request: Request) -> Response:
        return _json(200, openapi.document(self.limits))

    async def metrics(self, request: Request) -> Response:
        counts = self.batcher.counts
        lines = []
        for name, kind, help_, values in (
            ("requests_total", "counter", "Requests for predictions, by status.", self._by_status()),
            ("rows_answered_total", "counter", "Rows that the model took.", {"": counts.answered}),
            ("rows_failed_total", "counter", "Rows of batches on which the model failed.", {"": counts.failed}),
            ("rows_dropped_total", "counter", "Rows given up before they were computed.", {"": counts.dropped}),
            ("batches_total", "counter", "Batches computed.", {"": counts.batches}),
            ("batch_seconds_total", "counter", "Seconds of the model at work.", {"": round(counts.seconds, 6)}),
            ("queue_rows", "gauge", "Rows that wait.", {"": self.batcher.waiting}),
            ("in_flight_requests", "gauge", "Requests for predictions under way.", {"": self.in_flight}),
            ("ready", "gauge", "1 where requests are taken.", {"": int(self.state == READY)}),
        ):
            lines += [f"# HELP sbs_{name} {help_}", f"# TYPE sbs_{name} {kind}"]
            lines += [f"sbs_{name}{labels} {value}" for labels, value in values.items()]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")

    def _by_status(self) -> dict[str, int]:
        return {f'{{status="{status}"}}': count for status, count in sorted(self._responses.items())}

    def _count(self, response: Response) -> Response:
        self._responses[response.status_code] = self._responses.get(response.status_code, 0) + 1
        return response

    # --------------------------------------------------------------------------------------------- errors

    async def _problem(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return self._count(error.response())

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        what = f"{request.method} {request.url.path[:200]!r}"
        known = "POST /predict, GET /health, /metrics, /openapi.json"
        return _json(
            error.status_code,
            error_body(phrase.lower().replace(" ", "_"), f"{what}: {phrase.lower()}; there are {known}."),
            headers=error.headers,
        )

    async def _unforeseen(self, request: Request, error: Exception) -> Response:
        log.error("A request ended with %s.", type(error).__name__)
        return self._count(_json(500, error_body("internal", "the server failed on this request.")))


class _GoneError(Exception):
    """The client has closed its connection."""


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _row(row: bodies.Refused | Answer) -> dict[str, Any]:
    if isinstance(row, bodies.Refused):
        return {"id": row.id, "error": row.message}
    if row.error is not None:
        return {"id": row.id, "error": row.error}
    found: dict[str, Any] = {"id": row.id, "prediction": row.prediction, "score": row.score}
    if row.rationale is not None:
        found["rationale"] = row.rationale
    if row.scores is not None:
        found["scores"] = dict(row.scores)
    return found


def _json(status: int, value: Any, *, headers: Mapping[str, str] | None = None) -> Response:
    return Response(bodies.written(value), status, headers=dict(headers or {}), media_type="application/json")
