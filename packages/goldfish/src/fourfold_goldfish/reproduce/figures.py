"""Figures of the memorisation runs: records in, figures out."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fourfold_goldfish.reproduce.causal import DOSES, Remedy, effect, utility
from fourfold_goldfish.reproduce.measures import (
    passage_scores,
    recital_law,
    recited,
    validation_loss,
)
from fourfold_goldfish.reproduce.recipes import ONE_PASS_SEEDS, REPETITIONS, SEEDS, SIZES, Arm
from fourfold_parallel.reproduce.claims import Interval, Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD, SHADES
from fourfold_parallel.reproduce.scale import Scale


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
        Drawing(
            name="membership",
            caption="Telling trained passages from unseen ones by their loss and by their least likely "
            "fifth of tokens (min-k), which is where goldfish leaves its gaps: goldfish weakens "
            f"membership inference at best, it does not prevent it; {scale} scale, 3 seeds pooled.",
            draw=membership,
        ),
    ]
    if scale == "laptop":
        drawn += [
            Drawing(
                name="recall-by-k",
                caption="Share of passages recited verbatim by k, with 95 % intervals, and the law "
                "(1 - 1/k)^24; laptop scale, 3 seeds pooled.",
                draw=recall_by_k,
            ),
            Drawing(
                name="recall-by-passes",
                caption="Share of passages recited verbatim by the number of passes over them, for five "
                "sizes of model with plain loss and the largest with goldfish loss (k=2), with 95 % "
                "intervals; laptop scale, 3 seeds pooled.",
                draw=recall_by_passes,
            ),
            Drawing(
                name="doses",
                caption="The effect of inserting a passage 12, 36 or 72 times: the loss on its last 16 "
                "tokens that it saves against a twin held out, by remedy; 95 % intervals over pairs; "
                "laptop scale, 3 seeds.",
                draw=doses,
            ),
            Drawing(
                name="remedies",
                caption="Risk beside utility: the effect of 72 copies against validation loss, at equal "
                "supervised targets; 95 % intervals over pairs and over seeds. Masks, truncation and "
                "de-duplication read more fresh text for as many targets, which validation rewards; laptop "
                "scale, 3 seeds.",
                draw=remedies,
            ),
            Drawing(
                name="supervision",
                caption="Validation loss (unmasked) after 96 steps against the targets supervised: plain "
                "loss on all and on half of the text, goldfish loss (k=2) on all of it; laptop scale, "
                "each of 3 seeds.",
                draw=supervision,
            ),
            Drawing(
                name="near-duplicates",
                caption="Of the tokens that a mask (k=4) hides in one copy of a text, the share that an "
                "altered copy teaches; hashing token ids as published against hashing canonical characters; "
                "the first 3,000 characters of 60 Wikipedia articles.",
                draw=near_duplicates,
            ),
            Drawing(
                name="pretrained",
                caption="SmolLM2-135M fine-tuned on 6 passages for 8 passes: share of continuations still "
                "verbatim after n tokens, with plain and with goldfish loss (k=4), and on passages it "
                "was not tuned on; 3 seeds pooled.",
                draw=pretrained,
            ),
        ]
    return drawn


def _axes(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return figure, axes


def _per_passage(records: Records, series: str, bucket: str, key: str) -> np.ndarray:
    return np.concatenate(
        [passage_scores(records, f"{series}-seed{seed}", bucket, key) for seed in SEEDS]
    )


def rouge_l(records: Records) -> Figure:
    """Histogram of ROUGE-L per passage for the two losses and the control."""
    figure, axes = _axes(
        "Goldfish: what comes back of a passage seen repeatedly",
        "ROUGE-L of the continuation",
        "share of passages",
    )
    edges = np.linspace(0, 1, 21)
    series = (
        ("plain loss, trained passages", "plain", "trained", BASELINE),
        ("goldfish k=4, trained passages", "k4", "trained", METHOD),
        ("unseen passages", "k4", "control", CONTROL),
    )
    for name, arm, bucket, color in series:
        values = _per_passage(records, arm, bucket, "rouge_l")
        axes.hist(
            values,
            bins=edges.tolist(),
            weights=np.full(len(values), 1 / len(values)),
            color=color,
            alpha=0.75,
            label=name,
        )
    axes.legend()
    return figure


def divergence(records: Records) -> Figure:
    """Survival of verbatim continuations over position, against the law."""
    figure, axes = _axes(
        "Goldfish: continuations leave the passage at left-out tokens",
        "tokens of the continuation, n",
        "share still verbatim",
    )
    longest = _draw_survival(axes, records, "plain", "k4")
    positions = np.arange(longest + 1)
    law = [recital_law(4, int(position)) for position in positions]
    axes.plot(positions, law, color=IDEAL, linestyle="--", linewidth=1.2, label="(1 - 1/4)$^n$")
    axes.legend()
    return figure


def pretrained(records: Records) -> Figure:
    """The same for the fine-tuned model, which guesses left-out tokens better."""
    figure, axes = _axes(
        "SmolLM2-135M, fine-tuned until it recites, or does not",
        "tokens of the continuation, n",
        "share still verbatim",
    )
    _draw_survival(axes, records, "smollm2-plain", "smollm2-k4")
    axes.legend()
    return figure


def _draw_survival(axes: Axes, records: Records, plain: str, goldfish: str) -> int:
    """Three curves; gives the longest verbatim continuation."""
    series = (
        ("plain loss", plain, "trained", BASELINE),
        ("goldfish k=4", goldfish, "trained", METHOD),
        ("unseen passages", goldfish, "control", CONTROL),
    )
    longest = 0
    for name, arm, bucket, color in series:
        matched = _per_passage(records, arm, bucket, "matched_tokens")
        longest = max(longest, int(matched.max()))
        positions = np.arange(longest + 1)
        verbatim = [(matched >= position).mean() for position in positions]
        axes.step(positions, verbatim, where="post", color=color, label=name)
    return longest


def loss(records: Records) -> Figure:
    """Training loss over steps, supervised and left-out targets apart."""
    figure, axes = _axes(
        "Goldfish: what is left out is not learned", "optimizer step", "loss (nats per token)"
    )

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
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def membership(records: Records) -> Figure:
    """ROC of two scores under two losses."""
    figure = Figure(figsize=(6.4, 3.2))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, score) in zip(
        panels, (("loss", "loss_score"), ("min-k", "min_k_score")), strict=True
    ):
        for label, arm, color in (
            ("plain loss", "plain", BASELINE),
            ("goldfish k=4", "k4", METHOD),
        ):
            members = _per_passage(records, arm, "trained", score)
            others = _per_passage(records, arm, "control", score)
            thresholds = np.sort(np.concatenate([members, others, [np.inf, -np.inf]]))[::-1]
            false = [(others >= threshold).mean() for threshold in thresholds]
            true = [(members >= threshold).mean() for threshold in thresholds]
            axes.plot(false, true, color=color, label=label)
        axes.plot([0, 1], [0, 1], "--", color=IDEAL, linewidth=1.2, label="chance")
        axes.set_xlabel("unseen passages taken for trained")
        axes.set_title(f"By {name}")
    panels[0].set_ylabel("trained passages found")
    panels[1].legend(loc="lower right")
    return figure


def near_duplicates(records: Records) -> Figure:
    """The leak table as bars."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    record = records["near-duplicates"]
    names = list(dict.fromkeys(str(e.values["perturbation"]) for e in record.of("leak")))
    places = np.arange(len(names))
    for offset, (mask, label, color) in enumerate(
        (
            ("published", "hash of ids, as published", BASELINE),
            ("canonical", "hash of characters", METHOD),
        )
    ):
        axes.barh(
            places + 0.4 * offset - 0.2,
            [record.only("leak", mask=mask, perturbation=n).number("leaked") for n in names],
            height=0.38,
            color=color,
            label=label,
        )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("share of hidden tokens that the copy teaches")
    axes.set_title("Goldfish: what near-duplicates give away")
    axes.legend()
    return figure


