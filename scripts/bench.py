"""Measures a training step of T5 v1.1 small against Hugging Face's PyTorch T5, side by side.

    make bench                                    # appends to bench.json
    python scripts/bench.py --rounds 3 --steps 2  # shorter

Both sides train on the same batches: 16 examples of SVAMP for each of the two tasks, the same examples in the same
order. Weights are random, dropout is 0.1, activations are float32. Ours is the step that `sbs train` runs, on packed
rows (scripts/bench_ours.py); the peer does the work of the method's official code (scripts/bench_peer.py).
What was measured, and how: docs/speed.md.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from pathlib import Path

from sbs_jax import bench

FOLDER = Path(__file__).resolve().parent
PEER_NEEDS = ("torch", "transformers")
GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=4, help="training steps in a turn")
    parser.add_argument("--threads", type=int, default=2, help="CPUs that each side may use")
    parser.add_argument("--model", default="t5_1_1_small", help="file of gin_configs/models")
    parser.add_argument("--output", default="bench.json", help="file to append the results to")
    arguments = parser.parse_args()
    missing = [name for name in PEER_NEEDS if importlib.util.find_spec(name) is None]
    sides: list[bench.Side] = []
    with tempfile.TemporaryDirectory() as folder, bench.started(sides):

        def start(name: str) -> None:
            flags = ["--model", arguments.model, "--threads", str(arguments.threads), "--work", f"{folder}/work.json"]
            sides.append(bench.Side(name, [sys.executable, str(FOLDER / f"bench_{name}.py"), *flags]))
            print(f"{name}: {sides[-1].ready}", flush=True)

        start("ours")  # which writes down the work, for the peer to do the same
        if missing:
            print(f"The peer is not measured: {' and '.join(missing)} not installed; `make test-parity` installs both.")
        else:
            start("peer")
        results = bench.in_turns(sides, rounds=arguments.rounds, steps=arguments.steps)
        peaks = {side.name: side.finish() / GIB for side in sides}
    speeds = {name: [turn.tokens_per_second for turn in turns] for name, turns in results.items()}
    for name, turns in results.items():
        seconds = statistics.median(turn.seconds / turn.steps for turn in turns)
        listed = " ".join(f"{speed:.0f}" for speed in speeds[name])
        print(f"{name}: {seconds:.2f} s per step (median); tokens/s of each turn: {listed}")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    versions = bench.versions("jax", "flax", "optax", *PEER_NEEDS)
    rows = [
        bench.Row(
            name="train_tokens_per_s_vs_pytorch",
            unit="non-padding tokens/s",
            ours=medians["ours"],
            peer=medians.get("peer"),
            goal=">= 1.5",
            versions=versions,
        ),
        bench.Row(
            name="train_peak_memory_vs_pytorch",
            unit="GiB",
            ours=peaks["ours"],
            peer=peaks.get("peer"),
            goal="< 1",
            versions=versions,
        ),
    ]
    bench.append(arguments.output, rows)
    print(bench.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
