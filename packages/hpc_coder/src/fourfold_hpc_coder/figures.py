"""Figures of the study: records in, figures out."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fourfold_hpc_coder.claims import losses, pooled
from fourfold_hpc_coder.recipes import ARMS, SEEDS, Arm
from fourfold_parallel.run.claims import Records, over_seeds
from fourfold_parallel.run.experiments import Drawing
from fourfold_parallel.run.figures import BASELINE, CONTROL, METHOD, SHADES
from fourfold_parallel.run.recipe import Scale

_NAMES: dict[Arm, str] = {
    "full": "all verified data",
    "quarter": "a quarter of it",
    "sixteenth": "a sixteenth",
    "masked": "prompts masked",
    "instructed": "from instruct",
    "spoiled": "half spoiled",
    "mixed": "half generic",
    "small": "small model",
}


def drawings(scale: Scale) -> Sequence[Drawing]:
    """The figures that a scale's records allow."""
    arms = ARMS.get(scale, ())
    return [
        Drawing(
            name="held-out-loss",
            caption="Loss per token of right answers to held-out tasks, for each arm of the study, with 95 % "
            f"intervals over 3 seeds; {scale} scale.",
            draw=lambda records: held_out_loss(records, arms),
        ),
        Drawing(
            name="answers",
            caption="What became of the answers to held-out tasks: compiled, right, right and parallel, with "
            f"Wilson's 95 % intervals over tasks and seeds pooled; {scale} scale.",
            draw=lambda records: answers(records, arms),
        ),
        Drawing(
            name="verdicts",
            caption=f"The scorer's verdicts on every answer, pooled over 3 seeds; {scale} scale.",
            draw=lambda records: verdicts(records, arms),
        ),
        Drawing(
            name="data-amount",
            caption="Held-out loss against the number of verified samples at an equal number of steps, mean "
            f"and 95 % interval over 3 seeds; {scale} scale.",
            draw=lambda records: data_amount(records, arms),
        ),
    ]


def _color(arm: Arm) -> str:
    return METHOD if arm == "full" else BASELINE


def held_out_loss(records: Records, arms: Sequence[Arm]) -> Figure:
    """A point with its interval per arm."""
    figure = Figure(figsize=(6.4, 0.6 + 0.34 * len(arms) + 0.8))
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        found = over_seeds(losses(records, arm))
        reach = [[found.value - found.low], [found.high - found.value]]
        axes.errorbar(found.value, place, xerr=reach, fmt="o", color=_color(arm), capsize=3)
    axes.set_yticks(range(len(arms)), [_NAMES[arm] for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_xlabel("loss of held-out answers (nats per token)")
    axes.set_title("HPC-Coder: what helps a small model")
    return figure


def answers(records: Records, arms: Sequence[Arm]) -> Figure:
    """Shares of held-out tasks by arm: built, right, counted."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    series = (
        ("built", "builds", CONTROL),
        ("right", "right", BASELINE),
        ("counted", "right and parallel", METHOD),
    )
    places = np.arange(len(arms))
    for index, (key, name, color) in enumerate(series):
        found = [pooled(records, arm, key) for arm in arms]
        values = [one.value for one in found]
        reach = [[one.value - one.low for one in found], [one.high - one.value for one in found]]
        axes.bar(
            places + (index - 1) * 0.26,
            values,
            0.24,
            yerr=reach,
            color=color,
            label=name,
            error_kw={"elinewidth": 1, "ecolor": "#4b5159"},
        )
    axes.set_xticks(places, [_NAMES[arm].replace(" ", "\n", 1) for arm in arms])
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of held-out tasks")
    axes.set_title("HPC-Coder: answers to held-out OpenMP tasks")
    axes.legend(loc="upper right", ncols=3)
    return figure


def verdicts(records: Records, arms: Sequence[Arm]) -> Figure:
    """Stacked shares of the scorer's verdicts by arm."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    counted = {
        arm: Counter(
            str(event.values["verdict"])
            for seed in SEEDS
            for event in records[f"{arm}-seed{seed}"].of("answer")
        )
        for arm in arms
    }
    kinds = sorted(
        {kind for found in counted.values() for kind in found},
        key=lambda one: (one != "correct", one),
    )
    places = np.arange(len(arms))
    bottom = np.zeros(len(arms))
    for kind, color in zip(kinds, SHADES, strict=False):
        values = np.asarray([counted[arm][kind] / counted[arm].total() for arm in arms])
        axes.bar(places, values, 0.6, bottom=bottom, color=color, label=kind)
        bottom += values
    axes.set_xticks(places, [_NAMES[arm].replace(" ", "\n", 1) for arm in arms])
    axes.set_ylabel("share of answers")
    axes.set_title("HPC-Coder: why answers fail")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def data_amount(records: Records, arms: Sequence[Arm]) -> Figure:
    """Loss over the number of samples, on a logarithmic axis."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    less: tuple[Arm, ...] = ("sixteenth", "quarter", "full")
    amounts: list[Arm] = [arm for arm in less if arm in arms]
    points = sorted((_samples(records, arm), over_seeds(losses(records, arm))) for arm in amounts)
    counts = [count for count, _ in points]
    values = [found.value for _, found in points]
    reach = [[f.value - f.low for _, f in points], [f.high - f.value for _, f in points]]
    axes.errorbar(counts, values, yerr=reach, fmt="o-", color=METHOD, capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("verified samples")
    axes.set_ylabel("loss of held-out answers (nats per token)")
    axes.set_title("HPC-Coder: more verified data, equal steps")
    return figure


def _samples(records: Records, arm: Arm) -> int:
    run = records[f"{arm}-seed0"].run
    parts = run.rows.parts  # pyright: ignore[reportAttributeAccessIssue]
    return sum(part.samples for part in parts)
