"""`sbs predict`: answers to a file of inputs."""

import argparse
from collections.abc import Sequence
from typing import Any

from sbs_jax import hosts
from sbs_jax.configuration import UsageError


def add(command: Any) -> None:
    predict = command(
        "predict",
        run,
        'Answer {"id", "input"} rows with {"id", "prediction", "score"} rows.',
        multihost=True,
        epilog="examples:\n  sbs predict --model runs/svamp --input questions.jsonl --output answers.jsonl\n"
        "  sbs predict --model runs/svamp-lora --adapters esnli=runs/esnli-lora --input rows.jsonl \\\n"
        "      --output answers.jsonl\n\n"
        'With --adapters, rows that have "adapter": "esnli" are answered by that run, the others by --model; all of\n'
        "them over one base, which is held once. Their vocabularies, prefixes and lengths are their own.",
    )
    predict.add_argument(
        "--model", required=True, metavar="DIR", help="run directory, or one of its checkpoints/<step>"
    )
    predict.add_argument("--input", required=True, metavar="FILE", help="JSON lines to read")
    predict.add_argument("--output", required=True, metavar="FILE", help="JSON lines to write")
    predict.add_argument("--task", choices=("label", "rationale"), default="label", help="what to predict")
    predict.add_argument("--batch_size", type=int, default=32, help="rows at a time")
    predict.add_argument(
        "--base", metavar="PATH", help="where the base of a run that trained adapters lies, if it has moved"
    )
    predict.add_argument(
        "--adapters",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a run over the same base, for rows that name it; repeat",
    )


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax import evaluate

    count = evaluate.predict(
        arguments.model,
        input_path=arguments.input,
        output_path=arguments.output,
        objective=arguments.task,
        batch_size=arguments.batch_size,
        base=arguments.base,
        adapters=named(arguments.adapters),
    )
    if hosts.is_first():
        print(f"{count} predictions in {arguments.output}")
    return 0


def named(flags: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` flags by name."""
    named: dict[str, str] = {}
    for flag in flags:
        name, equals, place = flag.partition("=")
        if not (name and equals and place):
            raise UsageError(f"got --adapters {flag!r}; expected NAME=DIR, such as esnli=runs/esnli-lora.")
        if name in named:
            raise UsageError(f"--adapters names {name!r} twice: {named[name]} and {place}.")
        named[name] = place
    return named
