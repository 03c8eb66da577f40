"""Rules that judge the claims: functions of records, fixed before the runs."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from fourfold_goldfish.membership import auc
from fourfold_goldfish.reproduce.recipes import ONE_PASS_SEEDS, REPETITIONS, SEEDS, SIZES, Arm
from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import (
    Finding,
    Interval,
    Records,
    Verdict,
    over_seeds,
    proportion,
)


def extraction(
    records: Records, series: str, bucket: str, repetitions: int | None = None
) -> Iterator[Event]:
    """The "extraction" event of a bucket for each seed; of any number of repetitions where None."""
    for seed in SEEDS:
        yield next(
            event
            for event in records[f"{series}-seed{seed}"].of("extraction")
            if event.values["bucket"] == bucket
            and repetitions in (None, event.values["repetitions"])
        )


def recited(records: Records, series: str, bucket: str, repetitions: int | None = None) -> Interval:
    """Share of passages recited verbatim, pooled over seeds."""
    events = [*extraction(records, series, bucket, repetitions)]
    exact = sum(int(event.number("exact")) for event in events)
    return proportion(exact, sum(int(e.number("passages")) for e in events), seeds=len(events))


def recites(plain: str) -> Callable[[Records], Finding]:
    """Plain loss memorises: the premise of all that follows."""

    def rule(records: Records) -> Finding:
        trained = recited(records, plain, "trained")
        control = recited(records, plain, "control")
        is_clear = trained.low > max(0.5, control.high)
        return Finding(
            verdict="reproduced" if is_clear else "inconclusive",
            ours=f"{trained} of trained passages, {control} of unseen ones",
            evidence=f"{plain}-seed0",
            line=next(extraction(records, plain, "trained")).line,
            because="the interval of the trained passages lies above one half and above the control's"
            if is_clear
            else "too little was memorised to prevent: the interval reaches one half or the control's",
        )

    return rule


def does_not(plain_series: str, series: str) -> Callable[[Records], Finding]:
    """Goldfish keeps recital at the level of unseen passages."""

    def rule(records: Records) -> Finding:
        plain = recited(records, plain_series, "trained")
        goldfish = recited(records, series, "trained")
        control = recited(records, series, "control")
        if plain.low <= max(0.5, control.high):
            verdict, because = "inconclusive", "plain loss memorised too little for a comparison"
        elif goldfish.value <= control.high:
            verdict, because = "reproduced", "goldfish lies inside the control's interval"
        else:
            verdict, because = "contradicted", "goldfish lies above the control's interval"
        return Finding(
            verdict=verdict,
            ours=f"{goldfish} with goldfish, {plain} with plain loss, {control} control",
            evidence=f"{series}-seed0",
            line=next(extraction(records, series, "trained")).line,
            because=because,
        )

    return rule


def rouge_at_control(records: Records) -> Finding:
    """Overlap with the true continuation, over seeds."""

    def scores(arm: Arm, bucket: str) -> Interval:
        return over_seeds([e.number("mean_rouge_l") for e in extraction(records, arm, bucket)])

    plain, goldfish = scores("plain", "trained"), scores("k4", "trained")
    control = scores("k4", "control")
    if plain.low <= control.high:
        verdict, because = "inconclusive", "plain loss is not above the control"
    elif goldfish.low <= control.high:
        verdict, because = "reproduced", "the intervals of goldfish and control overlap"
    else:
        verdict, because = "contradicted", "goldfish stays above the control's interval"
    return Finding(
        verdict=verdict,
        ours=f"{goldfish} with goldfish, {plain} with plain loss, {control} control",
        evidence="k4-seed0",
        line=next(extraction(records, "k4", "trained")).line,
        because=because,
    )


def diverges_on_dropped(records: Records) -> Finding:
    """Where continuations first go wrong."""
    events = [*extraction(records, "k4", "trained")]
    diverged = sum(int(event.number("diverged")) for event in events)
    if diverged == 0:
        return Finding(
            verdict="inconclusive",
            ours="no continuation diverged",
            evidence="k4-seed0",
            line=events[0].line,
            because="there is no divergence to look at",
        )
    on_dropped = sum(int(event.number("diverged_on_dropped")) for event in events)
    share = proportion(on_dropped, diverged, seeds=len(events))
    if share.low > 0.5:
        verdict, because = "reproduced", "the interval lies above one half"
    elif share.high < 0.5:
        verdict, because = "contradicted", "the interval lies below one half"
    else:
        verdict, because = "inconclusive", "the interval reaches across one half"
    return Finding(
        verdict=verdict,
        ours=f"{share} of {diverged} first divergences (chance: 0.25)",
        evidence="k4-seed0",
        line=events[0].line,
        because=because,
    )


def recital_law(k: int, suffix: int, guess: float = 0.0) -> float:
    """Chance that a passage whose kept targets are known by heart is recited all the same.

    Each of `suffix` tokens is left out with probability 1/k and then guessed with probability `guess`:
    (1 - (1 - guess)/k)^suffix. The paper gives no such law; it follows from its construction.
    """
    return (1 - (1 - guess) / k) ** suffix


_SWEPT: tuple[Arm, ...] = ("k2", "k4", "k8", "k32")


def recall_by_k(records: Records) -> Finding:
    """Recital by k against the law."""
    suffix = 24
    shares = {int(arm[1:]): recited(records, arm, "trained") for arm in _SWEPT}
    outside = [k for k, share in shares.items() if not _agrees(share, recital_law(k, suffix))]
    return Finding(
        verdict="contradicted" if outside else "reproduced",
        ours="; ".join(
            f"k={k}: {share} (law {recital_law(k, suffix):.2g})" for k, share in shares.items()
        ),
        evidence="k32-seed0",
        line=next(extraction(records, "k32", "trained")).line,
        because=f"outside the law's reach at k={outside}"
        if outside
        else "every k agrees with the law",
    )


def _agrees(share: Interval, law: float) -> bool:
    return share.low <= law <= share.high


def gaps_must_stay(records: Records) -> Finding:
    """Random gaps against hashed ones."""
    random, goldfish = recited(records, "random", "trained"), recited(records, "k4", "trained")
    is_above = random.low > goldfish.high
    return Finding(
        verdict="reproduced" if is_above else "contradicted",
        ours=f"{random} with random gaps, {goldfish} with goldfish's",
        evidence="random-seed0",
        line=next(extraction(records, "random", "trained")).line,
        because=f"the interval with random gaps {'lies above' if is_above else 'reaches'} goldfish's",
    )


def beams_fail(records: Records) -> Finding:
    """The adaptive attack."""
    events = [records[f"k4-seed{seed}"].last("beam") for seed in SEEDS]
    beam = proportion(
        sum(int(event.number("exact")) for event in events),
        sum(int(event.number("passages")) for event in events),
        seeds=len(events),
    )
    control = recited(records, "k4", "control")
    greedy = over_seeds([e.number("mean_rouge_l") for e in extraction(records, "k4", "trained")])
    searched = over_seeds([event.number("mean_rouge_l") for event in events])
    resists = beam.value <= control.high
    return Finding(
        verdict="reproduced" if resists else "contradicted",
        ours=f"{beam} recited by 30 beams, {control} control; "
        f"ROUGE-L {searched.value:.3g} against {greedy.value:.3g} greedily",
        evidence="k4-seed0",
        line=events[0].line,
        because=f"the share lies {'inside' if resists else 'above'} the control's interval",
    )


def passage_scores(records: Records, stage: str, bucket: str, score: str) -> np.ndarray:
    """A score of membership of every passage of a bucket, one seed."""
    events = records[stage].of("passage")
    return np.asarray([e.number(score) for e in events if e.values["bucket"] == bucket])


def membership_auc(records: Records, series: str, score: str) -> Interval:
    """Area under the ROC of a membership score, over seeds."""
    return over_seeds(
        [
            auc(
                passage_scores(records, f"{series}-seed{seed}", "trained", score),
                passage_scores(records, f"{series}-seed{seed}", "control", score),
            )
            for seed in SEEDS
        ]
    )


def membership_survives(records: Records) -> Finding:
    """What goldfish does not prevent."""
    plain, goldfish = (membership_auc(records, arm, "loss_score") for arm in ("plain", "k4"))
    verdict: Verdict
    if goldfish.low > 0.5:
        verdict, because = "reproduced", "goldfish's interval lies above chance"
    elif goldfish.high < 0.5:
        verdict, because = "contradicted", "goldfish's interval lies below chance"
    else:
        verdict, because = "inconclusive", "goldfish's interval holds chance"
    return Finding(
        verdict=verdict,
        ours=f"AUC {goldfish} with goldfish, {plain} with plain loss",
        evidence="k4-seed0",
        line=next(extraction(records, "k4", "trained")).line,
        because=because,
    )


def validation_loss(records: Records, series: str) -> list[float]:
    """Unmasked validation loss at the end of each seed's run."""
    return [
        records[f"{series}-seed{seed}"].last("validation").number("validation_loss_nats")
        for seed in ONE_PASS_SEEDS
    ]


