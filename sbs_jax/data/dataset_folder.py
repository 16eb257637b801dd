"""A dataset as a folder, so that it needs no Python: `dataset.json` beside its prompt, inputs and records.

    tickets/dataset.json                      what `Definition` holds
    tickets/prompt.json                       the teacher's prompt (teacher/prompts.py)
    tickets/inputs/tickets/train.jsonl, ..    rows as records without a teacher
    tickets/records/tickets/train.jsonl, ..   rows with the teacher's answers, by `sbs teach`

`sbs init` writes one. Everything that takes the name of a dataset also takes the folder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sbs_jax import checks
from sbs_jax.data import grading
from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.parsing import LABEL_NOT_IN_SET, Parsed, member, strict_reply, unusable, usable
from sbs_jax.storage.json_files import brief, read_json, typed

FILE, PROMPT, INPUTS, RECORDS = "dataset.json", "prompt.json", "inputs", "records"
VERSION = 1
# Metrics by name: the function over all answers, and the equality of one pair.
METRICS: Mapping[str, tuple[Callable[..., Mapping[str, Any]], Callable[[str, str], bool]]] = {
    "accuracy": (grading.accuracy, grading.same_text),
    "normalized_accuracy": (grading.normalized_accuracy, grading.same_normalized_text),
    "equation_accuracy": (grading.equation_accuracy, grading.same_equation_value),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """Contents of dataset.json. ValueError names a field that does not fit.

    Attributes:
      version: of the file's form.
      name: of the dataset; its tasks are `<name>_label`, `<name>_step_by_step` and so on.
      labels: the closed set of labels; None if answers are free text.
      marker: words of the teacher's reply between rationale and answer.
      metric: a key of METRICS.
      lengths: {"inputs": .., "targets": ..} in tokens.
      stops: strings that end a reply before an invented next question.
    """

    version: int
    name: str
    labels: tuple[str, ...] | None
    marker: str
    metric: str
    lengths: Mapping[str, int]
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"the field 'version' is {self.version}; expected {VERSION}, which this sbs_jax reads.")
        checks.choice("the field 'metric'", self.metric, METRICS)
        if not self.marker.strip():
            raise ValueError("the field 'marker' is blank; expected words such as 'So the answer is'.")
        if self.labels is not None:
            wrong = [label for label in self.labels if not label.strip() or self.labels.count(label) > 1]
            if wrong or len(self.labels) < 2:
                raise ValueError(
                    f"the field 'labels' is {brief(list(self.labels))}; expected at least two different texts, or null "
                    "for free answers."
                )


def is_folder(name: str) -> bool:
    """Tells whether this names a folder with a dataset.json."""
    return (Path(name) / FILE).is_file()


def read(folder: str | Path) -> Dataset:
    """Reads a folder's dataset. ValueError with file and field; FileNotFoundError if there is none."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}; `sbs init` makes such a folder of a table.")
    return of(read_json(path), where=str(path))


def of(value: Any, *, where: str) -> Dataset:
    """Makes the dataset of what a dataset.json says, or a run's manifest."""
    try:
        found = typed(value, Definition)
        metric, same = METRICS[found.metric]
        return Dataset(
            name=found.name,
            labels=found.labels,
            read_release=None,
            parsers={"strict": functools.partial(_strict, found)},
            metric_fns=(metric,),
            primary_metric=found.metric,
            same_label=same,
            feature_lengths=found.lengths,
            definition=described(found),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def described(definition: Definition) -> dict[str, Any]:
    """Inverts `of`, as JSON."""
    found = dataclasses.asdict(definition)
    labels = None if definition.labels is None else list(definition.labels)
    return found | {"labels": labels, "stops": list(definition.stops), "lengths": dict(definition.lengths)}


def _strict(definition: Definition, text: str, row: Row) -> Parsed:
    """Parses a reply: the rationale, the marker, then the answer up to the end of its line."""

    def read(rationale: str, answer: str) -> Parsed:
        possible = row.choices or definition.labels
        label = answer if possible is None else member(answer, possible)
        return unusable(LABEL_NOT_IN_SET) if not label else usable(rationale, label)

    return strict_reply(text, stops=definition.stops, marker=definition.marker, read=read)
