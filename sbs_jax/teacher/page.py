"""Page of a finished sampling: the teacher's answers in numbers, and a browser of examples.

One HTML file that loads nothing from the network; pages/rendering.py escapes every text. The same rows give the
same bytes.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sbs_jax.checks import whole_number
from sbs_jax.data.parsing import FAILURES, OUTCOMES
from sbs_jax.pages import cards
from sbs_jax.pages.canvas import COLOURS, Canvas
from sbs_jax.pages.rendering import Figure, render, write
from sbs_jax.stats.formats import interval
from sbs_jax.stats.intervals import wilson_interval
from sbs_jax.teacher.examples import (
    AGREEMENT,
    DISTINCT,
    LONGEST_COUNTED,
    SMALL_SET,
    Counts,
    Example,
    Score,
    Selection,
    cut,
)

__all__ = ["Example", "write_page"]

_ENOUGH_ROWS = 20  # least rows of one label among many to show its accuracy separately
_MOST_OUTCOMES = 30
_BARS = 32  # of a histogram
_HISTOGRAM_WIDTH = 428  # pixels; shrinks by a sixth, to fit a phone
_OTHERS = {"other": "another label", "none": "no label"}
_VERDICTS = {"right": "right", "wrong": "wrong", "unusable": "unusable", "unjudged": "not judged (no human label)"}
_MEANINGS = {**OUTCOMES, **FAILURES}


def write_page(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    rows: Iterable[Example],
    next_commands: Sequence[tuple[str, str]] = (),
    examples: int = 2000,
) -> None:
    """Writes one self-contained HTML page about a sampling.

    `rows` is read once and not kept: memory holds only the embedded rows and the counts. Up to half of the `examples`
    embedded rows are ones where teacher and human disagree; the rest is an even sample of all others. A hash of their
    ids chooses both. `facts` are shown in their order, as text; `next_commands` are (sentence, command) pairs for the
    end of the page.

    Raises:
      ValueError: `examples` is negative.
    """
    whole_number("examples", examples, least=0)
    counts, chosen = Counts(), Selection(examples)
    for row in rows:
        counts.add(row)
        chosen.offer(row)
    write(Path(path), _page(title, facts, counts, chosen.rows(), next_commands))


def _page(
    title: str,
    facts: Mapping[str, str],
    counts: Counts,
    rows: Sequence[dict[str, Any]],
    next_commands: Sequence[tuple[str, str]],
) -> str:
    lines, compact = _with_shared_lines(rows)
    outcomes = sorted(Counter(row.get("outcome", "") for row in rows).items(), key=lambda item: (-item[1], item[0]))
    labels = [cut(label) for label in counts.labels]
    if counts.hinted:
        facts = {**facts, "answered after a hint": f"{counts.hinted:,}"}
    return render(
        "teacher.html",
        title=title,
        headline=_headline(counts),
        opening=_opening(rows),
        shares=_shares(counts) if counts.rows else None,
        next_commands=next_commands,
        facts=facts.items(),
        counts=counts,
        outcomes=_outcomes(counts),
        labels=_accuracy(counts) if counts.score.rows else _teacher_labels(counts),
        confusion=_confusion(counts),
        agreement=_agreement(counts),
        lengths=_lengths(counts),
        embedded=len(rows),
        disagreeing=sum(row["verdict"] == "wrong" for row in rows),
        filters=_filters(rows, outcomes=outcomes, labels=counts.labels),
        count=_rows,
        share=_share,
        most_labels=DISTINCT,
        data={"lines": lines, "labels": labels, "outcomes": [outcome for outcome, _ in outcomes], "rows": compact},
    )


def _with_shared_lines(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Stores each line of the prompts once, because prompts repeat their exemplars.

    The two prompts "a\\nb\\nc" and "a\\nb\\nd" are the lines ["a\\n", "b\\n", "c", "d"] and the ranges [0, 3] and
    [0, 2, 3, 4]: start, end, start, end; ends are exclusive.
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


def _headline(counts: Counts) -> str:
    score = counts.score
    if not counts.rows:
        return "No example was sampled"
    if not counts.usable:
        return f"None of {_rows(counts.rows)} got a reply that can be used"
    if not score.rows:
        return f"{_share(counts.usable, counts.rows)} of {_rows(counts.rows)} got a label from the teacher"
    return f"The teacher's own label equals the human label on {_share(score.right, score.rows)} of {_rows(score.rows)}"


def _opening(rows: Sequence[dict[str, Any]]) -> list[cards.Card]:
    """Returns the cards of three rows, those with the lowest ranks; a `Selection` of at least three has them."""
    by_id = {row.get("id", ""): row for row in rows}
    return [_card(by_id[row_id]) for row_id in cards.by_rank(by_id, cards.CARDS)]


def _card(row: Mapping[str, Any]) -> cards.Card:
    verdict, replies = row["verdict"], row.get("replies", [])
    said = row.get("rationale") or (replies[0] if replies else None)
    text = row.get("teacher_label") or f"not usable: {row.get('outcome', '')}"
    label = row.get("label") if verdict != "right" else None
    answer = cards.Answer(who="teacher", text=cards.brief(text), verdict=verdict)
    return cards.Card(
        question=cards.brief(row.get("input") or row.get("id", "")),
        rationale=cards.brief(said) if said else None,
        answers=(answer,),
        label=label,
    )


class Bar(NamedTuple):
    """Row of a table with bars: its name, the bar's width in percent, and cells of numbers."""

    name: str
    width: float
    cells: Sequence[str]
    meaning: str = ""
    whisker: tuple[float, float] | None = None  # in percent
    total: bool = False


