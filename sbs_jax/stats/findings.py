"""A summary's findings in words, generated from its numbers."""

from collections.abc import Sequence

from sbs_jax.stats import baselines
from sbs_jax.stats.formats import capital, interval, listed, of_data, p_value, percent, signed, signed_interval
from sbs_jax.stats.intervals import wilson_interval
from sbs_jax.stats.study import Study
from sbs_jax.stats.summary import DIFFER, Comparison, Group, Summary


def headline_of_all(study: Study) -> str:
    """Writes one sentence on several datasets or sizes: how often a method is ahead of its reference."""
    if len(study.summaries) == 1:
        return headline(study.summaries[0])
    found = [c for summary in study.summaries for c in summary.comparisons]
    where = listed(study.datasets) if len(study.datasets) < 5 else f"{len(study.datasets)} datasets"
    if not found:
        return f"Test accuracies on {where}"
    method = min(found, key=lambda c: not c.method.startswith("step-by-step")).method
    reference = next(c.reference for c in found if c.method == method)
    these = [c for c in found if (c.method, c.reference) == (method, reference)]
    ahead, behind, differ = ([c for c in these if c.verdict == verdict] for verdict in ("ahead", "behind", DIFFER))
    of = f"{len(these)} comparison{'s' * (len(these) != 1)} on {where}"
    students = f"with one seed the two students differ in {len(differ)}{_not_by_holm(differ)}" if differ else ""
    if ahead or behind:
        text = (
            f"{capital(method)} is ahead of {reference} in {len(ahead) or 'none'} of {of}{_not_by_holm(ahead)}, behind "
            f"in {len(behind) or 'none'}{_not_by_holm(behind)}"
        )
        return "; ".join(filter(None, (text, students)))
    if differ:
        return f"{capital(method)} and {reference} in {of}: {students}, which says little of the methods"
    return f"No difference shown between {method} and {reference} in any of {of}"


def _not_by_holm(comparisons: Sequence[Comparison]) -> str:
    """Returns a note on differences that Holm's correction of p does not confirm; else ""."""
    lost = [c for c in comparisons if c.verdict != "no difference shown" and c.p_holm >= 0.05]
    if not lost:
        return ""
    if len(comparisons) == 1:
        return f" (not by Holm's correction: p = {p_value(lost[0].p_holm)})"
    kept = len(comparisons) - len(lost)
    return f" ({kept or 'none'} of them by Holm's correction)"


def headline(summary: Summary) -> str:
    """Writes the result in one sentence, from the comparisons of one method (step-by-step if there is one)."""
    if not summary.comparisons:
        parts = [f"{g.method} {g.accuracy:.1f} % with {of_data(g.fraction)}" for g in summary.groups]
        return f"Test accuracy on {summary.dataset}: {listed(parts)}"
    method = min(summary.comparisons, key=lambda c: not c.method.startswith("step-by-step")).method
    found = [c for c in summary.comparisons if c.method == method]
    ours, theirs = capital(method), found[0].reference
    if len(found) == 1:
        return _finding(found[0])
    if all(c.verdict == "no difference shown" for c in found):
        amounts = f"at any of {len(found)} amounts of data"
        return f"No difference shown between {method} and {theirs}, {amounts}{_one_seed(found)}{_by_amount(found)}"
    for verdict, winner, loser in (("ahead", ours, theirs), ("behind", capital(theirs), method)):
        if all(c.verdict == verdict for c in found):
            points = sorted(abs(c.difference) for c in found)
            sizes = _by_amount(found, verdict=verdict) or (
                f", by {points[0]:.1f} to {points[-1]:.1f} points; every 95 % interval leaves out 0 ({_seeds(found)})"
            )
            return f"{winner} is ahead of {loser} at all {len(found)} amounts of data{sizes}"
    phrases = []
    for verdict, phrase in (
        ("ahead", f"{method} is ahead of {theirs} at {{}} of the data"),
        ("behind", f"{theirs} is ahead of {method} at {{}} of the data"),
        (DIFFER, f"with one seed, the students of {method} and {theirs} differ at {{}} of the data"),
        ("no difference shown", "no difference shown at {}"),
    ):
        shares = [percent(c.fraction) for c in found if c.verdict == verdict]
        if shares:
            phrases.append(phrase.format(listed(shares)))
    return capital("; ".join(phrases)) + _by_amount(found)


