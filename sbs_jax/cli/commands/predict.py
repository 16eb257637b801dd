"""`sbs predict`: answers to a file of inputs."""

import argparse
from collections.abc import Sequence
from typing import Any

from sbs_jax import hosts
from sbs_jax.training.gin_files import UsageError

# The exit status where every row was read and some could not be answered; 1 where there is no output, 2 of wrong flags.
SOME_ROWS_FAILED = 3


def add(command: Any) -> None:
    predict = command(
        "predict",
        run,
        'Answer {"id", "input"} rows with {"id", "prediction", "score"} rows.',
        multihost=True,
        epilog="examples:\n  sbs predict --model runs/svamp --input questions.jsonl --output answers.jsonl\n"
        "  sbs predict --model runs/esnli --input rows.csv --output rows.parquet --decoding choices --rationale\n"
        "  sbs predict --model runs/svamp-lora --adapters esnli=runs/esnli-lora --input rows.jsonl \\\n"
        "      --output answers.jsonl\n\n"
        "A row that cannot be answered gets a row {id, line, error}, and the rest goes on; then the exit status is "
        f"{SOME_ROWS_FAILED}.\n"
        "Interrupted, the same command goes on where it was. docs/prediction.md has formats, decodings and speed.\n\n"
        'With --adapters, rows that have "adapter": "esnli" are answered by that run, the others by --model; all of\n'
        "them over one base, which is held once. Their vocabularies, prefixes and lengths are their own.",
    )
    predict.add_argument(
        "--model", required=True, metavar="DIR", help="run directory, or one of its checkpoints/<step>"
    )
    predict.add_argument(
        "--input", required=True, metavar="FILE", help="what to read: .csv, .parquet, or else JSON lines"
    )
    predict.add_argument("--output", required=True, metavar="FILE", help="what to write, by its ending too")
    predict.add_argument(
        "--task", choices=("label", "rationale"), default="label", dest="objective", help="what to predict"
    )
    add_settings(predict)
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


def add_settings(parser: Any) -> None:
    """Flags of how answers are made; `settings` reads them."""
    group = parser.add_argument_group("how answers are made")
    group.add_argument("--rationale", action="store_true", help="generate the rationale beside the label")
    group.add_argument(
        "--decoding",
        choices=("greedy", "beam", "sample", "choices"),
        default="greedy",
        help="choices: the likeliest of the dataset's labels, or of the row's own",
    )
    group.add_argument("--beams", type=int, default=4, metavar="N", help="of beam search")
    group.add_argument("--length_penalty", type=float, default=1.0, metavar="X", help="of beam search")
    group.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of sampling")
    group.add_argument("--top_k", type=int, default=0, metavar="N", help="of sampling: the likeliest alone (0: all)")
    group.add_argument("--top_p", type=float, default=1.0, metavar="X", help="of sampling: the fewest of this share")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling")
    group.add_argument("--batch_size", type=int, default=32, metavar="N", help="rows at a time")
    group.add_argument(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="how matrices are held: fewer bits are faster and less exact",
    )
    group.add_argument(
        "--too_long",
        choices=("error", "cut"),
        default="error",
        help="what becomes of inputs longer than the student was trained with",
    )
    group.add_argument(
        "--compiled",
        metavar="DIR",
        help="where compiled programs are kept for the next start, or 'off' (default: $SBS_COMPILED, else "
        "~/.cache/sbs_jax/compiled)",
    )


def settings(arguments: argparse.Namespace, **more: Any) -> Any:
    """The `Settings` that the flags say."""
    import dataclasses

    from sbs_jax.prediction import engine

    names = {field.name for field in dataclasses.fields(engine.Settings)}
    return engine.Settings(**{name: value for name, value in vars(arguments).items() if name in names}, **more)


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.prediction import compiled, engine, files, inputs

    asked = settings(arguments)
    inputs.read(arguments.input)  # before the student is, which takes longer
    with compiled.kept(arguments.compiled or compiled.default()):
        predictor = engine.Predictor.load(
            arguments.model, settings=asked, base=arguments.base, adapters=named(arguments.adapters)
        )
        done = files.predict(predictor, input_path=arguments.input, output_path=arguments.output)
    if hosts.is_first():
        errors = f" and {done.errors} rows with errors" if done.errors else ""
        resumed = f" ({done.resumed} of these rows were there before)" if done.resumed else ""
        print(f"{done.rows - done.errors} predictions{errors} in {arguments.output}{resumed}")
    return SOME_ROWS_FAILED if done.errors else 0


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
