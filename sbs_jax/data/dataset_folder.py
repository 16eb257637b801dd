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
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from sbs_jax import checks
from sbs_jax.data import grading
from sbs_jax.data.dataset import Dataset, Row
from sbs_jax.data.parsing import LABEL_NOT_IN_SET, Parsed, member, strict_reply, unusable, usable
from sbs_jax.data.records import DEFINITION
from sbs_jax.storage.json_files import brief, read_json, typed

FILE, PROMPT, INPUTS, RECORDS = DEFINITION, "prompt.json", "inputs", "records"
VERSION = 1
NUMERIC = "numeric_accuracy"
# Metrics by name. An accuracy, of a row that is right or wrong, has the function that decides this as row score; texts
# with another metric are right if they are equal without case and punctuation.
METRICS: Mapping[str, Callable[..., Mapping[str, Any]]] = {
    "accuracy": grading.accuracy,
    "normalized_accuracy": grading.normalized_accuracy,
    "equation_accuracy": grading.equation_accuracy,
    NUMERIC: grading.numeric_accuracy,
    "rouge_l": grading.rouge_l,
    "chrf": grading.chrf,
}
_TOLERANCES = ("tolerance", "relative_tolerance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """Contents of dataset.json. ValueError names a field that does not fit.

    Attributes:
      version: of the file's form.
      name: of the dataset; its tasks are `<name>_label`, `<name>_step_by_step` and so on.
      labels: the closed set of labels; None if answers are free text.
      marker: words of the teacher's reply between rationale and answer.
      metric: a key of METRICS; picks the best checkpoint.
      metrics: further ones, computed beside it.
      tolerance: largest difference of two equal numbers, for numeric_accuracy.
      relative_tolerance: the same as a share of the target; the larger of both counts.
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
    metrics: tuple[str, ...] = ()
    tolerance: float = 0.0
    relative_tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"the field 'version' is {self.version}; expected {VERSION}, which this sbs_jax reads.")
        checks.choice("the field 'metric'", self.metric, METRICS)
        for name in self.metrics:
            checks.choice("a name in the field 'metrics'", name, METRICS)
        for name in _TOLERANCES:
            checks.number(f"the field {name!r}", getattr(self, name), least=0)
            if getattr(self, name) and NUMERIC not in (self.metric, *self.metrics):
                raise ValueError(f"the field {name!r} is for the metric {NUMERIC}, which is not chosen; remove it.")
        if self.metric == NUMERIC and self.labels is not None:
            wrong = [label for label in self.labels if not grading.is_number(label)]
            if wrong:
                raise ValueError(f"the label {brief(wrong[0])} holds not exactly one number, as {NUMERIC} needs.")
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


def name_of(dataset: str) -> str:
    """Returns the name of a dataset that is given by its name or its folder."""
    return read(dataset).name if is_folder(dataset) else dataset


def of(value: Any, *, where: str) -> Dataset:
    """Makes the dataset of what a dataset.json says, or a run's manifest."""
    try:
        found = typed(value, Definition)
        functions, same = _grading(found)
        made = Dataset(
            name=found.name,
            labels=found.labels,
            read_release=None,
            parsers={"strict": functools.partial(_strict, found)},
            metric_fns=functions,
            primary_metric=found.metric,
            same_label=same,
            is_label=grading.is_number if found.metric == NUMERIC else None,
            feature_lengths=found.lengths,
            definition=described(found),
        )
        made.check_name()
        return made
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _grading(definition: Definition) -> tuple[tuple[Callable[..., Mapping[str, Any]], ...], Callable[[str, str], bool]]:
    """Returns the metric functions, the primary one first, and the equality of one pair."""
    tolerances = {name: float(value) for name in _TOLERANCES if (value := getattr(definition, name))}
    functions = {
        name: functools.partial(METRICS[name], **tolerances) if name == NUMERIC and tolerances else METRICS[name]
        for name in (definition.metric, *definition.metrics)
    }
    of_pair = definition.metric if definition.metric.endswith("accuracy") else "normalized_accuracy"
    functions.setdefault(of_pair, METRICS[of_pair])
    return tuple(functions.values()), cast(Callable[[str, str], bool], grading.row_score(functions[of_pair]))


def described(definition: Definition) -> dict[str, Any]:
    """Inverts `of`, as JSON; later fields are left out at their defaults, so runs of earlier versions resume."""
    found = json.loads(json.dumps(dataclasses.asdict(definition)))
    later = {"metrics": [], **dict.fromkeys(_TOLERANCES, 0.0)}
    return {name: value for name, value in found.items() if name not in later or value != later[name]}


def _strict(definition: Definition, text: str, row: Row) -> Parsed:
    """Parses a reply: the rationale, the marker, then the answer up to the end of its line."""

    def read(rationale: str, answer: str) -> Parsed:
        possible = row.choices or definition.labels
        label = answer if possible is None else member(answer, possible)
        return unusable(LABEL_NOT_IN_SET) if not label else usable(rationale, label)

    return strict_reply(text, stops=definition.stops, marker=definition.marker, read=read)
