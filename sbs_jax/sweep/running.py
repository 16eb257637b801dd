"""Training of a sweep's unfinished cells, and the report on all of them."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import hosts
from sbs_jax.hosts import preemption
from sbs_jax.run import directory
from sbs_jax.storage import lock
from sbs_jax.sweep.cells import Cell, Sweep, check_configurations, check_inputs
from sbs_jax.sweep.standings import graded, unfinished
from sbs_jax.sweep.workers import Workers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A cell that has ended; `metrics` holds the test metrics of a finished one."""

    cell: Cell
    status: int
    seconds: float
    metrics: Mapping[str, Any]
    number: int  # in order of completion, from 1

    @property
    def result(self) -> str:
        """Returns "accuracy 81.0", or the reason it did not finish."""
        if self.status == preemption.EXIT_STATUS:
            return "preempted, and saved"
        return f"failed, status {self.status}" if self.status else graded(self.metrics)

    def last_words(self) -> str:
        """Returns the last line of a cell's log, and the log's path."""
        with contextlib.suppress(OSError):
            lines = self.cell.log.read_text("utf-8", "replace").strip().splitlines()
            said = next((line for line in reversed(lines) if line.startswith("sbs train:")), lines[-1] if lines else "")
            return f"{said[:300]} (status {self.status}; {self.cell.log})"
        return f"status {self.status}; {self.cell.log} cannot be read"


def run(cells: Sequence[Cell], started: Workers, *, jobs: int) -> Iterator[Ended]:
    """Trains cells, `jobs` at a time, and yields each one when it ends.

    preemption.PreemptedError if this process is preempted; the running cells have saved by then.
    """
    waiting, running, number, preempted = list(cells), {}, 0, False
    with preemption.listening():
        while running or (waiting and not preempted):
            while waiting and len(running) < jobs and not preempted:
                cell = waiting.pop(0)
                started.start(cell.name, cell.arguments(), log=cell.log)
                running[cell.name] = cell, time.monotonic()
            for name, status in started.ended(timeout=0.2):
                cell, begin = running.pop(name)
                number += 1
                metrics = _test_metrics(cell) if status == 0 else {}
                yield Ended(cell=cell, status=status, seconds=time.monotonic() - begin, metrics=metrics, number=number)
            if hosts.preemption_requested() and not preempted:
                preempted = True
                started.send(signal.SIGTERM)
    if preempted:
        raise preemption.PreemptedError("This sweep was preempted; its cells are saved. Repeat the command to resume.")


def _test_metrics(cell: Cell) -> Mapping[str, Any]:
    return [line for line in directory.read_metrics(cell.model_dir) if line["kind"] == "test"][-1]


def main(sweep: Sweep, *, entry: Callable[[list[str]], int], jobs: int, redo_changed: bool) -> int:
    """Trains unfinished cells, prints the table, writes the page, and returns the exit status."""
    cells = sweep.cells()
    busy = jobs > 1 and jobs >= (os.cpu_count() or 1)
    with Workers(entry=entry, one_thread=busy) as started, contextlib.ExitStack() as stack:
        check_inputs(check_configurations(cells))
        # Not before the workers' server is forked: a copy of the descriptor there would hold the lock after our end.
        stack.enter_context(_locked(lock.real(sweep.sweep_dir)))
        left = unfinished(cells, redo_changed=redo_changed)
        failed = []
        for ended in run(left, started, jobs=jobs):
            print(f"[{ended.number}/{len(left)}] {ended.cell.name}: {ended.result} ({ended.seconds:.0f} s)", flush=True)
            if ended.status:
                failed.append(ended)
    _report(sweep, cells, leaving_out={ended.cell.name for ended in failed})
    if failed:
        lines = [f"  {ended.cell.name}: {ended.last_words()}" for ended in failed]
        print("\n".join([f"{len(failed)} of {len(cells)} cells failed; repeat the command to try them again:", *lines]))
    return 1 if failed else 0


def _locked(folder: Path) -> lock.Lock:
    folder.mkdir(parents=True, exist_ok=True)
    return lock.Lock(folder / "lock", of=folder, instead="another SWEEP_DIR")


def _report(sweep: Sweep, cells: Sequence[Cell], *, leaving_out: set[str]) -> None:
    """Prints tables and writes a page of the finished cells."""
    from sbs_jax.pages import report

    finished = [cell.model_dir for cell in cells if cell.name not in leaving_out]
    if finished:
        print(flush=True)
        report.main(finished, Path(sweep.sweep_dir) / "index.html")
