"""One style sheet for all packages: one meaning per colour, units on axes, deterministic SVG."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

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
    """The figure as SVG text; equal figures give equal text."""
    with mpl.rc_context(_STYLE):
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def save(figure: Figure, path: Path) -> None:
    """Write the figure as SVG, whole."""
    write_text(path, svg(figure))
