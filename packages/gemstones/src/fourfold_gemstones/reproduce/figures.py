"""Figures: pure functions of records."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fourfold_gemstones.envelope import Hull, frontier
from fourfold_gemstones.published import NAMES
from fourfold_gemstones.reproduce.stages import LAWS, PUBLISHED, SUITE
from fourfold_gemstones.reproduce.suite.train import suite_table
from fourfold_gemstones.runs import Resource
from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD, SHADES


def _numbers(events: tuple[Event, ...], key: str) -> list[float]:
    return [event.number(key) for event in events]


def figure_refits(records: Records) -> Figure:
    """Distance of each published parametric fit above the global optimum of its objective."""
    events = sorted(
        records[PUBLISHED].of("refit"), key=lambda event: event.number("published_above_percent")
    )
    figure = Figure(figsize=(7.2, 7.6))
    axes = figure.add_subplot()
    for row, event in enumerate(events):
        above = max(event.number("published_above_percent"), 1e-5)
        late = event.number("delta") < 5e-4
        colour = METHOD if late else BASELINE
        axes.plot([1e-5, above], [row, row], color=colour, linewidth=0.8, alpha=0.5)
        axes.plot([above], [row], "o", color=colour, markersize=4.5)
    axes.axvline(0.03, color=IDEAL, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("published objective above the global optimum (%)")
    labels = []
    for event in events:
        terms = {2: "N,T", 3: "w,d,T", 4: "w,d,N,T"}[int(event.number("terms"))]
        less = "" if event.values["embeddings"] == "both" else ", one table"
        labels.append(f"{event.values['frame']}  ({terms}{less})")
    axes.set_yticks(range(len(events)), labels, fontsize=7)
    axes.set_ylim(-1, len(events))
    axes.plot([], [], "o", color=METHOD, label="Huber threshold 1e-4, the paper's default")
    axes.plot([], [], "o", color=BASELINE, label="Huber threshold 1e-3")
    axes.legend(loc="lower right")
    axes.set_title("Thirteen of 42 published fits are not at their optimum")
    return figure


def figure_slopes(records: Records) -> Figure:
    """The slope of compute-optimal size by selection of data, published and with intervals."""
    events = records[PUBLISHED].of("slope")
    apart = records[PUBLISHED].of("difference")
    figure = Figure(figsize=(8.4, 4.6))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for row, event in enumerate(events):
        left.plot(
            [event.number("row_low"), event.number("row_high")],
            [row - 0.18] * 2,
            color=BASELINE,
            linewidth=1.4,
        )
        left.plot(
            [event.number("model_low"), event.number("model_high")],
            [row] * 2,
            color=METHOD,
            linewidth=2.6,
        )
        left.plot([event.number("slope")], [row], "o", color=METHOD, markersize=6)
        left.plot([event.number("published_slope")], [row], "x", color=IDEAL, markersize=7)
    left.set_yticks(range(len(events)), [NAMES[str(event.values["frame"])] for event in events])
    left.invert_yaxis()
    left.set_xlabel("slope of log N* in log C")
    left.plot([], [], "x", color=IDEAL, linestyle="none", label="published")
    left.plot([], [], "o-", color=METHOD, label="optimum, 95 % over models")
    left.plot([], [], color=BASELINE, label="95 % over rows")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=7.5)
    left.set_title("Slopes by selection")
    for row, event in enumerate(apart):
        right.plot(
            [event.number("low"), event.number("high")], [row] * 2, color=METHOD, linewidth=2.6
        )
        right.plot([event.number("difference")], [row], "o", color=METHOD)
    right.axvline(0, color=IDEAL, linestyle="--", linewidth=1)
    names = [
        f"{NAMES[str(event.values['first'])]}\nless {NAMES[str(event.values['second'])]}"
        for event in apart
    ]
    right.set_yticks(range(len(apart)), names, fontsize=7.5)
    right.invert_yaxis()
    right.set_xlabel("paired difference of slopes")
    right.set_title("Paired differences")
    return figure


def figure_null(records: Records) -> Figure:
    """The hull's slope against the least tokens it sees, and what noise-free laws give there."""
    figure = Figure(figsize=(8.0, 3.9))
    for column, estimator in enumerate(("hull", "20 bins")):
        axes = figure.add_subplot(1, 2, column + 1)
        events = tuple(
            event
            for event in records[PUBLISHED].of("envelope")
            if event.values["estimator"] == estimator and event.values["selection"] != "T <= 100B"
        )
        floors = [max(floor, 2e9) / 1e9 for floor in _numbers(events, "token_floor")]
        axes.fill_between(
            floors,
            _numbers(events, "low"),
            _numbers(events, "high"),
            color=METHOD,
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(floors, _numbers(events, "slope"), "o-", color=METHOD, label="measured, 95 %")
        true = events[0].numbers("true_slopes")
        for number, slope in enumerate(true):
            axes.plot(
                floors,
                [event.numbers("null_slopes")[number] for event in events],
                linestyle="--",
                color=(BASELINE, CONTROL, IDEAL)[number],
                linewidth=1.3,
                label=f"noise-free, true slope {slope:.2f}",
            )
        axes.set_xscale("log")
        axes.set_xlabel("least tokens of the points seen (B)")
        axes.set_ylabel("slope of log N in log C")
        axes.set_title({"hull": "Convex hull", "20 bins": "Best of 20 bins"}[estimator])
        axes.set_ylim(0.25, 0.97)
        if column == 0:
            axes.legend(loc="upper left", fontsize=7.5)
    return figure


def figure_prescriptions(records: Records) -> Figure:
    """Optimal width over depth and tokens per parameter against compute, with bands."""
    figure = Figure(figsize=(8.0, 3.9))
    for column, (key, label) in enumerate(
        (("aspect", "width / depth"), ("tokens_per_parameter", "tokens per parameter"))
    ):
        axes = figure.add_subplot(1, 2, column + 1)
        for frame, colour in (("hot_100b+", METHOD), ("cool_end", CONTROL)):
            events = tuple(
                event
                for event in records[PUBLISHED].of("prescription")
                if event.values["frame"] == frame
            )
            budgets = _numbers(events, "budget_flops")
            axes.fill_between(
                budgets,
                _numbers(events, f"{key}_low"),
                _numbers(events, f"{key}_high"),
                color=colour,
                alpha=0.16,
                linewidth=0,
            )
            axes.plot(budgets, _numbers(events, key), "o-", color=colour, label=NAMES[frame])
            axes.plot(
                budgets,
                _numbers(events, f"published_{key}"),
                "x:",
                color=colour,
                linewidth=1,
                label=f"{NAMES[frame]}, published",
            )
        axes.axvspan(4.5e21, 1.6e22, color=BASELINE, alpha=0.12, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("training FLOPs (shaded: beyond the largest run)")
        axes.set_ylabel(label)
        if column == 0:
            axes.legend(fontsize=7.5)
    return figure


def figure_held_out(records: Records) -> Figure:
    """Mean error of five laws in sample and on seven kinds of held-out runs."""
    events = records[PUBLISHED].of("held_out")
    laws = list(dict.fromkeys(str(event.values["law"]) for event in events))
    splits = list(dict.fromkeys(str(event.values["split"]) for event in events))
    error = {
        (str(event.values["law"]), str(event.values["split"])): event.number("error_percent")
        for event in events
    }
    figure = Figure(figsize=(8.0, 3.8))
    axes = figure.add_subplot()
    for number, law in enumerate(laws):
        offset = 0.14 * (number - (len(laws) - 1) / 2)
        axes.plot(
            [error[law, split] for split in splits],
            np.arange(len(splits)) + offset,
            "o",
            color=SHADES[number if number < 4 else 6],
            label=law,
            markersize=5.5,
        )
    axes.set_yticks(range(len(splits)), splits, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("mean absolute error of log loss (%)")
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title("The best law in sample is not the best outside it")
    return figure


def figure_overspending(records: Records) -> Figure:
    """Overspending of each shape at 300 B tokens, in FLOPs and in device-hours."""
    events = records[PUBLISHED].of("overspending")
    aspect = [event.number("width") / event.number("depth") for event in events]
    figure = Figure(figsize=(7.6, 3.6))
    axes: Axes | None = None
    for column, (key, label) in enumerate(
        (("flops_percent", "FLOPs"), ("gpu_hours_percent", "device-hours"))
    ):
        axes = figure.add_subplot(1, 2, column + 1, sharey=axes)
        axes.plot(aspect, _numbers(events, key), "o", color=METHOD)
        for event, x in zip(events, aspect, strict=True):
            if event.number(key) > 40:
                name = f"{event.number('width'):.0f}x{event.number('depth'):.0f}"
                axes.annotate(
                    name,
                    (x, event.number(key)),
                    xytext=(5, -2),
                    textcoords="offset points",
                    fontsize=7.5,
                )
        axes.set_xscale("log")
        axes.set_xlabel("width / depth")
        axes.set_ylabel(f"{label} above the hull's (%)")
    return figure


def _shade(width: float, depth: float) -> tuple[float, float, float, float]:
    """From dark, as deep as wide, to light, 256 times as wide as deep."""
    return colormaps["viridis"](0.9 * float(np.clip(np.log(width / depth) / np.log(256), 0, 1)))


def figure_suite(records: Records) -> Figure:
    """Our own suite: loss against FLOPs and against seconds, both hulls, cooldowns, and seeds."""
    record = records[SUITE]
    table, cooled = suite_table(record), suite_table(record, schedule="cooled")
    names, index = table.groups("run")
    figure = Figure(figsize=(9.0, 4.2))
    axes: Axes | None = None
    kinds: tuple[tuple[Resource, str], ...] = (
        ("flops", "training FLOPs (lines from deep, dark, to wide, light)"),
        ("seconds", "seconds of one CPU thread"),
    )
    for column, (kind, label) in enumerate(kinds):
        axes = figure.add_subplot(1, 2, column + 1, sharey=axes)
        spent, loss = table.resource(kind), table.column("loss_nats")
        for run in range(len(names)):
            rows = np.flatnonzero(index == run)
            width, depth = (float(table.column(name)[rows[0]]) for name in ("width", "depth"))
            axes.plot(spent[rows], loss[rows], color=_shade(width, depth), linewidth=1.0)
        hull = frontier(spent, loss, Hull())
        axes.plot(
            spent[hull], loss[hull], "o--", color=IDEAL, markersize=3.5, linewidth=1, label="hull"
        )
        axes.plot(
            cooled.resource(kind),
            cooled.column("loss_nats"),
            "v",
            color=METHOD,
            markersize=4,
            label="after cooldown",
        )
        axes.set_xscale("log")
        axes.set_xlabel(label)
        if column == 0:
            axes.set_ylabel("validation loss (nats per byte)")
            axes.legend(loc="upper right")
    return figure


def figure_surface(records: Records) -> Figure:
    """The law in N and T fitted to our suite: curves of every shape, with bands, over its points."""
    table = suite_table(records[SUITE])
    figure = Figure(figsize=(9.0, 5.4))
    shapes = sorted(
        records[LAWS].of("curve"),
        key=lambda event: table.column("parameters")[table.run == event.values["run"]][0],
    )
    groups = np.array_split(np.arange(len(shapes)), 6)
    axes: Axes | None = None
    for number, group in enumerate(groups):
        axes = figure.add_subplot(2, 3, number + 1, sharex=axes, sharey=axes)
        for place, which in enumerate(group):
            event = shapes[which]
            rows = table.run == event.values["run"]
            colour = (METHOD, CONTROL, BASELINE)[place]
            tokens = event.numbers("tokens")
            low, high = event.numbers("low"), event.numbers("high")
            axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(tokens, event.numbers("loss_nats"), color=colour, linewidth=1.3)
            axes.plot(
                table.column("tokens")[rows],
                table.column("loss_nats")[rows],
                ".",
                color=colour,
                markersize=3.5,
                label=str(event.values["run"]).split("-")[0],
            )
        axes.set_xscale("log")
        axes.legend(fontsize=7.5)
        if number >= 3:
            axes.set_xlabel("tokens (bytes)")
        if number % 3 == 0:
            axes.set_ylabel("nats per byte")
    return figure


SLOW = ("figure-prescriptions", "figure-held-out")
"""Figures of parts that smoke leaves out."""
SUITE_DRAWINGS = (
    Drawing(
        name="figure-suite",
        caption="Our suite on bytes of the Python standard library at constant rates, against FLOPs and "
        "against seconds of one CPU thread at the speed measured for each shape; at the laptop scale 17 "
        "shapes of 16 thousand to 1.1 million parameters, three of them with three seeds.",
        draw=figure_suite,
    ),
)
LAWS_DRAWINGS = (
    Drawing(
        name="figure-surface",
        caption="The law in parameters and tokens fitted to our suite, with 95 % bands over its 17 runs; "
        "points are measured. From the smallest shapes (upper left) to the largest; one seed.",
        draw=figure_surface,
    ),
)
PUBLISHED_DRAWINGS = (
    Drawing(
        name="figure-refits",
        caption="Published approach-3 objectives against the global optimum of the same objective "
        "on the same rows; 42 fits, at least three descents agreeing on each. Values below 1e-5 % "
        "are drawn at 1e-5.",
        draw=figure_refits,
    ),
    Drawing(
        name="figure-slopes",
        caption="Slope of the compute-optimal size by selection of data: published, and at the "
        "optimum with bootstrap intervals over models and over rows (left); paired differences "
        "over the 20 shapes that all selections share (right).",
        draw=figure_slopes,
    ),
    Drawing(
        name="figure-null",
        caption="Slope of the envelope against the least tokens that it sees, with intervals over "
        "models, and the same estimator on noise-free losses of three laws over the same runs.",
        draw=figure_null,
    ),
    Drawing(
        name="figure-prescriptions",
        caption="Compute-optimal shapes of the width-depth law, with 95 % bands over models, on hot "
        "and on cooled checkpoints; dotted: from the published parameters.",
        draw=figure_prescriptions,
    ),
    Drawing(
        name="figure-held-out",
        caption="Mean error of five laws at a Huber threshold of 1e-3, in sample and on runs that "
        "were held out; 770 rows, 22 models.",
        draw=figure_held_out,
    ),
    Drawing(
        name="figure-overspending",
        caption="Resources at 300 B tokens over those at which the interpolated hull reaches the "
        "same loss; 22 models. Device-hours depend on the job layouts of the paper's machine.",
        draw=figure_overspending,
    ),
)
