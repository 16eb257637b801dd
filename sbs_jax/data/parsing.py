"""Raw teacher text to rationale and label: what the parsers of all datasets share.

A teacher without a stop string runs on into an invented next example:

    Ann buys 4 pens and has 3. 3 + 4 = 7. The answer is (3 + 4).\\n\\nQ: Bob has ..
    |----------- rationale ------------|  marker        |label|      |- not ours -

The rules of each dataset, `official(text, row)` and `strict(text, row)`, are in `tasks/<name>.py`.
`official` returns what the published code of the method computes, odd cases included, so that
numbers can be compared. `strict` takes a label only where it is a possible one. Neither raises.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Collection, Mapping, Sequence

from sbs_jax.data.records import OK

NO_RATIONALE = "no_rationale"
LETTER_TEXT_DISAGREEMENT = "letter_text_disagreement"
BLANK = "blank"
NO_ANSWER = "no_answer"
SEVERAL_ANSWERS = "several_answers"
NO_LABEL = "no_label"
LABEL_NOT_IN_SET = "label_not_in_set"
NOT_ARITHMETIC = "not_arithmetic"
NOT_ASKED = "not_asked"
CUT_SHORT = "length"
CONTENT_FILTER = "content_filter"
TOO_LONG = "too_long"
REFUSED = "refused"

# Every outcome of a parsed reply. After the first three the label is still used.
OUTCOMES: Mapping[str, str] = types.MappingProxyType(
    {
        OK: "rationale and label can be used",
        NO_RATIONALE: "nothing stands before the answer marker; the label is used",
        LETTER_TEXT_DISAGREEMENT: "the text after the choice's letter is not that choice's text; "
        "the letter decides (strict only)",
        BLANK: "nothing stands before the stop string",
        NO_ANSWER: "there is no answer marker",
        SEVERAL_ANSWERS: "there are two answer markers or more",
        NO_LABEL: "nothing that the parser takes as a label follows the marker",
        LABEL_NOT_IN_SET: "what follows the marker is none of the possible labels (strict only)",
        NOT_ARITHMETIC: "the equation has no value: a word, a tuple, cut short (strict only)",
    }
)
# Outcomes of a row without a reply to read, where this project asked (`sbs teach`).
FAILURES: Mapping[str, str] = types.MappingProxyType(
    {
        NOT_ASKED: "the teacher has not answered yet: ask again",
        CUT_SHORT: "the reply did not end, not even with four times the room",
        CONTENT_FILTER: "the teacher's provider kept the reply back",
        TOO_LONG: "the prompt does not fit into the teacher's context",
        REFUSED: "the teacher's provider refused this request",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed:
    """A reply as it was read; None where there is nothing that can be used."""

    rationale: str | None
    label: str | None
    outcome: str


def unusable(outcome: str, *, rationale: str | None = None) -> Parsed:
    """No label; no rationale either, unless one is given and not blank."""
    return Parsed(rationale=_unless_blank(rationale), label=None, outcome=outcome)


def usable(rationale: str, label: str, *, outcome: str = OK) -> Parsed:
    """Both, with "no_rationale" as the outcome where the rationale is blank; a blank label is none ("no_label")."""
    if not label.strip():
        return unusable(NO_LABEL, rationale=rationale)
    kept = _unless_blank(rationale)
    if kept is None and outcome == OK:
        outcome = NO_RATIONALE
    return Parsed(rationale=kept, label=label, outcome=outcome)


def official_result(rationale: str, label: str) -> Parsed:
    """What the official code would train on. A blank label there is a blank target; here, None."""
    return usable(rationale, label)


def split_answer(text: str, marker: str) -> tuple[str, str] | Parsed:
    """(before, after) the one marker; else the unusable result that says why there is no such pair.

    >>> split_answer("It is wet. So the answer is rain.", "So the answer is")
    ('It is wet. ', ' rain.')
    """
    parts = text.split(marker)
    if len(parts) == 2:
        return parts[0], parts[1]
    if not text.strip():
        return unusable(BLANK)
    return unusable(NO_ANSWER if len(parts) == 1 else SEVERAL_ANSWERS)


def before_line(text: str, *starts: str) -> str:
    """The text up to the first line that begins with one of `starts`.

    >>> before_line("See the FAQ: yes.\\nQ: Next", "Q:")
    'See the FAQ: yes.\\n'
    """
    pattern = "|".join(re.escape(start) for start in starts)
    return re.split(rf"^(?:{pattern})", text, maxsplit=1, flags=re.MULTILINE)[0]


def strict_answer(text: str, *, stops: Collection[str], marker: str) -> tuple[str, str] | Parsed:
    """(rationale, answer) of a reply, both stripped; else the unusable result.

    The reply ends at the first line that begins with a stop string; the answer is the rest of the
    marker's line, without one full stop at its end.

    >>> strict_answer("Dogs are animals.\\nAnswer: yes.\\n\\nPremise: A", stops=("Premise:",),
    ...               marker="Answer:")
    ('Dogs are animals.', 'yes')
    """
    found = split_answer(before_line(text, *stops), marker)
    if isinstance(found, Parsed):
        return found
    rationale, answer = found
    lines = answer.strip().splitlines()
    if not lines:
        return unusable(NO_LABEL)
    return rationale.strip(), without_full_stop(lines[0])


def without_full_stop(text: str) -> str:
    """The text stripped and, after that, without one trailing full stop."""
    return text.strip().removesuffix(".").rstrip()


def member(text: str, labels: Collection[str]) -> str | None:
    """The label that `text` is, in the set's spelling; upper and lower case count as equal.

    None where it is none of them, or only without regard to case and then more than one.

    >>> member("Neutral", ("entailment", "neutral"))
    'neutral'
    """
    if text in labels:
        return text
    folded = {label for label in labels if label.casefold() == text.casefold()}
    return folded.pop() if len(folded) == 1 else None


def only_label_named(text: str, patterns: Mapping[str, re.Pattern[str]]) -> str | None:
    """Returns the label that the last sentence naming any label names; None if it names several, or none does.

    A name inside a longer one does not count: "ice cream" does not name "ice".
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


def label_patterns(labels: Sequence[str]) -> dict[str, re.Pattern[str]]:
    """Returns patterns that find labels as whole words in any case, also in the plural."""
    return {
        label: re.compile(rf"(?<!\w){re.escape(label.strip())}(?:s|es)?(?!\w)", re.IGNORECASE)
        for label in labels
        if label.strip()
    }


def _unless_blank(text: str | None) -> str | None:
    return text if text and text.strip() else None
