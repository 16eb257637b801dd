"""What e-SNLI and ANLI share: the labels, and premise and hypothesis as one text."""

from __future__ import annotations

from collections.abc import Collection

from sbs_jax.teacher.parsing import (
    LABEL_NOT_IN_SET,
    Parsed,
    member,
    strict_answer,
    unusable,
    usable,
)
from sbs_jax.tokens import JOINT

# In the order of the sources' label numbers.
LABELS = ("entailment", "neutral", "contradiction")


def input_text(premise: str, hypothesis: str) -> str:
    """Premise and hypothesis, joined by "</s>", which is one EOS id when tokenised.

    >>> input_text("A dog barks.", "An animal is heard.")
    'A dog barks.</s>An animal is heard.'
    """
    for what, text in (("premise", premise), ("hypothesis", hypothesis)):
        if JOINT in text:
            raise ValueError(f"the {what} contains {JOINT!r}, which stands for EOS: {text[:80]!r}")
    return f"{premise}{JOINT}{hypothesis}"


def label_text(number: int) -> str:
    """0, 1, 2 to the label."""
    if not 0 <= number < len(LABELS):
        raise ValueError(
            f"the label is {number}, which is outside the label set: expected 0 (entailment), 1 (neutral) "
            "or 2 (contradiction)."
        )
    return LABELS[number]


def strict(text: str, *, stops: Collection[str], marker: str) -> Parsed:
    """The reply of an inference task, where the label must be one of `LABELS`."""
    found = strict_answer(text, stops=stops, marker=marker)
    if isinstance(found, Parsed):
        return found
    rationale, answer = found
    label = member(answer, LABELS)
    return unusable(LABEL_NOT_IN_SET) if label is None else usable(rationale, label)