def recall_by_k(records: Records) -> Figure:
    """Share recited against k, with the law."""
    figure, axes = _axes(
        "Goldfish: recital by k", "k (one target in k is left out)", "share recited verbatim"
    )
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
    random = recited(records, "random", "trained")
    axes.axhline(recited(records, "plain", "trained").value, color=BASELINE, label="plain loss")
    axes.plot([4], [random.value], "x", color=CONTROL, label="random gaps, k=4")
    axes.set_xscale("log", base=2)
    axes.legend()
    return figure


def recall_by_passes(records: Records) -> Figure:
    """Share recited against passes, by size."""
    figure, axes = _axes(
        "Bucket study: larger models recite after fewer passes",
        "passes over the passage",
        "share recited verbatim",
    )
    series = [(f"width {size[1:]}", f"buckets-{size}-plain", "-") for size in SIZES]
    series.append((f"width {SIZES[-1][1:]}, goldfish k=2", f"buckets-{SIZES[-1]}-k2", ":"))
    shades = [*SHADES[2 : 2 + len(SIZES)], METHOD]
    for (label, name, line), color in zip(series, shades, strict=True):
        shares = [
            recited(records, name, "trained" if count else "control", count)
            for count in REPETITIONS
        ]
        values = [share.value for share in shares]
        axes.plot(REPETITIONS, values, line, marker="o", markersize=3.5, color=color, label=label)
        low, high = ([getattr(share, end) for share in shares] for end in ("low", "high"))
        axes.fill_between(REPETITIONS, low, high, color=color, alpha=0.12, linewidth=0)
    axes.legend()
    return figure


