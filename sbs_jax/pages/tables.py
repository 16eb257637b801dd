"""Tables of a summary or study: rows of text for the page, aligned for a terminal, or as Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sbs_jax.pages.plots import colour_number
from sbs_jax.stats.costs import cost
from sbs_jax.stats.findings import sentences
from sbs_jax.stats.formats import MINUS, compact, interval, p_value, percent, signed, signed_interval
from sbs_jax.stats.intervals import wilson_interval
from sbs_jax.stats.labels import Labels
from sbs_jax.stats.study import Study, paper_accuracy, teacher_of
from sbs_jax.stats.summary import Group, Summary

OUTSIDE = "outside of the set"
_MOST_LABELS = 20  # whose confusions a terminal shows


class Column(NamedTuple):
    """A column: its cells are made from the items of a table; `kind` is their class in page.css."""

    name: str
    cell: Callable[..., str]
    kind: str = "number"


class Table(NamedTuple):
    """A table of texts. `dots` are colors (`--m0` to `--m7`) that mark the rows, if any."""

    header: list[str]
    rows: list[list[str]]
    kinds: list[str]
    dots: Sequence[int] = ()


def _table(columns: Sequence[Column], items: Iterable[tuple[Any, ...]], *, dots: Sequence[int] = ()) -> Table:
    rows = [[column.cell(*item) for column in columns] for item in items]
    return Table([column.name for column in columns], rows, [column.kind for column in columns], dots)


def table(summary: Summary) -> str:
    """Writes a summary for a terminal, in columns."""
    size = f", {compact(summary.parameters)} parameters" if summary.parameters else ""
    lines = [
        f"{summary.dataset}{size}: {summary.metric} on {_tested(summary)}, in percent, with 95 % interval",
        "",
        *_aligned(accuracies(summary)),
    ]
    if summary.comparisons:
        lines += ["", "Differences in points, with 95 % interval", "", *_aligned(differences(summary))]
    if (others := further(summary)).rows:
        lines += ["", "Further metrics, in percent, with 95 % interval", "", *_aligned(others)]
    lines += ["", *(f"- {text}" for text in (*sentences(summary), *summary.cautions))]
    # ASCII signs: a terminal without UTF-8 can show them and a search typed on a keyboard finds them.
    return "\n".join(lines).translate(str.maketrans({MINUS: "-", "“": '"', "”": '"'}))


def markdown(summary: Summary) -> str:
    """Writes the same tables for a Markdown file."""
    blocks = [_piped(accuracies(summary))]
    if summary.comparisons:
        blocks.append(_piped(differences(summary)))
    blocks.append("\n".join(f"- {text}" for text in (*sentences(summary), *summary.cautions)))
    return "\n\n".join(blocks) + "\n"


def accuracies(summary: Summary, *, time: bool = True) -> Table:
    """Lists the groups of a summary, with the time of training or without."""
    columns = [
        Column("method", lambda g: g.method, "text"),
        Column("data", lambda g: percent(g.fraction)),
        Column("label rows", lambda g: f"{g.label_rows:,}"),
        Column("accuracy", lambda g: f"{g.accuracy:.1f}", "number strong"),
        Column("95 % interval", lambda g: interval(g.low, g.high)),
        Column("test rows", lambda g: f"{summary.test_rows:,}"),
        Column("seeds", lambda g: f"{len(g.seeds)}" + f" x {summary.folds} folds" * bool(summary.folds)),
        Column("each seed", lambda g: " ".join(f"{value:.1f}" for value in g.accuracies)),
        Column("updates", lambda g: f"{g.updates:,}"),
        Column("labels seen", lambda g: _or_dash("{:,}", g.label_examples_seen)),
        *([Column("training", lambda g: _duration(g.train_seconds))] if time else []),
    ]
    dots = [colour_number(summary.methods, group.method) for group in summary.groups]
    return _table(columns, ((group,) for group in summary.groups), dots=dots)


def differences(summary: Summary) -> Table:
    """Lists the comparisons: interval and paired test, then McNemar's exact test; both p also by Holm."""
    columns = [
        Column("difference", lambda c: f"{c.method} minus {c.reference}", "text"),
        Column("data", lambda c: percent(c.fraction)),
        Column("points", lambda c: signed(c.difference), "number strong"),
        Column("95 % interval", lambda c: signed_interval(c.low, c.high)),
        Column("p", lambda c: p_value(c.p)),
        Column("p, Holm", lambda c: p_value(c.p_holm)),
        Column("only ours right", lambda c: f"{c.ours:,}"),
        Column("only theirs", lambda c: f"{c.theirs:,}"),
        Column("McNemar p", lambda c: p_value(c.mcnemar_p)),
        Column("p, Holm", lambda c: p_value(c.mcnemar_holm)),
        Column("seeds", lambda c: f"{len(c.seeds)}"),
        Column("result", lambda c: c.verdict + ", not by Holm" * (c.p < 0.05 <= c.p_holm), "note"),
    ]
    dots = [colour_number(summary.methods, comparison.method) for comparison in summary.comparisons]
    return _table(columns, ((comparison,) for comparison in summary.comparisons), dots=dots)


