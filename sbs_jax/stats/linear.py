"""Models of words that answer a dataset's questions without a student: the measuring of baselines.

Every row has candidates: the labels of a closed set, the row's own choices, or the templates of the training labels,
in which slots stand for numbers (slots.py). Three models pick one:

- majority: the candidate that is right most often in training, whatever the row says;
- partial: a linear model of the hypothesis without its premise, or of the choices without their question;
- linear: a linear model of all words and neighbours, of which words of the hypothesis (choice) the premise (question)
  has too, and of their share. (Pairs of a word of each part cost points and minutes: docs/experiments.md.)

A linear model is a softmax over the candidates' scores, fitted by L-BFGS with an L2 penalty chosen on validation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sbs_jax.data import registry, selection
from sbs_jax.data.dataset import JOINT, Dataset
from sbs_jax.data.slots import Numbers
from sbs_jax.stats import intervals
from sbs_jax.stats.baselines import LINEAR, MAJORITY, PARTIAL, Baseline, Baselines

if TYPE_CHECKING:
    from scipy import sparse

PENALTIES = (0.1, 1.0, 10.0)  # factors of half the squared norm; the summed log-likelihood has factor 1
_LONG = 15  # words of a hypothesis or choice that are not counted further
_WORD = re.compile(r"<extra_id_[0-9]+>|[^\W_]+(?:'[a-z]+)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """A labelled row as words.

    Attributes:
      context: words of the premise or question.
      focus: words of the hypothesis, or of each choice, in the order of the text.
      right: for each candidate, whether it is right. In training only the row's own template is: others may have the
        same value by chance.
    """

    context: tuple[str, ...]
    focus: tuple[tuple[str, ...], ...]
    right: tuple[bool, ...]


def measure(name: str, *, train: Sequence[str] = (selection.TRAIN,), split: str = selection.TEST) -> Baselines:
    """Fits the baselines of a dataset on the splits `train` under the current options, and grades them on `split`.

    With folds, each is fitted and graded once, and accuracies are over all their rows. Labels are graded as a student's
    are. Takes seconds for 10,000 rows. ValueError if no training row has a label.
    """
    options = registry.options()
    rows, right = 0, dict[str, list[bool]]()
    for fold in range(max(1, options.folds)):
        registry.configure(dataclasses.replace(options, fold=fold))
        learned, of_fold = _measure(name, train=train, split=split)
        rows += learned
        for model, graded in of_fold.items():
            right.setdefault(model, []).extend(graded)
    registry.configure(options)
    hashes = {each: facts["sha256"] for each, facts in registry.sources(name)["splits"].items()}
    found = Baselines(
        train=list(train),
        train_rows=round(rows / max(1, options.folds)),
        test_rows=len(right[MAJORITY]),
        sha256={each: hashes[each] for each in (*train, split)},
        models={model: _graded(of_model) for model, of_model in right.items()},
    )
    if options.folds:
        found["folds"] = options.folds
    if options.augmentation is not None:
        found["augmentation"] = Path(options.augmentation).name
    return found


def _measure(name: str, *, train: Sequence[str], split: str) -> tuple[int, dict[str, list[bool]]]:
    """Returns the number of training rows and, by model, whether it is right on each row of `split`."""
    dataset = registry.get(name)
    learned = [row for each in train for row in _labelled(name, each)]
    if not learned:
        raise ValueError(f"{name} has no labelled rows in {', '.join(train)}; baselines learn from labels.")
    read, exact = _readers(dataset, learned)
    rows, test = [exact(*row) for row in learned], [read(*row) for row in _labelled(name, split)]
    held_out = [] if selection.VALIDATION in train else [read(*row) for row in _labelled(name, selection.VALIDATION)]
    models = {MAJORITY: _majority(rows, test)}
    if any(row.context and any(row.focus) for row in rows):
        models[PARTIAL] = _linear(rows, held_out, test, lambda context, focus: _features((), focus))
    models[LINEAR] = _linear(rows, held_out, test, _features)
    return len(rows), models


def _graded(right: Sequence[bool]) -> Baseline:
    accuracy, low, high = intervals.accuracy_interval(np.array([right], float))
    return Baseline(accuracy=accuracy, low=low, high=high)


# --------------------------------------------------------------------------------------- rows


def _labelled(name: str, split: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Returns (input without prefix, label, choices) of a split's labelled rows; [] if there is no such split."""
    if split not in registry.available_splits(name):
        return []
    choices = {record.id: record.choices for record in registry.read_split(name, split)}
    prefix = registry.options().label_prefix
    chosen = registry.selected(name, split).examples[selection.LABEL]
    return [(each.inputs.removeprefix(prefix), each.label, choices[each.id]) for each in chosen]


_Reader = Callable[[str, str, tuple[str, ...]], _Row]


def _readers(dataset: Dataset, learned: Sequence[tuple[str, str, tuple[str, ...]]]) -> tuple[_Reader, _Reader]:
    """Returns two functions that make a row of (input, label, choices): one to grade it, one to learn from it."""
    same = dataset.same_label

    def with_choices(text: str, label: str, choices: tuple[str, ...]) -> _Row:
        question = text
        for choice in reversed(choices):  # they are listed after the question
            question = " ".join(question.rpartition(choice)[::2])
        right = tuple(same(label, choice) for choice in choices)
        return _Row(context=_words(question), focus=tuple(map(_words, choices)), right=right)

    def with_labels(text: str, label: str, choices: tuple[str, ...]) -> _Row:
        del choices
        context, _, judged = text.rpartition(JOINT)
        right = tuple(same(label, each) for each in labels)
        return _Row(context=_words(context), focus=(_words(judged),), right=right)

    def with_templates(text: str, label: str, choices: tuple[str, ...], *, exact: bool) -> _Row:
        del choices
        numbers = Numbers.of(text)
        right = tuple(numbers.fill(t) == label if exact else same(label, numbers.fill(t)) for t in templates)
        return _Row(context=(), focus=(_words(numbers.hide(text)),), right=right)

    if any(choices for _, _, choices in learned):
        return with_choices, with_choices
    labels = dataset.labels or ()
    if labels:
        return with_labels, with_labels
    templates = tuple(dict.fromkeys(Numbers.of(text).hide(label) for text, label, _ in learned))
    return functools.partial(with_templates, exact=False), functools.partial(with_templates, exact=True)


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


