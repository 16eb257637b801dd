"""The parts of a page about some runs, as HTML text: figures with their files, tables, and what explains them."""

import re
from collections.abc import Sequence

from sbs_jax.pages import plots
from sbs_jax.pages.elements import figure, joined, table, text
from sbs_jax.pages.files import Files, named
from sbs_jax.pages.tables import (
    accuracy_rows,
    cost_rows,
    difference_rows,
    overview_rows,
    paper_rows,
    rationale_rows,
    teacher_rows,
)
from sbs_jax.stats import paper as paper_numbers
from sbs_jax.stats.costs import compact, cost
from sbs_jax.stats.findings import capital, listed, of_data, sentences
from sbs_jax.stats.study import Study, teacher_of
from sbs_jax.stats.summary import Summary

_PAGE_WIDTH = 1040  # pixels between the margins of page.css
_COST_WIDTH = 500  # two beside each other


def of_size(study: Study, summary: Summary) -> str:
    """A summary's name: its dataset, with the student's size where there are several."""
    return f"{summary.dataset}, {_size(summary)}" if len(study.of(summary.dataset)) > 1 else summary.dataset


def _size(summary: Summary) -> str:
    return f"{compact(summary.parameters)} parameters" if summary.parameters else "size not known"


def overview(study: Study, files: Files) -> str:
    """One table over all datasets."""
    header, rows = overview_rows(study)
    most = all(g.fraction == 1 for s in study.summaries for m in s.methods if (g := s.most_data(m)))
    note = "Test accuracy in percent with 95 % interval, " + (
        "with all of the data." if most else "with all of the data or, in brackets, the largest share that was trained."
    )
    texts = 2 if header[1] == "parameters" else 1
    return _section(
        "Overview", note, table(header, rows, name="Table of all datasets", texts=texts) + files.links("accuracy.csv")
    )


def of_dataset(study: Study, dataset: str, files: Files) -> str:
    """Everything about one dataset, size by size."""
    summaries = study.of(dataset)
    sized = [s for s in summaries if s.parameters]
    parts = []
    if len(sized) > 1:
        parts.append(_against_size(study, sized, files))
    for summary in summaries:
        if len(summaries) > 1:
            parts.append(f'<h3 class="size">{text(capital(_size(summary)))}</h3>')
        level = "h4" if len(summaries) > 1 else "h3"
        parts.append(_figures(summary, files, name=of_size(study, summary)))
        told = sentences(summary)
        if len(study.summaries) > 1:  # the table says it of each
            told = [sentence for sentence in told if not sentence.startswith("No difference shown")]
        parts.append(f'<ul class="findings">\n{joined(f"<li>{_unbroken(t)}</li>" for t in told)}\n</ul>')
        parts.append(_tables(summary, files, name=of_size(study, summary), level=level))
        curves = _curves(summary, files, name=of_size(study, summary), level=level)
        if curves and len(study.summaries) > 1:
            curves = f"<details><summary>Learning curves and training loss</summary>\n{curves}</details>"
        parts.append(curves)
    name = f"{dataset}, {_size(sized[0])}" if len(summaries) == len(sized) == 1 else dataset
    return _section(name, "", joined(parts), place=named("dataset", dataset))


def _against_size(study: Study, summaries: Sequence[Summary], files: Files) -> str:
    dataset = summaries[0].dataset
    teacher = teacher_of(summaries[0])
    size = f" ({compact(teacher.parameters)})" if teacher and teacher.parameters else ""
    name = named("size", dataset)
    plot = plots.accuracy_against_size(summaries, teacher_name=f"teacher{size}")
    files.plot(name, plot)
    shares = {g.fraction for s in summaries for m in s.methods if (g := s.most_data(m))}
    told = f"With {of_data(max(shares))}. " if len(shares) == 1 else "Each with the most data it was trained on. "
    caption = f"{told}Filled marks are means over the seeds, bars 95 % intervals; the dashed line is the teacher."
    links = files.links(f"{name}.svg", "accuracy.csv")
    return figure("Test accuracy against the size of the student", caption, plot, width=660, files=links)


