"""SVAMP: the equation that solves a word problem of arithmetic. 800 / - / 200 train / validation / test rows.

A teacher's reply and the next example that it invents:

    Ann has 3 pens. She buys 4. 3 + 4 = 7. The answer is (3 + 4).\\n\\nQ: ..
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.data import markup
from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.grading import MAX_CHARACTERS, equation_accuracy, equation_value, same_equation_value
from sbs_jax.data.parsing import NOT_ARITHMETIC, Parsed, split_answer, strict_reply, unusable, usable
from sbs_jax.data.release import read_inputs
from sbs_jax.storage.json_files import text_field
from tasks import svamp_further

MARKER = "The answer is"


def row(fields: Mapping[str, Any]) -> Row:
    """Makes a row from a line of the release, which has no id."""
    return Row(input=text_field(fields, "input"), label=text_field(fields, "label"))


def read_release(release_dir: Path) -> dict[str, list[Row]]:
    """Reads the rows of each split, in file order."""
    return read_inputs(release_dir, "svamp", row)


def is_arithmetic(text: str) -> bool:
    """Tells whether a text is an arithmetic expression with a value."""
    return equation_value(text) is not None


def official(text: str, row: Row) -> Parsed:
    """Parses as the official code does: up to "Q:", split at the marker, label from a line's first "(" to its last ")".

    Bug for bug: "(3 + 4) * 2." gives "(3 + 4)", which has another value.
    """
    del row
    found = split_answer(text.split("Q:")[0].rstrip(), MARKER)
    if isinstance(found, Parsed):
        return found
    rationale, answer = found
    return usable(rationale.rstrip(), _in_parentheses(answer))


def _in_parentheses(text: str) -> str:
    """Returns the match of `re.search(r"\\(.*\\)", text)`, or "", in linear time even for many unclosed "("."""
    for line in text.split("\n"):
        start, end = line.find("("), line.rfind(")")
        if 0 <= start < end:
            return line[start : end + 1]
    return ""


def strict(text: str, row: Row) -> Parsed:
    """Takes the rest of the marker's line, as the teacher wrote it, if it has a value.

    "(3 + 4) * 2." gives "(3 + 4) * 2", "(3 × 1,200)" gives "(3 * 1200)". Words, unknowns and tuples such as "(14, 21)"
    have no value.
    """
    del row

    def read(rationale: str, answer: str) -> Parsed:
        forms = (answer, markup.arithmetic(answer))
        label = next((form for form in forms if is_arithmetic(form)), None)
        return unusable(NOT_ARITHMETIC) if label is None else usable(rationale, label)

    return strict_reply(text, stops=("Q:",), marker=MARKER, read=read)


_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_EQUATION = re.compile(rf"[(\s]*{_NUMBER}[)\s]*(?:[-+*/][(\s]*{_NUMBER}[)\s]*)+", re.ASCII)


def implied_label(rationale: str, choices: Sequence[str]) -> str | None:
    """Returns the last calculation in a text, without its result; None if there is none or it has no value.

    >>> implied_label("She has 3 pens and buys 4. 3 + 4 = 7.", ())
    '3 + 4'
    """
    del choices
    # A calculation whose start is truncated here would be too long to have a value anyway.
    found = [match[0].strip() for match in _EQUATION.finditer(rationale[-4 * MAX_CHARACTERS :])]
    return found[-1] if found and is_arithmetic(found[-1]) else None


DATASET = Dataset(
    name="svamp",
    labels=None,
    read_release=read_release,
    parsers={"official": official, "strict": strict},
    metric_fns=(equation_accuracy,),
    primary_metric="equation_accuracy",
    same_label=same_equation_value,
    feature_lengths={"inputs": 88, "targets": 112},
    is_label=is_arithmetic,
    implied_label=implied_label,
    read_further=svamp_further.read,
)
