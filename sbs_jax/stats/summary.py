"""Summary of one dataset's runs: test accuracies with intervals, differences between methods, reference lines.

Accuracies are percentages and differences are points.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sbs_jax.stats import baselines, teacher
from sbs_jax.stats.baselines import Baseline
from sbs_jax.stats.formats import percent
from sbs_jax.stats.intervals import accuracy_interval, difference_interval, difference_p, holm, mcnemar
from sbs_jax.stats.labels import Labels, of_answers
from sbs_jax.stats.results import (
    ADDITIONS,
    CASCADE,
    DISTILLATION,
    FINE_TUNING,
    METHODS,
    STEP_BY_STEP,
    TEACHER_LABELS,
    Result,
    Run,
    join_folds,
    load,
)

# Verdict with one seed: two students differ. Seeds of one method differ as well, which the interval does not cover.
DIFFER = "these two differ"


@dataclass(frozen=True, kw_only=True)
class Group:
    """The seeds of one method at one fraction. `low` and `high` bound the 95 % interval of the accuracy."""

    method: str
    fraction: float
    results: tuple[Result, ...]  # by seed
    accuracy: float
    low: float
    high: float

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(result.run.seed for result in self.results)

    @property
    def accuracies(self) -> tuple[float, ...]:
        return tuple(result.accuracy for result in self.results)

    @property
    def updates(self) -> int:
        """Mean over the seeds, which differ only with early stopping."""
        return round(float(np.mean([result.updates for result in self.results])))

    @property
    def label_rows(self) -> int:
        return round(float(np.mean([result.label_rows for result in self.results])))

    @property
    def label_examples_seen(self) -> int | None:
        per_update = self.results[0].examples_per_update
        return None if per_update is None else per_update * self.updates

    @property
    def further(self) -> dict[str, tuple[float, float, float]]:
        """Means in percent of the metrics besides the accuracy, by name, each with its 95 % interval."""
        ids = list(self.results[0].test_rows)
        scores = [[result.test_rows[i].get("scores", {}) for i in ids] for result in self.results]
        names = [name for name in scores[0][0] if all(name in row for of_seed in scores for row in of_seed)]
        return {
            name: accuracy_interval(np.array([[row[name] for row in of_seed] for of_seed in scores])) for name in names
        }

    @property
    def by_label(self) -> Labels | None:
        """Answers by label, those of all seeds together; None without a closed set of labels."""
        known = self.results[0].labels
        rows = [row for result in self.results for row in result.test_rows.values()]
        if known is None or not all("target" in row and "prediction" in row for row in rows):
            return None
        return of_answers(((row["target"], row["prediction"]) for row in rows), known)

    @property
    def train_seconds(self) -> float:
        """Mean over the seeds."""
        return float(np.mean([result.train_seconds for result in self.results]))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`method` minus `reference` at one fraction, in points, paired by seed and by test row, with 95 % interval.

    `p` belongs to the paired test of the interval; `ours`, `theirs` and `mcnemar_p` belong to McNemar's exact test
    (intervals.py). The two `.._holm` are corrected for the number of comparisons made together.
    """

    method: str
    reference: str
    fraction: float
    seeds: tuple[int, ...]  # seeds that both methods have
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    ours: int  # test rows that `method` has right and `reference` has wrong
    theirs: int
    mcnemar_p: float
    mcnemar_holm: float

    @property
    def verdict(self) -> str:
        """ "ahead" or "behind" if the interval leaves out 0 (DIFFER with one seed), else "no difference shown"."""
        if self.low <= 0 <= self.high:
            return "no difference shown"
        if len(self.seeds) == 1:
            return DIFFER
        return "ahead" if self.low > 0 else "behind"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Numbers of one dataset and one size of student."""

    dataset: str
    parameters: int | None  # of the student; None if the runs do not say, or differ
    metric: str
    test_rows: int
    folds: int  # in which they were tested; 0: by one student
    groups: tuple[Group, ...]  # by method, then fraction
    comparisons: tuple[Comparison, ...]
    teacher_accuracy: float | None  # on the test rows; None without the records
    majority_accuracy: float | None  # of always giving the most frequent label of the test rows
    majority_label: str | None
    baselines: Mapping[str, Baseline]  # of models without a student (baselines.py), if they were measured
    cautions: tuple[str, ...]  # differences between the runs besides the method

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group.method for group in self.groups))

    @property
    def fractions(self) -> tuple[float, ...]:
        return tuple(sorted({group.fraction for group in self.groups}))

    def group(self, method: str, fraction: float) -> Group | None:
        return next((g for g in self.groups if (g.method, g.fraction) == (method, fraction)), None)

    def most_data(self, method: str) -> Group | None:
        """Returns the group of a method with the largest share of the data."""
        return next((g for g in reversed(self.groups) if g.method == method), None)


def summarize(runs: Sequence[Run], *, teacher_accuracy: float | None = None) -> Summary:
    """Computes accuracies per method and fraction, differences between methods, and reference lines.

    Without `teacher_accuracy` it is taken from the records that the runs used, if those are still in place. Each
    method is compared with standard fine-tuning, or with standard distillation if it learned from the teacher's
    labels; methods that the caller named are compared with the first one given if none is a standard one.

    All runs must be of one dataset and answer the same test rows; the seeds of one group must have made equally many
    updates. Other differences are listed under `cautions`.
    """
    joined, incomplete = join_folds([load(run) for run in runs])
    found = of_results(joined, teacher_accuracy=teacher_accuracy)
    return dataclasses.replace(found, cautions=(*found.cautions, *incomplete))


def of_results(results: Sequence[Result], *, teacher_accuracy: float | None = None) -> Summary:
    """Summarizes results that are already read."""
    if not results:
        raise ValueError("Got no runs to report on; name at least one run directory.")
    check_comparable(results)
    first, methods = results[0], sorted(dict.fromkeys(result.run.method for result in results), key=_place)
    cells: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        cells.setdefault((result.run.method, result.run.fraction), []).append(result)
    ordered = sorted(cells, key=lambda cell: (methods.index(cell[0]), cell[1]))
    groups = [_group(method, fraction, cells[method, fraction]) for method, fraction in ordered]
    label, majority = most_frequent(first) or (None, None)
    measured = baselines.read(first.manifest)
    sizes = {result.manifest.get("parameter_count") for result in results}
    return Summary(
        dataset=first.manifest["data"]["dataset"],
        parameters=next(iter(sizes)) if len(sizes) == 1 else None,
        metric=first.metric,
        test_rows=len(first.test_rows),
        folds=len(first.folds),
        groups=tuple(groups),
        comparisons=tuple(corrected(_comparisons(groups, methods))),
        teacher_accuracy=_teacher_accuracy(first) if teacher_accuracy is None else teacher_accuracy,
        majority_accuracy=majority,
        majority_label=label,
        baselines=measured["models"] if measured else {},
        cautions=tuple(_cautions(groups, results)),
    )


def _group(method: str, fraction: float, results: Sequence[Result]) -> Group:
    results = sorted(results, key=lambda result: result.run.seed)
    for one, other in itertools.pairwise(results):
        if one.run.seed == other.run.seed:
            raise ValueError(
                f"{one.run.path} and {other.run.path} are both {method} at fraction {fraction:g} with seed "
                f"{one.run.seed}; expected one run of each. Give only one of them, by its own path, or write two "
                "reports (--output)."
            )
    updates = {result.updates: result.run.path for result in results}
    if len(updates) > 1 and not all(result.patient for result in results):
        found = ", ".join(f"{count} in {path}" for count, path in updates.items())
        raise ValueError(
            f"The seeds of {method} at fraction {fraction:g} differ in their number of updates ({found}). Finish or "
            "leave out the short ones."
        )
    ids = list(results[0].test_rows)
    accuracy, low, high = accuracy_interval(np.stack([_correct(result, ids) for result in results]))
    return Group(method=method, fraction=fraction, results=tuple(results), accuracy=accuracy, low=low, high=high)


def _correct(result: Result, ids: Sequence[str]) -> np.ndarray:
    return np.array([float(result.test_rows[i]["correct"]) for i in ids])


def _comparisons(groups: Sequence[Group], methods: Sequence[str]) -> list[Comparison]:
    by_cell = {(group.method, group.fraction): group for group in groups}
    found = []
    for reference in (_reference, _without_additions):
        for ours in groups:
            to = reference(ours.method, methods)
            if reference is not _reference and to == _reference(ours.method, methods):
                continue
            theirs = by_cell.get((to or "", ours.fraction))
            seeds = tuple(seed for seed in ours.seeds if theirs and seed in theirs.seeds)
            if theirs and seeds:
                found.append(_compare(ours, theirs, seeds=seeds))
    return found


def _compare(ours: Group, theirs: Group, *, seeds: tuple[int, ...]) -> Comparison:
    ids = list(ours.results[0].test_rows)
    ours_SN, theirs_SN = (
        np.array([_correct(result, ids) for result in group.results if result.run.seed in seeds])
        for group in (ours, theirs)
    )
    points_SN = 100 * (ours_SN - theirs_SN)
    difference, low, high = difference_interval(points_SN)
    p = difference_p(points_SN)
    right, wrong, exact = mcnemar(points_SN)
    return Comparison(
        method=ours.method,
        reference=theirs.method,
        fraction=ours.fraction,
        seeds=seeds,
        difference=difference,
        low=low,
        high=high,
        p=p,
        p_holm=p,
        ours=right,
        theirs=wrong,
        mcnemar_p=exact,
        mcnemar_holm=exact,
    )


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Corrects the p values for the number of comparisons (Holm)."""
    ps, exact = holm([c.p for c in comparisons]), holm([c.mcnemar_p for c in comparisons])
    return [
        dataclasses.replace(c, p_holm=p, mcnemar_holm=other) for c, p, other in zip(comparisons, ps, exact, strict=True)
    ]


