"""The report as a page: the finding, where the outliers are, what they carry, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from fourfold_outliers.report import Report
from fourfold_parallel.common.files import write_text
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD, SHADES, style, svg
from fourfold_parallel.reproduce.page import inline, render

TEMPLATE = Path(__file__).with_name("report.html.jinja")
HEAT = LinearSegmentedColormap.from_list("heat", ["#f5f6f8", "#f4c9a8", METHOD])


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    with style():
        drawn = {
            "strip": inline(svg(strip(report)), prefix="strip-"),
            "cosine": inline(svg(cosine(report)), prefix="cosine-"),
            "worth": inline(svg(worth(report)), prefix="worth-") if report.found else "",
        }
    write_text(path, render(TEMPLATE, report=report, drawn=drawn))


def heat(axes: Axes, shares: Mapping[str, Sequence[float]]) -> None:
    """Coordinates by layers: the share of tokens in which each is far from the others."""
    image = axes.imshow(
        np.asarray([*shares.values()]),
        aspect="auto",
        cmap=HEAT,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.set_yticks(range(len(shares)), list(shares))
    axes.grid(visible=False)
    axes.set_xlabel("layer (0: the embedding)")
    axes.set_ylabel("coordinate")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("share of tokens")
    bar.outline.set_visible(False)


def stack(
    axes: Axes,
    parts: Mapping[str, Sequence[float]],
    whole: Sequence[float],
    without: Sequence[float],
) -> None:
    """Contributions to the mean cosine, one upon the other; the whole, and what is left without them."""
    layers = np.arange(len(whole))
    below = np.zeros(len(whole))
    for place, (name, values) in enumerate(parts.items()):
        above = below + np.maximum(values, 0)
        color = SHADES[place % len(SHADES)]
        axes.fill_between(layers, below, above, color=color, alpha=0.75, linewidth=0, label=name)
        below = above
    axes.plot(layers, whole, color=IDEAL, label="all coordinates")
    axes.plot(layers, without, color=BASELINE, linestyle="--", label="without these")
    axes.set_xlabel("layer (0: the embedding)")
    axes.set_ylabel("mean cosine of two tokens")
    axes.set_ylim(bottom=0)
    axes.legend(ncols=2, fontsize=8)


def strip(report: Report) -> Figure:
    """Heat of every coordinate that is an outlier somewhere, those of most layers first."""
    rows = {
        name: [layer.shares[name] for layer in report.layers] for name in report.layers[0].shares
    }
    ordered = dict(sorted(rows.items(), key=lambda item: -sum(item[1]))[:16])
    figure = Figure(figsize=(8.2, 1.3 + 0.26 * max(1, len(ordered))))
    axes = figure.subplots()
    if ordered:
        heat(axes, ordered)
    else:
        axes.set_axis_off()
    return figure


def cosine(report: Report) -> Figure:
    """Anisotropy by layer."""
    figure = Figure(figsize=(8.2, 3.4))
    stack(
        figure.subplots(),
        {str(d): [layer.contributions[str(d)] for layer in report.layers] for d in report.found},
        [layer.cosine for layer in report.layers],
        [layer.without for layer in report.layers],
    )
    return figure


def worth(report: Report) -> Figure:
    """Loss rises: the outliers together and alone, and random sets."""
    rows = [
        *((", ".join(map(str, each.coordinates)), each.rise, METHOD) for each in report.effects),
        *(
            (f"random: {', '.join(map(str, each.coordinates))}", each.rise, CONTROL)
            for each in report.random
        ),
    ]
    figure = Figure(figsize=(8.2, 1.1 + 0.27 * len(rows)))
    axes = figure.subplots()
    for place, (_, rise, color) in enumerate(rows):
        axes.barh(place, rise.value, color=color, height=0.62)
        axes.plot([rise.low, rise.high], [place, place], color=IDEAL, linewidth=1.2)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("rise of the loss where they are disabled (nats a token, 95 %)")
    return figure
