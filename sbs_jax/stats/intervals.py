"""95 % intervals of accuracies, and of differences between them, over seeds and test rows.

A measured accuracy depends on the seed that trained the student (data subset, start and order) and on the rows of the
test set. Every seed answers every test row, so the answers of a method form a table (S seeds, N test rows) that shows
both variances. `docs/decisions.md` has the coverage of the intervals.
"""

import math
from collections.abc import Sequence

import numpy as np


def mean_variance(values_SN: np.ndarray) -> tuple[float, float, float]:
    """Computes the mean of a seeds x test rows table, the variance of that mean, and its degrees of freedom.

    Seeds and rows are crossed samples. The variance of the mean is the variance between seed means, plus that between
    row means, minus the part that both contain (two-way clustered variance):

        V = var(seed means) / S + var(row means) / N - MSE(interaction) / (S N)

    but at least its second term. Satterthwaite's degrees of freedom account for few seeds: two that disagree make a
    wide interval. With one seed only the rows vary.
    """
    S, N = values_SN.shape
    if N < 2:
        raise ValueError(f"Got {N} test row; an interval needs at least 2.")
    mean = float(values_SN.mean())
    of_rows = values_SN.mean(axis=0)
    row_variance = float(of_rows.var(ddof=1)) / N
    if S == 1:
        return mean, row_variance, math.inf
    of_seeds = values_SN.mean(axis=1)
    seed_variance = float(of_seeds.var(ddof=1)) / S
    rest = values_SN - of_seeds[:, None] - of_rows[None, :] + mean
    shared = float((rest**2).sum()) / ((S - 1) * (N - 1)) / (S * N)
    variance = max(seed_variance + row_variance - shared, row_variance)
    parts = seed_variance**2 / (S - 1) + row_variance**2 / (N - 1)
    return mean, variance, variance**2 / parts if parts else math.inf


def difference_interval(differences_SN: np.ndarray) -> tuple[float, float, float]:
    """Computes the mean difference and its 95 % interval (Student t on `mean_variance`).

    Never narrower than for a single differing row, since identical predictions do not prove equality.
    """
    mean, deviation, freedom = _difference(differences_SN)
    half = _quantile(freedom) * deviation
    return mean, mean - half, mean + half


def difference_p(differences_SN: np.ndarray) -> float:
    """Computes the two-sided p of no difference, below 0.05 exactly where `difference_interval` leaves out 0."""
    from scipy import stats

    mean, deviation, freedom = _difference(differences_SN)
    distribution = stats.norm if math.isinf(freedom) else stats.t(freedom)
    return float(2 * distribution.sf(abs(mean) / deviation))


def _difference(differences_SN: np.ndarray) -> tuple[float, float, float]:
    """Computes the mean difference in points, the standard deviation of that mean, and its degrees of freedom."""
    mean, variance, freedom = mean_variance(differences_SN)
    smallest = (100.0 / differences_SN.shape[1]) ** 2
    return mean, math.sqrt(max(variance, smallest)), freedom


def mcnemar(differences_SN: np.ndarray) -> tuple[int, int, float]:
    """Does McNemar's exact test; returns rows only one method has right, rows only the other has right, two-sided p.

    `differences_SN` is right (1) or wrong (0) of one method minus that of the other, or a positive multiple of it.
    With several seeds, a row counts for the method that is right on it with more seeds, and for neither on a tie. So
    rows stay independent, and one seed gives the usual test. It covers these students only; `difference_p` also covers
    other seeds.

    >>> mcnemar(np.array([[1.0] * 8 + [-1.0] * 2 + [0.0] * 90]))
    (8, 2, 0.109375)
    """
    from scipy import stats

    of_rows = differences_SN.sum(axis=0)
    ours, theirs = int((of_rows > 0).sum()), int((of_rows < 0).sum())
    if not ours + theirs:
        return 0, 0, 1.0
    return ours, theirs, float(stats.binomtest(ours, ours + theirs).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Corrects p values for their number (Holm): at 0.05, at most one in twenty such lists has a false finding.

    >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]
    """
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def accuracy_interval(scores_SN: np.ndarray) -> tuple[float, float, float]:
    """Computes the mean of scores from 0 to 1 in percent and its 95 % interval, which stays within 0 to 100.

    Scores are right (1) or wrong (0), or anything between, such as ROUGE-L. Wilson's interval at the effective number
    of test rows p (1 - p) / V, with V of `mean_variance`. With one seed of right and wrong that is N, which gives the
    usual Wilson interval; scores between vary less, so they are worth more rows.

    >>> [round(x, 1) for x in accuracy_interval(np.array([[1.0] * 60 + [0.0] * 40]))]
    [60.0, 50.2, 69.1]
    >>> [round(x, 1) for x in accuracy_interval(np.array([[0.7] * 60 + [0.45] * 40]))]
    [60.0, 57.5, 62.4]
    """
    S, N = scores_SN.shape
    share = float(scores_SN.mean())
    spread = share * (1 - share)
    binary = spread <= 0 or bool(np.isin(scores_SN, (0.0, 1.0)).all())
    # Equal scores do not prove that others would be equal too, so the variance is never 0.
    worth = 1.0 if binary else spread / max(float(scores_SN.var()), spread / N**2)
    if S == 1:
        size, freedom = N * worth, math.inf if binary or N < 2 else N - 1.0
    else:
        _, variance, freedom = mean_variance(scores_SN)
        size = float(N) if spread <= 0 else min(spread / variance if variance else math.inf, S * N * worth)
    low, high = wilson_interval(share, size, z=_quantile(freedom))
    return 100 * share, 100 * low, 100 * high


def wilson_interval(share: float, size: int | float, *, z: float = 1.959964) -> tuple[float, float]:
    """Computes Wilson's interval of a share (0 to 1) of `size` rows; 95 % at the default z.

    >>> [round(x, 3) for x in wilson_interval(0.6, 100)]
    [0.502, 0.691]
    """
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    return max(0.0, centre - half), min(1.0, centre + half)


def _quantile(freedom: float) -> float:
    from scipy import stats  # a second to import

    return float(stats.norm.ppf(0.975) if math.isinf(freedom) else stats.t.ppf(0.975, freedom))
