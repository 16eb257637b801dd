"""Runs to tables and a page: what came out, in words, numbers and plots, whichever way it went.

    sbs report runs --output report.html

The same runs give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from sbs_jax.pages.page import write_page
from sbs_jax.pages.tables import markdown, table
from sbs_jax.stats.findings import headline, sentences
from sbs_jax.stats.folders import find
from sbs_jax.stats.results import Run, identify
from sbs_jax.stats.study import Study, study
from sbs_jax.stats.summary import Comparison, Group, Summary, summarize

__all__ = [
    "Comparison",
    "Group",
    "Run",
    "Study",
    "Summary",
    "find",
    "headline",
    "identify",
    "main",
    "markdown",
    "sentences",
    "study",
    "summarize",
    "table",
    "write_page",
]


def main(paths: Sequence[str | Path], output: str | Path, *, assets: str | Path | None = None) -> int:
    """Writes the page of some runs and prints their tables; method, fraction and seed are from the manifests.

    `paths` are run directories, or folders that hold some. Plots and numbers go to `assets`, a folder beside the page
    if it is not given (`report_files` for `report.html`).
    """
    found, page = find(paths), Path(output)
    folder = page.with_name(f"{page.stem}_files") if assets is None else Path(assets)
    written = write_page(page, found.runs, title=None, notes=(), assets=folder, left_out=found.left_out)
    for summary in written.summaries:
        print(f"{table(summary)}\n")
    for reason in found.left_out:
        print(f"Left out: {reason}")
    print(f"Page: {page}\nPlots and numbers: {folder}")
    return 0