def _figures(summary: Summary, files: Files, *, name: str) -> str:
    if len(summary.fractions) > 1:
        plot, caption = plots.accuracy_against_data(summary), "Test accuracy against the share of the data"
    else:
        plot, caption = plots.accuracy_of_methods(summary), "Test accuracy"
    several = any(len(group.seeds) > 1 for group in summary.groups)
    told = "Filled marks are means over the seeds, small open ones single seeds, " if several else "Marks are runs, "
    told += "bars 95 % intervals."
    if len(summary.fractions) > 1 and summary.group(plots.FINE_TUNING, 1.0):
        told += " The dashed line in its colour is standard fine-tuning on all of the data."
    file = named("accuracy", name)
    files.plot(file, plot)
    parts = [figure(caption, told, plot, width=660, files=files.links(f"{file}.svg", "accuracy.csv"))]
    if summary.comparisons and len(summary.fractions) > 1:
        pairs = list(dict.fromkeys((c.method, c.reference) for c in summary.comparisons))
        if len(pairs) > 1 and len({reference for _, reference in pairs}) == 1:
            told = f"Each method minus {pairs[0][1]}"
        else:
            told = capital(listed([f"{method} minus {reference}" for method, reference in pairs]))
        plot = plots.differences(summary.comparisons, methods=summary.methods)
        file = named("differences", name)
        files.plot(file, plot)
        links = files.links(f"{file}.svg", "comparisons.csv")
        told += ". Hollow: the interval holds 0."
        parts.append(figure("Difference, in points", told, plot, width=330, files=links))
    return f'<div class="figures">\n{joined(parts)}\n</div>'


def _tables(summary: Summary, files: Files, *, name: str, level: str) -> str:
    header, rows = accuracy_rows(summary)
    colours = [_colour(summary.methods, row[0]) for row in rows]
    parts = [
        f"<{level}>All numbers</{level}>",
        table(header, rows, name=f"Accuracies, {name}", strong=3, colours=colours),
        files.links("accuracy.csv", "runs.csv"),
    ]
    if summary.comparisons:
        header, rows = difference_rows(summary)
        colours = [_colour(summary.methods, c.method) for c in summary.comparisons]
        parts += [
            f"<{level}>Differences and tests</{level}>",
            table(header, rows, name=f"Differences, {name}", strong=2, colours=colours, last_is_text=True),
            files.links("comparisons.csv"),
        ]
    return joined(parts)


def _curves(summary: Summary, files: Files, *, name: str, level: str) -> str:
    metric = summary.metric
    results = [result for group in summary.groups for result in group.results]
    parts = []
    if any(result.curve("validation", metric) for result in results):
        parts.append(
            f"<{level}>Learning curves</{level}>\n<p>Accuracy on validation rows, by which the checkpoint that is "
            "tested was chosen. Bold lines are means over the seeds.</p>"
        )
        parts.append(_key(summary.methods))
        parts.append(_panels(summary, files, name=name, quantity="validation", shown={metric: "-"}))
    losses = {
        name: style
        for name, style in (("loss/label", "-"), ("loss/rationale", (0, (4, 2))))
        if any(value for result in results for _, value in result.curve("train", name))
    }
    if losses:
        parts.append(
            f"<{level}>Training loss</{level}>\n<p>Cross-entropy per token of each task, in nats. "
            + ("The rationale task is the dashed line. " if "loss/rationale" in losses else "")
            + "</p>"
        )
        parts.append(_key(summary.methods))
        parts.append(_panels(summary, files, name=name, quantity="train", shown=losses))
    return joined(parts)


