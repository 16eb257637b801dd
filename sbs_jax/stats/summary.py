"""Runs to numbers: test accuracies with intervals, differences between methods, reference lines.

Accuracies are percentages and differences are points.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sbs_jax.stats import teacher
from sbs_jax.stats.intervals import accuracy_interval, difference_interval, difference_p, holm, mcnemar
from sbs_jax.stats.results import DISTILLATION, FINE_TUNING, METHODS, TEACHER_LABELS, Result, Run, load


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
        return self.results[0].updates

    @property
    def label_rows(self) -> int:
        return round(float(np.mean([result.label_rows for result in self.results])))

    @property
    def label_examples_seen(self) -> int | None:
        per_update = self.results[0].examples_per_update
        return None if per_update is None else per_update * self.updates

    @property
    def train_seconds(self) -> float:
        """Mean over the seeds."""
        return float(np.mean([result.train_seconds for result in self.results]))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`method` minus `reference` at one fraction, in points, paired by seed and by test row, with 95 % interval.

    `p` is of the paired test that the interval belongs to; `ours`, `theirs` and `mcnemar_p` are of McNemar's exact
    test (intervals.py). The two `.._holm` are corrected for the number of comparisons that are looked at together.
    """

    method: str
    reference: str
    fraction: float
    seeds: tuple[int, ...]  # those that both have
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
        """ "ahead" or "behind" where the interval leaves out 0, else "no difference shown"."""
        if self.low > 0:
            return "ahead"
        return "behind" if self.high < 0 else "no difference shown"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything a table or a page says about some runs."""

    dataset: str
    parameters: int | None  # of the student; None where the runs do not tell, or are not alike
    metric: str
    test_rows: int
    groups: tuple[Group, ...]  # by method, then fraction
    comparisons: tuple[Comparison, ...]
    teacher_accuracy: float | None  # on the test rows; None where the records are not at hand
    majority_accuracy: float | None  # of always giving the most frequent label of the test rows
    majority_label: str | None
    cautions: tuple[str, ...]  # what is not alike between the runs

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group.method for group in self.groups))

    @property
    def fractions(self) -> tuple[float, ...]:
        return tuple(sorted({group.fraction for group in self.groups}))

    def group(self, method: str, fraction: float) -> Group | None:
        return next((g for g in self.groups if (g.method, g.fraction) == (method, fraction)), None)

    def most_data(self, method: str) -> Group | None:
        """The group of a method with the largest share of the data."""
        return next((g for g in reversed(self.groups) if g.method == method), None)


def summarize(runs: Sequence[Run], *, teacher_accuracy: float | None = None) -> Summary:
    """Accuracy per method and fraction, differences between methods at each fraction, and reference lines.

    Without `teacher_accuracy` it is taken from the records that the runs used, if those are still in place. Each
    method is compared with standard fine-tuning, or with standard distillation where it learned from the teacher's
    labels; methods that the caller named are compared with the first one given when none is a standard one.

    All runs must be of one dataset and answer the same test rows; the seeds of one group must have made equally many
    updates. What else differs is listed under `cautions`.
    """
    return of_results([load(run) for run in runs], teacher_accuracy=teacher_accuracy)


def of_results(results: Sequence[Result], *, teacher_accuracy: float | None = None) -> Summary:
    """`summarize` of runs that were read already."""
    if not results:
        raise ValueError("Got no runs to report on; name at least one run directory.")
    check_comparable(results)
    runs = [result.run for result in results]
    methods = sorted(dict.fromkeys(run.method for run in runs), key=_place)
    groups = []
    for method in methods:
        for fraction in sorted({run.fraction for run in runs if run.method == method}):
            of_group = [r for r in results if (r.run.method, r.run.fraction) == (method, fraction)]
            groups.append(_group(method, fraction, sorted(of_group, key=lambda r: r.run.seed)))
    majority = _majority(results[0])
    sizes = {result.manifest.get("parameter_count") for result in results}
    return Summary(
        dataset=results[0].manifest["data"]["dataset"],
        parameters=next(iter(sizes)) if len(sizes) == 1 else None,
        metric=results[0].metric,
        test_rows=len(results[0].test_rows),
        groups=tuple(groups),
        comparisons=tuple(corrected(_comparisons(groups, methods))),
        teacher_accuracy=_teacher_accuracy(results[0]) if teacher_accuracy is None else teacher_accuracy,
        majority_accuracy=majority and majority[1],
        majority_label=majority and majority[0],
        cautions=tuple(_cautions(groups, results)),
    )


def _group(method: str, fraction: float, results: Sequence[Result]) -> Group:
    seeds = [result.run.seed for result in results]
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed, count in Counter(seeds).items() if count > 1)
        paths = " and ".join(str(result.run.path) for result in results if result.run.seed == twice)
        raise ValueError(
            f"{paths} are both {method} at fraction {fraction:g} with seed {twice}; a table has one "
            "run of each. Give only one of them, by its own path and not by a folder that holds both; or write two "
            "reports (--output), if they differ in what a table does not tell apart."
        )
    updates = {result.updates: result.run.path for result in results}
    if len(updates) > 1:
        found = ", ".join(f"{count} in {path}" for count, path in updates.items())
        raise ValueError(
            f"The seeds of {method} at fraction {fraction:g} differ in their number of updates ({found}); finish or "
            "leave out the short ones."
        )
    accuracy, low, high = accuracy_interval(np.stack([_correct(result, list(result.test_rows)) for result in results]))
    return Group(
        method=method,
        fraction=fraction,
        results=tuple(results),
        accuracy=accuracy,
        low=low,
        high=high,
    )


def _correct(result: Result, ids: Sequence[str]) -> np.ndarray:
    return np.array([float(result.test_rows[i]["correct"]) for i in ids])


def _comparisons(groups: Sequence[Group], methods: Sequence[str]) -> list[Comparison]:
    found = []
    for method in methods:
        reference = _reference(method, methods)
        for ours in (group for group in groups if group.method == method):
            theirs = [g for g in groups if (g.method, g.fraction) == (reference, ours.fraction)]
            seeds = tuple(seed for seed in ours.seeds if theirs and seed in theirs[0].seeds)
            if not seeds:
                continue
            ids = list(ours.results[0].test_rows)
            table = [
                [_correct(result, ids) for result in group.results if result.run.seed in seeds]
                for group in (ours, theirs[0])
            ]
            points_SN = 100 * (np.array(table[0]) - np.array(table[1]))
            difference, low, high = difference_interval(points_SN)
            p = difference_p(points_SN)
            right, wrong, exact = mcnemar(points_SN)
            found.append(
                Comparison(
                    method=method,
                    reference=theirs[0].method,
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
            )
    return found


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, their p values corrected for each other's number (Holm)."""
    ps, exact = holm([c.p for c in comparisons]), holm([c.mcnemar_p for c in comparisons])
    return [
        dataclasses.replace(c, p_holm=p, mcnemar_holm=other) for c, p, other in zip(comparisons, ps, exact, strict=True)
    ]


