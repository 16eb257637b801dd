"""`sbs evaluate`: grade a checkpoint on a split."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from sbs_jax.cli import runs
from sbs_jax.training import gin_files
from sbs_jax.training.gin_files import UsageError

# Flags and their macros; a binding on the command line comes after them.
_MACROS = {
    "run_dir": "CHECKPOINT_PATH",
    "split": "SPLIT",
    "records_dir": "RECORDS_DIR",
    "batch_size": "BATCH_SIZE",
    "output": "EVAL_OUTPUT_DIR",
    "base": "BASE_PATH",
}
_FILE = "gin_configs/runs/evaluate.gin"


def add(command: Any) -> None:
    evaluate = command(
        "evaluate",
        run,
        check=check,
        gin=True,
        multihost=True,
        epilog="example:\n  sbs evaluate runs/svamp --split test\n"
        "  sbs evaluate runs/svamp --gin_file=gin_configs/meshes/fsdp.gin\n\n"
        "--gin_file and --gin.NAME=VALUE are for what has no flag, such as a mesh.",
    )
    runs.add(evaluate, old=("--model",), required=False)
    evaluate.add_argument("--split", metavar="NAME", help="train, validation or test (default: test)")
    evaluate.add_argument("--records_dir", metavar="DIR", help="records (default: those the run was trained on)")
    evaluate.add_argument("--batch_size", type=int, metavar="N", help="rows at a time (default: 64)")
    evaluate.add_argument("--output", metavar="DIR", help="folder for predictions and metrics.json (default: none)")
    evaluate.add_argument("--base", metavar="PATH", help="new path of the base of a run's adapters, if it has moved")


def settled(arguments: argparse.Namespace, bindings: Sequence[str]) -> list[str]:
    """Adds the gin file and the bindings that the flags stand for."""
    if arguments.run_dir is not None and _FILE not in arguments.gin_file:
        arguments.gin_file = [_FILE, *arguments.gin_file]
    given = {macro: getattr(arguments, flag) for flag, macro in _MACROS.items()}
    return [*gin_files.bindings(given), *bindings]


def check(arguments: argparse.Namespace, bindings: Sequence[str]) -> None:
    from sbs_jax.cli import early

    if arguments.run_dir is None and not arguments.gin_file:
        raise UsageError("got no run; expected sbs evaluate RUN, or a --gin_file.")
    found = early.configuration("evaluate.EvaluateConfig", arguments, settled(arguments, bindings))
    if isinstance(path := found.value("CHECKPOINT_PATH"), str):
        early.run(path, whole=True)


def run(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    from sbs_jax import hosts
    from sbs_jax.data.dataset import Dataset
    from sbs_jax.pages import tables
    from sbs_jax.prediction import compiled
    from sbs_jax.stats import graded
    from sbs_jax.stats.labels import Labels
    from sbs_jax.training import evaluate

    config, _ = gin_files.configured("evaluate.EvaluateConfig", arguments, settled(arguments, bindings))
    by_label: list[Labels] = []

    def describe(result: evaluate.Result, dataset: Dataset) -> dict[str, Any]:
        found = graded.by_label(result.rows, dataset.labels)
        more = {}
        if found is not None:
            by_label.append(found)
            more = found.described()
        return graded.described(result.metrics, result.rows, found) | more

    with compiled.kept(compiled.default()):
        found = evaluate.evaluate(config, describe=describe)
    if hosts.is_first():
        for each in by_label:  # for people; programs read the line of JSON, or metrics.json
            print(tables.of_labels(each), file=sys.stderr)
        print(json.dumps({name: value for name, value in found.items() if name not in ("labels", "confusion")}))
    return 0
