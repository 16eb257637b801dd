"""Markup in a teacher's reply: its thinking, and markdown, LaTeX and typography around an answer.

Everything is linear in the length of the text, or reads only the start of it: replies are outside input. Standard
library only.
"""

from __future__ import annotations

import re

_THINKING = r"(?:seed:)?(?:think(?:ing)?|thought|reasoning)"
_TAG = re.compile(  # <think>, [THINK], <|START_THINKING|>, <|begin_of_thought|>, and what closes them
    rf"<(?P<a>/)?{_THINKING}>|\[(?P<b>/)?THINK\]|<\|(?:(?P<c>end)|start|begin)_(?:of_)?{_THINKING}\|>", re.IGNORECASE
)
_FINAL = "<|channel|>final<|message|>"  # gpt-oss


def without_thinking(text: str) -> str:
    """Removes the teacher's thinking, `<think>..</think>`; the opening tag may have been a part of the prompt.

    >>> without_thinking("3 and 4? Add them.</think>\\n3 + 4 = 7.")
    '3 + 4 = 7.'
    """
    if "<" not in text and "[" not in text:  # the usual case, and quick
        return text
    if _FINAL in text:
        return re.split(r"<\|(?:end|return|start)\|>", text.partition(_FINAL)[2], maxsplit=1)[0]
    kept: list[str] = []
    start = opened = closed = 0
    inside = False
    for tag in _TAG.finditer(text):
        if not any(tag.group("a", "b", "c")):
            opened += 1
            kept.append("" if inside else text[start : tag.start()])
            inside = True
            continue
        closed += 1
        # Outside, the text before the tag is thinking too: its opening was in the prompt, or the thinking mentions one.
        # Without any opening, only the first is ours; the others are in invented next examples.
        if not inside and not opened and closed > 1:
            kept.append(text[start : tag.start()])
        start, inside = tag.end(), False
    if not inside:
        kept.append(text[start:])
    return "".join(kept).lstrip() if opened or closed else text


# ------------------------------------------------------------------------------------------- answers

_MARKS = "[*_`]{0,3}"
_EMPHASIS = re.compile(r"(?<![\w)*])(\*\*\*|\*\*|__|[*_`])(?=[^\s+-])([^*`\n]+?)(?<=\S)\1(?![\w(*])")
_PAIRS = (("```", "```"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ('"', '"'), ("'", "'"), ("“", "”"))
_COMMAND = re.compile(r"\\(?:boxed|fbox|text\w*|math(?:rm|bf|it|sf))\s*\{(.*)\}", re.DOTALL)
_OPENING_LINE = re.compile(r"\s*(?:\\\[|\$\$|```\w*|\\begin\{\w+\*?\})[ \t]*\n")
_MOST = 500  # characters of an answer


def split_decorated(text: str, marker: str) -> tuple[str, str] | None:
    """Splits a text at its only answer marker, with markdown in, around or before it, into (before, after) without it.

    >>> split_decorated("So 7.\\n**Answer:** yes", "Answer:"), split_decorated("So **answer: yes.**", "answer:")
    (('So 7.', 'yes'), ('So', 'yes.'))
    """
    words = f"{_MARKS} {_MARKS}".join(re.escape(word) for word in marker.removesuffix(":").split(" "))
    colon = f"{_MARKS} ?:{_MARKS}" if marker.endswith(":") else f"{_MARKS}:?{_MARKS}"
    found = list(re.finditer(f"({_MARKS}){words}{colon}", text))
    if len(found) != 1:
        return None
    lead, before, after = found[0][1], text[: found[0].start()], text[found[0].end() :]
    if line := _OPENING_LINE.match(after):
        after = after[line.end() :]
    answer, newline, rest = after.lstrip().partition("\n")
    ended = answer.rstrip(" .")
    # A mark that opened before the answer closes after it.
    for mark in (lead, "**", "__"):
        if mark and ended.endswith(mark) and not answer.startswith(mark) and (lead or before.count(mark) % 2):
            answer = ended.removesuffix(mark)
            if not lead:
                before = "".join(before.rpartition(mark)[::2])
            break
    return without_end_marks(before), answer + newline + rest


def without_end_marks(text: str) -> str:
    """Strips a text, then marks of markdown that belong to what follows it: "**", "###", "> ", a bullet's line."""
    text = text.strip().rstrip("*_#>` ").rstrip()
    before, newline, line = text.rpartition("\n")
    return before.rstrip() if newline and not line.strip(" -•") else text


def plain(answer: str) -> str:
    """Removes markdown, LaTeX, quotes and one full stop around an answer, and emphasis in it.

    >>> plain(r"**\\( \\boxed{(3 + 4)} \\)**."), plain("(b) **tea**")
    ('(3 + 4)', '(b) tea')
    """
    if len(answer) > _MOST:
        return answer
    while True:
        before = answer
        answer = _EMPHASIS.sub(r"\2", answer.strip())
        answer = answer[:-1].rstrip() if answer.endswith((".", "。")) and not answer.endswith("..") else answer
        command = _COMMAND.fullmatch(answer)
        answer = command[1] if command else answer
        for start, end in _PAIRS:
            if answer.startswith(start) and answer.endswith(end) and len(answer) >= len(start) + len(end):
                answer = answer[len(start) : -len(end)]
        if answer == before:
            return answer


# Signs that mean those of ASCII: times, divided by, minus, full-width forms, and blanks.
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("×⋅·∙∗✕✖", "*"),  # noqa: RUF001
        **dict.fromkeys("÷∕⁄", "/"),  # noqa: RUF001
        **dict.fromkeys("−–—‒‐‑﹣", "-"),  # noqa: RUF001
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f", " "),
        **dict.fromkeys("$€£\u200b", ""),
        **{chr(0xFF00 + each): chr(0x20 + each) for each in range(0x08, 0x1B)},
    }
)
_LATEX = (
    (re.compile(r"\\(?:times|cdot|ast)\b"), "*"),
    (re.compile(r"\\div\b"), "/"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1) / (\2))"),
    (re.compile(r"\\(?:left|right|displaystyle|quad|[,;:! ])"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])"), lambda found: found[1].replace(",", "")),
    (re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])"), " * "),
)


def arithmetic(text: str) -> str:
    """Writes an expression with the signs of ASCII: times and divided by, LaTeX, thousands, currencies.

    >>> arithmetic("(3 × 4) − 1,200"), arithmetic(r"\\frac{8}{4} \\div 2")
    ('(3 * 4) - 1200', '((8) / (4)) / 2')
    """
    if len(text) > _MOST:
        return text
    text = text.replace(r"\$", "").translate(_SIGNS)
    for pattern, sign in _LATEX:
        text = pattern.sub(sign, text)
    return " ".join(text.split())
