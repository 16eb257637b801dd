"""`sbs report`: runs to a table and a page."""

import argparse
from typing import Any


def add(command: Any) -> None:
    report = command("report", run, "Compare finished runs: a table, and a page with their curves.")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run directories of sbs train")
    report.add_argument("--output", default="report.html", metavar="FILE", help="page to write")


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax import report

    report.main(arguments.run_dirs, arguments.output)
    return 0
