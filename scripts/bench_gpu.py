"""Measures a training step on a GPU against Hugging Face's T5 under torch.compile, side by side on the same GPU.

    make bench-gpu                                                        # base and large; appends to bench.json
    python scripts/bench_gpu.py --models t5_1_1_base --work runs/bench_gpu

64 examples of SVAMP for each of the two tasks, bfloat16 with float32 parameters, dropout 0.1, AdamW, random weights.
Ours is the step that `sbs train` runs, on packed rows (scripts/bench_ours.py); the peer does the work of the method's
official code, compiled (scripts/bench_peer.py). docs/speed.md.

A GPU machine without TensorFlow measures as well, from what `--prepare` wrote on another one: `--work` has the batches.
"""

import argparse
import concurrent.futures
import functools
import os
import statistics
import subprocess
import sys
from pathlib import Path

from sbs_jax import bench

FOLDER = Path(__file__).resolve().parent
GIB = 2**30
MODELS = ("t5_1_1_base", "t5_1_1_large")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="files of gin_configs/models")
    parser.add_argument("--examples", type=int, default=64, help="of each task in a step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=20, help="training steps in a turn")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_gpu"), help="where batches are kept")
    parser.add_argument("--binding", action="append", default=[], help="of gin, for ours: LAYERS='scanned'")
    parser.add_argument("--prepare", action="store_true", help="make the batches and end; needs no GPU")
    parser.add_argument("--output", default="bench.json", help="file to append the results to")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        ours, peers = commands(arguments, model)
        if arguments.prepare or not (arguments.work / f"{model}.json").exists():
            # Its platform only says what the model will be; nothing is computed.
            subprocess.run([*ours, "--prepare"], check=True, stdout=subprocess.DEVNULL)
        if not arguments.prepare:
            rows = measured(model, ours, peers, rounds=arguments.rounds, steps=arguments.steps)
            bench.append(arguments.output, rows)
            print(bench.table(rows), flush=True)
    return 0


def commands(arguments: argparse.Namespace, model: str) -> tuple[list[str], dict[str, list[str]]]:
    """What runs our side and each of the peer's."""
    common = ["--model", model, "--platform", "cuda", "--work", str(arguments.work / f"{model}.json")]
    ours = [sys.executable, str(FOLDER / "bench_ours.py"), *common, "--examples", str(arguments.examples)]
    ours += ["--batches", str(arguments.work / f"batches-{arguments.examples}.npz")]
    ours += [flag for binding in arguments.binding for flag in ("--binding", binding)]
    peer = [sys.executable, str(FOLDER / "bench_peer.py"), *common]
    return ours, {f"peer, {name}": [*peer, "--attention", name] for name in ("eager", "sdpa")}


def measured(model: str, ours: list[str], peers: dict[str, list[str]], *, rounds: int, steps: int) -> list[bench.Row]:
    """Rows of one model: ours against the faster of the peer's ways."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share the GPU's memory
    sides: list[bench.Side] = []
    with bench.started(sides):
        # All set themselves up at once, which is compiling; they work in turns.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            starts = [pool.submit(functools.partial(bench.Side, n, c)) for n, c in {"ours": ours, **peers}.items()]
            for start in concurrent.futures.as_completed(starts):
                sides.append(start.result())
                print(f"{model}, {sides[-1].name}: {sides[-1].ready}", flush=True)
        results = bench.in_turns(sides, rounds=rounds, steps=steps)
        peaks = {side.name: side.finish() / GIB for side in sides}
    speeds = {name: [turn.tokens_per_second for turn in turns] for name, turns in results.items()}
    for name, turns in results.items():
        seconds = statistics.median(turn.seconds / turn.steps for turn in turns)
        listed = " ".join(f"{speed:.0f}" for speed in speeds[name])
        print(
            f"{model}, {name}: {1000 * seconds:.1f} ms a step (median), peak {peaks[name]:.2f} GiB; tokens/s: {listed}"
        )
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = max(peers, key=lambda name: medians[name])
    versions = {**bench.versions("jax", "flax", "optax", "torch", "transformers"), "gpu": gpu(), "peer": best}
    size = model.rpartition("_")[2]
    return [
        bench.Row(
            name=f"train_gpu_{size}_vs_torch_compile",
            unit="non-padding tokens/s",
            ours=medians["ours"],
            peer=medians[best],
            goal=">= 1.5",
            versions=versions,
        ),
        bench.Row(
            name=f"train_gpu_{size}_memory_vs_torch_compile",
            unit="GiB",
            ours=peaks["ours"],
            peer=peaks[best],
            goal="< 1",
            versions=versions,
        ),
    ]


def gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
