"""Definition of a dataset: its rows, labels, parsers and grading."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import checks
from sbs_jax.data.grading import same_text
from sbs_jax.data.markup import without_thinking
from sbs_jax.data.parsing import Parsed
from sbs_jax.data.records import Record
from sbs_jax.data.selection import LABEL, LABEL_GIVEN_RATIONALE, RATIONALE, TASKS
from sbs_jax.storage.json_files import brief

STEP_BY_STEP, CASCADE = "step_by_step", "cascade"
# Tasks of each kind of mixture, in the order of their turns; the first grades it.
MIXTURES = {STEP_BY_STEP: (LABEL, RATIONALE), CASCADE: (LABEL_GIVEN_RATIONALE, RATIONALE)}
KINDS = (*TASKS, *MIXTURES)  # of the tasks and mixtures of a dataset
# Joins premise and hypothesis in the text of records; becomes the vocabulary's EOS id.
JOINT = "</s>"
BY_LOSS = "token_accuracy"  # primary metric of a dataset without metric functions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One input row, as its source provides it.

    Attributes:
      id: id from the source; None if the source has none (`release.with_ids` then makes one).
      input: the student's input, without a task prefix.
      label: the human label; None for an unlabelled row.
      choices: possible labels of this row; () if the dataset's own set applies.
      weight: as of its record.
    """

    id: str | None = None
    input: str
    label: str | None
    choices: tuple[str, ...] = ()
    weight: int | float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Description of one dataset; each `tasks/<name>.py` defines one as `DATASET`.

    Attributes:
      name: first part of every task's name, e.g. "svamp".
      labels: the closed set of labels; None if it is open (SVAMP) or differs per row (CQA).
      read_release: folder of the official release -> rows in file order, per split; None if it is not in the release.
      parsers: parser name -> function of raw teacher text and its row that returns rationale, label and outcome.
      metric_fns: SeqIO metric functions, (targets, predictions) -> {name: value}. Without any, loss and token accuracy
        in teacher forcing grade the student, which generates nothing.
      primary_metric: the metric that picks the best checkpoint; higher is better.
      same_label: the metric's equality of one pair, (target, prediction) -> bool. Defines agreeing rationales and the
        teacher's accuracy.
      feature_lengths: {"inputs": .., "targets": ..} in tokens of the T5 vocabulary, prefix and EOS included; every row
        of the real data fits.
      is_label: recognizes a possible label by its form, if the set is open.
      implied_label: (rationale, the row's choices) -> the label named in the text itself, or None. Default: the only
        choice or label named by the last sentence that names any (`parsing.only_label_named`).
      scripted_reply: (prompt, sample number) -> a reply, or None if the prompt contains no input of this dataset. The
        offline teacher of `sbs teach --provider scripted`.
      read_further: file of another collection -> rows for `augmentation`, or for each problem that is none, the reason.
      definition: what its dataset.json says (dataset_folder.py); None for a dataset that is Python.
      module: {"file", "sha256"} of the file of `--module` that defines it (dataset_module.py); None for other datasets.
      tfds: name in TensorFlow Datasets, if the rows can come from there.
      tfds_row: makes a row from one TFDS example (bytes decoded to text).
    """

    name: str
    labels: tuple[str, ...] | None
    read_release: Callable[[Path], dict[str, list[Row]]] | None
    parsers: Mapping[str, Callable[[str, Row], Parsed]]
    metric_fns: tuple[Callable[..., Mapping[str, Any]], ...]
    primary_metric: str
    same_label: Callable[[str, str], bool]
    feature_lengths: Mapping[str, int]
    is_label: Callable[[str], bool] | None = None
    implied_label: Callable[[str, Sequence[str]], str | None] | None = None
    scripted_reply: Callable[[str, int], str | None] | None = None
    read_further: Callable[[Path], Iterable["Row | str"]] | None = None
    definition: Mapping[str, Any] | None = None
    module: Mapping[str, str] | None = None
    tfds: str | None = None
    tfds_row: Callable[[Mapping[str, Any]], Row] | None = None

    def __post_init__(self) -> None:
        check_lengths(self.feature_lengths)
        if not self.metric_fns and self.primary_metric != BY_LOSS:
            raise ValueError(
                f"Dataset {self.name!r} has no metric_fns; give at least one, or {BY_LOSS!r} as primary_metric."
            )

    def check_name(self) -> None:
        """Requires a name that task names can be made of; a task from outside has any."""
        suffixes = tuple(f"_{kind}" for kind in KINDS)
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or self.name.endswith(suffixes):
            raise ValueError(
                f"Dataset name {self.name!r}: expected lower-case letters, digits and underscores, starting with a "
                f"letter and not ending in one of {suffixes}."
            )

    def label_problem(self, label: str, choices: Sequence[str]) -> str | None:
        """Says why a text is no label of a row with these choices; None if it is one, or nothing tells."""
        possible = choices or self.labels
        if possible:
            if label in possible:
                return None
            near = checks.nearest(label, possible)
            return f"the label {brief(label)} is outside the label set {brief(list(possible))}; correct it.{near}"
        if self.is_label is None or self.is_label(label):
            return None
        checker = getattr(self.is_label, "__name__", "is_label")
        return f"{brief(label)} is not a valid label: {checker}() rejects it; correct it."

    def check_labels(self, rows: Iterable[Row | Record], *, where: Callable[[int], str]) -> None:
        """Raises ValueError for the first impossible human label; `where` names row i (from 0), with file and line.

        Every reader of rows with labels calls it.
        """
        for number, row in enumerate(rows):
            if row.label is not None and (problem := self.label_problem(row.label, row.choices)) is not None:
                raise ValueError(f"{where(number)}: {problem}")

    def impossible_labels(self, rows: Iterable[Record]) -> list[Record]:
        """Lists the rows whose teacher label cannot be one. The official parsers read such labels from real replies."""
        return [
            row
            for row in rows
            if row.teacher_label is not None and self.label_problem(row.teacher_label, row.choices) is not None
        ]

    def parse(self, text: str, row: Row, *, parser: str) -> Parsed:
        """Parses a teacher's reply, without its thinking (`<think>..</think>`), by the parser of this name."""
        return self.parsers[parser](without_thinking(text), row)


def tasks_of(kind: str) -> tuple[str, ...]:
    """Returns the kinds of the tasks of a mixture; of a task, its own.

    >>> tasks_of("cascade"), tasks_of("label")
    (('label_given_rationale', 'rationale'), ('label',))
    """
    return MIXTURES.get(kind, (kind,))


def answers_in_two_steps(kind: str) -> bool:
    """Tells whether a student writes a rationale first, and then reads it beside x to answer."""
    return tasks_of(kind)[0] == LABEL_GIVEN_RATIONALE


def of_text(name: str, *, lengths: Mapping[str, int]) -> Dataset:
    """Makes a dataset of plain text, which has no labels and is graded by its loss."""
    return Dataset(
        name=name,
        labels=None,
        read_release=None,
        parsers={},
        metric_fns=(),
        primary_metric=BY_LOSS,
        same_label=same_text,
        feature_lengths=lengths,
    )


def check_lengths(lengths: Mapping[str, int]) -> None:
    """Requires {"inputs": n, "targets": n}, each at least 2; raises ValueError otherwise."""
    if set(lengths) != {"inputs", "targets"}:
        raise ValueError(f"Feature lengths name {sorted(lengths)}; expected exactly 'inputs' and 'targets'.")
    for feature, length in lengths.items():
        checks.whole_number(f"The feature length of {feature!r}", length, least=2)  # a token and EOS
