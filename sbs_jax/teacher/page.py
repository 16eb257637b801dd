"""The page of a finished sampling: what the teacher answered, in numbers, and a browser of examples.

One HTML file that asks for nothing from the network. Every text of the data or of the teacher is shown as text,
never as markup: here it is escaped, or embedded as JSON that page.js only ever puts into text nodes; the page's
content policy lets no other script run. The same rows give the same bytes.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.data.parsing import FAILURES, OUTCOMES
from sbs_jax.pages.canvas import COLOURS, Canvas
from sbs_jax.pages.elements import figure, policy, style
from sbs_jax.pages.elements import joined as _lines
from sbs_jax.pages.elements import script_json as _json
from sbs_jax.pages.elements import text as _text
from sbs_jax.stats.intervals import wilson_interval
from sbs_jax.teacher.shown import AGREEMENT, DISTINCT, LONGEST_COUNTED, SMALL_SET, Counts, Score, Selection, Shown, cut

_ENOUGH_ROWS = 20  # of one label among many, for an accuracy of its own
_BARS = 32  # of a histogram
_HISTOGRAM_WIDTH = 428  # pixels; shrinks by a sixth, to fit a phone
_OTHER = "another label"
_NONE = "no label"
_MEANINGS = {**OUTCOMES, **FAILURES}


def write_page(
    path: str | Path, *, title: str, facts: Mapping[str, str], rows: Iterable[Shown], examples: int = 2000
) -> None:
    """Writes one self-contained HTML page about a sampling.

    `rows` is read once and not kept: memory is that of the `examples` embedded rows and of the counts. Embedded are
    the rows where teacher and human disagree, as far as they fill half of `examples`, and an even sample of all
    others; which ones is decided by a hash of their ids. `facts` are shown in their order, as text.

    Raises:
      ValueError: `examples` is negative.
    """
    if examples < 0:
        raise ValueError(f"Got examples={examples}; expected the number of rows to embed, 0 or more.")
    counts, chosen = Counts(), Selection(examples)
    for row in rows:
        counts.add(row)
        chosen.offer(row)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_page(title, facts, counts, chosen.rows()).encode("utf-8"))


def _with_shared_lines(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts repeat their exemplars: lines, each held once, and rows whose prompts are ranges of line numbers.

    The two prompts "a\\nb\\nc" and "a\\nb\\nd" are the lines ["a\\n", "b\\n", "c", "d"] and the ranges [0, 3] and
    [0, 2, 3, 4]: from, to, from, to, without the last.
    """
    numbers: dict[str, int] = {}
    compact = []
    for row in rows:
        ranges: list[int] = []
        for line in re.findall(r"[^\n]*\n+|[^\n]+", row["prompt"]):
            number = numbers.setdefault(line, len(numbers))
            if ranges and ranges[-1] == number:
                ranges[-1] += 1
            else:
                ranges += [number, number + 1]
        compact.append(row | {"prompt": ranges})
    return list(numbers), compact


# Writing


def _page(title: str, facts: Mapping[str, str], counts: Counts, rows: Sequence[dict[str, Any]]) -> str:
    here = Path(__file__)
    script = here.with_name("page.js").read_text("utf-8")
    lines, compact = _with_shared_lines(rows)
    data = {"lines": lines, "labels": [cut(label) for label in counts.labels], "rows": compact}
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>
{style()}{here.with_name("page.css").read_text("utf-8")}</style>
</head>
<body>
<main>
<p class="kicker">{_text(title)}</p>
<h1>{_text(_headline(counts))}</h1>
{_facts(facts, counts)}
{_outcomes(counts)}
{_accuracy(counts)}
{_confusion(counts)}
{_agreement(counts)}
{_lengths(counts)}
{_browser(counts, rows)}
</main>
<script type="application/json" id="data">{_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def _headline(counts: Counts) -> str:
    score = counts.score
    if not counts.rows:
        return "No example was sampled"
    if not counts.usable:
        return f"None of {_rows(counts.rows)} got a reply that can be used"
    if not score.rows:
        return f"{_share(counts.usable, counts.rows)} of {_rows(counts.rows)} got a label from the teacher"
    return f"The teacher's own label is the human's on {_share(score.right, score.rows)} of {_rows(score.rows)}"


def _facts(facts: Mapping[str, str], counts: Counts) -> str:
    told = [*facts.items(), ("usable", f"{counts.usable:,} of {_rows(counts.rows)}")]
    if counts.hinted:
        told.append(("answered after a hint", f"{counts.hinted:,}"))
    body = "\n".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in told)
    return f'<dl class="facts">\n{body}\n</dl>'


