"""A summary as one HTML file that holds its style and plots and asks for nothing from the network."""

import hashlib
import html
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from sbs_jax.report import plots
from sbs_jax.report.findings import capital, headline, listed, of_data, percent, sentences
from sbs_jax.report.results import Run
from sbs_jax.report.summary import Summary, summarize
from sbs_jax.report.tables import accuracy_rows

_PAGE_WIDTH = 1040  # pixels between the margins of page.css
_SAMPLES = 8
_LONGEST_TEXT = 400  # characters of a sample


def write_page(
    path: str | Path,
    runs: Sequence[Run],
    *,
    title: str | None,
    notes: Sequence[str],
    command: str | None = None,
    teacher_accuracy: float | None = None,
) -> Summary:
    """Writes one self-contained HTML page about some runs; returns its numbers.

    `notes` are paragraphs for the reader (plain text) under the findings; `command` is what repeats the whole
    experiment, where one command does. `teacher_accuracy` as in `summarize`.
    """
    summary = summarize(runs, teacher_accuracy=teacher_accuracy)
    title = title or f"{summary.dataset}: {listed(summary.methods)}"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>
{style()}</style>
</head>
<body>
<main>
<p class="kicker">{_text(title)}</p>
<h1>{_unbroken(headline(summary))}</h1>
{_joined(f"<p>{_text(text)}</p>" for text in notes)}
{_joined(f'<p class="caution">{_text(text)}</p>' for text in summary.cautions)}
{_figures(summary)}
<ul class="findings">
{_joined(f"<li>{_text(text)}</li>" for text in sentences(summary))}
</ul>
{_tables(summary)}
{_curves(summary)}
{_samples(summary)}
{_reproduction(summary, command=command)}
</main>
</body>
</html>
"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")
    return summary


def style() -> str:
    """The style sheet of this page, for the project's other pages too."""
    return Path(__file__).with_name("page.css").read_text("utf-8")


def _figures(summary: Summary) -> str:
    if len(summary.fractions) > 1:
        main_plot, caption = plots.accuracy_against_data(summary), "Test accuracy against the share of the data"
    else:
        main_plot, caption = plots.accuracy_of_methods(summary), "Test accuracy"
    several = any(len(group.seeds) > 1 for group in summary.groups)
    marks = "Filled marks are means over the seeds, small open ones single seeds, " if several else "Marks are runs, "
    parts = [figure(caption, f"{marks}bars 95 % intervals.", main_plot, width=660)]
    if summary.comparisons and len(summary.fractions) > 1:
        pairs = list(dict.fromkeys((c.method, c.reference) for c in summary.comparisons))
        if len(pairs) > 1 and len({reference for _, reference in pairs}) == 1:
            told = f"Each method minus {pairs[0][1]}"
        else:
            told = capital(listed([f"{method} minus {reference}" for method, reference in pairs]))
        plot = plots.differences(summary.comparisons, methods=summary.methods)
        parts.append(figure("Difference, in points", f"{told}. Hollow: the interval holds 0.", plot, width=330))
    return f'<div class="figures">\n{_joined(parts)}\n</div>'


def figure(name: str, caption: str, plot: str, *, width: int) -> str:
    """A plot (SVG of `width` pixels) under its name and caption."""
    return (
        f'<figure style="width:{width}px"><figcaption><b>{_text(name)}</b>{_text(caption)}</figcaption>\n'
        f'<div class="plot" style="min-width:{width * 5 // 6}px">{plot}</div></figure>'
    )


def _tables(summary: Summary) -> str:
    parts = ["<h2>All numbers</h2>", _html_table(*accuracy_rows(summary), summary=summary, strong=3)]
    parts.append(f'<p class="aside" style="margin-top:14px">{_text(_about_intervals(summary))}</p>')
    return _joined(parts)


