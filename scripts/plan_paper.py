"""Prints TPU hours and cost of the paper's sweeps: the Markdown tables of docs/reproduce.md.

    python scripts/plan_paper.py --plans runs/plans --run    # an hour of compiling on two cores; resumes
    python scripts/plan_paper.py --plans runs/plans          # the tables of the plans made so far

Runs `sbs plan` for every dataset and size, with two tasks (step-by-step) and with one. A cell without a plan is scaled
by its floating-point operations from the most similar plan of that size, and counted as scaled. All figures are the
compiler's estimates.
"""

import argparse
import collections
import functools
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sbs_jax.student import flops
from sbs_jax.training import gin_files

PAPER = Path("gin_configs/experiments/paper")
TOPOLOGIES = {"base": "v5e:2x4", "large": "v5e:2x4", "xxl": "v5p:2x4x4"}
# Rows of validation (10 % of train if it has no file) and of test: METHOD of the paper.
VALIDATION = {"esnli": 9842, "anli1": 1000, "cqa": 975, "svamp": 80}
TEST = {"esnli": 9824, "anli1": 1000, "cqa": 1221, "svamp": 200}
TWO, ONE = "step_by_step", "standard_finetuning"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--plans", required=True, type=Path, metavar="DIR", help="folder of the plans, JSON files of sbs plan"
    )
    parser.add_argument("--run", action="store_true", help="make the missing plans")
    arguments = parser.parse_args()
    wanted = [(dataset, size, method) for size in TOPOLOGIES for method in (TWO, ONE) for dataset in VALIDATION]
    if arguments.run:
        arguments.plans.mkdir(parents=True, exist_ok=True)
        for each in wanted:
            _plan(*each, folder=arguments.plans)
    plans = {each: plan for each in wanted if (plan := _read(arguments.plans / f"{'-'.join(each)}.json"))}
    if not plans:
        sys.exit(f"There are no plans in {arguments.plans}; make some with --run.")
    print(_cells_table(plans), *_sweeps_tables(plans), sep="\n\n")


def _plan(dataset: str, size: str, method: str, *, folder: Path) -> None:
    """Runs `sbs plan`, unless its file exists."""
    file = folder / f"{dataset}-{size}-{method}.json"
    if _read(file):
        return
    command = [sys.executable, "-m", "sbs_jax", "plan", "--json", "--steps", "train,evaluation"]
    command += ["--time_limit", "14400"]
    command += ["--topology", TOPOLOGIES[size], f"--gin_file=gin_configs/experiments/{dataset}/{size}.gin"]
    command += [f"--gin_file=gin_configs/methods/{method}.gin", "--gin.LAYERS=scanned", "--gin.REMAT=attended"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}.")
    file.write_text(done.stdout, "utf-8")


def _read(file: Path) -> dict[str, Any] | None:
    """Reads the candidate of a plan that fits; None without a plan, or if its compilation took too long."""
    if not file.is_file() or not file.stat().st_size:
        return None
    found = json.loads(file.read_text("utf-8"))["candidates"][0]
    return found if found["fits"] else None


