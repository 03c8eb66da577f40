"""Figures of the automaton and language runs: records in, figures out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD, SHADES
from fourfold_parallel.reproduce.scale import Scale
from fourfold_recurrent_depth.reproduce.measures import (
    AUTOMATON,
    DEPTH_ARMS,
    DEPTH_TASKS,
    LANGUAGE,
    WORTH,
    accuracies,
)
from fourfold_recurrent_depth.reproduce.worth import (
    PUBLISHED,
    PUBLISHED_TRUNCATED,
    fit,
    interval,
    points_of,
    resampled_phi,
    with_truncated,
)


def drawings(scale: Scale) -> Sequence[Drawing]:
    """The figures that a scale's records allow."""
    cells = f"{scale} scale, cellular automaton"
    drawn = [
        Drawing(
            name="accuracy-by-recurrences",
            caption="Accuracy after r recurrences by difficulty k (steps of the automaton), mean and range "
            f"over seeds; dotted, the model trained with one recurrence; {cells}. The paper's figure 7.",
            draw=accuracy_by_recurrences,
        ),
        Drawing(
            name="exit-steps",
            caption="Recurrences after which tokens stop under KL < 5e-4, by difficulty, all seeds pooled; "
            f"{cells}. The paper's figure 10.",
            draw=exit_steps,
        ),
        Drawing(
            name="path-independence",
            caption="Largest relative distance between states that began at 5 different random states, as "
            f"quantiles over tokens, after 4, 16 and 64 recurrences; {cells}. The paper's figures 22 to 25.",
            draw=path_independence,
        ),
        Drawing(
            name="trajectories",
            caption="States of the last cell of some rows in their first two principal components, dark to "
            f"light from first to last of 32 recurrences, by difficulty; one seed, {cells}. The paper's "
            "figure 12.",
            draw=trajectories,
        ),
    ]
    if scale == "laptop":
        suite = "laptop scale, 48 models of bytes of Python, one seed"
        drawn += [
            Drawing(
                name="worth-of-a-recurrence",
                caption="Left, losses less the law's data term over the law's effective weights, by the "
                "recurrences trained with, dashed the law; right, its exponent phi with the middle 95 % over "
                "resamples of runs, with all gradients and with the last 2, beside the published values of "
                f"arXiv 2604.21106 (crosses); {suite}, 24 more for the truncated gradients.",
                draw=worth_of_a_recurrence,
            ),
            Drawing(
                name="other-depths",
                caption="Loss after r recurrences of models trained with 1, 2, 4 or 8 always (marked), "
                f"width 64 and 0.61 M tokens; {suite}.",
                draw=other_depths,
            ),
        ]
        drawn += [
            Drawing(
                name="cache-policies",
                caption="Loss (bytes of Python) and accuracy (automaton of 3 steps) of teacher-forced "
                "decoding, against the keys of all 16 recurrences, by bytes of cache a token: keys of 4 or 2 "
                "recurrences in turn, of the last, or one vector of 4 to 128 numbers for all of them; mean "
                "and range over seeds; laptop scale. Section 6.2.",
                draw=cache_policies,
            ),
            Drawing(
                name="more-depth",
                caption="Share of right answers (additions of 6 digits; automaton of 3 steps) and loss "
                "(bytes of Python) after r recurrences, of models trained at random depth, at one depth, "
                "and with the loss averaged over exits; mean and range over three seeds; laptop scale.",
                draw=more_depth,
            ),
        ]
    return drawn


def accuracy_by_recurrences(records: Records) -> Figure:
    """Accuracy over r, one colour per k."""
    record = records[AUTOMATON]
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    tables = [accuracies(record, "law", seed) for seed in record.seeds("accuracy", arm="law")]
    twins = [
        accuracies(record, "shallow", seed) for seed in record.seeds("accuracy", arm="shallow")
    ]
    depths = sorted({r for _, r in tables[0]})
    for k in sorted({k for k, _ in tables[0]}):
        values = np.asarray([[table[k, r] for r in depths] for table in tables])
        color = SHADES[(k - 1) % len(SHADES)]
        axes.plot(depths, values.mean(0), "o-", color=color, markersize=4, label=f"k={k}")
        axes.fill_between(
            depths, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0
        )
        shallow = np.mean([twin[k, 1] for twin in twins])
        axes.plot([1, depths[-1]], [shallow, shallow], ":", color=color, linewidth=1.0)
    axes.axhline(0.5, color=IDEAL, linestyle="--", linewidth=0.9, label="guessing")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("recurrences r at test time")
    axes.set_ylabel("share of cells predicted")
    axes.set_title("Recurrent depth: accuracy by recurrences and difficulty")
    axes.legend(ncols=2, loc="lower right")
    return figure


