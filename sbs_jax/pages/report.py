"""Comparison of finished runs: tables for a terminal, and one page with plots, numbers and every answer.

    sbs report runs --output report.html

The same runs give the same bytes.
"""

import functools
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_jax.pages import answers, plots, tables
from sbs_jax.pages.downloads import Downloads, add_tables
from sbs_jax.pages.rendering import Figure, check_place, render, slug, write
from sbs_jax.pages.tables import markdown, table
from sbs_jax.stats import paper
from sbs_jax.stats.costs import cost
from sbs_jax.stats.findings import headline, headline_of_all, sentences
from sbs_jax.stats.folders import find
from sbs_jax.stats.formats import capital, compact, listed, of_data
from sbs_jax.stats.results import FINE_TUNING, Run, identify
from sbs_jax.stats.study import Study, study, teacher_of
from sbs_jax.stats.summary import Summary, summarize
from sbs_jax.storage import places

__all__ = ["Run", "Study", "Summary", "find", "headline", "identify", "main", "markdown", "sentences", "study"]
__all__ += ["summarize", "table", "write_page"]

_PAGE_WIDTH = 1040  # pixels between the margins of page.css
_COST_WIDTH = 500  # two side by side


def main(paths: Sequence[str | Path], output: str | Path, *, assets: str | Path | None = None) -> int:
    """Writes the page of some runs and prints their tables; method, fraction and seed come from the manifests.

    `paths` are run directories, or folders of them. Plots and numbers go to `assets`, by default a folder beside the
    page (`report_files` for `report.html`).
    """
    found, page = find(paths), places.of(output)
    folder = page.with_name(f"{page.stem}_files") if assets is None else places.of(assets)
    written = write_page(page, found.runs, title=None, notes=(), assets=folder, left_out=found.left_out)
    for summary in written.summaries:
        print(f"{table(summary)}\n")
    for reason in written.left_out:
        print(f"Left out: {reason}")
    print(f"Page: {page}\nPlots and numbers: {folder}")
    return 0


def write_page(
    path: str | Path,
    runs: Sequence[Run],
    *,
    title: str | None,
    notes: Sequence[str],
    command: str | None = None,
    next_commands: Sequence[tuple[str, str]] = (),
    teacher_accuracy: float | None = None,
    assets: str | Path | None = None,
    left_out: Sequence[str] = (),
) -> Study:
    """Writes one self-contained HTML page about some runs; returns its numbers.

    `notes` are paragraphs (plain text) on how the runs were made; `command` repeats the whole experiment, if there is
    one. `next_commands` are (sentence, command) pairs for the end of the page, before those for its best student.
    `teacher_accuracy` as in `study`. `assets` is a folder for the plots as SVG and the numbers as CSV, to which the
    page links; `left_out` names the runs that are left out, each with its reason.
    """
    path = places.of(path)
    check_place(path)
    found = study(runs, teacher_accuracy=teacher_accuracy, left_out=left_out)
    downloads = Downloads(None if assets is None else places.of(assets), page=path)
    add_tables(downloads, found)
    data = answers.embed(found)
    opening_note, opening = answers.opening(found)
    page = render(
        "report.html",
        title=title or f"{listed(found.datasets)}: {listed(found.methods)}",
        headline=re.split(r"([\w.]+(?:-[\w.-]+| %))", headline_of_all(found)),
        opening=opening,
        opening_note=opening_note,
        notes=notes,
        cautions=_cautions(found),
        study=found,
        figures=_Figures(found, downloads),
        tables=tables,
        links=downloads.links,
        size=_size,
        findings=lambda summary: _findings(found, summary),
        colour=plots.colour_number,
        paper_source=paper.SOURCE,
        devices={cost(group).devices for _, group in found.groups()},
        partial=any(g.fraction < 1 for s in found.summaries for m in s.methods if (g := s.most_data(m))),
        several_seeds={len(group.seeds) > 1 for _, group in found.groups()},
        reproduction=_reproduction(found, command=command),
        next_commands=[*next_commands, *_next(found)],
        answers_note=answers.note(data),
        filters=answers.filters(data),
        data=data,
    )
    downloads.write()
    write(path, page)
    return found


