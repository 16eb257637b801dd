"""`sbs report`: compare finished runs."""

import argparse
from typing import Any

from sbs_jax.cli import runs


def add(command: Any) -> None:
    report = command("report", run, module=False, tensorflow=False)
    runs.add(report, what="run directories of sbs train, or folders that hold some", most=None)
    report.add_argument("--output", default="report.html", metavar="FILE", help="page to write")
    report.add_argument(
        "--assets",
        metavar="DIR",
        help="folder for plots as SVG and numbers as CSV (default: report_files/ for report.html)",
    )


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.pages import report

    report.main(arguments.run_dirs, arguments.output, assets=arguments.assets)
    return 0
