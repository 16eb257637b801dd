"""Measures how long a run takes to have its data: all 549,367 training rows of e-SNLI, both tasks, T5's vocabulary.

    python scripts/bench.py startup [--release ../shared/data/dss] [--vocabulary FILE] [--rounds 3]

The release has no training inputs of e-SNLI, so its validation rows are repeated under other ids. Each start is a
process of its own; counted are its processor seconds from the first look at the records to the first batch, imports
left out, and the most memory it took, imports included.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness, svamp

ROWS = 549_367
CHILD = """
import json, resource, sys, time
from sbs_jax.cli import main
main.import_tensorflow()
import tasks
from sbs_jax.data import batches, registry, selection
from sbs_jax.training import loop
records, vocabulary = sys.argv[1:]
begin, wall = time.process_time(), time.perf_counter()
registry.configure(selection.DataOptions(records_dir=records, vocabulary=vocabulary))
name, lengths = "esnli_step_by_step", {"inputs": 128, "targets": 96}
registry.manifest(name)
batches.fingerprint(name, split="train", lengths=lengths)
next(batches.train_dataset(name, lengths=lengths, split="train", batch_size=64, pack=False, seed=0, skip_batches=0))
print(json.dumps({
    "cpu_s": time.process_time() - begin,
    "wall_s": time.perf_counter() - wall,
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--release", type=Path, default=svamp.RELEASE, help="the official release's folder")
    parser.add_argument("--vocabulary", type=Path, default=svamp.VOCABULARY)
    parser.add_argument("--rounds", type=int, default=3)


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    for path in (arguments.release, arguments.vocabulary):
        if not path.exists():
            raise SystemExit(f"{path} does not exist; name it with --release or --vocabulary.")
    first, later = [], []
    with tempfile.TemporaryDirectory() as folder:
        records, cache = Path(folder, "records"), Path(folder, "cache")
        write_records(records, arguments.release)
        for _ in range(arguments.rounds):
            shutil.rmtree(cache, ignore_errors=True)
            first.append(start(records, arguments.vocabulary, cache))
            later.append(start(records, arguments.vocabulary, cache))
    print(json.dumps({"first": first, "later": later}, indent=1))
    versions = harness.versions("numpy", "sentencepiece")
    for name, found, field, unit, goal in (
        ("startup_549k_s", first, "cpu_s", "s", 15.0),
        ("startup_549k_later_s", later, "cpu_s", "s", 5.0),
        ("startup_549k_gb", first, "peak_gb", "GiB", 1.5),
    ):
        value = statistics.median(each[field] for each in found)
        yield harness.Row(name, unit, value, goal, "<= 1", versions)


def write_records(directory: Path, release: Path) -> None:
    """Writes e-SNLI's validation rows so often that there are `ROWS` for training, with a manifest that fits."""
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax.data import records, registry
    from sbs_jax.data.release import import_release

    import_release(registry.get("esnli"), release_dir=release, records_dir=directory, parser="strict")
    folder = directory / "esnli"
    rows = itertools.cycle(records.read_records(folder / "validation.jsonl"))
    more = (dataclasses.replace(next(rows), id=f"row-{number}") for number in range(ROWS))
    sha256 = records.write_records(folder / "train.jsonl", more)
    manifest = records.read_manifest(folder)
    manifest["splits"]["train"] = {**manifest["splits"]["validation"], "sha256": sha256}
    records.write_manifest(folder, manifest)


def start(records: Path, vocabulary: Path, cache: Path) -> dict[str, Any]:
    """Starts a process with a cache of its own; returns what it measured."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(records), str(vocabulary)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)
