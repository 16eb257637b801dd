"""Parsing of raw teacher text into rationale and label: code shared by the parsers of all datasets.

A teacher without a stop string runs on into an invented next example:

    Ann buys 4 pens and has 3. 3 + 4 = 7. The answer is (3 + 4).\\n\\nQ: Bob has ..
    |----------- rationale ------------|  marker        |label|      |- not ours -

Each dataset has its rules, `official(text, row)` and `strict(text, row)`, in `tasks/<name>.py`. `official` reproduces
the method's published code, odd cases included, so that numbers are comparable. `strict` accepts only possible labels.
Neither raises. Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from sbs_jax.data import markup
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
LOST = "lost"
NONE_CHOSEN = "none_chosen"

# Every outcome of a parsed reply. With the first three the label is still used.
OUTCOMES: Mapping[str, str] = types.MappingProxyType(
    {
        OK: "rationale and label can be used",
        NO_RATIONALE: "no text before the answer marker; the label is used",
        LETTER_TEXT_DISAGREEMENT: "the text after the choice's letter is not that choice's text; "
        "the letter decides (strict only)",
        BLANK: "no text before the stop string",
        NO_ANSWER: "there is no answer marker",
        SEVERAL_ANSWERS: "there are two or more answer markers",
        NO_LABEL: "no label follows the marker",
        LABEL_NOT_IN_SET: "the text after the marker is not a possible label (strict only)",
        NOT_ARITHMETIC: "the equation has no value: a word, a tuple, truncated text (strict only)",
    }
)
# Outcomes of rows that `sbs teach` asked without getting a usable reply.
FAILURES: Mapping[str, str] = types.MappingProxyType(
    {
        NOT_ASKED: "the teacher has not answered yet: ask again",
        CUT_SHORT: "the reply was truncated, even at four times the token limit",
        CONTENT_FILTER: "the provider's content filter withheld the reply",
        TOO_LONG: "the prompt is longer than the teacher's context",
        REFUSED: "the teacher's provider refused this request",
        LOST: "the provider lost the answer, which may have been paid for: --retry_failed asks again",
    }
)
# Outcomes of rows whose rationales `sbs select` dropped.
DROPPED: Mapping[str, str] = types.MappingProxyType(
    {NONE_CHOSEN: "sbs select dropped all rationales of the row; the label is used"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed:
    """Parsed reply; unusable parts are None."""

    rationale: str | None
    label: str | None
    outcome: str


def unusable(outcome: str, *, rationale: str | None = None) -> Parsed:
    """Returns a result without a label; with the rationale only if it is not blank."""
    return Parsed(rationale=_unless_blank(rationale), label=None, outcome=outcome)


def usable(rationale: str, label: str, *, outcome: str = OK) -> Parsed:
    """Returns rationale and label; a blank rationale gives "no_rationale", a blank label "no_label".

    (The official code would train on a blank label as a blank target.)
    """
    if not label.strip():
        return unusable(NO_LABEL, rationale=rationale)
    kept = _unless_blank(rationale)
    if kept is None and outcome == OK:
        outcome = NO_RATIONALE
    return Parsed(rationale=kept, label=label, outcome=outcome)


def split_answer(text: str, marker: str) -> tuple[str, str] | Parsed:
    """Splits at the only marker into (before, after); with no marker or several, returns the unusable result.

    >>> split_answer("It is wet. So the answer is rain.", "So the answer is")
    ('It is wet. ', ' rain.')
    """
    parts = text.split(marker)
    if len(parts) == 2:
        return parts[0], parts[1]
    if not text.strip():
        return unusable(BLANK)
    return unusable(NO_ANSWER if len(parts) == 1 else SEVERAL_ANSWERS)


def before_stop(text: str, *stops: str, inline: bool = False) -> str:
    """Returns the text up to the first stop string, in any case, that begins a line or follows the end of a sentence.

    With `inline`, up to any stop string that is not the end of a longer word.

    >>> before_stop("See the FAQ: yes.\\nQ: Next", "Q:")
    'See the FAQ: yes.\\n'
    >>> before_stop("It is wet. premise: A dog", "Premise:")
    'It is wet. '
    >>> before_stop(" neutral Premise: A dog", "Premise:", inline=True)
    ' neutral '
    """
    return text[: next(_places(text, *stops, inline=inline), len(text))]


def _places(text: str, *words: str, inline: bool = False) -> Iterator[int]:
    """Yields the places where `before_stop` finds these words."""
    lowered = text.lower()
    if len(lowered) != len(text):  # one letter, U+0130, becomes two
        lowered = text
    for match in _pattern(words).finditer(lowered):
        before = text[max(0, match.start() - 20) : match.start()]
        if inline:
            found = not before[-1:].isalnum()
        else:
            before = before.rstrip(" \t\"'*_#>`")
            found = not before or before[-1] in "\n.!?)]"
        if found:
            yield match.start()


@functools.cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(word.lower()) for word in words))


def _before_stops(text: str, stops: Collection[str], marker: str) -> tuple[str, str]:
    """Returns a reply up to its stop strings, and the marker in the case that it has there."""
    reply = before_stop(text, *stops)
    if marker not in reply:
        marker = next((reply[start : start + len(marker)] for start in _places(reply, marker)), marker)
    before, found, after = reply.partition(marker)
    return before + found + before_stop(after, *stops, inline=True), marker


def strict_answer(text: str, *, stops: Collection[str], marker: str) -> tuple[str, str] | Parsed:
    """Returns (rationale, answer) of a reply, both stripped, or the unusable result. `strict_reply` is built on it.

    The reply ends at the first stop string that begins a line or follows a sentence; after the marker, at any stop
    string. A marker in another case must begin a line or follow a sentence, too. The answer is the rest of the marker's
    line, without one trailing full stop.

    >>> strict_answer("Dogs are animals.\\nAnswer: yes. premise: A\\nAnswer: no", stops=("Premise:",),
    ...               marker="Answer:")
    ('Dogs are animals.', 'yes')
    """
    found = split_answer(*_before_stops(text, stops, marker))
    if isinstance(found, Parsed):
        return found
    rationale, answer = found
    lines = answer.strip().splitlines()
    if not lines:
        return unusable(NO_LABEL)
    return markup.without_end_marks(rationale), without_full_stop(lines[0])


def strict_reply(text: str, *, stops: Collection[str], marker: str, read: Callable[[str, str], Parsed]) -> Parsed:
    """Parses a reply by `strict_answer` and `read(rationale, answer)`, without the teacher's thinking.

    If `read` finds no label, or one that its text contradicts, markdown and LaTeX around marker and answer are removed.

    >>> read = lambda rationale, answer: usable(rationale, answer) if answer == "yes" else unusable(LABEL_NOT_IN_SET)
    >>> strict_reply("<think>Iron?</think>It floats. **So the answer is yes.**", stops=(), marker="So the answer is",
    ...              read=read)
    Parsed(rationale='It floats.', label='yes', outcome='ok')
    """
    text = markup.without_thinking(text)
    found = strict_answer(text, stops=stops, marker=marker)
    first = found if isinstance(found, Parsed) else read(*found)
    if first.outcome in (OK, NO_RATIONALE):
        return first
    before, after = markup.split_decorated(*_before_stops(text, stops, marker)) or ("", "")
    lines = before_stop(after, *stops, inline=True).strip().splitlines()
    if not lines:
        return first
    second = read(before, markup.plain(lines[0]))
    return second if second.outcome in (OK, NO_RATIONALE) or first.label is None else first


def without_full_stop(text: str) -> str:
    """Strips the text, then one trailing full stop."""
    return text.strip().removesuffix(".").rstrip()


def member(text: str, labels: Collection[str]) -> str | None:
    """Returns the label that equals `text`, in the set's spelling, or None.

    An exact match wins; otherwise case is ignored, and there must be only one match.

    >>> member("Neutral", ("entailment", "neutral"))
    'neutral'
    """
    if text in labels:
        return text
    folded = {label for label in labels if label.casefold() == text.casefold()}
    return folded.pop() if len(folded) == 1 else None


def only_label_named(text: str, patterns: Mapping[str, re.Pattern[str]]) -> str | None:
    """Returns the only label in the last sentence that names one; None if it names several, or no sentence names one.

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
    """Compiles patterns that match labels as whole words, ignoring case, also in the plural."""
    return {
        label: re.compile(rf"(?<!\w){re.escape(label.strip())}(?:s|es)?(?!\w)", re.IGNORECASE)
        for label in labels
        if label.strip()
    }


def _unless_blank(text: str | None) -> str | None:
    return text if text and text.strip() else None
