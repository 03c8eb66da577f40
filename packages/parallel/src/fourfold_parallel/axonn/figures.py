"""The figures of the reproduction."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fourfold_parallel.axonn.measures import points, ranking
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, IDEAL, METHOD, SHADES
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.storm.findings import figure as storm

MACHINES = ("perlmutter", "frontier", "alps")


def weak_scaling(records: Records) -> Figure:
    """The paper's rates and the simulated ones."""
    figure = Figure(figsize=(9.6, 3.4))
    for axes, machine in zip(figure.subplots(1, 3), MACHINES, strict=True):
        mine = [p for p in points(records) if p.values["machine"] == machine]
        devices = [p.number("devices") for p in mine]
        paper, ours = ([p.number(k) for p in mine] for k in ("paper_pflops_per_s", "pflops_per_s"))
        axes.plot(devices, paper, "o-", color=BASELINE, label="paper")
        axes.plot(devices, ours, "s--", color=METHOD, label="planner")
        axes.set(title=machine.capitalize(), xlabel="devices")
        _doubling(axes, devices)
    figure.axes[0].set_ylabel("Pflop/s, recomputation counted")
    return figure


def strong_scaling(records: Records) -> Figure:
    """Seconds of a step of one model on ever more devices."""
    figure = Figure(figsize=(5.2, 3.4))
    axes = figure.subplots()
    sizes = records["strong-scaling"].of("size")
    devices, seconds = [s.number("devices") for s in sizes], [s.number("step_s") for s in sizes]
    ideal = [seconds[0] * devices[0] / d for d in devices]
    axes.plot(devices, ideal, "--", color=IDEAL, label="ideal")
    axes.plot(devices, seconds, "s-", color=METHOD, label="planner")
    axes.set(xlabel="dies of Frontier", ylabel="seconds a step")
    _doubling(axes, devices)
    return figure


def _doubling(axes: Axes, devices: Sequence[float]) -> None:
    """Logarithmic axes with a tick at each number of devices, and the legend."""
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(devices, [f"{d:,.0f}" for d in devices], rotation=40, ha="right")
    axes.minorticks_off()
    axes.legend()


def rankings(records: Records) -> Figure:
    """The authors' seconds of communication against our seconds of a step, a dot a grid."""
    figure = Figure(figsize=(9.6, 3.4))
    cases = records["rankings"].of("ranked")
    for axes, case in zip(figure.subplots(1, len(cases)), cases, strict=True):
        theirs, ours = ranking(case, "theirs"), ranking(case, "ours")
        axes.scatter([theirs[grid] for grid in ours], list(ours.values()), s=18, color=SHADES[2])
        machine = str(case.values["machine"]).capitalize()
        axes.set(
            title=f"{case.values['model']} on {case.values['devices']} of {machine}",
            xlabel="authors' model: seconds of communication", ylabel="planner: seconds a step",
        )  # fmt: skip
    return figure


def drawings(scale: Scale) -> Sequence[Drawing]:
    """Every figure that a scale's records allow."""
    planned = (
        Drawing(
            name="figure-6",
            caption="Weak scaling: the paper's rates and the planner's, one fitted constant a machine.",
            draw=weak_scaling,
        ),
        Drawing(
            name="figure-8",
            caption="Strong scaling of GPT-80B on Frontier, simulated.",
            draw=strong_scaling,
        ),
        Drawing(
            name="figure-4",
            caption="The authors' communication model and the planner; a dot is a grid that fits.",
            draw=rankings,
        ),
    )
    if scale == "smoke":
        return planned
    killed = Drawing(
        name="storm",
        caption="A hundred kills of a rank of a little Llama on two gloo ranks: the steps that each cost, by "
        "what it came in. A checkpoint is written every 4 steps, while training goes on.",
        draw=storm,
    )
    return (*planned, killed)