def _about_intervals(summary: Summary) -> str:
    one = any(len(group.seeds) == 1 for group in summary.groups)
    several = any(len(group.seeds) > 1 for group in summary.groups)
    text = "How the intervals come about. "
    if several:
        text += (
            "With several seeds they cover both the seed and the choice of test rows (two-way clustered variance, "
            "Student t with Satterthwaite's degrees of freedom; for accuracies Wilson's form, which stays within 0 and "
            "100). Two seeds that disagree make a wide interval. "
        )
    if one:
        text += (
            "With one seed they cover the choice of test rows alone (Wilson), not what another seed would have given. "
        )
    if summary.comparisons:
        text += (
            "Differences are paired by seed and by test row, so they are sharper than two overlapping bars suggest. "
        )
    if len(summary.comparisons) > 1:
        text += "Each interval stands for itself; with several comparisons one in twenty misses by chance. "
    return text + "Training time includes compilation and leaves out evaluation."


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, summary: Summary, strong: int) -> str:
    """Rows begin with a method, which gets its colour; `strong` is the column to see first."""

    def kind(column: int) -> str:
        return "" if column == 0 else f' class="number{" strong" if column == strong else ""}"'

    lines = [_joined((f"<th{kind(i)}>{_text(cell)}</th>" for i, cell in enumerate(header)), "")]
    previous = ""
    for row in rows:
        dot = f'<span class="dot" style="background:{_colour(summary, row[0])}"></span>'
        cells = (f"<td{kind(i)}>{dot if i == 0 else ''}{_text(cell)}</td>" for i, cell in enumerate(row))
        mark = ' class="first"' if previous and row[0] != previous else ""
        lines.append(f"<tr{mark}>{_joined(cells, '')}</tr>")
        previous = row[0]
    return (
        f'<div class="scroll"><table>\n<thead><tr>{lines[0]}</tr></thead>\n<tbody>\n{_joined(lines[1:])}\n'
        "</tbody></table></div>"
    )


def _curves(summary: Summary) -> str:
    metric = summary.metric
    results = [result for group in summary.groups for result in group.results]
    parts = []
    if any(result.curve("validation", metric) for result in results):
        parts.append(
            "<h2>Learning curves</h2>\n<p>Accuracy on validation rows, by which the checkpoint that is tested was "
            "chosen. Bold lines are means over the seeds.</p>"
        )
        parts.append(_key(summary))
        parts.append(_panels(summary, quantity="validation", shown={metric: "-"}))
    losses = {
        name: style
        for name, style in (("loss/label", "-"), ("loss/rationale", (0, (4, 2))))
        if any(value for result in results for _, value in result.curve("train", name))
    }
    if losses:
        parts.append(
            "<h2>Training loss</h2>\n<p>Cross-entropy per token of each task, in nats. "
            + ("The rationale task is the dashed line. " if "loss/rationale" in losses else "")
            + "</p>"
        )
        parts.append(_key(summary))
        parts.append(_panels(summary, quantity="train", shown=losses))
    return _joined(parts)


