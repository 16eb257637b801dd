"""`sbs demo`: run the whole method on the built-in dataset."""

import argparse
from typing import Any


def add(command: Any) -> None:
    demo = command("demo", run, module=False)
    demo.add_argument("--output", default="runs/demo", metavar="DIR", help="folder of the runs, the table and the page")


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.cli import demo, main

    return demo.main(arguments.output, entry=main.main)
