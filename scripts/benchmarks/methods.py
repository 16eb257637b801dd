"""Measures a training step of the methods that build on step-by-step, beside plain step-by-step.

    python scripts/bench.py methods
    python scripts/bench.py methods --rounds 3 --only mutual_information

T5 v1.1 small with random weights, float32, the packed batches of the suite train. Results: docs/speed.md.
"""

import argparse
import tempfile
from collections.abc import Iterator

from benchmarks import harness, train

PLAIN = "step_by_step"
METHODS = {
    "mutual_information": ("PAIRS=True", "MUTUAL_INFORMATION='as_written'"),
    "mutual_information_as_released": ("PAIRS=True", "MUTUAL_INFORMATION='as_released'"),
    "label_smoothing": ("LABEL_SMOOTHING=0.1",),
    "changing_alpha": (
        "ALPHA=@optax.linear_schedule()",
        "optax.linear_schedule.init_value=0.1",
        "optax.linear_schedule.end_value=0.9",
        "optax.linear_schedule.transition_steps=1000",
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    train.add_options(parser, steps=2)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods to measure")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    with tempfile.TemporaryDirectory() as folder, harness.Sides() as sides:
        for name in (PLAIN, *arguments.only):
            extra = METHODS.get(name, ())
            work = f"{folder}/{name}.json"
            sides.start(name, train.ours, model=arguments.model, threads=arguments.threads, extra=extra, work=work)
        found = sides.compare(rounds=arguments.rounds, steps=arguments.steps)
    versions, plain = harness.versions("jax", "flax", "optax"), found[PLAIN]
    for name in arguments.only:
        seconds, memory = found[name].step_seconds, found[name].peak_gib
        yield harness.Row(f"{name}_step_vs_{PLAIN}", "s", seconds, plain.step_seconds, "< 1.1", versions)
        yield harness.Row(f"{name}_memory_vs_{PLAIN}", "GiB", memory, plain.peak_gib, "< 1.1", versions)
