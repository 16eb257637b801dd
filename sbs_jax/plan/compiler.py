"""Compiler in a separate process, so that an abort, a hang or a lack of memory costs only one candidate.

The process answers each line of JSON with one line of JSON (worker.py). This module imports no JAX.
"""

import contextlib
import dataclasses
import json
import os
import re
import selectors
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

from sbs_jax import chips

# Messages that libtpu and TensorFlow always write without an accelerator.
_NOISE = re.compile(
    r"Failed to find host bounds|Logging before InitGoogle|All log messages before|unexpected worker hostname|"
    r"=== Source Location Trace|^learning/|oneDNN|cudart_stub|cuda_platform|^\s*$"
)
# Lines that give the cause of a C++ or Python crash, among the lines of its stack.
_FATAL = re.compile(r"^F\d{4} |Check failed|^\w*Error\b|Out of memory|^sbs plan:")


class Compiler:
    """Compiler process that starts when first needed, and again after a crash; `with` ends it."""

    def __init__(self, command: Sequence[str], *, time_limit: float) -> None:
        self._command = list(command)
        self._time_limit = time_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def start(self) -> None:
        """Starts the process, which imports and reads the configuration while the caller continues."""
        if self._process is None:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by _stop)
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, **chips.ENVIRONMENT, "JAX_PLATFORMS": "cpu"},
            )

    def measure(self, candidate: Any) -> dict[str, Any]:
        """Returns `worker.measure` of a candidate; `refused` says why if it crashes the process or takes too long."""
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(candidate)).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line()
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self._stop()
            return _broke(f"not compiled within {self._time_limit:.0f} s (--time_limit)")
        if not line:
            return _broke(self._last_words())
        return json.loads(line)

    def _line(self) -> bytes:
        """Reads one line of the process's output; empty if it ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        end = time.monotonic() + self._time_limit
        parts: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(file, selectors.EVENT_READ)
            while not (parts and parts[-1].endswith(b"\n")):
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                part = os.read(file, 65536)
                if not part:
                    return b""
                parts.append(part)
        return b"".join(parts)

    def _last_words(self) -> str:
        """Describes how the process ended, with its last lines; the next candidate starts a new one."""
        assert self._process is not None
        assert self._stderr is not None
        status = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").splitlines()
        said = [line.strip() for line in lines if not _NOISE.search(line)]
        fatal = [line for line in said if _FATAL.search(line)]
        self._stop()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"the compiler's process ended with {how}: " + (" | ".join((fatal or said)[-2:]) or "no output")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process = None
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None


def _broke(reason: str) -> dict[str, Any]:
    return {"refused": reason, "broke": True, "steps": {}}
