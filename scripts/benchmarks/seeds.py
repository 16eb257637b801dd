"""Measures seeds that share a process and its compiled programs against a process per run, and the whole demo.

    python scripts/bench.py seeds                  # make bench-seeds; half an hour on 2 free cores
    python scripts/bench.py seeds --seeds 4 --rounds 1 --only seeds

The students of the demo, both methods, a quarter of the data, 2 runs at a time with a thread each: `sbs sweep --jobs 2`
against `sbs sweep --jobs 2 --together 1`, in turns, with all that a sweep does (start, compiles, evaluations,
checkpoints, test, report). Results: docs/speed.md.
"""

import argparse
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import harness

METHODS = ("standard_finetuning", "step_by_step")
SIDES = {"ours": [], "processes": ["--together", "1"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=12, help="students per method (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side (default: %(default)s)")
    parser.add_argument("--only", choices=("seeds", "demo"), help="measure one of the two")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    versions = harness.versions("jax", "orbax-checkpoint")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.only != "seeds":
            minutes = _seconds(["demo", "--output", str(folder / "demo")])[0] / 60
            yield harness.Row("demo_minutes", "min", minutes, 1.0, "<= 5", versions)
        if arguments.only != "demo":
            yield from _sides(folder, arguments.seeds, arguments.rounds, versions)


def _sides(folder: Path, seeds: int, rounds: int, versions: dict[str, str]) -> Iterator[harness.Row]:
    if not (folder / "demo" / "records").exists():
        program = (
            "import sys; from pathlib import Path; from sbs_jax.cli import demo; demo.make_records(Path(sys.argv[1]))"
        )
        subprocess.run([*harness.SBS[:1], "-c", program, str(folder / "demo")], check=True, stdout=subprocess.DEVNULL)
    files = ["--gin_file=gin_configs/experiments/builtin/rationale_selection.gin"]
    table = [
        f"--gin.METHODS={METHODS}",
        "--gin.AXES={}",
        "--gin.FRACTIONS=(0.25,)",
        f"--gin.SEEDS={tuple(range(seeds))}",
    ]
    common = ["sweep", *files, *table, f"--gin.RECORDS_DIR={folder / 'demo' / 'records'}", "--jobs", "2"]
    students = seeds * len(METHODS)
    wall: dict[str, list[float]] = {side: [] for side in SIDES}
    processor: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side, more in SIDES.items():
            seconds, busy = _seconds([*common, f"--gin.SWEEP_DIR={folder / side}{turn}", *more])
            wall[side].append(60 * students / seconds)
            processor[side].append(busy / students)
            print(f"{side}: {wall[side][-1]:.2f} students/min, {processor[side][-1]:.1f} CPU s/student", flush=True)
    best = {side: max(rates) for side, rates in wall.items()}
    name = "students_per_minute_vs_processes"
    yield harness.Row(name, "1/min", best["ours"], best["processes"], ">= 3", versions)
    least = {side: min(each) for side, each in processor.items()}
    yield harness.Row("student_cpu_vs_processes", "s", least["ours"], least["processes"], "< 1", versions)


def _seconds(arguments: Sequence[str]) -> tuple[float, float]:
    """Runs `sbs`; returns wall seconds, and processor seconds of all its processes."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([*harness.SBS, *arguments], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
