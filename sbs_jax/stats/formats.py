"""Numbers and lists as text, for tables, sentences and plots."""

from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"


def compact(count: int | float) -> str:
    """Writes a count of parameters or operations in three figures.

    >>> compact(247_577_856), compact(9_012_992), compact(540e9), compact(3.2e18), compact(950)
    ('248M', '9.01M', '540B', '3.2e18', '950')
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if 0.9995 * size <= count < 999.5e9:
            return f"{count / size:.{2 if count < 9.995 * size else 1 if count < 99.95 * size else 0}f}{letter}"
    return f"{count:.0f}" if count < 1000 else f"{count:.1e}".replace("e+", "e")


def percent(fraction: float) -> str:
    """Writes a share of 0 to 1 in percent: 0.25 is "25 %"."""
    return f"{100 * fraction:g} %"


def of_data(fraction: float) -> str:
    """Names a share of the training data: "25 % of the data"."""
    return "all of the data" if fraction == 1 else f"{percent(fraction)} of the data"


def signed(points: float) -> str:
    """Writes a difference in points with its sign."""
    return f"{points:+.1f}".replace("-", MINUS)


def interval(low: float, high: float) -> str:
    """Writes an interval of accuracies: "[30.3, 40.1]"."""
    return f"[{low:.1f}, {high:.1f}]"


def signed_interval(low: float, high: float) -> str:
    """Writes an interval of differences: "[-2.5, +2.5]"."""
    return f"[{signed(low)}, {signed(high)}]"


def p_value(p: float) -> str:
    """Writes a p value in two figures; "< 0.0001" if it is smaller.

    >>> p_value(0.0312), p_value(0.5), p_value(0.000004), p_value(1.0)
    ('0.031', '0.50', '< 0.0001', '1.00')
    """
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:.2f}" if p >= 0.095 else f"{p:.2g}"


def capital(text: str) -> str:
    """Makes the first letter a capital; the others do not change."""
    return text[:1].upper() + text[1:]


def listed(parts: Sequence[str]) -> str:
    """Joins parts by commas and "and"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
