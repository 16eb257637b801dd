"""Messages while programs are compiled, so that no command is silent for a minute."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import tqdm

log = logging.getLogger(__name__)

# Seconds before a message. A program that comes from the cache is there by then.
PATIENCE = 2.0
_CACHE = "jax_compilation_cache_dir"  # of JAX's settings


class Progress:
    """Counts the programs of a command, and says which one is compiled if that takes longer than `PATIENCE`."""

    def __init__(
        self,
        *,
        count: int = 0,
        at_most: bool = False,
        cache: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Takes the number of programs, 0 if it is unknown; with `at_most`, some may not be needed.

        `cache` is entered around the first call of each program, for a caller that keeps no cache open.
        """
        self.count, self._at_most, self._cache = count, at_most, cache
        self._begun: set[Hashable] = set()
        self.seconds = 0.0  # in the first calls of all programs

    @contextlib.contextmanager
    def compiling(self, program: str, *, key: Hashable = None) -> Iterator[None]:
        """Counts the program that the context calls, and says so if compiling it takes long.

        `key` (default: `program`) tells programs apart; later contexts of one do nothing.
        """
        key = program if key is None else key
        if key in self._begun:
            yield
            return
        self._begun.add(key)
        began = time.monotonic()
        try:
            with self._cache(), self._announced(program):
                yield
        finally:
            self.seconds += time.monotonic() - began

    @contextlib.contextmanager
    def _announced(self, program: str) -> Iterator[None]:
        number, said = self._number(), threading.Event()
        line = f"compiling {number}: {program} ({when()})"

        def say() -> None:
            said.set()
            _log(line)

        timer = threading.Timer(PATIENCE, say)
        timer.daemon = True
        began = time.monotonic()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        if said.is_set():
            _log(f"compiled {number} in {time.monotonic() - began:.0f} s")

    def _number(self) -> str:
        begun, count = len(self._begun), self.count
        if count < begun:
            return f"program {begun}"
        return f"{begun} of {'at most ' * self._at_most}{count} program{'s' * (count > 1)}"


def when() -> str:
    """Says how often a program is compiled, in words: JAX has a cache on disk, or none."""
    import jax

    return "first run, cached afterwards" if getattr(jax.config, _CACHE) else "at every start, without a cache"


def _log(line: str) -> None:
    """Logs a line of its own above the progress bars on standard error."""
    with tqdm.tqdm.external_write_mode():
        log.info("%s", line)