def _panels(summary: Summary, files: Files, *, name: str, quantity: str, shown: dict) -> str:
    """One panel per fraction, as many to a line as leave each wide enough."""
    columns = min(len(summary.fractions), 4 if len(summary.fractions) in (4, 7, 8) else 3)
    width = min((_PAGE_WIDTH - 24 * (columns - 1)) // columns, 508)
    panels = []
    for fraction in summary.fractions:
        plot = plots.learning_curves(summary, fraction=fraction, quantity=quantity, shown=shown, width=width)
        file = named(quantity, name, f"{100 * fraction:g}")
        files.plot(file, plot)
        links = files.links(f"{file}.svg", "curves.csv")
        panels.append(f"<figure><figcaption><b>{capital(of_data(fraction))}</b>{links}</figcaption>\n{plot}</figure>")
    return f'<div class="curves" style="--panel:{width}px">\n{joined(panels)}\n</div>'


def _key(methods: Sequence[str]) -> str:
    items = [
        f'<li><svg width="22" height="6" viewBox="0 0 22 6" aria-hidden="true"><path d="M1 3H21" fill="none" '
        f'stroke-width="3" stroke-linecap="round" style="stroke:{_colour(methods, name)}"/></svg>{text(name)}</li>'
        for name in methods
    ]
    return f'<ul class="key">{joined(items, "")}</ul>'


def paper(study: Study, files: Files) -> str:
    """Deviation from the paper, where it has the same cell."""
    header, rows = paper_rows(study)
    if not rows:
        return ""
    note = (
        f"The same dataset, method and student (T5 v1.1 base) on all of the data with human labels, in "
        f"{paper_numbers.SOURCE}. The interval of the deviation is that of the runs here; the paper's number has an "
        "error of its own, which it does not give per cell."
    )
    shown = table(header, rows, name="Table beside the paper", strong=5, texts=2) + files.links("accuracy.csv")
    return _section("Beside the paper", note, shown)


def costs(study: Study, files: Files) -> str:
    """What training and answering cost."""
    plots_of = []
    for dataset in study.datasets:
        summaries = study.of(dataset)
        if sum(len(s.groups) for s in summaries) > 1:
            plot = plots.accuracy_against_cost(summaries, width=_COST_WIDTH)
            file = named("cost", dataset)
            files.plot(file, plot)
            links = files.links(f"{file}.svg", "costs.csv")
            told = "Test accuracy against the training of one run."
            told += " Larger marks are larger students." * (len(summaries) > 1)
            plots_of.append(figure(dataset, told, plot, width=_COST_WIDTH, files=links))
    hardware = {cost(group).devices for _, group in study.groups()}
    note = (
        "Training: seconds of the training steps (with compilation, without evaluation) times devices, mean over the "
        "seeds, as the runs logged them. FLOPs: updates times what the model's definition asks for at the batch and "
        "the lengths of the configuration, padding counted. Answering: every generated token passes all parameters "
        "once, in a student as in the teacher. Students generate the label alone, also after step-by-step training; a "
        "single-task student writes its rationale first, as the teacher does."
    )
    if len(hardware) > 1:
        note += " The runs were made on different devices, whose hours are not alike."
    header, rows = cost_rows(study)
    body = _key(study.methods) if plots_of else ""
    body += f'<div class="figures">\n{joined(plots_of)}\n</div>' if plots_of else ""
    body += table(header, rows, name="Table of costs", texts=2) + files.links("costs.csv")
    return _section("Cost", note, body)


def teachers(study: Study, files: Files) -> str:
    """How good the teacher's replies are."""
    header, rows = teacher_rows(study)
    if not rows:
        return ""
    note = (
        "What the records say of the teacher's replies. A usable label that is not the human's comes with a rationale "
        "that argues for it: the share of these is how much of what step-by-step learns from speaks for another answer."
    )
    shown = table(header, rows, name="Table of teachers", texts=3, strong=4, last_is_text=True) + files.links(
        "teacher.csv"
    )
    return _section("Teacher", note, shown)


def rationales(study: Study, files: Files) -> str:
    """How good the students' rationales are, where that was measured."""
    header, rows = rationale_rows(study)
    if not rows:
        return ""
    note = (
        "Rationales that the students wrote for test rows: how many name a label, by the dataset's parser, and how "
        "often it is the one that was predicted; how often the student keeps its prediction when it reads its own "
        "rationale after the input, and when it reads that of another row instead (where both are alike, it hardly "
        "reads them); overlap with the teacher's rationale for the same row, from 0 to 1; and words."
    )
    shown = table(header, rows, name="Table of rationales", texts=2) + files.links("rationales.csv")
    return _section("Rationales", note, shown)


def reading(study: Study) -> str:
    """How intervals and tests come about."""
    paragraphs = joined(f"<p>{text(paragraph)}</p>" for paragraph in _about(study))
    return _section("How to read it", "", paragraphs, place="reading")


def _about(study: Study) -> list[str]:
    groups = [group for _, group in study.groups()]
    found = []
    if any(len(group.seeds) > 1 for group in groups):
        found.append(
            "With several seeds, intervals cover both the seed and the choice of test rows (two-way clustered "
            "variance, Student t with Satterthwaite's degrees of freedom; for accuracies Wilson's form, which stays "
            "within 0 and 100). Two seeds that disagree make a wide interval."
        )
    if any(len(group.seeds) == 1 for group in groups):
        found.append(
            "With one seed, intervals cover the choice of test rows alone (Wilson), not what another seed would have "
            "given."
        )
    if study.comparisons:
        found.append(
            "Differences are paired by seed and by test row, so they are sharper than two overlapping bars suggest. p "
            "is of the paired test whose interval stands beside it: below 0.05 exactly where the interval leaves out 0."
        )
        found.append(
            "McNemar's exact test counts the test rows that only one of the two methods has right (with several seeds: "
            "right with more of them). It speaks of these students; the interval speaks of what other seeds would have "
            "given as well."
        )
    if study.comparisons > 1:
        found.append(
            f"Each interval and p stands for itself; of the {study.comparisons} comparisons here one in twenty misses "
            "by chance. Holm's p is corrected for that, over all comparisons of this page."
        )
    return [*found, "Training time includes compilation and leaves out evaluation."]


def _section(name: str, note: str, body: str, *, place: str = "") -> str:
    place = place or named(name)
    told = f"\n<p>{text(note)}</p>" if note else ""
    heading = f'<h2 id="{place}-name">{text(name)}</h2>'
    return f'<section id="{place}" aria-labelledby="{place}-name">\n{heading}{told}\n{body}\n</section>'


def _unbroken(sentence: str) -> str:
    """Percentages and intervals stay on one line."""
    spaces = r"(?<=\d) (?=%)|(?<=,) (?=[\u2212+\d.]+\])"
    return re.sub(spaces, "\u00a0", text(sentence))


def _colour(methods: Sequence[str], method: str) -> str:
    return f"var(--m{plots.colour_number(methods, method)})"
