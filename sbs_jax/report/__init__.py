"""Runs to a table and a page: what came out, in words, numbers and plots, whichever way it went.

    sbs report runs/standard-0 runs/step-by-step-0 --output page.html

The same runs give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from sbs_jax.report.findings import headline, sentences
from sbs_jax.report.page import write_page
from sbs_jax.report.results import Run, identify
from sbs_jax.report.summary import Comparison, Group, Summary, summarize
from sbs_jax.report.tables import markdown, table

__all__ = [
    "Comparison",
    "Group",
    "Run",
    "Summary",
    "headline",
    "identify",
    "main",
    "markdown",
    "sentences",
    "summarize",
    "table",
    "write_page",
]


def main(run_dirs: Sequence[str | Path], output: str | Path) -> int:
    """Writes the page of some run directories and prints their table; method, fraction and seed from the manifests."""
    summary = write_page(output, [identify(path) for path in run_dirs], title=None, notes=())
    print(f"{table(summary)}\n\nPage: {output}")
    return 0