def _reference(method: str, methods: Sequence[str]) -> str | None:
    """Returns the method to compare with: the standard one, of the same settings if there are several."""
    base, _, remarks = method.partition(" (")
    standard = DISTILLATION if TEACHER_LABELS in remarks else FINE_TUNING
    if base not in (FINE_TUNING, DISTILLATION):
        settings = [part for part in remarks.removesuffix(")").split(", ") if part and not _of_data(part)]
        for candidate in (f"{standard} ({', '.join(settings)})", standard):
            if candidate in methods:
                return candidate
    elif base == method:
        return None
    if FINE_TUNING in methods or DISTILLATION in methods:
        return standard if standard in methods else None
    return None if method == methods[0] else methods[0]


def _without_additions(method: str, methods: Sequence[str]) -> str | None:
    """Returns step-by-step of the same settings, for the cascade and for what adds to step-by-step; None for others."""
    base, _, remarks = method.partition(" (")
    kept = [part for part in remarks.removesuffix(")").split(", ") if part and not part.startswith(ADDITIONS)]
    plain = f"{STEP_BY_STEP} ({', '.join(kept)})" if kept else STEP_BY_STEP
    return plain if base in (STEP_BY_STEP, CASCADE) and plain != method and plain in methods else None


def _of_data(remark: str) -> bool:
    """Returns True if a remark in a method's name is about its data; the standard methods have no such remark."""
    return remark == TEACHER_LABELS or remark.endswith(" rationales")


