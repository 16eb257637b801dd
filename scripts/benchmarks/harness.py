"""Rows of results, and sides: processes that are measured in turns.

A side is a function that runs in a separate process. Sides of a comparison take turns, A B A B, so that other load on
the machine slows both alike.

Standard library only: a side imports what it measures and nothing else, so that its peak memory includes nothing else.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import operator
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SBS = [sys.executable, "-m", "sbs_jax"]
MIB, GIB = 2**20, 2**30
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def of_tests(name: str) -> Any:
    """Imports a module of tests/: a server that stands in for a hosted one."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


# ------------------------------------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Row:
    """One result. `goal` is about the ratio ours / peer: a comparison and a number, ">= 1.5".

    Without the peer installed `peer` is None; there is no ratio then, and `holds` is None.
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    goal: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        comparison, _, number = self.goal.partition(" ")
        try:
            float(number)
        except ValueError:
            comparison = ""
        if comparison not in _COMPARISONS:
            raise ValueError(f"The goal of {self.name} is {self.goal!r}; expected such as '>= 1.5' or '< 1'.")
        if self.peer is not None and not self.peer > 0:
            raise ValueError(f"The peer's value of {self.name} is {self.peer!r}; expected a positive number or None.")

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.ours / self.peer

    @property
    def holds(self) -> bool | None:
        comparison, _, number = self.goal.partition(" ")
        return None if self.ratio is None else _COMPARISONS[comparison](self.ratio, float(number))

    def as_json(self) -> dict[str, Any]:
        """Returns `{name, unit, ours, peer, ratio, goal, holds, versions}`."""
        names = ("name", "unit", "ours", "peer", "ratio", "goal", "holds")
        return {name: getattr(self, name) for name in names} | {"versions": dict(self.versions)}


def read(path: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of a file, none if it does not exist; ValueError if it holds anything but a JSON list."""
    path = Path(path)
    try:
        rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); move it away or name another file.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a JSON {type(rows).__name__}, not a list of rows; name another file.")
    return rows


def append(path: str | Path, rows: Sequence[Row]) -> None:
    """Adds rows to the JSON list in a file, creating it if needed; errors as `read`."""
    path = Path(path)
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(json.dumps([*read(path), *(row.as_json() for row in rows)], indent=1) + "\n", "utf-8")
    scratch.replace(path)


def table(rows: Sequence[Row]) -> str:
    """Formats rows as text, one line each under a heading.

    >>> print(table([Row("speed", "1/s", 600.0, 400.0, ">= 1.5", {})]))
    name   unit  ours  peer  ratio  goal    holds
    speed  1/s   600   400   1.50   >= 1.5  yes
    """
    lines = [("name", "unit", "ours", "peer", "ratio", "goal", "holds")]
    for row in rows:
        peer = "missing" if row.peer is None else _number(row.peer)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        holds = {None: "not known", True: "yes", False: "NO"}[row.holds]
        lines.append((row.name, row.unit, _number(row.ours), peer, ratio, row.goal, holds))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def listed(values: Sequence[float]) -> str:
    """Formats the values of several turns for a printed line."""
    return " ".join(map(_number, values))


def versions(*distributions: str) -> dict[str, str]:
    """Returns versions of Python, the machine and these distributions, as far as they are installed."""
    from sbs_jax.prediction import compiled

    found = {"python": platform.python_version(), "machine": f"{compiled.processor()}, {os.cpu_count()} CPUs"}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def installed(side: str, *packages: str) -> bool:
    """Returns True if a side's packages are installed; prints which are missing otherwise."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{side} is not measured: {' and '.join(missing)} not installed; `make test-parity` installs all peers.")
    return not missing


def add_turns(parser: argparse.ArgumentParser, *, rounds: int, steps: int, threads: bool = True) -> None:
    """Adds the options of a comparison in turns."""
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each side")
    parser.add_argument("--steps", type=int, default=steps, help="steps in a turn")
    if threads:
        parser.add_argument("--threads", type=int, default=2, help="CPUs that each side may use")


# ------------------------------------------------------------------------- inside the process of a side


def peak_memory() -> int:
    """Returns the peak of this process's resident memory, in bytes."""
    with contextlib.suppress(OSError):
        # On Linux not from getrusage, whose figure a process inherits from its parent.
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def use_threads(count: int) -> None:
    """Limits this process and its children to `count` CPUs. Call it before any thread pool is made."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < count:
            raise ValueError(f"Asked for {count} threads on {len(allowed)} CPUs; choose at most that many.")
        os.sched_setaffinity(0, allowed[:count])


@dataclasses.dataclass(frozen=True)
class Turn:
    """One side's work in one of its turns."""

    seconds: float
    tokens: int
    steps: int

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Worker:
    """A side that takes turns, after its set-up.

    Attributes:
      step: does the i-th step since the start, complete when it returns; returns its tokens (or examples).
      ready: facts to print before the first turn.
      finish: called after the last turn; its result must hold `peak_memory` in bytes.
    """

    step: Callable[[int], int]
    ready: Mapping[str, Any]
    finish: Callable[[], dict[str, Any]] = lambda: {"peak_memory": peak_memory()}