def _outcomes(counts: Counts) -> str:
    if not counts.rows:
        return ""
    ordered = counts.outcomes.ordered()
    shown = ordered if len(ordered) <= 30 else ordered[:29]
    rest = counts.rows - sum(count for _, count in shown)
    lines = []
    for outcome, count in shown:
        meaning = f'<span class="aside">{_text(_MEANINGS[outcome])}</span>' if outcome in _MEANINGS else ""
        name = f'<th scope="row" class="name">{_text(outcome)}{meaning}</th>'
        lines.append(f"<tr>{name}{_bar(count, counts.rows)}{_cells(f'{count:,}', _share(count, counts.rows))}</tr>")
    if rest:
        lines.append(
            f'<tr><th scope="row" class="name">all other outcomes</th>{_bar(rest, counts.rows)}'
            f"{_cells(f'{rest:,}', _share(rest, counts.rows))}</tr>"
        )
    return _section("Outcomes", "How the replies were read.", _table(["outcome", "", "rows", "share"], lines))


def _accuracy(counts: Counts) -> str:
    score = counts.score
    if not counts.rows:
        return ""
    if not score.rows:
        return _teacher_labels(counts)
    ordered = sorted(counts.by_label.items(), key=lambda item: (-item[1].rows, item[0]))
    if len(ordered) <= 1 and not counts.many_labels:
        shown: list[tuple[str, Score]] = []
    elif len(ordered) <= SMALL_SET:
        shown = ordered
    else:
        shown = [(label, of_label) for label, of_label in ordered[:SMALL_SET] if of_label.rows >= _ENOUGH_ROWS]
    note = (
        "An answer is right when it is the human's label. One that cannot be used is not right, and neither is one "
        "given after a hint. Whiskers and brackets are 95 % intervals (Wilson)."
    )
    if len(ordered) > SMALL_SET:
        number = f"more than {DISTINCT:,}" if counts.many_labels else f"{len(ordered):,}"
        named = " The most frequent:" if shown else ""
        note += f" The human gave {number} different labels.{named}"
    body = [_score_line(label, of_label, score) for label, of_label in shown]
    if shown and len(shown) < len(ordered):
        rest = Score(
            *(
                getattr(score, field.name) - sum(getattr(of_label, field.name) for _, of_label in shown)
                for field in dataclasses.fields(Score)
            )
        )
        body.append(_score_line("all other labels", rest, score))
    body.append(_score_line("all rows" if shown else "all labels", score, score, kind=' class="total"'))
    return _section("Accuracy by human label", note, _table(_score_header("human label", score), body))


def _score_header(name: str, whole: Score) -> list[str]:
    hint = ["after a hint"] if whole.after_hint else []
    return [name, "", "accuracy", "95 % interval", "right", *hint, "wrong", "unusable", "rows"]


def _score_line(name: str, score: Score, whole: Score, *, kind: str = "") -> str:
    share = score.right / score.rows
    low, high = wilson_interval(share, score.rows)
    hint = [f"{score.after_hint:,}"] if whole.after_hint else []
    cells = [
        *(f"{100 * share:.1f} %", f"[{100 * low:.1f}, {100 * high:.1f}]", f"{score.right:,}", *hint),
        *(f"{score.wrong:,}", f"{score.unusable:,}", f"{score.rows:,}"),
    ]
    bar = _bar(score.right, score.rows, whisker=(low, high))
    return f'<tr{kind}><th scope="row" class="name">{_text(_brief(name))}</th>{bar}{_cells(*cells, strong=0)}</tr>'


