"""e-SNLI: does a hypothesis follow from a premise? 549,367 / 9,842 / 9,824 rows.

A reply, with its invented continuation:

    A man who sleeps cannot run.\\nAnswer: contradiction\\n\\nPremise: ..
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.grading import accuracy, same_text
from sbs_jax.data.parsing import NO_ANSWER, Parsed, official_result, unusable
from sbs_jax.data.release import read_inputs
from sbs_jax.storage.json_files import integer_field, text_field
from tasks import nli


def row(fields: Mapping[str, Any]) -> Row:
    """A line of the release, or an example of TFDS, as a row. The source has no ids."""
    return Row(
        input=nli.input_text(text_field(fields, "premise"), text_field(fields, "hypothesis")),
        label=nli.label_text(integer_field(fields, "label")),
    )


def read_release(release_dir: Path) -> dict[str, list[Row]]:
    """Rows in file order per split."""
    return read_inputs(release_dir, "esnli", row)


def official(text: str, row: Row) -> Parsed:
    """Rationale before the first "Answer:"; label from "Answer: " to "Premise", right-stripped.

    Bug for bug: the rationale is not cut at "Premise", so a reply without an answer keeps its
    whole text as the rationale; and a reply cut short in the next example's "Premise" has the
    label "entailment\\n\\nPre".
    """
    del row
    rationale = text.split("Answer:")[0].rstrip()
    if "Answer: " not in text:
        return unusable(NO_ANSWER, rationale=rationale)
    return official_result(rationale, text.split("Answer: ")[1].split("Premise")[0].rstrip())


def strict(text: str, row: Row) -> Parsed:
    """Up to a line that begins with "Premise:"; the label is the rest of the "Answer:" line."""
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
