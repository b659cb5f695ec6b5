"""Pictures as SVG that follows the page: its font, its colours in light and dark, its width.

matplotlib draws with colours that stand for CSS variables and are replaced afterwards. Each server has a colour, a
marker and a line style of its own, so that no two need colour to be told apart.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID, BAND = "#010101", "#010102", "#010103"
_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", BAND: "var(--muted)"}
SERIES = 9
_MARKERS = "osD^vP*Xh"
_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (8, 3)),
    (0, (3, 1.5)), (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)), (0, (2, 3)), (0, (4, 1, 1, 1)),
)  # fmt: skip
_SIZE = 5.2, 3.3
_SETTINGS = {
    "svg.fonttype": "none", "font.size": 10.5, "font.family": "sans-serif", "text.color": INK,
    "axes.edgecolor": GRID, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "lines.linewidth": 1.8, "lines.markersize": 5.5, "figure.facecolor": "none",
    "axes.facecolor": "none", "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
    "ytick.minor.size": 0, "axes.labelpad": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How one server or user is drawn, everywhere."""

    number: int

    @property
    def colour(self) -> str:
        return f"#02{self.number % SERIES:02x}00"

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": _DASHES[self.number % SERIES]}

    @property
    def marked(self) -> dict[str, Any]:
        return self.line | {"marker": _MARKERS[self.number % SERIES]}


@dataclass
class Plot:
    """One picture, what it shows in words, its legend and its numbers."""

    key: str
    title: str
    alt: str
    svg: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)  # swatch as SVG, name
    columns: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str = ""


@contextmanager
def drawing(plot: Plot, *, x: str, y: str) -> Iterator["Axes"]:
    """Axes to draw on; the picture is in `plot.svg` afterwards."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": plot.key}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", fontsize=10.5, pad=8)  # upright, so that it can be read
        yield axes
        plot.svg = _svg(figure.savefig, plot)


def swatch(style: Style, key: str) -> str:
    """A piece of line for the legend of the plot `key`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(0.44, 0.18))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.plot([0.04, 0.5, 0.96], [0.5] * 3, markevery=[1], **style.marked)
        plot = Plot(f"{key}-legend-{style.number}", "", "")
        return _svg(figure.savefig, plot).replace('role="img"', 'aria-hidden="true"')


def _svg(save: Callable[..., None], plot: Plot) -> str:
    buffer = io.StringIO()
    save(buffer, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # Several pictures share a page: their ids must differ.
    for before in ('id="', 'href="#', "url(#"):
        text = text.replace(before, f"{before}{plot.key}-")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    for number in range(SERIES):
        text = text.replace(Style(number).colour, f"var(--s{number})")
    return text.replace("<svg ", '<svg role="img" ' + f'aria-label="{_escaped(plot.alt)}" ', 1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
