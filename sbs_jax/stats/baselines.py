"""Baselines of a dataset: test accuracies of models that need no student. A student below them has learned nothing.

`sbs baseline` measures them (linear.py) and writes them beside the records, where `sbs train` and `sbs report` find
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from sbs_jax.data import records, selection
from sbs_jax.storage import atomic, json_files

MAJORITY, PARTIAL, LINEAR = "majority", "partial", "linear"
TITLES = {
    MAJORITY: "the most frequent answer",
    PARTIAL: "a linear model of one part of the input",
    LINEAR: "a linear model of words",
}
FORMAT = 1


class Baseline(TypedDict):
    """Test accuracy of one model: percent with its 95 % interval (Wilson)."""

    accuracy: float
    low: float
    high: float


class Baselines(TypedDict):
    """Contents of baselines.json: test accuracies by model; no "partial" where rows have one part only."""

    format: int
    train: list[str]  # splits learned from
    train_rows: int
    test_rows: int
    sha256: dict[str, str]  # split -> hash of its records
    models: dict[str, Baseline]


def write(records_dir: str | Path, dataset: str, found: Baselines) -> Path:
    """Writes the baselines of a dataset beside its records; returns the file."""
    path = Path(records_dir) / dataset / records.BASELINES
    atomic.replace(path, (json.dumps(found, indent=1) + "\n").encode())
    return path


def read(manifest: Mapping[str, Any]) -> Baselines | None:
    """Reads the baselines beside a run's records; None if there are none, or the test rows have changed since.

    A run and its report need no baselines, so nothing here is an error.
    """
    data = manifest["data"]
    file = Path(data["options"]["records_dir"]) / data["dataset"] / records.BASELINES
    try:
        found = json_files.typed(json_files.read_json(file), Baselines)
    except (ValueError, OSError):
        return None
    test = data["splits"].get(selection.TEST)
    same = found["format"] == FORMAT and test and found["sha256"].get(selection.TEST) == test["sha256"]
    return found if same else None
