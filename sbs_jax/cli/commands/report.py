"""`sbs report`: compare finished runs."""

import argparse
from typing import Any


def add(command: Any) -> None:
    report = command("report", run, tensorflow=False)
    report.add_argument(
        "paths", nargs="+", metavar="RUNS", help="run directories of sbs train, or folders that hold some"
    )
    report.add_argument("--output", default="report.html", metavar="FILE", help="page to write")
    report.add_argument(
        "--assets",
        metavar="DIR",
        help="folder for plots as SVG and numbers as CSV (default: report_files/ for report.html)",
    )


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.pages import report

    report.main(arguments.paths, arguments.output, assets=arguments.assets)
    return 0