def _teacher_labels(counts: Counts) -> str:
    note = "Nobody labelled these rows, so the teacher cannot be judged here."
    if not counts.usable:
        return _section("Labels", note, "")
    shown = counts.teacher_labels.ordered()[:SMALL_SET]
    lines = [
        f'<tr><th scope="row" class="name">{_text(_brief(label))}</th>{_bar(count, counts.usable)}'
        f"{_cells(f'{count:,}', _share(count, counts.usable))}</tr>"
        for label, count in shown
    ]
    rest = counts.usable - sum(count for _, count in shown)
    if rest:
        cells = _cells(f"{rest:,}", _share(rest, counts.usable))
        lines.append(f'<tr><th scope="row" class="name">all others</th>{_bar(rest, counts.usable)}{cells}</tr>')
    return _section("The teacher's labels", note, _table(["teacher's label", "", "rows", "share"], lines))


def _confusion(counts: Counts) -> str:
    """Human labels down, the teacher's across; a cell is also a filter of the browser."""
    score = counts.score
    if not score.rows:
        return ""
    more = f" {score.after_hint:,} more agree only after a hint." if score.after_hint else ""
    differ = (
        f"{score.wrong:,} rows ({_share(score.wrong, score.rows)}) have another"
        if score.wrong
        else "No row has another"
    )
    note = f"{differ} label from the teacher than from the human.{more}"
    show = (
        '<p class="show"><button type="button" data-verdict="wrong">Show disagreements below</button></p>'
        if score.wrong
        else ""
    )
    labels = counts.labels
    if len(labels) < 2 or counts.pairs.full:
        return _section("Disagreements with the human label", note, show)
    cells: Counter[tuple[str, str]] = Counter()
    for (human, teacher), count in counts.pairs.items():
        cells[human, "none" if teacher is None else str(labels.index(teacher)) if teacher in labels else "other"] += (
            count
        )
    keys = [str(number) for number in range(len(labels))]
    keys += [key for key in ("other", "none") if any(cells[label, key] for label in labels)]
    names = {"other": _OTHER, "none": _NONE} | {str(number): label for number, label in enumerate(labels)}
    header = "".join(f'<th scope="col" class="number">{_text(_brief(names[key]))}</th>' for key in keys)
    lines = []
    for number, human in enumerate(labels):
        rows = counts.by_label[human].rows
        line = ""
        for key in keys:
            count = cells[human, key]
            told = f"human {_brief(human)}, teacher {_brief(names[key])}: {count:,} rows"
            mark = "agree" if key == str(number) else "differ"
            line += (
                f'<td class="number"><button type="button" class="{mark}" data-label="{number}" '
                f'data-teacher="{key}" aria-label="{_text(told)}" style="--share:{round(100 * count / rows)}%">'
                f"{count:,} <small>{100 * count / rows:.1f} %</small></button></td>"
            )
        lines.append(f'<tr><th scope="row" class="name">{_text(_brief(human))}</th>{line}</tr>')
    table = (
        '<div class="scroll"><table class="confusion">\n<thead><tr><th scope="col">human ↓ teacher →</th>'
        f"{header}</tr></thead>\n<tbody>\n{_lines(lines)}\n</tbody></table></div>"
    )
    note += " Lines are the human's labels, columns the teacher's (hints included); a cell shows its examples below."
    return _section("Disagreements with the human label", note, table + show)


