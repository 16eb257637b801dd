"""A summary as tables: rows of text, aligned for a terminal, or Markdown."""

from collections.abc import Sequence

from sbs_jax.report.findings import MINUS, percent, sentences, signed
from sbs_jax.report.summary import Summary


def table(summary: Summary) -> str:
    """Plain text for a terminal, in columns."""
    lines = [
        f"{summary.dataset}: {summary.metric} on {summary.test_rows:,} test rows, in percent, with 95 % interval",
        "",
        *_aligned(*accuracy_rows(summary)),
    ]
    if summary.comparisons:
        lines += ["", "Differences in points, with 95 % interval", "", *_aligned(*difference_rows(summary))]
    lines += ["", *(f"- {text}" for text in (*sentences(summary), *summary.cautions))]
    # Signs that a terminal without UTF-8 and a search by keyboard can deal with.
    return "\n".join(lines).translate(str.maketrans({MINUS: "-", "“": '"', "”": '"'}))


def markdown(summary: Summary) -> str:
    """The same tables for a Markdown file."""
    blocks = [_piped(*accuracy_rows(summary))]
    if summary.comparisons:
        blocks.append(_piped(*difference_rows(summary)))
    blocks.append("\n".join(f"- {text}" for text in (*sentences(summary), *summary.cautions)))
    return "\n\n".join(blocks) + "\n"


def accuracy_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table; columns after the first are numbers."""
    header = ["method", "data", "label rows", "accuracy", "95 % interval", "seeds", "each seed"]
    header += ["updates", "labels seen", "training"]
    rows = []
    for g in summary.groups:
        seen = g.label_examples_seen
        rows.append(
            [
                g.method,
                percent(g.fraction),
                f"{g.label_rows:,}",
                f"{g.accuracy:.1f}",
                f"[{g.low:.1f}, {g.high:.1f}]",
                f"{len(g.seeds)}",
                " ".join(f"{value:.1f}" for value in g.accuracies),
                f"{g.updates:,}",
                "-" if seen is None else f"{seen:,}",
                _duration(g.train_seconds),
            ]
        )
    return header, rows


def difference_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    header = ["difference", "data", "points", "95 % interval", "seeds", "result"]
    rows = [
        [
            f"{c.method} minus {c.reference}",
            percent(c.fraction),
            signed(c.difference),
            f"[{signed(c.low)}, {signed(c.high)}]",
            f"{len(c.seeds)}",
            c.verdict,
        ]
        for c in summary.comparisons
    ]
    return header, rows


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}" for i, (cell, width) in enumerate(cells))
        for row in (header, *rows)
        for cells in [list(zip(row, widths, strict=True))]
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _piped(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, marks, *rows))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
