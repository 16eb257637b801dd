"""Server of one model on a port: bind, load, listen, compile the first program, answer, stop."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from sbs_jax.prediction import compiled
from sbs_jax.prediction.engine import Answer, Predictor, Question, Settings
from sbs_jax.run import checkpoints
from sbs_jax.serve import app, batching, connections, warming
from sbs_jax.serve.limits import Limits

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ServeError(ValueError):
    """Reports that the server cannot start or go on."""


def serve(
    model: str | Path,
    *,
    settings: Settings,
    limits: Limits,
    host: str,
    port: int,
    kept: str = compiled.OFF,
    base: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    dataset: str | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Serves a run until a signal and returns the exit status. `say` gets one line when it is ready.

    `kept` is the cache folder for compiled programs. ServeError if the address is unavailable, before the model loads.
    """
    listener = _bind(host, port)
    with listener:
        student = Student.load(model, kept=kept, settings=settings, base=base, adapters=adapters, dataset=dataset)
        server = _Server(student, limits=limits, listener=listener, say=say)
        status = asyncio.run(server.run())
        if server.computing:  # Python would wait for its threads, or crash them
            server.discard()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


def _bind(host: str, port: int) -> socket.socket:
    """Binds a socket that does not listen yet: connections are refused until the model is loaded."""
    if not 0 <= port < 2**16:  # the system would take it modulo 65536
        raise ServeError(f"--port is {port}; expected 0 (any free port) to 65535.")
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio sets TCP_NODELAY only on sockets made with their protocol. Without it an answer's body waits up to
        # 40 ms for the client to acknowledge its headers.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        if listener is not None:
            listener.close()
        raise ServeError(
            f"cannot listen on {host} port {port}: {error}. Choose another --host or --port (0: any free port)."
        ) from error
    return listener


@dataclasses.dataclass(frozen=True)
class Student:
    """Holds a loaded student and the cache folder of its compiled programs."""

    name: str
    step: int
    predictor: Predictor
    kept: str

    @classmethod
    def load(cls, model: str | Path, *, kept: str, **options: Any) -> "Student":
        directory, step = checkpoints.locate(model)
        return cls(directory.resolve().name, step, Predictor.load(model, fixed_shapes=True, **options), kept)

    def answer(self, rows: Sequence[Question]) -> list[Answer]:
        """Answers the rows, in order."""
        if self.predictor.settings.rationale:
            return self.predictor.answer(rows)
        error = "this server generates no rationales: start it with --rationale, or leave 'rationale' out."
        answers = iter(self.predictor.answer([row for row in rows if not row.rationale]))
        return [
            Answer(id=row.id, prediction=None, score=None, error=error) if row.rationale else next(answers)
            for row in rows
        ]


class _Server:
    """Connects model, queue and HTTP server, and runs them until a signal."""

    def __init__(
        self, student: Student, *, limits: Limits, listener: socket.socket, say: Callable[[str], None]
    ) -> None:
        self._student, self._limits, self._listener, self._say = student, limits, listener, say
        self._batcher = batching.Batcher(
            student.answer,
            max_batch=limits.max_batch,
            max_wait=limits.max_wait,
            max_queue=limits.max_queue,
            work=student.predictor.work,
        )
        self._warming = warming.Warming(student.predictor, kept=student.kept)
        self._service = app.Service(self._batcher, self._warming, limits=limits, model=student.name, step=student.step)
        try:
            most = connections.fitting(limits.max_connections)
        except OSError as error:
            raise ServeError(str(error)) from None
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self._service.app(),
                http=connections.limited(max_connections=most, read_timeout=limits.read_timeout),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=max(1, round(limits.keep_alive)),
                timeout_graceful_shutdown=2,
                backlog=connections.ACCEPTED_AT_ONCE,
            )
        )
        self._stop = asyncio.Event()
        self._error: BaseException | None = None
        self._answers = True  # whether the model's thread runs

    @property
    def computing(self) -> bool:
        """Tells whether a thread computes or compiles."""
        return self._answers or self._warming.running

    def discard(self) -> None:
        """Removes what is on disk for this process only; call it before ending the process at once."""
        self._warming.discard()

    async def run(self) -> int:
        """Runs until a signal; returns 0, or 1 if requests were left unanswered. ServeError if the model failed."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_report)
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._listener]))
        self._batcher.start(ended=self._model_ended)
        self._warming.start(answering=self._ready, failed=self._model_failed)
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait((serving, stop), return_when=asyncio.FIRST_COMPLETED)
        self._service.state = app.STOPPING
        self._warming.stop()
        left = await self._finish()
        self._uvicorn.should_exit = True
        await serving
        stop.cancel()
        if self._error is not None:
            raise ServeError(f"the model failed: {type(self._error).__name__}: {self._error}") from self._error
        if left:
            log.warning("%d requests were not answered within %g s.", left, self._limits.stop_timeout)
        return 1 if left else 0

    def _ready(self, seconds: float) -> None:
        if self._service.state != app.WARMING_UP:
            return
        self._service.state = app.READY
        host, port = self._listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        name, step = self._student.name, self._student.step
        self._say(f"ready: {url} answers with {name}, step {step}; warmed up in {seconds:.1f} s")

    def _model_ended(self, error: BaseException | None) -> None:
        self._answers, self._error = False, self._error or error
        self._stop.set()

    def _model_failed(self, error: BaseException) -> None:
        self._error = error
        self._stop.set()

    def _signalled(self, number: int) -> None:
        """Stops in order at the first signal, at once at a second."""
        if self._stop.is_set():
            self.discard()
            os._exit(128 + number)
        name, count = signal.Signals(number).name, self._service.in_flight
        log.warning("%s: no more requests are taken, %d are finished; a second signal ends at once.", name, count)
        self._stop.set()

    async def _finish(self) -> int:
        """Waits for requests in flight, fails those left after `stop_timeout` and returns their number."""
        end = time.monotonic() + self._limits.stop_timeout
        while self._service.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        left = self._service.in_flight
        self._service.give_up.set()
        self._batcher.close()
        return left


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs an error that nothing caught, without its text: asyncio would log that, and it may quote a request."""
    error = context.get("exception")
    log.error("%s: %s", context["message"], "no exception" if error is None else batching.trace(error))


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us. Lets more clients wait for a connection than it accepts at once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(socket.SOMAXCONN)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
