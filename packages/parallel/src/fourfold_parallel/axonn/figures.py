"""The figures of the reproduction."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from fourfold_parallel.axonn.measures import events
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, IDEAL, METHOD, SHADES
from fourfold_parallel.reproduce.scale import Scale

MACHINES = ("perlmutter", "frontier", "alps")


def weak_scaling(records: Records) -> Figure:
    """The paper's rates and the simulated ones."""
    figure = Figure(figsize=(9.6, 3.4))
    for axes, machine in zip(figure.subplots(1, 3), MACHINES, strict=True):
        points = [
            p.values
            for p in events(records, "weak-scaling", "point")
            if p.values["machine"] == machine
        ]
        devices = [p["devices"] for p in points]
        axes.plot(
            devices, [p["paper_pflops_per_s"] for p in points], "o-", color=BASELINE, label="paper"
        )
        axes.plot(
            devices, [p["pflops_per_s"] for p in points], "s--", color=METHOD, label="planner"
        )
        axes.set(xscale="log", yscale="log", title=machine.capitalize(), xlabel="devices")
        axes.set_xticks(devices, [f"{d:,}" for d in devices], rotation=40, ha="right")
        axes.minorticks_off()
        axes.legend()
    figure.axes[0].set_ylabel("Pflop/s, recomputation counted")
    return figure


def strong_scaling(records: Records) -> Figure:
    """Seconds of a step of one model on ever more devices."""
    figure = Figure(figsize=(5.2, 3.4))
    axes = figure.subplots()
    sizes = [e.values for e in events(records, "strong-scaling", "size")]
    devices, seconds = [s["devices"] for s in sizes], [s["step_s"] for s in sizes]
    ideal = [seconds[0] * devices[0] / d for d in devices]
    axes.plot(devices, ideal, "--", color=IDEAL, label="ideal")
    axes.plot(devices, seconds, "s-", color=METHOD, label="planner")
    axes.set(xscale="log", yscale="log", xlabel="dies of Frontier", ylabel="seconds a step")
    axes.set_xticks(devices, [f"{d:,}" for d in devices], rotation=40, ha="right")
    axes.minorticks_off()
    axes.legend()
    return figure


def rankings(records: Records) -> Figure:
    """The authors' seconds of communication against our seconds of a step, a dot a grid."""
    figure = Figure(figsize=(9.6, 3.4))
    cases = [e.values for e in events(records, "rankings", "ranked")]
    for axes, case in zip(figure.subplots(1, len(cases)), cases, strict=True):
        theirs = {tuple(row[:4]): row[4] for row in case["theirs"]}
        grids = [tuple(row[:4]) for row in case["ours"]]
        axes.scatter(
            [theirs[g] for g in grids], [row[4] for row in case["ours"]], s=18, color=SHADES[2]
        )
        axes.set(
            title=f"{case['model']} on {case['devices']} of {case['machine'].capitalize()}",
            xlabel="authors' model: seconds of communication", ylabel="planner: seconds a step",
        )  # fmt: skip
    return figure


def drawings(scale: Scale) -> Sequence[Drawing]:
    """Every figure that a scale's records allow."""
    del scale
    return (
        Drawing(
            name="figure-6",
            caption="Weak scaling: the paper's measured rates and the planner's, one fitted constant a machine.",
            draw=weak_scaling,
        ),
        Drawing(
            name="figure-8",
            caption="Strong scaling of GPT-80B on Frontier, simulated.",
            draw=strong_scaling,
        ),
        Drawing(
            name="figure-4",
            caption="The authors' communication model and the planner on the same grids; a dot a grid that fits.",
            draw=rankings,
        ),
    )
