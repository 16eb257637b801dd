"""`sbs soft_targets`: store a student's distributions over its training targets, to teach a smaller one."""

import argparse
from typing import Any

from sbs_jax import checks, hosts
from sbs_jax.cli import runs


def add(command: Any) -> None:
    soft_targets = command(
        "soft_targets",
        run,
        check=check,
        multihost=True,
        epilog="example:\n  sbs soft_targets runs/svamp-xxl --output soft/svamp-xxl\n\n"
        "The teacher is a run of this project with the student's vocabulary. For each target token of the training\n"
        "rows, the K likeliest tokens and the log probability of all others are written. Repeat an interrupted\n"
        "command to resume it. The student trains with gin_configs/methods/soft_targets.gin\n"
        "(docs/howto/soft_targets.md).",
    )
    runs.add(soft_targets, what="run directory of the teacher, or one of its checkpoints/<step>")
    soft_targets.add_argument("--output", required=True, metavar="DIR", help="folder of the store")
    soft_targets.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME",
        help="task to score, such as svamp_label; repeatable (default: those that the run was trained on)",
    )
    soft_targets.add_argument("--top_k", type=int, default=64, metavar="K", help="tokens to keep of each distribution")
    soft_targets.add_argument("--records_dir", metavar="DIR", help="records (default: those the run was trained on)")
    soft_targets.add_argument("--batch_size", type=int, default=32, metavar="N", help="rows at a time")
    soft_targets.add_argument(
        "--shard_rows", type=int, default=2048, metavar="N", help="rows per file; an interruption loses at most these"
    )
    soft_targets.add_argument(
        "--fsdp", action="store_true", help="shard the teacher over the devices (default: a copy on each)"
    )
    soft_targets.add_argument(
        "--base", metavar="PATH", help="new path of the base of a run's adapters, if it has moved"
    )


def check(arguments: argparse.Namespace) -> None:
    from sbs_jax.cli import early
    from sbs_jax.data import soft_targets
    from sbs_jax.storage import places

    for name in ("top_k", "batch_size", "shard_rows"):
        checks.whole_number(f"--{name}", getattr(arguments, name), least=1)
    early.run(arguments.run_dir, whole=True)
    soft_targets.check_output(places.of(arguments.output))


def run(arguments: argparse.Namespace) -> int:
    from sbs_jax.prediction import compiled, soft_targets
    from sbs_jax.student import partitioning
    from sbs_jax.training import students

    with compiled.kept(compiled.default()):
        student = students.load_student(
            arguments.run_dir,
            layout=partitioning.FSDP if arguments.fsdp else partitioning.DATA_PARALLEL,
            records_dir=arguments.records_dir,
            base=arguments.base,
        )
        done = soft_targets.write(
            student,
            output=arguments.output,
            tasks=arguments.task,
            top_k=arguments.top_k,
            batch_size=arguments.batch_size,
            shard_rows=arguments.shard_rows,
        )
    if hosts.is_first():
        resumed = f" ({done.resumed:,} of these rows were resumed)" if done.resumed else ""
        print(
            f"{done.tokens:,} target tokens of {done.rows:,} rows in {arguments.output}, "
            f"{done.bytes / done.tokens:.0f} bytes per token{resumed}"
        )
    return 0
