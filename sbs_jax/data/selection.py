"""Selection of training and evaluation examples: a pure function of records and options. Standard library only."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, overload

from sbs_jax import checks
from sbs_jax.data import records
from sbs_jax.data.slots import NO_NUMBERS, Numbers

LABEL, RATIONALE, RATIONALE_THEN_LABEL = "label", "rationale", "rationale_then_label"
LABEL_GIVEN_RATIONALE = "label_given_rationale"
TASKS = (LABEL, RATIONALE, RATIONALE_THEN_LABEL, LABEL_GIVEN_RATIONALE)
TRAIN, VALIDATION, TEST = "train", "validation", "test"

_EITHER = "either"  # the human's label before the teacher's

# Separates rationale and label in the targets of `rationale_then_label`.
ANSWER_MARKER = "Answer:"
# Separates x and the rationale in the inputs of `label_given_rationale`.
RATIONALE_MARKER = " Rationale: "


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options for turning records into examples; bound from gin.

    Attributes:
      records_dir: folder with `<dataset>/<split>.jsonl`, as `sbs records` writes them.
      vocabulary: path of a SentencePiece model (local or gs://; 100 sentinels are added, as T5 does: T5's 32,000 pieces
        become 32,100 ids), or of a tokenizer.json with BPE, or "byte" (259 + 100 ids).
      label_source: train on the labels of "human" or "teacher". Validation and test are always graded against the
        human label, or the teacher's for rows without one.
      rationales: "all", or "agreeing": only those whose teacher label equals the label trained on.
      rationales_per_example: most rationales to use of a row, the first ones that `rationales` leaves, or "all". Each
        epoch visits a row once, with its next rationale in turn. Validation and test have the first.
      fraction: share of the training rows to use, in (0, 1]. Nested: with the same seed, a smaller fraction's rows are
        among a larger one's.
      seed: picks the rows of a fraction.
      train_split: file to train on: "train", or "validation", from which a validation split is then held out. (The
        released e-SNLI train inputs are too large to carry around; experiments train on its validation rows and test on
        its test rows.) Of several datasets, {"esnli": "validation"} is about one, and the others train on "train".
      validation_fraction: share of the training file, rounded up, that becomes the validation split if there is no
        other validation file. Depends on ids only: every seed, fraction and label source has the same validation rows.
        0 holds nothing out.
      label_prefix: prefix of the inputs of every task but `<dataset>_rationale`. The default is the official code's;
        the paper prints "[label] "; a single task needs none.
      rationale_prefix: prefix of the inputs of `<dataset>_rationale`; the paper's is "[rationale] ".
      dataset_prefix: text before both, for students of several datasets; "{dataset}" in it becomes the name.
      number_slots: replace the numbers of a row by slots in all its texts (slots.py); predictions get them back.
      corpus: files of plain text for `corpus_span_corruption` (corpus.py), one path or several.
      noise_density: share of a row's tokens that span corruption masks.
      mean_span: their average number in a span.
      folds: cross-validation: the rows of all files are cut by a hash of their ids into this many parts of equal size;
        part `fold` is the test split, and training and validation share the rest. 0 keeps the files' own splits.
      fold: the part to test, from 0. The parts depend on ids only: every seed, fraction and label source has the same.
      rates: how often each of several datasets has its turn: "equal" (the default), "proportional" to its training
        rows, or a rate for each, {"svamp": 1, "cqa": 3}; only ratios matter. None for a SeqIO mixture: its own rates.
      temperature: of proportional rates: rows ** (1 / temperature).
      rate_maximum: rows of a dataset that count for its proportional rate at most; None for all.
      read_rows: first rows to take of each split of a SeqIO task from outside (outside.py); None for all.
      augmentation: records of further rows to train on, each in the tasks that it has a target for; None for none.
        `fraction` does not apply to them, and validation and test never have them.
      pairs: train on the same rows for label and rationale, those with both, and keep the two of a row together in a
        batch: neighbours, and packed in one row. For a loss that ties them (student/mutual_information.py).
    """

    records_dir: str
    vocabulary: str
    label_source: str = "human"
    rationales: str = "all"
    fraction: int | float = 1.0
    seed: int = 0
    train_split: str | Mapping[str, str] = TRAIN
    validation_fraction: int | float = 0.1
    label_prefix: str = "predict: "
    rationale_prefix: str = "explain: "
    number_slots: bool = False
    corpus: str | Sequence[str] = ()
    noise_density: int | float = 0.15
    mean_span: int | float = 3.0
    folds: int = 0
    fold: int = 0
    augmentation: str | None = None
    dataset_prefix: str = ""
    rates: str | Mapping[str, int | float] | None = None
    temperature: int | float = 1.0
    rate_maximum: int | None = None
    read_rows: int | None = None
    pairs: bool = False
    rationales_per_example: int | str = 1

    def __post_init__(self) -> None:
        files = (self.corpus,) if isinstance(self.corpus, str) else tuple(self.corpus)
        if not all(isinstance(file, str) and file for file in files):
            raise ValueError(f"DataOptions.corpus is {self.corpus!r}; expected paths of text files.")
        object.__setattr__(self, "corpus", files)
        for name in ("records_dir", "vocabulary"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"DataOptions.{name} is {value!r}; expected a path.")
        for name in ("label_prefix", "rationale_prefix", "dataset_prefix"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"DataOptions.{name} is {getattr(self, name)!r}; expected text.")
        for name in ("number_slots", "pairs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"DataOptions.{name} is {getattr(self, name)!r}; expected True or False.")
        checks.choice("DataOptions.label_source", self.label_source, ("human", "teacher"))
        checks.choice("DataOptions.rationales", self.rationales, ("all", "agreeing"))
        if self.rationales_per_example != "all":
            most = self.rationales_per_example
            if isinstance(most, str):
                raise ValueError(f"DataOptions.rationales_per_example is {most!r}; expected a whole number or 'all'.")
            checks.whole_number("DataOptions.rationales_per_example", most, least=1)
        of_each = self.train_split if isinstance(self.train_split, Mapping) else {"": self.train_split}
        for name, file in of_each.items():
            checks.choice(f"DataOptions.train_split{name and f'[{name!r}]'}", file, (TRAIN, VALIDATION))
        checks.number("DataOptions.fraction", self.fraction, above=0, most=1)
        checks.number("DataOptions.validation_fraction", self.validation_fraction, least=0, below=1)
        checks.number("DataOptions.noise_density", self.noise_density, above=0, below=1)
        checks.number("DataOptions.mean_span", self.mean_span, least=1)
        checks.whole_number("DataOptions.seed", self.seed)
        if self.augmentation is not None and (not isinstance(self.augmentation, str) or not self.augmentation):
            raise ValueError(f"DataOptions.augmentation is {self.augmentation!r}; expected a path or None.")
        if not isinstance(self.rates, Mapping | None):
            checks.choice("DataOptions.rates", self.rates, ("equal", "proportional"))
        checks.number("DataOptions.temperature", self.temperature, above=0)
        for name in ("rate_maximum", "read_rows"):
            if getattr(self, name) is not None:
                checks.whole_number(f"DataOptions.{name}", getattr(self, name), least=1)
        checks.whole_number("DataOptions.folds", self.folds)
        checks.whole_number("DataOptions.fold", self.fold)
        if self.folds == 1:
            raise ValueError("DataOptions.folds is 1, which leaves no rows to train on; expected 0 or at least 2.")
        if self.fold >= max(1, self.folds):
            raise ValueError(f"DataOptions.fold is {self.fold} with {self.folds} folds; expected a smaller number.")
        if self.folds and self.train_split != TRAIN:
            raise ValueError(
                f"DataOptions.train_split is {self.train_split!r} with {self.folds} folds, which use the rows of all "
                "files; leave one of the two out."
            )


def of_dataset(options: DataOptions, dataset: str) -> DataOptions:
    """Returns the options as one dataset has them: its whole prefixes, and its own file to train on.

    >>> of_dataset(DataOptions(records_dir="r", vocabulary="byte", dataset_prefix="{dataset}, "), "svamp").label_prefix
    'svamp, predict: '
    """
    first = options.dataset_prefix.replace("{dataset}", dataset)
    prefixes = {name: first + getattr(options, name) for name in ("label_prefix", "rationale_prefix")}
    file = options.train_split
    file = file if isinstance(file, str) else file.get(dataset, TRAIN)
    return dataclasses.replace(options, dataset_prefix="", train_split=file, **prefixes)


class Example(NamedTuple):
    """One row of one task.

    `label` is the label to train on or, in evaluation, to grade against. `numbers` are those that slots stand for in
    `inputs` and `targets`.
    """

    id: str
    label: str
    inputs: str
    targets: str
    numbers: Numbers = NO_NUMBERS


def numbers_of(text: str, options: DataOptions) -> Numbers:
    """Lists the numbers of an input that become slots; none without `number_slots`."""
    return Numbers.of(text) if options.number_slots else NO_NUMBERS


def with_rationale(text: str, rationale: str) -> str:
    """Joins x and a rationale to the input that a label is asked from; a prefix comes before both.

    >>> with_rationale("Ann has 3 pens.", "There are 3. ")
    'Ann has 3 pens. Rationale: There are 3.'
    """
    return f"{text}{RATIONALE_MARKER}{rationale.strip()}"


class Examples(Sequence[Example]):
    """Examples of one task; each is made of its record when it is asked for, so that all take little memory.

    An example of a row with several rationales has the first; `texts` has all.
    """

    def __init__(self, task: str, rows: Sequence[records.Record], options: DataOptions, *, training: bool) -> None:
        """`rows` are those that the task can use."""
        self._task, self._rows, self._options = task, rows, options
        self._source = options.label_source if training else _EITHER
        # In an evaluation the student writes the rationale itself.
        self._joins = training and task == LABEL_GIVEN_RATIONALE

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(map(self._example, self._rows[index]))
        return self._example(self._rows[index])

    def texts(self, feature: str) -> Iterator[str]:
        """Yields the "inputs" of all examples, or all their "targets", those of one example together."""
        prefix = self._prefix
        if self._options.number_slots:
            found = ((row, numbers_of(row.input, self._options).hide) for row in self._rows)
            if feature == "inputs":
                return (prefix + hide(self._text(row)) for row, hide in found)
            return (hide(target) for row, hide in found for target in self._targets(row))
        if feature == "inputs":
            return (prefix + self._text(row) for row in self._rows)
        return itertools.chain.from_iterable(map(self._targets, self._rows))

    def target_counts(self) -> list[int] | None:
        """Counts the targets of each example; None if each has one, as without several rationales in a row."""
        if self._task in (LABEL, LABEL_GIVEN_RATIONALE) or not any(row.other_rationales for row in self._rows):
            return None
        return [len(self._targets(row)) for row in self._rows]

    def weights(self) -> list[float] | None:
        """Returns the weight of each example, 1 for rows without one; None if no row has a weight."""
        if all(row.weight is None for row in self._rows):
            return None
        return [1.0 if row.weight is None else float(row.weight) for row in self._rows]

    @property
    def _prefix(self) -> str:
        return self._options.rationale_prefix if self._task == RATIONALE else self._options.label_prefix

    def _text(self, row: records.Record) -> str:
        if not self._joins:
            return row.input
        return with_rationale(row.input, row.rationales[0].rationale if row.rationales else "")

    def _targets(self, row: records.Record) -> list[str]:
        """Returns a target for each rationale of the row; of labels, the one."""
        label = _label_of(row, self._source)[0] or ""
        if self._task in (LABEL, LABEL_GIVEN_RATIONALE):
            return [label]
        rationales = [each.rationale for each in row.rationales] or [""]
        if self._task == RATIONALE:
            return rationales
        return [f"{rationale} {ANSWER_MARKER} {label}".strip() for rationale in rationales]

    def _example(self, row: records.Record) -> Example:
        label = _label_of(row, self._source)[0] or ""
        numbers = numbers_of(row.input, self._options)
        inputs, targets = self._prefix + numbers.hide(self._text(row)), numbers.hide(self._targets(row)[0])
        return Example(row.id, label, inputs, targets, numbers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The examples of one split, per task, and counts of used and unused rows, by reason.

    `counts` reads from top to bottom, for example {"rows": 800, "held out for validation": 80,
    "outside the fraction": 540, "used": 180, "label": 180, "rationale": 175,
    "rationale: not used, blank rationale": 5, ..}. If rows have several rationales, "rationale: texts" counts these.
    """

    split: str
    examples: Mapping[str, Examples]
    counts: Mapping[str, int]


def rows_of(
    rows: Sequence[records.Record], options: DataOptions, *, split: str, hold_out: bool
) -> tuple[list[records.Record], Counter[str]]:
    """Returns the rows of files that belong to a split, before `fraction`, and counts all rows and the others.

    Args:
      rows: all records of the split's files, with distinct ids.
      options: folds and the share of validation.
      split: "train", "validation" or "test".
      hold_out: the files provide both train and validation; validation gets the held-out rows, train the others.
    """
    checks.choice("The split", split, (TRAIN, VALIDATION, TEST))
    counts: Counter[str] = Counter()
    counts["rows"] = len(rows)
    _check_distinct_ids(rows)

    def keep(mine: frozenset[str], *, others: bool, reason: str) -> None:
        nonlocal rows
        kept = [row for row in rows if (row.id in mine) != others]
        counts[reason] = len(rows) - len(kept)
        rows = kept

    if options.folds:
        tested = split == TEST
        reason = "tested in other folds" if tested else "tested in this fold"
        keep(fold_ids(rows, options.folds, fold=options.fold), others=not tested, reason=reason)
    if hold_out:
        held_out = held_out_ids(rows, options.validation_fraction)
        reason = "kept for training" if split == VALIDATION else "held out for validation"
        keep(held_out, others=split != VALIDATION, reason=reason)
    return list(rows), counts


def select(
    rows: Sequence[records.Record],
    options: DataOptions,
    *,
    same_label: Callable[[str, str], bool],
    split: str,
    hold_out: bool,
    further: Sequence[records.Record] = (),
) -> Selection:
    """Selects the examples that records files give to one split, and counts the other rows.

    Training drops the rows held out for validation, then those outside the fraction, and adds the further ones; the
    rest is the same for all tasks. Each task then drops rows it cannot use: no or blank label, no or blank rationale,
    and with `rationales="agreeing"` no rationale for its label. The order of the file is kept.

    Validation and test keep every row with any label (the human's before the teacher's). Fraction and agreement do not
    apply, and `rationale_then_label` and `label_given_rationale` keep rows without a rationale, since only the label is
    graded.

    Args:
      rows, split, hold_out: as for `rows_of`.
      options: label source, rationale filter, fraction, prefixes, folds.
      same_label: (label, teacher's label) -> whether they agree.
      further: records of `augmentation`; only training takes them.
    """
    rows, counts = rows_of(rows, options, split=split, hold_out=hold_out)
    if split == TRAIN:
        subset = subset_ids(rows, options.fraction, seed=options.seed)
        counts["outside the fraction"] = len(rows) - len(subset)
        rows = [*(row for row in rows if row.id in subset), *further]
        if further:
            counts["added by augmentation"] = len(further)
    counts["used"] = len(rows)
    training = split == TRAIN
    used: dict[str, list[records.Record]] = {task: [] for task in TASKS}
    unused: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
    for row in rows:
        row, no_rationale = _with_used_rationales(row, options, same_label, training=training)
        for task, reason in zip(TASKS, _unused(row, options, no_rationale, training=training), strict=True):
            if reason:
                unused[task][reason] += 1
            else:
                used[task].append(row)
    examples = {task: Examples(task, found, options, training=training) for task, found in used.items()}
    for task in TASKS:
        counts[task] = len(used[task])
        if (several := examples[task].target_counts()) is not None:
            counts[f"{task}: texts"] = sum(several)
        counts.update({f"{task}: not used, {reason}": count for reason, count in unused[task].items()})
    return Selection(
        split=split,
        examples=examples,
        counts=types.MappingProxyType(dict(counts)),
    )


def _with_used_rationales(
    row: records.Record, options: DataOptions, same_label: Callable[[str, str], bool], *, training: bool
) -> tuple[records.Record, str]:
    """Returns (row with its first usable rationales alone, ""), or (row, reason) if none is usable."""
    found = row.rationales
    if not found:
        return row, f"no rationale ({row.outcome})" if row.rationale is None else "blank rationale"
    used = found
    if training and options.rationales == "agreeing":
        label, no_label = _label_of(row, options.label_source)
        if label is None:
            return row, no_label
        used = tuple(each for each in used if each.teacher_label is not None and same_label(label, each.teacher_label))
        if not used:
            return row, "argues for another label"
    if isinstance(options.rationales_per_example, int):
        used = used[: options.rationales_per_example]
    if len(used) == 1 + len(row.other_rationales):  # all of them, and the row's own is not blank
        return row, ""
    return dataclasses.replace(row, rationale=used[0].rationale, other_rationales=used[1:]), ""


def _unused(
    row: records.Record, options: DataOptions, no_rationale: str, *, training: bool
) -> tuple[str, str, str, str]:
    """Returns for each of `TASKS` the reason why the row has no example, "" if it has one."""
    _, no_label = _label_of(row, options.label_source if training else _EITHER)
    if training and options.pairs:
        no_label = no_rationale = no_label or no_rationale
    if options.number_slots:
        try:
            numbers_of(row.input, options)
        except ValueError as error:
            raise ValueError(f"Row {row.id!r}: {error}") from None
    not_both = no_label or (no_rationale if training else "")
    return no_label, no_rationale, not_both, not_both


def _label_of(row: records.Record, source: str) -> tuple[str | None, str]:
    """Returns (label, "") or (None, reason). `source`: "human", "teacher" or `_EITHER`."""
    label = row.teacher_label if source == "teacher" else row.label
    if source == _EITHER and label is None:
        label = row.teacher_label
    if label is None:
        if source == "teacher":
            return None, f"no teacher label ({row.outcome})"
        return None, "no human label" if source == "human" else "no label"
    return (label, "") if label.strip() else (None, "blank label")


def held_out_ids(rows: Sequence[records.Record], fraction: int | float) -> frozenset[str]:
    """Returns the ids of the `ceil(fraction * n)` held-out rows: 0.1 of 9,741 is 975, 0.1 of 800 is 80."""
    return held_out([row.id for row in rows], fraction)


def held_out(ids: Sequence[str], fraction: int | float) -> frozenset[str]:
    """Returns the held-out ones of distinct ids, as `held_out_ids`."""
    return _first_by_hash(ids, fraction, salt="held out")


def subset_ids(rows: Sequence[records.Record], fraction: int | float, *, seed: int) -> frozenset[str]:
    """Returns the ids of the `ceil(fraction * n)` rows of a fraction; nested for equal rows and seed."""
    return _first_by_hash([row.id for row in rows], fraction, salt=f"seed {seed}")


def fold_ids(rows: Sequence[records.Record], folds: int, *, fold: int) -> frozenset[str]:
    """Returns the ids of one of `folds` parts whose sizes differ by at most 1; ValueError if a part would be empty."""
    if folds > len(rows):
        raise ValueError(f"DataOptions.folds is {folds}, but there are {len(rows)} rows; expected at most one per row.")
    return frozenset(_by_hash([row.id for row in rows], salt="fold")[fold::folds])


def _first_by_hash(ids: Sequence[str], fraction: int | float, *, salt: str) -> frozenset[str]:
    # Uses the decimal text: in floats 0.07 * 100 is 7.000000000000001, whose ceiling is 8.
    count = math.ceil(Fraction(str(fraction)) * len(ids))
    if count == len(ids):
        return frozenset(ids)
    return frozenset(_by_hash(ids, salt=salt)[:count])


def _by_hash(ids: Sequence[str], *, salt: str) -> list[str]:
    return sorted(ids, key=lambda row_id: (hashlib.sha256(f"{salt}:{row_id}".encode()).digest(), row_id))


def _check_distinct_ids(rows: Sequence[records.Record]) -> None:
    if len({row.id for row in rows}) < len(rows):
        row_id, times = Counter(row.id for row in rows).most_common(1)[0]
        raise ValueError(
            f"The id {row_id!r} occurs {times} times in one split; examples are joined by id, so make ids distinct."
        )
