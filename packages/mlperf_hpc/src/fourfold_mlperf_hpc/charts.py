"""Charts for pages and records alike: a waterfall of factors, and a roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD, SHADES

GROUPS: Mapping[str, str] = {
    "convergence": CONTROL,
    "compute": METHOD,
    "overhead": BASELINE,
}
"""Colours of the three factors."""


def waterfall(axes: Axes, steps: Sequence[tuple[str, float, str]], *, title: str) -> None:
    """Factors as bars that begin where the one before ends, on a logarithmic axis; the last is the whole.

    Args:
        axes: to draw on.
        steps: name, factor and colour of each.
        title: above it.
    """
    at, furthest = 1.0, [1.0]
    for row, (_, factor, colour) in enumerate(steps):
        low, high = sorted((at, at * factor))
        axes.barh(row, high - low, left=low, color=colour, height=0.62)
        axes.text(
            high * 1.04, row, f"{factor:.2f}", va="center", ha="left", fontsize=8, clip_on=False
        )
        axes.plot([at * factor] * 2, [row - 0.31, row + 1.31], color=IDEAL, linewidth=0.7)
        at *= factor
        furthest.append(at)
    axes.barh(len(steps), abs(at - 1), left=min(at, 1.0), color=IDEAL, height=0.62)
    axes.text(
        max(at, 1.0) * 1.04, len(steps), f"{at:.2f}", va="center", fontsize=8, fontweight="bold"
    )
    axes.axvline(1, color=IDEAL, linewidth=0.8)
    axes.set_xscale("log")
    low, high = min(furthest) / 1.15, max(furthest) * 1.6
    axes.set_xlim(low, high)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(steps) + 1), [*(name for name, _, _ in steps), "whole"])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)


def roofline(
    axes: Axes,
    *,
    flops_per_s: float,
    bytes_per_s: float,
    points: Sequence[tuple[str, float, float, float]],
) -> None:
    """The roof of arithmetic and memory, and steps beneath it.

    Args:
        axes: to draw on.
        flops_per_s: the flat roof.
        bytes_per_s: the slope.
        points: name, FLOPs a byte at least (nothing fused) and at most (every tensor once), FLOP/s reached.
    """
    ridge = flops_per_s / bytes_per_s
    lows = [low for _, low, _, _ in points]
    highs = [high for _, _, high, _ in points]
    x = np.geomspace(min(*lows, ridge) / 3, max(*highs, ridge) * 3, 200)
    axes.plot(x, np.minimum(flops_per_s, x * bytes_per_s) / 1e9, "--", color=IDEAL, label="roof")
    for index, (name, low, high, reached) in enumerate(points):
        colour = SHADES[index % len(SHADES)]
        axes.plot([low, high], [reached / 1e9] * 2, color=colour, linewidth=1.4)
        axes.plot([high], [reached / 1e9], "o", color=colour, markersize=5, label=name)
        axes.plot([low], [reached / 1e9], "|", color=colour, markersize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte of memory")
    axes.set_ylabel("GFLOP/s of a rank")
    axes.legend(fontsize=7.5)


def bounds(axes: Axes, rows: Sequence[tuple[str, Mapping[str, float], float]]) -> None:
    """The least times that resources allow, beside the measured step.

    Args:
        axes: to draw on.
        rows: name, seconds by resource, and the step's seconds.
    """
    names = list(rows[0][1])
    height = 0.8 / (len(names) + 1)
    for row, (_, seconds, step_s) in enumerate(rows):
        for index, name in enumerate(names):
            y = row - 0.4 + (index + 0.5) * height
            axes.barh(
                y, seconds[name] * 1000, height=height * 0.9, color=SHADES[2 * index % len(SHADES)],
                label=name if row == 0 else None,
            )  # fmt: skip
        axes.barh(
            row + 0.4 - height / 2, step_s * 1000, height=height * 0.9, color=IDEAL,
            label="measured" if row == 0 else None,
        )  # fmt: skip
    smallest = min((s for _, bound, _ in rows for s in bound.values() if s > 0), default=1e-6)
    axes.set_xscale("log")
    axes.set_xlim(left=smallest * 1000 / 2)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step")
    axes.legend(
        fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=0.8,
        handlelength=1.2,
    )  # fmt: skip


def factors_figure(panels: Sequence[tuple[str, Mapping[str, float]]], *, columns: int) -> Figure:
    """Waterfalls of the three factors, a panel a pair."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 1.9 * rows))
    grid = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axes, (title, by_name) in zip(grid, panels, strict=False):
        waterfall(
            axes,
            [(name, by_name[name], colour) for name, colour in GROUPS.items()],
            title=title,
        )
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure
