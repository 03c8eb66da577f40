"""Figures: records in, figures out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fourfold_mlperf_hpc import charts
from fourfold_mlperf_hpc.decomposition import batch_law, expected
from fourfold_mlperf_hpc.reproduce.measures import (
    attempts_of,
    batches_of,
    numbers,
    share,
    systems,
    targets_of,
)
from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import CONTROL, IDEAL, METHOD, SHADES
from fourfold_parallel.reproduce.scale import Scale


def drawings(scale: Scale) -> Sequence[Drawing]:
    """The figures that a scale's records allow."""
    if scale == "paper":
        return ()
    ours = f"{scale} scale, {5 if scale == 'laptop' else 2} seeds"
    return [
        Drawing(
            name="factors",
            caption="Ratios of scores between public systems of v0.7, as products of three factors; each "
            "above 1 speaks for the second system. They multiply to the whole exactly.",
            draw=factors,
        ),
        Drawing(
            name="batches",
            caption="Left: epochs to the target by batch, a point a public CosmoFlow run. Right: samples to "
            "three targets by batch, mean and seeds of a small Llama, with "
            f"N = least (1 + B / critical); {ours}.",
            draw=batches,
        ),
        Drawing(
            name="staging",
            caption="Left: share of staging in the score of public systems. Right: ours, a store that is "
            f"slowed down and a device that is simulated, with s / (s + t / k) from the first; {scale} "
            "scale, one run each.",
            draw=staging,
        ),
        Drawing(
            name="roofline",
            caption="Left: steps under the roof of one rank; a line reaches from all operands of all "
            "operations (tick) to every tensor once (dot). Right: the least time that each resource allows, "
            f"and the measured step; {scale} scale.",
            draw=roofline,
        ),
    ]


def factors(records: Records) -> Figure:
    """A waterfall a pair of public systems."""
    panels = [
        (
            f"{event.values['a']} to {event.values['b']}"
            + (" (DeepCAM)" if event.values["benchmark"] == "deepcam" else ""),
            {name: event.number(name) for name in charts.GROUPS},
        )
        for event in records["published"].of("pair")
    ]
    return charts.factors_figure(panels, columns=2)


def batches(records: Records) -> Figure:
    """Two panels: public epochs, and samples of ours."""
    figure = Figure(figsize=(8.2, 3.4))
    left, right = figure.subplots(1, 2)
    _public_epochs(left, records)
    _our_samples(right, records)
    return figure


def _public_epochs(axes: Axes, records: Records) -> None:
    generator = np.random.default_rng(0)
    for division, colour in (("closed", METHOD), ("open", CONTROL)):
        events = systems(records, benchmark="cosmoflow", division=division)
        for index, event in enumerate(events):
            epochs = event.numbers("epochs_by_run")
            spread = np.exp(generator.uniform(-0.12, 0.12, len(epochs)))
            axes.plot(
                event.number("batch") * spread, epochs, "o", color=colour, markersize=3.2, alpha=0.6,
                label=f"CosmoFlow, {division}" if index == 0 else None,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch (samples)")
    axes.set_ylabel("epochs to the target")
    axes.set_title("Public runs of v0.7")
    axes.legend(loc="upper left")


def _our_samples(axes: Axes, records: Records) -> None:
    counts = batches_of(records)
    for index, target in enumerate(targets_of(records, f"batch{counts[0]}")):
        colour = SHADES[2 * index]
        means = []
        for batch in counts:
            attempts = attempts_of(records, f"batch{batch}", target)
            axes.plot(
                [batch] * len(attempts), [attempt.samples for attempt in attempts], "o", color=colour,
                markersize=3, alpha=0.5,
            )  # fmt: skip
            means.append(expected(attempts).samples)
        law = batch_law(np.asarray(counts, float), np.asarray(means))
        x = np.geomspace(counts[0], counts[-1], 60)
        axes.plot(x, [law.samples(batch) for batch in x], "--", color=IDEAL, linewidth=1)
        axes.plot(
            counts, means, "s", color=colour, markersize=5,
            label=f"{target:g} nats, critical batch {law.critical:.0f}",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch (rows)")
    axes.set_ylabel("samples to the target")
    axes.set_title("A small Llama")
    axes.legend(loc="upper left", fontsize=8)


def staging(records: Records) -> Figure:
    """Two panels: shares of public systems, and the law on a simulated device."""
    figure = Figure(figsize=(8.2, 3.0))
    left, right = figure.subplots(1, 2)
    events = [event for event in systems(records) if share(event) > 0.001]
    names = [
        f"{event.values['system']}{' (DeepCAM)' if event.values['benchmark'] == 'deepcam' else ''}"
        for event in events
    ]
    left.barh(names, [100 * share(event) for event in events], color=METHOD, height=0.62)
    left.invert_yaxis()
    left.set_xlabel("share of staging (%)")
    left.set_title("Public systems")
    speeds = sorted(records["staging"].of("speed"), key=lambda event: event.number("speedup"))
    first = numbers(speeds[0], "seconds")
    beside = sum(first.values()) - first["staging"]
    x = np.linspace(1, speeds[-1].number("speedup"), 50)
    law = first["staging"] / (first["staging"] + beside / x)
    right.plot(x, 100 * law, "--", color=IDEAL, label="s / (s + t / k)")
    right.plot(
        [event.number("speedup") for event in speeds], [100 * share(event) for event in speeds], "o",
        color=METHOD, label="measured",
    )  # fmt: skip
    right.set_xlabel("speed of the device")
    right.set_ylabel("share of staging (%)")
    right.set_ylim(bottom=0)
    right.set_title("Ours, simulated")
    right.legend(loc="lower right")
    return figure


def roofline(records: Records) -> Figure:
    """Two panels: the roof of arithmetic and memory, and all four resources beside the step."""
    figure = Figure(figsize=(8.8, 3.6))
    left, right = figure.subplots(1, 2)
    events = records["rooflines"].of("roofline")
    alone = [event for event in events if event.number("ranks") == 1]
    roofs = [numbers(event, "ceilings") for event in alone]
    charts.roofline(
        left,
        flops_per_s=max(roof["flops_per_s"] for roof in roofs),
        bytes_per_s=max(roof["memory_bytes_per_s"] for roof in roofs),
        points=[_point(event) for event in alone],
    )
    charts.bounds(
        right,
        [
            (_named(event), numbers(event, "bounds_s"), event.number("step_s"))
            for event in events
        ],
    )  # fmt: skip
    return figure


def _named(event: Event) -> str:
    name = str(event.values["run"]).replace("batch", "batch ").replace("width", "width ")
    return f"{name}, {event.number('ranks'):g} rank{'s' if event.number('ranks') > 1 else ''}"


def _point(event: Event) -> tuple[str, float, float, float]:
    work = numbers(event, "work")
    flops = work["flops"]
    return (
        _named(event),
        flops / work["most_bytes"],
        flops / work["least_bytes"],
        flops / event.number("step_s"),
    )