def equal_at_equal_supervision(records: Records) -> Finding:
    """What leaving targets out costs."""
    full, half, goldfish = (
        validation_loss(records, series)
        for series in ("onepass-plain-16", "onepass-plain-8", "onepass-k2-16")
    )
    gap = over_seeds([a - b for a, b in zip(goldfish, half, strict=True)])
    cost = over_seeds([a - b for a, b in zip(goldfish, full, strict=True)])
    is_equal = gap.low <= 0 <= gap.high or abs(gap.value) <= 0.03
    return Finding(
        verdict="reproduced" if is_equal else "contradicted",
        ours=f"{gap} nats above plain loss on as many supervised tokens, {cost} on as many inputs",
        evidence="onepass-k2-16-seed3",
        line=records["onepass-k2-16-seed3"].last("validation").line,
        because="the gap's interval holds 0, or the gap is at most 0.03 nats"
        if is_equal
        else "the gap is above 0.03 nats and its interval does not hold 0",
    )


def passes_needed(records: Records, size: str) -> float:
    """Fewest repetitions at which half of a bucket is recited, pooled over seeds; inf if none."""
    for repetitions in sorted(REPETITIONS):
        bucket = "trained" if repetitions else "control"
        share = recited(records, f"buckets-{size}-plain", bucket, repetitions)
        if share.value >= 0.5:
            return repetitions
    return math.inf


