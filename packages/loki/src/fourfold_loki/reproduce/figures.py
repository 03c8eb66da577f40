"""Figures: pure functions from records to figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from fourfold_loki.evaluate.table import ORACLE
from fourfold_loki.reproduce.measures import (
    AFTER,
    BEFORE,
    FULL,
    added_percent,
    arms_of,
    diagnosed,
    losses,
    rank_events,
    tokens_scored,
)
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD
from fourfold_parallel.reproduce.scale import Scale


def figure_2(records: Records) -> Figure:
    """Rank at 90 % by layer, before and after the rotary embedding; a dot a head."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    width = 0.0
    for stage, color in ((BEFORE, CONTROL), (AFTER, METHOD)):
        means = []
        for layer, event in enumerate(rank_events(records["ranks"], stage)):
            ranks = np.asarray(event.numbers("rank"))
            width = event.number("head_width")
            axes.plot([layer] * len(ranks), ranks, ".", color=color, alpha=0.35, markersize=4)
            means.append(ranks.mean())
        axes.plot(means, color=color, label=f"{stage} (mean {np.mean(means):.1f})")
    axes.axhline(width, color=IDEAL, linestyle="--", linewidth=1.2, label="head width")
    axes.set_xlabel("layer")
    axes.set_ylabel("directions for 90 % of the variance")
    axes.set_ylim(bottom=0)
    axes.set_title("Loki: keys span few dimensions")
    axes.legend()
    return figure


def outliers(records: Records) -> Figure:
    """Distance of keys from a round cloud: the share of their mean, and their largest channel."""
    figure = Figure(figsize=(6.4, 3.2))
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("mean_share", "largest_channel"),
        ("the mean's share of power", "largest channel over mean"),
        strict=True,
    ):
        for stage, color in ((BEFORE, CONTROL), (AFTER, METHOD)):
            rows = [
                np.asarray(event.numbers(key)) for event in rank_events(records["ranks"], stage)
            ]
            axes.plot([row.mean() for row in rows], color=color, label=stage)
            for layer, row in enumerate(rows):
                axes.plot([layer] * len(row), row, ".", color=color, alpha=0.35, markersize=4)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_title("Loki: keys lie off centre")
    figure.axes[1].set_yscale("log")
    figure.axes[1].set_ylim(bottom=1)
    figure.axes[0].legend()
    return figure


def quality(records: Records) -> Figure:
    """Added perplexity of every arm, with its interval over windows."""
    parts = [records[name] for name in ("perplexity", "variants") if name in records]
    rows = [(arm, added_percent(record, arm)) for record in parts for arm in arms_of(record)]
    rows.sort(key=lambda row: row[1].value, reverse=True)
    figure = Figure(figsize=(6.4, 1.2 + 0.24 * len(rows)))
    axes = figure.subplots()
    for place, (arm, cost) in enumerate(rows):
        color = METHOD if arm.startswith("loki") else BASELINE
        axes.plot([cost.low, cost.high], [place, place], color=color)
        axes.plot(cost.value, place, "o", color=color, markersize=5)
    axes.set_yticks(range(len(rows)), [arm for arm, _ in rows])
    axes.axvline(0, color=IDEAL, linestyle="--", linewidth=1.2)
    axes.set_xscale("symlog", linthresh=2)
    axes.set_xlabel(
        f"added perplexity (%), log beyond ±2; {tokens_scored(parts[0])} tokens (variants: fewer)"
    )
    axes.set_title("Loki: what a quarter of the keys costs")
    return figure


def budgets(records: Records) -> Figure:
    """Added perplexity of every selector against the share of keys that it keeps, on the same windows."""
    many, quarter = records["budgets"], records["perplexity"]
    windows = len(losses(many, FULL))
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.subplots()
    names = arms_of(quarter)
    for place, name in enumerate(names):
        costs = []
        for divisor in (8, 4, 2):
            record, arm = (quarter, name) if divisor == 4 else (many, f"{name}:{divisor}")
            pairs = zip(losses(record, arm)[:windows], losses(record, FULL)[:windows], strict=True)
            nats = [mine - theirs for mine, theirs in pairs]
            costs.append(100 * np.expm1(np.mean(nats)))
        is_ours = name.startswith("loki")
        axes.plot(
            [1 / 8, 1 / 4, 1 / 2],
            costs,
            color=METHOD if is_ours else BASELINE,
            linestyle=("-", "--", ":", "-.")[place % 4],
            marker="os^vDPX"[place % 7],
            markersize=4,
            label=name,
        )
    axes.axhline(0, color=IDEAL, linestyle="--", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1 / 8, 1 / 4, 1 / 2], ["1/8", "1/4", "1/2"])
    axes.set_yscale("symlog", linthresh=2)
    axes.set_xlabel("keys kept, over the window")
    axes.set_ylabel("added perplexity (%), log beyond 2")
    axes.set_title("Loki: quality against budget")
    axes.legend(fontsize=7, ncols=2)
    return figure


