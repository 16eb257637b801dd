"""Measures a training step of everything, LoRA and QLoRA, and of Hugging Face PEFT's LoRA, side by side.

    make bench                                           # appends to bench.json
    python scripts/bench_tuning.py --rounds 3 --steps 2  # shorter

T5 v1.1 small with random weights, float32, the batches of scripts/bench.py: all sides train on the same examples. LoRA
as gin_configs/adapters/lora.gin has it (rank 8 beside queries and values), the peer's beside the same kernels with the
same rank, alpha and dropout; QLoRA as qlora.gin (beside every kernel, the base in 4 bits). docs/speed.md.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from pathlib import Path

from sbs_jax import bench

FOLDER = Path(__file__).resolve().parent
PEER_NEEDS = ("torch", "transformers", "peft", "accelerate")
OURS = {"full": [], "lora": ["--tuning", "lora"], "qlora": ["--tuning", "qlora"]}
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="training steps in a turn")
    parser.add_argument("--threads", type=int, default=2, help="CPUs that each side may use")
    parser.add_argument("--model", default="t5_1_1_small", help="file of gin_configs/models")
    parser.add_argument("--output", default="bench.json", help="file to append the results to")
    parser.add_argument("--ours", nargs="+", choices=list(OURS), default=list(OURS), help="our sides to measure")
    arguments = parser.parse_args()
    missing = [name for name in PEER_NEEDS if importlib.util.find_spec(name) is None]
    sides: list[bench.Side] = []
    with tempfile.TemporaryDirectory() as folder, bench.started(sides):

        def start(name: str, script: str, *flags: str) -> None:
            common = ["--model", arguments.model, "--threads", str(arguments.threads)]
            sides.append(bench.Side(name, [sys.executable, str(FOLDER / script), *common, *flags]))
            print(f"{name}: {sides[-1].ready}", flush=True)

        for name in arguments.ours:
            start(name, "bench_ours.py", *OURS[name], "--work", f"{folder}/{name}.json")
        if "lora" not in arguments.ours:
            print("The peer is not measured: it does the work of our LoRA, which is not among --ours.")
        elif missing:
            print(f"The peer is not measured: {' and '.join(missing)} not installed; `make test-parity` installs them.")
        else:
            start("peft", "bench_peer.py", "--peft", "--work", f"{folder}/lora.json")
        results = bench.in_turns(sides, rounds=arguments.rounds, steps=arguments.steps)
        peaks = {side.name: side.finish() / GIB for side in sides}
    seconds = {name: [turn.seconds / turn.steps for turn in turns] for name, turns in results.items()}
    for name, values in seconds.items():
        listed = " ".join(f"{value:.2f}" for value in values)
        print(f"{name}: median {statistics.median(values):.2f}, least {min(values):.2f} s per step; turns: {listed}")
        print(f"{name}: peak memory {peaks[name]:.2f} GiB")
    print(f"load: {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    versions = bench.versions("jax", "flax", "optax", *PEER_NEEDS)

    def row(name: str, unit: str, ours: float, peer: float | None, goal: str) -> bench.Row:
        return bench.Row(name=name, unit=unit, ours=ours, peer=peer, goal=goal, versions=versions)

    rows = []
    for name, ours, peer, goal in (
        ("lora_{}_vs_full", "lora", "full", "< 1"),
        ("qlora_{}_vs_full", "qlora", "full", "< 2"),
        ("lora_{}_vs_peft", "lora", "peft", "< 1"),
    ):
        if ours in medians and (peer in medians or peer == "peft"):
            rows.append(row(name.format("memory"), "GiB", peaks[ours], peaks.get(peer), "< 1"))
            rows.append(row(name.format("step"), "s", medians[ours], medians.get(peer), goal))
    bench.append(arguments.output, rows)
    print(bench.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
