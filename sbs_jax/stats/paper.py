"""The paper's own numbers, for the cells that a run can be held against (paper.json has source and date)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.stats.results import FINE_TUNING, Result

_TABLE: Mapping[str, Any] = json.loads(Path(__file__).with_name("paper.json").read_text("utf-8"))
SOURCE: str = _TABLE["source"]
DATASETS: tuple[str, ...] = tuple(_TABLE["rows"])
TEACHER: str = _TABLE["teacher"]["name"]
TEACHER_PARAMETERS: float = _TABLE["teacher"]["parameters"]


def accuracy(results: Sequence[Result], *, teacher: str | None) -> float | None:
    """The paper's accuracy, in percent, of what these seeds of one method repeat; None where it has no such cell.

    It has one for the same dataset, method and student (T5 v1.1 base, started from a checkpoint) on all of the training
    rows with human labels, tested on as many rows. A run on another file under the same name (e-SNLI's validation rows
    as its training rows, for instance) has other counts of rows, and is held against nothing; nor is one with
    rationales of another `teacher`.
    """
    dataset, method = results[0].manifest["data"]["dataset"], results[0].run.method
    value = _TABLE["accuracy"].get(method, {}).get(dataset)
    if method != FINE_TUNING and teacher != TEACHER:
        return None
    return value if value is not None and all(_repeats(result, dataset) for result in results) else None


def _repeats(result: Result, dataset: str) -> bool:
    manifest = result.manifest
    model, settings = manifest.get("model"), manifest.get("settings")
    counts = manifest["data"]["splits"]["train"]["counts"]
    options = manifest["data"]["options"]
    return (
        isinstance(model, dict)
        and all(model.get(name) == size for name, size in _TABLE["model"].items())
        and isinstance(settings, dict)
        and bool(settings.get("initial_checkpoint_path"))
        and result.run.fraction == 1
        and options["label_source"] == "human"
        and options.get("train_split", "train") == "train"
        and counts.get("rows") == _TABLE["rows"][dataset]["train"]
        and len(result.test_rows) == _TABLE["rows"][dataset]["test"]
    )
