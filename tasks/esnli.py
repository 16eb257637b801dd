"""e-SNLI: does a hypothesis follow from a premise? 549,367 / 9,842 / 9,824 train / validation / test rows.

A teacher's reply and the next example that it invents:

    A man who sleeps cannot run.\\nAnswer: contradiction\\n\\nPremise: ..
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.grading import accuracy, same_text
from sbs_jax.data.parsing import NO_ANSWER, Parsed, unusable, usable
from sbs_jax.data.release import read_inputs
from sbs_jax.storage.json_files import integer_field, text_field
from tasks import nli


def row(fields: Mapping[str, Any]) -> Row:
    """Makes a row from a line of the release or a TFDS example; neither has ids."""
    return Row(
        input=nli.input_text(text_field(fields, "premise"), text_field(fields, "hypothesis")),
        label=nli.label_text(integer_field(fields, "label")),
    )


def read_release(release_dir: Path) -> dict[str, list[Row]]:
    """Reads the rows of each split, in file order."""
    return read_inputs(release_dir, "esnli", row)


def official(text: str, row: Row) -> Parsed:
    """Parses as the official code does: rationale before the first "Answer:", label from "Answer: " to "Premise".

    Bug for bug: the rationale is not cut at "Premise", so a reply without an answer keeps all its text as the
    rationale, and a reply truncated in the next example's "Premise" has the label "entailment\\n\\nPre".
    """
    del row
    rationale = text.split("Answer:")[0].rstrip()
    if "Answer: " not in text:
        return unusable(NO_ANSWER, rationale=rationale)
    return usable(rationale, text.split("Answer: ")[1].split("Premise")[0].rstrip())


def strict(text: str, row: Row) -> Parsed:
    """Parses up to a line that begins with "Premise:"; the rest of the "Answer:" line must be a label."""
    del row
    return nli.strict(text, stops=("Premise:",), marker="Answer:")


DATASET = Dataset(
    name="esnli",
    labels=nli.LABELS,
    implied_label=nli.implied_label,
    read_release=read_release,
    parsers={"official": official, "strict": strict},
    metric_fns=(accuracy,),
    primary_metric="accuracy",
    same_label=same_text,
    feature_lengths={"inputs": 160, "targets": 96},
    tfds="esnli",
    tfds_row=row,
)
