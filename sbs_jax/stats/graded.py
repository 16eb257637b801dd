"""Graded answers of one student, described for `sbs evaluate` and the end of `sbs train`: rows, intervals, labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbs_jax.stats import intervals, labels
from sbs_jax.storage import json_files, places

_ROUNDING = 0.01  # points, between a metric and the mean of its rows


def scores(rows: Sequence[Mapping[str, Any]], name: str, value: float) -> list[float] | None:
    """Returns the scores from 0 to 1, one of each row, whose mean is this metric; None for any other metric.

    `rows` are those of a predictions file: `correct`, and `scores` of further metrics by name.
    """
    for of_rows in (
        [float(row["scores"][name]) for row in rows if name in row.get("scores", {})],
        [float(row["correct"]) for row in rows],
    ):
        if rows and len(of_rows) == len(rows) and abs(100.0 * float(np.mean(of_rows)) - value) < _ROUNDING:
            return of_rows
    return None


def described(
    metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]], found: labels.Labels | None
) -> dict[str, Any]:
    """Adds to metrics in percent their number of rows, 95 % intervals and, by `by_label`, macro-F1.

    {"accuracy": 85.0, "rows": 200, "intervals": {"accuracy": [79.4, 89.3]}, "macro_f1": 84.1}. Unchanged without rows.
    """
    if not rows:
        return dict(metrics)
    bounds = {}
    for name, value in metrics.items():
        if (of_rows := scores(rows, name, value)) is not None:
            _, low, high = intervals.accuracy_interval(np.array([of_rows]))
            bounds[name] = [round(low, 1), round(high, 1)]
    macro_f1 = {} if found is None else {"macro_f1": found.macro_f1}
    return {**metrics, "rows": len(rows), "intervals": bounds, **macro_f1}


def by_label(rows: Sequence[Mapping[str, Any]], of_labels: Sequence[str] | None) -> labels.Labels | None:
    """Counts the answers by label; None without a closed set of labels."""
    if of_labels is None:
        return None
    return labels.of_answers(((row["target"], row["prediction"]) for row in rows), of_labels)


def of_run(
    run: str | Path, results: Mapping[str, Mapping[str, Any]], *, labels: Mapping[str, Sequence[str] | None]
) -> dict[str, dict[str, Any]]:
    """Describes the last metrics line of each kind of a run, as `loop.train` returns them, by its predictions files.

    `labels` has the closed set of labels of each task that was graded. Of several tasks, each is described by itself.
    """
    found = {}
    for kind, line in results.items():
        values = {name: value for name, value in line.items() if name != "step"}
        found[kind] = {"step": line["step"]}
        for task, of_labels in labels.items() if kind in ("validation", "test") else ():
            file = places.of(run) / "predictions" / f"{task}-{'test-' * (kind == 'test')}{line['step']}.jsonl"
            rows = [row for _, row in json_files.read_json_lines(file)] if file.is_file() else []
            if len(labels) == 1:
                values = described(values, rows, by_label(rows, of_labels))
            elif rows:
                found[kind][task] = described({}, rows, by_label(rows, of_labels))
        found[kind] |= values
    return found
