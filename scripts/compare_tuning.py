"""Trains one student step by step with every tuning of gin_configs/adapters/, and prints its accuracy and size.

    python scripts/compare_tuning.py --output runs/tuning                       # the built-in dataset, its student
    python scripts/compare_tuning.py --output runs/tuning --dataset svamp --release DIR --vocabulary MODEL

Each tuning gets the learning rate that is best on validation with seed 0; then the other seeds are trained. All have
the same number of updates, batches and start. On the built-in dataset they start from the demo's pre-trained
student. For SVAMP no pre-trained student is small enough, so one is trained from scratch first, in full. Called again
with the same output, it resumes. Results: docs/results.md.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sbs_jax.cli import demo, main
from sbs_jax.training import gin_files

SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A tuning to try. `best` is the learning rate that was best on the built-in dataset (docs/results.md)."""

    title: str
    rates: tuple[float, ...]
    best: float
    file: str | None = None  # of gin_configs/adapters/; None: everything is trained
    bindings: tuple[str, ...] = ()  # changes to it


FULL_RATES, LORA_RATES = (1e-3, 2e-3, 4e-3, 8e-3), (2e-3, 5e-3, 1e-2, 2e-2)
NO_DROPOUT, ALL_KERNELS = "LORA_DROPOUT=0.0", "LORA_MODULES=['.*']"
# Sizes are for students of width 64 and 128 with 2 + 2 layers; the files' sizes are for students ten times as wide.
TUNINGS = {
    "full": Tuning("everything", FULL_RATES, 2e-3),
    "neftune": Tuning("everything, NEFTune", FULL_RATES, 4e-3, "neftune"),
    "lora": Tuning("LoRA, rank 8, query and value", LORA_RATES, 5e-3, "lora", (NO_DROPOUT,)),
    "lora_all": Tuning("LoRA, rank 8, all kernels", LORA_RATES, 2e-3, "lora", (NO_DROPOUT, ALL_KERNELS)),
    "qlora": Tuning("QLoRA, rank 8, all kernels", LORA_RATES, 5e-3, "qlora", (NO_DROPOUT,)),
    "bottleneck": Tuning("bottlenecks of width 16", LORA_RATES, 1e-2, "bottleneck", ("ADAPTER_WIDTH=16",)),
    "prompt": Tuning("prompt of 20", (1e-2, 5e-2, 1e-1, 3e-1), 5e-2, "prompt", ("PROMPT_LENGTH=20", "PACK=False")),
    "prefix": Tuning("prefixes of 20", (5e-3, 2e-2, 5e-2, 1e-1), 1e-1, "prefix", ("PREFIX_LENGTH=20",)),
    "ia3": Tuning("IA3", (1e-2, 3e-2, 1e-1, 3e-1), 3e-1, "ia3"),
    "bitfit": Tuning("biases (after BitFit)", (5e-3, 1e-2, 2e-2, 5e-2), 2e-2, "bitfit"),
    "layer_norm": Tuning("norms", (1e-2, 3e-2, 1e-1, 3e-1), 3e-2, "layer_norm"),
    "last_layers": Tuning(
        "the last layer of both stacks", (2e-3, 4e-3, 8e-3, 2e-2), 4e-3, "last_layers", ("LAST_LAYERS=1",)
    ),
}


