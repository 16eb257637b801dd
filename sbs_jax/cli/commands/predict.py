"""`sbs predict`: answer a file of inputs."""

import argparse
from collections.abc import Sequence
from typing import Any

from sbs_jax import hosts
from sbs_jax.cli import runs
from sbs_jax.training.gin_files import UsageError

# Exit status if some rows could not be answered; 1 means no output, 2 wrong flags.
SOME_ROWS_FAILED = 3


def add(command: Any) -> None:
    predict = command(
        "predict",
        run,
        check=check,
        multihost=True,
        epilog="examples:\n  sbs predict runs/svamp --input questions.jsonl --output answers.jsonl\n"
        "  sbs predict runs/esnli --input rows.csv --output rows.parquet --decoding choices --rationale\n"
        "  sbs predict runs/svamp-lora --adapters esnli=runs/esnli-lora --input rows.jsonl \\\n"
        "      --output answers.jsonl\n\n"
        "A row that cannot be answered gets an output row {id, line, error}; the exit status is then "
        f"{SOME_ROWS_FAILED}.\n"
        "Repeat an interrupted command to resume it. Formats, decodings and speed: docs/prediction.md.\n\n"
        'With --adapters, that run answers the rows with "adapter": "esnli", and RUN the others. All share one\n'
        "base, which is loaded once; each keeps its own vocabulary, prefixes and lengths.",
    )
    runs.add(predict, old=("--model",))
    runs.add_dataset(predict)
    predict.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="input file: .csv, .tsv, .parquet, else JSON lines or one JSON array; .gz unpacked",
    )
    predict.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="output file; the extension sets the format, as for --input. Of several processes each writes a shard, "
        "FILE-00000-of-00002",
    )
    predict.add_argument(
        "--task", choices=("label", "rationale"), default="label", dest="objective", help="what to predict"
    )
    add_settings(predict)
    predict.add_argument("--base", metavar="PATH", help="new path of the base of a run's adapters, if it has moved")
    predict.add_argument(
        "--adapters",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="another run over the same base, for rows that name it; repeatable",
    )


def add_settings(parser: Any) -> None:
    """Adds the decoding flags; `settings` reads them."""
    group = parser.add_argument_group("decoding")
    group.add_argument("--rationale", action="store_true", help="generate the rationale as well as the label")
    group.add_argument(
        "--decoding",
        choices=("greedy", "beam", "sample", "choices"),
        default="greedy",
        help="choices: the most likely of the dataset's labels, or of the row's choices",
    )
    group.add_argument("--beams", type=int, default=4, metavar="N", help="beam search: number of beams")
    group.add_argument(
        "--length_penalty", type=float, default=1.0, metavar="X", help="beam search: exponent of the length"
    )
    group.add_argument("--temperature", type=float, default=1.0, metavar="X", help="sampling: temperature")
    group.add_argument(
        "--top_k", type=int, default=0, metavar="N", help="sampling: keep the N likeliest tokens (0: all)"
    )
    group.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="X",
        help="nucleus sampling: keep the smallest set of tokens with this total probability",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="sampling: random seed")
    group.add_argument("--batch_size", type=int, default=32, metavar="N", help="rows at a time")
    group.add_argument(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="precision of the weight matrices: fewer bits are faster and less exact",
    )
    group.add_argument(
        "--too_long",
        choices=("error", "cut"),
        default="error",
        help="inputs longer than the training length: report an error, or truncate",
    )
    group.add_argument(
        "--compiled",
        metavar="DIR",
        help="cache folder for compiled programs, or 'off' (default: $SBS_COMPILED, else ~/.cache/sbs_jax/compiled)",
    )


def settings(arguments: argparse.Namespace, **more: Any) -> Any:
    """Builds `Settings` from the flags."""
    import dataclasses

    from sbs_jax.prediction import engine

    names = {field.name for field in dataclasses.fields(engine.Settings)}
    return engine.Settings(**{name: value for name, value in vars(arguments).items() if name in names}, **more)


def check(arguments: argparse.Namespace) -> None:
    from sbs_jax.cli import early
    from sbs_jax.prediction import outputs, shards

    early.rows(arguments.input)
    outputs.check(arguments.output, input_path=arguments.input, shard=shards.Shard(*hosts.numbered()))
    check_runs(arguments)


def check_runs(arguments: argparse.Namespace) -> None:
    """Checks RUN and the runs of --adapters, and that --dataset chooses one of theirs."""
    from sbs_jax.cli import early

    for path in (arguments.run_dir, *named(arguments.adapters).values()):
        early.run(path, dataset=arguments.dataset)


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.prediction import compiled, engine, files, shards

    asked = settings(arguments)
    with compiled.kept(arguments.compiled or compiled.default()):
        predictor = engine.Predictor.load(
            arguments.run_dir,
            settings=asked,
            base=arguments.base,
            adapters=named(arguments.adapters),
            dataset=arguments.dataset,
        )
        done = files.predict(predictor, input_path=arguments.input, output_path=arguments.output)
    if hosts.is_first():
        errors = f" and {done.errors} rows with errors" if done.errors else ""
        resumed = f" ({done.resumed} of these rows were resumed)" if done.resumed else ""
        output = shards.Shard(*hosts.numbered()).files(arguments.output)
        print(f"{done.rows - done.errors} predictions{errors} in {output}{resumed}")
    return SOME_ROWS_FAILED if done.errors else 0


def named(flags: Sequence[str]) -> dict[str, str]:
    """Parses `NAME=DIR` flags into a dictionary."""
    named: dict[str, str] = {}
    for flag in flags:
        name, equals, place = flag.partition("=")
        if not (name and equals and place):
            raise UsageError(f"got --adapters {flag!r}; expected NAME=DIR, such as esnli=runs/esnli-lora.")
        if name in named:
            raise UsageError(f"--adapters names {name!r} twice: {named[name]} and {place}.")
        named[name] = place
    return named
