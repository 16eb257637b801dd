"""`sbs plan`: compile a configuration for absent TPUs."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from sbs_jax.training import gin_files


def add(command: Any) -> None:
    plan = command(
        "plan",
        run,
        check=check,
        gin=True,
        epilog="examples:\n  sbs plan --gin_file=gin_configs/experiments/esnli/base.gin --topology v5e:2x4\n"
        "  sbs plan --gin_file=gin_configs/experiments/esnli/xxl.gin --topology v5e:16x16,v5p:4x4x4 --search\n\n"
        "Needs no data, weights or TPU, only the compiler: pip install 'sbs-jax[plan]'. All figures are estimates.\n"
        "Exit status: 0 if something fits, 3 if nothing does, 1 after an error.",
    )
    plan.add_argument("--topology", required=True, metavar="LIST", help="such as v5e:4x4 or v5p:2x2x2; several: A,B")
    plan.add_argument(
        "--slices", type=int, default=1, metavar="N", help="number of slices, joined by the data-center network"
    )
    plan.add_argument("--records_dir", metavar="DIR", help="records whose examples to count (default: none)")
    plan.add_argument("--steps", default="train,evaluation,generation", metavar="LIST", help="steps to compile")
    plan.add_argument("--batch_size", type=int, metavar="N", help="rows per update, over all chips")
    plan.add_argument("--search", action="store_true", help="try meshes (fsdp, data, tensor) and micro-batches")
    plan.add_argument("--max_compiles", type=int, default=16, metavar="N", help="limit for --search")
    plan.add_argument("--time_limit", type=float, default=1800.0, metavar="SECONDS", help="time per candidate")
    plan.add_argument("--price", default="on_demand", help="on_demand, three_years, or USD per chip and hour")
    plan.add_argument("--examples", type=int, metavar="N", help="examples of each task per epoch, without records")
    plan.add_argument("--examples_per_row", type=float, metavar="N", help="examples per packed row")
    plan.add_argument(
        "--run", dest="measured", metavar="DIR", help="run of this configuration, to show its measured steps beside"
    )
    plan.add_argument("--json", action="store_true", help="print everything as JSON")
    plan.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # the compiling process


_UNREAD = ("MODEL_DIR", "RECORDS_DIR", "CORPUS", "INITIAL_CHECKPOINT_PATH")


def settled(arguments: argparse.Namespace, bindings: Sequence[str]) -> list[str]:
    """Adds the binding that --records_dir stands for; those on the command line come after it."""
    return [*gin_files.bindings({"RECORDS_DIR": arguments.records_dir}), *bindings]


def check(arguments: argparse.Namespace, bindings: Sequence[str]) -> None:
    from sbs_jax import chips
    from sbs_jax.cli import early

    early.configuration("train.TrainConfig", arguments, settled(arguments, bindings), unread=_UNREAD)
    if not arguments.serve:
        chips.check_compiler()
        for name in arguments.topology.split(","):
            chips.topology(name, slices=arguments.slices)


def run(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from sbs_jax import chips
    from sbs_jax.plan import compiler

    bindings = settled(arguments, bindings)

    if arguments.serve:
        from sbs_jax.plan import worker

        config, _ = gin_files.configured("train.TrainConfig", arguments, bindings, unread=_UNREAD)
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries' output must not mix with the answers
        worker.serve(config, requests=sys.stdin, answers=answers)
        return 0
    topologies = tuple(chips.topology(name, slices=arguments.slices) for name in arguments.topology.split(","))
    child = [sys.executable, "-m", "sbs_jax", "plan", "--serve", "--topology=-"]
    child += [f"--gin_file={file}" for file in arguments.gin_file]
    child += [f"--module={file}" for file in arguments.module]
    child += [f"--gin_search_paths={arguments.gin_search_paths}", *(f"--gin.{binding}" for binding in bindings)]
    with compiler.Compiler(child, time_limit=arguments.time_limit) as machine:
        machine.start()
        config, text = gin_files.configured("train.TrainConfig", arguments, bindings, unread=_UNREAD)
        from sbs_jax.plan import command, table

        per_row = re.search(r"^EXAMPLES_PER_ROW = ([\d.]+)$", text, re.MULTILINE)
        options = command.Options(
            topologies=topologies,
            steps=("train",) if arguments.search else tuple(arguments.steps.split(",")),
            search=arguments.search,
            max_compiles=arguments.max_compiles,
            batch_size=arguments.batch_size,
            price=arguments.price,
            examples=arguments.examples,
            run=arguments.measured,
            examples_per_row=arguments.examples_per_row or (float(per_row[1]) if per_row else None),
        )
        found = command.plan(config, options, machine=machine, report=logging.getLogger("sbs_jax").info)
    print(json.dumps(found, indent=1) if arguments.json else table.text(found))
    return 0 if found["suggestion"]["smallest"] is not None else 3
