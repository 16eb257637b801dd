"""What training and generation cost on TPUs that are not there, by their compiler's own count, against stock T5X.

    make bench-tpu                                # appends to bench.json
    python scripts/bench_tpu.py --only base large # some of it

T5 1.1 with Adafactor, dropout 0.1, bfloat16 activations, packed rows of 512 + 128 tokens; the step is the one that
`sbs train` compiles. Cycles are the sum of the compiler's `estimated_cycles` over the optimised program, loops times
their trips, without what the compiler has no estimate for: exchanges between chips have none, in T5X's figures neither.
Model FLOP utilisation is the model's operations (sbs_jax/plan/flops.py) over what the chips could do in those cycles.

T5X's figures are stock T5X's at commit cc342d4 on jax 0.10.2 with `unsafe_rbg`, read in the same way. How each model is
computed here is in `WORK`; more, and what was tried: docs/performance.md.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_tpu_decode

from sbs_jax import bench, configuration, main, train
from sbs_jax.plan import chips, flops, worker

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Work:
    """A model on a machine, how it is computed, and what stock T5X takes for it (None: not measured)."""

    model: str
    topology: str
    rows: int  # per update, over all chips
    layers: str
    remat: str
    t5x_cycles: float | None = None
    t5x_memory: float | None = None  # GiB per chip, arguments and temporaries
    t5x_compile: float | None = None  # seconds

    def config(self) -> train.TrainConfig:
        """The training run of this work."""
        files = ("runs/train", f"models/t5_1_1_{self.model}", "methods/step_by_step", "meshes/fsdp")
        bindings = (
            *("DATASET='svamp'", "DTYPE='bfloat16'", "PACK=True", "EXAMPLES=1", "TRAIN_STEPS=1"),
            *("TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 128}", "MODEL_DIR=none", "RECORDS_DIR=none"),
            *(f"BATCH_SIZE={self.rows}", f"LAYERS={self.layers}", f"REMAT={self.remat}"),
        )
        names = [f"gin_configs/{name}.gin" for name in (*files, "optimizers/adafactor")]
        return configuration.configure("train.TrainConfig", gin_files=names, bindings=bindings)[0]


WORK = {
    "base": Work("base", "v5e:2x4", 64, "scanned", "attended", 91.9e6, 2.60 + 0.92, 116),
    "large": Work("large", "v5e:4x4", 128, "scanned", "attended", 289.3e6, 6.43 + 2.92, 161),
    "base_unrolled": Work("base", "v5e:2x4", 64, "unrolled", "minimal", 91.9e6, 2.60 + 0.92, 116),
    "large_unrolled": Work("large", "v5e:4x4", 128, "unrolled", "minimal", 289.3e6, 6.43 + 2.92, 161),
    "xl": Work("xl", "v5e:8x8", 1024, "scanned", "attended"),
    "xxl": Work("xxl", "v5e:16x16", 2048, "scanned", "minimal"),
}
USUAL = ("base", "large", "xl", "xxl", "decode")


def measure(name: str) -> dict[str, Any]:
    """What the compiler says of one work's training step."""
    work = WORK[name]
    config = work.config()
    shape = config.layout.shape
    candidate = worker.Candidate(
        topology=work.topology,
        slices=1,
        mesh=shape,
        batch_size=work.rows,
        micro_batches=1,
        steps=(worker.TRAIN,),
    )
    outcome = worker.measure(config, candidate)
    step = outcome.get("steps", {}).get(worker.TRAIN, outcome)
    if "cycles" not in step:
        raise ValueError(f"{name} on {work.topology} was not compiled: {step}")
    topology = chips.topology(work.topology)
    operations = flops.training_flops(config.model, rows=work.rows, inputs=512, targets=128)
    seconds = step["cycles"] / topology.chip.clock
    return {
        "name": name,
        **dataclasses.asdict(work),
        "cycles": step["cycles"],
        "memory_gib": (step["memory"]["temporaries"] + step["memory"]["arguments"]) / GIB,
        "temporaries_gib": step["memory"]["temporaries"] / GIB,
        "fits": step["fits"],
        "compile_s": step["compile_seconds"],
        "model_flops": operations,
        "rows_per_second_and_host": work.rows / seconds * min(1.0, 8 / topology.chips),  # 8 chips to a host
        "mfu": operations / (seconds * topology.chip.peak_flops * topology.chips),
        "exchanging_s_at_least": step["communication_seconds"],
        "computing_s": seconds,
        "collectives": step["collectives"],
        "without_estimate": step["without_estimate"],
    }


def rows(found: dict[str, Any], versions: dict[str, str]) -> list[bench.Row]:
    """The rows of `bench.json` for one work."""
    work = WORK[found["name"]]

    def row(what: str, unit: str, ours: float, peer: float | None, goal: str) -> bench.Row:
        return bench.Row(name=what, unit=unit, ours=ours, peer=peer, goal=goal, versions=versions)

    if work.t5x_cycles is None:
        return [row(f"tpu_mfu_{work.model}", "of peak", found["mfu"], 1.0, ">= 0.5")]
    return [
        row(f"tpu_cycles_{found['name']}_vs_t5x", "cycles", found["cycles"], work.t5x_cycles, "<= 0.55"),
        row(f"tpu_memory_{found['name']}_vs_t5x", "GiB per chip", found["memory_gib"], work.t5x_memory, "<= 0.5"),
        row(f"tpu_compile_{found['name']}_vs_t5x", "s", found["compile_s"], work.t5x_compile, "<= 0.25"),
    ]


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*WORK, "decode"), default=USUAL, help="what to measure")
    parser.add_argument("--output", default="bench.json", help="file to append the rows to")
    arguments = parser.parse_args()
    main.import_tensorflow()
    import tasks  # noqa: F401  (registers the datasets)

    chips.check_compiler()
    os.environ.update(chips.ENVIRONMENT)
    versions = bench.versions("jax", "jaxlib", "libtpu", "flax", "optax")
    collected: list[bench.Row] = []
    for name in arguments.only:
        if name == "decode":
            for found in bench_tpu_decode.rows():
                print(json.dumps(found), flush=True)
                fields = {key: found[key] for key in ("name", "unit", "ours", "peer", "goal")}
                collected.append(bench.Row(**fields, versions=versions))
            continue
        found = measure(name)
        print(json.dumps(found), flush=True)
        collected += rows(found, versions)
    bench.append(arguments.output, collected)
    print(bench.table(collected))
    return 0


if __name__ == "__main__":
    sys.exit(run())