def _panels(summary: Summary, *, quantity: str, shown: dict) -> str:
    """One panel per fraction, as many to a line as leave each wide enough."""
    columns = min(len(summary.fractions), 4 if len(summary.fractions) in (4, 7, 8) else 3)
    width = min((_PAGE_WIDTH - 24 * (columns - 1)) // columns, 508)
    panels = []
    for fraction in summary.fractions:
        plot = plots.learning_curves(summary, fraction=fraction, quantity=quantity, shown=shown, width=width)
        panels.append(f"<figure><h3>{capital(of_data(fraction))}</h3>\n{plot}</figure>")
    return f'<div class="curves" style="--panel:{width}px">\n{_joined(panels)}\n</div>'


def _key(summary: Summary) -> str:
    items = [
        f'<li><svg width="22" height="6" viewBox="0 0 22 6" aria-hidden="true"><path d="M1 3H21" fill="none" '
        f'stroke-width="3" stroke-linecap="round" style="stroke:{_colour(summary, name)}"/></svg>{_text(name)}</li>'
        for name in summary.methods
    ]
    return f'<ul class="key">{_joined(items, "")}</ul>'


def _samples(summary: Summary) -> str:
    """The same test rows for every method, chosen by a hash of their ids: neither by hand nor by outcome."""
    fraction = summary.fractions[-1]
    groups = [group for group in summary.groups if group.fraction == fraction]
    shared = set(groups[0].seeds).intersection(*(group.seeds for group in groups))
    seed = min(shared, default=None)
    chosen = [next(r for r in group.results if seed in (None, r.run.seed)) for group in groups]
    ids = sorted(chosen[0].test_rows, key=lambda i: hashlib.sha256(i.encode()).hexdigest())[:_SAMPLES]
    header = ["<th>input</th><th>label</th>"]
    header += [
        f'<th><span class="dot" style="background:{_colour(summary, group.method)}"></span>{_text(group.method)}</th>'
        for group in groups
    ]
    rows = []
    for row_id in ids:
        row = chosen[0].test_rows[row_id]
        prefix = chosen[0].manifest["data"]["options"].get("label_prefix", "")
        cells = [f'<td class="text">{_shown(row.get("input", row_id).removeprefix(prefix))}</td>']
        cells.append(f'<td class="text short">{_shown(row.get("target", ""))}</td>')
        for result in chosen:
            answer = result.test_rows[row_id]
            verdict = "right" if answer["correct"] else "wrong"
            cells.append(f'<td class="text short {verdict}">{_shown(answer.get("prediction", ""))}</td>')
        rows.append(f"<tr>{_joined(cells, '')}</tr>")
    whose = "one seed each" if seed is None else f"seed {seed}"
    return (
        f"<h2>Sample predictions</h2>\n<p>{len(ids)} of {summary.test_rows:,} test rows, chosen by a hash of their "
        f"ids; students of {whose} with {of_data(fraction)}.</p>\n"
        f'<div class="scroll"><table>\n<thead><tr>{_joined(header, "")}</tr></thead>\n<tbody>\n{_joined(rows)}\n'
        "</tbody></table></div>"
    )


def _reproduction(summary: Summary, *, command: str | None) -> str:
    results = [result for group in summary.groups for result in group.results]
    first = results[0].manifest
    config = shlex.quote(str(Path(results[0].run.path) / "config.gin"))
    again = f"sbs train --gin_file={config} --gin.MODEL_DIR=NEW_DIRECTORY"
    paths = " \\\n    ".join(shlex.quote(str(result.run.path)) for result in results)
    report = f"sbs report {paths} \\\n    --output page.html"
    revisions = sorted({str(result.manifest.get("git_revision")) for result in results})
    parts = ["<h2>How to reproduce</h2>"]
    if command:
        parts.append(f"<p>All of it:</p>\n<pre>{_text(command)}</pre>")
    parts.append(
        f"<p>One run again, by its own configuration (the first; the others likewise):</p>\n<pre>{_text(again)}</pre>"
    )
    parts.append(f"<p>Code at revision <code>{_text(', '.join(revisions))}</code>.</p>")
    rows = [
        [
            r.run.method,
            percent(r.run.fraction),
            f"{r.run.seed}",
            f"{r.accuracy:.1f}",
            f"{r.test_step:,} of {r.updates:,}",
            str(r.run.path),
        ]
        for r in results
    ]
    runs = _html_table(
        ["run", "data", "seed", "accuracy", "tested checkpoint", "directory"], rows, summary=summary, strong=3
    )
    parts.append(f"<details><summary>The {len(results)} runs</summary>\n{runs}\n<pre>{_text(report)}</pre></details>")
    splits = first["data"]["splits"]
    facts = [
        *((name, version) for name, version in sorted(first.get("versions", {}).items())),
        ("devices", ", ".join(first.get("devices", []))),
        ("parameters", f"{first.get('parameter_count', 0):,}"),
        *((f"{name} rows", f"sha256 {split['sha256']}") for name, split in sorted(splits.items())),
    ]
    body = _joined(f"<tr><td>{_text(name)}</td><td class='text'>{_text(value)}</td></tr>" for name, value in facts)
    parts.append(
        f"<details><summary>Versions, devices and data</summary>\n<table><tbody>\n{body}\n</tbody></table></details>"
    )
    return _joined(parts)


def _colour(summary: Summary, method: str) -> str:
    return f"var(--m{plots.colour_number(summary.methods, method)})"


def _shown(text: str) -> str:
    """A text of the data or of a student, safe in HTML and not too long."""
    if not text:
        return "<i>(nothing)</i>"
    return _text(text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…")


def _text(value: str) -> str:
    return html.escape(str(value))


def _unbroken(text: str) -> str:
    """A heading whose hyphenated names and percentages stay on one line."""
    return re.sub(r"[\w.]+(?:-[\w.-]+| %)", r"<span>\g<0></span>", _text(text))


def _joined(parts: Iterable[str], by: str = "\n") -> str:
    return by.join(parts)
