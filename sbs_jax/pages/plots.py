"""Plots of summaries, as SVG text for inlining into HTML."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sbs_jax.pages.canvas import COLOURS, INK, MUTED, PAPER, Canvas, label_right
from sbs_jax.stats import baselines
from sbs_jax.stats.costs import cost
from sbs_jax.stats.formats import MINUS, compact, interval, percent, signed
from sbs_jax.stats.results import CASCADE, DISTILLATION, FINE_TUNING, SINGLE_TASK, STEP_BY_STEP
from sbs_jax.stats.summary import Comparison, Group, Summary

_NUMBERS = {FINE_TUNING: 0, DISTILLATION: 1, STEP_BY_STEP: 2, SINGLE_TASK: 3, CASCADE: 4}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")  # methods differ without color, too
NARROW = 328  # pixels between the margins of a phone of 360; plots of this width name their lines in short lines
_LABEL = 15  # characters of such a line
_NAME = 28  # characters of a line of a method's name beside its row
_DASHES = ((6, 4), (1.5, 3.5), (8, 3, 2, 3))  # of the reference lines


def accuracy_against_data(summary: Summary, *, width: int = 660, height: int = 400) -> str:
    """Draws each method's accuracy over the share of the data: mean, 95 % interval, each seed, reference lines.

    Standard fine-tuning on all of the data is a dashed line, as in the paper's figures.
    """
    methods = summary.methods
    with Canvas(width, height) as canvas:
        names = (*methods, *(name for name, _ in _references(summary)))
        narrow = width <= NARROW
        axes = canvas.axes(left=44, right=_label_room(names, width), bottom=88 if narrow else 72, top=12)
        at = {fraction: math.log2(fraction) for fraction in summary.fractions}
        span = max(at.values()) - min(at.values())
        references = _references(summary)
        for (_, value), dashes in zip(references, _DASHES, strict=False):
            axes.axhline(value, color=MUTED, linewidth=1.4, dashes=dashes, zorder=1)
        everything = summary.group(FINE_TUNING, 1.0)
        if everything:
            colour = _Look.of(methods, FINE_TUNING).colour
            axes.axhline(everything.accuracy, color=colour, linewidth=1.4, dashes=(4, 3), zorder=1)
        labels = [(value, _label(name, value, width), MUTED) for name, value in references]
        for method in methods:
            shift = (methods.index(method) - (len(methods) - 1) / 2) * 0.028 * span
            points = [(at[group.fraction] + shift, group) for group in summary.groups if group.method == method]
            labels.append(_line(canvas, axes, points, look=_Look.of(methods, method), width=width))
        axes.set_xlim(min(at.values()) - 0.1 * span, max(at.values()) + 0.1 * span)
        axes.set_xticks(list(at.values()), [_tick(summary, fraction) for fraction in at], linespacing=1.5)
        if narrow and len(at) > 3:  # each has little room
            axes.set_xticks(list(at.values()), [f"{100 * fraction:g}" for fraction in at], size=11)
            axes.set_xlabel("% of the training data", labelpad=8)
        else:
            parts = ("share of the training data,", "and its label examples")
            axes.set_xlabel(("\n" if narrow else " ").join(parts), labelpad=8)
        axes.yaxis.set_major_formatter("{x:g} %")
        _limit_accuracy(axes.set_ylim, summary.groups, [value for _, value in references])
        label_right(axes, labels)
        return canvas.svg("Test accuracy of each method against the share of the training data")


def accuracy_of_methods(summary: Summary, *, width: int = 660) -> str:
    """Draws each method's accuracy on a separate line, for runs at one share of the data.

    The names of the methods are to the left of the lines, or above them in a narrow plot.
    """
    narrow, references = width <= NARROW, _references(summary)
    names = ["" if narrow else textwrap.fill(group.method, _NAME) for group in summary.groups]
    longest = max(len(line) for name in names for line in (name.splitlines() or [""]))
    left, row_height, top = 20 + round(7 * longest), 58, 15 + 15 * max(1, len(references))
    if narrow:
        left, row_height = 14, 74
    with Canvas(width, 62 + top + row_height * len(summary.groups)) as canvas:
        axes = canvas.axes(left=left, right=24 if narrow else 40, bottom=52, top=top)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        _limit_accuracy(axes.set_xlim, summary.groups, [value for _, value in references])
        for row, group in enumerate(summary.groups):
            look = _Look.of(summary.methods, group.method)
            _group(canvas, axes, group, at=float(row), look=look, along="x")
            offset = {"xytext": (0, 11), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{group.accuracy:.1f}", (group.accuracy, row), color=look.colour, weight="bold", **offset)
            if narrow:
                place = {"xytext": (0, 26), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
                axes.annotate(group.method, (0, row), color=look.colour, weight="bold", **place)
        low, high = axes.get_xlim()
        for line, ((name, value), dashes) in enumerate(zip(references, _DASHES, strict=False)):
            axes.axvline(value, color=MUTED, linewidth=1.4, dashes=dashes, zorder=1)
            share = (value - low) / (high - low)
            side = "left" if share < 0.25 else "right" if share > 0.75 else "center"
            place = {"xytext": (0, 6 + 15 * line), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axes.annotate(f"{name} {value:.1f}", (value, 1), ha=side, color=MUTED, **place)
        axes.set_ylim(len(summary.groups) - 0.4, -0.6)
        axes.set_yticks(range(len(summary.groups)), names)
        axes.locator_params(axis="x", nbins=5 if narrow else 9)
        axes.xaxis.set_major_formatter("{x:g} %")
        axes.set_xlabel("test accuracy", labelpad=8)
        return canvas.svg("Test accuracy of each method")


def accuracy_against_size(
    summaries: Sequence[Summary], *, teacher_name: str, width: int = 660, height: int = 340
) -> str:
    """Draws each method's accuracy at its largest share of the data over the student's size; the teacher is a line.

    `summaries` are the sizes of one dataset.
    """
    methods = list(dict.fromkeys(method for summary in summaries for method in summary.methods))
    with Canvas(width, height) as canvas:
        teacher = [s.teacher_accuracy for s in summaries if s.teacher_accuracy is not None][:1]
        room = _label_room([*methods, *(teacher_name for _ in teacher)], width)
        axes = canvas.axes(left=44, right=room, bottom=56, top=12)
        labels = [(value, _label(teacher_name, value, width), MUTED) for value in teacher]
        for value in teacher:
            axes.axhline(value, color=MUTED, linewidth=1.4, dashes=_DASHES[0], zorder=1)
        at = {summary.parameters or 1: math.log10(summary.parameters or 1) for summary in summaries}
        span = max(at.values()) - min(at.values()) or 1.0
        drawn = []
        for method in methods:
            shift = (methods.index(method) - (len(methods) - 1) / 2) * 0.02 * span
            groups = [(s.parameters or 1, s.most_data(method)) for s in summaries]
            points = [(at[parameters] + shift, group) for parameters, group in groups if group is not None]
            drawn += [group for _, group in points]
            labels.append(_line(canvas, axes, points, look=_Look.of(methods, method), width=width))
        axes.set_xlim(min(at.values()) - 0.08 * span, max(at.values()) + 0.08 * span)
        axes.set_xticks(list(at.values()), [compact(parameters) for parameters in at])
        axes.set_xlabel("parameters of the student", labelpad=8)
        axes.yaxis.set_major_formatter("{x:g} %")
        _limit_accuracy(axes.set_ylim, drawn, teacher)
        label_right(axes, labels)
        return canvas.svg("Test accuracy of each method against the size of the student")


def accuracy_against_cost(summaries: Sequence[Summary], *, width: int, height: int = 320) -> str:
    """Draws accuracy over the hours of one run's training: every method, size and share of the data of one dataset."""
    methods = list(dict.fromkeys(method for summary in summaries for method in summary.methods))
    groups = [(summary, group) for summary in summaries for group in summary.groups]
    sizes = sorted({summary.parameters or 0 for summary in summaries})
    name_shares = len({group.fraction for _, group in groups}) > 1 and len(groups) <= 16
    hours = [max(cost(group).device_hours, 1e-6) for _, group in groups]
    with Canvas(width, height) as canvas:
        axes = canvas.axes(left=44, right=44, bottom=56, top=12)
        axes.grid(visible=True, axis="x")
        axes.set_xscale("log")
        for x, (summary, group) in zip(hours, groups, strict=True):
            look = _Look.of(methods, group.method)
            markersize = 8 + 3 * sizes.index(summary.parameters or 0)
            point = _mark(axes, x, group.accuracy, look=look, markersize=markersize, zorder=3)
            size = f", {compact(summary.parameters)} parameters" if summary.parameters else ""
            canvas.explain(point, f"{_explanation(group)}, {percent(group.fraction)} of the data{size}")
            if name_shares:
                offset = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
                axes.annotate(percent(group.fraction), (x, group.accuracy), color=MUTED, size=10.5, **offset)
        low, high = min(hours), max(hours)
        room = max(1.15, (high / low) ** 0.08)
        axes.set_xlim(low / room, high * room)
        places = _round_numbers(low / room, high * room)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.set_xlabel("device-hours of training, one run", labelpad=8)
        axes.yaxis.set_major_formatter("{x:g} %")
        _limit(axes.set_ylim, [group.accuracy for _, group in groups])
        return canvas.svg("Test accuracy against the cost of training")