def _reference(method: str, methods: Sequence[str]) -> str | None:
    """What a method is measured against: the standard one, of the same settings where there are several."""
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


def _of_data(remark: str) -> bool:
    """Whether a remark in a method's name is of the data it learned from, which the standard methods have not."""
    return remark == TEACHER_LABELS or remark.endswith(" rationales")


def _place(method: str) -> int:
    """The order of the methods: standard ones first, unknown ones last, in the order given."""
    base = method.partition(" (")[0]
    return 2 * METHODS.index(base) + (base != method) if base in METHODS else 2 * len(METHODS)


def check_comparable(results: Sequence[Result]) -> None:
    """ValueError where runs are not of one dataset, its test rows and its metric."""
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
                "same; their accuracies do not compare. Train them on the same records."
            )
        if first.metric != other.metric:
            raise ValueError(
                f"{first.run.path} is graded by {first.metric} and {other.run.path} by {other.metric}; train them with "
                "one version of the dataset."
            )


def _majority(result: Result) -> tuple[str, float] | None:
    """(label, accuracy) of always giving the most frequent label; None where labels are open (over a tenth distinct).

    The frequencies are those of the test rows, so no constant answer can score more.
    """
    counts = Counter(row["target"] for row in result.test_rows.values() if "target" in row)
    if not counts or 10 * len(counts) > len(result.test_rows):
        return None
    label, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return label, 100.0 * count / len(result.test_rows)


def _teacher_accuracy(result: Result) -> float | None:
    """The teacher's accuracy on the test rows, from the manifest of the records, if that is of the same file."""
    found = teacher.read(result.manifest)
    return None if found is None or "test" not in found.splits else found.splits["test"].accuracy


def _cautions(groups: Sequence[Group], results: Sequence[Result]) -> list[str]:
    """What is not alike between the methods of a fraction, or between the runs, in sentences."""
    found = []
    for fraction in sorted({group.fraction for group in groups}):
        alike = [group for group in groups if group.fraction == fraction]
        for what, values in (
            ("updates", {group.method: group.updates for group in alike}),
            ("label examples seen in training", {group.method: group.label_examples_seen for group in alike}),
        ):
            if len(set(values.values())) > 1:
                numbers = ", ".join(f"{method} {_count(value)}" for method, value in values.items())
                found.append(f"At {100 * fraction:g} % of the data the methods differ in {what}: {numbers}.")
    for what, values in (
        ("students of different sizes", {_count(r.manifest.get("parameter_count")) for r in results}),
        ("code of different revisions", {str(r.manifest.get("git_revision")) for r in results}),
        ("different test files", {r.manifest["data"]["splits"]["test"]["sha256"][:12] for r in results}),
        ("different training files", {r.manifest["data"]["splits"]["train"]["sha256"][:12] for r in results}),
    ):
        if len(values) > 1:
            found.append(f"The runs used {what}: {', '.join(sorted(values))}.")
    return found


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"
