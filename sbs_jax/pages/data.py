"""The numbers of a page in full, for CSV files: every number that a plot or table shows is in one of them."""

from collections.abc import Iterator
from typing import Any

from sbs_jax.pages.files import Files
from sbs_jax.stats import quality
from sbs_jax.stats.costs import cost
from sbs_jax.stats.study import Study, paper_accuracy, teacher_of


def add(files: Files, study: Study) -> None:
    """Puts the tables of a study among the files of its page."""
    files.table(
        "accuracy",
        ["dataset", "parameters", "method", "fraction", "label_rows", "seeds", "accuracy", "low", "high", "test_rows",
         "updates", "label_examples_seen", "paper"],
        _accuracies(study),
    )  # fmt: skip
    files.table(
        "comparisons",
        ["dataset", "parameters", "method", "reference", "fraction", "seeds", "points", "low", "high", "p", "p_holm",
         "only_ours_right", "only_theirs_right", "mcnemar_p", "mcnemar_p_holm", "verdict"],
        (
            [s.dataset, s.parameters, c.method, c.reference, c.fraction, len(c.seeds), c.difference, c.low, c.high, c.p,
             c.p_holm, c.ours, c.theirs, c.mcnemar_p, c.mcnemar_holm, c.verdict]
            for s in study.summaries
            for c in s.comparisons
        ),
    )  # fmt: skip
    files.table(
        "runs",
        ["dataset", "parameters", "method", "fraction", "seed", "accuracy", "tested_step", "updates", "train_seconds",
         "directory"],
        (
            [s.dataset, s.parameters, g.method, g.fraction, r.run.seed, r.accuracy, r.test_step, r.updates,
             r.train_seconds, str(r.run.path)]
            for s, g in study.groups()
            for r in g.results
        ),
    )  # fmt: skip
    files.table(
        "curves",
        ["dataset", "parameters", "method", "fraction", "seed", "kind", "name", "step", "value"],
        _curves(study),
    )
    files.table(
        "costs",
        ["dataset", "parameters", "method", "fraction", "devices", "device_hours", "training_flops",
         "teacher_parameters", "accuracy"],
        _costs(study),
    )  # fmt: skip
    files.table(
        "teacher",
        ["dataset", "split", "teacher", "rows", "labelled", "accuracy", "usable_labels", "right", "usable_rationales",
         "for_another_label", *(f"outcome_{name}" for name in _outcomes(study))],
        _teachers(study),
    )  # fmt: skip
    files.table(
        "rationales",
        ["dataset", "parameters", "method", "fraction", "seed", "step", "rows", *quality.NAMES],
        (
            [s.dataset, s.parameters, g.method, g.fraction, r.run.seed, r.quality.step, r.quality.rows,
             *r.quality.values.values()]
            for s, g in study.groups()
            for r in g.results
            if r.quality
        ),
    )  # fmt: skip


def _accuracies(study: Study) -> Iterator[list[Any]]:
    for s, g in study.groups():
        yield [
            *(s.dataset, s.parameters, g.method, g.fraction, g.label_rows, len(g.seeds), g.accuracy, g.low, g.high),
            *(s.test_rows, g.updates, g.label_examples_seen, paper_accuracy(s, g)),
        ]


def _curves(study: Study) -> Iterator[list[Any]]:
    for s, g in study.groups():
        for r in g.results:
            for kind, name in (("validation", s.metric), ("train", "loss/label"), ("train", "loss/rationale")):
                for step, value in r.curve(kind, name):
                    yield [s.dataset, s.parameters, g.method, g.fraction, r.run.seed, kind, name, step, value]


def _costs(study: Study) -> Iterator[list[Any]]:
    for s in study.summaries:
        teacher = teacher_of(s)
        for g in s.groups:
            c = cost(g)
            yield [
                *(s.dataset, c.parameters, g.method, g.fraction, c.devices, c.device_hours, c.training_flops),
                *(teacher.parameters if teacher else None, g.accuracy),
            ]


def _teachers(study: Study) -> Iterator[list[Any]]:
    for dataset in study.datasets:
        teacher = teacher_of(study.of(dataset)[0])
        for name, split in teacher.splits.items() if teacher else ():
            yield [
                *(dataset, name, teacher.name if teacher else None, split.rows, split.labelled, split.accuracy),
                *(split.labels, split.right, split.rationales, split.other_label),
                *(split.outcomes.get(outcome, 0) for outcome in _outcomes(study)),
            ]


def _outcomes(study: Study) -> list[str]:
    found = (teacher_of(study.of(dataset)[0]) for dataset in study.datasets)
    return sorted({outcome for t in found if t for split in t.splits.values() for outcome in split.outcomes})