def _cautions(found: Study) -> list[str]:
    several = len(found.summaries) > 1
    cautions = [f"{_name(found, s)}: {text}" if several else text for s in found.summaries for text in s.cautions]
    return cautions + ([f"Left out: {' '.join(found.left_out)}"] if found.left_out else [])


def _size(summary: Summary) -> str:
    return f"{compact(summary.parameters)} parameters" if summary.parameters else "size not known"


def _name(found: Study, summary: Summary) -> str:
    """Names a summary by its dataset, and by the student's size if there are several."""
    return f"{summary.dataset}, {_size(summary)}" if len(found.of(summary.dataset)) > 1 else summary.dataset


def _findings(found: Study, summary: Summary) -> list[str]:
    """Lists the sentences about a summary; percentages and intervals stay on one line."""
    findings = sentences(summary)
    if len(found.summaries) > 1:  # the table has it for each
        findings = [sentence for sentence in findings if not sentence.startswith("No difference shown")]
    return [re.sub(r"(?<=\d) (?=%)|(?<=,) (?=[\u2212+\d.]+\])", "\u00a0", sentence) for sentence in findings]


def _reproduction(found: Study, *, command: str | None) -> dict[str, Any]:
    """Collects commands and versions; facts about a single run are about the first."""
    first, manifest = found.results[0], found.results[0].manifest
    config = shlex.quote(str(places.of(first.run.path) / "config.gin"))
    paths = " \\\n    ".join(shlex.quote(str(result.run.path)) for result in found.runs)
    return {
        "command": command,
        "train": f"sbs train --gin_file={config} --gin.MODEL_DIR=NEW_DIRECTORY",
        "report": f"sbs report {paths} \\\n    --output page.html",
        "revisions": ", ".join(sorted({str(result.manifest.get("git_revision")) for result in found.runs})),
        "facts": [
            *sorted(manifest.get("versions", {}).items()),
            ("devices", ", ".join(manifest.get("devices", []))),
            ("parameters", f"{manifest.get('parameter_count', 0):,}"),
            *((f"{name} rows", f"sha256 {s['sha256']}") for name, s in sorted(manifest["data"]["splits"].items())),
        ],
    }


def _next(found: Study) -> list[tuple[str, str]]:
    """Lists commands that use the best student of the page's first dataset."""
    summary = found.of(found.datasets[0])[-1]
    best = max(summary.groups, key=lambda group: group.accuracy)
    run = best.results[0].runs[0]
    path, rationale = shlex.quote(str(run.run.path)), " --rationale" * (run.kind != "label")
    return [
        (
            f"Answer a file with the best student here ({best.method}, {of_data(best.fraction)}):",
            f"sbs predict {path} --input questions.jsonl --output answers.jsonl{rationale}",
        ),
        ("Serve it over HTTP:", f"sbs serve {path}"),
    ]


