"""Drawings of a plan: who owns which tile, what moves, when, and what fills the memory."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fourfold_parallel.common.axes import AXES, AxisName
from fourfold_parallel.plan.job import Layout
from fourfold_parallel.plan.machine import GIB
from fourfold_parallel.plan.search import Plan
from fourfold_parallel.plan.simulate import Span
from fourfold_parallel.planning.trace import LANES
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, METHOD, SHADES

AXIS_COLOURS: dict[AxisName, str] = {
    "data": SHADES[4], "depth": CONTROL, "row": SHADES[1], "col": SHADES[6],
}  # fmt: skip
DRAWN = 8
"""Parts drawn along an axis; more are told by a number."""


def grid(layout: Layout) -> Figure:
    """One weight matrix of a plain layer, cut over row, col and depth; its replicas over data."""
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    rows, columns, pieces = (min(DRAWN, layout.size(axis)) for axis in ("row", "col", "depth"))
    for row in range(rows):
        for column in range(columns):
            for piece in range(pieces):
                bottom, height = 1 - (row + (piece + 1) / pieces) / rows, 1 / rows / pieces
                shade = 0.25 + 0.6 * (piece + 1) / pieces
                axes.add_patch(
                    Rectangle(
                        (column / columns, bottom), 1 / columns, height,
                        facecolor=CONTROL if (row + column) % 2 else METHOD, alpha=shade * 0.5,
                        edgecolor="white", linewidth=0.8,
                    )
                )  # fmt: skip
            axes.text(
                (column + 0.5) / columns, 1 - (row + 0.5) / rows, f"row {row}\ncol {column}",
                ha="center", va="center", fontsize=9 if rows * columns <= 16 else 6,
            )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.set_xlabel(f"input features, over col ({_sized(layout.col, columns)})")
    axes.set_ylabel(f"output features, over row ({_sized(layout.row, rows)})")
    axes.set_title(
        f"A weight: each tile in {_sized(layout.depth, pieces)} of depth, {layout.data} replicas over data",
        fontsize=9.5,
    )
    return figure


def _sized(size: int, drawn: int) -> str:
    parts = f"{size} part{'s' if size > 1 else ''}"
    return parts if drawn == size else f"{parts}, {drawn} drawn"


def ranking(plans: Sequence[Plan]) -> Figure:
    """Seconds of the best grids, by what they go to."""
    figure = Figure(figsize=(9.6, 1.1 + 0.27 * len(plans)))
    axes = figure.subplots()
    names = [_short(plan.layout) for plan in plans]
    left = [0.0] * len(plans)
    parts = [("compute", BASELINE, [p.step.compute_s for p in plans])]
    parts += [
        (f"waits for {a}", AXIS_COLOURS[a], [p.step.exposed_s[a] for p in plans]) for a in AXES
    ]
    for label, colour, widths in parts:
        if max(widths) > 0.001 * plans[0].seconds:
            axes.barh(names, widths, left=left, color=colour, label=label, height=0.66)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step")
    figure.legend(loc="outside upper left", ncols=len(parts), fontsize=8)
    return figure


def _short(layout: Layout) -> str:
    sizes = "·".join(str(layout.size(axis)) for axis in AXES)
    return f"{sizes} m{layout.microbatch}{' ' * bool(layout.marks)}{layout.marks}"


def memory(plan: Plan, limit_bytes: float) -> Figure:
    """Contents of a rank's memory at its fullest."""
    figure = Figure(figsize=(6.4, 2.0))
    axes = figure.subplots()
    left = 0.0
    for (label, size), colour in zip(plan.memory.parts().items(), SHADES, strict=False):
        axes.barh([""], [size / GIB], left=left, color=colour, label=label, height=0.5)
        left += size / GIB
    axes.axvline(limit_bytes / GIB, color="#1f2328", linestyle="--")
    axes.set_xlabel("GiB of a rank; dashed: what the device leaves")
    figure.legend(loc="outside upper left", ncols=6, fontsize=8)
    return figure


def volume(plan: Plan) -> Figure:
    """Bytes that a rank sends in a step, by axis."""
    figure = Figure(figsize=(6.4, 1.9))
    axes = figure.subplots()
    used: list[AxisName] = [axis for axis in AXES if plan.step.moved_bytes[axis]]
    axes.barh(
        used, [plan.step.moved_bytes[axis] / GIB for axis in used],
        color=[AXIS_COLOURS[axis] for axis in used], height=0.6,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel("GiB that a rank sends in a step")
    return figure


def timeline(spans: Sequence[Span]) -> Figure:
    """The last microbatch, of at most a few decoder layers: a lane for computation and one an axis."""
    figure = Figure(figsize=(9.6, 2.8))
    axes = figure.subplots()
    lanes = [lane for lane in LANES if any(span.lane == lane for span in spans)]
    for index, lane in enumerate(lanes):
        _lane(axes, [span for span in spans if span.lane == lane], index)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    return figure


def _lane(axes: Axes, spans: Sequence[Span], index: int) -> None:
    kinds = {"input": METHOD, "weight": SHADES[1], "attention": SHADES[4]}
    for span in spans:
        colour = BASELINE
        if span.lane == "compute":
            colour = next((c for word, c in kinds.items() if word in span.name), BASELINE)
        else:
            colour = next(c for axis, c in AXIS_COLOURS.items() if axis == span.lane)
        width = 1e3 * (span.stop_s - span.start_s)
        axes.broken_barh(
            [(1e3 * span.start_s, width)], (index - 0.38, 0.76), color=colour, linewidth=0.3,
            edgecolor="white",
        )  # fmt: skip