def _agreement(counts: Counts) -> str:
    if not counts.several:
        return ""
    told = f"More than one reply was asked for on {_rows(counts.several)}"
    if not counts.by_agreement:
        return _section("Agreement among samples", f"{told}; none of them has votes on a label.", "")
    told += ". Replies that cannot be used count as asked for and not agreeing."
    total = sum(score.rows for score in counts.by_agreement.values())
    judged = counts.score.rows > 0
    lines = []
    for name in AGREEMENT:
        score = counts.by_agreement.get(name)
        if score is None:
            continue
        cells = [f"{score.rows:,}", _share(score.rows, total)]
        if judged:
            low, high = wilson_interval(score.right / score.rows, score.rows)
            cells += [_share(score.right, score.rows), f"[{100 * low:.1f}, {100 * high:.1f}]"]
        lines.append(f'<tr><th scope="row" class="name">{name}</th>{_bar(score.rows, total)}{_cells(*cells)}</tr>')
    header = ["replies that have the chosen label", "", "rows", "share", *(["accuracy", "95 % interval"] * judged)]
    return _section("Agreement among samples", told, _table(header, lines))


def _lengths(counts: Counts) -> str:
    parts = []
    for name, lengths in (("Rationales", counts.rationale_words), ("Replies", counts.reply_words)):
        if lengths:
            half, most, nearly_all = (_quantile(lengths, share) for share in (0.5, 0.9, 0.99))
            longest, upto = max(lengths), _quantile(lengths, 0.995)
            told = (
                f"{sum(lengths.values()):,} of them; half have up to {half:,} words, "
                f"90\N{NO-BREAK SPACE}% up to {most:,}, 99\N{NO-BREAK SPACE}% up to {nearly_all:,}, "
                f"the longest {longest:,}{' or more' * (longest == LONGEST_COUNTED)}."
                f"{' The last bar holds all that are longer, too.' * (longest > upto)}"
            )
            parts.append(figure(name, told, _histogram(name, lengths, upto=upto), width=_HISTOGRAM_WIDTH))
    if not parts:
        return ""
    return _section("Lengths", "", f'<div class="figures">\n{_lines(parts)}\n</div>')