def decoding(records: Records) -> Figure:
    """Bytes that a layer's attention reads for a token, and the time it takes, against the context."""
    events = records["decoding"].of("decoding")
    tokens = [e.number("tokens") for e in events]
    figure = Figure(figsize=(6.4, 3.2))
    left, right = figure.subplots(1, 2)
    left.plot(
        tokens, [e.number("dense_bytes") / 1e6 for e in events], color=BASELINE, label="dense"
    )
    left.plot(tokens, [e.number("loki_bytes") / 1e6 for e in events], color=METHOD, label="Loki")
    left.set_ylabel("megabytes read (model)")
    for name, color, line, label in (
        ("sdpa_ms", BASELINE, "-", "transformers' sdpa"),
        ("packed_sdpa_ms", CONTROL, "-", "sdpa, heads packed"),
        ("loki_ms", METHOD, "-", "Loki, pages of 16"),
    ):
        medians = [np.median(e.numbers(name)) for e in events]
        right.plot(tokens, medians, line, marker="o", markersize=4, color=color, label=label)
    right.set_ylabel("milliseconds (median)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{count / 1024:g}k" for count in tokens])
        axes.set_yscale("log")
        axes.set_xlabel("tokens of context")
        axes.legend(fontsize=7.5)
    left.set_title("Loki: bytes and time of a token")
    return figure


def recall_and_damage(records: Records) -> Figure:
    """Added perplexity against recall of keys, and against recall of attention mass."""
    figure = Figure(figsize=(6.4, 3.2))
    left, right = figure.subplots(1, 2, sharey=True)
    parts = [records[name] for name in ("perplexity", "variants") if name in records]
    doctor = records["diagnoses"]
    for record in parts:
        for arm in arms_of(record):
            if not diagnosed(doctor, arm, "recall"):
                continue
            cost = added_percent(record, arm).value
            color = METHOD if arm.startswith("loki") else BASELINE
            for axes, key in ((left, "recall"), (right, "mass_recall")):
                axes.plot(np.mean(diagnosed(doctor, arm, key)), cost, "o", color=color)
                if cost > 10:
                    axes.annotate(
                        arm,
                        (float(np.mean(diagnosed(doctor, arm, key))), cost),
                        xytext=(4, 4),
                        textcoords="offset points",
                        fontsize=7.5,
                    )
    left.set_yscale("symlog", linthresh=2)
    left.set_ylabel("added perplexity (%)")
    left.set_xlabel("share of the exact top-k keys")
    right.set_xlabel("share of the attention mass")
    left.set_title("Loki: recall and damage")
    return figure


