"""Measures the training input of one host: batches per second of real data, packed and not, on one core.

    python scripts/bench_input.py [--release ../shared/data/dss] [--vocabulary FILE] [--seconds 3]

Prints JSON: per dataset and form, rows/s, examples/s and non-padding tokens/s of the batches of a host that builds
all rows of the global batch, and of one of 8 hosts that builds an eighth; and the time to the first batch after
tokenization, from the start and when 1,000 batches are skipped. `--consumed` takes the rows/s that a host's
chips use up (`make bench-tpu` prints them), and adds the ratio, also as a row of `--output`.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATASETS = ("svamp", "esnli")
BATCH_SIZE = 256
PACKED = {"inputs": 512, "targets": 128}
HOSTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--release", type=Path, default=shared / "data" / "dss", help="the official release's folder")
    parser.add_argument("--vocabulary", type=Path, default=shared / "vocab" / "t5" / "sentencepiece.model")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement, of which there are five")
    parser.add_argument(
        "--consumed", type=float, metavar="ROWS", help="packed rows/s that the chips of a host train on"
    )
    parser.add_argument("--output", default="bench.json", help="file to append the row to, if --consumed is given")
    arguments = parser.parse_args()
    for path in (arguments.release, arguments.vocabulary):
        if not path.exists():
            parser.error(f"There is nothing at {path}.")
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    # Only now: libraries start as many threads as they see cores.
    from sbs_jax import bench
    from sbs_jax import main as command

    command.import_tensorflow()
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax import datasets, release

    result: dict[str, Any] = {
        "machine": {"processor": _processor(), "core": core, "python": platform.python_version()},
        "batch_size": BATCH_SIZE,
        "packed lengths": PACKED,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in DATASETS:
            dataset = datasets.get(name)
            release.import_release(dataset, release_dir=arguments.release, records_dir=Path(folder), parser="strict")
            has_train = (Path(folder) / name / "train.jsonl").exists()
            split = "train" if has_train else "validation"  # e-SNLI's train inputs are not in the release
            datasets.configure(
                datasets.DataOptions(records_dir=folder, vocabulary=str(arguments.vocabulary), train_split=split)
            )
            begin = time.monotonic()
            tables = [datasets.token_tables(f"{name}_{kind}", "train") for kind in datasets.MIXED]
            result[name] = {
                "examples": sum(len(table["inputs"]) for table in tables),
                "seconds to tokenize": round(time.monotonic() - begin, 2),
                "not packed": _measure(name, dataset.feature_lengths, pack=False, seconds=arguments.seconds),
                "packed": _measure(name, PACKED, pack=True, seconds=arguments.seconds),
            }
    json.dump(result, sys.stdout, indent=1)
    print()
    if arguments.consumed:
        row = bench.Row(
            name="input_pipeline_vs_step",
            unit="packed rows/s",
            ours=min(result[name]["packed"]["one host"]["rows per second"] for name in DATASETS),
            peer=arguments.consumed,
            goal=">= 5",
            versions=bench.versions("numpy", "seqio", "tensorflow"),
        )
        bench.append(arguments.output, [row])
        print(bench.table([row]))


def _measure(name: str, lengths: Any, *, pack: bool, seconds: float) -> dict[str, Any]:
    from sbs_jax import features

    def stream(*, skip: int = 0, rows: Any = None) -> Any:
        return features.train_dataset(
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
    segments = batch["decoder_segment_ids"].max(axis=1).sum() if pack else BATCH_SIZE
    tokens = features.count_tokens(batch)
    for title, rows in (("one host", None), (f"one of {HOSTS} hosts", range(BATCH_SIZE // HOSTS))):
        rates = []
        batches = stream(rows=rows)
        next(batches)
        for _ in range(5):
            count, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds / 5:
                next(batches)
                count += 1
            rates.append(count / (time.perf_counter() - begin))
        rate = statistics.median(rates)  # global batches a second
        found[title] = {
            "global batches per second": round(rate, 2),
            "rows per second": round(rate * (BATCH_SIZE if rows is None else len(rows))),
            "examples per second": round(rate * segments * (1 if rows is None else len(rows) / BATCH_SIZE)),
            "tokens per second": round(rate * tokens * (1 if rows is None else len(rows) / BATCH_SIZE)),
        }
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