def overview(study: Study) -> Table:
    """Lists methods and sizes down, datasets across: accuracy with its interval, each at its largest share of data."""
    sizes = {s.parameters for s in study.summaries}
    lines = [
        (method, size)
        for method in study.methods
        for size in sorted({s.parameters or 0 for s in study.summaries if method in s.methods})
    ]

    def cell(method: str, size: int, dataset: str) -> str:
        of_size = (s for s in study.of(dataset) if (s.parameters or 0) == size)
        group = next((g for s in of_size if (g := s.most_data(method))), None)
        if group is None:
            return ""
        share = f" ({percent(group.fraction)})" if group.fraction < 1 else ""
        return f"{group.accuracy:.1f} {interval(group.low, group.high)}{share}"

    columns = [Column("method", lambda method, _: method, "text")]
    if len({compact(size) if size else "" for size in sizes}) > 1:
        columns.append(Column("parameters", lambda _, size: compact(size) if size else "not known", "text"))
    columns += [Column(name, lambda method, size, name=name: cell(method, size, name)) for name in study.datasets]
    found = _table(columns, lines)
    teachers = [next((s.teacher_accuracy for s in study.of(dataset)), None) for dataset in study.datasets]
    if any(value is not None for value in teachers):
        blank = [""] * (len(columns) - len(teachers) - 1)
        found.rows.append(["teacher", *blank, *("" if value is None else f"{value:.1f}" for value in teachers)])
    return found


def paper(study: Study) -> Table:
    """Compares runs with the paper where it has the same cell (paper.py decides that)."""
    columns = [
        Column("method", lambda s, g, _: g.method, "text"),
        Column("dataset", lambda s, g, _: s.dataset, "text"),
        Column("accuracy", lambda s, g, _: f"{g.accuracy:.2f}"),
        Column("95 % interval", lambda s, g, _: interval(g.low, g.high)),
        Column("paper", lambda s, g, value: f"{value:.2f}"),
        Column("deviation", lambda s, g, value: signed(g.accuracy - value), "number strong"),
        Column("95 % interval", lambda s, g, value: signed_interval(g.low - value, g.high - value)),
        Column("seeds", lambda s, g, _: f"{len(g.seeds)}"),
    ]
    found = ((s, g, paper_accuracy(s, g)) for s, g in study.groups())
    return _table(columns, (item for item in found if item[2] is not None))


def costs(study: Study) -> Table:
    """Lists the training cost of one run of each group, and how much smaller than its teacher each student is."""
    columns = [
        Column("method", lambda s, g, c, _: g.method, "text"),
        Column("dataset", lambda s, g, c, _: s.dataset, "text"),
        Column("data", lambda s, g, c, _: percent(g.fraction)),
        Column("parameters", lambda s, g, c, _: compact(c.parameters) if c.parameters else "-"),
        Column("teacher / student", lambda s, g, c, t: _or_dash("{:,.0f} x", c.parameters and t and t / c.parameters)),
        Column("devices", lambda s, g, c, _: c.devices),
        Column("training", lambda s, g, c, _: _duration(g.train_seconds)),
        Column("device-hours", lambda s, g, c, _: f"{c.device_hours:.3g}"),
        Column("training FLOPs", lambda s, g, c, _: compact(c.training_flops) if c.training_flops else "-"),
        Column("tokens/s a device", lambda s, g, c, _: _or_dash("{:,.0f}", c.tokens)),
        Column("MFU", lambda s, g, c, _: _or_dash("{:.1f} %", c.utilisation and 100 * c.utilisation)),
        Column("goodput", lambda s, g, c, _: _or_dash("{:.0f} %", c.goodput and 100 * c.goodput)),
        Column("rest of the time", lambda s, g, c, _: _rest(c.rest), "text"),
        Column("accuracy", lambda s, g, c, _: f"{g.accuracy:.1f}"),
        Column("95 % interval", lambda s, g, c, _: interval(g.low, g.high)),
    ]
    teachers = {id(summary): teacher_of(summary) for summary in study.summaries}
    found = ((s, g, cost(g), t.parameters if (t := teachers[id(s)]) else None) for s, g in study.groups())
    return _table(columns, found)


def _rest(shares: Mapping[str, float]) -> str:
    """Names what took at least a hundredth of the time, the largest first: "compiling 12 %, evaluation 8 %"."""
    large = sorted(((share, part) for part, share in shares.items() if share >= 0.01), reverse=True)
    return ", ".join(f"{part} {100 * share:.0f} %" for share, part in large) or "-"


def teachers(study: Study) -> Table:
    """Lists the teachers' replies by dataset and split, from the manifests of the records."""

    def bounds(split: Any) -> str:
        if split.teacher_accuracy is None or not split.labelled:
            return "-"
        low, high = wilson_interval(split.teacher_accuracy / 100, split.labelled)
        return interval(100 * low, 100 * high)

    def others(split: Any) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in split.outcomes.items() if name != "ok") or "none"

    columns = [
        Column("dataset", lambda d, n, t, split: d, "text"),
        Column("split", lambda d, n, t, split: n, "text"),
        Column("teacher", lambda d, n, t, split: t.name or "not known", "text"),
        Column("rows", lambda d, n, t, split: f"{split.rows:,}"),
        Column("accuracy", lambda d, n, t, split: _or_dash("{:.1f} %", split.teacher_accuracy), "number strong"),
        Column("95 % interval", lambda d, n, t, split: bounds(split)),
        Column("usable labels", lambda d, n, t, split: f"{split.teacher_labels:,}"),
        Column("of them for another label", lambda d, n, t, split: _or_dash("{:.1f} %", split.other_label)),
        Column("usable rationales", lambda d, n, t, split: f"{split.rationales:,}"),
        Column("other outcomes", lambda d, n, t, split: others(split), "note"),
    ]
    found = ((dataset, teacher_of(study.of(dataset)[0])) for dataset in study.datasets)
    return _table(columns, ((d, n, t, split) for d, t in found if t for n, split in t.splits.items()))


def rationales(study: Study) -> Table:
    """Lists the students' rationales, means over the seeds that were measured (stats/quality.py explains each)."""

    def mean(name: str, form: str) -> Callable[..., str]:
        def cell(_: Any, __: Any, measured: Sequence[Any]) -> str:
            values = [value for quality in measured if (value := quality.values[name]) is not None]
            return _or_dash(form, sum(values) / len(values) if values else None).replace("%", " %")

        return cell

    columns = [
        Column("method", lambda s, g, _: g.method, "text"),
        Column("dataset", lambda s, g, _: s.dataset, "text"),
        Column("parameters", lambda s, g, _: compact(s.parameters) if s.parameters else "-"),
        Column("data", lambda s, g, _: percent(g.fraction)),
        Column("seeds", lambda s, g, measured: f"{len(measured)}"),
        Column("rows", lambda s, g, measured: f"{measured[0].rows:,}"),
        Column("name a label", mean("by_parser_rows", "{:,.0f}")),
        Column("the one predicted", mean("by_parser", "{:.1%}")),
        Column("kept when read", mean("by_label_task", "{:.1%}")),
        Column("kept when another's is read", mean("by_label_task_other_rationale", "{:.1%}")),
        Column("ROUGE-L with teacher's", mean("rouge_l", "{:.3g}")),
        Column("chrF", mean("chrf", "{:.3g}")),
        Column("words", mean("student_words", "{:.1f}")),
        Column("teacher's words", mean("teacher_words", "{:.1f}")),
    ]
    found = ((s, g, [run.quality for r in g.results for run in r.runs if run.quality]) for s, g in study.groups())
    return _table(columns, (item for item in found if item[2]))