def sinks(records: Records) -> Figure:
    """Share of the queries that keep the first token, by arm and layer, under its attention weight."""
    doctor = records["diagnoses"]
    arms = list(dict.fromkeys(str(e.values["arm"]) for e in doctor.of("diagnosis")))
    figure = Figure(figsize=(6.4, 1.6 + 0.22 * len(arms)))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(1.0, len(arms) / 5)])
    weight = diagnosed(doctor, arms[0], "sink_mass")
    top.bar(range(len(weight)), weight, color=BASELINE)
    top.set_ylabel("weight")
    top.set_title("Loki: who keeps the attention sink")
    kept = np.asarray([diagnosed(doctor, arm, "sink_kept") for arm in arms])
    image = bottom.imshow(kept, aspect="auto", vmin=0, vmax=1, cmap="magma")
    bottom.grid(visible=False)
    bottom.set_yticks(range(len(arms)), arms, fontsize=7.5)
    bottom.set_xlabel("layer")
    figure.colorbar(image, ax=bottom, label="share of queries")
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A method at one share of the bytes, over the windows of a length."""

    arm: str
    context: int
    bytes_read: float
    """Of the cache, for a decoded token."""
    divergence: float
    """From full attention, in nats a token."""


def bytes_and_divergence(readings: Sequence[Reading]) -> Figure:
    """Distance of predictions from full attention's against the bytes that were read for them."""
    contexts = sorted({reading.context for reading in readings})
    arms = list(dict.fromkeys(reading.arm for reading in readings))
    figure = Figure(figsize=(3.4 * len(contexts) + 1.6, 4.4))
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    for axes, context in zip(panels, contexts, strict=True):
        for place, arm in enumerate(arms):
            mine = [each for each in readings if (each.arm, each.context) == (arm, context)]
            color = METHOD if arm.startswith("loki") else BASELINE
            axes.plot(
                [each.bytes_read / 1e6 for each in mine],
                # A logarithm's axis has no zero.
                [max(each.divergence, 1e-5) for each in mine],
                color=IDEAL if arm == ORACLE else color,
                linestyle="--" if arm == ORACLE else ("-", ":", "-.")[place % 3],
                marker="os^vDPX*<>hpd8"[place % 14],
                markersize=4.5,
                label=arm,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        asked = [e.bytes_read / 1e6 for e in readings if (e.arm, e.context) == (ORACLE, context)]
        axes.set_xticks(asked, [f"{megabytes:.3g}" for megabytes in asked])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("megabytes read a token")
        axes.set_title(f"{context:,} tokens", fontsize=9)
    panels[0].set_ylabel("divergence from full attention (nats a token)")
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Loki: what the same bytes buy")
    return figure


def fair_table(records: Records) -> Figure:
    """The same for the stage's record."""
    record = records["fair-table"]
    readings = []
    for entry in record.of("entry"):
        arm, context, share = (entry.values[key] for key in ("arm", "context", "share"))
        events = record.of("fair", arm=arm, context=context, share=share)
        read = np.mean([event.number("read_share") for event in events])
        readings.append(
            Reading(
                arm=str(arm),
                context=int(entry.number("context")),
                bytes_read=float(read) * entry.number("dense_bytes"),
                divergence=float(np.mean([e.number("divergence_nats") for e in events])),
            )
        )
    return bytes_and_divergence(readings)


def drawings(scale: Scale) -> Sequence[Drawing]:
    """The figures of a scale."""
    where = f"SmolLM2-135M on Wikipedia, {3 if scale == 'smoke' else 64} windows of 512 tokens"
    always = (
        Drawing(
            name="figure-2",
            caption=f"Principal directions that hold 90 % of the keys' variance; {where}. One model, so no "
            "seeds; dots are key/value heads.",
            draw=figure_2,
        ),
        Drawing(
            name="figure-outliers",
            caption="What the keys' mean holds of their power, and the largest channel over the mean "
            f"channel; {where}. Dots are key/value heads.",
            draw=outliers,
        ),
        Drawing(
            name="figure-quality",
            caption=f"Perplexity added by each selector at the same number of keys; {where}. Bars: 95 % "
            "intervals over windows.",
            draw=quality,
        ),
        Drawing(
            name="figure-recall",
            caption=f"Added perplexity against recall of keys and of attention mass; {where}. One dot an "
            "arm.",
            draw=recall_and_damage,
        ),
        Drawing(
            name="figure-sinks",
            caption=f"Attention weight of the first token, and how often it is kept; {where}. Last 128 "
            "queries of one window.",
            draw=sinks,
        ),
    )
    if scale == "smoke":
        return always
    return (
        *always,
        Drawing(
            name="figure-budgets",
            caption="Perplexity added by each selector at an eighth to half of the keys; SmolLM2-135M on "
            "Wikipedia, the first 4 windows of 512 tokens (512 scored).",
            draw=budgets,
        ),
        Drawing(
            name="figure-decoding",
            caption="One token's attention in one layer, SmolLM2's heads, float32, one CPU: bytes by the "
            "traffic model, medians over rounds in turns.",
            draw=decoding,
        ),
        Drawing(
            name="figure-bytes",
            caption="Divergence of the last tokens' predictions from full attention's against the bytes "
            "of the cache that were read for them, in 16-bit numbers; SmolLM2-135M on Wikipedia, means over "
            "12, 8 and 3 windows. The oracle's ranking is not counted.",
            draw=fair_table,
        ),
    )
