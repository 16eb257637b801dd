"""Grading of answers: exact match of text, and equal values of two equations.

`accuracy` and `equation_accuracy` are SeqIO metric functions: they take the lists `targets` and `predictions` and
return percentages (0 to 100), as T5X's and SeqIO's metrics do. `same_text` and `same_equation_value` grade one pair;
the filter for agreeing rationales and the teacher's accuracy use them.

Standard library only (exports contain a copy of this file), and no `eval`: a model's text never runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

# Equations of the real data have at most 40 characters. The limits keep hostile text cheap: they bound the size of
# every number and the depth of the recursion.
MAX_CHARACTERS = 500
MAX_DEPTH = 50

# ASCII digits only: `\d` would take every script's digits.
_TOKEN = re.compile(r"[ \t\r\n]*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|([-+*/()]))")


def equation_value(text: str) -> Fraction | None:
    """Computes the exact value of an arithmetic expression; None for any other text. Never raises.

    Accepts integers and decimals, `+ - * /`, unary minus, parentheses and ASCII white space. Everything else is None:
    names, `**`, comparisons, tuples, exponents such as `1e9`, division by zero, more than `MAX_CHARACTERS` characters,
    nesting deeper than `MAX_DEPTH`.

    >>> equation_value("( 84.0 / 2.0 )")
    Fraction(42, 1)
    >>> equation_value("0.1 + 0.2") == equation_value("0.3")
    True
    >>> equation_value("(14, 21)") is None
    True
    """
    if len(text) > MAX_CHARACTERS:
        return None
    tokens: list[str] = []
    position, end = 0, len(text.rstrip(" \t\r\n"))
    while position < end:
        match = _TOKEN.match(text, position, end)
        if match is None:
            return None
        tokens.append(match[1] or match[2])
        position = match.end()
    try:
        value, rest = _sum(tokens, 0, 0)
    except (_NotArithmeticError, ZeroDivisionError):
        return None
    return value if rest == len(tokens) else None


class _NotArithmeticError(Exception):
    """Tokens do not form an expression, or nest too deeply."""


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        operator = tokens[at]
        term, at = _product(tokens, at + 1, depth)
        value = value + term if operator == "+" else value - term
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        operator = tokens[at]
        factor, at = _factor(tokens, at + 1, depth)
        value = value * factor if operator == "*" else value / factor
    return value, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if at >= len(tokens) or depth > MAX_DEPTH:
        raise _NotArithmeticError
    token = tokens[at]
    if token == "-":
        value, at = _factor(tokens, at + 1, depth + 1)
        return -value, at
    if token == "(":
        value, at = _sum(tokens, at + 1, depth + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise _NotArithmeticError
        return value, at + 1
    if token in ")+*/":
        raise _NotArithmeticError
    return Fraction(token), at + 1


def same_text(target: str, prediction: str) -> bool:
    """Compares two texts, character by character."""
    return target == prediction


def same_normalized_text(target: str, prediction: str) -> bool:
    """Compares two texts without case, punctuation at the ends of words, and repeated white space."""
    return _normalized(target) == _normalized(prediction)


def _normalized(text: str) -> list[str]:
    words = (word.strip(".,;:!?'()[]`*" + '"') for word in text.casefold().split())
    return [word for word in words if word]


def same_equation_value(target: str, prediction: str) -> bool:
    """Compares the exact values of two equations; text that has no value equals nothing, not even itself."""
    value = equation_value(target)
    return value is not None and value == equation_value(prediction)


def accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions that equal their target exactly: {"accuracy": 0..100}."""
    return {"accuracy": percentage_right(targets, predictions, same_text)}


def normalized_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of predictions that equal their target normalized: {"normalized_accuracy": 0..100}."""
    return {"normalized_accuracy": percentage_right(targets, predictions, same_normalized_text)}


def equation_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of equations with their target's value: {"equation_accuracy": 0..100}."""
    right = percentage_right(targets, predictions, same_equation_value)
    return {"equation_accuracy": right}


def percentage_right(targets: Sequence[str], predictions: Sequence[str], same: Callable[[str, str], bool]) -> float:
    """Returns the percentage of pairs that `same(target, prediction)` accepts.

    Raises ValueError if the lists differ in length or are empty.
    """
    if len(targets) != len(predictions):
        raise ValueError(
            f"Got {len(targets)} targets and {len(predictions)} predictions; expected one prediction per target, in "
            "order."
        )
    if not targets:
        raise ValueError("Got no predictions to grade: the evaluated split is empty.")
    right = sum(same(target, guess) for target, guess in zip(targets, predictions, strict=True))
    return 100.0 * right / len(targets)


def label_format_alarm(predictions: Sequence[str], labels: Collection[str] | Callable[[str], bool]) -> str | None:
    """Returns a message if not one prediction is a possible label, else None.

    The score is then 0 whatever the student learned. The usual cause is a mismatch of formats: a wrong vocabulary, a
    decoding limit that is too short, labels written in another way, or a student that has not learned the form yet.

    Args:
      predictions: decoded texts of the student.
      labels: the possible labels, or a predicate that recognizes one by its form.
    """
    if not predictions:
        return None
    if callable(labels):
        possible, expected = labels, f"a text that {labels.__name__}() accepts"
    else:
        label_set = set(labels)
        shown = ", ".join(repr(label) for label in sorted(label_set)[:5])
        more = f" and {len(label_set) - 5} more" if len(label_set) > 5 else ""
        possible, expected = label_set.__contains__, f"one of {shown}{more}"
    if any(possible(prediction) for prediction in predictions):
        return None
    examples = ", ".join(repr(_shorten(prediction)) for prediction in predictions[:5])
    return (
        f"The score is 0 because none of {len(predictions)} predictions is a possible label. "
        f"Predicted, for example: {examples}. Expected: {expected}. "
        "Check the vocabulary, the target length, and the labels' form; early in training "
        "it can also mean that the student has not learned the form yet."
    )


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