# ------------------------------------------------------------------------------------- models


def _majority(rows: Sequence[_Row], test: Sequence[_Row]) -> list[bool]:
    counts = Counter(k for row in rows for k, right in enumerate(row.right) if right)
    best = max(sorted(counts), key=counts.__getitem__)
    return [best < len(row.right) and row.right[best] for row in test]


def _features(context: tuple[str, ...], focus: tuple[str, ...]) -> Iterator[str]:
    words = dict.fromkeys(focus)
    yield from words
    yield from dict.fromkeys(f"{a} {b}" for a, b in itertools.pairwise(("", *focus, "")))
    if context:
        known = words.keys() & set(context)
        yield from (f"{word} {'too' if word in known else 'new'} " for word in words)
        yield f"{5 * len(known) // max(len(words), 1)} of 5 known "
        yield f"{min(len(focus), _LONG)} words "


_Features = Callable[[tuple[str, ...], tuple[str, ...]], Iterator[str]]


def _linear(rows: Sequence[_Row], held_out: Sequence[_Row], test: Sequence[_Row], features: _Features) -> list[bool]:
    """Fits a linear model for each penalty, keeps the best on the held-out rows, and returns its grades on test."""
    columns: dict[str, int] = {}
    rows = [row for row in rows if any(row.right)]  # others have no candidate to learn
    design = _Design.of(rows, features, columns, grow=True)
    penalties = PENALTIES if held_out else (1.0,)
    held_out_design = _Design.of(held_out, features, columns) if held_out else design
    weights, best, best_share = np.zeros(len(columns) * design.outputs), np.zeros(0), -1.0
    for penalty in sorted(penalties, reverse=True):  # each starts from the last, which is near
        weights = design.fit(penalty, start=weights)
        share = float(np.mean(held_out_design.grades(weights)))
        if share > best_share:
            best, best_share = weights, share
    return _Design.of(test, features, columns).grades(best).tolist()


@dataclasses.dataclass(frozen=True)
class _Design:
    """Features of all pairs of a row and a candidate.

    Attributes:
      given: [G, D] features: of each pair, the candidates of a row together, or of each row.
      starts: [R] index of each row's first pair.
      right: [P] whether the candidate is right.
      outputs: P / G, the scores that a row of `given` has, each with weights of its own: its candidates, or 1.
    """

    given: sparse.csr_array
    starts: np.ndarray
    right: np.ndarray
    outputs: int

    @classmethod
    def of(cls, rows: Sequence[_Row], features: _Features, columns: dict[str, int], *, grow: bool = False) -> _Design:
        """Makes the features of rows, in the `columns` seen in training; `grow` adds columns for new ones."""
        from scipy import sparse

        indices: list[int] = []
        ends = [0]
        for row in rows:
            for focus in row.focus:
                for name in features(row.context, focus):
                    column = columns.setdefault(name, len(columns)) if grow else columns.get(name)
                    if column is not None:
                        indices.append(column)
                ends.append(len(indices))
        found = sparse.csr_array((np.ones(len(indices)), indices, ends), shape=(len(ends) - 1, len(columns)))
        same = all(len(row.focus) == 1 for row in rows)  # the same candidates for all rows
        sizes = [len(row.right) for row in rows]
        right = np.array([right for row in rows for right in row.right])
        return cls(found, np.concatenate([[0], np.cumsum(sizes)[:-1]]), right, len(rows[0].right) if same else 1)

    def _scores(self, weights: np.ndarray) -> np.ndarray:
        """Returns the score of each pair, [P]."""
        return (self.given @ weights.reshape(-1, self.outputs)).ravel()

    @property
    def sizes(self) -> np.ndarray:
        """Number of candidates of each row, [R]."""
        return np.diff(np.append(self.starts, len(self.right)))

    def fit(self, penalty: float, *, start: np.ndarray) -> np.ndarray:
        """Returns weights [D * outputs] that minimize the sum of -log P(right), plus penalty / 2 times their square."""
        from scipy import optimize

        transposed = self.given.T.tocsr()
        sizes = self.sizes

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            scores = self._scores(weights)
            scores -= np.repeat(np.maximum.reduceat(scores, self.starts), sizes)
            shares = np.exp(scores)
            total = np.add.reduceat(shares, self.starts)
            hit = np.maximum(np.add.reduceat(shares * self.right, self.starts), 1e-300)
            slope = shares / np.repeat(total, sizes) - shares * self.right / np.repeat(hit, sizes)
            value = float(np.sum(np.log(total) - np.log(hit))) + penalty / 2 * float(weights @ weights)
            return value, (transposed @ slope.reshape(-1, self.outputs)).ravel() + penalty * weights

        return optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x

    def grades(self, weights: np.ndarray) -> np.ndarray:
        """Returns for each row [R] whether its candidate with the highest score is right."""
        scores = self._scores(weights)
        rows = zip(self.starts, self.sizes, strict=True)
        return np.array([self.right[start + np.argmax(scores[start : start + size])] for start, size in rows])
