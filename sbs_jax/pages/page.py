"""Runs as one HTML file that holds its style, script, plots and answers, and asks for nothing from the network."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from sbs_jax.pages import browser, data, sections
from sbs_jax.pages.elements import joined, policy, style, table, text
from sbs_jax.pages.files import Files, named
from sbs_jax.stats.findings import headline_of_all, listed, percent
from sbs_jax.stats.results import Run
from sbs_jax.stats.study import Study
from sbs_jax.stats.study import study as studied


def write_page(
    path: str | Path,
    runs: Sequence[Run],
    *,
    title: str | None,
    notes: Sequence[str],
    command: str | None = None,
    teacher_accuracy: float | None = None,
    assets: str | Path | None = None,
    left_out: Sequence[str] = (),
) -> Study:
    """Writes one self-contained HTML page about some runs; returns its numbers.

    `notes` are paragraphs for the reader (plain text) under the headline; `command` is what repeats the whole
    experiment, where one command does. `teacher_accuracy` as in `study`. `assets` is a folder for the plots as SVG and
    the numbers as CSV, to which the page links; `left_out` names runs that were not taken, each with its reason.
    """
    path = Path(path)
    study = studied(runs, teacher_accuracy=teacher_accuracy, left_out=left_out)
    files = Files(None if assets is None else Path(assets), page=path)
    data.add(files, study)
    title = title or f"{listed(study.datasets)}: {listed(study.methods)}"
    answers = browser.data(study)
    parts = [
        *([sections.overview(study, files)] if len(study.datasets) > 1 else []),
        *(sections.of_dataset(study, dataset, files) for dataset in study.datasets),
        sections.paper(study, files),
        sections.costs(study, files),
        sections.teachers(study, files),
        sections.rationales(study, files),
        browser.section(answers),
        sections.reading(study),
        _reproduction(study, command=command),
    ]
    cautions = [*(f"{sections.of_size(study, s)}: {text}" if len(study.summaries) > 1 else text
                  for s in study.summaries for text in s.cautions)]  # fmt: skip
    if study.left_out:
        cautions.append(f"Left out: {' '.join(study.left_out)}")
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy(browser.script())}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>
{style()}{browser.style()}</style>
</head>
<body>
<main>
<p class="kicker">{text(title)}</p>
<h1>{_unbroken(headline_of_all(study))}</h1>
{joined(f"<p>{text(note)}</p>" for note in notes)}
{_cautions(cautions)}
{_contents(study)}
{joined(part for part in parts if part)}
</main>
{browser.embedded(answers)}
<script>{browser.script()}</script>
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write()
    path.write_text(page, "utf-8")
    return study


def _cautions(cautions: Sequence[str]) -> str:
    """What a reader has to know first; many of them fold up after the third."""
    shown = [f'<p class="caution">{text(caution)}</p>' for caution in cautions]
    if len(shown) <= 4:
        return joined(shown)
    rest = f"<details><summary>{len(shown) - 3} more cautions</summary>\n{joined(shown[3:])}</details>"
    return joined([*shown[:3], rest])


def _contents(study: Study) -> str:
    """Where to go on a page of several datasets."""
    if len(study.datasets) < 2:
        return ""
    places = [(named("dataset", dataset), dataset) for dataset in study.datasets]
    places += [("cost", "Cost"), ("predictions", "Predictions"), ("reading", "How to read it")]
    items = joined((f'<li><a href="#{place}">{text(name)}</a></li>' for place, name in places), "")
    return f'<nav class="contents" aria-label="Contents"><ul>{items}</ul></nav>'


def _reproduction(study: Study, *, command: str | None) -> str:
    results = study.results
    first = results[0].manifest
    config = shlex.quote(str(Path(results[0].run.path) / "config.gin"))
    again = f"sbs train --gin_file={config} --gin.MODEL_DIR=NEW_DIRECTORY"
    paths = " \\\n    ".join(shlex.quote(str(result.run.path)) for result in results)
    report = f"sbs report {paths} \\\n    --output page.html"
    revisions = sorted({str(result.manifest.get("git_revision")) for result in results})
    parts = ["<h2>How to reproduce</h2>"]
    if command:
        parts.append(f"<p>All of it:</p>\n{_code(command)}")
    parts.append(f"<p>One run again, by its own configuration (the first; the others likewise):</p>\n{_code(again)}")
    parts.append(f"<p>Code at revision <code>{text(', '.join(revisions))}</code>.</p>")
    rows = [
        [
            r.run.method,
            r.manifest["data"]["dataset"],
            percent(r.run.fraction),
            f"{r.run.seed}",
            f"{r.accuracy:.1f}",
            f"{r.test_step:,} of {r.updates:,}",
            str(r.run.path),
        ]
        for r in results
    ]
    header = ["run", "dataset", "data", "seed", "accuracy", "tested checkpoint", "directory"]
    shown = table(header, rows, name="Table of runs", strong=4, texts=2)
    parts.append(f"<details><summary>The {len(results)} runs</summary>\n{shown}\n{_code(report)}</details>")
    splits = first["data"]["splits"]
    facts = [
        *((name, version) for name, version in sorted(first.get("versions", {}).items())),
        ("devices", ", ".join(first.get("devices", []))),
        ("parameters", f"{first.get('parameter_count', 0):,}"),
        *((f"{name} rows", f"sha256 {split['sha256']}") for name, split in sorted(splits.items())),
    ]
    body = joined(
        f'<tr><th scope="row">{text(name)}</th><td class="text">{text(value)}</td></tr>' for name, value in facts
    )
    parts.append(
        f"<details><summary>Versions, devices and data (of the first run)</summary>\n<table><tbody>\n{body}\n"
        "</tbody></table></details>"
    )
    return joined(parts)


def _code(command: str) -> str:
    return f'<pre tabindex="0">{text(command)}</pre>'


def _unbroken(heading: str) -> str:
    """A heading whose hyphenated names and percentages stay on one line."""
    return re.sub(r"[\w.]+(?:-[\w.-]+| %)", r"<span>\g<0></span>", text(heading))
