"""Checks of pages: well-formed, self-contained, hostile texts shown as text, colours."""

import html.parser
import re
from pathlib import Path


class Checker(html.parser.HTMLParser):
    """Collects what is open and never closed, what would be fetched, and the text of cells."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.linked: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append(dict(attrs))
        addresses = [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "data", "action")]
        addresses = [address for address in addresses if not address.startswith("#")]
        if tag == "a" and dict(attrs).keys() >= {"href", "download"}:  # a file beside the page, for who asks for it
            self.linked += addresses
        else:
            self.fetched += addresses
        if tag in ("link", "iframe", "object", "img"):
            self.fetched.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: Path) -> Checker:
    checker = Checker()
    checker.feed(page.read_text("utf-8"))
    assert checker.open == []
    assert checker.fetched == []
    assert checker.scripts == [{"type": "application/json", "id": "data"}, {}]
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page.read_text("utf-8"))
    return checker


# What a teacher should not get away with.
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
    """A text as the page shows it: what cannot be seen by its number."""
    unseen = {*range(9), *range(0xB, 0x20), *range(0x7F, 0xA0), 0x200B, *range(0x2028, 0x202F), *range(0x2066, 0x206A)}
    unseen |= {0xFEFF, 0xFFFE, 0xFFFF, *range(0xD800, 0xE000)}
    return "".join(f"⟨U+{ord(c):04X}⟩" if ord(c) in unseen else c for c in text)


def luminance(colour: list[int]) -> float:
    parts = [c / 255 for c in colour]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