def exit_steps(records: Records) -> Figure:
    """Histogram of exit steps, one panel per k."""
    record = records[AUTOMATON]
    events = record.of("exit_steps", arm="law", criterion="kl")
    ks = sorted({int(event.number("k")) for event in events})
    figure = Figure(figsize=(6.4, 1.1 + 0.9 * len(ks)))
    for index, (axes, k) in enumerate(
        zip(np.ravel(figure.subplots(len(ks), 1, sharex=True)), ks, strict=True)
    ):
        counts = np.sum(
            [event.numbers("tokens_by_recurrences") for event in events if event.number("k") == k],
            axis=0,
        )
        axes.bar(np.arange(1, len(counts) + 1), counts / counts.sum(), color=METHOD, width=0.8)
        mean = float((np.arange(1, len(counts) + 1) * counts).sum() / counts.sum())
        axes.axvline(mean, color=IDEAL, linestyle="--", linewidth=1)
        axes.set_ylabel(f"k={k}")
        if index == 0:
            axes.set_title("Recurrent depth: share of tokens that stop after r recurrences")
    figure.supxlabel("recurrences (dashed: mean)", fontsize=9.5)
    return figure


def path_independence(records: Records) -> Figure:
    """Quantiles of the distance between paths."""
    record = records[AUTOMATON]
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    shares = np.linspace(0, 1, 11)
    for color, depth in zip((BASELINE, CONTROL, METHOD), (4, 16, 64), strict=True):
        deciles = np.mean(
            [
                event.numbers("distance_deciles")
                for event in record.of("path", arm="law", recurrences=depth)
            ],
            axis=0,
        )
        axes.plot(
            shares, np.maximum(deciles, 1e-7), "o-", color=color, markersize=4, label=f"r={depth}"
        )
    axes.axhline(0.02, color=IDEAL, linestyle="--", linewidth=1, label="2 %")
    axes.set_yscale("log")
    axes.set_xlabel("share of tokens")
    axes.set_ylabel("relative distance")
    axes.set_title("Recurrent depth: what is left of the beginning")
    axes.legend()
    return figure


def trajectories(records: Records) -> Figure:
    """Paths in the plane of the first two components."""
    record = records[AUTOMATON]
    seed = record.seeds("trajectory", arm="law")[0]
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    seen: set[int] = set()
    for event in record.of("trajectory", arm="law", seed=seed):
        k = int(event.number("k"))
        points = np.asarray(event.values["components"])
        color = SHADES[(k - 1) % len(SHADES)]
        axes.plot(*points.T, color=color, linewidth=0.7, alpha=0.6)
        sizes = np.linspace(4, 22, len(points))
        axes.scatter(
            *points.T,
            s=sizes,
            color=color,
            alpha=0.5,
            linewidths=0,
            label=None if k in seen else f"k={k}",
        )
        axes.scatter(*points[-1], s=36, facecolor="white", edgecolor=color, zorder=3)
        seen.add(k)
    axes.set_xlabel("first principal component of the states")
    axes.set_ylabel("second")
    axes.set_title("Recurrent depth: where states go (circles: after 32)")
    axes.legend()
    return figure


