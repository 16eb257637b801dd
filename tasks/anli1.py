"""ANLI, round 1: does a hypothesis follow from a premise? 16,946 / 1,000 / 1,000 train / validation / test rows.

A teacher's reply and the next example that it invents:

    The text says it opened in 1901. So the answer is neutral.\\n\\nPremise: ..
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.grading import accuracy, same_text
from sbs_jax.data.parsing import Parsed, split_answer, usable
from sbs_jax.data.release import read_inputs
from sbs_jax.storage.json_files import integer_field, text_field
from tasks import nli

MARKER = "So the answer is"


def row(fields: Mapping[str, Any]) -> Row:
    """Makes a row from a line of the release."""
    return _row(fields, premise="premise")


def tfds_row(fields: Mapping[str, Any]) -> Row:
    """Makes a row from a TFDS example, where the premise is called context."""
    return _row(fields, premise="context")


def _row(fields: Mapping[str, Any], *, premise: str) -> Row:
    return Row(
        id=text_field(fields, "uid"),
        input=nli.input_text(text_field(fields, premise), text_field(fields, "hypothesis")),
        label=nli.label_text(integer_field(fields, "label")),
    )


def read_release(release_dir: Path) -> dict[str, list[Row]]:
    """Reads the rows of each split, in file order."""
    return read_inputs(release_dir, "anli1", row)


def official(text: str, row: Row) -> Parsed:
    """Parses as the official code does: up to "Premise:", split at the marker, label without its last character.

    Bug for bug: "neutral." gives "neutral", but "neutral" gives "neutra".
    """
    del row
    found = split_answer(text.split("Premise:")[0].rstrip(), MARKER)
    if isinstance(found, Parsed):
        return found
    rationale, label = found
    return usable(rationale.rstrip(), label.lstrip()[:-1])


def strict(text: str, row: Row) -> Parsed:
    """Parses up to a line that begins with "Premise:"; the rest of the marker's line must be a label."""
    del row
    return nli.strict(text, stops=("Premise:",), marker=MARKER)


DATASET = Dataset(
    name="anli1",
    labels=nli.LABELS,
    implied_label=nli.implied_label,
    read_release=read_release,
    parsers={"official": official, "strict": strict},
    metric_fns=(accuracy,),
    primary_metric="accuracy",
    same_label=same_text,
    feature_lengths={"inputs": 256, "targets": 192},
    tfds="anli/r1",
    tfds_row=tfds_row,
)
