"""Measures the training input of one host: batches per second of real data, packed and not, on one core.

    python scripts/bench.py input [--release ../shared/data/dss] [--vocabulary FILE] [--seconds 3]

Prints JSON: per dataset and form, rows/s, examples/s and non-padding tokens/s of the batches of a host that builds
all rows of the global batch, and of one of 8 hosts that builds an eighth; and the time to the first batch after
tokenization, from the start and when 1,000 batches are skipped. A row is the packed rows/s of the four datasets in one
mixture beside those of e-SNLI alone. With `--consumed`, the rows/s that a host's chips use up (`make bench-tpu` prints
them), the ratio to them is another.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness, svamp

DATASETS, TOGETHER = ("svamp", "esnli"), ("svamp", "cqa", "esnli", "anli1")
BATCH_SIZE = 256
PACKED = {"inputs": 512, "targets": 128}
HOSTS = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", type=Path, default=svamp.RELEASE, help="the official release's folder")
    parser.add_argument("--vocabulary", type=Path, default=svamp.VOCABULARY)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each of the five measurements")
    parser.add_argument("--consumed", type=float, metavar="ROWS", help="packed rows/s that a host's chips train on")


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    for path in (arguments.release, arguments.vocabulary):
        if not path.exists():
            raise SystemExit(f"{path} does not exist; name it with --release or --vocabulary.")
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    # Imported only now: libraries start one thread per visible core.
    from sbs_jax.cli import main as command

    command.import_tensorflow()
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax.data import registry, release, selection, task_names

    versions = harness.versions("numpy", "seqio", "tensorflow")
    result: dict[str, Any] = {"machine": {"versions": versions, "core": core}}
    result |= {"batch_size": BATCH_SIZE, "packed lengths": PACKED}
    with tempfile.TemporaryDirectory() as folder:
        for name in TOGETHER:
            release.import_release(
                registry.get(name), release_dir=arguments.release, records_dir=Path(folder), parser="strict"
            )
        # The release has no train inputs of e-SNLI and ANLI.
        without = [name for name in TOGETHER if not (Path(folder) / name / "train.jsonl").exists()]
        registry.configure(
            selection.DataOptions(
                records_dir=folder,
                vocabulary=str(arguments.vocabulary),
                train_split=dict.fromkeys(without, "validation"),
            )
        )
        for name in DATASETS:
            dataset = registry.get(name)
            begin = time.monotonic()
            tables = [registry.token_tables(task, "train") for task in task_names.subtasks(f"{name}_step_by_step")]
            result[name] = {
                "examples": sum(len(table["inputs"]) for table in tables),
                "seconds to tokenize": round(time.monotonic() - begin, 2),
                "not packed": speeds(name, dataset.feature_lengths, pack=False, seconds=arguments.seconds),
                "packed": speeds(name, PACKED, pack=True, seconds=arguments.seconds),
            }
        every = task_names.JOINT.join(TOGETHER)
        result[every] = {"packed": speeds(every, PACKED, pack=True, seconds=arguments.seconds)}
    print(json.dumps(result, indent=1))
    together, one = (result[name]["packed"]["one host"]["rows per second"] for name in (every, "esnli"))
    yield harness.Row("input_mixture_vs_one", "packed rows/s", together, one, ">= 0.8", versions)
    if arguments.consumed:
        rate = min(result[name]["packed"]["one host"]["rows per second"] for name in DATASETS)
        yield harness.Row("input_pipeline_vs_step", "packed rows/s", rate, arguments.consumed, ">= 5", versions)


def speeds(name: str, lengths: Any, *, pack: bool, seconds: float) -> dict[str, Any]:
    """Measures the stream of one mixture."""
    from sbs_jax.data import batches

    def stream(*, skip: int = 0, rows: Any = None) -> Any:
        return batches.train_dataset(
            f"{name}_step_by_step",
            lengths=lengths,
            split="train",
            batch_size=BATCH_SIZE,
            pack=pack,
            seed=0,
            skip_batches=skip,
            rows=rows,
        )

    found: dict[str, Any] = {}
    for skip in (0, 1_000):
        begin = time.perf_counter()
        batch = next(stream(skip=skip))
        found[f"seconds to the first batch, {skip:,} skipped"] = round(time.perf_counter() - begin, 3)
    examples = batch["decoder_segment_ids"].max(axis=1).sum() if pack else BATCH_SIZE
    tokens = batches.count_tokens(batch)
    for title, rows in (("one host", None), (f"one of {HOSTS} hosts", range(BATCH_SIZE // HOSTS))):
        rates = []
        made = stream(rows=rows)
        next(made)
        for _ in range(5):
            count, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds / 5:
                next(made)
                count += 1
            rates.append(count / (time.perf_counter() - begin))
        rate = statistics.median(rates)  # global batches a second
        share = 1 if rows is None else len(rows) / BATCH_SIZE
        found[title] = {"global batches per second": round(rate, 2)}
        for unit, of_batch in (("rows", BATCH_SIZE), ("examples", examples), ("tokens", tokens)):
            found[title][f"{unit} per second"] = round(rate * of_batch * share)
    return found
