"""Parts shared by e-SNLI and ANLI: labels, input text, and parsing."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from sbs_jax.data.dataset import JOINT
from sbs_jax.data.parsing import LABEL_NOT_IN_SET, Parsed, member, only_label_named, strict_reply, unusable, usable

# In the order of the sources' label numbers.
LABELS = ("entailment", "neutral", "contradiction")


def input_text(premise: str, hypothesis: str) -> str:
    """Joins premise and hypothesis by "</s>", which becomes one EOS id.

    >>> input_text("A dog barks.", "An animal is heard.")
    'A dog barks.</s>An animal is heard.'
    """
    for what, text in (("premise", premise), ("hypothesis", hypothesis)):
        if JOINT in text:
            raise ValueError(f"the {what} contains {JOINT!r}, which means EOS; remove it: {text[:80]!r}")
    return f"{premise}{JOINT}{hypothesis}"


def label_text(number: int) -> str:
    """Turns a source's label number, 0 to 2, into the label."""
    if not 0 <= number < len(LABELS):
        raise ValueError(
            f"the label is {number}, which is outside the label set; expected 0 (entailment), 1 (neutral) or 2 "
            "(contradiction)."
        )
    return LABELS[number]


def strict(text: str, *, stops: Collection[str], marker: str) -> Parsed:
    """Parses a reply whose answer must be one of `LABELS`."""

    def read(rationale: str, answer: str) -> Parsed:
        label = member(answer, LABELS)
        return unusable(LABEL_NOT_IN_SET) if label is None else usable(rationale, label)

    return strict_reply(text, stops=stops, marker=marker, read=read)


# Words that name a label. "This does not entail .." names neutral; the longer match hides the "entail" in it.
_NOT = r"(?:(?:does|do|did) not|(?:does|do|did)n't)"
_WORDS = {
    "entailment": re.compile(r"\bentail(?:s|ed|ment)?\b", re.IGNORECASE),
    "neutral": re.compile(
        rf"\bneutral\b|(?:{_NOT} )?\bnot necessarily(?: \w+)?|{_NOT} (?:necessarily )?(?:entail|mean|imply)\b",
        re.IGNORECASE,
    ),
    "contradiction": re.compile(r"(?<!not )(?<!n't )\bcontradict(?:s|ed|ing|ion|ory)?\b", re.IGNORECASE),
}


def implied_label(rationale: str, choices: Sequence[str]) -> str | None:
    """Returns the label that a text names as a noun, as a verb, or by "not necessarily"; most texts name none.

    >>> implied_label("Sleeping contradicts running.", ())
    'contradiction'
    >>> implied_label("A man who eats is not necessarily hungry.", ())
    'neutral'
    """
    del choices
    return only_label_named(rationale, _WORDS)
