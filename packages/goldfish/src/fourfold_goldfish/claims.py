"""What the papers claim, and the rules, fixed before the runs, by which our records judge it."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from fourfold_goldfish.membership import auc
from fourfold_goldfish.recipes import REPETITIONS, SEEDS, SIZES, Arm
from fourfold_parallel.run.claims import (
    Claim,
    Finding,
    Interval,
    Records,
    Verdict,
    over_seeds,
    proportion,
)
from fourfold_parallel.run.records import Event

_MINIATURE = (
    "smoke: 0.5 M parameters, 16 Wikipedia passages of 65 tokens seen 40 times in one pass, prompt 49, "
    "16 to recite; laptop: 0.8 M parameters, 32 passages of 97 tokens seen 48 times, 24 to recite; "
    "ordered hash, exclusive window; 3 seeds"
)
_STUDY = (
    "five models of 0.1 to 1.1 M parameters, buckets of 8 Wikipedia passages of 65 tokens seen 0, 1, 4, 6, "
    "16, 24, 36 and 64 times in one pass, 16 tokens to recite; 3 seeds"
)
_FINETUNED = (
    "SmolLM2-135M (4-bit weights dequantized), its last 10 of 30 blocks trained for 8 passes over 6 "
    "Wikipedia passages of 65 tokens, 24 to recite; 3 seeds of 6 passages each"
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


def _recites(plain: str) -> Callable[[Records], Finding]:
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


def _does_not(plain_series: str, series: str) -> Callable[[Records], Finding]:
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


def _rouge_at_control(records: Records) -> Finding:
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


def _diverges_on_dropped(records: Records) -> Finding:
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


def _recall_by_k(records: Records) -> Finding:
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


def _gaps_must_stay(records: Records) -> Finding:
    random, goldfish = recited(records, "random", "trained"), recited(records, "k4", "trained")
    is_above = random.low > goldfish.high
    return Finding(
        verdict="reproduced" if is_above else "contradicted",
        ours=f"{random} with random gaps, {goldfish} with goldfish's",
        evidence="random-seed0",
        line=next(extraction(records, "random", "trained")).line,
        because=f"the interval with random gaps {'lies above' if is_above else 'reaches'} goldfish's",
    )


def _beams_fail(records: Records) -> Finding:
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


def _membership_survives(records: Records) -> Finding:
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
        for seed in SEEDS
    ]


def _equal_at_equal_supervision(records: Records) -> Finding:
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
        evidence="onepass-k2-16-seed0",
        line=records["onepass-k2-16-seed0"].last("validation").line,
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


def _larger_need_fewer(records: Records) -> Finding:
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


def _study_goldfish(records: Records) -> Finding:
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


def _not_run(records: Records) -> Finding:
    """No scale here runs it; the launch lines do."""
    raise ValueError(f"this claim has no rule for the {len(records)} records of this scale")


CLAIMS = (
    Claim(
        id="G1",
        section="4.1",
        statement="With plain loss, passages that recur are recited verbatim",
        paper_value="84 of 100 (Llama-2-7B, 100 documents, 100 epochs)",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % interval of the share recited lies above 0.5 and above the "
        "unseen passages' interval; otherwise inconclusive, since there is nothing to prevent",
        rule=_recites("plain"),
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G2",
        section="4.1",
        statement="With goldfish loss (k=4), none is",
        paper_value="0 of 100, same setting",
        conditions=_MINIATURE,
        rule_text="reproduced if G1 holds and the share recited lies inside the control's 95 % interval; "
        "contradicted if it lies above",
        rule=_does_not("plain", "k4"),
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G3",
        section="4.2",
        statement="With goldfish loss, overlap with the true continuation is near that of unseen text",
        paper_value="ROUGE-L near the control's for k=3, 4 (TinyLlama-1.1B, 20 B tokens, 50 repeats)",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % intervals over seeds of mean ROUGE-L overlap; contradicted if "
        "goldfish's lies above the control's",
        rule=_rouge_at_control,
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G4",
        section="4.4",
        statement="Continuations leave their passage at the targets that were left out",
        paper_value="most first divergences fall on dropped tokens",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % interval of the share lies above 0.5; contradicted if below",
        rule=_diverges_on_dropped,
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G5",
        section="4.2",
        statement="Recital falls from plain loss's level to the control's as k falls",
        paper_value="curves over k = 3 to 128; no law is given, ours is (1 - 1/k)^n",
        conditions="0.8 M parameters, 32 passages of 97 tokens seen 48 times, n = 24 to recite, 3 seeds",
        rule_text="reproduced if, for k = 2, 4, 8 and 32, (1 - 1/k)^24 lies inside the 95 % interval of "
        "the share recited; contradicted otherwise",
        rule=_recall_by_k,
        scales=("laptop",),
        needs="the laptop scale, which sweeps k",
    ),
    Claim(
        id="G6",
        section="3",
        statement="Gaps must be the same at each repetition: random ones are filled",
        paper_value="the reason for hashing; no number",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % interval of the share recited with random gaps (one in 4) lies "
        "above that with goldfish's (k=4); contradicted otherwise",
        rule=_gaps_must_stay,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="G7",
        section="6.2",
        statement="30 beams recite no passage either",
        paper_value="k = 3, 4 resist, larger k less (values not recoverable from the text we have)",
        conditions=_MINIATURE,
        rule_text="reproduced if the share recited by beam search (k=4) lies inside the control's 95 % "
        "interval; contradicted if above",
        rule=_beams_fail,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="G8",
        section="6.1",
        statement="Membership can still be inferred",
        paper_value="weakened, not prevented (loss and zlib criteria)",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % interval over seeds of the loss criterion's AUC (k=4) lies above "
        "0.5; contradicted if below",
        rule=_membership_survives,
        scales=("smoke", "laptop"),
        needs="a GPU for the paper's size",
    ),
    Claim(
        id="G9",
        section="5.2",
        statement="Validation loss is that of plain loss on as many supervised tokens",
        paper_value="curves coincide (TinyLlama-1.1B, 20 B tokens, k=4)",
        conditions="0.5 M parameters, 96 steps of 16 rows of 64 tokens without repetition, goldfish k=2 "
        "against plain loss with batches of 8; 3 seeds",
        rule_text="reproduced if the 95 % interval over seeds of the gap holds 0 or the mean gap is at most "
        "0.03 nats; contradicted otherwise",
        rule=_equal_at_equal_supervision,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="G10",
        section="5.1",
        statement="Benchmarks are not affected",
        paper_value="little to no impact on zero-shot suites (TinyLlama-1.1B)",
        conditions="none: a model of 1 M parameters is at chance on every one",
        rule_text="the difference's 95 % interval holds 0",
        rule=_not_run,
        scales=(),
        needs="a model that is above chance: about 1 B parameters and 20 B tokens, a node of GPUs",
    ),
    Claim(
        id="A1",
        section="AxoNN, memorisation",
        statement="Larger models memorise in fewer passes",
        paper_value="70 B and 405 B recite after few passes, 1 B to 13 B hardly after six",
        conditions=_STUDY,
        rule_text="passes needed is the fewest repetitions at which half of a bucket is recited, pooled over "
        "seeds; reproduced if it never grows with size and the largest model needs fewer than the "
        "smallest; contradicted if it grows; inconclusive if all are equal",
        rule=_larger_need_fewer,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="A2",
        section="AxoNN, memorisation",
        statement="With goldfish loss (k=2) every bucket stays at the control's level",
        paper_value="all buckets fall to the control's (405 B)",
        conditions=_STUDY,
        rule_text="reproduced if, in the largest model, the share of every trained bucket lies inside the "
        "control's 95 % interval while plain loss is above it at 64 passes; contradicted if one lies above",
        rule=_study_goldfish,
        scales=("laptop",),
        needs="the laptop scale",
    ),
    Claim(
        id="A3",
        section="AxoNN, memorisation",
        statement="The largest models memorise in a single pass",
        paper_value="405 B recites pages seen once",
        conditions="none: our models need tens of passes",
        rule_text="the share recited after one pass lies above the control's 95 % interval",
        rule=_not_run,
        scales=(),
        needs="a model of 70 B parameters or more, and a cluster",
    ),
    Claim(
        id="S1",
        section="4.1",
        statement="A pretrained model recites what it is fine-tuned on repeatedly",
        paper_value="84 of 100 (Llama-2-7B, 100 documents, 100 epochs)",
        conditions=_FINETUNED,
        rule_text="as G1",
        rule=_recites("smollm2-plain"),
        scales=("laptop",),
        needs="the laptop scale, which fine-tunes SmolLM2-135M",
    ),
    Claim(
        id="S2",
        section="4.1",
        statement="With goldfish loss (k=4) it does not",
        paper_value="0 of 100, same setting",
        conditions=_FINETUNED,
        rule_text="as G2",
        rule=_does_not("smollm2-plain", "smollm2-k4"),
        scales=("laptop",),
        needs="the laptop scale, which fine-tunes SmolLM2-135M",
    ),
)
