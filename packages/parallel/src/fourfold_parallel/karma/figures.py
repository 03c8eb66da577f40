"""The figures: a schedule as it was planned, and the strategies beside one another."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from fourfold_parallel.common.values import from_json
from fourfold_parallel.plan.blocks import Stack
from fourfold_parallel.plan.machine import Channel
from fourfold_parallel.plan.outofcore import Choice, choose
from fourfold_parallel.plan.simulate import Span
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, METHOD, SHADES
from fourfold_parallel.reproduce.scale import Scale

LANES = ("compute", "out", "in")
COLOURS = {"F": BASELINE, "B": SHADES[2], "R": METHOD, "h": CONTROL}


def schedule(choice: Choice) -> Figure:
    """A microbatch: a lane for the computation and one for each way, and below what is resident."""
    figure = Figure(figsize=(9.6, 3.8))
    lanes, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for index, lane in enumerate(LANES):
        for span in choice.timeline.spans:
            if span.lane == lane:
                width = span.stop_s - span.start_s
                lanes.broken_barh(
                    [(span.start_s, width)], (index - 0.38, 0.76), color=_colour(span),
                    edgecolor="white", linewidth=0.5,
                )  # fmt: skip
                if width > choice.timeline.seconds / 60:
                    lanes.text(
                        span.start_s + width / 2,
                        index,
                        span.name,
                        ha="center",
                        va="center",
                        fontsize=7,
                    )
    lanes.set_yticks(range(len(LANES)), LANES)
    lanes.invert_yaxis()
    lanes.set_title(
        f"{choice.decisions}: computing {choice.timeline.occupancy:.0%} of the time", fontsize=9.5
    )
    times, held = zip(*choice.timeline.resident, strict=True)
    memory.step([0.0, *times], [0.0, *(value / 1e6 for value in held)], where="post", color=METHOD)
    memory.axhline(choice.budget / 1e6, color="#1f2328", linestyle="--")
    memory.set(xlabel="seconds", ylabel="MB resident")
    return figure


def _colour(span: Span) -> str:
    return COLOURS[span.name[0]] if span.lane == "compute" else SHADES[4]


def chosen(records: Records) -> Figure:
    """The plan of the deepest model at the middle speed, drawn from its measured blocks."""
    case = max(
        records["hybrid"].of("case"),
        key=lambda c: (c.number("layers"), -abs(c.number("busy") - 1.2)),
    )
    values = case.values["stack"]
    assert isinstance(values, dict)
    stack, channel = from_json(values), from_json(case.values["channel"])
    assert isinstance(stack, Stack)
    assert isinstance(channel, Channel)
    return schedule(choose(stack, channel, case.number("budget_bytes")))


def strategies(records: Records) -> Figure:
    """Measured seconds of a microbatch over those with everything kept, by case."""
    figure = Figure(figsize=(9.6, 3.4))
    axes = figure.subplots()
    cases = records["hybrid"].of("case")
    strategies = (
        ("swap", BASELINE, "keep or swap"), ("recompute", CONTROL, "keep or recompute"),
        ("ours", METHOD, "any"),
    )  # fmt: skip
    for offset, (name, colour, label) in enumerate(strategies):
        heights = [statistics.median(c.numbers(f"{name}_s")) / c.number("plain_s") for c in cases]
        places = [i + 0.27 * (offset - 1) for i in range(len(cases))]
        axes.bar(places, heights, 0.25, color=colour, label=label)
    labels = [f"{c.values['layers']} layers\n{c.values['busy']}" for c in cases]
    axes.set_xticks(range(len(cases)), labels)
    axes.axhline(1, color="#1f2328", linestyle="--", linewidth=0.8)
    axes.set(
        xlabel="the store's time for everything over the computation's", ylabel="time over plain"
    )
    axes.legend(ncols=3)
    return figure


def drawings(scale: Scale) -> Sequence[Drawing]:
    """Every figure that a scale's records allow."""
    if scale == "smoke":
        return ()
    return (
        Drawing(
            name="karma-strategies",
            caption="Out of core with 40 % of the memory: seconds of a microbatch over those of plain "
            "training, "
            "for Llamas of width 192 on one thread, 7 interleaved rounds; the dashed line is plain.",
            draw=strategies,
        ),
        Drawing(
            name="karma-schedule",
            caption="A plan: computation (F, R, B: forward, again, backward), both ways of the store, and "
            "what is "
            "resident below the budget (dashed).",
            draw=chosen,
        ),
    )
