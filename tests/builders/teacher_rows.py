"""Rows of a teacher's page: right, wrong, unusable."""

from collections.abc import Iterator
from typing import Any

from sbs_jax.teacher.page import Example

LABELS = ("entailment", "neutral", "contradiction")
EXEMPLARS = "Does it follow?\n\n" + "\n".join(f"Q: exemplar {i}\nA: because {i}. yes\n" for i in range(10))


def row(number: int, **changes: Any) -> Example:
    """Makes a row with a right reply."""
    fields: dict[str, Any] = {
        "id": f"row-{number}",
        "input": f"Does {number} follow?",
        "label": LABELS[number % 3],
        "prompt": f"{EXEMPLARS}\nQ: Does {number} follow?\nA:",
        "replies": (f"It does for {number}. Answer: {LABELS[number % 3]}",),
        "rationale": f"It does for {number}.",
        "teacher_label": LABELS[number % 3],
        "outcome": "ok",
        "hinted": False,
        "right": True,
    }
    return Example(**(fields | changes))


def wrong(number: int, **changes: Any) -> Example:
    label = LABELS[(number + 1) % 3]
    return row(number, **({"teacher_label": label, "replies": (f"No. Answer: {label}",), "right": False} | changes))


def unusable(number: int, **changes: Any) -> Example:
    fields = {"teacher_label": None, "rationale": None, "outcome": "no_answer", "right": None, "replies": ("Hm.",)}
    return row(number, **(fields | changes))


def some_rows(count: int = 120) -> Iterator[Example]:
    """Makes rows: of every ten one wrong, one unusable, one right after a hint, the rest right."""
    for number in range(count):
        kind = {3: wrong, 5: unusable}.get(number % 10, row)
        yield kind(number, **({"hinted": True} if number % 10 == 7 else {}))
