"""Check values that users write; errors name the value, what was expected, and the nearest right one.

Each check returns nothing and raises ValueError. `name` begins the message: "TrainConfig.keep_best".
"""

import difflib
import math
from collections.abc import Collection, Iterable


def whole_number(name: str, value: object, *, least: int) -> None:
    """Requires an int of at least `least`; bool is not one.

    >>> whole_number("keep_best", -1, least=0)
    Traceback (most recent call last):
    ValueError: keep_best is -1; expected a whole number of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}.")


def number(
    name: str,
    value: object,
    *,
    least: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
) -> None:
    """Requires a finite int or float, at least `least` or above `above`, and below `below`, where given; not a bool."""
    bound = f" of at least {least:g}" if least is not None else f" above {above:g}" if above is not None else ""
    bound += f" and below {below:g}" if below is not None else ""
    in_range = (
        not isinstance(value, bool)
        and isinstance(value, int | float)
        and math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not in_range:
        raise ValueError(f"{name} is {value!r}; expected a number{bound}.")


def choice(name: str, value: object, known: Collection[str]) -> None:
    """Requires one of the known words."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.{nearest(str(value), known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'a' or 'b'?" with the known names nearest to `name`, or "" where none is near."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""