def cache_policies(records: Records) -> Figure:
    """Losses of every way to keep keys, over bytes a token, on bytes and on the automaton."""
    figure = Figure(figsize=(8.0, 3.3))
    panels = figure.subplots(1, 2)
    asked = (
        (LANGUAGE, "loss_nats", 1.0, "bytes of Python", "loss above a whole cache's (nats)"),
        (AUTOMATON, "accuracy", -100.0, "automaton, k=3", "points below a whole cache's"),
    )
    policies = {
        "latent": (METHOD, "one vector"),
        "shared": (CONTROL, "2 or 4 in turn"),
        "last": (BASELINE, "the last"),
        "own": (IDEAL, "all"),
    }
    for axes, (stage, field, unit, title, label) in zip(panels, asked, strict=True):
        record = records[stage]
        seeds = record.seeds("cache", arm="law")
        whole = [record.of("cache", seed=seed, policy="own")[0].number(field) for seed in seeds]
        for policy, (color, name) in policies.items():
            events = [record.of("cache", seed=seed, policy=policy) for seed in seeds]
            size = [event.number("bytes_per_token") for event in events[0]]
            lost = unit * np.asarray(
                [
                    [event.number(field) - of_whole for event in of_seed]
                    for of_seed, of_whole in zip(events, whole, strict=True)
                ]
            )
            middle = lost.mean(0)
            spread = [middle - lost.min(0), lost.max(0) - middle]
            line = "o-" if len(size) > 1 else "o"
            axes.errorbar(
                size, middle, spread, fmt=line, color=color, capsize=3, markersize=4, label=name
            )
        axes.axhline(0, color=IDEAL, linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bytes of cache a token")
        axes.set_ylabel(label)
        axes.set_title(title)
    panels[1].legend()
    return figure


def more_depth(records: Records) -> Figure:
    """Scores over recurrences, one panel for each task, one colour for each way to train."""
    figure = Figure(figsize=(8.4, 3.2))
    for axes, task in zip(figure.subplots(1, len(DEPTH_TASKS)), DEPTH_TASKS, strict=True):
        colors = (METHOD, BASELINE, CONTROL)
        for (arm, label), color in zip(DEPTH_ARMS.items(), colors, strict=True):
            seeds = task.scores(records, arm)
            depths = sorted(seeds[0])
            values = np.abs([[seed[r] for r in depths] for seed in seeds])
            axes.plot(depths, values.mean(0), "o-", color=color, markersize=3, label=label)
            axes.fill_between(
                depths, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0
            )
        axes.axvline(task.mean, color=IDEAL, linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(task.name)
        axes.set_ylabel("loss (nats a byte)" if task.name == "bytes of Python" else "share right")
    figure.axes[1].legend(loc="lower right")
    figure.supxlabel("recurrences at test time (dashed: in training, on average)", fontsize=9.5)
    return figure


def worth_of_a_recurrence(records: Records) -> Figure:
    """The collapse onto effective weights, and phi beside what it could be."""
    record = records[WORTH]
    figure = Figure(figsize=(7.6, 3.4))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    points = points_of(record, "looped")
    law = fit(points)
    data_nats = law.data_nats * np.exp(
        -law.beta * (np.log([point.tokens for point in points]) - law.middle[1])
    )
    weights = law.effective(points)
    rest = np.asarray([point.loss_nats for point in points]) - data_nats
    for color, loops in zip(SHADES[::2], sorted({point.loops for point in points}), strict=True):
        mine = [index for index, point in enumerate(points) if point.loops == loops]
        left.plot(weights[mine], rest[mine], "o", color=color, label=f"r = {loops}")
    line = np.geomspace(weights.min(), weights.max(), 50)
    told = law.floor_nats + law.size_nats * np.exp(-law.alpha * (np.log(line) - law.middle[0]))
    left.plot(line, told, "--", color=IDEAL, label="law")
    left.set_xscale("log")
    left.set_xlabel("N_once + r^phi N_rec (weights)")
    left.set_ylabel("loss less the data term (nats)")
    left.set_title("What a recurrence is worth")
    left.legend()
    arms = {
        "all gradients": (tuple(points), PUBLISHED),
        "last 2": (tuple(with_truncated(record)), PUBLISHED_TRUNCATED),
    }
    for place, (mine, published) in enumerate(arms.values()):
        low, high = interval(resampled_phi(mine))
        right.plot([place, place], [low, high], color=METHOD, linewidth=3)
        right.plot([place], [fit(mine).phi], "o", color=METHOD)
        right.plot([place + 0.15], [published], "x", color=BASELINE)
    for level in (0.0, 0.5, 1.0):
        right.axhline(level, color=IDEAL, linestyle="--", linewidth=1)
    right.set_xticks(range(len(arms)), list(arms))
    right.set_xlim(-0.5, len(arms) - 0.5)
    right.set_ylabel("phi")
    return figure


def other_depths(records: Records) -> Figure:
    """Loss over recurrences of the widest models that read the most tokens."""
    record = records[WORTH]
    trained = record.of("trained", arm="looped")
    width, tokens = (max(event.number(key) for event in trained) for key in ("width", "tokens"))
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    chosen = [e for e in trained if (e.number("width"), e.number("tokens")) == (width, tokens)]
    for color, event in zip(SHADES[::2], chosen, strict=True):
        own = int(event.number("loops"))
        read = sorted(
            record.of("held_out", run=event.values["run"]), key=lambda e: e.number("recurrences")
        )
        depths = [int(e.number("recurrences")) for e in read]
        losses = [e.number("loss_nats") for e in read]
        axes.plot(depths, losses, "-", color=color, label=f"trained with {own}")
        axes.plot([own], [losses[depths.index(own)]], "o", color=color)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("recurrences at test time")
    axes.set_ylabel("loss (nats a byte)")
    axes.set_title("Models trained at one depth, run at others")
    axes.legend()
    return figure
