"""`sbs train`: train a student."""

import argparse
import json
import logging
from collections.abc import Sequence
from typing import Any

from sbs_jax import hosts
from sbs_jax.hosts import preemption
from sbs_jax.training import gin_files

log = logging.getLogger(__name__)


def add(command: Any) -> None:
    train = command(
        "train",
        run,
        "Train a student; evaluate on validation during training, and once on test at the end.",
        gin=True,
        multihost=True,
        epilog="example:\n  sbs train --gin_file=gin_configs/experiments/svamp/cpu.gin \\\n"
        "      --gin.RECORDS_DIR=records --gin.MODEL_DIR=runs/svamp\n\n"
        "Repeat the command to resume. SIGTERM or Ctrl-C saves and ends the run; a second one ends it at once.\n"
        f"Exit status: 0 finished, {preemption.EXIT_STATUS} preempted and saved (repeat the command), 1 error.",
    )
    train.add_argument(
        "--accept_changes",
        action="store_true",
        help="resume even if data, vocabulary, defaults or configuration differ from those the run began with",
    )


def run(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    from sbs_jax.stats import verdict
    from sbs_jax.training import loop

    config, text = gin_files.configured("train.TrainConfig", arguments, bindings)
    result = loop.train(config, config_text=text, accept_changes=arguments.accept_changes)
    if hosts.is_first():
        print(json.dumps(result, indent=1))
        if config.evaluate_test and (below := verdict.verdict(config.model_dir)) is not None:
            log.warning("%s", below)
    return 0
