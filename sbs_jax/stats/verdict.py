"""A finished run against models that need no student, in one sentence."""

from pathlib import Path

from sbs_jax.stats import baselines, results, summary
from sbs_jax.stats.formats import interval


def verdict(run: str | Path) -> str | None:
    """Returns a sentence if the student is below a baseline; None if it is not, or the run is no known method.

    None also for a fold, which is compared with the others in a report.

    The baselines are those of `sbs baseline` if it was run, else the most frequent label of the test rows.
    """
    try:
        result = results.load(results.identify(run))
    except (ValueError, OSError):
        return None
    if result.fold is not None:
        return None
    measured = baselines.read(result.manifest)
    found = {name: model["accuracy"] for name, model in measured["models"].items()} if measured else {}
    frequent = summary.most_frequent(result)
    if frequent is not None:
        found.setdefault(baselines.MAJORITY, frequent[1])
    name = max(found, key=found.__getitem__, default=None)
    if name is None or result.accuracy >= found[name]:
        return None
    return (
        f"This student is below a baseline: it has {result.accuracy:.1f} % {interval(*result.interval)} of "
        f"{len(result.test_rows):,} test rows, and {baselines.TITLES[name]} has "
        f"{found[name]:.1f} %. Train it longer, on more data or from pre-trained weights before comparing methods."
    )