def _round_numbers(low: float, high: float) -> list[float]:
    """Chooses up to six round numbers between two bounds for a logarithmic axis; the bounds if there are none."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        places = [float(f"{factor:g}e{power}") for power in powers for factor in factors]
        places = [place for place in places if low <= place <= high]
        if len(places) <= 6:
            break
    step = -(-len(places) // 6) or 1
    return places[::step] or [float(f"{low:.2g}"), float(f"{high:.2g}")]


def differences(
    comparisons: Sequence[Comparison], *, methods: Sequence[str], width: int = NARROW, height: int = 400
) -> str:
    """Draws the difference of each method from its reference, in points, at each share of the data, and a line at 0."""
    fractions = sorted({comparison.fraction for comparison in comparisons})
    names = list(dict.fromkeys(comparison.method for comparison in comparisons))
    with Canvas(width, height) as canvas:
        axes = canvas.axes(left=44, right=_label_room(names, NARROW) if len(names) > 1 else 14, bottom=72, top=12)
        axes.axhline(0, color=INK, linewidth=1.4, zorder=1)
        for c in comparisons:
            place = fractions.index(c.fraction) + (names.index(c.method) - (len(names) - 1) / 2) * 0.22
            colour, marker = _Look.of(methods, c.method)
            axes.plot([place, place], [c.low, c.high], color=colour, linewidth=2, zorder=2)
            fill = PAPER if c.verdict == "no difference shown" else colour
            edge = {"markersize": 9, "markeredgecolor": colour, "markeredgewidth": 2}
            (point,) = axes.plot(place, c.difference, marker, color=fill, zorder=3, **edge)
            canvas.explain(point, f"{c.method} minus {c.reference}: {c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}]")
            offset = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
            axes.annotate(signed(c.difference), (place, c.high), color=colour, weight="bold", **offset)
        bounds = [0.0, *(c.low for c in comparisons), *(c.high for c in comparisons)]
        room = 0.08 * (max(bounds) - min(bounds))
        axes.set_ylim(min(bounds) - room, max(bounds) + 1.2 * room)
        axes.set_xlim(-0.6, len(fractions) - 0.4)
        last = {c.method: c for c in comparisons}
        if len(last) > 1:
            wrapped = [
                (c.difference, _label(name, None, NARROW), _Look.of(methods, name).colour) for name, c in last.items()
            ]
            label_right(axes, wrapped)
        axes.set_xticks(range(len(fractions)), [percent(fraction) for fraction in fractions])
        axes.set_xlabel("share of the training data", labelpad=27)
        axes.yaxis.set_major_formatter(lambda value, _: "0" if value == 0 else f"{value:+g}".replace("-", MINUS))
        return canvas.svg("Difference in accuracy, in points, at each share of the training data")


def learning_curves(
    summary: Summary, *, fraction: float, quantity: str, shown: Mapping[str, Any], width: int = 330, height: int = 230
) -> str:
    """Draws curves over the updates at one fraction: each seed thin, the mean over the seeds bold.

    `quantity` is "validation" or "train"; `shown` maps names in metrics.jsonl to line styles, for instance
    {"loss/label": "-", "loss/rationale": "--"}. The vertical axis is the same for every fraction. A narrow plot names
    its lines; a page shows a key with the others.
    """
    narrow, labels = width <= NARROW, list[tuple[float, str, str]]()
    if narrow:  # room for all labels
        lines = sum(
            _label(f"{method} {name.partition('/')[2]}", None, width).count("\n") + 1
            for method in summary.methods
            for name in shown
        )
        height = max(height, 16 * lines + 60)
    with Canvas(width, height) as canvas:
        axes = canvas.axes(left=44, right=_label_room(summary.methods, width) if narrow else 12, bottom=44, top=10)
        for method in summary.methods:
            group = summary.group(method, fraction)
            colour = _Look.of(summary.methods, method).colour
            for name, style in shown.items():
                curves = [] if group is None else _curves(group, quantity, name)
                for curve in curves if len(curves) > 1 else ():
                    axes.plot(*zip(*curve, strict=True), linestyle=style, color=colour, linewidth=0.9, alpha=0.35)
                if curves:
                    steps, means = _mean_curve(curves)
                    axes.plot(steps, means, linestyle=style, color=colour, linewidth=2)
                    task = f" {name.partition('/')[2]}" if len(shown) > 1 else ""
                    labels.append((means[-1], _label(f"{method}{task}", None, width), colour))
        results = [result for group in summary.groups for result in group.results]
        everywhere = [value for r in results for name in shown for _, value in r.curve(quantity, name)]
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
        if narrow:
            label_right(axes, labels, above=10)
        name = "Validation accuracy" if quantity == "validation" else "Training loss"
        return canvas.svg(f"{name} over the updates at {percent(fraction)} of the data")


def colour_number(methods: Sequence[str], method: str) -> int:
    """Returns the number of a method's color (`--m0` to `--m7`) and mark; known methods always have the same."""
    taken: dict[str, int] = {}
    for name in sorted(methods, key=lambda name: name not in _NUMBERS):
        free = [number for number in range(len(COLOURS)) if number not in taken.values()]
        wanted = _NUMBERS.get(name.partition(" (")[0])
        taken[name] = wanted if wanted in free else free[-1] if free else len(taken) % len(COLOURS)
    return taken[method]


