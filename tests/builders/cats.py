"""A small dataset, `cats`, to register and read in tests of the data pipeline."""

from pathlib import Path
from typing import Any

import pytest

import tasks  # noqa: F401  (before a test replaces the table of datasets)
from sbs_jax.data import catalogue, grading, records, registry, selection
from sbs_jax.data.dataset import Dataset


def dataset(name: str = "cats", **changes: Any) -> Dataset:
    fields: dict[str, Any] = {
        "name": name,
        "labels": None,
        "read_release": None,
        "parsers": {},
        "metric_fns": (grading.accuracy,),
        "primary_metric": "accuracy",
        "same_label": grading.same_text,
        "feature_lengths": {"inputs": 60, "targets": 48},
    }
    return Dataset(**(fields | changes))


def row(number: int, **changes: Any) -> records.Record:
    fields: dict[str, Any] = {
        "id": f"row-{number}",
        "input": f"{number} cats",
        "label": f"{number}",
        "rationale": f"there are {number}",
        "teacher_label": f"{number}",
        "outcome": "ok",
    }
    return records.Record(**(fields | changes))


def write(folder: Path, found: list[records.Record], *, split: str = "train") -> None:
    records.write_records(folder / "cats" / f"{split}.jsonl", found)


def configure(folder: Path, **changes: Any) -> None:
    registry.configure(selection.DataOptions(**{"records_dir": str(folder), "vocabulary": "byte", **changes}))


def register(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers `cats` with records from the folder until the test ends."""
    monkeypatch.setattr(catalogue, "_DATASETS", dict(catalogue._DATASETS))
    monkeypatch.setattr(registry, "_options", registry._options)
    registry.add(dataset())
    configure(folder)
