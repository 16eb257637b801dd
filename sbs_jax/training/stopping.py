"""Early stopping, and the warning that training rows are memorized: decisions on numbers that every process has."""

import math
from collections.abc import Mapping

from sbs_jax.run import checkpoints

_MEMORIZED = 0.95  # least share of right training answers
_GAP, _DEVIATIONS = 10.0, 3.0  # points, and standard errors of the validation score, that it must be ahead by


def out_of_patience(scores: Mapping[int, float], patience: int | None) -> bool:
    """Tells whether the last `patience` evaluations brought no better validation score than one before.

    `scores` are those of all evaluations by step. They are saved with each checkpoint, so a resumed run decides alike.
    A score that equals the best, or is not finite, is not better.

    >>> out_of_patience({10: 50.0, 20: 60.0, 30: 60.0, 40: 55.0}, 2)
    True
    """
    if patience is None:
        return False
    best = best_step(scores)
    return sum(best is None or step > best for step in scores) >= patience


def best_step(scores: Mapping[int, float]) -> int | None:
    """Returns the step of the best score, of equals the first; None if none is finite."""
    return next(iter(checkpoints.best_first([*scores], scores=scores)), None)


def reason(scores: Mapping[int, float], *, patience: int | None, step: int, train_steps: int) -> str:
    """Says why a run ended at this step."""
    if not out_of_patience(scores, patience) or step >= train_steps:
        return f"all {train_steps:,} steps"
    best = best_step(scores)
    since = "at all" if best is None else f"after step {best:,}"
    return (
        f"early, at step {step:,} of {train_steps:,}: no better validation score {since}, in {patience} "
        f"evaluation{'s' * (patience != 1)}"
    )


def memorized(
    token_accuracy: float | None, *, answer_tokens: float, validation: float, rows: int, metric: str
) -> str | None:
    """Returns a warning if the training answers are memorized and those of validation are not, else None.

    A greedy answer is right if all of its tokens are, so at least 1 - (1 - token accuracy) * tokens of the training
    answers are right. This must be at least 95 %, and ahead of validation by 10 points and by three standard errors.

    Args:
      token_accuracy: of the label objective in the latest training steps, 0 to 1, with dropout; None if unknown.
      answer_tokens: mean number of tokens of an answer, with EOS.
      validation: score of the same step, in percent.
      rows: validation rows.
      metric: the score's name.
    """
    if token_accuracy is None or not rows:
        return None
    least = 1.0 - (1.0 - token_accuracy) * answer_tokens
    # The standard error of a share of one half, which is the largest.
    gap = max(_GAP, _DEVIATIONS * 50.0 / math.sqrt(rows))
    if not (least >= _MEMORIZED and 100.0 * least - validation >= gap):
        return None
    return (
        f"Training answers are memorized and validation answers are not: at least {100.0 * least:.1f} % of the "
        f"training answers of the latest steps are right, and {metric} is {validation:.1f} % on {rows:,} validation "
        "rows. More steps will hardly help; more rows, a smaller LEARNING_RATE, more DROPOUT_RATE or fewer trained "
        "parameters may, and PATIENCE ends such a run early."
    )