class _Look(NamedTuple):
    """Colour, for matplotlib, and mark of a method."""

    colour: str
    marker: str

    @classmethod
    def of(cls, methods: Sequence[str], method: str) -> "_Look":
        number = colour_number(methods, method)
        return cls(COLOURS[number], _MARKERS[number])


def _line(
    canvas: Canvas, axes: Any, points: Sequence[tuple[float, Group]], *, look: _Look, width: int
) -> tuple[float, str, str]:
    """Draws a method's groups at their places and a line through them; returns its label for `label_right`."""
    axes.plot([x for x, _ in points], [g.accuracy for _, g in points], color=look.colour, linewidth=2.2, zorder=3)
    for x, group in points:
        _group(canvas, axes, group, at=x, look=look)
    last = points[-1][1]
    return last.accuracy, _label(last.method, last.accuracy, width), look.colour


def _group(canvas: Canvas, axes: Any, group: Group, *, at: float, look: _Look, along: str = "y") -> None:
    """Draws a group's interval, its seeds as small open marks, and its mean, at one place of the other axis."""

    def place(value: float) -> tuple[float, float]:
        return (at, value) if along == "y" else (value, at)

    interval_ = zip(place(group.low), place(group.high), strict=True)
    axes.plot(*interval_, color=look.colour, linewidth=1.6, alpha=0.55, zorder=2)
    for result in group.results if len(group.results) > 1 else ():
        hollow = {"color": "none", "markeredgecolor": look.colour, "markersize": 5, "alpha": 0.8}
        (point,) = axes.plot(*place(result.accuracy), look.marker, zorder=4, **hollow)
        canvas.explain(point, f"{group.method}, seed {result.run.seed}: {result.accuracy:.1f} %")
    canvas.explain(_mark(axes, *place(group.accuracy), look=look), _explanation(group))


