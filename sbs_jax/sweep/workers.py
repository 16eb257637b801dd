"""Processes for `sbs` commands, without the seconds that importing TensorFlow and JAX takes.

A process that has imported everything and computed nothing forks a server, which forks each command. A command may
crash, be killed or run out of memory without harm to the others.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

# Small students gain nothing from several threads, and parallel runs would compete for cores.
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")


class Workers:
    """Starter of commands; yields their exit statuses. Enter it with `with` before this process computes anything.

    `entry` takes a command's arguments and returns its exit status (`cli.main.main`).

    This process then computes on the CPU, since a TPU has one user at a time. When it exits or is killed, running
    commands get SIGTERM: `sbs train` saves and ends.
    """

    def __init__(self, *, entry: Callable[[list[str]], int], one_thread: bool) -> None:
        self._entry = entry
        self._environment = {}
        if one_thread:
            self._environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Workers":
        context: Any = multiprocessing.get_context("fork" if _can_fork() else "spawn")
        self._ours, theirs = context.Pipe()
        # Fork copies our end too; while a copy is open, the server would never see it closed.
        inherited = self._ours if _can_fork() else None
        server = context.Process(target=_serve, args=(self._entry, theirs, inherited), name="sbs workers")
        server.start()
        theirs.close()
        self._stack.callback(server.join)
        self._stack.callback(self._ours.close)
        import jax

        jax.config.update("jax_platforms", "cpu")  # the devices are for the commands
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, name: str, arguments: Sequence[str], *, log: Path) -> None:
        """Starts `sbs` with these arguments; its output is appended to the file `log`."""
        self._ours.send(("start", (name, list(arguments), str(log), self._environment)))

    def send(self, number: int) -> None:
        """Sends a signal to every running command."""
        self._ours.send(("signal", number))

    def ended(self, *, timeout: float) -> Iterator[tuple[str, int]]:
        """Yields (name, exit status or minus the signal) of ended commands; waits `timeout` seconds for the first."""
        while self._ours.poll(timeout):
            try:
                yield self._ours.recv()
            except EOFError:
                raise OSError("The server process of the workers has ended; repeat the command.") from None
            timeout = 0.0


def _can_fork() -> bool:
    """Returns True if forking is safe; spawning instead takes seconds more.

    A fork of a process in which TensorFlow has looked for GPUs cannot use them, and on macOS the system libraries break
    in a fork.
    """
    return sys.platform == "linux" and not any(map(os.path.exists, _DRIVERS))


def _serve(
    entry: Callable[[list[str]], int], requests: connection.Connection, inherited: connection.Connection | None
) -> None:
    """Starts commands, reports their ends and forwards signals, until the requests end."""
    if inherited is not None:
        inherited.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent forwards its own
    context: Any = multiprocessing.get_context("fork" if _can_fork() else "spawn")
    running: dict[Any, tuple[str, Any]] = {}
    request: Any
    asked = True
    while asked or running:
        for ready in connection.wait([*([requests] if asked else []), *running]):
            if ready is not requests:
                name, process = running.pop(ready)
                process.join()
                with contextlib.suppress(OSError):
                    requests.send((name, process.exitcode))
                continue
            kind, request = "signal", signal.SIGTERM  # used if the parent has ended
            try:
                kind, request = requests.recv()
            except (EOFError, OSError):
                asked = False
            if kind == "start":
                process = context.Process(target=_become, args=(entry, *request), name=request[0])
                process.start()
                running[process.sentinel] = request[0], process
            else:
                for _, process in running.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, request)


def _become(
    entry: Callable[[list[str]], int], name: str, arguments: list[str], log: str, environment: Mapping[str, str]
) -> None:
    """Turns this process into `sbs` with these arguments."""
    del name
    os.setsid()  # Ctrl-C reaches the foreground process only, which forwards it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.exit(entry(arguments))
