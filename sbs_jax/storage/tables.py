"""Tables as text (CSV, TSV): no text in them becomes a formula of a spreadsheet."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

# A spreadsheet evaluates a cell that begins with one of these; it takes the wide forms of East Asian text for the same.
_FORMULA = re.compile("'*[=+\\-@\\t\\r\\n\uff1d\uff0b\uff0d\uff20]")


def write(file: io.TextIOBase, rows: Iterable[Sequence[Any]], *, delimiter: str = ",", end: str = "\r\n") -> None:
    """Writes rows of texts and numbers; None is an empty cell."""
    csv.writer(file, delimiter=delimiter, lineterminator=end).writerows(map(guarded, row) for row in rows)


def guarded(cell: Any) -> Any:
    """Returns a cell that no spreadsheet evaluates: an apostrophe goes before a text that would be a formula.

    One also goes before a text that looks guarded, so `read` gives back every text.

    >>> guarded("=1+1"), guarded("'=1+1"), guarded("it's"), guarded(-1.5)
    ("'=1+1", "''=1+1", "it's", -1.5)
    """
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def read(cell: str) -> str:
    """Returns the text of a cell that `write` wrote.

    >>> [read(guarded(text)) for text in ("=1+1", "'=1+1", "'a")]
    ['=1+1', "'=1+1", "'a"]
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
