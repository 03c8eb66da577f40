"""Figures of the study: records in, figures out."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fourfold_hpc_coder.reproduce.measures import losses, pooled
from fourfold_hpc_coder.reproduce.recipes import ARMS, SEEDS, Arm
from fourfold_hpc_coder.vocabulary import MODELS
from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import Records, over_seeds
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD, SHADES
from fourfold_parallel.reproduce.scale import Scale

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
    drawn = [
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
    if scale == "laptop":
        drawn += [
            Drawing(
                name="reference-speedup",
                caption="Speed-up and efficiency of the 34 problems' own answers over the best sequential "
                "program: each thin, their median thick; 2 cores, best of 3 calls.",
                draw=reference_speedup,
            ),
            Drawing(
                name="reference-pass",
                caption="pass@1 of the problems' own right answers by problem type and parallel model, with "
                "the number of problems: anything below 1 would be an error of the scorer.",
                draw=reference_pass,
            ),
        ]
    return drawn


def _color(arm: Arm) -> str:
    return METHOD if arm == "full" else BASELINE


def held_out_loss(records: Records, arms: Sequence[Arm]) -> Figure:
    """A point with its interval per arm."""
    figure = Figure(figsize=(6.4, 0.6 + 0.34 * len(arms) + 0.8))
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        loss = over_seeds(losses(records, arm))
        reach = [[loss.value - loss.low], [loss.high - loss.value]]
        axes.errorbar(loss.value, place, xerr=reach, fmt="o", color=_color(arm), capsize=3)
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
        intervals = [pooled(records, arm, key) for arm in arms]
        values = [interval.value for interval in intervals]
        reach = [
            [interval.value - interval.low for interval in intervals],
            [interval.high - interval.value for interval in intervals],
        ]
        axes.bar(
            places + (index - 1) * 0.26,
            values,
            0.24,
            yerr=reach,
            color=color,
            label=name,
            error_kw={"elinewidth": 1, "ecolor": "#4b5159"},
        )
    axes.set_xticks(places, [_NAMES[arm].replace(" ", "\n") for arm in arms], fontsize=8)
    axes.set_ylim(0, 1.25)  # room for the legend
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
        {kind for counter in counted.values() for kind in counter},
        key=lambda kind: (kind != "correct", kind),
    )
    places = np.arange(len(arms))
    bottom = np.zeros(len(arms))
    for kind, color in zip(kinds, SHADES, strict=False):
        values = np.asarray([counted[arm][kind] / counted[arm].total() for arm in arms])
        axes.bar(places, values, 0.6, bottom=bottom, color=color, label=kind)
        bottom += values
    axes.set_xticks(places, [_NAMES[arm].replace(" ", "\n") for arm in arms], fontsize=8)
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
    values = [loss.value for _, loss in points]
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


def _references(records: Records) -> list[Event]:
    return [*records["references"].of("reference")]


def reference_speedup(records: Records) -> Figure:
    """Two panels: speed-up and efficiency over processors, a thin line per problem, the median thick."""
    figure = Figure(figsize=(6.4, 3.2))
    left, right = figure.subplots(1, 2)
    most = 1
    for model, color in (("omp", METHOD), ("mpi", CONTROL)):
        curves, processors = [], np.zeros(0)
        for event in _references(records):
            if event.values["model"] == model and event.values["verdict"] == "correct":
                processors = np.asarray(event.values["processors"], dtype=float)
                runtimes_s = np.asarray(event.values["runtimes_s"], dtype=float)
                speedup = event.number("best_sequential_s") / runtimes_s
                curves.append(speedup)
                left.plot(processors, speedup, color=color, alpha=0.18, linewidth=0.8)
                right.plot(processors, speedup / processors, color=color, alpha=0.18, linewidth=0.8)
                most = max(most, int(processors.max()))
        if curves:
            middle = np.median(curves, axis=0)
            left.plot(processors, middle, "o-", color=color, label=model)
            right.plot(processors, middle / processors, "o-", color=color, label=model)
    left.plot([1, most], [1, most], "--", color=IDEAL, linewidth=1.2, label="ideal")
    right.plot([1, most], [1, 1], "--", color=IDEAL, linewidth=1.2)
    for axes, name in ((left, "speed-up"), (right, "efficiency")):
        axes.set_xticks(range(1, most + 1))
        axes.set_xlabel("processors")
        axes.set_ylabel(name)
        axes.set_ylim(0, 1.3 * (most if axes is left else 1))
    left.set_title("HPC-Coder: the references' own speed")
    left.legend()
    return figure


def reference_pass(records: Records) -> Figure:
    """A cell per problem type and model: share of right answers and the number of problems."""
    events = _references(records)
    types = sorted({str(event.values["problem_type"]) for event in events})
    models = [m for m in MODELS if any(event.values["model"] == m for event in events)]
    shares = np.full((len(models), len(types)), np.nan)
    figure = Figure(figsize=(6.4, 1.2 + 0.42 * len(models)))
    axes = figure.subplots()
    for row, model in enumerate(models):
        for column, kind in enumerate(types):
            verdicts = [
                event.values["verdict"]
                for event in events
                if (event.values["model"], event.values["problem_type"]) == (model, kind)
            ]
            if verdicts:
                shares[row, column] = verdicts.count("correct") / len(verdicts)
                text = f"{shares[row, column]:.2g}\n({len(verdicts)})"
                axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.imshow(shares, cmap="Oranges", vmin=0, vmax=2, aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(types)), types, rotation=35, ha="right")
    axes.set_yticks(range(len(models)), models)
    axes.set_title("HPC-Coder: pass@1 of the references (problems)")
    return figure
