"""The figures: a schedule as it was planned, and the strategies beside one another."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from fourfold_parallel.planning.outofcore import schedule
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, METHOD
from fourfold_parallel.reproduce.scale import Scale


def chosen(records: Records) -> Figure:
    """The plan of the deepest model at the middle speed."""
    cases = records["hybrid"].of("case", busy=1.2)
    return schedule(max(cases, key=lambda case: case.number("layers")))


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
