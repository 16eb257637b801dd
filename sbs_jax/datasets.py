"""Datasets as SeqIO tasks and mixtures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbs_jax.release import Row
    from sbs_jax.teacher.parsing import Parsed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """What the project knows about one dataset; each `tasks/<name>.py` holds one as `DATASET`."""

    name: str
    labels: tuple[str, ...] | None
    read_release: Callable[[Path], dict[str, list[Row]]] | None
    parsers: Mapping[str, Callable[[str, Row], Parsed]]
    metric_fns: tuple[Callable[..., Mapping[str, Any]], ...]
    primary_metric: str
    feature_lengths: Mapping[str, int]
    same_label: Callable[[str, str], bool]
    is_label: Callable[[str], bool] | None = None
    tfds: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How records become training examples."""

    records_dir: str
    vocabulary: str
    label_source: str = "human"
    rationales: str = "all"
    fraction: float = 1.0
    seed: int = 0
    train_split: str = "train"
    validation_fraction: float = 0.1
    label_prefix: str = "predict: "
    rationale_prefix: str = "explain: "


_DATASETS: dict[str, Dataset] = {}


def add(dataset: Dataset) -> None:
    """Registers a dataset."""
    _DATASETS[dataset.name] = dataset