def larger_need_fewer(records: Records) -> Finding:
    """Passes needed by size of model."""
    needed = {size: passes_needed(records, size) for size in SIZES}
    values = [*needed.values()]
    grows = any(later > earlier for earlier, later in itertools.pairwise(values))
    verdict: Verdict
    if grows:
        verdict, because = "contradicted", "a larger model needs more passes than a smaller one"
    elif values[-1] < values[0]:
        verdict, because = "reproduced", "passes never grow with size, and the largest needs fewer"
    else:
        verdict, because = "inconclusive", "all sizes need equally many"
    series = f"buckets-{SIZES[-1]}-plain"
    return Finding(
        verdict=verdict,
        ours="; ".join(
            f"width {size[1:]}: {'more than 64' if math.isinf(count) else count}"
            for size, count in needed.items()
        ),
        evidence=f"{series}-seed0",
        line=next(extraction(records, series, "trained", REPETITIONS[-1])).line,
        because=because,
    )


def study_goldfish(records: Records) -> Finding:
    """Every bucket under goldfish loss against the control."""
    plain, goldfish = (f"buckets-{SIZES[-1]}-{arm}" for arm in ("plain", "k2"))
    control = recited(records, goldfish, "control", 0)
    seen = [count for count in REPETITIONS if count]
    shares = {count: recited(records, goldfish, "trained", count) for count in seen}
    most = recited(records, plain, "trained", seen[-1])
    above = [count for count, share in shares.items() if share.value > control.high]
    verdict: Verdict
    if most.low <= control.high:
        verdict, because = "inconclusive", "plain loss memorised too little for a comparison"
    elif above:
        verdict, because = "contradicted", f"above the control's interval at {above} passes"
    else:
        verdict, because = "reproduced", "every bucket lies inside the control's interval"
    worst = max(shares.values(), key=lambda share: share.value)
    return Finding(
        verdict=verdict,
        ours=f"at most {worst} in any bucket, {control} control; plain loss {most} at {seen[-1]} passes",
        evidence=f"{goldfish}-seed0",
        line=next(extraction(records, goldfish, "trained", seen[-1])).line,
        because=because,
    )


def near_duplicates(records: Records) -> Finding:
    """What an altered copy teaches."""
    record = records["near-duplicates"]
    found = {
        str(event.values["mask"]): event
        for event in record.of("leak")
        if event.values["perturbation"] == "lines re-wrapped"
    }
    published, canonical = (found[name].number("leaked") for name in ("published", "canonical"))
    verdict: Verdict
    if published <= 0.5:
        verdict, because = "inconclusive", "the published mask leaks at most half of what it hides"
    elif canonical < 0.05:
        verdict, because = "reproduced", "hashing characters leaks less than 0.05"
    else:
        verdict, because = "contradicted", "hashing characters leaks 0.05 or more"
    return Finding(
        verdict=verdict,
        ours=f"{published:.3f} of the hidden tokens with the published hash, {canonical:.3f} with ours",
        evidence="near-duplicates",
        line=found["canonical"].line,
        because=because,
    )


def not_run(records: Records) -> Finding:
    """No scale here runs it; the launch lines do."""
    raise ValueError(f"this claim has no rule for the {len(records)} records of this scale")
