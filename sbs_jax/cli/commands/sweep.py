"""`sbs sweep`: train many runs from one gin file."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from sbs_jax.hosts import preemption
from sbs_jax.training import gin_files
from sbs_jax.training.gin_files import UsageError


def add(command: Any) -> None:
    sweep = command(
        "sweep",
        run,
        check=check,
        gin=True,
        epilog="examples:\n  sbs sweep --gin_file=gin_configs/experiments/paper/smallest.gin \\\n"
        "      --records_dir records --gin.SWEEP_DIR=runs/smallest --jobs 2\n"
        "  sbs sweep --gin_file=gin_configs/experiments/own/methods.gin \\\n"
        "      --dataset tickets --gin.SWEEP_DIR=runs/methods\n"
        "  sbs sweep --gin_file=gin_configs/experiments/paper/table1.gin .. --print > commands.sh\n"
        '  eval "$(sbs sweep --gin_file=.. --print --index $SLURM_ARRAY_TASK_ID)"\n\n'
        "Repeat the command to resume. SIGTERM or Ctrl-C is forwarded to the cells, which save and end. Logs are in\n"
        "SWEEP_DIR/logs. Exit status: 0 all cells finished, 1 some failed or an error,\n"
        f"{preemption.EXIT_STATUS} preempted (repeat the command).",
    )
    sweep.add_argument(
        "--dataset", nargs="+", metavar="NAME", help="datasets, or folders of sbs init, which imply their records"
    )
    sweep.add_argument(
        "--records_dir", metavar="DIR", help="records of the datasets (default for a folder: its records)"
    )
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="cells to train at a time")
    sweep.add_argument(
        "--together",
        type=int,
        metavar="N",
        help="cells that differ only in seed, at most N, train one after the other in one process, which compiles once "
        "(default: the seeds of a kind are shared among the --jobs; 1: each cell in its own process)",
    )
    sweep.add_argument("--dry_run", action="store_true", help="show the cells and their state; train nothing")
    sweep.add_argument("--print", action="store_true", help="print one command per cell, for a cluster; train nothing")
    sweep.add_argument("--index", type=int, metavar="I", help="with --print: only the command of cell I, from 0")
    sweep.add_argument("--json", action="store_true", help="with --print: as a JSON list of name and argv")
    sweep.add_argument(
        "--redo_changed",
        action="store_true",
        help="move aside runs of another configuration or other data, and train those cells again",
    )


def settled(arguments: argparse.Namespace, bindings: Sequence[str]) -> list[str]:
    """Adds the bindings that the flags stand for; those on the command line come after them."""
    datasets = None if arguments.dataset is None else tuple(arguments.dataset)
    return [*gin_files.bindings({"DATASETS": datasets, "RECORDS_DIR": arguments.records_dir}), *bindings]


def check(arguments: argparse.Namespace, bindings: Sequence[str]) -> None:
    if not arguments.print and (arguments.index is not None or arguments.json):
        raise UsageError("--index and --json go with --print.")
    if arguments.jobs < 1:
        raise UsageError(f"--jobs is {arguments.jobs}; expected at least 1.")
    if arguments.together is not None and arguments.together < 1:
        raise UsageError(f"--together is {arguments.together}; expected at least 1 seed.")
    from sbs_jax.cli import early

    early.sweeping(early.configuration("sweep.Sweep", arguments, settled(arguments, bindings)))


def run(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    from sbs_jax import sweep
    from sbs_jax.cli import main

    plan, _ = gin_files.configured("sweep.Sweep", arguments, settled(arguments, bindings))
    plan = sweep.searching(plan, arguments.gin_search_paths, modules=arguments.module)
    if arguments.print:
        sweep.check_configurations(plan.cells())
        print(_commands(plan.cells(), index=arguments.index, as_json=arguments.json))
        return 0
    if arguments.dry_run:
        sweep.check_configurations(plan.cells())
        found = sweep.standings(plan.cells())
        left = [each.cell for each in found if each.state != sweep.FINISHED]
        print(sweep.overview(found))
        print(sweep.listed(sweep.groups(left, jobs=arguments.jobs, together=arguments.together)), end="")
        return 0
    return sweep.main(
        plan,
        entry=main.main,
        jobs=arguments.jobs,
        together=arguments.together,
        redo_changed=arguments.redo_changed,
    )


def _commands(cells: Sequence[Any], *, index: int | None, as_json: bool) -> str:
    if index is not None:
        if not 0 <= index < len(cells):
            raise UsageError(f"--index is {index}; the sweep has {len(cells)} cells, 0 to {len(cells) - 1}.")
        cells = [cells[index]]
    if as_json:
        return json.dumps([{"name": cell.name, "argv": ["sbs", *cell.arguments()]} for cell in cells], indent=1)
    return "\n".join(cell.command() for cell in cells)