def _run_hours(plan: dict[str, Any], dataset: str, *, step: float = 1.0) -> float:
    """Computes the chip-hours of one run: its updates, a validation every 250 of them, and one test.

    `step` is the time of a step relative to the planned one.
    """
    updates = plan["run"]["updates"]
    batches = -(-VALIDATION[dataset] // 64) * (updates // 250) + -(-TEST[dataset] // 64)
    seconds = updates * plan["step_seconds"] * step + batches * plan["steps"]["evaluation"]["seconds"]
    return seconds * plan["chips"] / 3600


@functools.cache
def _flops(dataset: str, size: str, method: str) -> float:
    """Computes the floating-point operations of an update."""
    files = [f"gin_configs/experiments/{dataset}/{size}.gin", f"gin_configs/methods/{method}.gin"]
    given = ["MODEL_DIR=run", "RECORDS_DIR=records", "INITIAL_CHECKPOINT_PATH=t5"]
    config = gin_files.configure("train.TrainConfig", gin_files=files, bindings=given)[0]
    lengths = config.task_feature_lengths
    counts = {"inputs": lengths["inputs"], "targets": lengths["targets"], "trained": 1.0}
    return flops.training_flops(config.model, rows=config.batch_size, **counts)


def _chip_hours(plans: dict[Any, Any], dataset: str, size: str, method: str) -> tuple[float, float, bool] | None:
    """Returns (chip-hours, USD, True if planned) of a run; None without any plan of this size.

    A run without a plan takes as long per operation as the most similar plan of its size.
    """
    method = TWO if method == TWO else ONE  # the other methods have one task as well
    like = [(dataset, size, method), (dataset, size, TWO), *(each for each in plans if each[1] == size)]
    nearest = next((each for each in like if each in plans), None)
    if nearest is None:
        return None
    plan = plans[nearest]
    hours = _run_hours(plan, dataset, step=_flops(dataset, size, method) / _flops(*nearest))
    return hours, hours * plan["usd_per_chip_hour"], nearest == like[0]


def _cells_table(plans: dict[Any, Any]) -> str:
    lines = ["| dataset, size | tasks | TPU | GiB a chip | step | updates | a run | chip-hours | USD |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for (dataset, size, method), plan in plans.items():
        hours = _run_hours(plan, dataset)
        lines.append(
            f"| {dataset}, {size} | {'two' if method == TWO else 'one'} | {plan['topology']} "
            f"| {plan['steps']['train']['needs'] / 2**30:.1f} | {1000 * plan['step_seconds']:.0f} ms "
            f"| {plan['run']['updates']:,} | {60 * hours / plan['chips']:.0f} min | {hours:.2f} "
            f"| {hours * plan['usd_per_chip_hour']:.2f} |"
        )
    return "\n".join(lines)


def _sweeps_tables(plans: dict[Any, Any]) -> tuple[str, str]:
    """Formats the tables by sweep and by size of student; sweeps share cells, which count once in the sums."""
    lines = [
        "| sweep | cells | planned | scaled | not known | chip-hours | USD |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    seen: dict[str, tuple[str, float, float]] = {}
    names = [file.stem for file in sorted(PAPER.glob("*.gin")) if file.stem not in ("settings", "smallest")]
    for name in sorted(names, key=lambda name: (not name.startswith("table"), name)):
        given = ["SWEEP_DIR=runs", "RECORDS_DIR=records"]
        plan = gin_files.configure("sweep.Sweep", gin_files=[str(PAPER / f"{name}.gin")], bindings=given)[0]
        states: collections.Counter[str] = collections.Counter()
        hours = dollars = 0.0
        for cell in plan.cells():
            one = _chip_hours(plans, cell.dataset, cell.size, cell.method)  # less data takes as many updates
            states["not known" if one is None else "planned" if one[2] else "scaled"] += 1
            if one:
                hours, dollars = hours + one[0], dollars + one[1]
                seen[f"20b {cell.name}" if name.endswith("20b") else cell.name] = (cell.size, *one[:2])
        counts = " | ".join(str(states[state]) for state in ("planned", "scaled", "not known"))
        lines.append(f"| `{name}` | {states.total()} | {counts} | {hours:,.0f} | {dollars:,.0f} |")
    total = _sums(seen.values())
    lines.append(f"| all, each cell once | {total[0]} | | | | {total[1]:,.0f} | {total[2]:,.0f} |")
    by_size = ["| students | runs | chip-hours | USD |", "|---|---:|---:|---:|"]
    for size in TOPOLOGIES:
        runs, hours, dollars = _sums(each for each in seen.values() if each[0] == size)
        by_size.append(f"| {size} | {runs} | {hours:,.0f} | {dollars:,.0f} |")
    return "\n".join(lines), "\n".join(by_size)


def _sums(cells: Iterable[tuple[str, float, float]]) -> tuple[int, float, float]:
    """Counts cells, and sums their chip-hours and USD."""
    kept = list(cells)
    return len(kept), sum(each[1] for each in kept), sum(each[2] for each in kept)


if __name__ == "__main__":
    main()