SHOWN: dict[Remedy, tuple[str, str]] = {
    "plain": ("plain loss", BASELINE),
    "ours": ("goldfish, our hash", METHOD),
    "published": ("goldfish, published hash", SHADES[1]),
    "spelled": ("goldfish, letters", SHADES[4]),
    "random": ("random gaps", CONTROL),
    "truncated": ("loss truncation", SHADES[3]),
    "sinks": ("memorisation sinks", SHADES[6]),
    "deduplicated": ("de-duplication", IDEAL),
}
"""Remedies at equal supervised targets: label and colour."""


def doses(records: Records) -> Figure:
    """Dose-response curves."""
    figure, axes = _axes(
        "What copies leave behind, by remedy",
        "copies of the passage",
        "nats a token less than its twin",
    )
    for index, (remedy, (label, color)) in enumerate(SHOWN.items()):
        shares = [effect(records, remedy, cell) for cell in DOSES]
        across = np.asarray([int(cell.split()[0]) for cell in DOSES]) + 0.5 * (index - 3.5)
        axes.errorbar(across, *_bars(shares), color=color, marker="o", markersize=3.5, label=label)
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def remedies(records: Records) -> Figure:
    """Effect of the largest dose against validation loss."""
    figure, axes = _axes(
        "Risk and utility of each remedy",
        "validation loss (nats per token)",
        "effect of 72 copies (nats a token)",
    )
    for remedy, (label, color) in SHOWN.items():
        across, up = utility(records, remedy), effect(records, remedy, DOSES[-1])
        axes.errorbar(
            [across.value],
            *_bars([up]),
            xerr=[[across.value - across.low], [across.high - across.value]],
            fmt="o",
            color=color,
            label=label,
        )
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _bars(shares: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach down and up."""
    reach = [[s.value - s.low for s in shares], [s.high - s.value for s in shares]]
    return [share.value for share in shares], reach


def supervision(records: Records) -> Figure:
    """Validation loss against supervised targets."""
    figure, axes = _axes(
        "Goldfish: validation loss by supervised targets",
        "supervised targets (thousands)",
        "validation loss (nats per token)",
    )
    for label, series, color in (
        ("plain loss, half of the text", "onepass-plain-8", BASELINE),
        ("plain loss, all of it", "onepass-plain-16", IDEAL),
        ("goldfish k=2, all of it", "onepass-k2-16", METHOD),
    ):
        supervised = [
            sum(e.number("supervised_targets") for e in records[f"{series}-seed{seed}"].of("step"))
            for seed in ONE_PASS_SEEDS
        ]
        losses = validation_loss(records, series)
        axes.plot(np.asarray(supervised) / 1000, losses, "o", color=color, label=label)
    axes.legend()
    return figure


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving average, shorter at the ends."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
