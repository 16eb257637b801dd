"""Counts over the examples of a finished sampling, in one pass, and a selection to embed in its page."""

import dataclasses
import heapq
from collections import Counter
from typing import Any

from sbs_jax.pages import cards

SMALL_SET = 10  # most labels for which confusions are counted
DISTINCT = 10_000  # most different texts that are counted separately
LONGEST_COUNTED = 100_000  # words
AGREEMENT = ("all", "at least three quarters", "at least half", "fewer than half")
_LONGEST_TEXT = 20_000  # characters of an embedded text
_MOST_REPLIES = 10  # of an embedded example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One row with the teacher's replies.

    Attributes:
      label: the human label, if any.
      replies: raw, one per sample, in order.
      teacher_label: None if no reply can be used.
      outcome: a word of `OUTCOMES` or `FAILURES` in `data.parsing`; others are shown without an explanation.
      hinted: the prompt contained the human label; its answer never counts as right.
      right: whether teacher and human label are the same, by the dataset's rule; None if either is missing.
      votes: (replies with this label, replies requested) if there are several samples, as in a record; else None.
    """

    id: str
    input: str
    label: str | None
    prompt: str
    replies: tuple[str, ...]
    rationale: str | None
    teacher_label: str | None
    outcome: str
    hinted: bool
    right: bool | None
    votes: tuple[int, int] | None = None

    @property
    def verdict(self) -> str:
        """Class in the browser's filter: "right", "wrong", "unusable" or "unjudged"."""
        if self.teacher_label is None:
            return "unusable"
        return "unjudged" if self.right is None else "right" if self.right else "wrong"


class Tally(Counter[Any]):
    """Counter of up to `DISTINCT` different things; `full` tells whether others were left out."""

    full = False

    def count(self, key: Any) -> None:
        """Adds one."""
        if key in self or len(self) < DISTINCT:
            self[key] += 1
        else:
            self.full = True

    def ordered(self) -> list[tuple[Any, int]]:
        """Lists (thing, count) by descending count, then by name."""
        return sorted(self.items(), key=lambda item: (-item[1], str(item[0])))


@dataclasses.dataclass
class Score:
    """Verdicts on rows with a human label."""

    rows: int = 0
    right: int = 0
    after_hint: int = 0  # right, but the prompt contained the label
    unusable: int = 0

    def add(self, row: Example) -> None:
        """Adds one row."""
        self.rows += 1
        self.unusable += row.teacher_label is None
        if row.teacher_label is not None and row.right:
            self.right += not row.hinted
            self.after_hint += row.hinted

    @property
    def wrong(self) -> int:
        """Number of rows with a usable answer that differs from the human label."""
        return self.rows - self.right - self.after_hint - self.unusable


class Counts:
    """All numbers of the page."""

    def __init__(self) -> None:
        self.rows = self.usable = self.hinted = self.several = 0
        self.outcomes = Tally()
        self.score = Score()
        self.by_label: dict[str, Score] = {}
        self.many_labels = False
        self.pairs = Tally()  # (human label, teacher label or None)
        self.teacher_labels = Tally()
        self.by_agreement: dict[str, Score] = {}
        self.rationale_words: Counter[int] = Counter()
        self.reply_words: Counter[int] = Counter()

    def add(self, row: Example) -> None:
        """Adds one row."""
        self.rows += 1
        self.usable += row.teacher_label is not None
        self.hinted += row.hinted
        self.several += len(row.replies) > 1 or row.votes is not None
        self.outcomes.count(row.outcome)
        if row.teacher_label is not None:
            self.teacher_labels.count(row.teacher_label)
        if row.rationale is not None:
            self.rationale_words[_words(row.rationale)] += 1
        for reply in row.replies:
            self.reply_words[_words(reply)] += 1
        if row.right is not None or (row.teacher_label is None and row.label is not None):
            self.score.add(row)
            if row.label is not None:
                self._add_to_its_label(row.label, row)
        if row.votes is not None and row.teacher_label is not None:
            share = row.votes[0] / row.votes[1]
            name = AGREEMENT[0 if share == 1 else 1 if share >= 0.75 else 2 if share >= 0.5 else 3]
            self.by_agreement.setdefault(name, Score()).add(row)

    def _add_to_its_label(self, label: str, row: Example) -> None:
        if label not in self.by_label and len(self.by_label) >= DISTINCT:
            self.many_labels = True
            return
        self.by_label.setdefault(label, Score()).add(row)
        if len(self.by_label) > SMALL_SET:
            self.pairs.clear()
        else:
            self.pairs.count((label, row.teacher_label))

    @property
    def labels(self) -> list[str]:
        """Human labels by descending frequency, if they are a small set; else []."""
        if len(self.by_label) > SMALL_SET:
            return []
        return sorted(self.by_label, key=lambda label: (-self.by_label[label].rows, label))


def _words(text: str) -> int:
    return min(len(text.split()), LONGEST_COUNTED)


class Selection:
    """Rows to embed, chosen by a hash of their ids: an even sample that does not depend on row order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen = 0
        # Heaps of (hash, number, row), the next to drop on top; each could fill the page alone.
        self._disagreeing: list[tuple[int, int, dict[str, Any]]] = []
        self._others: list[tuple[int, int, dict[str, Any]]] = []

    def offer(self, row: Example) -> None:
        """Keeps the row if its hash is among the smallest so far."""
        self._seen += 1
        key = (-cards.rank(row.id), -self._seen)
        heap = self._disagreeing if row.verdict == "wrong" else self._others
        if len(heap) < self._size:
            heapq.heappush(heap, (*key, _embedded(row)))
        elif heap and key > heap[0][:2]:
            heapq.heapreplace(heap, (*key, _embedded(row)))

    def rows(self) -> list[dict[str, Any]]:
        """Returns the chosen rows in the order they were offered."""
        line = sorted(self._disagreeing, reverse=True)
        first = line[: self._size // 2]
        rest = sorted([*line[len(first) :], *self._others], reverse=True)[: self._size - len(first)]
        return [fields for _, _, fields in sorted([*first, *rest], key=lambda entry: -entry[1])]


def _embedded(row: Example) -> dict[str, Any]:
    """Turns a row into fields for examples.js, without empty ones."""
    names = ("id", "input", "label", "prompt", "rationale", "teacher_label", "outcome")
    texts = {name: cut(text) for name in names if (text := getattr(row, name)) is not None}
    others = {
        "replies": [cut(reply) for reply in row.replies[:_MOST_REPLIES]],
        "left_out": max(0, len(row.replies) - _MOST_REPLIES),
        "votes": row.votes,
        "hinted": row.hinted,
        "verdict": row.verdict,
    }
    return texts | {name: value for name, value in others.items() if value}


def cut(text: str) -> str:
    """Leaves out the middle of a text that is too long to embed."""
    excess = len(text) - _LONGEST_TEXT
    if excess <= 0:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]}\n[.. {excess:,} characters left out ..]\n{text[-half:]}"
