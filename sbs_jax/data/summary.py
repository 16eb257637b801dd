"""Summary of parsed replies, the end of `sbs records` and `sbs teach`: outcomes, accuracy, what looks wrong.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Sequence

from sbs_jax import checks
from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.parsing import DROPPED, FAILURES, LETTER_TEXT_DISAGREEMENT, NOT_ASKED, OUTCOMES
from sbs_jax.data.records import NO_TEACHER, Counts, Record
from sbs_jax.storage.json_files import brief

log = logging.getLogger(__name__)

UNUSABLE = 0.3  # largest share of replies without a usable label that is not an alarm
SOME_UNUSABLE = 3  # exit status where the share is larger
_MEANINGS = {**OUTCOMES, **FAILURES, **DROPPED, NO_TEACHER: "the teacher was not asked"}
_UNASKED = (NO_TEACHER, NOT_ASKED)
_EXAMPLES, _CHARACTERS = 3, 300  # replies shown, and characters of each
_ENOUGH_ROWS = 20  # to judge an accuracy


def count(dataset: Dataset, rows: Sequence[Record]) -> Counts:
    """Counts outcomes and right labels."""
    labelled = sum(row.label is not None for row in rows)
    teacher_labels = sum(row.teacher_label is not None for row in rows)
    right = _right(dataset, rows, rows)
    return Counts(
        rows=len(rows),
        outcomes=dict(sorted(Counter(row.outcome for row in rows).items())),
        rationales=sum(row.rationale is not None for row in rows),
        teacher_labels=teacher_labels,
        labelled=labelled,
        teacher_right=right,
        teacher_accuracy=100.0 * right / labelled if labelled and teacher_labels else None,
    )


@dataclasses.dataclass
class Summary:
    """Summary of some splits, to `show` at the end.

    Attributes:
      unusable: largest share of a split's replies that may have no usable label.
      splits: a text per split.
      warnings: a sentence or two per doubt.
      status: exit status.
      asked: rows whose reply was asked for, of all splits.
      usable: those with a label of the teacher.
      labelled: rows with a human label.
      right: rows whose two labels are the same.
    """

    unusable: float = UNUSABLE
    splits: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    status: int = 0
    asked: int = 0
    usable: int = 0
    labelled: int = 0
    right: int = 0

    def __post_init__(self) -> None:
        checks.number("unusable", self.unusable, least=0, most=1)

    def add(self, dataset: Dataset, split: str, rows: Sequence[Record], counts: Counts, *, parser: str) -> None:
        """Adds a split."""
        chance = _chance(rows)
        lines = [f"{dataset.name} {split}: {_rows(counts['rows'])}, parser {parser}", *_outcomes(counts)]
        lines += [*_accuracy(counts, rows, chance), *_failures(rows)]
        self.splits.append("\n".join(lines))
        asked = counts["rows"] - sum(counts["outcomes"].get(outcome, 0) for outcome in _UNASKED)
        self.asked += asked
        self.usable += counts["teacher_labels"]
        self.labelled += counts["labelled"]
        self.right += counts["teacher_right"]
        impossible = dataset.impossible_labels(rows)
        unusable = asked - counts["teacher_labels"] + len(impossible)
        many = unusable > self.unusable * asked
        found = []
        if many:
            self.status = SOME_UNUSABLE
            found.append(
                f"{unusable:,} of {asked:,} asked rows ({_percent(unusable, asked)}) have no usable label, and the "
                f"limit is {100 * self.unusable:g} % (--unusable). {_others(dataset, rows, parser)}Compare the replies "
                "above with the prompt, and with the marker and the labels that the parser expects."
            )
        if impossible:
            worst = impossible[0]
            found.append(
                f"{len(impossible):,} of {counts['teacher_labels']:,} teacher labels are no possible label of their "
                f"row, such as {brief(worst.teacher_label)} of the row {brief(worst.id)}.{_MISALIGNED * many}"
            )
        if (disagreeing := counts["outcomes"].get(LETTER_TEXT_DISAGREEMENT, 0)) > self.unusable * asked:
            found.append(
                f"in {disagreeing:,} of {asked:,} replies the text after the choice's letter is not that choice's "
                f"text.{_MISALIGNED}"
            )
        found += _doubts(dataset, counts, rows, chance)
        self.warnings += [f"{dataset.name} {split}: {warning}" for warning in found]

    def show(self, *, command: str | None = None) -> int:
        """Logs everything, then the totals and the next command if there is one, and returns the exit status."""
        for text in self.splits:
            log.info("%s", text)
        for warning in self.warnings:
            log.warning("Warning: %s", warning)
        if command is not None:
            log.info("%s", "\n".join((*self.totals(), f"next: {command}")))
        return self.status

    def totals(self) -> tuple[str, str]:
        """Returns two lines: usable replies and right labels of all splits."""
        usable = f"{self.usable:,} of {_rows(self.asked)}"
        right = f"{self.right:,} of {_rows(self.labelled)}"
        return (
            f"usable: {usable} ({_percent(self.usable, self.asked)})"
            if self.asked
            else "usable: no row was asked about",
            f"right: {right} ({_percent(self.right, self.labelled)})"
            if self.labelled
            else "right: not known, the rows have no human labels",
        )


_MISALIGNED = " Do the replies belong to other rows? Reply i must answer input i."


def _outcomes(counts: Counts) -> list[str]:
    found = sorted(counts["outcomes"].items(), key=lambda item: (-item[1], item[0]))
    wide = max((len(outcome) for outcome, _ in found), default=0)
    return [
        f"  {outcome:{wide}} {number:9,}  {_percent(number, counts['rows']):>7}  {_MEANINGS.get(outcome, '')}".rstrip()
        for outcome, number in found
    ]


def _accuracy(counts: Counts, rows: Sequence[Record], chance: tuple[float, str]) -> list[str]:
    if counts["teacher_accuracy"] is None:
        return []
    hinted = sum(row.hinted for row in rows)
    return [
        f"  teacher's label equals the human one: {counts['teacher_right']:,} of {_rows(counts['labelled'])} "
        f"({counts['teacher_accuracy']:.1f} %){f', {hinted:,} after a hint' if hinted else ''}; {chance[1]} would be "
        f"right in {100 * chance[0]:.1f} %"
    ]


def _doubts(dataset: Dataset, counts: Counts, rows: Sequence[Record], chance: tuple[float, str]) -> list[str]:
    """Warns if labels are right no more often than by chance, or more often for the next row, or always."""
    judged = sum(row.label is not None and row.teacher_label is not None for row in rows)
    share, guess = chance
    if judged < _ENOUGH_ROWS or share == 1:
        return []
    right = counts["teacher_right"] / judged
    if right <= share + 1.96 * math.sqrt(share * (1 - share) / judged):
        return [
            f"where the teacher gives a label, it is right in {100 * right:.1f} %, which is not above {guess} "
            f"({100 * share:.1f} %).{_MISALIGNED}"
        ]
    fitting = max(_right(dataset, rows, rows[1:]), _right(dataset, rows[1:], rows)) if right < 0.5 else 0
    if fitting > 2 * counts["teacher_right"]:
        return [
            f"{counts['teacher_right']:,} teacher labels are right for their own row, and {fitting:,} for the row "
            f"before or after it.{_MISALIGNED}"
        ]
    if right == 1 and not any(row.hinted for row in rows):
        return [
            f"all {judged:,} teacher labels equal the human ones. Were they made from them? Real teachers err, so a "
            "comparison with human labels says nothing here."
        ]
    return []


def _right(dataset: Dataset, rows: Sequence[Record], answered: Sequence[Record]) -> int:
    """Counts pairs of rows in which the label of one is the teacher's of the other."""
    pairs = ((row.label, other.teacher_label) for row, other in zip(rows, answered, strict=False))
    return sum(a is not None and b is not None and dataset.same_label(a, b) for a, b in pairs)