def _mark(axes: Any, x: float, y: float, *, look: _Look, markersize: int = 8, zorder: int = 5) -> Any:
    style = {"color": look.colour, "markeredgecolor": PAPER, "markersize": markersize, "zorder": zorder}
    return axes.plot(x, y, look.marker, clip_on=False, **style)[0]


def _explanation(group: Group) -> str:
    return f"{group.method}: {group.accuracy:.1f} % {interval(group.low, group.high)}, {len(group.seeds)} seed(s)"


def _label(name: str, value: float | None, width: int) -> str:
    """Writes the label of a line in a plot of this width: its name and last value, in short lines if it is narrow."""
    text = name if value is None else f"{name} {value:.1f}"
    return textwrap.fill(text, _LABEL, break_on_hyphens=False) if width <= NARROW else text


def _label_room(names: Sequence[str], width: int) -> int:
    """Returns the pixels to the right of the axes that labels with these names need."""
    if width <= NARROW:
        lines = [line for name in names for line in _label(name, None, width).splitlines()]
        return 14 + round(7.6 * max(5, *map(len, lines)))
    return min(320, 52 + round(6.6 * max(map(len, names))))


def _references(summary: Summary) -> list[tuple[str, float]]:
    """Names the reference lines and their heights."""
    linear = summary.baselines.get(baselines.LINEAR)
    lines = (
        ("teacher", summary.teacher_accuracy),
        ("most frequent label", summary.majority_accuracy),
        ("linear model", linear["accuracy"] if linear else None),
    )
    return [(name, value) for name, value in lines if value is not None]


def _tick(summary: Summary, fraction: float) -> str:
    rows = max(group.label_rows for group in summary.groups if group.fraction == fraction)
    return f"{percent(fraction)}\n{rows:,}"


def _limit_accuracy(set_limits: Any, groups: Sequence[Group], others: Sequence[float]) -> None:
    _limit(set_limits, [*others, *(value for g in groups for value in (g.low, g.high, *g.accuracies))])


def _limit(set_limits: Any, values: Sequence[float]) -> None:
    room = max(1.0, 0.06 * (max(values) - min(values)))
    set_limits(max(0.0, min(values) - room), min(100.0, max(values) + room))


def _curves(group: Group, quantity: str, name: str) -> list[list[tuple[int, float]]]:
    """Returns the curve of each seed, without a loss that is 0 throughout: its task is not trained by the method."""
    curves = [result.curve(quantity, name) for result in group.results]
    return [curve for curve in curves if curve and (quantity != "train" or any(value for _, value in curve))]


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float]]:
    """Averages over the seeds at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set(tables[0]).intersection(*tables[1:]))
    return steps, [sum(table[step] for table in tables) / len(tables) for step in steps]
