"""Plots of summaries as SVG text for inlining into HTML."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sbs_jax.pages.canvas import COLOURS, INK, MUTED, PAPER, Canvas, label_right
from sbs_jax.stats.costs import cost
from sbs_jax.stats.formats import MINUS, compact, signed
from sbs_jax.stats.results import DISTILLATION, FINE_TUNING, SINGLE_TASK, STEP_BY_STEP
from sbs_jax.stats.summary import Comparison, Group, Summary

_NUMBERS = {FINE_TUNING: 0, DISTILLATION: 1, STEP_BY_STEP: 2, SINGLE_TASK: 3}
_MARKERS = ("o", "s", "D", "^", "v", "P")  # so that methods are told apart without colour


def accuracy_against_data(summary: Summary, *, width: int = 660, height: int = 400) -> str:
    """Accuracy of each method over the share of the training data: mean, 95 % interval, each seed, reference lines.

    Standard fine-tuning on all of the data is a dashed line, as in the paper's figures.
    """
    with Canvas(width, height) as canvas:
        longest = max(len(name) for name in (*summary.methods, "most frequent label"))
        axes = canvas.axes(left=44, right=min(320, 52 + round(6.6 * longest)), bottom=72, top=12)
        at = {fraction: math.log2(fraction) for fraction in summary.fractions}
        span = max(at.values()) - min(at.values())
        heights = _references(summary)
        labels = [(value, f"{name} {value:.1f}", MUTED) for name, value in heights]
        for (_, value), dashes in zip(heights, ((6, 4), (1.5, 3.5)), strict=False):
            axes.axhline(value, color=MUTED, linewidth=1.4, dashes=dashes, zorder=1)
        everything = summary.group(FINE_TUNING, 1.0)
        if everything:
            colour, _ = _look(summary.methods, FINE_TUNING)
            axes.axhline(everything.accuracy, color=colour, linewidth=1.4, dashes=(4, 3), zorder=1)
        for number, method in enumerate(summary.methods):
            groups = [group for group in summary.groups if group.method == method]
            shift = (number - (len(summary.methods) - 1) / 2) * 0.028 * span
            x = [at[group.fraction] + shift for group in groups]
            colour, marker = _look(summary.methods, method)
            axes.plot(x, [group.accuracy for group in groups], color=colour, linewidth=2.2, zorder=3)
            for place, group in zip(x, groups, strict=True):
                axes.plot([place, place], [group.low, group.high], color=colour, linewidth=1.6, alpha=0.55, zorder=2)
                _seeds(canvas, axes, group, along="y", at=place, colour=colour, marker=marker)
                (mean,) = axes.plot(
                    place,
                    group.accuracy,
                    marker,
                    color=colour,
                    markersize=8,
                    markeredgecolor=PAPER,
                    clip_on=False,
                    zorder=5,
                )
                canvas.explain(mean, _told(group))
            labels.append((groups[-1].accuracy, f"{method} {groups[-1].accuracy:.1f}", colour))
        axes.set_xlim(min(at.values()) - 0.1 * span, max(at.values()) + 0.1 * span)
        axes.set_xticks(list(at.values()), [_tick(summary, fraction) for fraction in at], linespacing=1.5)
        axes.set_xlabel("share of the training data, and its label examples", labelpad=8)
        axes.yaxis.set_major_formatter("{x:g} %")
        _limit_accuracy(axes.set_ylim, summary)
        label_right(axes, labels)
        return canvas.svg("Test accuracy of each method against the share of the training data")


def accuracy_of_methods(summary: Summary, *, width: int = 660) -> str:
    """For runs at one share of the data: accuracy of each method on a line of its own."""
    with Canvas(width, 92 + 58 * len(summary.groups)) as canvas:
        longest = max(len(name) for name in summary.methods)
        axes = canvas.axes(left=20 + round(7 * longest), right=40, bottom=52, top=30)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        for row, group in enumerate(summary.groups):
            colour, marker = _look(summary.methods, group.method)
            axes.plot([group.low, group.high], [row, row], color=colour, linewidth=1.8, alpha=0.55, zorder=2)
            _seeds(canvas, axes, group, along="x", at=float(row), colour=colour, marker=marker)
            (mean,) = axes.plot(
                group.accuracy, row, marker, color=colour, markersize=9, markeredgecolor=PAPER, clip_on=False, zorder=5
            )
            canvas.explain(mean, _told(group))
            axes.annotate(
                f"{group.accuracy:.1f}",
                (group.accuracy, row),
                (0, 11),
                textcoords="offset points",
                ha="center",
                color=colour,
                weight="bold",
            )
        for (name, value), dashes in zip(_references(summary), ((6, 4), (1.5, 3.5)), strict=False):
            axes.axvline(value, color=MUTED, linewidth=1.4, dashes=dashes, zorder=1)
            axes.annotate(
                f"{name} {value:.1f}",
                (value, 1),
                (0, 6),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                color=MUTED,
            )
        _limit_accuracy(axes.set_xlim, summary)
        axes.set_ylim(len(summary.groups) - 0.4, -0.6)
        axes.set_yticks(range(len(summary.groups)), [group.method for group in summary.groups])
        axes.xaxis.set_major_formatter("{x:g} %")
        axes.set_xlabel("test accuracy", labelpad=8)
        return canvas.svg("Test accuracy of each method")


def accuracy_against_size(
    summaries: Sequence[Summary], *, teacher_name: str, width: int = 660, height: int = 340
) -> str:
    """Accuracy of each method over the student's parameters, each at its largest share of the data; the teacher a line.

    `summaries` are the sizes of one dataset.
    """
    methods = list(dict.fromkeys(method for summary in summaries for method in summary.methods))
    with Canvas(width, height) as canvas:
        teacher = next((s.teacher_accuracy for s in summaries if s.teacher_accuracy is not None), None)
        names = [*methods, *([] if teacher is None else [teacher_name])]
        axes = canvas.axes(left=44, right=min(320, 52 + round(6.6 * max(map(len, names)))), bottom=56, top=12)
        labels = []
        if teacher is not None:
            axes.axhline(teacher, color=MUTED, linewidth=1.4, dashes=(6, 4), zorder=1)
            labels.append((teacher, f"{teacher_name} {teacher:.1f}", MUTED))
        at = {summary.parameters or 1: math.log10(summary.parameters or 1) for summary in summaries}
        span = max(at.values()) - min(at.values()) or 1.0
        bounds = [] if teacher is None else [teacher]
        for number, method in enumerate(methods):
            groups = [(s.parameters or 1, s.most_data(method)) for s in summaries]
            shift = (number - (len(methods) - 1) / 2) * 0.02 * span
            colour, marker = _look(methods, method)
            points = [(at[parameters] + shift, group) for parameters, group in groups if group is not None]
            axes.plot([x for x, _ in points], [g.accuracy for _, g in points], color=colour, linewidth=2.2, zorder=3)
            for x, group in points:
                bounds += [group.low, group.high]
                axes.plot([x, x], [group.low, group.high], color=colour, linewidth=1.6, alpha=0.55, zorder=2)
                _seeds(canvas, axes, group, along="y", at=x, colour=colour, marker=marker)
                (mean,) = axes.plot(
                    x, group.accuracy, marker, color=colour, markersize=8, markeredgecolor=PAPER, zorder=5
                )
                canvas.explain(mean, _told(group))
            labels.append((points[-1][1].accuracy, f"{method} {points[-1][1].accuracy:.1f}", colour))
        axes.set_xlim(min(at.values()) - 0.08 * span, max(at.values()) + 0.08 * span)
        axes.set_xticks(list(at.values()), [compact(parameters) for parameters in at])
        axes.set_xlabel("parameters of the student", labelpad=8)
        axes.yaxis.set_major_formatter("{x:g} %")
        _limit(axes.set_ylim, bounds)
        label_right(axes, labels)
        return canvas.svg("Test accuracy of each method against the size of the student")


def accuracy_against_cost(summaries: Sequence[Summary], *, width: int, height: int = 320) -> str:
    """Accuracy over the hours of training of one run, of every method, size and share of the data of one dataset."""
    methods = list(dict.fromkeys(method for summary in summaries for method in summary.methods))
    groups = [group for summary in summaries for group in summary.groups]
    sizes = sorted({summary.parameters or 0 for summary in summaries})
    with Canvas(width, height) as canvas:
        axes = canvas.axes(left=44, right=44, bottom=56, top=12)
        axes.grid(visible=True, axis="x")
        axes.set_xscale("log")
        hours = []
        for summary in summaries:
            for group in summary.groups:
                colour, marker = _look(methods, group.method)
                x = max(cost(group).device_hours, 1e-6)
                hours.append(x)
                (point,) = axes.plot(
                    x,
                    group.accuracy,
                    marker,
                    color=colour,
                    markersize=8 + 3 * sizes.index(summary.parameters or 0),
                    markeredgecolor=PAPER,
                    clip_on=False,
                    zorder=3,
                )
                size = f", {compact(summary.parameters)} parameters" if summary.parameters else ""
                canvas.explain(point, f"{_told(group)}, {100 * group.fraction:g} % of the data{size}")
                if len({g.fraction for g in groups}) > 1 and len(groups) <= 16:
                    axes.annotate(
                        f"{100 * group.fraction:g} %",
                        (x, group.accuracy),
                        (9, 0),
                        textcoords="offset points",
                        va="center",
                        color=MUTED,
                        size=10.5,
                    )
        low, high = min(hours), max(hours)
        room = max(1.15, (high / low) ** 0.08)
        axes.set_xlim(low / room, high * room)
        places = _round_numbers(low / room, high * room)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.set_xlabel("device-hours of training, one run", labelpad=8)
        axes.yaxis.set_major_formatter("{x:g} %")
        _limit(axes.set_ylim, [group.accuracy for group in groups])
        return canvas.svg("Test accuracy against the cost of training")


def _round_numbers(low: float, high: float) -> list[float]:
    """Up to six round numbers between two bounds, as even as can be on a logarithmic axis; else the bounds."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        places = [float(f"{factor:g}e{power}") for power in powers for factor in factors]
        places = [place for place in places if low <= place <= high]
        if len(places) <= 6:
            break
    step = -(-len(places) // 6) or 1
    return places[::step] or [float(f"{low:.2g}"), float(f"{high:.2g}")]


def differences(
    comparisons: Sequence[Comparison], *, methods: Sequence[str], width: int = 330, height: int = 400
) -> str:
    """Points by which one method is ahead of its reference, at each share of the data, with a line at no difference."""
    with Canvas(width, height) as canvas:
        axes = canvas.axes(left=44, right=14, bottom=72, top=12)
        fractions = sorted({comparison.fraction for comparison in comparisons})
        names = list(dict.fromkeys(comparison.method for comparison in comparisons))
        axes.axhline(0, color=INK, linewidth=1.4, zorder=1)
        for c in comparisons:
            place = fractions.index(c.fraction) + (names.index(c.method) - (len(names) - 1) / 2) * 0.22
            colour, marker = _look(methods, c.method)
            axes.plot([place, place], [c.low, c.high], color=colour, linewidth=2, zorder=2)
            shown = {"color": colour} if c.verdict != "no difference shown" else {"color": PAPER}
            (point,) = axes.plot(
                place,
                c.difference,
                marker,
                markersize=9,
                markeredgecolor=colour,
                markeredgewidth=2,
                zorder=3,
                **shown,
            )
            canvas.explain(point, f"{c.method} minus {c.reference}: {c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}]")
            axes.annotate(
                signed(c.difference),
                (place, c.difference),
                (11, 1),
                textcoords="offset points",
                va="bottom",
                color=colour,
                weight="bold",
            )
        bounds = [0.0, *(c.low for c in comparisons), *(c.high for c in comparisons)]
        room = 0.08 * (max(bounds) - min(bounds))
        axes.set_ylim(min(bounds) - room, max(bounds) + room)
        axes.set_xlim(-0.6, len(fractions) - 0.3)
        axes.set_xticks(range(len(fractions)), [f"{100 * fraction:g} %" for fraction in fractions])
        axes.set_xlabel("share of the training data", labelpad=27)
        axes.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else f"{value:+g}".replace("-", MINUS))
        return canvas.svg("Difference in accuracy, in points, at each share of the training data")