def _histogram(name: str, lengths: Counter[int], *, upto: int) -> str:
    """Bars of equal numbers of words; the last one has everything longer than `upto` as well."""
    step = max(1, -(-(upto + 1) // _BARS))
    last = upto // step
    heights: Counter[int] = Counter()
    for words, count in lengths.items():
        heights[min(words // step, last)] += count
    with Canvas(_HISTOGRAM_WIDTH, 220) as canvas:
        axes = canvas.axes(left=62, right=8, bottom=44, top=10)
        for bar in range(last + 1):
            count = heights[bar]
            (rectangle,) = axes.bar(
                bar * step - 0.5, count, width=0.88 * step, align="edge", color=COLOURS[0], linewidth=0
            )
            first, end = bar * step, bar * step + step - 1
            told = f"{first} or more" if bar == last else f"{first}" if first == end else f"{first} to {end}"
            canvas.explain(rectangle, f"{told} words: {count:,}")
        axes.set_xlim(-0.5 - 0.02 * step * (last + 1), (last + 1) * step - 0.5)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=7, integer=True)
        axes.locator_params(axis="y", nbins=5, integer=True)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("words", labelpad=4)
        return canvas.svg(f"Histogram of the number of words of {name.lower()}")


def _quantile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the texts does not exceed."""
    needed, passed = share * sum(lengths.values()), 0
    for words in sorted(lengths):
        passed += lengths[words]
        if passed >= needed:
            return words
    raise AssertionError("a share above 1")


def _browser(counts: Counts, rows: Sequence[Mapping[str, Any]]) -> str:
    if not counts.rows:
        return ""
    kept = Counter(row["verdict"] for row in rows)
    if len(rows) == counts.rows:
        note = f"All {_rows(counts.rows)} are here."
    else:
        note = (
            f"{len(rows):,} of {_rows(counts.rows)} are here: {kept['wrong']:,} of the {counts.score.wrong:,} where "
            "teacher and human disagree, and an even sample of the others, chosen by a hash of their ids."
        )
    verdicts = {
        "right": "right",
        "wrong": "wrong",
        "unusable": "unusable",
        "unjudged": "not judged (no human label)",
    }
    options = "".join(
        f'<option value="{verdict}">{name} ({kept[verdict]:,})</option>'
        for verdict, name in verdicts.items()
        if kept[verdict]
    )
    selects = [_select("verdict", "Answer", options), _select("outcome", "Outcome", "")]
    if any(row.get("hinted") for row in rows):
        hints = '<option value="yes">after a hint</option><option value="no">without a hint</option>'
        selects.append(_select("hinted", "Hint", hints))
    labels = counts.labels
    if len(labels) > 1:
        each = "".join(f'<option value="{i}">{_text(_brief(label))}</option>' for i, label in enumerate(labels))
        none = f'<option value="other">{_OTHER}</option><option value="none">{_NONE}</option>'
        selects += [_select("label", "Human label", each), _select("teacher", "Teacher's label", each + none)]
    paging = (
        '<nav class="paging" aria-label="Pages of examples"{more}><button type="button" data-page="-1">← Previous'
        '</button><button type="button" data-page="1">Next →</button></nav>'
    )
    return f"""<section id="examples" aria-labelledby="examples-name">
<h2 id="examples-name">Examples</h2>
<p>{_text(note)}</p>
<noscript><p class="caution">The browser of examples needs JavaScript; nothing is loaded from anywhere.</p></noscript>
<form id="filters" role="search" aria-label="Examples">
{_lines(selects)}
<label class="search">Text in input, replies, labels or id<input type="search" id="text" autocomplete="off"></label>
<button type="reset">Clear</button>
</form>
<div class="bar-of-pages"><p id="told" role="status" tabindex="-1"></p>{paging.format(more="")}</div>
<ol id="list"></ol>
{paging.format(more=' id="paging-below"')}
</section>"""


def _select(name: str, told: str, options: str) -> str:
    return f'<label>{told}<select id="{name}"><option value="">all</option>{options}</select></label>'


def _section(name: str, note: str, body: str) -> str:
    told = f"\n<p>{_text(note)}</p>" if note else ""
    return f"<section>\n<h2>{_text(name)}</h2>{told}\n{body}\n</section>"


def _table(header: Sequence[str], lines: Sequence[str]) -> str:
    """Lines begin with a name and a bar; the other columns are numbers."""
    head = "".join(
        f'<th scope="col" class="number">{cell}</th>'
        if i > 1
        else f'<th scope="col">{cell}</th>'
        if cell
        else "<td></td>"
        for i, cell in enumerate(header)
    )
    return (
        f'<div class="scroll"><table class="bars">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{_lines(lines)}\n'
        "</tbody></table></div>"
    )


def _cells(*texts: str, strong: int | None = None) -> str:
    return "".join(
        f'<td class="number{" strong" if i == strong else ""}">{_text(text)}</td>' for i, text in enumerate(texts)
    )


def _bar(count: int, whole: int, *, whisker: tuple[float, float] | None = None) -> str:
    """A cell with a bar; the numbers beside it say the same."""
    line = ""
    if whisker:
        low, high = (f"{100 * end:.2f}%" for end in whisker)
        line = f'<line x1="{low}" x2="{high}" y1="7" y2="7"/>'
    width = f"{100 * count / whole:.2f}%"
    return (
        '<td class="bar"><svg height="14" aria-hidden="true"><rect class="track" width="100%" height="14"/>'
        f'<rect width="{width}" height="14"/>{line}</svg></td>'
    )


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _share(count: int, whole: int) -> str:
    """In percent; 0 and 100 only where it is none and all."""
    percent = 100 * count / whole
    if count and percent < 0.05:
        return "< 0.1 %"
    if count < whole and percent >= 99.95:
        return "> 99.9 %"
    return f"{percent:.1f} %"


def _brief(label: str) -> str:
    label = label if label.strip() else "(blank)"
    return label if len(label) <= 80 else f"{label[:80]}…"
