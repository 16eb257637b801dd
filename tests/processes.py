"""Real `sbs` processes for tests: started, watched, killed by any signal.

`start` makes one. Most of what a start costs is imports (TensorFlow, JAX, Orbax: 8 s of CPU), so there are two ways.
A `Forked` process is a copy of a server that has imported everything and computed nothing: it is a process of its own
with its own session, environment, folder and files, calls `cli.main.command` as the console script does, and is ended
by signals like any other. A `Spawned` one goes through the true entry, `python -m sbs_jax`.

All pytest workers of a run share one server. What it cannot give is another installation or another Python.
"""

import ast
import contextlib
import dataclasses
import fcntl
import functools
import gc
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SBS = ("-m", "sbs_jax")
# Tests compile much and compute little: without LLVM's expensive passes they take less than half as long, without the
# newer emitters of fusions, which compile more code, a third less again, and in one piece, not 32, a seventh less.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)
_SHARED = "JAX_SHARE_BINARY_BETWEEN_HOSTS"  # process 0 compiles for all
_READY = b"ready\n"


class Process:
    """A started process; its output goes to the files `out` and `err` of its folder."""

    pid: int

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def send(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        raise NotImplementedError

    def wait(self, timeout: float = 200) -> int:
        """Waits for the exit status, or minus the signal that ended it. TimeoutError if it keeps running."""
        raise NotImplementedError

    def running(self) -> bool:
        """Returns whether it is still running."""
        raise NotImplementedError

    def end(self) -> None:
        """Kills it if it is still running."""
        if self.running():
            self.send(signal.SIGKILL)
            self.wait()

    def said(self) -> str:
        return (self.folder / "out").read_text("utf-8")

    def complained(self) -> str:
        return (self.folder / "err").read_text("utf-8")


class Spawned(Process):
    """A process with an interpreter of its own."""

    def __init__(
        self, command: Sequence[str], *, folder: Path, environment: Mapping[str, str | None], cwd: Path
    ) -> None:
        super().__init__(folder)
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            self._popen = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env={name: value for name, value in {**os.environ, **environment}.items() if value is not None},
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout: float = 200) -> int:
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{error}; it said:\n{self.complained()}") from None

    def running(self) -> bool:
        return self._popen.poll() is None


class Forked(Process):
    """A process forked by the server, which forwards signals and reports the exit, so a reused id is never signaled."""

    def __init__(
        self, server: str, command: Sequence[str], *, folder: Path, environment: Mapping[str, str | None], cwd: Path
    ) -> None:
        super().__init__(folder)
        request = {"command": list(command), "environment": dict(environment), "cwd": str(cwd)}
        self._wire = socket.socket(socket.AF_UNIX)
        self._wire.connect(server)
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            payload = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(self._wire, [payload], [out.fileno(), err.fileno()])
            self._wire.sendall(payload[sent:])
        self._lines = self._wire.makefile("rb")
        self.pid = int(self._lines.readline())
        self._status: int | None = None

    def send(self, number: int) -> None:
        if self.running():
            self._wire.sendall(b"%d\n" % number)

    def wait(self, timeout: float = 200) -> int:
        if self._status is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._wire, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise TimeoutError(f"Process {self.pid} runs after {timeout:g} s; it said:\n{self.complained()}")
            line = self._lines.readline()
            assert line, "The server of processes is gone."
            self._status = int(line)
            self._lines.close()
            self._wire.close()
        return self._status

    def running(self) -> bool:
        with contextlib.suppress(TimeoutError):
            self.wait(0)
        return self._status is None


@contextlib.contextmanager
def server(shared: Path) -> Iterator[str | None]:
    """Yields the address of the server, which ends with its last test run; None if processes cannot be forked.

    Runs that give the same folder have the same server.
    """
    if not sys.platform.startswith("linux"):
        yield None
        return
    with contextlib.ExitStack() as stack:
        with (shared / "process-server").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            address = file.read()
            use = socket.socket(socket.AF_UNIX)
            try:
                use.connect(address)
            except OSError:
                address = _start_server(stack)
                file.truncate(0)
                file.write(address)
                file.flush()
                use.connect(address)
            stack.push(lambda *_: use.close())  # before the server is waited for
        yield address


