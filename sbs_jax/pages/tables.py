"""A summary as tables: rows of text, aligned for a terminal, or Markdown."""

from collections.abc import Sequence

from sbs_jax.stats.costs import compact, cost
from sbs_jax.stats.findings import MINUS, named_p, percent, sentences, signed
from sbs_jax.stats.intervals import wilson_interval
from sbs_jax.stats.study import Study, paper_accuracy, teacher_of
from sbs_jax.stats.summary import Summary


def table(summary: Summary) -> str:
    """Plain text for a terminal, in columns."""
    size = f", {compact(summary.parameters)} parameters" if summary.parameters else ""
    lines = [
        f"{summary.dataset}{size}: {summary.metric} on {summary.test_rows:,} test rows, in percent, with 95 % interval",
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
    """Differences with their interval and the paired test of it, then McNemar's exact test; both p also by Holm."""
    header = ["difference", "data", "points", "95 % interval", "p", "p, Holm", "only ours right", "only theirs"]
    header += ["McNemar p", "p, Holm", "seeds", "result"]
    rows = [
        [
            f"{c.method} minus {c.reference}",
            percent(c.fraction),
            signed(c.difference),
            f"[{signed(c.low)}, {signed(c.high)}]",
            named_p(c.p),
            named_p(c.p_holm),
            f"{c.ours:,}",
            f"{c.theirs:,}",
            named_p(c.mcnemar_p),
            named_p(c.mcnemar_holm),
            f"{len(c.seeds)}",
            c.verdict if c.p_holm < 0.05 or c.p >= 0.05 else f"{c.verdict}, not by Holm",
        ]
        for c in summary.comparisons
    ]
    return header, rows


def overview_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """Methods and sizes down, datasets across: accuracy with its interval, each at its largest share of the data."""
    sizes = {compact(s.parameters) if s.parameters else "" for s in study.summaries}
    header = ["method", *(["parameters"] if len(sizes) > 1 else []), *study.datasets]
    rows = []
    for method in study.methods:
        for size in sorted({s.parameters or 0 for s in study.summaries if method in s.methods}):
            cells = [method, *([compact(size) if size else "not known"] if len(sizes) > 1 else [])]
            for dataset in study.datasets:
                of_size = (s for s in study.of(dataset) if (s.parameters or 0) == size)
                group = next((g for s in of_size if (g := s.most_data(method))), None)
                cells.append("" if group is None else f"{group.accuracy:.1f} [{group.low:.1f}, {group.high:.1f}]")
                if group and group.fraction < 1:
                    cells[-1] += f" ({percent(group.fraction)})"
            rows.append(cells)
    teachers = {d: next((s.teacher_accuracy for s in study.of(d)), None) for d in study.datasets}
    if any(value is not None for value in teachers.values()):
        blank = [""] if len(sizes) > 1 else []
        rows.append(["teacher", *blank, *("" if v is None else f"{v:.1f}" for v in teachers.values())])
    return header, rows


def paper_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """What the runs have beside what the paper has for the same cell (paper.py says when it is the same)."""
    header = ["method", "dataset", "accuracy", "95 % interval", "paper", "deviation", "95 % interval", "seeds"]
    rows = []
    for summary, group in study.groups():
        value = paper_accuracy(summary, group)
        if value is not None:
            rows.append(
                [
                    group.method,
                    summary.dataset,
                    f"{group.accuracy:.2f}",
                    f"[{group.low:.1f}, {group.high:.1f}]",
                    f"{value:.2f}",
                    signed(group.accuracy - value),
                    f"[{signed(group.low - value)}, {signed(group.high - value)}]",
                    f"{len(group.seeds)}",
                ]
            )
    return header, rows


def cost_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """What one run of each group cost to train, and how much smaller than its teacher each student is."""
    header = ["method", "dataset", "data", "parameters", "teacher / student", "devices", "device-hours"]
    header += ["training FLOPs", "accuracy"]
    rows = []
    for summary in study.summaries:
        teacher = teacher_of(summary)
        size = teacher.parameters if teacher else None
        for group in summary.groups:
            c = cost(group)
            rows.append(
                [
                    group.method,
                    summary.dataset,
                    percent(group.fraction),
                    compact(c.parameters) if c.parameters else "-",
                    f"{size / c.parameters:,.0f} x" if size and c.parameters else "-",
                    c.devices,
                    f"{c.device_hours:.3g}",
                    compact(c.training_flops) if c.training_flops else "-",
                    f"{group.accuracy:.1f}",
                ]
            )
    return header, rows


def teacher_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """The teachers' replies by dataset and split, from the manifests of the records."""
    header = ["dataset", "split", "teacher", "rows", "accuracy", "95 % interval", "usable labels"]
    header += ["of them for another label", "usable rationales", "other outcomes"]
    rows = []
    for dataset in study.datasets:
        found = teacher_of(study.of(dataset)[0])
        for name, split in found.splits.items() if found else ():
            interval = "-"
            if split.accuracy is not None and split.labelled:
                low, high = wilson_interval(split.accuracy / 100, split.labelled)
                interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
            other = ", ".join(f"{outcome} {count:,}" for outcome, count in split.outcomes.items() if outcome != "ok")
            rows.append(
                [
                    dataset,
                    name,
                    (found.name if found else None) or "not known",
                    f"{split.rows:,}",
                    "-" if split.accuracy is None else f"{split.accuracy:.1f} %",
                    interval,
                    f"{split.labels:,}",
                    "-" if split.other_label is None else f"{split.other_label:.1f} %",
                    f"{split.rationales:,}",
                    other or "none",
                ]
            )
    return header, rows


def rationale_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """The students' rationales, means over the seeds that were measured (rationales.py says what each figure is)."""
    header = ["method", "dataset", "parameters", "data", "seeds", "rows", "name a label"]
    header += ["the one predicted", "kept when read", "kept when another's is read", "ROUGE-L with teacher's", "chrF"]
    header += ["words", "teacher's words"]
    rows = []
    for summary, group in study.groups():
        measured = [result.quality for result in group.results if result.quality]
        if not measured:
            continue
        means = {}
        for name in measured[0].values:
            values = [q.values[name] for q in measured]
            known = [value for value in values if value is not None]
            means[name] = sum(known) / len(known) if known else None
        rows.append(
            [
                group.method,
                summary.dataset,
                compact(summary.parameters) if summary.parameters else "-",
                percent(group.fraction),
                f"{len(measured)}",
                f"{measured[0].rows:,}",
                _known(means["by_parser_rows"], "{:,.0f}"),
                *(_known(means[name], "{:.1%}") for name in ("by_parser", "by_label_task")),
                _known(means["by_label_task_other_rationale"], "{:.1%}"),
                *(_known(means[name], "{:.3g}") for name in ("rouge_l", "chrf")),
                *(_known(means[name], "{:.1f}") for name in ("student_words", "teacher_words")),
            ]
        )
    return header, rows


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value).replace("%", " %")


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
