"""Names of tasks and mixtures: their datasets and kinds, the tasks of a mixture, its turns and objectives.

| name                      | what it is                                                                    |
|---------------------------|-------------------------------------------------------------------------------|
| `svamp_label`, ..         | a task of one dataset (registry.py)                                           |
| `svamp_step_by_step`      | a mixture of two of them, in strict turns; `svamp_cascade` is another          |
| `svamp.cqa_step_by_step`  | the same of several datasets, which take turns by their rates                 |
| `corpus_span_corruption`  | plain text (corpus.py)                                                        |
| any other                 | a task or mixture that somebody else has registered in SeqIO (outside.py)     |

A *part* of a name is what would be trained alone: `svamp_step_by_step` and `cqa_step_by_step`; of a mixture from
outside, each of its tasks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from sbs_jax import checks
from sbs_jax.data import catalogue, corpus, dataset_folder, outside
from sbs_jax.data.dataset import KINDS, Dataset, tasks_of
from sbs_jax.data.grading import SCORE
from sbs_jax.data.selection import LABEL, LABEL_GIVEN_RATIONALE, RATIONALE, RATIONALE_THEN_LABEL, DataOptions
from sbs_jax.student import losses

# Values of the feature `task_ids` of one dataset: the objective that a task's target tokens count towards.
TASK_IDS = {
    LABEL: losses.LABEL,
    RATIONALE: losses.RATIONALE,
    RATIONALE_THEN_LABEL: losses.LABEL,
    LABEL_GIVEN_RATIONALE: losses.LABEL,
    corpus.SPAN_CORRUPTION: losses.LABEL,
    outside.KIND: losses.LABEL,
}
JOINT = "."  # between the datasets of a mixture
_TURNS = 65_536  # most turns in a cycle, of datasets whose rates are no small whole numbers


# ------------------------------------------------------------------------------------- names


def task_name(*, dataset: str | Sequence[str], kind: str) -> str:
    """Returns the SeqIO name of a task or mixture of datasets, or of their folders; gin's method files use it.

    >>> task_name(dataset="svamp", kind="step_by_step")
    'svamp_step_by_step'
    >>> task_name(dataset=("svamp", "cqa"), kind="label")
    'svamp.cqa_label'
    """
    names = [dataset] if isinstance(dataset, str) else [*dataset]
    names = [catalogue.get(name).name if dataset_folder.is_folder(name) else name for name in names]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"DATASET is {dataset!r}; expected the name of a dataset, or different ones in a tuple.")
    for name in names:
        split(f"{name}_{kind}")
    return f"{JOINT.join(names)}_{kind}"


def known() -> tuple[str, ...]:
    """Returns the names of the tasks and mixtures of single datasets."""
    return (*(f"{dataset}_{kind}" for dataset in catalogue.names() for kind in KINDS), corpus.TASK)


def split(name: str) -> tuple[Dataset, str]:
    """Splits 'svamp_rationale_then_label' into (svamp's Dataset, 'rationale_then_label').

    ValueError with near matches if there is no such task, or if the name is a mixture of several datasets.
    """
    found = _own(name)
    if found is not None:
        return found
    if (names := _several(name) or outside.tasks(name)) and names != (name,):
        raise ValueError(
            f"{name} has several parts; expected one of them: {', '.join(names)}. Where a command takes --dataset, "
            "it chooses one."
        )
    if names:
        return outside.dataset(name), outside.KIND
    raise ValueError(
        f"Unknown task or mixture {name!r}.{checks.nearest(name, (*known(), *outside.names()))} Known are "
        f"<dataset>_<{'|'.join(KINDS)}> for the datasets {list(catalogue.names())}, or for several of them as "
        f"<dataset>{JOINT}<dataset>_.., {corpus.TASK}, and what a --module registers in SeqIO."
    )


def parts(name: str) -> tuple[str, ...]:
    """Returns the parts of a mixture of several datasets, or of one from outside, in order; else the name itself."""
    if _own(name) is not None:
        return (name,)
    found = _several(name) or outside.tasks(name)
    if not found:
        split(name)  # says what is known
    return found


def _own(name: str) -> tuple[Dataset, str] | None:
    if name == corpus.TASK:
        return corpus.DATASET, corpus.SPAN_CORRUPTION
    for dataset in catalogue.registered().values():
        if name.startswith(f"{dataset.name}_") and (kind := name.removeprefix(f"{dataset.name}_")) in KINDS:
            return dataset, kind
    return None


def _several(name: str) -> tuple[str, ...]:
    """Returns the parts of a mixture of several datasets; () if the name is none."""
    for kind in KINDS:
        datasets = name.removesuffix(f"_{kind}").split(JOINT)
        if len(datasets) > 1 and name.endswith(f"_{kind}") and set(datasets) <= set(catalogue.registered()):
            return tuple(f"{dataset}_{kind}" for dataset in datasets)
    return ()


def is_outside(name: str) -> bool:
    """Tells whether a task or mixture is none of this project's, but is in SeqIO's registry."""
    return _own(name) is None and not _several(name) and bool(outside.tasks(name))


def dataset_of(name: str) -> Dataset:
    """Returns the dataset of a part."""
    return split(name)[0]


def datasets(name: str) -> tuple[str, ...]:
    """Returns the name of the dataset of each part; of a part from outside, its task's."""
    return tuple(dataset_of(part).name for part in parts(name))


def answering(name: str) -> tuple[Dataset, str]:
    """Splits as `split`; ValueError for a task whose student answers nothing."""
    dataset, kind = split(name)
    if kind == corpus.SPAN_CORRUPTION:
        raise ValueError(
            f"This student was pre-trained on text ({name}) and answers no questions. Fine-tune it first: its run "
            "is the INITIAL_CHECKPOINT_PATH of an experiment."
        )
    return dataset, kind


def subtasks(name: str) -> tuple[str, ...]:
    """Returns the tasks of a mixture, part by part; for a task, itself."""
    found: list[str] = []
    for part in parts(name):
        dataset, kind = split(part)
        found += [f"{dataset.name}_{task}" for task in tasks_of(kind)] if kind in KINDS else [part]
    return tuple(found)


def graded(name: str) -> tuple[str, ...]:
    """Returns the task that grades each part, by answers or by loss; () if there are only rationales.

    A mixture is graded by its label task: step-by-step without rationales, which cost nothing at inference, and the
    cascade after the student's own.
    """
    found = []
    for part in parts(name):
        dataset, kind = split(part)
        if kind != RATIONALE:
            found.append(f"{dataset.name}_{tasks_of(kind)[0]}" if kind in KINDS else part)
    return tuple(found)


def primary_metric(tasks: Sequence[str]) -> str | None:
    """Returns the metric that picks the best checkpoint: a task's own, `score` of several; None without tasks."""
    if len(tasks) > 1:
        return SCORE
    return dataset_of(tasks[0]).primary_metric if tasks else None


# -------------------------------------------------------------------------------- objectives


def objectives(
    name: str,
    *,
    alpha: Any,
    weights: Mapping[str, int | float] | None = None,
    smoothing: int | float = 0.0,
) -> tuple[losses.Objective, ...]:
    """Returns the objectives of the loss; `task_ids` numbers them from 1.

    One dataset has labels with alpha and rationales with the rest; `smoothing` is of the labels. Each of several
    datasets has these two times its weight, named `svamp/label`; without `weights` the weights are equal and add up to
    1. A task or mixture from outside is one objective, the mean over all target tokens; with `weights`, each of its
    tasks is one.
    """
    found = parts(name)
    if _own(name) is not None:
        if weights is not None:
            raise ValueError(
                f"LOSS_WEIGHTS is {dict(weights)!r}, but {name} is one dataset; ALPHA weighs its two tasks."
            )
        return losses.step_by_step(alpha, smoothing=smoothing)
    names = datasets(name)
    given = None if weights is None else _for_each(names, weights, macro="LOSS_WEIGHTS", what="weight")
    if is_outside(name):
        if given is None:
            return (losses.Objective("targets", 1.0, smoothing),)
        return tuple(losses.Objective(part, weight, smoothing) for part, weight in zip(found, given, strict=True))
    shares = given or [1.0 / len(found)] * len(found)
    return tuple(
        dataclasses.replace(objective, name=f"{dataset}/{objective.name}", weight=share * objective.weight)
        for dataset, share, part in zip(names, shares, found, strict=True)
        for number, objective in enumerate(losses.step_by_step(alpha, smoothing=smoothing), start=1)
        if number in _ids_of_part(part)
    )


def _for_each(names: Sequence[str], given: Mapping[str, int | float], *, macro: str, what: str) -> list[float]:
    """Returns the number above 0 that a macro gives each name. ValueError for a missing or an unknown name."""
    for name in sorted(set(given) - set(names)):
        raise ValueError(
            f"{macro} has {name!r}, which is not trained; expected {list(names)}.{checks.nearest(name, names)}"
        )
    for name in names:
        if name not in given:
            raise ValueError(f"{macro} gives {name!r} no {what}; give each of {list(names)} one.")
        checks.number(f"{macro}[{name!r}]", given[name], above=0)
    return [float(given[name]) for name in names]


def _ids_of_part(part: str) -> list[int]:
    return sorted({TASK_IDS[split(task)[1]] for task in subtasks(part)})


def task_ids(name: str, *, weights: Mapping[str, int | float] | None = None) -> tuple[int, ...]:
    """Returns the number of its objective, from 1, for each of `subtasks`."""
    if _own(name) is not None:
        return tuple(TASK_IDS[split(task)[1]] for task in subtasks(name))
    if is_outside(name):
        return tuple(range(1, len(parts(name)) + 1)) if weights is not None else (1,) * len(parts(name))
    found, before = [], 0
    for part in parts(name):
        mine = _ids_of_part(part)
        found += [before + 1 + mine.index(TASK_IDS[split(task)[1]]) for task in subtasks(part)]
        before += len(mine)
    return tuple(found)


# -------------------------------------------------------------------------------------- turns


def turns(name: str, options: DataOptions, *, rows: Mapping[str, int]) -> np.ndarray:
    """Returns the cycle in which the tasks of a mixture take turns: numbers of `subtasks`, int64 [n].

    Every part appears as often as its rate says, as evenly as possible; the tasks of a part always follow one another.
    Label and rationale of one row so meet in a batch. `rows` counts the training rows of each of `subtasks`.
    """
    found = parts(name)
    members: list[list[int]] = []
    for part in found:
        first = sum(map(len, members))
        members.append([*range(first, first + len(subtasks(part)))])
    names = subtasks(name)
    sizes = [max(rows[names[number]] for number in mine) for mine in members]
    order = cycle(rates(name, options, rows=sizes))
    return np.array([*itertools.chain.from_iterable(members[part] for part in order)])


def rates(name: str, options: DataOptions, *, rows: Sequence[int]) -> list[float]:
    """Returns the rate of each part: DataOptions.rates, or those of a SeqIO mixture; only their ratios matter."""
    found = parts(name)
    if len(found) == 1:
        return [1.0]
    chosen = options.rates
    if chosen is None and is_outside(name):
        return outside.rates(name)
    if isinstance(chosen, Mapping):
        return _for_each(datasets(name), chosen, macro="RATES", what="rate")
    if chosen in (None, "equal"):
        return [1.0] * len(found)
    most = options.rate_maximum or math.inf
    return [min(count, most) ** (1.0 / options.temperature) for count in rows]


def cycle(rates: Sequence[float]) -> list[int]:
    """Returns an order of parts in which each appears in proportion to its rate, as evenly spread as possible.

    Whole numbers are exact. Other rates are rounded to a share of 65,536 turns, and each part has one turn at least.

    >>> cycle([1.0, 1.0, 1.0])
    [0, 1, 2]
    >>> cycle([3.0, 1.0])
    [0, 0, 1, 0]
    """
    fractions = [Fraction(rate) for rate in rates]
    shared = math.lcm(*(each.denominator for each in fractions))
    counts = [int(each * shared) for each in fractions]
    common = math.gcd(*counts)
    counts = [count // common for count in counts]
    if sum(counts) > _TURNS:
        counts = [max(1, round(float(each / sum(fractions)) * _TURNS)) for each in fractions]
    part = np.repeat(np.arange(len(counts)), counts)
    turn = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (2 * turn + 1) / (2 * np.repeat(counts, counts))
    return part[np.lexsort((part, place))].tolist()
