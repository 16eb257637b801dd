"""Which label a text names. Standard library only."""

import re
from collections.abc import Mapping, Sequence


def only_name(text: str, patterns: Mapping[str, re.Pattern[str]]) -> str | None:
    """The label that the last sentence which names any names alone; None where none does, or that one names several.

    A name inside a longer one is not counted: "ice cream" does not name "ice".
    """
    for sentence in reversed(re.split(r"(?<=[.!?])\s+", text)):
        spans = [(match.span(), label) for label, pattern in patterns.items() for match in pattern.finditer(sentence)]
        named = {
            label
            for (start, end), label in spans
            if not any(a <= start and end <= b and (a, b) != (start, end) for (a, b), _ in spans)
        }
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def of_labels(labels: Sequence[str]) -> dict[str, re.Pattern[str]]:
    """Patterns of labels as whole words, in upper or lower case, also with a plural's ending."""
    return {
        label: re.compile(rf"(?<!\w){re.escape(label.strip())}(?:s|es)?(?!\w)", re.IGNORECASE)
        for label in labels
        if label.strip()
    }