def learning_curves(
    summary: Summary, *, fraction: float, quantity: str, shown: Mapping[str, Any], width: int = 330, height: int = 230
) -> str:
    """Curves over the updates at one fraction: each seed thin, the mean over the seeds bold.

    `quantity` is "validation" or "train"; `shown` maps names in metrics.jsonl to line styles, for instance
    {"loss/label": "-", "loss/rationale": "--"}. The vertical axis is the same for every fraction.
    """
    with Canvas(width, height) as canvas:
        axes = canvas.axes(left=44, right=12, bottom=44, top=10)
        for method in summary.methods:
            group = summary.group(method, fraction)
            colour, _ = _look(summary.methods, method)
            for name, style in shown.items():
                curves = [] if group is None else _curves(group, quantity, name)
                for curve in curves if len(curves) > 1 else ():
                    axes.plot(*zip(*curve, strict=True), linestyle=style, color=colour, linewidth=0.9, alpha=0.35)
                if curves:
                    axes.plot(*_mean_curve(curves), linestyle=style, color=colour, linewidth=2)
        everywhere = [
            value
            for group in summary.groups
            for result in group.results
            for name in shown
            for _, value in result.curve(quantity, name)
        ]
        low, high = min(everywhere), max(everywhere)
        if quantity == "train":
            axes.set_ylim(0, 1.04 * high)
        else:
            low = 0 if low < 0.4 * high else low - 0.06 * (high - low)
            axes.set_ylim(max(0, low), min(100, high + max(1, 0.06 * (high - low))))
            axes.yaxis.set_major_formatter("{x:g} %")
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlim(left=0)
        axes.set_xlabel("updates", labelpad=4)
        what = "Validation accuracy" if quantity == "validation" else "Training loss"
        return canvas.svg(f"{what} over the updates at {100 * fraction:g} % of the data")