class Bars(NamedTuple):
    """Table with bars; `header` names the first column and the columns of numbers."""

    header: Sequence[str]
    rows: Sequence[Bar]


def _shares(counts: Counts) -> Bars:
    """Lists the shares of usable replies and, where labels are known, of right ones; both with 95 % intervals."""
    parts = [("usable", counts.usable, counts.rows, "a label can be read from the reply")]
    if counts.score.rows:
        parts.append(("right", counts.score.right, counts.score.rows, "the teacher's own label is the human label"))
    bars = []
    for name, count, whole, meaning in parts:
        low, high = (100 * end for end in wilson_interval(count / whole, whole))
        cells = [_share(count, whole), interval(low, high), f"{count:,} of {whole:,}"]
        bars.append(Bar(name, 100 * count / whole, cells, meaning=meaning, whisker=(low, high)))
    return Bars(["replies", "share", "95 % interval", "rows"], bars)


def _counted(name: str, count: int, whole: int) -> Bar:
    return Bar(_brief(name), 100 * count / whole, [f"{count:,}", _share(count, whole)])


def _outcomes(counts: Counts) -> Bars:
    ordered = counts.outcomes.ordered()
    shown = ordered if len(ordered) <= _MOST_OUTCOMES else ordered[: _MOST_OUTCOMES - 1]
    bars = [_counted(name, n, counts.rows)._replace(name=name, meaning=_MEANINGS.get(name, "")) for name, n in shown]
    if rest := counts.rows - sum(count for _, count in shown):
        bars.append(_counted("all other outcomes", rest, counts.rows))
    return Bars(["outcome", "rows", "share"], bars)


def _accuracy(counts: Counts) -> Bars:
    """Lists the human labels if they are a small set, else the frequent ones."""
    score = counts.score
    ordered = sorted(counts.by_label.items(), key=lambda item: (-item[1].rows, item[0]))
    if len(ordered) <= 1 and not counts.many_labels:
        ordered = []
    small = len(ordered) <= SMALL_SET
    shown = [(label, one) for label, one in ordered[:SMALL_SET] if small or one.rows >= _ENOUGH_ROWS]
    bars = [_scored(label, one, score) for label, one in shown]
    if shown and len(shown) < len(ordered):
        names = [field.name for field in dataclasses.fields(Score)]
        rest = Score(*(getattr(score, name) - sum(getattr(one, name) for _, one in shown) for name in names))
        bars.append(_scored("all other labels", rest, score))
    bars.append(_scored("all rows" if shown else "all labels", score, score)._replace(total=True))
    hint = ["after a hint"] * bool(score.after_hint)
    return Bars(["human label", "accuracy", "95 % interval", "right", *hint, "wrong", "unusable", "rows"], bars)


def _scored(name: str, score: Score, whole: Score) -> Bar:
    share = 100 * score.right / score.rows
    low, high = (100 * end for end in wilson_interval(score.right / score.rows, score.rows))
    hint = [score.after_hint] * bool(whole.after_hint)
    numbers = (score.right, *hint, score.wrong, score.unusable, score.rows)
    cells = [f"{share:.1f} %", interval(low, high), *(f"{number:,}" for number in numbers)]
    return Bar(_brief(name), share, cells, whisker=(low, high))


def _teacher_labels(counts: Counts) -> Bars:
    shown = counts.teacher_labels.ordered()[:SMALL_SET]
    bars = [_counted(label, count, counts.usable) for label, count in shown]
    if rest := counts.usable - sum(count for _, count in shown):
        bars.append(_counted("all others", rest, counts.usable))
    return Bars(["teacher's label", "rows", "share"], bars)


def _agreement(counts: Counts) -> Bars:
    total = sum(score.rows for score in counts.by_agreement.values())
    bars = []
    for name in AGREEMENT:
        if score := counts.by_agreement.get(name):
            cells = [f"{score.rows:,}", _share(score.rows, total)]
            if counts.score.rows:
                low, high = wilson_interval(score.right / score.rows, score.rows)
                cells += [_share(score.right, score.rows), interval(100 * low, 100 * high)]
            bars.append(Bar(name, 100 * score.rows / total, cells))
    judged = ["accuracy", "95 % interval"] * bool(counts.score.rows)
    return Bars(["replies that have the chosen label", "rows", "share", *judged], bars)


