"""One grammar of runs for all commands: `sbs COMMAND RUN` and `sbs COMMAND --run RUN` mean the same.

A positional may stand anywhere among the flags. argparse of Python 3.11 does not allow that of an optional one, so what
it leaves over is taken here. Flags of earlier versions work for one release and say what replaces them.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

STEP = "run directory, or one of its checkpoints/<step>"


def add(
    parser: Any,
    *,
    what: str = STEP,
    old: Sequence[str] = (),
    most: int | None = 1,
    required: bool = True,
    then: Sequence[str] = (),
    dest: str = "run_dirs",
) -> None:
    """Adds RUN and --run, and the flags `old` that they replace; `take` makes `arguments.run_dirs` of them.

    `most` is the number of runs, None for any; `then` are the names of further positionals; `dest` receives all.
    """
    parser.add_argument(dest, nargs="*", metavar=" ".join(("RUN" if most == 1 else "RUNS", *then)), help=what)
    parser.add_argument(
        "--run", dest="run_flags", action="append", default=[], metavar="DIR", help="the same as the positional"
    )
    for flag in old:
        parser.add_argument(
            flag, dest="old_run_flags", action="append", default=[], metavar="DIR", help=argparse.SUPPRESS
        )
    parser.set_defaults(runs=(most, required, tuple(then), tuple(old), dest))


def add_dataset(parser: Any) -> None:
    """Adds --dataset, for students of several datasets."""
    parser.add_argument(
        "--dataset", metavar="NAME", help="dataset to answer for, if the student was trained on several"
    )


def take(parser: argparse.ArgumentParser, arguments: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Settles RUN, --run and their older flags, and returns what of `rest` is not positional.

    Sets `arguments.run_dirs`, `arguments.run_dir` (the first, None if there is none) and `arguments.further`. Ends the
    command with status 2 unless there are as many as `add` said.
    """
    most, required, then, old, dest = arguments.runs
    positionals = [*getattr(arguments, dest)]
    flags = [word for word in rest if word.startswith("-")]
    if not flags:  # else the others may be values of a flag that does not exist
        positionals += rest
    named = [*arguments.run_flags]
    if found := getattr(arguments, "old_run_flags", None):
        say_renamed(parser.prog, f"{old[0]} DIR", "RUN or --run DIR")
        named += found
    count = len(positionals) - len(then)
    runs = [*named, *positionals[: max(0, count)]]
    if count < 0 or (required and not runs):
        wanted = [*(() if named else ("RUN (or --run DIR)",)), *then]
        parser.error(f"got {' '.join(positionals) or 'no positional arguments'}; expected {' '.join(wanted)}")
    if most is not None and len(runs) > most:
        parser.error(f"got the runs {', '.join(runs)}; expected one{' and ' + ' '.join(then) if then else ''}")
    setattr(arguments, dest, positionals)
    arguments.run_dirs, arguments.run_dir = runs, runs[0] if runs else None
    arguments.further = positionals[max(0, count) :]
    return flags if not flags else [*rest]


def say_renamed(command: str, old: str, new: str) -> None:
    """Says on standard error that a flag has another name."""
    print(f"{command}: {old} is now {new}; the old spelling works for one more release.", file=sys.stderr)
