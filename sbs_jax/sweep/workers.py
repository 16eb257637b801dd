"""Commands of `sbs`, each in a process of its own, without the seconds that importing TensorFlow and JAX takes.

A process that has imported everything and computed nothing is copied once; that copy is copied for each command. What
a command does, it does by itself: it may crash, be killed or fill its memory without the others knowing.
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

# Arrays of a small student gain nothing from several threads, and several runs at once would take each other's cores.
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")


class Workers:
    """Starts commands and says how they ended; use it with `with`, entered before this process computes anything.

    `entry` takes a command's arguments and returns its exit status (`cli.main.main`).

    From then on this process computes on the CPU: a TPU has one user at a time.

    Where it is left, or this process is killed, commands that still run get SIGTERM: `sbs train` saves and ends.
    """

    def __init__(self, *, entry: Callable[[list[str]], int], one_thread: bool) -> None:
        self._entry = entry
        self._environment = {}
        if one_thread:
            self._environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Workers":
        context: Any = multiprocessing.get_context("fork" if _can_be_copied() else "spawn")
        self._ours, theirs = context.Pipe()
        # Fork copies our end as well, and then the other side would never see it closed.
        inherited = self._ours if _can_be_copied() else None
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
        """Starts `sbs` with these arguments; what it says is added to the file `log`."""
        self._ours.send(("start", (name, list(arguments), str(log), self._environment)))

    def send(self, number: int) -> None:
        """Sends a signal to every command that runs."""
        self._ours.send(("signal", number))

    def ended(self, *, timeout: float) -> Iterator[tuple[str, int]]:
        """(name, exit status, or minus the signal that ended it) of commands that have ended; waits for the first."""
        while self._ours.poll(timeout):
            try:
                yield self._ours.recv()
            except EOFError:
                raise OSError("The process that starts the others has been ended; repeat the command.") from None
            timeout = 0.0


def _can_be_copied() -> bool:
    """Whether processes are copied, or else start anew, which takes seconds more.

    A copy of a process in which TensorFlow has looked for GPUs cannot use them; and on macOS the system's own libraries
    break in a copy.
    """
    return sys.platform == "linux" and not any(map(os.path.exists, _DRIVERS))


def _serve(
    entry: Callable[[list[str]], int], requests: connection.Connection, inherited: connection.Connection | None
) -> None:
    """Starts commands, tells of their ends, and passes signals on to them, until nobody asks any more."""
    if inherited is not None:
        inherited.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # ours are passed on by the process that got them
    context: Any = multiprocessing.get_context("fork" if _can_be_copied() else "spawn")
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
            kind, request = "signal", signal.SIGTERM  # what follows where nobody is there any more
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
    """This process is `sbs` with these arguments from here on."""
    del name
    os.setsid()  # Ctrl-C reaches the process in front alone, which passes it on
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.exit(entry(arguments))
