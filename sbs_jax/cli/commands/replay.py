"""`sbs replay`: repeat one training step of a run."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from typing import Any

from sbs_jax.cli import runs
from sbs_jax.storage import places, user_files
from sbs_jax.training import gin_files


def add(command: Any) -> None:
    replay = command(
        "replay",
        run,
        check=check,
        gin=True,
        epilog="example:\n  sbs replay runs/svamp --step 120 --gin.TENSOR=1",
    )
    runs.add(replay, what="run directory of sbs train")
    replay.add_argument("--step", type=int, metavar="N", help="step number (default: the newest non-finite step)")
    replay.add_argument("--json", action="store_true", help="print the result as JSON")


def check(arguments: argparse.Namespace, bindings: Sequence[str]) -> None:
    from sbs_jax.run import directory

    directory.read_manifest(arguments.run_dir)  # fails if this is not a run directory


def run(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    from sbs_jax.training import failures, replay

    saved = user_files.whole(places.of(arguments.run_dir) / "config.gin").decode()
    with tempfile.TemporaryDirectory() as folder:
        file = places.of(folder) / "config.gin"
        file.write_text(gin_files.with_new_imports(saved), "utf-8")
        arguments.gin_file = [str(file), *arguments.gin_file]
        config, _ = gin_files.configured("train.TrainConfig", arguments, bindings)
    found = replay.replay(config, arguments.run_dir, step=arguments.step)
    kept = failures.read(arguments.run_dir, found["step"])
    print(json.dumps(found, indent=1) if arguments.json else replay.text(found, kept))
    return 0
