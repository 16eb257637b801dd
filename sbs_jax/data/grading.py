"""Grading of answers: exact match of text, equal values of equations and numbers, overlap of texts.

`accuracy`, `rouge_l` and the others are SeqIO metric functions: they take the lists `targets` and `predictions` and
return percentages (0 to 100), as T5X's and SeqIO's metrics do. Each is the mean of a score of one pair (`row_score`),
so it has an interval. `same_text` and its kind say whether one pair is right; the filter for agreeing rationales and
the teacher's accuracy use them.

Standard library only (exports contain a copy of this file), except for chrF, and no `eval`: a model's text never runs.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from fractions import Fraction
from typing import Any

# Equations of the real data have at most 40 characters. The limits keep hostile text cheap: they bound the size of
# every number and the depth of the recursion.
MAX_CHARACTERS = 500
MAX_DEPTH = 50
SCORE = "score"  # of several tasks together, and of a task from outside; picks the best checkpoint

# A number with its sign, thousands by commas, decimals and a short exponent; not a part of a longer one or of a word.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9.,])[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
    r"(?![.,]?[0-9]|[eE][-+]?[0-9])"
)
_WORD = re.compile(r"[^\W_]+")
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


def number_in(text: str) -> Fraction | None:
    """Returns the only number in a text; None if there is none, or several, or over `MAX_CHARACTERS` characters.

    >>> number_in("about $1,200.50 a year"), number_in("3 or 4"), number_in("2.5e-1 kg")
    (Fraction(2401, 2), None, Fraction(1, 4))
    """
    if len(text) > MAX_CHARACTERS:
        return None
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Fraction(found[0].replace(",", "")) if len(found) == 1 else None


def is_number(text: str) -> bool:
    """Tells whether a text holds exactly one number."""
    return number_in(text) is not None


def same_number(target: str, prediction: str, *, tolerance: float = 0.0, relative_tolerance: float = 0.0) -> bool:
    """Compares the only numbers of two texts; text without one equals nothing.

    They may differ by `tolerance`, or by `relative_tolerance` times the target, whichever is more.

    >>> same_number("42", "It is 42.0."), same_number("200", "203", relative_tolerance=0.01)
    (True, False)
    """
    wanted, found = number_in(target), number_in(prediction)
    if wanted is None or found is None:
        return False
    allowed = max(Fraction(str(tolerance)), Fraction(str(relative_tolerance)) * abs(wanted))
    return abs(found - wanted) <= allowed


def words(text: str) -> list[str]:
    """Lists the words of a text: letters and digits of any script, in lower case."""
    return _WORD.findall(text.lower())


def rouge_l_of(target: str, prediction: str) -> float:
    """Computes ROUGE-L: F1 of the longest common subsequence of words, 0 to 1.

    Words are those of `words`, without stemming.

    >>> rouge_l_of("Half of 84 is 42.", "half of it is 42")
    0.8
    """
    a, b = words(target), words(prediction)
    if not a or not b:
        return 0.0
    lengths = [0] * (len(b) + 1)  # of the prefixes of b with the words of a so far
    for word in a:
        diagonal = 0
        for i, other in enumerate(b, start=1):
            diagonal, lengths[i] = lengths[i], diagonal + 1 if word == other else max(lengths[i], lengths[i - 1])
    return 2 * lengths[-1] / (len(a) + len(b))


def chrf_of(target: str, prediction: str) -> float:
    """Computes sacrebleu's chrF of one pair (n-grams of 1 to 6 characters, beta 2), 0 to 1."""
    return _chrf().sentence_score(prediction, [target]).score / 100.0


@functools.cache
def _chrf() -> Any:
    check_installed([chrf])
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


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


def numeric_accuracy(
    targets: Sequence[str], predictions: Sequence[str], *, tolerance: float = 0.0, relative_tolerance: float = 0.0
) -> dict[str, float]:
    """Returns the percentage of numbers near enough to their target (`same_number`): {"numeric_accuracy": 0..100}."""
    same = functools.partial(same_number, tolerance=tolerance, relative_tolerance=relative_tolerance)
    return {"numeric_accuracy": percentage_right(targets, predictions, same)}


def rouge_l(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean ROUGE-L of the predictions (`rouge_l_of`): {"rouge_l": 0..100}."""
    return {"rouge_l": percentage_right(targets, predictions, rouge_l_of)}


def chrf(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean chrF of the predictions (`chrf_of`); needs sacrebleu: {"chrf": 0..100}."""
    return {"chrf": percentage_right(targets, predictions, chrf_of)}


# The score of one pair whose mean each metric function is.
_ROW_SCORES: dict[Callable[..., Any], Callable[..., float]] = {
    accuracy: same_text,
    normalized_accuracy: same_normalized_text,
    equation_accuracy: same_equation_value,
    numeric_accuracy: same_number,
    rouge_l: rouge_l_of,
    chrf: chrf_of,
}


@functools.cache
def row_score(metric: Callable[..., Any]) -> Callable[[str, str], float] | None:
    """Returns the score of one pair, 0 to 1, whose mean this metric function is; None for one that is not of here.

    >>> row_score(functools.partial(numeric_accuracy, tolerance=1))("41", "42")
    True
    """
    if isinstance(metric, functools.partial):
        found = _ROW_SCORES.get(metric.func)
        return None if found is None else functools.partial(found, **metric.keywords)
    return _ROW_SCORES.get(metric)


def check_installed(metrics: Iterable[Callable[..., Any]]) -> None:
    """Raises ModuleNotFoundError if a metric function needs a package that is not installed."""
    if chrf in metrics and importlib.util.find_spec("sacrebleu") is None:
        raise ModuleNotFoundError(
            "The metric chrf needs the package sacrebleu, which is not installed. Install it with "
            "pip install 'sbs-jax[metrics]', or choose another metric."
        )


def percentage_right(targets: Sequence[str], predictions: Sequence[str], same: Callable[[str, str], float]) -> float:
    """Returns the percentage of pairs that `same(target, prediction)` accepts, or the mean of its scores times 100.

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