def _by_amount(found: Sequence[Comparison], *, verdict: str | None = None) -> str:
    """Lists differences, intervals and seeds of at most three amounts of data; "" for one seed.

    With the verdict of all, differences are the winner's; else they are the method minus its reference.
    """
    if len(found) > 3 or _one_seed(found):
        return ""
    sign = -1 if verdict == "behind" else 1
    parts = [
        f"{signed(sign * c.difference)} points {signed_interval(*sorted((sign * c.low, sign * c.high)))} with "
        f"{percent(c.fraction)}"
        for c in found
    ]
    minus = "" if verdict else f"{found[0].method} minus {found[0].reference}, "
    return f": {listed(parts)} ({minus}95 % intervals, {_seeds(found)})"


def _seeds(found: Sequence[Comparison]) -> str:
    return f"{listed([str(count) for count in sorted({len(c.seeds) for c in found})])} seeds"


def sentences(summary: Summary) -> list[str]:
    """Writes a sentence per comparison, then savings of data, then the reference lines."""
    found = [f"{_finding(comparison)}{_not_by_holm([comparison])}." for comparison in summary.comparisons]
    found += _savings(summary)
    if summary.teacher_accuracy is not None:
        best = max(summary.groups, key=lambda group: group.accuracy)
        found.append(
            f"The teacher itself has {_with_interval(summary.teacher_accuracy, summary)} on these test rows; the "
            f"best student here ({best.method} with {of_data(best.fraction)}) has {best.accuracy:.1f} % "
            f"{interval(best.low, best.high)}."
        )
    if summary.majority_accuracy is not None:
        found.append(
            f"Always answering “{summary.majority_label}”, the most frequent label of the test rows, would have "
            f"{_with_interval(summary.majority_accuracy, summary)}."
        )
    return found + _against_baselines(summary)


def _with_interval(accuracy: float, summary: Summary) -> str:
    """Writes an accuracy on the test rows that no seed varies, with its 95 % interval."""
    low, high = wilson_interval(accuracy / 100, summary.test_rows)
    return f"{accuracy:.1f} % {interval(100 * low, 100 * high)}"


def _against_baselines(summary: Summary) -> list[str]:
    """Compares the students with the best model that needs none, if those were measured."""
    if not summary.baselines:
        return []
    name, best = max(summary.baselines.items(), key=lambda item: item[1]["accuracy"])
    below = sum(group.accuracy < best["accuracy"] for group in summary.groups)
    verdict = f"{below} of {len(summary.groups)} results here are below it"
    if below == len(summary.groups):
        verdict = "every student here is below it, so their differences say little about the methods"
    elif below < 2:
        verdict = "one result here is below it" if below else "every student here is above it"
    return [
        f"{capital(baselines.TITLES[name])}, trained on all rows, has {best['accuracy']:.1f} % "
        f"{interval(best['low'], best['high'])}: {verdict}."
    ]


def _finding(c: Comparison) -> str:
    """Writes one comparison in words, without the full stop."""
    where = f"with {of_data(c.fraction)}{_one_seed([c])}"
    if c.verdict == "no difference shown":
        return (
            f"No difference shown between {c.method} and {c.reference} {where}: {signed(c.difference)} points "
            f"{signed_interval(c.low, c.high)}"
        )
    winner, loser, points, low, high = c.method, c.reference, c.difference, c.low, c.high
    if c.high < 0:
        winner, loser, points, low, high = loser, winner, -points, -high, -low
    if c.verdict == DIFFER:
        return (
            f"These two students differ {where}: that of {winner} has {points:.1f} points {interval(low, high)} more "
            f"than that of {loser}, which says little of the methods"
        )
    return f"{capital(winner)} is ahead of {loser} by {points:.1f} points {interval(low, high)} {where}"


def _savings(summary: Summary) -> list[str]:
    """Lists where a method with less data scores at least as much as the other with its largest share."""
    found = []
    pairs = dict.fromkeys((c.method, c.reference) for c in summary.comparisons)
    for one, other in (pair for method, reference in pairs for pair in ((method, reference), (reference, method))):
        goal = [group for group in summary.groups if group.method == other][-1]
        enough = [g for g in summary.groups if g.method == one and g.accuracy >= goal.accuracy]
        if enough and enough[0].fraction < goal.fraction:
            found.append(
                f"{capital(one)} with {of_data(enough[0].fraction)} has {enough[0].accuracy:.1f} %, no "
                f"less than {other} with {of_data(goal.fraction)} ({goal.accuracy:.1f} %)"
                f"{_one_seed([enough[0], goal])}."
            )
    return found


def _one_seed(found: Sequence[Comparison | Group]) -> str:
    """Returns a note for a single seed, whose choice the interval does not cover; else ""."""
    return " (one seed)" if any(len(each.seeds) == 1 for each in found) else ""