def _confusion(counts: Counts) -> dict[str, Any] | None:
    """Counts human labels (down) against the teacher's (across); a cell is also a filter of the browser."""
    labels = counts.labels
    if len(labels) < 2 or counts.pairs.full:
        return None
    cells: Counter[tuple[str, str]] = Counter()
    for (human, teacher), count in counts.pairs.items():
        key = "none" if teacher is None else str(labels.index(teacher)) if teacher in labels else "other"
        cells[human, key] += count
    keys = [str(number) for number in range(len(labels))]
    keys += [key for key in _OTHERS if any(cells[label, key] for label in labels)]
    names = {key: _OTHERS.get(key) or _brief(labels[int(key)]) for key in keys}
    rows = [
        (
            _brief(label),
            [(key, cells[label, key], 100 * cells[label, key] / counts.by_label[label].rows) for key in keys],
        )
        for label in labels
    ]
    return {"names": names, "rows": rows}


def _lengths(counts: Counts) -> list[Figure]:
    found = []
    for name, lengths in (("Rationales", counts.rationale_words), ("Replies", counts.reply_words)):
        if lengths:
            half, most, nearly_all, upto = (_quantile(lengths, share) for share in (0.5, 0.9, 0.99, 0.995))
            longest = max(lengths)
            caption = (
                f"{sum(lengths.values()):,} of them; half have up to {half:,} words, "
                f"90\N{NO-BREAK SPACE}% up to {most:,}, 99\N{NO-BREAK SPACE}% up to {nearly_all:,}, "
                f"the longest {longest:,}{' or more' * (longest == LONGEST_COUNTED)}."
                f"{' The last bar also counts all longer ones.' * (longest > upto)}"
            )
            plot = _histogram(name, lengths, upto=upto)
            found.append(Figure(name=name, caption=caption, plot=plot, width=_HISTOGRAM_WIDTH))
    return found


def _histogram(name: str, lengths: Counter[int], *, upto: int) -> str:
    """Draws bars of equal numbers of words; the last one also counts everything longer than `upto`."""
    step = max(1, -(-(upto + 1) // _BARS))
    last = upto // step
    heights: Counter[int] = Counter()
    for words, count in lengths.items():
        heights[min(words // step, last)] += count
    with Canvas(_HISTOGRAM_WIDTH, 220) as canvas:
        axes = canvas.axes(left=62, right=8, bottom=44, top=10)
        for bar in range(last + 1):
            first, end, look = bar * step, bar * step + step - 1, {"align": "edge", "color": COLOURS[0], "linewidth": 0}
            (rectangle,) = axes.bar(first - 0.5, heights[bar], width=0.88 * step, **look)
            words = f"{first} or more" if bar == last else f"{first}" if first == end else f"{first} to {end}"
            canvas.explain(rectangle, f"{words} words: {heights[bar]:,}")
        axes.set_xlim(-0.5 - 0.02 * step * (last + 1), (last + 1) * step - 0.5)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=7, integer=True)
        axes.locator_params(axis="y", nbins=5, integer=True)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("words", labelpad=4)
        return canvas.svg(f"Histogram of the number of words of {name.lower()}")


def _quantile(lengths: Counter[int], share: float) -> int:
    """Returns the smallest length that covers at least this share of the texts."""
    needed, passed = share * sum(lengths.values()), 0
    for words in sorted(lengths):
        passed += lengths[words]
        if passed >= needed:
            return words
    raise AssertionError("a share above 1")


def _filters(
    rows: Sequence[Mapping[str, Any]], *, outcomes: Sequence[tuple[str, int]], labels: Sequence[str]
) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    """Lists the filters of the browser; outcomes and labels are numbered, because HTML changes some characters."""
    kept = Counter(row["verdict"] for row in rows)
    verdicts = [(name, f"{text} ({kept[name]:,})") for name, text in _VERDICTS.items() if kept[name]]
    numbered = [(str(i), f"{outcome} ({count:,})") for i, (outcome, count) in enumerate(outcomes)]
    found = [("verdict", "Answer", "all", verdicts), ("outcome", "Outcome", "all", numbered)]
    if any(row.get("hinted") for row in rows):
        found.append(("hinted", "Hint", "all", [("yes", "after a hint"), ("no", "without a hint")]))
    if len(labels) > 1:
        each = [(str(i), _brief(label)) for i, label in enumerate(labels)]
        found += [("label", "Human label", "all", each)]
        found += [("teacher", "Teacher's label", "all", [*each, *_OTHERS.items()])]
    return found


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _share(count: int, whole: int) -> str:
    """Writes a share in percent; 0 and 100 only if they are exact."""
    percent = 100 * count / whole
    if count and percent < 0.05:
        return "< 0.1 %"
    if count < whole and percent >= 99.95:
        return "> 99.9 %"
    return f"{percent:.1f} %"


def _brief(label: str) -> str:
    label = label if label.strip() else "(blank)"
    return label if len(label) <= 80 else f"{label[:80]}…"
