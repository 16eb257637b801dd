"""CQA (CommonsenseQA 1): which of five choices answers the question? 9,741 / - / 1,221 train / validation / test rows.

The official validation split is the test split here. A teacher's reply and the next example that it invents:

    The answer must be a drink. Of the above choices, only tea is a drink.
    So the answer is (b) tea.\\n\\nQ: ..
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.grading import accuracy, same_text
from sbs_jax.data.parsing import (
    LABEL_NOT_IN_SET,
    LETTER_TEXT_DISAGREEMENT,
    OK,
    Parsed,
    member,
    split_answer,
    strict_reply,
    unusable,
    usable,
)
from sbs_jax.data.release import read_inputs
from sbs_jax.storage.json_files import text_field, text_list_field

MARKER = "So the answer is"


def row(fields: Mapping[str, Any]) -> Row:
    """Makes a row from a line of the release."""
    choices = text_list_field(fields, "choices")
    return Row(
        id=text_field(fields, "id"),
        input=input_text(text_field(fields, "question"), choices),
        label=text_field(fields, "answer"),
        choices=choices,
    )


def input_text(question: str, choices: tuple[str, ...]) -> str:
    """Joins the question and its lettered choices, one per line.

    >>> input_text("What do people drink?", ("sand", "tea"))
    'What do people drink?\\nAnswer Choices:\\n(a) sand\\n(b) tea'
    """
    if not 2 <= len(choices) <= len(ascii_lowercase):
        raise ValueError(f"got {len(choices)} choices; expected 2 to {len(ascii_lowercase)}.")
    lettered = zip(ascii_lowercase, choices, strict=False)
    lines = (f"({letter}) {choice}" for letter, choice in lettered)
    return "\n".join((question, "Answer Choices:", *lines))


def read_release(release_dir: Path) -> dict[str, list[Row]]:
    """Reads the rows of each split, in file order."""
    return read_inputs(release_dir, "cqa", row)


def official(text: str, row: Row) -> Parsed:
    """Parses as the official code does: up to "Q:", split at the marker, label after the first "(x)".

    Bug for bug: the letter itself is ignored, and "either (a) sand, or (b) tea." gives the label "sand, or". One
    trailing full stop is removed, even if it belongs to the label.
    """
    del row
    found = split_answer(text.split("Q:")[0].rstrip(), MARKER)
    if isinstance(found, Parsed):
        return found
    rationale, answer = found
    # "." is every character but a newline, so "(x)" is any character in parentheses.
    parts = re.split(r"\(.\)", answer)
    label = parts[1].strip() if len(parts) > 1 else ""
    return usable(rationale.rstrip(), label.removesuffix("."))


def strict(text: str, row: Row) -> Parsed:
    """Takes the choice whose letter follows the marker, or else the choice with exactly that text.

    If letter and text disagree ("(b) coffee", or "(b) tea or (c) milk"), the letter decides and the outcome says so.
    "either (a) sand or (b) tea" is not an answer.
    """

    def read(rationale: str, answer: str) -> Parsed:
        lettered = re.match(r"\(([A-Za-z])\)(.*)", answer, flags=re.DOTALL)
        if lettered is None:
            label = member(answer, row.choices)
            return unusable(LABEL_NOT_IN_SET) if label is None else usable(rationale, label)
        number = ascii_lowercase.index(lettered[1].lower())
        if number >= len(row.choices):
            return unusable(LABEL_NOT_IN_SET)
        label, written = row.choices[number], lettered[2].strip()
        agree = written in (label, "")
        return usable(rationale, label, outcome=OK if agree else LETTER_TEXT_DISAGREEMENT)

    return strict_reply(text, stops=("Q:",), marker=MARKER, read=read)


DATASET = Dataset(
    name="cqa",
    labels=None,
    read_release=read_release,
    parsers={"official": official, "strict": strict},
    metric_fns=(accuracy,),
    primary_metric="accuracy",
    same_label=same_text,
    feature_lengths={"inputs": 112, "targets": 80},
)
