"""Figures of the memorisation runs: records in, figures out."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fourfold_goldfish.claims import recital_law, recited
from fourfold_goldfish.recipes import ARMS, SEEDS, Arm
from fourfold_parallel.run.claims import Records
from fourfold_parallel.run.experiments import Drawing
from fourfold_parallel.run.figures import BASELINE, CONTROL, IDEAL, METHOD
from fourfold_parallel.run.recipe import Scale


def drawings(scale: Scale) -> Sequence[Drawing]:
    """The figures that a scale's records allow."""
    drawn = [
        Drawing(
            name="rouge-l",
            caption="How much of each passage comes back: ROUGE-L of greedy continuations of passages "
            f"seen repeatedly with plain loss and with goldfish loss (k=4), and of unseen ones; {scale} "
            "scale, 3 seeds pooled.",
            draw=rouge_l,
        ),
        Drawing(
            name="divergence",
            caption="Share of continuations that are still verbatim after n tokens; with goldfish loss "
            "they leave the passage as often as the law (1 - 1/4)^n says, one left-out token being "
            f"enough; {scale} scale, 3 seeds pooled.",
            draw=divergence,
        ),
        Drawing(
            name="loss",
            caption="Training loss on supervised targets, and under goldfish loss on the targets left "
            f"out, which stay unlearned however often they recur; {scale} scale, mean of 3 seeds.",
            draw=loss,
        ),
    ]
    if len(ARMS.get(scale, ())) > 2:
        drawn.append(
            Drawing(
                name="recall-by-k",
                caption="Share of passages recited verbatim by k, with 95 % intervals, and the law "
                f"(1 - 1/k)^24; {scale} scale, 3 seeds pooled.",
                draw=recall_by_k,
            )
        )
    return drawn


def _per_passage(records: Records, arm: Arm, bucket: str, key: str) -> np.ndarray:
    values = [
        event.number(key)
        for seed in SEEDS
        for event in records[f"{arm}-seed{seed}"].of("passage")
        if event.values["bucket"] == bucket
    ]
    return np.asarray(values)


def rouge_l(records: Records) -> Figure:
    """Histogram of ROUGE-L per passage for the two losses and the control."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    edges = np.linspace(0, 1, 21)
    series = (
        (
            "plain loss, trained passages",
            _per_passage(records, "plain", "trained", "rouge_l"),
            BASELINE,
        ),
        (
            "goldfish k=4, trained passages",
            _per_passage(records, "k4", "trained", "rouge_l"),
            METHOD,
        ),
        ("unseen passages", _per_passage(records, "k4", "control", "rouge_l"), CONTROL),
    )
    for name, values, color in series:
        axes.hist(
            values,
            bins=edges.tolist(),
            weights=np.full(len(values), 1 / len(values)),
            color=color,
            alpha=0.75,
            label=name,
        )
    axes.set_xlabel("ROUGE-L of the continuation")
    axes.set_ylabel("share of passages")
    axes.set_title("Goldfish: what comes back of a passage seen repeatedly")
    axes.legend()
    return figure


def divergence(records: Records) -> Figure:
    """Survival of verbatim continuations over position, against the law."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    series: tuple[tuple[str, Arm, str, str], ...] = (
        ("plain loss", "plain", "trained", BASELINE),
        ("goldfish k=4", "k4", "trained", METHOD),
        ("unseen passages", "k4", "control", CONTROL),
    )
    longest = 0
    for name, arm, bucket, color in series:
        matched = _per_passage(records, arm, bucket, "matched_tokens")
        longest = max(longest, int(matched.max()))
        positions = np.arange(longest + 1)
        verbatim = [(matched >= position).mean() for position in positions]
        axes.step(positions, verbatim, where="post", color=color, label=name)
    positions = np.arange(longest + 1)
    law = [recital_law(4, int(position)) for position in positions]
    axes.plot(positions, law, color=IDEAL, linestyle="--", linewidth=1.2, label="(1 - 1/4)$^n$")
    axes.set_xlabel("tokens of the continuation, n")
    axes.set_ylabel("share still verbatim")
    axes.set_title("Goldfish: continuations leave the passage at left-out tokens")
    axes.legend()
    return figure


def loss(records: Records) -> Figure:
    """Training loss over steps, supervised and left-out targets apart."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()

    def mean_over_seeds(arm: Arm, numerator: str, denominator: str | None) -> np.ndarray:
        curves = []
        for seed in SEEDS:
            events = records[f"{arm}-seed{seed}"].of("step")
            values = np.asarray([event.number(numerator) for event in events])
            if denominator is not None:
                values = values / [max(1.0, event.number(denominator)) for event in events]
            curves.append(values)
        return _smooth(np.mean(curves, axis=0))

    plain = mean_over_seeds("plain", "loss_nats", None)
    kept = mean_over_seeds("k4", "loss_nats", None)
    dropped = mean_over_seeds("k4", "dropped_nats_sum", "dropped_targets")
    axes.plot(plain, color=BASELINE, label="plain loss")
    axes.plot(kept, color=METHOD, label="goldfish k=4, supervised targets")
    axes.plot(dropped, color=METHOD, linestyle=":", label="goldfish k=4, left-out targets")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.set_title("Goldfish: what is left out is not learned")
    axes.legend()
    return figure


def recall_by_k(records: Records) -> Figure:
    """Share recited against k, with the law."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    arms: tuple[Arm, ...] = ("k2", "k4", "k8", "k32")
    ks = [int(arm[1:]) for arm in arms]
    shares = [recited(records, arm, "trained") for arm in arms]
    values = [share.value for share in shares]
    errors = [[s.value - s.low for s in shares], [s.high - s.value for s in shares]]
    axes.errorbar(ks, values, yerr=errors, fmt="o", color=METHOD, capsize=3, label="goldfish")
    grid = np.geomspace(2, 64, 60)
    axes.plot(
        grid, (1 - 1 / grid) ** 24, "--", color=IDEAL, linewidth=1.2, label="(1 - 1/k)$^{24}$"
    )
    plain = recited(records, "plain", "trained")
    axes.axhline(plain.value, color=BASELINE, label="plain loss")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("k (one target in k is left out)")
    axes.set_ylabel("share recited verbatim")
    axes.set_title("Goldfish: recital by k")
    axes.legend()
    return figure


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving average, shorter at the ends."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
