"""Measures a training step on a GPU against Hugging Face's T5 under torch.compile, side by side on the same GPU.

    make bench-gpu                                                        # base and large; appends to bench.json
    python scripts/bench_gpu.py --models t5_1_1_base --work runs/bench_gpu

64 examples of SVAMP for each of the two tasks, bfloat16 with float32 parameters, dropout 0.1, AdamW, random weights.
Ours is the step that `sbs train` runs, on packed rows (scripts/bench_ours.py); the peer does the work of the method's
official code, compiled (scripts/bench_peer.py). docs/performance.md.

`--prepare` writes the batches (`--work`) on a machine that has the data, for one with a GPU that has not: once they are
there nothing is read by SeqIO or TensorFlow, though both are imported.
"""

import argparse
import concurrent.futures
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
    parser.add_argument("--attention", nargs="+", default=("eager", "sdpa"), help="of the peer: the fastest counts")
    parser.add_argument("--layers", nargs="+", default=("scanned", "unrolled"), help="of ours: the fastest counts")
    parser.add_argument("--patience", type=float, default=900, help="seconds in which a side has to be ready")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_gpu"), help="where batches are kept")
    parser.add_argument("--binding", action="append", default=[], help="of gin, for ours")
    parser.add_argument("--prepare", action="store_true", help="make the batches and end; needs no GPU")
    parser.add_argument("--output", default="bench.json", help="file to append the results to")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        if arguments.prepare or not work_of(arguments, model).exists():
            subprocess.run([*ours(arguments, model), "--prepare"], check=True, stdout=subprocess.DEVNULL)
        if not arguments.prepare:
            rows = measured(arguments, model)
            bench.append(arguments.output, rows)
            print(bench.table(rows), flush=True)
    return 0


def work_of(arguments: argparse.Namespace, model: str) -> Path:
    """The file that says what the peer has to do."""
    return arguments.work / f"{model}-{arguments.examples}.json"


def common(arguments: argparse.Namespace, model: str) -> list[str]:
    return ["--model", model, "--platform", "cuda", "--work", str(work_of(arguments, model))]


def ours(arguments: argparse.Namespace, model: str, *bindings: str) -> list[str]:
    """What runs our side."""
    command = [sys.executable, str(FOLDER / "bench_ours.py"), *common(arguments, model)]
    command += ["--examples", str(arguments.examples)]
    command += ["--batches", str(arguments.work / f"batches-{arguments.examples}.npz")]
    return command + [flag for binding in (*arguments.binding, *bindings) for flag in ("--binding", binding)]


def measured(arguments: argparse.Namespace, model: str) -> list[bench.Row]:
    """Rows of one model: the fastest of ours against the fastest of the peer's."""
    remat = {"scanned": "attended", "unrolled": "none"}
    commands = {
        f"ours, {layers}": ours(arguments, model, f"LAYERS='{layers}'", f"REMAT='{remat[layers]}'")
        for layers in arguments.layers
    }
    peer = [sys.executable, str(FOLDER / "bench_peer.py"), *common(arguments, model)]
    commands |= {f"peer, {name}": [*peer, "--attention", name] for name in arguments.attention}
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share the GPU's memory
    sides: list[bench.Side] = []
    with bench.started(sides):
        # All set themselves up at once, which is compiling; they work in turns.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            starts = {
                pool.submit(bench.Side, name, command, patience=arguments.patience): name
                for name, command in commands.items()
            }
            for start in concurrent.futures.as_completed(starts):
                if isinstance(error := start.exception(), RuntimeError):
                    print(f"{model}, {starts[start]} is not measured: {error}", flush=True)
                    continue
                sides.append(start.result())
                print(f"{model}, {sides[-1].name}: {sides[-1].ready}", flush=True)
        results = bench.in_turns(sides, rounds=arguments.rounds, steps=arguments.steps)
        peaks = {side.name: side.finish() / GIB for side in sides}
    medians: dict[str, float] = {}
    for name, turns in results.items():
        seconds = statistics.median(turn.seconds / turn.steps for turn in turns)
        medians[name] = statistics.median(turn.tokens_per_second for turn in turns)
        listed = " ".join(f"{turn.tokens_per_second:.0f}" for turn in turns)
        print(f"{model}, {name}: {1000 * seconds:.1f} ms a step, peak {peaks[name]:.2f} GiB; tokens/s: {listed}")
    best = {side: fastest(medians, side) for side in ("ours", "peer")}
    mine, other = best["ours"], best["peer"]
    if mine is None:
        return []
    versions = bench.versions("jax", "flax", "optax", "torch", "transformers")
    versions |= {"gpu": gpu(), **{side: name for side, name in best.items() if name}}
    size = model.rpartition("_")[2]

    def row(name: str, unit: str, found: dict[str, float], goal: str) -> bench.Row:
        peer = found[other] if other else None
        return bench.Row(name=name, unit=unit, ours=found[mine], peer=peer, goal=goal, versions=versions)

    return [
        row(f"train_gpu_{size}_vs_torch_compile", "non-padding tokens/s", medians, ">= 1.5"),
        row(f"train_gpu_{size}_memory_vs_torch_compile", "GiB", peaks, "< 1"),
    ]


def fastest(speeds: dict[str, float], side: str) -> str | None:
    return max((name for name in speeds if name.startswith(side)), key=lambda name: speeds[name], default=None)


def gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
