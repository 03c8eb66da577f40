"""One style sheet for all packages: one meaning per colour, units on axes, deterministic SVG."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter

from fourfold_parallel.common.files import write_text

BASELINE = "#7a7f87"
"""What the method is compared with."""
METHOD = "#c2410c"
"""The paper's method."""
CONTROL = "#1d6fa5"
"""What was never trained on, or never treated."""
IDEAL = "#1f2328"
"""A law or an ideal; drawn dashed."""
SHADES = ("#c2410c", "#e07b39", "#1d6fa5", "#5aa2cf", "#4d7c3a", "#93b77f", "#7a4fa3", "#b493cf")
"""Further series, where several variants of the method are shown."""

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#8b9199",
    "axes.grid": True,
    "axes.labelcolor": "#1f2328",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.size": 9.5,
    "grid.color": "#e5e7ea",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "fourfold",
    "xtick.color": "#4b5159",
    "ytick.color": "#4b5159",
}


@contextmanager
def style() -> Iterator[None]:
    """The house style, for the length of a block: make the figure inside it."""
    with mpl.rc_context(_STYLE):
        yield


def svg(figure: Figure) -> str:
    """The figure as SVG text, its tick labels apart; equal figures give equal text."""
    with mpl.rc_context(_STYLE):
        _thin_logarithmic(figure)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def save(figure: Figure, path: Path) -> None:
    """Write the figure as SVG, whole."""
    write_text(path, svg(figure))


def touching(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of level tick labels of one axis that overlap or nearly do."""
    figure.draw_without_rendering()
    return [
        (first.get_text(), second.get_text())
        for axis in _axes(figure)
        for first, second in combinations(_labels(axis), 2)
        if first.get_window_extent().padded(_GAP).overlaps(second.get_window_extent())
    ]


_GAP = 1.5
"""Pixels at 100 a inch that at least lie between two labels."""


def _axes(figure: Figure) -> list[Axis]:
    return [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]


def _labels(axis: Axis) -> list[Text]:
    """The labels that are seen: neither empty, nor turned, nor beyond the axis."""
    low, high = sorted(axis.get_view_interval())
    at = 0 if axis is axis.axes.xaxis else 1
    return [
        label
        for label in axis.get_ticklabels(which="both")
        if label.get_visible()
        and label.get_text()
        and not label.get_rotation()
        and low <= label.get_position()[at] <= high
    ]


def _thin_logarithmic(figure: Figure) -> None:
    """Label 1 and 3 of each decade alone, on logarithmic axes of a figure whose labels touch; or 1 alone."""
    logarithmic = [axis for axis in _axes(figure) if axis.get_scale() == "log"]
    for parts in ((1, 3), (1,)):
        if logarithmic and touching(figure):
            for axis in logarithmic:
                axis.set_minor_formatter(NullFormatter())
                axis.set_major_locator(LogLocator(subs=parts))