def _run(connection: Connection, side: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Runs a side: sends its result or, of a `Worker`, `ready`, then a turn for each number of steps received."""
    worker = side(**options)
    if not isinstance(worker, Worker):
        connection.send(worker)
        return
    connection.send(worker.ready)
    done = 0
    while count := connection.recv():
        start = time.perf_counter()
        tokens = sum(worker.step(done + i) for i in range(count))
        connection.send(Turn(time.perf_counter() - start, tokens, count))
        done += count
    connection.send(worker.finish())


# ------------------------------------------------------------------ in the process that compares the sides


@dataclasses.dataclass(frozen=True)
class Result:
    """All turns of a side, and what it returned when it finished."""

    turns: list[Turn]
    finish: dict[str, Any]

    @property
    def per_second(self) -> float:
        return statistics.median(turn.per_second for turn in self.turns)

    @property
    def step_seconds(self) -> float:
        return statistics.median(turn.seconds / turn.steps for turn in self.turns)

    @property
    def peak_gib(self) -> float:
        return self.finish["peak_memory"] / GIB


class Side:
    """A process that runs one side. `ready` is its first answer."""

    def __init__(
        self, name: str, side: Callable[..., Any], *, timeout: float | None = None, options: Mapping[str, Any]
    ) -> None:
        """Starts the process and waits until it is ready; RuntimeError if it ends first or after `timeout` s."""
        self.name = name
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_run, args=(theirs, side, options))
        self.process.start()
        theirs.close()
        try:
            if not self._connection.poll(timeout):
                raise RuntimeError(f"The side {name!r} was not ready after {timeout:g} s.")
            self.ready = self._answer()
        except BaseException:
            self.stop()
            raise

    def work(self, steps: int) -> Turn:
        """Makes the side do `steps` steps; returns its turn."""
        self._connection.send(steps)
        return self._answer()

    def finish(self) -> dict[str, Any]:
        """Ends the side; returns the result of its `finish`."""
        self._connection.send(0)
        found = self._answer()
        self.stop()
        return found

    def stop(self) -> None:
        """Ends the side if it still runs."""
        self.process.kill()
        self.process.join()
        self._connection.close()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self.process.join()
            status = self.process.exitcode
            raise RuntimeError(f"The side {self.name!r} ended with status {status}; its messages are above.") from None


def once(side: Callable[..., Any], /, **options: Any) -> dict[str, Any]:
    """Runs a side that takes no turns; returns its result."""
    process = Side(side.__name__, side, options=options)
    process.stop()
    return process.ready


class Sides(list[Side]):
    """All sides of a comparison. Leaving the `with` block ends them."""

    def __enter__(self) -> "Sides":
        return self

    def __exit__(self, *_: object) -> None:
        for side in self:
            side.stop()

    def start(self, name: str, side: Callable[..., Any], /, **options: Any) -> None:
        """Starts one more side and prints the facts of its set-up, without its answers."""
        self.append(Side(name, side, options=options))
        print(f"{name}: { {key: value for key, value in self[-1].ready.items() if key != 'answers'} }", flush=True)

    def compare(self, *, rounds: int, steps: int, unit: str = "tokens/s") -> dict[str, Result]:
        """Lets every side do `steps` steps in turn, `rounds` times, then ends them; prints and returns the results."""
        turns: dict[str, list[Turn]] = {side.name: [] for side in self}
        for _ in range(rounds):
            for side in self:
                turns[side.name].append(side.work(steps))
        results = {side.name: Result(turns[side.name], side.finish()) for side in self}
        for name, found in results.items():
            seconds = [turn.seconds / turn.steps for turn in found.turns]
            print(
                f"{name}: {found.step_seconds:.3g} s a step (median; of each turn: {listed(seconds)}); {unit} of each "
                f"turn: {listed([turn.per_second for turn in found.turns])}; peak memory {found.peak_gib:.2f} GiB"
            )
        return results


def padded(rows: Sequence[Sequence[int]], *, padding: int, least: int = 0) -> list[list[int]]:
    """Pads rows to the longest of them, or to `least`: [[5, 1], [4]] with 0 becomes [[5, 1], [4, 0]]."""
    longest = max(least, *map(len, rows))
    return [[*row, *[padding] * (longest - len(row))] for row in rows]
