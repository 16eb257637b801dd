"""`sbs train`: train a student."""

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

from sbs_jax import hosts
from sbs_jax.hosts import preemption
from sbs_jax.training import gin_files
from sbs_jax.training.gin_files import UsageError

log = logging.getLogger(__name__)


def add(command: Any) -> None:
    train = command(
        "train",
        run,
        check=check,
        gin=True,
        multihost=True,
        epilog="example:\n  sbs train --gin_file=gin_configs/experiments/svamp/cpu.gin \\\n"
        "      --records_dir records --run runs/svamp\n"
        "  sbs train .. --seeds 0,1,2 --run runs/svamp-{seed}\n\n"
        "Repeat the command to resume. SIGTERM or Ctrl-C saves and ends the run; a second one ends it at once.\n"
        f"Exit status: 0 finished, {preemption.EXIT_STATUS} preempted and saved (repeat the command), 1 error.",
        more=_macros,
    )
    train.add_argument(
        "--run", dest="run_flag", metavar="DIR", help="run directory to write or to resume: --gin.MODEL_DIR=DIR"
    )
    train.add_argument("--records_dir", metavar="DIR", help="records to train on: --gin.RECORDS_DIR=DIR")
    train.add_argument(
        "--accept_changes",
        action="store_true",
        help="resume even if data, vocabulary, defaults or configuration differ from those the run began with",
    )
    train.add_argument(
        "--seeds",
        metavar="N,N,..",
        help="train a run per seed, one after the other with programs compiled once; {seed} in MODEL_DIR is the seed",
    )


def _macros() -> str:
    """Lists the macros of gin_configs/runs/train.gin and of the configuration's fields, a line each."""
    from sbs_jax.training import gin_scan

    return gin_scan.listing("gin_configs/runs/train.gin", "train.TrainConfig")


def check(arguments: argparse.Namespace, bindings: Sequence[str]) -> None:
    from sbs_jax.cli import early

    for each in each_of(arguments, bindings):
        early.training(early.configuration("train.TrainConfig", arguments, each))


def run(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    from sbs_jax.prediction import compiled
    from sbs_jax.stats import graded, verdict
    from sbs_jax.training import loop

    each = each_of(arguments, bindings)
    configured = [gin_files.configured("train.TrainConfig", arguments, found) for found in each]
    programs = loop.Programs.of(configured[0][0]) if len(each) > 1 else None
    for config, text in configured:
        with compiled.kept(compiled.default()):
            result = loop.train(config, config_text=text, accept_changes=arguments.accept_changes, programs=programs)
        if hosts.is_first():
            print(json.dumps(graded.of_run(config.model_dir, result, labels=labels(config)), indent=1))
            for below in verdict.verdicts(config.model_dir) if config.evaluate_test else ():
                log.warning("%s", below)
    return 0


def labels(config: Any) -> dict[str, Any]:
    """Returns the closed set of labels of each task that a run grades, or None."""
    from sbs_jax.data import task_names

    return {task: task_names.dataset_of(task).labels for task in config.eval_task_names}


def each_of(arguments: argparse.Namespace, bindings: Sequence[str]) -> list[list[str]]:
    """Returns the bindings of each run; those of --run and --records_dir come first, so that others override them."""
    flags = {"MODEL_DIR": arguments.run_flag, "RECORDS_DIR": arguments.records_dir}
    every = [*gin_files.bindings(flags), *bindings]
    return [every] if arguments.seeds is None else _of_seeds(arguments.seeds, every)


def _of_seeds(seeds: str, bindings: Sequence[str]) -> list[list[str]]:
    """Returns the bindings of each seed's run. UsageError if seeds repeat or runs would share a directory."""
    numbers = seeds.split(",")
    if not all(number.isdecimal() and number.isascii() for number in numbers) or len(set(numbers)) < len(numbers):
        raise UsageError(f"--seeds is {seeds!r}; expected different whole numbers: 0,1,2.")
    names = {binding.partition("=")[0].strip(): binding for binding in bindings}
    if "SEED" in names:
        raise UsageError("Got both --seeds and SEED; keep one.")
    if "{seed}" not in names.get("MODEL_DIR", ""):
        raise UsageError("--seeds needs a directory per run; put {seed} into it: --run runs/svamp-{seed}.")
    own = names["MODEL_DIR"]
    others = [binding for binding in bindings if binding != own]
    return [[*others, own.replace("{seed}", number), f"SEED={number}"] for number in numbers]
