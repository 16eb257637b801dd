"""Training of a sweep's unfinished cells, and the report on all of them."""

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import hosts
from sbs_jax.hosts import preemption
from sbs_jax.run import directory
from sbs_jax.storage import bucket_lock, places
from sbs_jax.sweep.cells import Cell, Group, Sweep, check_configurations, check_inputs, groups
from sbs_jax.sweep.standings import graded, unfinished
from sbs_jax.sweep.workers import Workers

log = logging.getLogger(__name__)

_BETWEEN_LOOKS = 5.0  # seconds between questions to a bucket whether a cell has ended


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A cell that has ended; `metrics` holds the test metrics of a finished one."""

    cell: Cell
    status: int
    seconds: float
    metrics: Mapping[str, Any]
    number: int  # in order of completion, from 1
    log: Path

    @property
    def result(self) -> str:
        """Returns "accuracy 81.0", or the reason it did not finish."""
        if self.status == preemption.EXIT_STATUS:
            return "preempted, and saved"
        return f"failed, status {self.status}" if self.status else graded(self.metrics)

    def last_words(self) -> str:
        """Returns the last line of the log, and its path."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text("utf-8", "replace").strip().splitlines()
            said = next((line for line in reversed(lines) if line.startswith("sbs train:")), lines[-1] if lines else "")
            return f"{said[:300]} (status {self.status}; {self.log})"
        return f"status {self.status}; {self.log} cannot be read"


def run(groups: Sequence[Group], started: Workers, *, jobs: int) -> Iterator[Ended]:
    """Trains groups of cells, `jobs` at a time, and yields each cell when it ends.

    If a process fails, the cell that it was training has failed, and the rest of its group is started again.
    preemption.PreemptedError if this process is preempted; the running cells have saved by then.
    """
    waiting, running, preempted = list(groups), {}, False
    numbers = itertools.count(1)
    with preemption.listening():
        while running or (waiting and not preempted):
            while waiting and len(running) < jobs and not preempted:
                group = waiting.pop(0)
                started.start(group.name, group.arguments(), log=group.log)
                log.info("%s begins; how far it is, compiling included, is in %s", group.name, group.log)
                running[group.name] = _Running(group)
            ended = dict(started.ended(timeout=0.2))
            for name, each in list(running.items()):
                yield from each.finished(numbers, last=name in ended)
                if name not in ended:
                    continue
                del running[name]
                each.keep_log()
                status = ended[name]
                if status == preemption.EXIT_STATUS:
                    yield from each.failed(len(each.left), status, numbers)
                elif each.left:
                    yield from each.failed(1, status, numbers)
                    waiting[:0] = [Group(tuple(each.left))] if each.left else []
            if hosts.preemption_requested() and not preempted:
                preempted = True
                started.send(signal.SIGTERM)
    if preempted:
        raise preemption.PreemptedError("This sweep was preempted; its cells are saved. Repeat the command to resume.")


class _Running:
    """A group in training: the cells that have not ended, the first of which is being trained."""

    def __init__(self, group: Group) -> None:
        self.left = list(group.cells)
        self._log, self._begin = group.log, time.monotonic()
        self._sweep_dir, self._next_look = group.cells[0].sweep_dir, 0.0

    def finished(self, numbers: Iterator[int], *, last: bool) -> Iterator[Ended]:
        """Yields the cells that have test metrics by now. A bucket is asked seldom, and in the `last` call."""
        if places.in_bucket(self._sweep_dir) and not last and time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _BETWEEN_LOOKS
        while self.left and (metrics := _test_metrics(self.left[0])):
            yield self._end(0, metrics, numbers)

    def keep_log(self) -> None:
        """Puts the log of a process that has ended into the sweep, if that is in a bucket."""
        folder = self._sweep_dir / "logs"
        if places.in_bucket(folder) and self._log.exists():
            places.upload(self._log, folder / self._log.name)

    def failed(self, count: int, status: int, numbers: Iterator[int]) -> Iterator[Ended]:
        """Yields the first `count` cells left, which end without test metrics."""
        for _ in range(count):
            yield self._end(status, {}, numbers)

    def _end(self, status: int, metrics: Mapping[str, Any], numbers: Iterator[int]) -> Ended:
        begin, self._begin = self._begin, time.monotonic()
        seconds, cell = self._begin - begin, self.left.pop(0)
        return Ended(cell=cell, status=status, seconds=seconds, metrics=metrics, number=next(numbers), log=self._log)


def _test_metrics(cell: Cell) -> Mapping[str, Any] | None:
    lines = directory.read_metrics(cell.model_dir)
    return next((line for line in reversed(lines) if line["kind"] == "test"), None)


def listed(parts: Sequence[Group]) -> str:
    """Formats a line per group of several cells, for the list of a sweep."""
    return "".join(f"{len(part.cells)} seeds in one process: {part.name}\n" for part in parts if len(part.cells) > 1)


def main(
    sweep: Sweep, *, entry: Callable[[list[str]], int], jobs: int, together: int | None, redo_changed: bool
) -> int:
    """Trains unfinished cells, prints the table, writes the page, and returns the exit status."""
    cells = sweep.cells()
    busy = jobs > 1 and jobs >= (os.cpu_count() or 1)
    with Workers(entry=entry, one_thread=busy) as started, contextlib.ExitStack() as stack:
        check_inputs(check_configurations(cells))
        # Not before the workers' server is forked: a copy of the descriptor there would hold the lock after our end.
        stack.enter_context(_locked(places.real(sweep.sweep_dir)))
        left = unfinished(cells, redo_changed=redo_changed)
        failed, parts = [], groups(left, jobs=jobs, together=together)
        print(listed(parts), end="", flush=True)
        for ended in run(parts, started, jobs=jobs):
            print(f"[{ended.number}/{len(left)}] {ended.cell.name}: {ended.result} ({ended.seconds:.0f} s)", flush=True)
            if ended.status:
                failed.append(ended)
    _report(sweep, cells, leaving_out={ended.cell.name for ended in failed})
    if failed:
        lines = [f"  {ended.cell.name}: {ended.last_words()}" for ended in failed]
        print("\n".join([f"{len(failed)} of {len(cells)} cells failed; repeat the command to try them again:", *lines]))
    return 1 if failed else 0


def _locked(folder: Path) -> contextlib.AbstractContextManager[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return bucket_lock.lock_of(folder, instead="another SWEEP_DIR")


def _report(sweep: Sweep, cells: Sequence[Cell], *, leaving_out: set[str]) -> None:
    """Prints tables and writes a page of the finished cells."""
    from sbs_jax.pages import report

    finished = [cell.model_dir for cell in cells if cell.name not in leaving_out]
    if finished:
        print(flush=True)
        report.main(finished, places.of(sweep.sweep_dir) / "index.html")