def colour_number(methods: Sequence[str], method: str) -> int:
    """Which of the colours `--m0` to `--m5` (and marks) a method has: the known ones always the same."""
    taken: dict[str, int] = {}
    for name in sorted(methods, key=lambda name: name not in _NUMBERS):
        free = [number for number in range(len(COLOURS)) if number not in taken.values()]
        wanted = _NUMBERS.get(name.partition(" (")[0])
        taken[name] = wanted if wanted in free else free[-1] if free else len(taken) % len(COLOURS)
    return taken[method]


def _look(methods: Sequence[str], method: str) -> tuple[str, str]:
    """Colour, as matplotlib is given it, and mark of a method."""
    number = colour_number(methods, method)
    return COLOURS[number], _MARKERS[number]


def _references(summary: Summary) -> list[tuple[str, float]]:
    """Names and heights of the reference lines."""
    lines = (("teacher", summary.teacher_accuracy), ("most frequent label", summary.majority_accuracy))
    return [(name, value) for name, value in lines if value is not None]


def _seeds(canvas: Canvas, axes: Any, group: Group, *, along: str, at: float, colour: str, marker: str) -> None:
    """Each seed as a small open mark."""
    for result in group.results if len(group.results) > 1 else ():
        place = (at, result.accuracy) if along == "y" else (result.accuracy, at)
        (point,) = axes.plot(*place, marker, color="none", markeredgecolor=colour, markersize=5, alpha=0.8, zorder=4)
        canvas.explain(point, f"{group.method}, seed {result.run.seed}: {result.accuracy:.1f} %")


