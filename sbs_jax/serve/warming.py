"""Compiling of a student's programs: first those without which some question has no answer, the others beside serving.

Until its own program is there, a question is padded to a larger one, so answers do not depend on how far this is.
"""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable

from sbs_jax import compiling
from sbs_jax.prediction import compiled
from sbs_jax.prediction.engine import Predictor
from sbs_jax.serve import batching

log = logging.getLogger(__name__)


class Warming:
    """Compiles all programs on a thread of its own, or loads them from the cache folder `kept`."""

    def __init__(self, predictor: Predictor, *, kept: str) -> None:
        self._predictor, self._kept = predictor, kept
        self.count, self.ready = predictor.progress.count, 0  # programs; one that cannot be compiled leaves the count
        self._stop = threading.Event()
        self._cache = compiled.Cache()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, *, answering: Callable[[float], None], failed: Callable[[BaseException], None]) -> None:
        """Starts the thread.

        On the loop, `answering` gets the seconds until every question could be answered, and `failed` an error before
        that. A later error is logged, and the other programs are compiled.
        """
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                with compiled.kept(self._kept) as self._cache:
                    self._compile(lambda seconds: batching.on_loop(loop, answering, seconds))
            except BaseException as error:
                batching.on_loop(loop, failed, error)

        # A daemon: a program that is being compiled cannot be stopped, and nobody waits for it.
        self._thread = threading.Thread(target=work, daemon=True, name="compiler")
        self._thread.start()

    def stop(self) -> None:
        """Compiles no further program; the current one goes on."""
        self._stop.set()

    def discard(self) -> None:
        """Removes what is on disk for this process only, before the process ends without its thread."""
        self._cache.discard()

    def _compile(self, answering: Callable[[float], None]) -> None:
        began = time.monotonic()
        first, others = self._predictor.programs()
        for each in first:
            each()
            self.ready += 1
        new = self._cache.keep()
        _freeze()
        answering(time.monotonic() - began)
        if not others:
            return
        verb = "compiling" if new or self._kept == compiled.OFF else "loading"
        when = compiling.when() if verb == "compiling" else "cached"
        log.info("%s %d more programs beside serving (%s); until then inputs are padded more", verb, len(others), when)
        for each in others:
            if self._stop.is_set():
                return
            try:
                each()
                self.ready += 1
            except Exception as error:
                self.count -= 1
                text = "A program could not be compiled, so a larger one answers in its place: %s"
                log.error(text, batching.trace(error, text=str(error)))
            self._cache.keep()
        _freeze()
        log.info("%d of %d programs are ready after %.0f s", self.ready, self.count, time.monotonic() - began)


def _freeze() -> None:
    """Takes loaded objects out of the collector's sight: a full collection would stop the server for up to a second."""
    gc.collect()
    gc.freeze()
