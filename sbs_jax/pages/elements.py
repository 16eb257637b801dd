"""Pieces of the project's pages as HTML text: every text of the data comes through `text` or `script_json`."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Characters that are not seen, or that change how others are: shown by their number. The pages' scripts have the same.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]")
# What JSON leaves as it is and HTML, or UTF-8, would not.
_UNSAFE_IN_HTML = re.compile(r"[<>&\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def style() -> str:
    """The style sheet of the project's pages."""
    return Path(__file__).with_name("page.css").read_text("utf-8")


def policy(script: str) -> str:
    """A content policy under which a page loads nothing and runs this script alone."""
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'; "
        "form-action 'none'"
    )


def text(value: str) -> str:
    """Safe in HTML, with what cannot be seen made visible."""
    return html.escape(_UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", str(value)))


def script_json(data: Any) -> str:
    """JSON that can stand in a script element: whatever could end it, or not be encoded, is an escape."""
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return _UNSAFE_IN_HTML.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


def joined(parts: Iterable[str], by: str = "\n") -> str:
    return by.join(parts)


def figure(name: str, caption: str, plot: str, *, width: int, files: str = "") -> str:
    """A plot (SVG of `width` pixels) under its name and caption; `files` is HTML that leads to its files."""
    return (
        f'<figure style="width:{width}px"><figcaption><b>{text(name)}</b>{text(caption)}{files}</figcaption>\n'
        f'<div class="plot" style="min-width:{width * 5 // 6}px">{plot}</div></figure>'
    )


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    name: str,
    strong: int | None = None,
    texts: int = 1,
    last_is_text: bool = False,
    colours: Sequence[str | None] = (),
) -> str:
    """A table that scrolls by itself where it is too wide; `name` tells a screen reader what it is.

    The first `texts` columns are texts and the others numbers, but for the last one if `last_is_text`; `strong` is the
    column to see first. `colours` gives each row a dot, by CSS colour. A line is drawn where the first column changes.
    """

    def kind(column: int) -> str:
        names = ["number"] if column >= texts else []
        if last_is_text and column == len(header) - 1:
            names = ["note"]
        names += ["strong"] if column == strong else []
        return f' class="{" ".join(names)}"' if names else ""

    head = joined((f'<th scope="col"{kind(i)}>{text(cell)}</th>' for i, cell in enumerate(header)), "")
    lines, previous = [], None
    for number, row in enumerate(rows):
        colour = colours[number] if number < len(colours) else None
        dot = f'<span class="dot" style="background:{colour}"></span>' if colour else ""
        cells = [f'<th scope="row">{dot}{text(row[0])}</th>']
        cells += [f"<td{kind(i)}>{text(cell)}</td>" for i, cell in enumerate(row) if i]
        mark = ' class="first"' if previous is not None and row[0] != previous else ""
        lines.append(f"<tr{mark}>{joined(cells, '')}</tr>")
        previous = row[0]
    return scrolling(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{joined(lines)}\n</tbody></table>", name=name)


def scrolling(content: str, *, name: str) -> str:
    """Content that may be wider than the page, and is reached by the keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{text(name)}">{content}</div>'
