"""A finished sampling, read once and not kept: counts of all its rows, and a choice of rows to show."""

import dataclasses
import hashlib
import heapq
from collections import Counter
from typing import Any

SMALL_SET = 10  # labels, up to which confusions are counted
DISTINCT = 10_000  # different texts that are counted one by one
LONGEST_COUNTED = 100_000  # words
AGREEMENT = ("all", "at least three quarters", "at least half", "fewer than half")
_LONGEST_TEXT = 20_000  # characters of a chosen row's text
_MOST_REPLIES = 10  # of a chosen row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """An example as the page shows it.

    Attributes:
      label: the human's label; None where nobody labelled it.
      replies: raw, one per sample, in order.
      teacher_label: None where the reply (or every reply) cannot be used.
      outcome: a word of `OUTCOMES` or `FAILURES` in `teacher.parsing`; others are shown without an explanation.
      hinted: the answer was given after the human label had been told. It never counts as right.
      right: whether teacher and human label are the same, by the dataset's rule; None without both.
      votes: (replies with this label, replies asked for) where more than one was, as in a record; else None.
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


# Counting


class Tally(Counter[Any]):
    """Counts of different things, of which not more than `DISTINCT` are told apart."""

    full = False

    def count(self, key: Any) -> None:
        if key in self or len(self) < DISTINCT:
            self[key] += 1
        else:
            self.full = True

    def ordered(self) -> list[tuple[Any, int]]:
        """By falling count; equal counts by what they are counts of."""
        return sorted(self.items(), key=lambda item: (-item[1], str(item[0])))


@dataclasses.dataclass
class Score:
    """How rows with a human label were answered."""

    rows: int = 0
    right: int = 0
    after_hint: int = 0  # right, but the label had been told
    unusable: int = 0

    def add(self, row: Example) -> None:
        self.rows += 1
        if row.teacher_label is None:
            self.unusable += 1
        elif row.right:
            self.right += not row.hinted
            self.after_hint += row.hinted

    @property
    def wrong(self) -> int:
        return self.rows - self.right - self.after_hint - self.unusable


class Counts:
    """All that the page says about all rows."""

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
                self._add_to_its_label(row)
        if row.votes is not None and row.teacher_label is not None:
            share = row.votes[0] / row.votes[1]
            name = AGREEMENT[0 if share == 1 else 1 if share >= 0.75 else 2 if share >= 0.5 else 3]
            self.by_agreement.setdefault(name, Score()).add(row)

    def _add_to_its_label(self, row: Example) -> None:
        if row.label not in self.by_label and len(self.by_label) >= DISTINCT:
            self.many_labels = True
            return
        self.by_label.setdefault(str(row.label), Score()).add(row)
        if len(self.by_label) > SMALL_SET:
            self.pairs.clear()
        else:
            self.pairs.count((row.label, row.teacher_label))

    @property
    def labels(self) -> list[str]:
        """The human's labels by falling frequency, where they are a small set; else []."""
        if len(self.by_label) > SMALL_SET:
            return []
        return sorted(self.by_label, key=lambda label: (-self.by_label[label].rows, label))


def _words(text: str) -> int:
    return min(len(text.split()), LONGEST_COUNTED)


def verdict(row: Example) -> str:
    """The row's class in the browser's filter."""
    if row.teacher_label is None:
        return "unusable"
    return "unjudged" if row.right is None else "right" if row.right else "wrong"


# Choosing examples


class Selection:
    """The rows to embed. A row's place in line is a hash of its id: an even sample, whatever the order of the rows."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen = 0
        # Heaps with the last in line on top; each could fill the page alone.
        self._disagreeing: list[tuple[int, int, dict[str, Any]]] = []
        self._others: list[tuple[int, int, dict[str, Any]]] = []

    def offer(self, row: Example) -> None:
        self._seen += 1
        digest = hashlib.blake2b(row.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = (-int.from_bytes(digest, "big"), -self._seen)
        heap = self._disagreeing if verdict(row) == "wrong" else self._others
        if len(heap) < self._size:
            heapq.heappush(heap, (*key, _embedded(row)))
        elif heap and key > heap[0][:2]:
            heapq.heapreplace(heap, (*key, _embedded(row)))

    def rows(self) -> list[dict[str, Any]]:
        """The chosen ones in the order in which they came."""
        line = sorted(self._disagreeing, reverse=True)
        first = line[: self._size // 2]
        rest = sorted([*line[len(first) :], *self._others], reverse=True)[: self._size - len(first)]
        return [fields for _, _, fields in sorted([*first, *rest], key=lambda entry: -entry[1])]


def _embedded(row: Example) -> dict[str, Any]:
    """A row as page.js reads it: what is empty is left out."""
    fields = {
        "id": cut(row.id),
        "input": cut(row.input),
        "label": row.label if row.label is None else cut(row.label),
        "prompt": cut(row.prompt),
        "replies": [cut(reply) for reply in row.replies[:_MOST_REPLIES]],
        "left_out": max(0, len(row.replies) - _MOST_REPLIES),
        "votes": row.votes,
        "rationale": row.rationale if row.rationale is None else cut(row.rationale),
        "teacher_label": row.teacher_label if row.teacher_label is None else cut(row.teacher_label),
        "outcome": cut(row.outcome),
        "hinted": row.hinted,
        "verdict": verdict(row),
    }
    return {name: value for name, value in fields.items() if value not in (None, [], 0, False)}


def cut(text: str) -> str:
    """The text, without its middle where it is too long to embed."""
    excess = len(text) - _LONGEST_TEXT
    if excess <= 0:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]}\n[.. {excess:,} characters left out ..]\n{text[-half:]}"