def _failures(rows: Sequence[Record]) -> list[str]:
    """Shows replies of the commonest failure."""
    failed = [row for row in rows if row.teacher_label is None and row.outcome not in _UNASKED]
    if not failed:
        return []
    [(outcome, number)] = Counter(row.outcome for row in failed).most_common(1)
    some = [row for row in failed if row.outcome == outcome][:_EXAMPLES]
    texts = ("no reply" if row.teacher_text is None else repr(row.teacher_text[:_CHARACTERS]) for row in some)
    return [
        f"  {outcome}, {len(some)} of {number:,}:",
        *(f"    {row.id}: {text}" for row, text in zip(some, texts, strict=True)),
    ]


def _others(dataset: Dataset, rows: Sequence[Record], parser: str) -> str:
    """Says how many labels the other parsers read: "The parser 'official' reads 990. ", or "" if there are none."""
    asked = [
        (row.teacher_text, Row(id=row.id, input=row.input, label=row.label, choices=row.choices))
        for row in rows
        if row.teacher_text is not None
    ]
    counts = {
        name: sum(dataset.parse(text, row, parser=name).label is not None for text, row in asked)
        for name in dataset.parsers
        if name != parser
    }
    return "".join(f"The parser {name!r} reads {number:,} labels. " for name, number in counts.items())


def _chance(rows: Sequence[Record]) -> tuple[float, str]:
    """Returns the share of right answers of a guess that reads no input, and its description."""
    labels = Counter(row.label for row in rows if row.label is not None)
    if not labels:
        return 0.0, ""
    [(commonest, most)] = labels.most_common(1)
    share = most / labels.total()
    choices = [len(set(row.choices)) for row in rows if row.label is not None and row.choices]
    guess = sum(1 / number for number in choices) / labels.total()
    return (guess, "a guess among the choices") if guess > share else (share, f"always {brief(commonest)}")


def _percent(number: int, whole: int) -> str:
    return f"{100 * number / whole:.1f} %"


def _rows(number: int) -> str:
    return f"{number:,} row{'s' * (number != 1)}"
