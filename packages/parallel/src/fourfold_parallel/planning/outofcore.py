"""A plan for training out of core, read back from a record and drawn."""

from __future__ import annotations

from matplotlib.figure import Figure

from fourfold_parallel.common.records import Event
from fourfold_parallel.common.values import from_json
from fourfold_parallel.plan.blocks import Stack
from fourfold_parallel.plan.machine import Channel
from fourfold_parallel.plan.simulate import Span
from fourfold_parallel.plan.timeline import Timeline, timeline
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, METHOD, SHADES

LANES = ("compute", "out", "in")
COLOURS = {"F": BASELINE, "B": SHADES[2], "R": METHOD, "h": CONTROL}


def told(plan: Event) -> Timeline:
    """The timeline of a record's event "plan", simulated again from what was measured then.

    Raises:
        ValueError: The event holds no measured blocks.
    """
    stack, channel = (from_json(plan.values.get(key)) for key in ("stack", "channel"))
    if not isinstance(stack, Stack) or not isinstance(channel, Channel):
        raise ValueError(f"line {plan.line} of {plan.file} holds no measured blocks")
    budget = float(str(plan.values["budget_bytes"]))
    return timeline(stack, channel, str(plan.values["decisions"]), budget, draws=True)


def schedule(plan: Event) -> Figure:
    """A microbatch: a lane for the computation and one for each way, and below what is resident."""
    drawn = told(plan)
    figure = Figure(figsize=(9.6, 3.8))
    lanes, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for index, lane in enumerate(LANES):
        for span in drawn.spans:
            if span.lane == lane:
                width = span.stop_s - span.start_s
                lanes.broken_barh(
                    [(span.start_s, width)], (index - 0.38, 0.76), color=_colour(span),
                    edgecolor="white", linewidth=0.5,
                )  # fmt: skip
                if width > drawn.seconds / 60:
                    lanes.text(
                        span.start_s + width / 2, index, span.name, ha="center", va="center", fontsize=7
                    )  # fmt: skip
    lanes.set_yticks(range(len(LANES)), LANES)
    lanes.invert_yaxis()
    lanes.set_title(
        f"{plan.values['decisions']}: computing {drawn.occupancy:.0%} of the time", fontsize=9.5
    )
    times, held = zip(*drawn.resident, strict=True)
    memory.step([0.0, *times], [0.0, *(value / 1e6 for value in held)], where="post", color=METHOD)
    budget = float(str(plan.values["budget_bytes"]))
    if budget < 2 * max(held):
        memory.axhline(budget / 1e6, color="#1f2328", linestyle="--")
    memory.set(xlabel="seconds", ylabel="MB resident")
    return figure


def _colour(span: Span) -> str:
    return COLOURS[span.name[0]] if span.lane == "compute" else SHADES[4]
