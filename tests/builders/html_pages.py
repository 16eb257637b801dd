"""Checks of pages: well-formed, self-contained, hostile texts shown as text, colors."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any


class Reader(html.parser.HTMLParser):
    """Collects open elements, addresses that would be fetched, links, scripts, texts, and tables as rows of texts."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.linked: list[str] = []
        self.scripts: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._script = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        addresses = [given[name] or "" for name in ("href", "src", "xlink:href", "data", "action") if name in given]
        addresses = [address for address in addresses if not address.startswith("#")]
        if tag == "a" and given.keys() >= {"href", "download"}:  # a file beside the page, on request
            self.linked += addresses
        else:
            self.fetched += addresses
        self.fetched += [tag] * (tag in ("link", "iframe", "object", "img", "base"))
        assert not [name for name in given if name.startswith("on")]
        if tag == "script":
            self._script = given.get("type") or "script"
            assert self._script not in self.scripts
            self.scripts[self._script] = ""
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[self._script] += data
        elif "style" not in self.open:
            self.text += data
            if {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data

    def table(self, first: str) -> dict[str, list[str]]:
        """Returns the rows, by name, of the table with this first heading."""
        (found,) = [table for table in self.tables if table[0][0] == first]
        return {line[0]: [cell for cell in line[1:] if cell] for line in found}

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts["application/json"])


def check(page: Path) -> Reader:
    """Parses a page; fails unless it is well-formed and fetches nothing."""
    text = page.read_bytes().decode("utf-8")
    reader = Reader(text)
    assert reader.open == []
    assert reader.fetched == []
    assert list(reader.scripts) == ["application/json", "script"]
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    return reader


# Hostile replies of a teacher.
HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<!-- <script> --> ]]> &lt;b&gt; &amp; \"quoted\" 'too' `${window.pwned = 1}` \\u003c",
    "lines\u2028and\u2029paragraphs",
    "a null \x00, a bell \x07, an escape \x1b[31m, a return \r, a C1 \x9b, half a character \ud800 and \udfff",
    "turned \u202egnorw\u202c around \u2066isolated\u2069, \ufeffmarked \ufffe \uffff",
    "עברית and 漢字 and 👩‍🔬 and e\u0301",
    "<svg onload=window.pwned=1>",
    "javascript:window.pwned=1",
    "__proto__",
]


def seen(text: str) -> str:
    """Returns a text as the page shows it, with invisible characters as their code points."""
    unseen = {*range(9), *range(0xB, 0x20), *range(0x7F, 0xA0), 0x200B, *range(0x2028, 0x202F), *range(0x2066, 0x206A)}
    unseen |= {0xFEFF, 0xFFFE, 0xFFFF, *range(0xD800, 0xE000)}
    return "".join(f"⟨U+{ord(c):04X}⟩" if ord(c) in unseen else c for c in text)


def luminance(colour: list[int]) -> float:
    parts = [c / 255 for c in colour]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
