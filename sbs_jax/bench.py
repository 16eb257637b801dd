"""Benchmarks: two sides measured in turns in processes of their own, and rows of results.

A benchmark starts one process per side (`Side`), which sets itself up and then calls `serve`. `in_turns` lets them work
one after the other, A B A B, so that whatever else the machine does slows both alike. Results are rows of `bench.json`.

Standard library only: a side imports what it measures and nothing else, so that its peak memory is its own.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import operator
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

# The tokens of one example, inputs and targets (EOS included, no padding), and the id of its task.
Example = tuple[list[int], list[int], int]
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One result. `goal` is about the ratio ours / peer: a comparison and a number, ">= 1.5".

    `peer` is None where the peer is not installed: then there is no ratio, and whether the goal holds is not known.
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
        """`{name, unit, ours, peer, ratio, goal, holds, versions}`."""
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": self.ours,
            "peer": self.peer,
            "ratio": self.ratio,
            "goal": self.goal,
            "holds": self.holds,
            "versions": dict(self.versions),
        }


def append(path: str | Path, rows: Sequence[Row]) -> None:
    """Adds rows to the JSON list in a file, which appears if it is not there.

    ValueError where the file holds anything else; it is then left as it is.
    """
    path = Path(path)
    before: Any = []
    if path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); move it away or name another file.") from error
    if not isinstance(before, list):
        raise ValueError(f"{path} holds a JSON {type(before).__name__}, not a list of rows; name another file.")
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(json.dumps([*before, *(row.as_json() for row in rows)], indent=1) + "\n", "utf-8")
    scratch.replace(path)


def table(rows: Sequence[Row]) -> str:
    """Rows as text, one line each under a heading.

    >>> print(table([Row(name="speed", unit="1/s", ours=600.0, peer=400.0, goal=">= 1.5", versions={})]))
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


def versions(*distributions: str) -> dict[str, str]:
    """Versions of Python, of the machine and of these distributions; those not installed are left out."""
    found = {"python": platform.python_version(), "machine": f"{processor()}, {os.cpu_count()} CPUs"}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """The most bytes of memory that this process ever had resident."""
    with contextlib.suppress(OSError):
        # Linux: not getrusage, whose figure a process inherits from the one that started it.
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def use_threads(count: int) -> None:
    """Keeps this process, and the thread pools it will make, to this many CPUs. Before anything makes one."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < count:
            raise ValueError(f"Asked for {count} threads on {len(allowed)} CPUs; choose at most that many.")
        os.sched_setaffinity(0, allowed[:count])


def protocol() -> TextIO:
    """Takes over standard output for `serve`; whatever else is printed goes to standard error from here on."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def serve(
    step: Callable[[int], int],
    *,
    ready: Mapping[str, Any],
    stream: TextIO,
    peak_memory: Callable[[], int] = peak_memory,
) -> None:
    """Answers the process that started this one: `ready` at once, then one line of JSON per line that comes in.

    A line with a number asks for that many steps; `step(i)` does the i-th since the start, must have finished its work
    when it returns, and returns the tokens it was worth. At the end of the input the peak memory is told.
    """

    def say(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=stream, flush=True)

    say(ready)
    done = 0
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter()
        tokens = sum(step(done + i) for i in range(count))
        say({"seconds": time.perf_counter() - start, "tokens": tokens, "steps": count})
        done += count
    say({"peak_memory": peak_memory()})


@dataclasses.dataclass(frozen=True)
class Round:
    """What one side did in one of its turns."""

    seconds: float
    tokens: int
    steps: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Side:
    """A process that serves one side of a comparison. `ready` is what it said after its set-up."""

    def __init__(self, name: str, command: Sequence[str], *, patience: float | None = None) -> None:
        """Starts it and waits until it is ready; RuntimeError if it ends before, or takes `patience` seconds."""
        self.name = name
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        impatient = threading.Timer(patience, self._process.kill) if patience else None
        try:
            if impatient:
                impatient.start()
            self.ready = self._answer()
        except BaseException:
            self.stop()
            raise
        finally:
            if impatient:
                impatient.cancel()

    def work(self, steps: int) -> Round:
        """Lets it do this many steps."""
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        return Round(**self._answer())

    def finish(self) -> int:
        """Ends it; its peak memory in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = self._answer()["peak_memory"]
        self._process.wait()
        return peak

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ends it if it still runs."""
        if not self.ended:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"The side {self.name!r} ended with status {status}; what it said stands above.")
        return json.loads(line)


@contextlib.contextmanager
def started(sides: list[Side]) -> Iterator[None]:
    """Ends all sides of the list, also those that join it later, when the block ends."""
    try:
        yield
    finally:
        for side in sides:
            side.stop()


def in_turns(sides: Sequence[Side], *, rounds: int, steps: int) -> dict[str, list[Round]]:
    """`steps` steps of every side in turn, `rounds` times; the rounds of each side in order."""
    done: dict[str, list[Round]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            done[side.name].append(side.work(steps))
    return done


def unpacked(batch: Mapping[str, Any]) -> list[Example]:
    """The examples of a packed batch (`features.train_dataset`), row by row.

    One row of two: encoder_segment_ids [1, 1, 2, 0] over [7, 1, 9, 0], decoder_segment_ids [1, 2, 2, 0] over
    [5, 6, 1, 0] and decoder_task_ids [1, 2, 2, 0] give ([7, 1], [5], 1) and ([9], [6, 1], 2).
    """
    examples: list[Example] = []
    names = (
        *("encoder_segment_ids", "encoder_input_tokens"),
        *("decoder_segment_ids", "decoder_target_tokens", "decoder_task_ids"),
    )
    for row in zip(*(batch[name].tolist() for name in names), strict=True):
        source_segments, source, target_segments, target, task_ids = row
        for segment in range(1, max(source_segments) + 1):
            places = [i for i, mine in enumerate(target_segments) if mine == segment]
            inputs = [token for token, mine in zip(source, source_segments, strict=True) if mine == segment]
            examples.append((inputs, [target[i] for i in places], task_ids[places[0]]))
    return examples


def padded(rows: Sequence[Sequence[int]], *, padding: int, least: int = 0) -> list[list[int]]:
    """Rows made as long as the longest, or as `least`: [[5, 1], [4]] with 0 to [[5, 1], [4, 0]]."""
    longest = max(least, *map(len, rows))
    return [[*row, *[padding] * (longest - len(row))] for row in rows]
