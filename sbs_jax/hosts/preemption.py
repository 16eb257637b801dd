"""Being told to end: SIGTERM (a preempted Cloud TPU, Slurm, Kubernetes) or Ctrl-C.

The first one is noted: the run saves at the next step and leaves with `EXIT_STATUS`, by which a launcher knows that the
command has to be repeated. A second one ends the process at once, whatever it is doing; checkpoints are written
atomically, so what is on disk then is whole. (JAX has a service for this too; it swallows the second one.)
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

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, to be tried again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PreemptedError(Exception):
    """The run was told to end, and has saved what is needed to go on."""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """While inside, signals are noted for `hosts.told_to_end`. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hosts.forget_told_to_end()
    # Python runs handlers between two steps of its main thread, which may be compiling for minutes. The number of the
    # signal, however, is written to this socket at once, and another thread reads it.
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
    """Reads signal numbers until the other side is closed."""
    told = False
    while numbers := reading.recv(1):
        number = numbers[0]
        if number not in _SIGNALS:
            continue
        if told:
            os._exit(128 + number)
        told = True
        log.warning(
            "%s: this run saves after the step under way and ends; a second one ends it at once.",
            signal.Signals(number).name,
        )
        hosts.tell_to_end()
