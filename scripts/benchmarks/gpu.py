"""Measures a training step on a GPU against Hugging Face's T5 under torch.compile, in turns on the same GPU.

    make bench-gpu                                                           # base and large
    python scripts/bench.py gpu --models t5_1_1_base --work runs/bench_gpu

64 examples of SVAMP for each of the two tasks, bfloat16 with float32 parameters, dropout 0.1, AdamW, random weights:
the sides of the suite train, the peer's compiled. Results: docs/performance.md.

`--prepare` writes the batches (`--work`) on a machine that has the data, for a GPU machine that does not. SeqIO and
TensorFlow then read nothing there, although both are imported.
"""

import argparse
import concurrent.futures
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness, train

MODELS = ("t5_1_1_base", "t5_1_1_large")
REMAT = {"scanned": "attended", "unrolled": "none"}


def add_options(parser: argparse.ArgumentParser) -> None:
    harness.add_turns(parser, rounds=5, steps=20, threads=False)
    parser.add_argument("--models", nargs="+", default=MODELS, help="files of gin_configs/models")
    parser.add_argument("--examples", type=int, default=64, help="examples of each task in a step")
    parser.add_argument("--attention", nargs="+", default=("eager", "sdpa"), help="peer's attention; fastest counts")
    parser.add_argument(
        "--layers", nargs="+", default=tuple(REMAT), choices=REMAT, help="our layers; the fastest counts"
    )
    parser.add_argument("--patience", type=float, default=900, help="seconds to wait for a side's set-up")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_gpu"), help="folder of the batches")
    parser.add_argument("--binding", action="append", default=[], help="gin binding for ours; repeat")
    parser.add_argument("--prepare", action="store_true", help="make the batches and end; needs no GPU")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share the GPU's memory
    arguments.work.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        work = arguments.work / f"{model}-{arguments.examples}.json"
        peer = {"platform": "cuda", "work": str(work)}
        ours = peer | {
            "model": model,
            "examples": arguments.examples,
            "batches": str(arguments.work / f"batches-{arguments.examples}.npz"),
            "extra": arguments.binding,
        }
        if arguments.prepare or not work.exists():
            harness.once(train.ours, **ours, only_write=True)
        if not arguments.prepare:
            wanted: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {}
            for layers in arguments.layers:
                extra = [*arguments.binding, f"LAYERS='{layers}'", f"REMAT='{REMAT[layers]}'"]
                wanted[f"ours, {layers}"] = (train.ours, ours | {"extra": extra})
            for attention in arguments.attention:
                wanted[f"peer, {attention}"] = (train.peer, peer | {"attention": attention})
            yield from compared(model, wanted, arguments)


def compared(
    model: str, wanted: dict[str, tuple[Callable[..., Any], dict[str, Any]]], arguments: argparse.Namespace
) -> Iterator[harness.Row]:
    """Yields the rows of one model: the fastest of ours against the fastest of the peer's."""
    with harness.Sides() as sides:
        # All sides set themselves up (mostly compiling) at once, then work in turns.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            starts = {
                pool.submit(harness.Side, name, side, timeout=arguments.patience, options=options): name
                for name, (side, options) in wanted.items()
            }
            for start in concurrent.futures.as_completed(starts):
                if isinstance(error := start.exception(), RuntimeError):
                    print(f"{model}, {starts[start]} is not measured: {error}", flush=True)
                    continue
                sides.append(start.result())
                print(f"{model}, {sides[-1].name}: {sides[-1].ready}", flush=True)
        print(f"{model}:")
        found = sides.compare(rounds=arguments.rounds, steps=arguments.steps)
    best = {side: fastest(found, side) for side in ("ours", "peer")}
    if best["ours"] is None:
        return
    ours, peer = found[best["ours"]], found[best["peer"]] if best["peer"] else None
    versions = harness.versions("jax", "flax", "optax", "torch", "transformers")
    versions |= {"gpu": gpu(), **{side: name for side, name in best.items() if name}}
    name, unit = f"train_gpu_{model.rpartition('_')[2]}", "non-padding tokens/s"
    speed, memory = (peer.per_second, peer.peak_gib) if peer else (None, None)
    yield harness.Row(f"{name}_vs_torch_compile", unit, ours.per_second, speed, ">= 1.5", versions)
    yield harness.Row(f"{name}_memory_vs_torch_compile", "GiB", ours.peak_gib, memory, "< 1", versions)


def fastest(found: dict[str, harness.Result], side: str) -> str | None:
    return max((name for name in found if name.startswith(side)), key=lambda name: found[name].per_second, default=None)


def gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
