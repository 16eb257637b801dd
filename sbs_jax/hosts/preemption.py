"""Preemption by signal: SIGTERM (a preempted Cloud TPU, Slurm, Kubernetes) or Ctrl-C.

After the first signal the run saves at the next step and exits with `EXIT_STATUS`, which tells a launcher to repeat the
command. A second signal ends the process at once; checkpoints are written atomically, so those on disk are complete.
(JAX has a service for this too; it swallows the second signal.)
"""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator

from sbs_jax import hosts

log = logging.getLogger(__name__)

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure; try again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PreemptedError(Exception):
    """The run was preempted and has saved what it needs to resume."""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Turns signals into preemption requests inside the block. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hosts.clear_preemption()
    # Python runs handlers between two bytecodes of the main thread, which may be compiling for minutes. The signal's
    # number is written to this socket at once, and another thread reads it.
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    descriptor = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading,), daemon=True, name="signals")
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        writing.close()
        watcher.join()
        reading.close()


def _watch(reading: socket.socket) -> None:
    """Reads signal numbers until the other end is closed."""
    preempted = False
    while numbers := reading.recv(1):
        number = numbers[0]
        if number not in _SIGNALS:
            continue
        if preempted:
            os._exit(128 + number)
        preempted = True
        log.warning(
            "%s: saving after the current step, then exiting. A second signal ends this process at once.",
            signal.Signals(number).name,
        )
        hosts.request_preemption()
