"""Runs to numbers, words and a page."""

import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sbs_jax import report
from sbs_jax.report import Run, intervals, plots
from sbs_jax.report.results import DISTILLATION, FINE_TUNING, STEP_BY_STEP

LABELS = ("entailment", "neutral", "contradiction")
KINDS = {"label": FINE_TUNING, "step_by_step": STEP_BY_STEP}


def write_run(
    path: Path,
    *,
    kind: str = "label",
    right: list[bool] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    label_source: str = "human",
    updates: int = 200,
    dataset: str = "toy",
    records_dir: str = "no/such/records",
) -> Path:
    """A run directory as `sbs train` leaves it, with these answers on test right."""
    right = [i % 2 == 0 for i in range(40)] if right is None else right
    accuracy = 100.0 * sum(right) / len(right)
    (path / "predictions").mkdir(parents=True)
    task = f"{dataset}_rationale_then_label" if kind == "rationale_then_label" else f"{dataset}_label"
    prefix = "predict: " if kind == "step_by_step" else ""
    rows = []
    for i, correct in enumerate(right):
        target = LABELS[i % 3]
        row = {"id": f"{dataset}-{i}", "input": f"{prefix}Is <b>{i}</b> & {i}?", "target": target}
        rows.append(row | {"prediction": target if correct else "<script>alert(1)</script>", "correct": correct})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "predictions" / f"{task}-test-{updates // 2}.jsonl").write_text(text)
    lines: list[dict] = []
    for step in range(20, updates + 1, 20):
        loss = 2 * math.exp(-step / 80) + 0.1 * seed
        line = {"kind": "train", "step": step, "loss": loss, "loss/label": loss, "seconds_per_step": 0.5}
        line["loss/rationale"] = 1.5 * loss if kind == "step_by_step" else 0.0
        lines.append(line)
        lines.append({"kind": "validation", "step": step, "accuracy": accuracy * (1 - math.exp(-step / 60))})
    lines.append({"kind": "test", "step": updates // 2, "accuracy": accuracy})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"label_source": label_source, "fraction": fraction, "seed": seed, "rationales": "all"}
    counts = {"label": math.ceil(720 * fraction), "rationale_then_label": math.ceil(700 * fraction)}
    manifest = {
        "git_revision": "0123456789abcdef",
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "data": {
            "dataset": dataset,
            "options": options | {"records_dir": records_dir, "label_prefix": prefix},
            "splits": {
                "train": {"file": "train.jsonl", "sha256": "aa" * 32, "counts": counts},
                "test": {"file": "test.jsonl", "sha256": "bb" * 32, "counts": {"label": len(right)}},
            },
        },
        "run": {"mixture_or_task_name": f"{dataset}_{kind}"},
        "devices": ["cpu:0"],
        "parameter_count": 1_234_567,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "config.gin").write_text("BATCH_SIZE = @train.rows_per_update()\nEXAMPLES = 16\nPACK = False\n")
    return path


def answers(share: float, *, rows: int = 300, seed: int, difficulty: int = 0) -> list[bool]:
    """Right and wrong answers; rows are easy or hard for every student alike."""
    hard = np.random.default_rng(difficulty).random(rows)
    noise = np.random.default_rng(seed).normal(0, 0.12, rows)
    return [bool(x) for x in hard + noise < share]


def experiment(root: Path, shares: dict[str, dict[float, float]], *, seeds: int = 3, **options) -> list[Run]:
    """Runs of several kinds: {"label": {0.25: 0.5}} is standard fine-tuning right on about half, at 25 %."""
    runs = []
    for number, (kind, of_fraction) in enumerate(shares.items()):
        for fraction, share in of_fraction.items():
            for seed in range(seeds):
                path = root / f"{kind}-{fraction:g}-{seed}"
                right = answers(share + 0.015 * (seed % 3 - 1), seed=1000 * number + 10 * seed + round(100 * fraction))
                write_run(path, kind=kind, right=right, fraction=fraction, seed=seed, **options)
                runs.append(report.identify(path))
    return runs
