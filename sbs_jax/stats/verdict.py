"""A finished run against models that need no student, in one sentence."""

from pathlib import Path

from sbs_jax.stats import baselines, results, summary
from sbs_jax.stats.formats import interval


def verdicts(run: str | Path) -> list[str]:
    """Returns a sentence for each dataset on which the student is below a baseline; [] if the method is unknown.

    [] also for a fold, which is compared with the others in a report.

    The baselines are those of `sbs baseline` if it was run, else the most frequent label of the test rows.
    """
    try:
        found = [results.load(each) for each in results.runs_of(run)]
    except (ValueError, OSError):
        return []
    return [text for each in found if each.fold is None and (text := _verdict(each)) is not None]


def _verdict(result: results.Result) -> str | None:
    measured = baselines.read(result.manifest)
    found = {name: model["accuracy"] for name, model in measured["models"].items()} if measured else {}
    frequent = summary.most_frequent(result)
    if frequent is not None:
        found.setdefault(baselines.MAJORITY, frequent[1])
    name = max(found, key=found.__getitem__, default=None)
    if name is None or result.accuracy >= found[name]:
        return None
    of_dataset = "" if result.run.dataset is None else f" of {result.run.dataset}"
    return (
        f"This student is below a baseline{of_dataset}: it has {result.accuracy:.1f} % {interval(*result.interval)} of "
        f"{len(result.test_rows):,} test rows, and {baselines.TITLES[name]} has "
        f"{found[name]:.1f} %. Train it longer, on more data or from pre-trained weights before comparing methods."
    )
