"""Run directories as `sbs train` leaves them, with chosen answers, for tests of reports."""

import json
import math
from pathlib import Path

import numpy as np

from sbs_jax.data.dataset import MIXTURES, tasks_of
from sbs_jax.pages import report
from sbs_jax.pages.report import Run

LABELS = ("entailment", "neutral", "contradiction")


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
    parameters: int = 1_234_567,
    manifest_of: dict | None = None,
    text: str = "",
) -> Path:
    """Writes a run directory as `sbs train` leaves it, with these test answers right.

    `manifest_of` overrides fields of the manifest; `text` is appended to every input.
    """
    right = [i % 2 == 0 for i in range(40)] if right is None else right
    accuracy = 100.0 * sum(right) / len(right)
    (path / "predictions").mkdir(parents=True)
    task = f"{dataset}_{tasks_of(kind)[0]}"
    prefix = "predict: " if kind in MIXTURES else ""
    rows = []
    for i, correct in enumerate(right):
        target = LABELS[i % 3]
        row = {"id": f"{dataset}-{i}", "input": f"{prefix}Is <b>{i}</b> & {i}?{text}", "target": target}
        rows.append(row | {"prediction": target if correct else "<script>alert(1)</script>", "correct": correct})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "predictions" / f"{task}-test-{updates // 2}.jsonl").write_text(text)
    lines: list[dict] = []
    for step in range(20, updates + 1, 20):
        loss = 2 * math.exp(-step / 80) + 0.1 * seed
        line = {"kind": "train", "step": step, "loss": loss, "loss/label": loss, "seconds_per_step": 0.5}
        line["loss/rationale"] = 1.5 * loss if kind in MIXTURES else 0.0
        lines.append(line)
        lines.append({"kind": "validation", "step": step, "accuracy": accuracy * (1 - math.exp(-step / 60))})
    lines.append({"kind": "test", "step": updates // 2, "accuracy": accuracy})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"label_source": label_source, "fraction": fraction, "seed": seed, "rationales": "all"}
    both = math.ceil(700 * fraction)
    counts = {"label": math.ceil(720 * fraction), "rationale_then_label": both, "label_given_rationale": both}
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
        "parameter_count": parameters,
    }
    (path / "manifest.json").write_text(json.dumps(manifest | (manifest_of or {})))
    (path / "config.gin").write_text("BATCH_SIZE = @train.rows_per_update()\nEXAMPLES = 16\nPACK = False\n")
    return path


def answers(share: float, *, rows: int = 300, seed: int, difficulty: int = 0) -> list[bool]:
    """Draws right and wrong answers; rows are easy or hard for all students alike."""
    hard = np.random.default_rng(difficulty).random(rows)
    noise = np.random.default_rng(seed).normal(0, 0.12, rows)
    return [bool(x) for x in hard + noise < share]


def of(root: Path, **right_of_kind: list[bool]) -> list[Run]:
    """Writes one run of each kind with these answers."""
    return [report.identify(write_run(root / kind, kind=kind, right=right)) for kind, right in right_of_kind.items()]


def some(right: int, rows: int = 100) -> list[bool]:
    return [i < right for i in range(rows)]


MEASURED = {
    "version": 1,
    "dataset": "toy",
    "step": 100,
    "split": "test",
    "rows": 2,
    "consistency": {"by_parser": 0.5, "by_parser_rows": 2, "by_label_task": None},
    "overlap_with_teacher": {"rouge_l": 0.25, "chrf": None},
    "length": {"student_words": 12.5, "teacher_words": 20.0},
    "examples_file": "rationales.jsonl",
}


EXAMPLES = [
    {"id": "toy-0", "rationale": "It is so.", "implied_label": "neutral", "prediction": "entailment"}
    | {"consistent": False, "teacher_rationale": "The teacher's words.", "rouge_l": 0.25},
    {"id": "toy-1", "rationale": "<i>It</i> is not.", "implied_label": None, "prediction": "neutral"}
    | {"consistent": None, "teacher_rationale": None, "rouge_l": None},
]


def write_rationales(run: Path, measured: object = MEASURED, examples: list = EXAMPLES) -> Path:
    (run / "rationales.json").write_text(json.dumps(measured))
    (run / "rationales.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    return run
