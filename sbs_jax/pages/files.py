"""The plots of a page as SVG files and its numbers as CSV files, in a folder beside the page."""

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.pages.canvas import standalone
from sbs_jax.pages.elements import text

_INDEX = "files.txt"  # names what a report wrote, so that the next one can take it away again


class Files:
    """Collects the files of one page and writes them together. Without a folder nothing is written or linked."""

    def __init__(self, folder: Path | None, *, page: Path) -> None:
        self._folder, self._page = folder, page
        self._contents: dict[str, str] = {}
        if folder is not None:
            _refuse_others(folder)

    def plot(self, name: str, svg: str) -> None:
        """`<name>.svg`, of a plot as the page holds it."""
        if self._folder is not None:
            self._contents[f"{name}.svg"] = standalone(svg)

    def table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """`<name>.csv`; None is an empty cell, and numbers are written in full."""
        if self._folder is None:
            return
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(["" if cell is None else _cell(cell) for cell in row] for row in rows)
        self._contents[f"{name}.csv"] = buffer.getvalue()

    def links(self, *names: str) -> str:
        """HTML that leads from the page to some of its files; "" without a folder."""
        if self._folder is None:
            return ""
        to = os.path.relpath(self._folder, self._page.parent).replace(os.sep, "/")
        shown = [
            f'<a href="{text(_quoted(to))}/{name}" download aria-label="SVG {name}">SVG</a>'
            if name.endswith(".svg")
            else f'<a href="{text(_quoted(to))}/{name}" download>{name}</a>'
            for name in names
        ]
        return f'<span class="files">{" ".join(shown)}</span>'

    def write(self) -> None:
        """Writes all, and removes what an earlier report wrote here and this one does not have."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in _written_before(self._folder) - self._contents.keys():
            (self._folder / name).unlink(missing_ok=True)
        # First what is to come, so that a report that was stopped can be repeated.
        (self._folder / _INDEX).write_text("".join(f"{name}\n" for name in sorted(self._contents)), "utf-8")
        for name, content in self._contents.items():
            (self._folder / name).write_text(content, "utf-8", newline="")


def named(*parts: str | None) -> str:
    """A file name without its ending, of any texts: "accuracy", "e-SNLI" gives "accuracy-e-snli"."""
    cleaned = (re.sub(r"[^a-z0-9._]+", "-", part.lower()).strip("-.") for part in parts if part)
    return "-".join(part[:60] for part in cleaned if part)


def _cell(value: Any) -> Any:
    # A spreadsheet would compute a text that begins so.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _quoted(path: str) -> str:
    from urllib.parse import quote

    return quote(path, safe="/")


def _refuse_others(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _INDEX).is_file():
        raise FileExistsError(
            f"{folder} holds files that no report wrote (it has no {_INDEX}); the plots and tables of the page go into "
            "a folder of their own. Choose another one with --assets."
        )


def _written_before(folder: Path) -> set[str]:
    index = folder / _INDEX
    names = index.read_text("utf-8").splitlines() if index.is_file() else []
    return {name for name in names if re.fullmatch(r"[a-z0-9][a-z0-9._-]*\.(svg|csv)", name)}