def run_one(name: str, *, rate: float, seed: int, common: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains a student, unless it is trained already; returns its accuracies, number of trained parameters, ..."""
    from sbs_jax.run import directory
    from sbs_jax.training import loop
    from sbs_jax.training.step import prepare

    tuning, path = TUNINGS[name], folder / f"{name}-{rate:g}-{seed}"
    bindings = common["bindings"] + [*tuning.bindings, f"LEARNING_RATE={rate}", f"SEED={seed}", f"MODEL_DIR={path}"]
    files = [*common["files"], *([f"gin_configs/adapters/{tuning.file}.gin"] if tuning.file else [])]
    config, text = gin_files.configure("train.TrainConfig", gin_files=files, bindings=bindings)
    trained = sum(leaf.size for leaf in prepare(config).saved.parameters.values())
    if not any(line["kind"] == "test" for line in (directory.read_metrics(path) if path.is_dir() else [])):
        loop.train(config, config_text=text)
    lines = directory.read_metrics(path)
    best = {kind: [line for line in lines if line["kind"] == kind] for kind in ("validation", "test", "train")}
    metric = next(name for name in best["test"][-1] if name.rpartition("_")[2] == "accuracy")
    return {
        "way": tuning.title,
        "rate": rate,
        "seed": seed,
        "validation": max(line[metric] for line in best["validation"]),
        "test": best["test"][-1][metric],
        "trained": trained,
        "loss": best["train"][-1]["loss"],
        "path": str(path),
    }


def builtin(folder: Path, steps: int) -> dict[str, Any]:
    """Writes the records of the demo; returns the settings of every run."""
    if not (folder / "records" / "builtin").is_dir():
        demo.make_records(folder)
    files = ["gin_configs/experiments/builtin/demo.gin", "gin_configs/methods/step_by_step.gin"]
    bindings = [f"RECORDS_DIR={folder / 'records'}", f"TRAIN_STEPS={steps}", f"CHECKPOINT_PERIOD={steps}"]
    return {"files": files, "bindings": [*bindings, f"EVAL_PERIOD={steps // 5}"]}


def svamp(folder: Path, steps: int, *, release: str, vocabulary: str, first: int) -> dict[str, Any]:
    """Writes records of SVAMP and trains a first student on them in full; returns the settings of every run."""
    from sbs_jax.data import registry
    from sbs_jax.data import release as releases
    from sbs_jax.training import loop

    if not (folder / "records" / "svamp").is_dir():
        dataset = registry.get("svamp")
        releases.import_release(dataset, release_dir=release, records_dir=folder / "records", parser="strict")
    files = ["gin_configs/experiments/svamp/cpu.gin"]
    bindings = [
        f"RECORDS_DIR={folder / 'records'}",
        f"VOCABULARY={vocabulary}",
        "EVAL_BATCH_SIZE=100",
        "DROPOUT_RATE=0.0",
    ]
    start = folder / "start"
    if not (start / "checkpoints" / str(first)).is_dir():
        own = [f"TRAIN_STEPS={first}", f"EVAL_PERIOD={first}", f"CHECKPOINT_PERIOD={first}", f"MODEL_DIR={start}"]
        config, text = gin_files.configure("train.TrainConfig", gin_files=files, bindings=[*bindings, *own])
        loop.train(config, config_text=text)
    own = [f"TRAIN_STEPS={steps}", f"EVAL_PERIOD={steps}", f"CHECKPOINT_PERIOD={steps}"]
    return {
        "files": files,
        "bindings": [*bindings, *own, f"INITIAL_CHECKPOINT_PATH={start / 'checkpoints' / str(first)}"],
    }


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder of the runs")
    parser.add_argument("--dataset", choices=("builtin", "svamp"), default="builtin")
    parser.add_argument("--release", help="folder of the released data, for svamp")
    parser.add_argument("--vocabulary", help="T5's sentencepiece.model, for svamp")
    parser.add_argument("--steps", type=int, default=500, help="updates of every run")
    parser.add_argument("--first", type=int, default=300, help="updates of the student that svamp starts from")
    parser.add_argument("--only", nargs="+", choices=list(TUNINGS), default=list(TUNINGS), help="tunings to train")
    parser.add_argument(
        "--rates",
        type=int,
        default=4,
        help="number of learning rates to try per tuning, lowest first; 0: only the best one of the built-in dataset",
    )
    parser.add_argument("--examples", type=int, help="examples of each task per update (default: the experiment's)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    main.import_tensorflow()
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax.pages import report

    folder = Path(arguments.output).absolute() / arguments.dataset
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.dataset == "builtin":
        common = builtin(folder, arguments.steps)
    else:
        common = svamp(
            *(folder, arguments.steps),
            release=arguments.release,
            vocabulary=arguments.vocabulary,
            first=arguments.first,
        )
    common["bindings"] += [f"EXAMPLES={arguments.examples}"] if arguments.examples else []
    runs, lines = [], []
    for name in arguments.only:
        tuning = TUNINGS[name]
        tried = [
            run_one(name, rate=rate, seed=SEEDS[0], common=common, folder=folder / "runs")
            for rate in (tuning.rates[: arguments.rates] or (tuning.best,))
        ]
        best = max(tried, key=lambda found: (found["validation"], -found["loss"]))
        others = [
            run_one(name, rate=best["rate"], seed=seed, common=common, folder=folder / "runs") for seed in SEEDS[1:]
        ]
        for found in (*tried, *others):
            print(json.dumps(found), flush=True)
        searched = ", ".join(f"{found['rate']:g}: {found['validation']:.1f}" for found in tried)
        lines.append(
            f"{tuning.title}: {best['trained']:,} trained; validation by rate {searched}; taken {best['rate']:g}"
        )
        runs += [report.Run(found["path"], tuning.title, 1.0, found["seed"]) for found in (best, *others)]
    print("\n".join(lines))
    print(report.markdown(report.summarize(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(run())