def _place(method: str) -> int:
    """Orders the methods: standard ones first, unknown ones last, in the order given."""
    base = method.partition(" (")[0]
    return 2 * METHODS.index(base) + (base != method) if base in METHODS else 2 * len(METHODS)


def check_comparable(results: Sequence[Result]) -> None:
    """Raises ValueError unless all runs are of one dataset, its test rows and its metric."""
    first = results[0]
    for other in results[1:]:
        datasets = [r.manifest["data"]["dataset"] for r in (first, other)]
        if datasets[0] != datasets[1]:
            raise ValueError(
                f"{first.run.path} is about {datasets[0]} and {other.run.path} about {datasets[1]}; make one report "
                "per dataset."
            )
        if first.test_rows.keys() != other.test_rows.keys():
            raise ValueError(
                f"{first.run.path} was tested on {len(first.test_rows)} rows and {other.run.path} on "
                f"{len(other.test_rows)}, of which {len(first.test_rows.keys() & other.test_rows.keys())} are the "
                "same; expected the same rows. Train them on the same records, with the same FOLDS."
            )
        if first.metric != other.metric:
            raise ValueError(
                f"{first.run.path} is graded by {first.metric} and {other.run.path} by {other.metric}; train them with "
                "one version of the dataset."
            )


def most_frequent(result: Result) -> tuple[str, float] | None:
    """Returns the most frequent label and its accuracy; None if labels are open (over a tenth distinct).

    The frequencies are those of the test rows, so no constant answer can score more.
    """
    counts = Counter(row["target"] for row in result.test_rows.values() if "target" in row)
    if not counts or 10 * len(counts) > len(result.test_rows):
        return None
    label, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return label, 100.0 * count / len(result.test_rows)


