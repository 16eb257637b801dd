"""Check values that users write, and say the nearest right one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'a' or 'b'?" with the known names nearest to `name`, or "" where none is near."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""
