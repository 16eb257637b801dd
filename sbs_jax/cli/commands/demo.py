"""`sbs demo`: the whole method on the built-in dataset."""

import argparse
from typing import Any


def add(command: Any) -> None:
    demo = command("demo", run, "Train and compare both methods on the built-in dataset; writes a page.")
    demo.add_argument("--output", default="runs/demo", metavar="DIR", help="where runs, table and page go")


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.cli import demo, main

    return demo.main(arguments.output, entry=main.main)
