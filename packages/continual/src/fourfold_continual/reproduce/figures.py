"""Figures of the study: records in, figures out."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fourfold_continual.reproduce.measures import between, forgotten, loss_of
from fourfold_continual.reproduce.recipes import SEEDS, SMOKE_SEEDS, Arm
from fourfold_parallel.reproduce.claims import Interval, Records, over_seeds
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD, SHADES
from fourfold_parallel.reproduce.scale import Scale

ARMS: dict[Arm, tuple[str, str]] = {
    "only-old": ("old text only", CONTROL),
    "none": ("no replay", BASELINE),
    "r05": ("5 % replay", SHADES[1]),
    "r25": ("25 % replay", METHOD),
}
"""Label and colour."""
TEXTS = {"old": "Wikipedia (old)", "new": "CPython's library (new)"}


def drawings(scale: Scale) -> Sequence[Drawing]:
    """The figures that a scale's records allow."""
    seeds = f"{len(SMOKE_SEEDS if scale == 'smoke' else SEEDS)} seeds"
    drawn = [
        Drawing(
            name="forgetting",
            caption="Loss on held-out rows of the old and the new text, by the share of old text in the mix; "
            "step 0 is the model that is trained on. Going on with old text alone is what a new schedule "
            f"does by itself; {scale} scale, mean of {seeds}.",
            draw=forgetting,
        )
    ]
    if scale == "laptop":
        drawn += [
            Drawing(
                name="trade",
                caption="Forgotten of the old text against gained on the new, by replay: at equal tokens in "
                "all (filled) and, with as many more steps, at equal new tokens (open); 95 % intervals over "
                f"{len(SEEDS)} seeds; laptop scale.",
                draw=trade,
            ),
            Drawing(
                name="two-stage",
                caption="Loss less that of one stage of 300 steps at 25 % replay: two stages, half of whose "
                "new text is cleaner in the last 50 steps, and the same rates on the first stage's text, "
                f"which tells the rates from the text; 95 % intervals over {len(SEEDS)} seeds; laptop scale.",
                draw=two_stage,
            ),
            Drawing(
                name="rates",
                caption="Forgetting without replay, and what is gained meanwhile, by the peak that the rate "
                f"is warmed up to; each of {len(SEEDS)} seeds; laptop scale.",
                draw=rates,
            ),
        ]
    return drawn


def _size(records: Records) -> tuple[str, tuple[int, ...]]:
    if any(name.startswith("smoke-") for name in records):
        return "smoke", SMOKE_SEEDS
    return "small", SEEDS


def forgetting(records: Records) -> Figure:
    """Loss per text over the steps, by arm."""
    size, seeds = _size(records)
    figure = Figure(figsize=(8.4, 3.4))
    panels = figure.subplots(1, 2)
    for axes, (part, title) in zip(panels, TEXTS.items(), strict=True):
        for arm, (label, color) in ARMS.items():
            if f"{size}-{arm}-seed{seeds[0]}" not in records:
                continue
            curves = [_curve(records, size, arm, seed, part) for seed in seeds]
            steps = [step for step, _ in curves[0]]
            means = np.mean([[loss for _, loss in curve] for curve in curves], axis=0)
            axes.plot(steps, means, color=color, marker="o", markersize=3, label=label)
        axes.set_title(title)
        axes.set_xlabel("step of the continuation")
    panels[0].set_ylabel("loss on held-out rows (nats per token)")
    panels[1].legend()
    return figure


def _curve(records: Records, size: str, arm: Arm, seed: int, part: str) -> list[tuple[int, float]]:
    """Steps and losses, from the base's end on."""
    record = records[f"{size}-{arm}-seed{seed}"]
    key = f"validation_loss_nats_of_{part}"
    before = loss_of(records, size, "base", seed, part).loss_nats
    events = record.of("validation")
    return [(0, before), *((int(event.number("step")), event.number(key)) for event in events)]


def trade(records: Records) -> Figure:
    """Forgotten against gained."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    axes.set_title("What replay keeps and costs")
    axes.set_xlabel("forgotten of the old text (nats per token)")
    axes.set_ylabel("gained on the new text (nats per token)")
    points: list[tuple[Arm, str, str, str]] = [
        ("none", "no replay", BASELINE, BASELINE),
        ("r05", "5 %", SHADES[1], SHADES[1]),
        ("r25", "25 %", METHOD, METHOD),
        ("r05-longer", "5 %, equal new tokens", SHADES[1], "white"),
        ("r25-longer", "25 %, equal new tokens", METHOD, "white"),
        ("joint", "joint training", IDEAL, IDEAL),
    ]
    for arm, label, color, face in points:
        lost = over_seeds([forgotten(records, "small", arm, seed).nats for seed in SEEDS])
        won = over_seeds([-forgotten(records, "small", arm, seed, "new").nats for seed in SEEDS])
        axes.errorbar(
            [lost.value], [won.value], xerr=_reach(lost), yerr=_reach(won), fmt="o", color=color,
            markerfacecolor=face, label=label,
        )  # fmt: skip
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _reach(interval: Interval) -> list[list[float]]:
    return [[interval.value - interval.low], [interval.high - interval.value]]


def two_stage(records: Records) -> Figure:
    """Differences from one stage, by text."""
    figure = Figure(figsize=(6.4, 3.0))
    axes = figure.subplots()
    parts = {**TEXTS, "clean": "manual and docstrings (cleaner)"}
    arms: tuple[tuple[Arm, str, str], ...] = (
        ("two-stage", "cleaner text in the last 50 steps", METHOD),
        ("steady", "the rates alone", BASELINE),
    )
    for index, (arm, label, color) in enumerate(arms):
        for place, part in enumerate(parts):
            above = over_seeds(
                [between(records, "small", (arm, "r25"), seed, part).nats for seed in SEEDS]
            )
            axes.errorbar(
                [above.value], [place + 0.16 * index - 0.08], xerr=_reach(above), fmt="o", color=color,
                label=label if not place else None,
            )  # fmt: skip
    axes.axvline(0, color=IDEAL, linestyle="--", linewidth=1.2)
    axes.set_yticks(range(len(parts)), parts.values())
    axes.invert_yaxis()
    axes.set_title("Two stages against one")
    axes.set_xlabel("loss less that of one stage (nats per token)")
    axes.legend(loc="center left")
    return figure


def rates(records: Records) -> Figure:
    """Forgetting by peak."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    peaks: dict[Arm, float] = {"peak-3e-4": 3e-4, "peak-1e-3": 1e-3, "none": 3e-3}
    for part, sign, label, color in (
        ("old", 1, "forgotten of the old text", METHOD),
        ("new", -1, "gained on the new text", CONTROL),
    ):
        for seed in SEEDS:
            up = [sign * forgotten(records, "small", arm, seed, part).nats for arm in peaks]
            axes.plot(
                [*peaks.values()], up, color=color, marker="o", markersize=3, linewidth=0.9,
                label=label if seed == SEEDS[0] else None,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_title("By the rate that the continuation is warmed up to, without replay")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("nats per token")
    axes.legend()
    return figure
