"""Files beside a page: its plots as SVG, and every number that it shows, in full, as CSV."""

import io
import os
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.pages.canvas import standalone
from sbs_jax.run.directory import TIME_PARTS
from sbs_jax.stats import quality
from sbs_jax.stats.costs import cost
from sbs_jax.stats.study import Study, paper_accuracy, teacher_of
from sbs_jax.storage import atomic, tables, user_files

_INDEX = "files.txt"  # names the files of a report, so that the next report can remove them
_ALWAYS = "accuracy.csv"  # every report has it


class Downloads:
    """Collector of a page's files, which are written together. Without a folder nothing is written or linked."""

    def __init__(self, folder: Path | None, *, page: Path) -> None:
        self._folder, self._page = folder, page
        self._contents: dict[str, str] = {}
        self._before = [] if folder is None or not folder.is_dir() else _listed(folder)

    def plot(self, name: str, svg: str) -> None:
        """Adds `<name>.svg`, given a plot as the page holds it."""
        if self._folder is not None:
            self._contents[f"{name}.svg"] = standalone(svg)

    def table(self, name: str, header: str, rows: Iterable[Sequence[Any]], *, more_columns: Iterable[str] = ()) -> None:
        """Adds `<name>.csv`; `header` names its columns, None is an empty cell, numbers are written in full."""
        buffer = io.StringIO()
        tables.write(buffer, [[*header.split(), *more_columns], *rows], end="\n")
        self._contents[f"{name}.csv"] = buffer.getvalue()

    def links(self, *names: str) -> list[tuple[str, str]]:
        """Returns (address as seen from the page, name) of some files; nothing without a folder."""
        if self._folder is None:
            return []
        folder = urllib.parse.quote(os.path.relpath(str(self._folder), str(self._page.parent)).replace(os.sep, "/"))
        return [(f"{folder}/{name}", name) for name in names]

    def write(self) -> None:
        """Writes all files, and removes those of an earlier report that this one does not have."""
        if self._folder is None:
            return
        foreign = [name for name in self._contents if (self._folder / name).exists() and name not in self._before]
        if foreign:
            raise FileExistsError(f"{self._folder / foreign[0]} was written by no report; move it elsewhere.")
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in self._before:
            if name not in self._contents:
                (self._folder / name).unlink(missing_ok=True)
        # The index is written first, so that an interrupted report can be repeated.
        index = "".join(f"{name}\n" for name in sorted(self._contents))
        atomic.replace(self._folder / _INDEX, index.encode(), ours=False)
        for name, content in self._contents.items():
            atomic.replace(self._folder / name, content.encode(), ours=False)


def _listed(folder: Path) -> list[str]:
    """Returns the files of the report that a folder holds. FileExistsError if it holds anything else."""
    index = folder / _INDEX
    names = user_files.whole(index).decode("utf-8", "replace").splitlines() if index.is_file() else []
    ours = _ALWAYS in names and all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*\.(svg|csv)", name) for name in names)
    if not ours and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds files that no report wrote (it has no {_INDEX} of a report); expected a folder for the "
            "plots and tables of this page alone. Choose another one with --assets."
        )
    return names


def add_tables(downloads: Downloads, study: Study) -> None:
    """Adds the numbers of a study."""
    groups, datasets = list(study.groups()), study.datasets
    runs = [([s.dataset, s.parameters, g.method, g.fraction, r.run.seed], s, r) for s, g in groups for r in g.results]
    of_run = "dataset parameters method fraction seed"
    downloads.table(
        "accuracy",
        "dataset parameters method fraction label_rows seeds accuracy low high test_rows updates label_examples_seen "
        "paper",
        (
            [
                *(s.dataset, s.parameters, g.method, g.fraction, g.label_rows, len(g.seeds), g.accuracy, g.low, g.high),
                *(s.test_rows, g.updates, g.label_examples_seen, paper_accuracy(s, g)),
            ]
            for s, g in groups
        ),
    )
    downloads.table(
        "comparisons",
        "dataset parameters method reference fraction seeds points low high p p_holm only_ours_right only_theirs_right "
        "mcnemar_p mcnemar_p_holm verdict",
        (
            [
                *(
                    s.dataset,
                    s.parameters,
                    c.method,
                    c.reference,
                    c.fraction,
                    len(c.seeds),
                    c.difference,
                    c.low,
                    c.high,
                ),
                *(c.p, c.p_holm, c.ours, c.theirs, c.mcnemar_p, c.mcnemar_holm, c.verdict),
            ]
            for s in study.summaries
            for c in s.comparisons
        ),
    )
    downloads.table(
        "runs",
        f"{of_run} accuracy tested_step updates train_seconds directory",
        (
            [*run, r.accuracy, r.test_step, r.updates, r.train_seconds, str(r.run.path)]
            for run, _, joined in runs
            for r in joined.runs
        ),
    )
    downloads.table(
        "curves",
        f"{of_run} kind name step value",
        (
            [*run, kind, name, step, value]
            for run, s, r in runs
            for kind, name in (("validation", s.metric), ("train", "loss/label"), ("train", "loss/rationale"))
            for step, value in r.curve(kind, name)
        ),
    )
    downloads.table(
        "costs",
        "dataset parameters method fraction devices device_hours training_flops teacher_parameters accuracy "
        f"tokens_per_second_per_device utilisation goodput {' '.join(f'share_{part}' for part in TIME_PARTS[1:])}",
        (
            [
                *(s.dataset, c.parameters, g.method, g.fraction, c.devices, c.device_hours, c.training_flops),
                *(teacher.parameters if (teacher := teacher_of(s)) else None, g.accuracy, c.tokens, c.utilisation),
                *(c.goodput, *(c.rest.get(part) for part in TIME_PARTS[1:])),
            ]
            for s, g in groups
            for c in [cost(g)]
        ),
    )
    found = [(dataset, teacher) for dataset in datasets if (teacher := teacher_of(study.of(dataset)[0]))]
    outcomes = sorted({outcome for _, teacher in found for s in teacher.splits.values() for outcome in s.outcomes})
    downloads.table(
        "teacher",
        "dataset split teacher rows labelled accuracy usable_labels right usable_rationales for_another_label",
        (
            [
                *(
                    dataset,
                    name,
                    teacher.name,
                    s.rows,
                    s.labelled,
                    s.teacher_accuracy,
                    s.teacher_labels,
                    s.teacher_right,
                    s.rationales,
                ),
                *(s.other_label, *(s.outcomes.get(outcome, 0) for outcome in outcomes)),
            ]
            for dataset, teacher in found
            for name, s in teacher.splits.items()
        ),
        more_columns=[f"outcome_{outcome}" for outcome in outcomes],
    )
    downloads.table(
        "rationales",
        f"{of_run} step rows {' '.join(quality.NAMES)}",
        ([*run, r.quality.step, r.quality.rows, *r.quality.values.values()] for run, _, r in runs if r.quality),
    )
    by_label = [([s.dataset, s.parameters, g.method, g.fraction], found) for s, g in groups if (found := g.by_label)]
    if not by_label:
        return
    downloads.table(
        "labels",
        "dataset parameters method fraction label rows predicted right precision recall f1",
        ([*group, *vars(each).values()] for group, found in by_label for each in found.labels),
    )
    downloads.table(
        "confusions",
        "dataset parameters method fraction label prediction rows",
        (
            [*group, label, prediction, rows]
            for group, found in by_label
            for label, row in found.confusion.items()
            for prediction, rows in row.items()
            if rows
        ),
    )
