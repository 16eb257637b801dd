"""The parts that one dataset consists of: its rows, labels, parsers and grading."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import checks
from sbs_jax.data.parsing import Parsed
from sbs_jax.data.selection import TASKS

STEP_BY_STEP = "step_by_step"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One input as its source has it.

    Attributes:
      id: the source's own id; None where it has none (`with_ids` then makes one).
      input: what the student reads, without a task prefix.
      label: the human's label; None where nobody labelled it.
      choices: the labels possible for this row; () where the dataset's own set holds.
    """

    id: str | None = None
    input: str
    label: str | None
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """What the project knows about one dataset; each `tasks/<name>.py` holds one as `DATASET`.

    Attributes:
      name: the name's first part in every task, e.g. "svamp".
      labels: the closed set of labels; None where it is open (SVAMP) or differs per row (CQA).
      read_release: the folder of the official release to rows in file order, per split.
      parsers: raw teacher text and its row to rationale, label and outcome, by parser name.
      metric_fns: SeqIO metric functions, (targets, predictions) to {name: value}.
      primary_metric: the metric, higher is better, that picks the best checkpoint.
      same_label: the metric's equality on one pair, (target, prediction) to bool. Decides which
        rationales agree with the label, and the teacher's accuracy.
      feature_lengths: {"inputs": .., "targets": ..} in tokens of the T5 vocabulary, prefix and
        EOS included, that hold every row of the real data.
      is_label: tells a possible label by its form, where the set is open.
      implied_label: (a rationale, the row's choices) to the label that the text itself names, or None. By default
        that of the choices or labels which its last sentence with any of them names alone (rationales.py).
      scripted_reply: (an input as a prompt asks it, the number of the sample) to a teacher's reply, or None where it
        is no input of this dataset: a teacher without a network (`sbs teach --provider scripted`).
      tfds: the TensorFlow Datasets name, where the rows can come from there.
      tfds_row: makes a row of one of its examples (with bytes decoded to text).
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
    tfds: str | None = None
    tfds_row: Callable[[Mapping[str, Any]], Row] | None = None

    def __post_init__(self) -> None:
        suffixes = tuple(f"_{task}" for task in (*TASKS, STEP_BY_STEP))
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name) or self.name.endswith(suffixes):
            raise ValueError(
                f"Dataset name {self.name!r}: expected lower-case letters, digits and "
                f"underscores, starting with a letter and not ending in one of {suffixes}."
            )
        check_lengths(self.feature_lengths)
        if not self.metric_fns:
            raise ValueError(f"Dataset {self.name!r} has no metric_fns, so nothing grades it.")


def check_lengths(lengths: Mapping[str, int]) -> None:
    """Raises ValueError unless `lengths` is {"inputs": n, "targets": n}, each at least 2."""
    if set(lengths) != {"inputs", "targets"}:
        raise ValueError(f"Feature lengths name {sorted(lengths)}; expected exactly 'inputs' and 'targets'.")
    for feature, length in lengths.items():
        checks.whole_number(f"The feature length of {feature!r}", length, least=2)  # a token and EOS