def _teacher_accuracy(result: Result) -> float | None:
    """Reads the teacher's accuracy on the test rows from the records' manifest, if it is of the same file."""
    found = teacher.read(result.manifest)
    if not result.folds:
        return found.splits["test"].teacher_accuracy if found and "test" in found.splits else None
    splits = found.splits.values() if found else ()
    if not splits or any(each.teacher_accuracy is None or not each.labelled for each in splits):
        return None
    return 100.0 * sum(each.teacher_right for each in splits) / sum(each.labelled for each in splits)


def _cautions(groups: Sequence[Group], results: Sequence[Result]) -> list[str]:
    """Describes unequal conditions of the methods at a fraction, and of all runs, in sentences."""
    found = []
    for fraction in sorted({group.fraction for group in groups}):
        alike = [group for group in groups if group.fraction == fraction]
        for name, values in (
            ("updates", {group.method: group.updates for group in alike}),
            ("label examples seen in training", {group.method: group.label_examples_seen for group in alike}),
        ):
            if len(set(values.values())) > 1:
                numbers = ", ".join(f"{method} {_count(value)}" for method, value in values.items())
                found.append(f"At {percent(fraction)} of the data the methods differ in {name}: {numbers}.")
    runs = [run for result in results for run in result.runs]
    found += _memorized(runs)
    splits = [run.manifest["data"]["splits"] for run in runs]
    for name, values in (
        ("students of different sizes", {_count(r.manifest.get("parameter_count")) for r in runs}),
        ("code of different revisions", {str(r.manifest.get("git_revision")) for r in runs}),
        ("different test files", {_short(split["test"]["sha256"]) for split in splits}),
        ("different training files", {_short(split["train"]["sha256"]) for split in splits}),
    ):
        if len(values) > 1:
            found.append(f"The runs used {name}: {', '.join(sorted(values))}.")
    return found


def _memorized(runs: Sequence[Result]) -> list[str]:
    """Quotes the first run that has memorized its training rows, and counts the others."""
    found = [(run, text) for run in runs if run.ended and (text := run.ended.get("memorized"))]
    if not found:
        return []
    run, text = found[0]
    return [f"{len(found)} of {len(runs)} runs have memorized their training rows. The first, {run.run.path}: {text}"]


def _short(sha256: str) -> str:
    """Shortens the hashes of one or several files."""
    return " ".join(each[:12] for each in sha256.split())


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"