@dataclass(frozen=True)
class _Figures:
    """Figures of the page; drawing one adds it to the page's downloads."""

    study: Study
    downloads: Downloads

    def _figure(
        self, name: str, caption: str, draw: Callable[..., str], *, file: str, table: str, width: int
    ) -> Figure:
        """Draws a plot by `draw(width=..)`, twice if it is wider than a phone."""
        plot = draw(width=width)
        self.downloads.plot(file, plot)
        links = self.downloads.links(f"{file}.svg", f"{table}.csv")
        narrow = draw(width=plots.NARROW) if width > plots.NARROW else None
        return Figure(name=name, caption=caption, plot=plot, width=width, narrow=narrow, files=links)

    def by_size(self, dataset: str) -> list[Figure]:
        """Draws accuracy over the student's size, if there are several sizes."""
        summaries = [s for s in self.study.of(dataset) if s.parameters]
        if len(summaries) < 2:
            return []
        teacher = teacher_of(summaries[0])
        size = f" ({compact(teacher.parameters)})" if teacher and teacher.parameters else ""
        draw = functools.partial(plots.accuracy_against_size, summaries, teacher_name=f"teacher{size}")
        shares = {g.fraction for s in summaries for m in s.methods if (g := s.most_data(m))}
        caption = (
            f"With {of_data(max(shares))}. " if len(shares) == 1 else "Each with the most data it was trained on. "
        )
        caption += "Filled marks are means over the seeds, bars 95 % intervals; the dashed line is the teacher."
        name = "Test accuracy against the size of the student"
        return [self._figure(name, caption, draw, file=slug("size", dataset), table="accuracy", width=660)]

    def of_summary(self, summary: Summary) -> list[Figure]:
        """Draws accuracies, and differences if there are several shares of the data."""
        if len(summary.fractions) > 1:
            draw, name = plots.accuracy_against_data, "Test accuracy against the share of the data"
        else:
            draw, name = plots.accuracy_of_methods, "Test accuracy"
        draw = functools.partial(draw, summary)
        several = any(len(group.seeds) > 1 for group in summary.groups)
        caption = (
            "Filled marks are means over the seeds, small open ones single seeds, " if several else "Marks are runs, "
        )
        caption += "bars 95 % intervals."
        if len(summary.fractions) > 1 and summary.group(FINE_TUNING, 1.0):
            caption += " The dashed line in its colour is standard fine-tuning on all of the data."
        file = slug("accuracy", _name(self.study, summary))
        found = [self._figure(name, caption, draw, file=file, table="accuracy", width=660)]
        if summary.comparisons and len(summary.fractions) > 1:
            pairs = list(dict.fromkeys((c.method, c.reference) for c in summary.comparisons))
            if len(pairs) > 1 and len({reference for _, reference in pairs}) == 1:
                caption = f"Each method minus {pairs[0][1]}"
            else:
                caption = capital(listed([f"{method} minus {reference}" for method, reference in pairs]))
            caption += ". Hollow: the interval contains 0."
            draw = functools.partial(plots.differences, summary.comparisons, methods=summary.methods)
            file = slug("differences", _name(self.study, summary))
            name = "Difference, in points"
            found.append(self._figure(name, caption, draw, file=file, table="comparisons", width=plots.NARROW))
        return found

    def curves(self, summary: Summary) -> list[tuple[str, str, list[Figure]]]:
        """Draws (heading, note, a panel per fraction) of validation accuracy and of training losses."""
        results = [result for group in summary.groups for result in group.results]
        found = []
        if any(result.curve("validation", summary.metric) for result in results):
            note = "Accuracy on validation rows, which selects the checkpoint to test. "
            note += "Bold lines are means over the seeds."
            found.append(("Learning curves", note, self._panels(summary, "validation", {summary.metric: "-"})))
        losses = {
            name: style
            for name, style in (("loss/label", "-"), ("loss/rationale", (0, (4, 2))))
            if any(value for result in results for _, value in result.curve("train", name))
        }
        if losses:
            note = "Cross-entropy per token of each task, in nats."
            note += " The rationale task is the dashed line." * ("loss/rationale" in losses)
            found.append(("Training loss", note, self._panels(summary, "train", losses)))
        return found

    def _panels(self, summary: Summary, quantity: str, shown: dict[str, Any]) -> list[Figure]:
        columns = min(len(summary.fractions), 4 if len(summary.fractions) in (4, 7, 8) else 3)
        width = min((_PAGE_WIDTH - 24 * (columns - 1)) // columns, 508)
        found = []
        for fraction in summary.fractions:
            draw = functools.partial(plots.learning_curves, summary, fraction=fraction, quantity=quantity, shown=shown)
            file = slug(quantity, _name(self.study, summary), f"{100 * fraction:g}")
            found.append(self._figure(capital(of_data(fraction)), "", draw, file=file, table="curves", width=width))
        return found

    def by_cost(self) -> list[Figure]:
        """Draws accuracy over the hours of training, for each dataset with several groups."""
        found = []
        for dataset in self.study.datasets:
            summaries = self.study.of(dataset)
            if sum(len(s.groups) for s in summaries) > 1:
                draw = functools.partial(plots.accuracy_against_cost, summaries)
                caption = "Test accuracy against the training of one run."
                caption += " Larger marks are larger students." * (len(summaries) > 1)
                file = slug("cost", dataset)
                found.append(self._figure(dataset, caption, draw, file=file, table="costs", width=_COST_WIDTH))
        return found
