"""Our side of scripts/bench.py: the step of `sbs train` on packed rows, through the project's own pipeline.

Writes the model's shape and the examples of every batch to a file, from which the peer does the same work. With
`--batches`, a file of packed batches that is made if it is not there (scripts/bench_gpu.py).
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from sbs_jax import bench

SHARED = Path(__file__).resolve().parents[2] / "shared"
RELEASE = SHARED / "data" / "dss"
VOCABULARY = SHARED / "vocab" / "t5" / "sentencepiece.model"
EXAMPLES = 16  # of each task
# Rows that hold 32 examples of SVAMP with little padding; other shapes: docs/speed.md.
ROWS, LENGTHS = 6, {"inputs": 256, "targets": 160}
DIFFERENT_BATCHES = 8
COMPILED = "/jax/core/compile/backend_compile_duration"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, help="CPUs to keep to")
    parser.add_argument("--work", required=True)
    parser.add_argument("--tuning", help="file of gin_configs/adapters: train that alone")
    parser.add_argument("--platform", default="cpu", choices=("cpu", "cuda"), help="cuda: activations are bfloat16")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of each task in a step")
    parser.add_argument("--batches", help="file of batches")
    parser.add_argument("--binding", action="append", default=[], help="of gin, besides")
    parser.add_argument("--prepare", action="store_true", help="write the files and end")
    arguments = parser.parse_args()
    stream = bench.protocol()
    if arguments.threads:
        bench.use_threads(arguments.threads)
    os.environ["JAX_PLATFORMS"] = arguments.platform
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    from sbs_jax import configuration, datasets, features, t5, train

    with tempfile.TemporaryDirectory() as folder:
        bindings = {
            "DATASET": "svamp",
            "RECORDS_DIR": folder,
            "MODEL_DIR": folder,
            "VOCABULARY": str(VOCABULARY) if VOCABULARY.is_file() else "byte",
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "EXAMPLES": arguments.examples,
            "PACK": True,
            "EXAMPLES_PER_ROW": 2 * EXAMPLES / ROWS,
            "TRAIN_STEPS": 100_000,
            "LEARNING_RATE": 5e-5,
            "DTYPE": "float32" if arguments.platform == "cpu" else "bfloat16",
        }
        config, _ = configuration.configure(
            "train.TrainConfig",
            gin_files=[
                "gin_configs/runs/train.gin",
                f"gin_configs/models/{arguments.model}.gin",
                "gin_configs/methods/step_by_step.gin",
                *([f"gin_configs/adapters/{arguments.tuning}.gin"] if arguments.tuning else []),
            ],
            bindings=[*(f"{name}={value!r}" for name, value in bindings.items()), *arguments.binding],
        )
        if arguments.batches and Path(arguments.batches).exists():
            source, batches = read_batches(arguments.batches)
        else:
            source = write_records(Path(folder))
            datasets.configure(config.data)
            batches = first_batches(
                features.train_dataset(
                    config.mixture_or_task_name,
                    lengths=config.task_feature_lengths,
                    split=datasets.TRAIN,
                    batch_size=config.batch_size,
                    pack=config.pack,
                    seed=config.seed,
                    skip_batches=0,
                ),
                examples=arguments.examples,
            )
            if arguments.batches:
                write_batches(arguments.batches, source, batches)
    tokens = [features.count_tokens(batch) for batch in batches]

    compiles: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            compiles.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    parameters = sum(math.prod(leaf.shape) for leaf in t5.abstract(config.model)[1].values())
    work = {
        "model": dataclasses.asdict(config.model),
        "parameters": parameters,
        "alpha": config.alpha,
        "clip_norm": config.clip_norm,
        "learning_rate": bindings["LEARNING_RATE"],
        "lora": lora_of(config.tuning),
        "batches": [bench.unpacked(batch) for batch in batches],
    }
    if arguments.prepare or not Path(arguments.work).exists():  # once there, the peer may be reading it
        Path(arguments.work).write_text(json.dumps(work), "utf-8")
    if arguments.prepare:
        return
    trainer = train.prepare(config)
    state = jax.block_until_ready((train.initial_state if arguments.platform == "cpu" else drawn)(config, trainer))
    trained = sum(x.size for x in state.parameters.values())
    compiles.clear()

    def step(index: int) -> int:
        nonlocal state
        batch = trainer.partitioner.put_batch(batches[index % len(batches)])
        state, _ = jax.block_until_ready(trainer.step(state, batch))
        assert len(compiles) == 1, f"After step {index} the number of compilations is {len(compiles)}; expected 1."
        return tokens[index % len(batches)]

    step(0)
    ready = {
        "data": source,
        "parameters": parameters,
        "trained": trained,
        "examples per step": 2 * arguments.examples,
        "tokens per step": statistics.mean(tokens),
        "rows": f"{config.batch_size} of {LENGTHS}",
        "compile seconds": round(compiles[0], 1),
    }

    def device_memory() -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    peak = bench.peak_memory if arguments.platform == "cpu" else device_memory
    bench.serve(step, ready=ready, stream=stream, peak_memory=peak)


def drawn(config: Any, trainer: Any) -> Any:
    """`train.initial_state` of a model that one device holds: array by array, since few differ in shape.

    XLA compiles all of it together for longer than the step of scanned layers.
    """
    import jax
    import jax.numpy as jnp

    from sbs_jax import t5, train

    _, parameters = t5.init(config.model, seed=config.seed)
    optimizer = config.optimizer(learning_rate=config.learning_rate).init(parameters)
    state = train.TrainState(jnp.int32(0), parameters, optimizer, jnp.int32(0))
    placed = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, trainer.saved))
    return trainer.stacked(placed)


def lora_of(tuning: Any) -> dict[str, Any] | None:
    """The LoRA of a tuning, for the peer to put on the same; None where there is none."""
    return None if tuning is None or tuning.lora is None else dataclasses.asdict(tuning.lora)


def first_batches(batches: Any, *, examples: int) -> list[Any]:
    """The first batches with exactly so many examples of each task: a packed one may hold a few more or less."""
    found: list[Any] = []
    for batch in batches:
        tasks = [task for _, _, task in bench.unpacked(batch)]
        if tasks.count(1) == tasks.count(2) == examples:
            found.append(batch)
            if len(found) == DIFFERENT_BATCHES:
                break
    return found


def write_batches(path: str, source: str, batches: list[Any]) -> None:
    import numpy as np

    stacked: dict[str, Any] = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    np.savez_compressed(path, source=np.array(source), **stacked)


def read_batches(path: str) -> tuple[str, list[Any]]:
    """What `write_batches` wrote: where the examples are from, and the batches."""
    import numpy as np

    with np.load(path) as found:
        stacked = dict(found)
    source = str(stacked.pop("source"))
    return source, [dict(zip(stacked, arrays, strict=True)) for arrays in zip(*stacked.values(), strict=True)]


def write_records(folder: Path) -> str:
    """Writes the records of SVAMP, or, without the release, texts of the same lengths; returns which."""
    import numpy as np

    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax import datasets, records, release

    if RELEASE.is_dir() and VOCABULARY.is_file():
        release.import_release(datasets.get("svamp"), release_dir=RELEASE, records_dir=folder, parser="strict")
        return "SVAMP, T5's vocabulary"
    # One byte is one token: numbers of characters are what docs/lengths.md has in tokens, less prefix and EOS.
    random = np.random.default_rng(0)

    def text(*, mean: float, spread: float, least: int, most: int) -> str:
        return "x" * int(np.clip(random.normal(mean, spread), least, most))

    rows = [
        records.Record(
            id=f"svamp-{number}",
            input=text(mean=33, spread=10, least=12, most=73),
            label=text(mean=10, spread=3, least=5, most=18),
            teacher_text="",
            rationale=text(mean=38, spread=20, least=8, most=98),
            teacher_label="0",
            outcome=records.OK,
        )
        for number in range(800)
    ]
    (folder / "svamp").mkdir()
    records.write_records(folder / "svamp" / "train.jsonl", rows)
    return "random text of the lengths of SVAMP, bytes as tokens"


if __name__ == "__main__":
    main()
