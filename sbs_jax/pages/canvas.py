"""Drawing with matplotlib as SVG text, for inlining into HTML or as files.

Text stays text, colours are CSS variables (`var(--ink)`, `var(--m0)`; page.css defines them for light and dark), and
there are no ids or dates: the same plot gives the same bytes.
"""

import functools
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from sbs_jax.pages.rendering import TEMPLATES

# Colours for matplotlib, and the CSS variables that replace them. Black would be left out as matplotlib's default.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
COLOURS = tuple(f"#0a00{number:02x}" for number in range(1, 9))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"m{number}" for number, colour in enumerate(COLOURS)
}
# One point is one CSS pixel: figures are drawn at the size they are shown.
_DPI = 72
_FONTS = "'DejaVu Sans', Verdana, Arial, sans-serif"
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sbs",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout everywhere
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.major.pad": 6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


class Canvas:
    """A figure of fixed size in CSS pixels under this module's settings; `svg` gives its text."""

    def __init__(self, width: int, height: int) -> None:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._size = (width, height)
        self._settings = matplotlib.rc_context(_SETTINGS)
        self._figure_type, self._canvas_type = Figure, FigureCanvasSVG
        self._explanations: list[str] = []

    def __enter__(self) -> "Canvas":
        self._settings.__enter__()
        width, height = self._size
        # pyplot would keep the figure and set the process's backend.
        self._figure = self._figure_type(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        self._canvas_type(self._figure)
        return self

    def __exit__(self, *_: object) -> None:
        self._settings.__exit__(None, None, None)

    def axes(self, *, left: int, right: int, bottom: int, top: int) -> Any:
        """Adds axes with these margins in pixels."""
        width, height = self._size
        return self._figure.add_axes(
            (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
        )

    def explain(self, artist: Any, text: str) -> None:
        """Adds a text that appears when the pointer rests on an artist."""
        artist.set_gid(f"explained-{len(self._explanations)}")
        self._explanations.append(text)

    def svg(self, description: str) -> Markup:
        """Writes the figure as SVG that a page can include unchanged: all text in it is escaped."""
        buffer = io.StringIO()
        self._figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
        width, height = self._size
        text = re.sub(
            r"<svg[^>]*>",
            f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}" '
            f'width="{width}" role="img" aria-label="{escape(description)}">',
            text,
            count=1,
        )
        for number, explanation in enumerate(self._explanations):
            text = text.replace(f'<g id="explained-{number}">', f"<g><title>{escape(explanation)}</title>")
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub(r"font: ((?:[\w.]+ )*)([\d.]+px)[^;\"]*", r"font-size: \2; font-weight: \1", text)
        text = re.sub(r"font-weight: (?=[;\"])", "font-weight: 400", text)
        text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, f"var(--{variable})")
        return Markup(text.strip() + "\n")


def label_right(axes: Any, labels: Sequence[tuple[float, str, str]], *, above: int = 12) -> None:
    """Labels lines, given as (height, text, color), to the right of the axes; moves overlapping labels apart.

    A text may have several lines. `above` are the pixels over and under the axes that a label may use.
    """
    low, high = axes.get_ylim()
    pixel = (high - low) / (axes.get_position().height * axes.figure.get_figheight() * _DPI)
    ordered = sorted(labels, key=lambda label: label[0])
    places = [value for value, _, _ in ordered]
    heights = [(16 + 14 * text.count("\n")) * pixel for _, text, _ in ordered]
    top, bottom = high + above * pixel, low - above * pixel
    for _ in range(200):
        moved = False
        places = [
            min(max(place, bottom + height / 2), top - height / 2)
            for place, height in zip(places, heights, strict=True)
        ]
        for i in range(len(places) - 1):
            gap = (heights[i] + heights[i + 1]) / 2
            short = gap - (places[i + 1] - places[i])
            if short > 1e-9 * gap:
                places[i], places[i + 1] = places[i] - short / 2, places[i + 1] + short / 2
                moved = True
        if not moved:
            break
    for place, (_, text, colour) in zip(places, ordered, strict=True):
        offset: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        weight = "normal" if colour == MUTED else "bold"
        axes.annotate(text, (1, place), xycoords=("axes fraction", "data"), color=colour, weight=weight, **offset)


def standalone(svg: str) -> str:
    """Turns an inline plot into a file: light colors by number, a font, a white ground.

    Programs that show or convert SVG files (for papers, slides) do not support CSS variables.
    """
    svg = str(svg)
    for name, colour in _light().items():
        svg = svg.replace(f"var(--{name})", colour)
    found = re.match(r'<svg xmlns:xlink="[^"]*" viewBox="0 0 (\d+) (\d+)" width="\d+"', svg)
    if found is None:
        raise ValueError(f"Got {svg[:80]!r}; expected the text that Canvas.svg gives.")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {found[0][5:]} height="{found[2]}" font-family="{_FONTS}"'
    end = svg.index(">", found.end()) + 1
    # A halo, as in page.css, so that a label is readable on a line.
    halo = f"paint-order:stroke;stroke:{_light()['paper']};stroke-width:4px;stroke-linejoin:round"
    ground = f'<style>text{{{halo}}}</style><rect width="{found[1]}" height="{found[2]}" fill="{_light()["paper"]}"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{svg[found.end() : end]}\n{ground}{svg[end:]}'


@functools.cache
def _light() -> Mapping[str, str]:
    """Reads the light colors of page.css."""
    style = (TEMPLATES / "page.css").read_text("utf-8")
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", style[: style.index("@media")]))
