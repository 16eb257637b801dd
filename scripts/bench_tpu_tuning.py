"""What training everything, LoRA and QLoRA take on TPUs that are not there: memory per chip and estimated seconds.

    python scripts/bench_tpu_tuning.py                          # all of it: an hour on 2 CPU cores
    python scripts/bench_tpu_tuning.py --only xxl-qlora-v5e:1x1 # what `make bench-tpu` measures

T5 v1.1 with AdamW, bfloat16, scanned layers, `REMAT = "full"`, rows of 512 + 64 tokens that are not packed, fsdp over
all chips: 64 rows an update, on one chip 8 in 2 micro-batches. LoRA and QLoRA as gin_configs/adapters/ has them. Memory
is all that the step needs on a chip; seconds are the compiler's cycles, and exchanges that nothing hides (`sbs plan`).
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sbs_jax import bench, configuration, main, train
from sbs_jax.plan import chips, worker

MODELS, WAYS, TOPOLOGIES = ("base", "large", "xl", "xxl"), ("full", "lora", "qlora"), ("v5e:2x4", "v5e:4x4")
ONE = "xxl-qlora-v5e:1x1"
WORK = (ONE, *(f"{model}-{way}-{topology}" for topology in TOPOLOGIES for way in WAYS for model in MODELS))


def config_of(name: str) -> train.TrainConfig:
    """The training run of a work's name."""
    model, way, topology = name.split("-")
    rows, micro_batches = (8, 2) if topology == "v5e:1x1" else (64, 1)
    files = ["runs/train", f"models/t5_1_1_{model}", "methods/step_by_step", "meshes/fsdp"]
    files += [] if way == "full" else [f"adapters/{way}"]
    bindings = (
        *("DATASET='svamp'", "DTYPE='bfloat16'", "EXAMPLES=1", "TRAIN_STEPS=1000", "LEARNING_RATE=1e-4"),
        *("TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 64}", "MODEL_DIR=none", "RECORDS_DIR=none"),
        *(f"BATCH_SIZE={rows}", f"MICRO_BATCHES={micro_batches}", "LAYERS=scanned", "REMAT=full"),
    )
    names = [f"gin_configs/{file}.gin" for file in files]
    return configuration.configure("train.TrainConfig", gin_files=names, bindings=bindings)[0]


def measure(name: str, *, steps: tuple[str, ...]) -> list[dict[str, Any]]:
    """What the compiler says of each step of one work."""
    config, topology = config_of(name), chips.topology(name.split("-")[2])
    candidate = worker.Candidate(
        topology=topology.name,
        slices=1,
        mesh=config.layout.shape,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        steps=steps,
    )
    found = []
    for step, said in worker.measure(config, candidate)["steps"].items():
        one = {"name": name, "step": step, "fits": said["fits"], "refused": said.get("refused")}
        if "needs" in said:
            one |= {"gib": said["needs"] / chips.GIB, "available_gib": said["available"] / chips.GIB}
        if "cycles" in said:
            seconds = said["cycles"] / topology.chip.clock
            one |= {"computing_s": seconds, "exchanging_s": said["communication_seconds"], "token": said["token"]}
            one["seconds"] = max(seconds + said["exposed_seconds"], said["communication_seconds"])
            held = ("parameters", "optimizer", "temporaries")
            one |= {part: said["memory"].get(part, 0) / chips.GIB for part in held}
        one["compile_s"] = said.get("compile_seconds")
        found.append(one)
    return found


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=WORK, default=WORK, help="what to measure", metavar="WORK")
    parser.add_argument("--steps", nargs="+", choices=worker.STEPS, default=[worker.TRAIN], help="of a run")
    parser.add_argument("--output", default="bench.json", help="file to append the row to")
    arguments = parser.parse_args()
    main.import_tensorflow()
    import tasks  # noqa: F401  (registers the datasets)

    chips.check_compiler()
    os.environ.update(chips.ENVIRONMENT)
    for name in arguments.only:
        for found in measure(name, steps=tuple(arguments.steps)):
            print(json.dumps(found), flush=True)
            if (name, found["step"]) == (ONE, worker.TRAIN):
                row = bench.Row(
                    name="qlora_xxl_one_v5e_chip_gib",
                    unit="GiB",
                    ours=found["gib"],
                    peer=found["available_gib"],
                    goal="<= 1",
                    versions=bench.versions("jax", "jaxlib", "libtpu", "flax", "optax"),
                )
                bench.append(arguments.output, [row])
                print(bench.table([row]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run())
