"""Measures one suite of benchmarks and appends each result to bench.json.

    python scripts/bench.py SUITE [--options]   # `bench.py SUITE --help` lists its options
    make bench                                  # train, tuning, predict and teacher; also bench-serve, bench-gpu, ..

Suites: train (a training step against PyTorch's), families (the same for SmolLM2 and T5Gemma 2), tuning (LoRA and QLoRA
against PEFT), methods (those that build on step-by-step, beside it), predict (greedy answers), teacher (asking a hosted
model), serve (`sbs serve` under load), gpu (a training step on a GPU), tpu (cycles and memory by the TPU compiler),
faults (checkpoints and restarts), input (batches per second), startup (until a run has its data), seeds (many small
students, and the demo). Results: docs/speed.md.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

from benchmarks import harness

SUITES = (
    "train",
    "families",
    "tuning",
    "methods",
    "predict",
    "teacher",
    "serve",
    "gpu",
    "tpu",
    "faults",
    "input",
    "startup",
    "seeds",
)
ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES)
    name = parser.parse_args(argv[:1]).suite
    suite = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(
        prog=f"bench.py {name}", description=suite.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suite.add_options(parser)
    parser.add_argument("--output", default="bench.json", help="file to append the results to")
    arguments = parser.parse_args(argv[1:])
    harness.read(arguments.output)  # an unusable file is an error before the work, not after it
    rows = []
    for row in suite.measure(arguments):  # appended one by one: an interrupted benchmark keeps its rows
        harness.append(arguments.output, [row])
        rows.append(row)
    print(f"load: {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    if rows:
        print(harness.table(rows))
    return 0


if __name__ == "__main__":
    # Processes started from here measure this checkout too, on the CPU (the suite gpu overrides that).
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main(sys.argv[1:]))