def further(summary: Summary) -> Table:
    """Lists the means of the metrics besides the accuracy, in percent, with their intervals."""
    columns = [
        Column("method", lambda g, *_: g.method, "text"),
        Column("data", lambda g, *_: percent(g.fraction)),
        Column("metric", lambda g, name, _: name, "text"),
        Column("mean", lambda g, _, found: f"{found[0]:.1f}", "number strong"),
        Column("95 % interval", lambda g, _, found: interval(*found[1:])),
        Column("test rows", lambda *_: f"{summary.test_rows:,}"),
        Column("seeds", lambda g, *_: f"{len(g.seeds)}"),
    ]
    return _table(columns, ((g, name, found) for g in summary.groups for name, found in g.further.items()))


_LABEL = (
    Column("label", lambda each: each.label, "text"),
    Column("rows", lambda each: f"{each.rows:,}"),
    Column("predicted", lambda each: f"{each.predicted:,}"),
    Column("right", lambda each: f"{each.right:,}"),
    Column("precision", lambda each: _or_dash("{:.1f}", each.precision)),
    Column("recall", lambda each: _or_dash("{:.1f}", each.recall)),
    Column("F1", lambda each: _or_dash("{:.1f}", each.f1), "number strong"),
)


def of_labels(found: Labels) -> str:
    """Writes the scores by label and the confusions for a terminal; beyond 20 labels no confusions."""
    lines = [*_aligned(_table(_LABEL, ((each,) for each in found.labels)))]
    lines += ["", f"macro-F1 {found.macro_f1:.1f} over {found.rows:,} rows"]
    if len(found.labels) <= _MOST_LABELS:
        columns = confusion(found)
        columns.header[0] = "label \\ predicted"
        lines += ["", *_aligned(columns)]
    return "\n".join(lines)


def largest(summary: Summary) -> list[tuple[Group, Labels]]:
    """Lists the answers by label of each method, with its largest share of the data; empty without a closed set."""
    groups = [group for method in summary.methods if (group := summary.most_data(method))]
    return [(group, found) for group in groups if (found := group.by_label)]


def by_label(summary: Summary) -> Table:
    """Lists precision, recall and F1 of each method by label, in percent."""
    columns = [
        Column("method", lambda group, *_: group.method, "text"),
        Column("data", lambda group, *_: percent(group.fraction)),
        *(Column(name, lambda _, each, cell=cell: cell(each), kind) for name, cell, kind in _LABEL),
    ]
    return _table(columns, ((group, each) for group, of in largest(summary) for each in of.labels))


def confusion(found: Labels) -> Table:
    """Counts targets (down) against predictions (across); those outside of the set are the last column."""
    columns = [Column("label \N{DOWNWARDS ARROW} predicted \N{RIGHTWARDS ARROW}", lambda target, _: target, "text")]
    across = [(each.label, each.label) for each in found.labels] + [(OUTSIDE, None)]
    columns += [Column(name, lambda _, row, key=key: f"{row[key]:,}") for name, key in across]
    return _table(columns, found.confusion.items())


def runs(study: Study) -> Table:
    """Lists every run with its directory."""
    columns = [
        Column("run", lambda r: r.run.method, "text"),
        Column("dataset", lambda r: r.manifest["data"]["dataset"], "text"),
        Column("data", lambda r: percent(r.run.fraction)),
        Column("seed", lambda r: f"{r.run.seed}" + (f", fold {r.fold[0]}" if r.fold else "")),
        Column("accuracy", lambda r: f"{r.accuracy:.1f}", "number strong"),
        Column("95 % interval", lambda r: interval(*r.interval)),
        Column("test rows", lambda r: f"{len(r.test_rows):,}"),
        Column("tested checkpoint", lambda r: f"{r.test_step:,} of {r.updates:,}"),
        Column("ended", lambda r: r.ended["why"] if r.ended else "-", "note"),
        Column("directory", lambda r: str(r.run.path)),
    ]
    return _table(columns, ((run,) for run in study.runs))


def _tested(summary: Summary) -> str:
    return f"{summary.test_rows:,} test rows" + f" in {summary.folds} folds" * bool(summary.folds)


def _or_dash(form: str, value: Any) -> str:
    return "-" if value is None else form.format(value)


def _aligned(table: Table) -> list[str]:
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in (table.header, *table.rows)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _piped(table: Table) -> str:
    marks = ["---", *("---:" for _ in table.header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.header, marks, *table.rows))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
