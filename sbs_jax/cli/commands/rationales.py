"""`sbs rationales`: measure a student's rationales."""

import argparse
import json
from typing import Any

from sbs_jax import hosts
from sbs_jax.cli import runs
from sbs_jax.training.gin_files import UsageError


def add(command: Any) -> None:
    rationales = command(
        "rationales",
        run,
        check=check,
        epilog="examples:\n  sbs rationales runs/svamp\n  sbs rationales --dataset svamp --records_dir records\n\n"
        "Writes rationales.json and rationales.jsonl into the run directory, where `sbs report` finds them. With\n"
        "--dataset, measures the teacher's own texts and labels in the records and writes nothing.\n"
        "The figures: docs/rationales.md.",
    )
    runs.add(rationales, what="run directory of sbs train", required=False)
    rationales.add_argument(
        "--dataset",
        metavar="NAME",
        help="measure the teacher of this dataset's records instead: its name, or a folder of sbs init",
    )
    rationales.add_argument("--teacher", dest="old_dataset", metavar="NAME", help=argparse.SUPPRESS)
    rationales.add_argument(
        "--records_dir", metavar="DIR", help="records (default: those the run was trained on, or the folder's)"
    )
    rationales.add_argument("--limit", type=int, metavar="N", help="measure only the first N test rows")
    rationales.add_argument("--batch_size", type=int, default=64, help="rows per batch")
    rationales.add_argument(
        "--base", metavar="PATH", help="base checkpoint of a run that trained adapters (default: the recorded path)"
    )


def check(arguments: argparse.Namespace) -> None:
    if arguments.old_dataset is not None:
        runs.say_renamed("sbs rationales", "--teacher NAME", "--dataset NAME")
        arguments.dataset = arguments.dataset or arguments.old_dataset
    if (arguments.run_dir is None) == (arguments.dataset is None):
        got = "neither" if arguments.run_dir is None else "both"
        raise UsageError(f"got {got}; expected either a run directory or --dataset NAME.")
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit is {arguments.limit}; expected at least 1.")
    from sbs_jax.cli import early, folders
    from sbs_jax.data import catalogue, records

    if arguments.dataset is None:
        early.run(arguments.run_dir)
        return
    folders.fill_in(arguments)
    records.check_exist(arguments.records_dir, catalogue.get(arguments.dataset).name)


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.stats import rationales

    if arguments.dataset is not None:
        found = rationales.of_teacher(arguments.dataset, records_dir=arguments.records_dir, limit=arguments.limit)
    else:
        found = rationales.measure(
            arguments.run_dir,
            records_dir=arguments.records_dir,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            base=arguments.base,
        )
    if hosts.is_first():
        print(json.dumps(found, indent=1))
    return 0