def _start_server(stack: contextlib.ExitStack) -> str:
    address = stack.enter_context(tempfile.TemporaryDirectory(prefix="sbs-")) + "/server"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    process = subprocess.Popen(
        [sys.executable, __file__, address],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**environment, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    process.stdout.close()
    assert said == _READY, f"The server of processes did not start: {said!r}."
    stack.callback(process.wait)
    return address


# ----------------------------------------------------------------------------- several, as tests use them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Starter:
    """Starts processes for a test: forked if there is a server, with a shared cache of compiled programs."""

    address: str | None
    compiled: Path  # JAX's compilation cache

    def start(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        path: Sequence[Path] = (),
        root: Path = ROOT,
        devices: int = 1,
        command: Sequence[str] = SBS,
        spawn: bool = False,
        environment: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
    ) -> Process:
        """Starts `sbs` with these arguments, its output in a folder of its own under `folder`.

        `path` is where modules are found too; variables of the environment that are None are not set.
        """
        place = Path(tempfile.mkdtemp(prefix="process-", dir=folder))
        whole = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_FLAGS": QUICK,
            "PYTHONPATH": os.pathsep.join(map(str, (root, ROOT / "tests", *path))),
            **(environment or {}),
        }
        line = [*command, *arguments]
        if spawn or self.address is None or root != ROOT:
            return Spawned(line, folder=place, environment=whole, cwd=cwd or root)
        return Forked(self.address, line, folder=place, environment=whole, cwd=cwd or root)

    def run(self, folder: Path, arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Starts a process and waits for its end."""
        with self.alone(folder, arguments, **options) as process:
            status = process.wait()
            return subprocess.CompletedProcess(list(arguments), status, process.said(), process.complained())

    @contextlib.contextmanager
    def alone(self, folder: Path, arguments: Sequence[str], **options: Any) -> Iterator[Process]:
        """Starts a process and kills it at the end of the block."""
        process = self.start(folder, arguments, **options)
        try:
            yield process
        finally:
            process.end()

    @contextlib.contextmanager
    def together(
        self,
        folder: Path,
        arguments: Sequence[str] | Callable[[int], Sequence[str]],
        *,
        count: int,
        present: Sequence[int] | None = None,
        timeout: float = 200,
        roots: Mapping[int, Path] | None = None,
        slurm: bool = False,
        more: Mapping[str, str] | Callable[[int], Mapping[str, str]] | None = None,
        **options: Any,
    ) -> Iterator[list[Process]]:
        """Starts `present` of the `count` processes of one run, with `more` variables; kills them after the block."""
        port, job = free_port(), 61_440 + os.getpid() % 4096
        with contextlib.ExitStack() as stack:
            processes = []
            for index in range(count) if present is None else present:
                environment = {_SHARED: "1", **((more(index) if callable(more) else more) or {})}
                flags = ["--join_timeout", f"{timeout:g}"]
                if slurm:
                    environment |= {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
                    environment |= {"SLURM_NTASKS": str(count), "SLURM_PROCID": str(index), "SLURM_STEP_NUM_NODES": "1"}
                    flags.append("--multihost")
                else:
                    flags += ["--coordinator_address", f"localhost:{port}"]
                    flags += ["--process_count", str(count), "--process_index", str(index)]
                own = arguments(index) if callable(arguments) else arguments
                root = (roots or {}).get(index, ROOT)
                process = self.start(folder, [*own, *flags], root=root, environment=environment, **options)
                stack.callback(process.end)
                processes.append(process)
            yield processes


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def until(condition: Callable[[], bool], processes: Sequence[Process], *, seconds: float = 200) -> None:
    """Waits for a condition; fails if a process ends first or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [process.complained() for process in processes if not process.running()]
        assert not ended, ended
        assert time.monotonic() < deadline, [process.complained() for process in processes]
        time.sleep(0.02)


def write_whole_entries() -> None:
    """Makes this process add entries to JAX's compilation cache atomically from now on, so others may read meanwhile.

    JAX itself writes in place. It also packs as zlib does by default, which takes 2.1 ms of an entry instead of 0.7.
    """
    from jax._src import compilation_cache, lru_cache

    if not any(vars(compilation_cache).get(name) for name in ("zstd", "zstandard")):
        compilation_cache.compress_executable = functools.partial(zlib.compress, level=1)

    def put(self: Any, key: str, value: bytes) -> None:
        file = Path(self.path, f"{key}-cache")
        if not file.exists():
            part = file.with_name(f"{key}.{os.getpid()}.{threading.get_ident()}")
            part.write_bytes(value)
            part.replace(file)

    lru_cache.LRUCache.put = put


# ----------------------------------------------------------------------------------------- the server


def _import_everything() -> None:
    """Imports what `sbs train` needs. Starts no thread and touches no device: forked copies would not have them."""
    gc.disable()
    logging.getLogger().addHandler(
        logging.NullHandler()
    )  # first, as the command does; otherwise a library adds a handler that prints
    from sbs_jax.cli import main

    main.import_tensorflow()
    import gin  # noqa: F401
    from tensorboard.summary import Writer  # noqa: F401

    import tasks  # noqa: F401
    from sbs_jax.training import loop  # noqa: F401

    with contextlib.suppress(ImportError):  # of the extra `teacher`
        import openai  # noqa: F401

    gc.enable()
    gc.collect()
    gc.freeze()  # forked copies then share its memory and do not scan it again
    gc.set_threshold(50_000, 20, 10)  # as in conftest.py


def _serve(address: str) -> dict[str, Any]:
    """Serves requests until no client is left. Returns only in forked copies, with their request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    users: set[socket.socket] = set()
    os.write(1, _READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                user, _ = listener.accept()
                users.add(user)
                selector.register(user, selectors.EVENT_READ)
            elif key.fileobj is woken:
                woken.recv(4096)
                for pid, status in _ended(children):
                    with contextlib.suppress(OSError):  # nobody waits for it
                        children[pid].sendall(b"%d\n" % status)
                    del children[pid]
            else:
                user = key.fileobj
                assert isinstance(user, socket.socket)
                pid = next((pid for pid, of in children.items() if of is user), None)
                message, files, _, _ = socket.recv_fds(user, 1 << 20, 2)
                if not message:
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
                    selector.unregister(user)
                    users.remove(user)
                    user.close()
                    if not users:
                        os._exit(0)
                elif files:
                    while not message.endswith(b"\n"):
                        message += user.recv(1 << 20)
                    pid = _fork()
                    if pid == 0:
                        selector.close()
                        for one in (listener, woken, wake, *users):
                            one.close()
                        return {**json.loads(message), "files": files}
                    for file in files:
                        os.close(file)
                    children[pid] = user
                    user.sendall(b"%d\n" % pid)
                elif pid is not None:  # otherwise it has ended, which the caller reports
                    for number in message.split():
                        os.kill(pid, int(number))


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns because of NumPy's OpenBLAS thread, which OpenBLAS itself stops and restarts around a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _ended(children: Mapping[int, Any]) -> Iterator[tuple[int, int]]:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            yield pid, os.waitstatus_to_exitcode(status)


def _become(request: Mapping[str, Any]) -> Callable[[], Any]:
    """Prepares a forked copy for its request; the returned call does the work."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(request["files"], start=1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    for name, value in request["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    import jax

    for name, value in request["environment"].items():
        if name.startswith("JAX_"):  # JAX has read them already
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
            jax.config.update(name.lower(), value)
    write_whole_entries()
    if _SHARED in request["environment"]:
        # On CPU, JAX would look under another key on every process, because each has another view of the devices.
        from jax._src import cache_key

        cache_key._hash_accelerator_config = cache_key._hash_devices
    sys.path[0] = request["cwd"]
    sys.path[1:1] = request["environment"]["PYTHONPATH"].split(os.pathsep)
    (kind, text), arguments = request["command"][:2], request["command"][2:]
    sys.argv = [kind, *arguments]
    if kind == "-c":
        return lambda: exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    assert [kind, text] == list(SBS), request["command"]
    from sbs_jax.cli import main

    return lambda: sys.exit(main.command())


if __name__ == "__main__":
    _import_everything()
    _work = _become(_serve(sys.argv[1]))
    _work()  # as the last thing of a program: threads are joined and `atexit` is called as elsewhere
