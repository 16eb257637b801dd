"""Precision, recall, F1 and confusions of a student's answers, for datasets with a closed set of labels."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Label:
    """One label's rows and scores in percent; None where nothing is divided."""

    label: str
    rows: int  # that have this label
    predicted: int  # for which it was predicted
    right: int
    precision: float | None  # right / predicted
    recall: float | None  # right / rows
    f1: float | None  # 2 right / (rows + predicted)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Answers by label."""

    labels: tuple[Label, ...]  # in the order of the set
    confusion: Mapping[str, Mapping[str | None, int]]  # target -> prediction -> rows; None: outside of the set
    rows: int

    @property
    def outside(self) -> int:
        """Rows whose prediction is outside of the set."""
        return sum(row[None] for row in self.confusion.values())

    @property
    def macro_f1(self) -> float:
        """Mean F1 in percent over the labels that are the target or the prediction of some row.

        Predictions outside of the set lower the recall of their targets and are no class of their own.
        """
        return statistics.fmean(each.f1 for each in self.labels if each.f1 is not None)

    def described(self) -> dict[str, Any]:
        """Describes everything as JSON; predictions outside of the set are counted as "outside_of_the_set"."""
        return {
            "macro_f1": self.macro_f1,
            "outside_of_the_set": self.outside,
            "labels": {each.label: {**vars(each)} for each in self.labels},
            "confusion": {
                target: {label: count for label, count in row.items() if label is not None and count}
                for target, row in self.confusion.items()
            },
        }


def of_answers(answers: Iterable[tuple[str, str]], labels: Sequence[str]) -> Labels | None:
    """Counts (target, prediction) pairs by label.

    None if there is no pair, or a target is outside of the set: then the set is not that of these rows.

    >>> found = of_answers([("a", "a"), ("a", "b"), ("b", "b"), ("b", "?")], ["a", "b"])
    >>> [(each.label, each.precision, each.recall) for each in found.labels], found.outside
    ([('a', 100.0, 50.0), ('b', 50.0, 50.0)], 1)
    """
    known = set(labels)
    pairs = Counter((target, prediction if prediction in known else None) for target, prediction in answers)
    if not pairs or not known >= {target for target, _ in pairs}:
        return None
    confusion = {target: {each: pairs[target, each] for each in (*labels, None)} for target in labels}
    found = []
    for label in labels:
        rows, predicted = sum(confusion[label].values()), sum(row[label] for row in confusion.values())
        right = confusion[label][label]
        found.append(
            Label(
                label=label,
                rows=rows,
                predicted=predicted,
                right=right,
                precision=100.0 * right / predicted if predicted else None,
                recall=100.0 * right / rows if rows else None,
                f1=200.0 * right / (rows + predicted) if rows + predicted else None,
            )
        )
    return Labels(labels=tuple(found), confusion=confusion, rows=pairs.total())
