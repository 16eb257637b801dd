"""The paper's own accuracies, for runs that repeat one of its cells (paper.json has source and date)."""

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
    """Returns the paper's accuracy, in percent, of the cell that these seeds of one method repeat, or None.

    A run repeats a cell with the same dataset, method and student (T5 v1.1 base, started from a checkpoint), all of
    the training rows with human labels, equally many test rows and the same `teacher`. Other files under the same name
    (e-SNLI's validation rows as its training rows, for instance) have other counts of rows, and are not compared.
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
        and not (options.get("folds") or options.get("augmentation"))
        and counts.get("rows") == _TABLE["rows"][dataset]["train"]
        and len(result.test_rows) == _TABLE["rows"][dataset]["test"]
    )
