"""Escaping of pages: Jinja does it, and nothing turns it off."""

import re
from pathlib import Path

from sbs_jax.pages.rendering import TEMPLATES, render, slug

PACKAGE = TEMPLATES.parents[1]


def test_nothing_turns_escaping_off() -> None:
    for path in TEMPLATES.iterdir():
        assert not re.search(r"\|\s*safe|autoescape|Markup", path.read_text("utf-8")), path.name
    found = {}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text("utf-8")
        found |= {path.relative_to(PACKAGE).as_posix(): n for n in [text.count("Markup(")] if n}
        assert "autoescape" not in text or text.count("autoescape=True") == text.count("autoescape"), path
    assert found == {"pages/canvas.py": 1}  # SVG of our own drawing


def test_scripts_make_no_markup() -> None:
    scripts = sorted(TEMPLATES.glob("*.js"))
    assert [path.name for path in scripts] == ["answers.js", "browser.js", "examples.js"]
    for path in scripts:
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "http"):
            assert forbidden not in path.read_text("utf-8"), (path.name, forbidden)


def test_values_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    text = "</script><b a='1' b=\"2\">&amp;\0\u202e"
    page = render("page.html", title=text, items="answers.js", data={"text": text})
    assert page.count("&lt;/script&gt;&lt;b a=&#39;1&#39; b=&#34;2&#34;&gt;&amp;amp;⟨U+0000⟩⟨U+202E⟩") == 1
    assert r"\u003c/script\u003e\u003cb a=\u00271\u0027 b=\"2\"\u003e\u0026amp;\u0000\u202e" in page
    assert "<b" not in page.replace("<body>", "")


def test_names_of_files() -> None:
    assert slug("accuracy", "e-SNLI", None) == "accuracy-e-snli"
    assert slug("../x", "A b/c") == "x-a-b-c"