def _told(group: Group) -> str:
    return f"{group.method}: {group.accuracy:.1f} % [{group.low:.1f}, {group.high:.1f}], {len(group.seeds)} seed(s)"


def _tick(summary: Summary, fraction: float) -> str:
    rows = [group.label_rows for group in summary.groups if group.fraction == fraction]
    return f"{100 * fraction:g} %\n{max(rows):,}"


def _limit_accuracy(set_limits: Any, summary: Summary) -> None:
    values = [value for _, value in _references(summary)]
    for group in summary.groups:
        values += [group.low, group.high, *group.accuracies]
    _limit(set_limits, values)


def _limit(set_limits: Any, values: Sequence[float]) -> None:
    room = max(1.0, 0.06 * (max(values) - min(values)))
    set_limits(max(0.0, min(values) - room), min(100.0, max(values) + room))


def _curves(group: Group, quantity: str, name: str) -> list[list[tuple[int, float]]]:
    """The curve of each seed. A loss of 0 throughout is of a task that the method does not train, and left out."""
    curves = [result.curve(quantity, name) for result in group.results]
    return [curve for curve in curves if curve and (quantity != "train" or any(value for _, value in curve))]


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float]]:
    """Mean over the seeds at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set(tables[0]).intersection(*tables[1:]))
    return steps, [sum(table[step] for table in tables) / len(tables) for step in steps]
