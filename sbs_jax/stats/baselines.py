"""Baselines of a dataset: test accuracies of models that need no student. A student below them has learned nothing.

`sbs baseline` measures them (linear.py) and writes them beside the records, where `sbs train` and `sbs report` find
them. The file holds one entry for the files' own splits and one for each number of folds, each also with each
augmentation.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from sbs_jax.data import records, selection
from sbs_jax.storage import atomic, json_files, places

MAJORITY, PARTIAL, LINEAR = "majority", "partial", "linear"
TITLES = {
    MAJORITY: "the most frequent answer",
    PARTIAL: "a linear model of one part of the input",
    LINEAR: "a linear model of words",
}
FORMAT = 2
_FIRST_FORMAT = 1  # a single entry, of the files' own splits


class Baseline(TypedDict):
    """Test accuracy of one model: percent with its 95 % interval (Wilson)."""

    accuracy: float
    low: float
    high: float


class Baselines(TypedDict):
    """Test accuracies by model; no "partial" where rows have one part only."""

    train: list[str]  # splits learned from
    train_rows: int
    test_rows: int
    sha256: dict[str, str]  # split -> hashes of its files, as in a run's manifest
    models: dict[str, Baseline]
    folds: NotRequired[int]  # over which test_rows are summed
    augmentation: NotRequired[str]  # name of the file


class _File(TypedDict):
    format: int
    measured: list[Baselines]


class _FirstFile(Baselines):
    format: int


def write(records_dir: str | Path, dataset: str, found: Baselines) -> Path:
    """Adds the baselines of a dataset to the file beside its records, replacing those of the same rows; returns it."""
    path = places.of(records_dir) / dataset / records.BASELINES
    others = [each for each in _read(path) if _rows(each) != _rows(found)]
    contents = _File(format=FORMAT, measured=[*others, found])
    atomic.replace(path, (json.dumps(contents, indent=1) + "\n").encode())
    return path


def read(manifest: Mapping[str, Any]) -> Baselines | None:
    """Reads the baselines beside a run's records; None if there are none, or the test rows have changed since.

    Preferred are those of the run's training files, then those measured last. A run and its report need no baselines,
    so nothing here is an error.
    """
    data = manifest["data"]
    options, splits = data["options"], data["splits"]
    tested = (options.get("folds", 0), splits.get(selection.TEST, {}).get("sha256"))
    same = [
        each
        for each in _read(places.of(options["records_dir"]) / data["dataset"] / records.BASELINES)
        if (each.get("folds", 0), each["sha256"].get(selection.TEST)) == tested
    ]
    learned = splits.get(selection.TRAIN, {}).get("sha256")
    return max(reversed(same), key=lambda each: each["sha256"].get(selection.TRAIN) == learned, default=None)


def _read(path: Path) -> list[Baselines]:
    """Reads all baselines of a file; [] if there is none, or it is damaged."""
    try:
        value = json_files.read_json(path)
        if isinstance(value, dict) and value.get("format") == _FIRST_FORMAT:
            json_files.typed(value, _FirstFile)
            del value["format"]
            return [json_files.typed(value, Baselines)]
        found = json_files.typed(value, _File)
    except (ValueError, OSError):
        return []
    return found["measured"] if found["format"] == FORMAT else []


def _rows(found: Baselines) -> tuple[Any, ...]:
    return found["train"], found.get("folds", 0), found.get("augmentation")
