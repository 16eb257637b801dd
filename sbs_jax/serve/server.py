"""One model behind a port: bind, load, listen, warm up, answer, and end in good order."""

import asyncio
import contextlib
import dataclasses
import gc
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
from sbs_jax.serve import app, batching, connections
from sbs_jax.serve.limits import Limits

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOKS_PER_SECOND = 4


class ServeError(ValueError):
    """The server cannot start, or could not go on."""


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
    say: Callable[[str], None] = print,
) -> int:
    """Serves a run until told to end; the exit status. `say` gets one line when it is ready.

    Compiled programs are `kept` in that folder.

    ServeError where the address cannot be had, before the model is loaded.
    """
    listener = _bind(host, port)
    with listener:
        student = Student.load(model, kept=kept, settings=settings, base=base, adapters=adapters)
        server = _Server(student, limits=limits, listener=listener, say=say)
        status = asyncio.run(server.run())
        if server.computing:  # Python would wait for it, or pull the ground from under it
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


def _bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet: clients are refused until the model is loaded."""
    if not 0 <= port < 2**16:  # the system takes what is left of it after division
        raise ServeError(f"--port is {port}; expected 0 (any that is free) to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # asyncio sets TCP_NODELAY only on sockets made with their protocol. Without it an answer's body waits up to
        # 40 ms for the client to acknowledge its headers.
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ServeError(f"--host {host} --port {port}: {error}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host} port {port}: {error}. Choose another --port (0: any that is free)."
        ) from error
    return listener


@dataclasses.dataclass(frozen=True)
class Student:
    """The loaded student, and where its compiled programs are kept."""

    name: str
    step: int
    predictor: Predictor
    kept: str

    @classmethod
    def load(cls, model: str | Path, *, kept: str, **options: Any) -> "Student":
        directory, step = checkpoints.locate(model)
        return cls(directory.resolve().name, step, Predictor.load(model, **options), kept)

    def warm_up(self) -> float:
        """Compiles everything, or reads it; seconds."""
        with compiled.kept(self.kept):
            seconds = self.predictor.warm_up()
        # What is loaded stays. Looking through it again, Python would stop everything for a second now and then.
        gc.collect()
        gc.freeze()
        return seconds

    def answer(self, rows: Sequence[Question]) -> list[Answer]:
        """An answer to each, in order."""
        if self.predictor.settings.rationale:
            return self.predictor.answer(rows)
        told = "this server generates no rationales: start it with --rationale, or leave 'rationale' out."
        answers = iter(self.predictor.answer([row for row in rows if not row.rationale]))
        return [
            Answer(id=row.id, prediction=None, score=None, error=told) if row.rationale else next(answers)
            for row in rows
        ]


class _Server:
    """The parts put together, from the start of the event loop to its end."""

    def __init__(
        self, student: Student, *, limits: Limits, listener: socket.socket, say: Callable[[str], None]
    ) -> None:
        self._student, self._limits, self._listener, self._say = student, limits, listener, say
        self._batcher = batching.Batcher(
            student.answer, max_batch=limits.max_batch, max_wait=limits.max_wait, max_queue=limits.max_queue
        )
        self._service = app.Service(self._batcher, limits=limits, model=student.name, step=student.step)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self._service.app(),
                http=connections.limited(
                    max_connections=limits.max_connections,
                    read_timeout=limits.read_timeout,
                    keep_alive=limits.keep_alive,
                ),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=max(1, round(limits.keep_alive)),
                timeout_graceful_shutdown=2,
                backlog=limits.max_connections,
            )
        )
        self._told = asyncio.Event()
        self._error: BaseException | None = None
        self.computing = True  # the thread of the model

    async def run(self) -> int:
        """Until told to end: 0, or 1 where requests were left unanswered. ServeError where the model gave out."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._tell, number)
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._listener]))
        watching = asyncio.create_task(self._watch())
        self._batcher.start(self._student.warm_up, prepared=self._ready, ended=self._model_ended)
        told = asyncio.create_task(self._told.wait())
        await asyncio.wait((serving, told), return_when=asyncio.FIRST_COMPLETED)
        self._service.state = app.STOPPING
        left = await self._finish()
        self._uvicorn.should_exit = True
        await serving
        for task in (watching, told):
            task.cancel()
        if self._error is not None:
            raise ServeError(f"the model gave out: {type(self._error).__name__}: {self._error}") from self._error
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
        self.computing, self._error = False, error
        self._told.set()

    def _tell(self, number: int) -> None:
        """The first signal ends in good order, a second one at once."""
        if self._told.is_set():
            os._exit(128 + number)
        log.warning(
            "%s: no more requests are taken, %d are finished; a second one ends it at once.",
            *(signal.Signals(number).name, self._service.in_flight),
        )
        self._told.set()

    async def _finish(self) -> int:
        """Waits for the requests in flight, and tells those that are left when the time is over; their number."""
        end = time.monotonic() + self._limits.stop_timeout
        while self._service.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        left = self._service.in_flight
        self._service.cut.set()
        self._batcher.close()
        return left

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1 / _LOOKS_PER_SECOND)
            now = time.monotonic()
            for each in list(self._uvicorn.server_state.connections):
                if isinstance(each, connections.Connection):
                    each.look(now)


class _Uvicorn(uvicorn.Server):
    """uvicorn's server; signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
