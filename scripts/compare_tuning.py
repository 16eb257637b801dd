"""Trains one student in every way of gin_configs/adapters/, step by step, and prints accuracy beside what is trained.

    python scripts/compare_tuning.py --output runs/tuning                       # the built-in dataset, its student
    python scripts/compare_tuning.py --output runs/tuning --dataset svamp --release DIR --vocabulary MODEL

Each way gets the learning rate that is best on validation with seed 0, of those in `WAYS`; then the other seeds are
trained. All have the same number of updates, the same batches and the same start. On the built-in dataset that is the
demo's pre-trained student. On SVAMP there is no pre-trained one that is small enough, so a student is trained from
scratch first, in full, and every way trains that one further. Called again with the same output, it goes on.
What came out: docs/results.md.
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
class Way:
    """A file of gin_configs/adapters/ (None: everything is trained), what differs from it, and rates to try.

    `best` is the rate that was best on the built-in dataset (docs/results.md).
    """

    name: str
    title: str
    file: str | None
    bindings: tuple[str, ...]
    rates: tuple[float, ...]
    best: float


# Sizes are for students of width 64 and 128 with 2 + 2 layers; those of the files are for ones ten times as wide.
WAYS = (
    Way("full", "everything", None, (), (1e-3, 2e-3, 4e-3, 8e-3), 2e-3),
    Way("neftune", "everything, NEFTune", "neftune", (), (1e-3, 2e-3, 4e-3, 8e-3), 4e-3),
    Way("lora", "LoRA, rank 8, query and value", "lora", ("LORA_DROPOUT=0.0",), (2e-3, 5e-3, 1e-2, 2e-2), 5e-3),
    Way(
        "lora_all",
        "LoRA, rank 8, all kernels",
        "lora",
        ("LORA_DROPOUT=0.0", "LORA_MODULES=['.*']"),
        (2e-3, 5e-3, 1e-2, 2e-2),
        2e-3,
    ),
    Way("qlora", "QLoRA, rank 8, all kernels", "qlora", ("LORA_DROPOUT=0.0",), (2e-3, 5e-3, 1e-2, 2e-2), 5e-3),
    Way("bottleneck", "bottlenecks of width 16", "bottleneck", ("ADAPTER_WIDTH=16",), (2e-3, 5e-3, 1e-2, 2e-2), 1e-2),
    Way("prompt", "prompt of 20", "prompt", ("PROMPT_LENGTH=20", "PACK=False"), (1e-2, 5e-2, 1e-1, 3e-1), 5e-2),
    Way("prefix", "prefixes of 20", "prefix", ("PREFIX_LENGTH=20",), (5e-3, 2e-2, 5e-2, 1e-1), 1e-1),
    Way("ia3", "IA3", "ia3", (), (1e-2, 3e-2, 1e-1, 3e-1), 3e-1),
    Way("bitfit", "biases (after BitFit)", "bitfit", (), (5e-3, 1e-2, 2e-2, 5e-2), 2e-2),
    Way("layer_norm", "norms", "layer_norm", (), (1e-2, 3e-2, 1e-1, 3e-1), 3e-2),
    Way(
        "last_layers",
        "the last layer of both stacks",
        "last_layers",
        ("LAST_LAYERS=1",),
        (2e-3, 4e-3, 8e-3, 2e-2),
        4e-3,
    ),
)
BY_NAME = {way.name: way for way in WAYS}


def run_one(way: Way, *, rate: float, seed: int, common: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains one, or reads what it left: {"validation": accuracy, "trained": share, "path": ..}."""
    from sbs_jax.run import directory
    from sbs_jax.training import loop
    from sbs_jax.training.step import prepare

    path = folder / f"{way.name}-{rate:g}-{seed}"
    bindings = common["bindings"] + [*way.bindings, f"LEARNING_RATE={rate}", f"SEED={seed}", f"MODEL_DIR={path}"]
    files = [*common["files"], *([f"gin_configs/adapters/{way.file}.gin"] if way.file else [])]
    config, text = gin_files.configure("train.TrainConfig", gin_files=files, bindings=bindings)
    trained = sum(leaf.size for leaf in prepare(config).saved.parameters.values())
    if not any(line["kind"] == "test" for line in (directory.read_metrics(path) if path.is_dir() else [])):
        loop.train(config, config_text=text)
    lines = directory.read_metrics(path)
    best = {kind: [line for line in lines if line["kind"] == kind] for kind in ("validation", "test", "train")}
    metric = next(name for name in best["test"][-1] if name.rpartition("_")[2] == "accuracy")
    return {
        "way": way.title,
        "rate": rate,
        "seed": seed,
        "validation": max(line[metric] for line in best["validation"]),
        "test": best["test"][-1][metric],
        "trained": trained,
        "loss": best["train"][-1]["loss"],
        "path": str(path),
    }


def builtin(folder: Path, steps: int) -> dict[str, Any]:
    """Records of the demo, and what every run has in common."""
    if not (folder / "records" / "builtin").is_dir():
        demo._make_records(folder)
    files = ["gin_configs/experiments/builtin/demo.gin", "gin_configs/methods/step_by_step.gin"]
    bindings = [f"RECORDS_DIR={folder / 'records'}", f"TRAIN_STEPS={steps}", f"CHECKPOINT_PERIOD={steps}"]
    return {"files": files, "bindings": [*bindings, f"EVAL_PERIOD={steps // 5}"]}


def svamp(folder: Path, steps: int, *, release: str, vocabulary: str, first: int) -> dict[str, Any]:
    """Records of SVAMP, a student trained on them in full for `first` updates, and what every run has in common."""
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
    parser.add_argument("--first", type=int, default=300, help="updates of the student that svamp begins from")
    parser.add_argument("--only", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), help="ways to train")
    parser.add_argument(
        "--rates",
        type=int,
        default=4,
        help="so many of each way's learning rates, the lowest; 0: that which was best on the built-in dataset",
    )
    parser.add_argument("--examples", type=int, help="of each task per update (default: the experiment's)")
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
        way = BY_NAME[name]
        tried = [
            run_one(way, rate=rate, seed=SEEDS[0], common=common, folder=folder / "runs")
            for rate in (way.rates[: arguments.rates] or (way.best,))
        ]
        best = max(tried, key=lambda found: (found["validation"], -found["loss"]))
        others = [
            run_one(way, rate=best["rate"], seed=seed, common=common, folder=folder / "runs") for seed in SEEDS[1:]
        ]
        for found in (*tried, *others):
            print(json.dumps(found), flush=True)
        searched = ", ".join(f"{found['rate']:g}: {found['validation']:.1f}" for found in tried)
        lines.append(f"{way.title}: {best['trained']:,} trained; validation by rate {searched}; taken {best['rate']:g}")
        runs += [report.Run(found["path"], way.title, 1.0, found["seed"]) for found in (best, *others)]
    print("\n".join(lines))
    print(report.markdown(report.summarize(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(run())
