"""Rewards of answers that can be checked: by the row's label, by their form, by their length.

A reward takes an `Answer` and returns a number, best between 0 and 1; `REWARDS = {"label": 1.0, "ended": 0.1}` weighs
them. A user's own is a function of an `Answer`, bound to OWN_REWARD and weighed as "own".
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sbs_jax import checks
from sbs_jax.data import registry, selection
from sbs_jax.data.dataset import Dataset

OWN = "own"
KINDS = (selection.LABEL, selection.RATIONALE_THEN_LABEL)  # of tasks whose answers can be graded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A sampled answer to a row of a task.

    Attributes:
      text: what the student wrote, up to EOS; `right` is the text that the dataset has.
      dataset, kind: of the task; the kind is one of KINDS.
      tokens: number of its tokens, EOS included, of at most `most`.
      ended: it has an EOS.
    """

    text: str
    right: str
    dataset: Dataset
    kind: str
    tokens: int
    most: int
    ended: bool

    def label(self, text: str) -> str:
        """Takes the label from a text of the task; '' without one."""
        return registry.graded_text(text, kind=self.kind)


def label(answer: Answer) -> float:
    """Rewards the row's label, as the dataset compares labels: equations by their value."""
    return float(answer.dataset.same_label(answer.label(answer.text), answer.label(answer.right)))


def form(answer: Answer) -> float:
    """Rewards an answer that can be graded: a label of the closed set, or of an open one any text in its place."""
    found = answer.label(answer.text)
    return float(found in answer.dataset.labels if answer.dataset.labels is not None else bool(found))


def ended(answer: Answer) -> float:
    """Rewards an answer that ends in time."""
    return float(answer.ended)


def short(answer: Answer) -> float:
    """Rewards the share of the longest answer's tokens that were not needed."""
    return 1.0 - answer.tokens / answer.most


BY_NAME: Mapping[str, Callable[[Answer], float]] = {"label": label, "form": form, "ended": ended, "short": short}


def check(weights: Mapping[str, int | float], own: Callable[[Answer], float] | None) -> None:
    """Raises ValueError for an unknown reward, a weight that is no number, or "own" without a function."""
    if not weights:
        raise ValueError("TrainConfig.rewards is empty; expected weights by name, such as {'label': 1.0}, or None.")
    for name, weight in weights.items():
        checks.choice("A reward", name, (*BY_NAME, OWN))
        checks.number(f"TrainConfig.rewards[{name!r}]", weight)
    if (OWN in weights) != (own is not None):
        raise ValueError(
            f"TrainConfig.rewards is {dict(weights)!r} and own_reward {own!r}; give both {OWN!r} a weight and "
            "OWN_REWARD a function (gin: @my_module.my_reward), or neither."
        )


def of(answer: Answer, names: tuple[str, ...], own: Callable[[Answer], Any] | None) -> list[float]:
    """Computes the rewards of an answer, in the order of the names. ValueError for an own one that is no number."""
    functions = BY_NAME if own is None else {**BY_NAME, OWN: own}
    found = [float(functions[name](answer)) for name in names]
    for name, value in zip(names, found, strict=True):
        checks.number(f"The reward {name!r} of the answer {answer.text!r}", value)
    return found
