"""Measures a training step of everything, LoRA and QLoRA, and of Hugging Face PEFT's LoRA.

    python scripts/bench.py tuning                        # part of `make bench`
    python scripts/bench.py tuning --rounds 3 --ours lora # shorter

T5 v1.1 small with random weights, float32, the batches of the suite train: all sides train on the same examples. LoRA
as in gin_configs/adapters/lora.gin (rank 8 beside queries and values), the peer's beside the same kernels with the same
rank, alpha and dropout; QLoRA as in qlora.gin (beside every kernel, the base in 4 bits). Results: docs/speed.md.
"""

import argparse
import tempfile
from collections.abc import Iterator

from benchmarks import harness, train

PEER_NEEDS = ("torch", "transformers", "peft", "accelerate")
OURS = {"full": None, "lora": "lora", "qlora": "qlora"}  # files of gin_configs/adapters


def add_options(parser: argparse.ArgumentParser) -> None:
    train.add_options(parser, steps=2)
    parser.add_argument("--ours", nargs="+", choices=list(OURS), default=list(OURS), help="our sides to measure")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    with tempfile.TemporaryDirectory() as folder, harness.Sides() as sides:
        options = {"threads": arguments.threads}
        for name in arguments.ours:
            work = f"{folder}/{name}.json"
            sides.start(name, train.ours, **options, model=arguments.model, tuning=OURS[name], work=work)
        if "lora" not in arguments.ours:
            print("peft is not measured: it does the work of our LoRA, which is not among --ours.")
        elif harness.installed("peft", *PEER_NEEDS):
            sides.start("peft", train.peer, **options, peft=True, work=f"{folder}/lora.json")
        found = sides.compare(rounds=arguments.rounds, steps=arguments.steps)
    versions = harness.versions("jax", "flax", "optax", *PEER_NEEDS)
    for name, ours, peer, goal in (
        ("lora_{}_vs_full", "lora", "full", "< 1"),
        ("qlora_{}_vs_full", "qlora", "full", "< 2"),
        ("lora_{}_vs_peft", "lora", "peft", "< 1"),
    ):
        if ours in found and (peer in found or peer == "peft"):
            mine, other = found[ours], found.get(peer)
            memory, seconds = (other.peak_gib, other.step_seconds) if other else (None, None)
            yield harness.Row(name.format("memory"), "GiB", mine.peak_gib, memory, "< 1", versions)
            yield harness.Row(name.format("step"), "s", mine.step_seconds, seconds, goal, versions)
