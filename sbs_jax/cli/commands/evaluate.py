"""`sbs evaluate`: grade a checkpoint on a split."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from sbs_jax import hosts
from sbs_jax.training import gin_files


def add(command: Any) -> None:
    command(
        "evaluate",
        run,
        check=check,
        gin=True,
        multihost=True,
        epilog="example:\n  sbs evaluate --gin_file=gin_configs/runs/evaluate.gin --gin.CHECKPOINT_PATH=runs/svamp \\\n"
        "      --gin.SPLIT=test",
    )


def check(arguments: argparse.Namespace, bindings: Sequence[str]) -> None:
    from sbs_jax.cli import early

    found = early.configuration("evaluate.EvaluateConfig", arguments, bindings)
    if isinstance(path := found.value("CHECKPOINT_PATH"), str):
        early.run(path)


def run(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    from sbs_jax.training import evaluate

    config, _ = gin_files.configured("evaluate.EvaluateConfig", arguments, bindings)
    metrics = evaluate.evaluate(config)
    if hosts.is_first():
        print(json.dumps(metrics))
    return 0
