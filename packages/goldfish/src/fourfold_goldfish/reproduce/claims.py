"""The claims of the papers, each above the rule that judges it; rules were fixed before the runs."""

import itertools
import math
from collections.abc import Callable

from fourfold_goldfish.reproduce.measures import (
    extractions,
    mean_rouge_l,
    membership_auc,
    passes_needed,
    pooled,
    recital_law,
    recited,
    validation_loss,
)
from fourfold_goldfish.reproduce.recipes import REPETITIONS, SEEDS, SIZES
from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import (
    Finding,
    Records,
    Verdict,
    beyond_us,
    claim,
    decide,
    over_seeds,
)

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


def _finding(verdict: Verdict, ours: str, event: Event, **because: str) -> Finding:
    """A finding whose reason is the sentence of its verdict."""
    return Finding(verdict, ours, event, because[verdict])


def _recites(plain: str) -> Callable[[Records], Finding]:
    """Plain loss memorises: the premise of all that follows."""

    def rule(records: Records) -> Finding:
        trained, control = (recited(records, plain, bucket) for bucket in ("trained", "control"))
        return _finding(
            decide(reproduced=trained.low > max(0.5, control.high), contradicted=False),
            f"{trained} of trained passages, {control} of unseen ones",
            extractions(records, plain, "trained")[0],
            reproduced="the interval of the trained passages lies above one half and above the control's",
            inconclusive="too little was memorised to prevent: "
            "the interval reaches one half or the control's",
        )

    return rule


def _does_not(plain_series: str, series: str) -> Callable[[Records], Finding]:
    """Goldfish keeps recital at the level of unseen passages."""

    def rule(records: Records) -> Finding:
        plain = recited(records, plain_series, "trained")
        goldfish, control = (recited(records, series, bucket) for bucket in ("trained", "control"))
        memorises = plain.low > max(0.5, control.high)
        is_inside = goldfish.value <= control.high
        return _finding(
            decide(reproduced=memorises and is_inside, contradicted=memorises and not is_inside),
            f"{goldfish} with goldfish, {plain} with plain loss, {control} control",
            extractions(records, series, "trained")[0],
            reproduced="goldfish lies inside the control's interval",
            contradicted="goldfish lies above the control's interval",
            inconclusive="plain loss memorised too little for a comparison",
        )

    return rule


G1 = claim(
    "G1",
    section="4.1",
    says="With plain loss, passages that recur are recited verbatim",
    paper="84 of 100 (Llama-2-7B, 100 documents, 100 epochs)",
    conditions=_MINIATURE,
    rule="reproduced if the 95 % interval of the share recited lies above 0.5 and above the "
    "unseen passages' interval; otherwise inconclusive, since there is nothing to prevent",
    scales=("smoke", "laptop"),
    needs="a GPU for the paper's size",
)(_recites("plain"))

G2 = claim(
    "G2",
    section="4.1",
    says="With goldfish loss (k=4), none is",
    paper="0 of 100, same setting",
    conditions=_MINIATURE,
    rule="reproduced if G1 holds and the share recited lies inside the control's 95 % interval; "
    "contradicted if it lies above",
    scales=("smoke", "laptop"),
    needs="a GPU for the paper's size",
)(_does_not("plain", "k4"))


@claim(
    "G3",
    section="4.2",
    says="With goldfish loss, overlap with the true continuation is near that of unseen text",
    paper="ROUGE-L near the control's for k=3, 4 (TinyLlama-1.1B, 20 B tokens, 50 repeats)",
    conditions=_MINIATURE,
    rule="reproduced if the 95 % intervals over seeds of mean ROUGE-L overlap; contradicted if "
    "goldfish's lies above the control's",
    scales=("smoke", "laptop"),
    needs="a GPU for the paper's size",
)
def rouge_at_control(records: Records) -> Finding:
    """Overlap with the true continuation, over seeds."""
    events = extractions(records, "k4", "trained")
    goldfish = mean_rouge_l(events)
    plain = mean_rouge_l(extractions(records, "plain", "trained"))
    control = mean_rouge_l(extractions(records, "k4", "control"))
    memorises, overlap = plain.low > control.high, goldfish.low <= control.high
    return _finding(
        decide(reproduced=memorises and overlap, contradicted=memorises and not overlap),
        f"{goldfish} with goldfish, {plain} with plain loss, {control} control",
        events[0],
        reproduced="the intervals of goldfish and control overlap",
        contradicted="goldfish stays above the control's interval",
        inconclusive="plain loss is not above the control",
    )


@claim(
    "G4",
    section="4.4",
    says="Continuations leave their passage at the targets that were left out",
    paper="most first divergences fall on dropped tokens",
    conditions=_MINIATURE,
    rule="reproduced if the 95 % interval of the share lies above 0.5; contradicted if below",
    scales=("smoke", "laptop"),
    needs="a GPU for the paper's size",
)
def diverges_on_dropped(records: Records) -> Finding:
    """Places of the first wrong tokens."""
    events = extractions(records, "k4", "trained")
    diverged = sum(int(event.number("diverged")) for event in events)
    if diverged == 0:
        nothing = "no continuation diverged", events[0], "there is no divergence to look at"
        return Finding("inconclusive", *nothing)
    share = pooled(events, "diverged_on_dropped", "diverged")
    return _finding(
        decide(reproduced=share.low > 0.5, contradicted=share.high < 0.5),
        f"{share} of {diverged} first divergences (chance: 0.25)",
        events[0],
        reproduced="the interval lies above one half",
        contradicted="the interval lies below one half",
        inconclusive="the interval reaches across one half",
    )


@claim(
    "G5",
    section="4.2",
    says="Recital falls from plain loss's level to the control's as k falls",
    paper="curves over k = 3 to 128; no law is given, ours is (1 - 1/k)^n",
    conditions="0.8 M parameters, 32 passages of 97 tokens seen 48 times, n = 24 to recite, 3 seeds",
    rule="reproduced if, for k = 2, 4, 8 and 32, (1 - 1/k)^24 lies inside the 95 % interval of "
    "the share recited; contradicted otherwise",
    scales=("laptop",),
    needs="the laptop scale, which sweeps k",
)
def recall_by_k(records: Records) -> Finding:
    """Recital by k against the law."""
    shares = {k: recited(records, f"k{k}", "trained") for k in (2, 4, 8, 32)}
    laws = {k: recital_law(k, 24) for k in shares}
    outside = [k for k, share in shares.items() if not share.low <= laws[k] <= share.high]
    return _finding(
        decide(reproduced=not outside, contradicted=bool(outside)),
        "; ".join(f"k={k}: {share} (law {laws[k]:.2g})" for k, share in shares.items()),
        extractions(records, "k32", "trained")[0],
        reproduced="every k agrees with the law",
        contradicted=f"outside the law's reach at k={outside}",
    )


@claim(
    "G6",
    section="3",
    says="Gaps must be the same at each repetition: random ones are filled",
    paper="the reason for hashing; no number",
    conditions=_MINIATURE,
    rule="reproduced if the 95 % interval of the share recited with random gaps (one in 4) lies "
    "above that with goldfish's (k=4); contradicted otherwise",
    scales=("laptop",),
    needs="the laptop scale",
)
def gaps_must_stay(records: Records) -> Finding:
    """Random gaps against hashed ones."""
    random, goldfish = (recited(records, arm, "trained") for arm in ("random", "k4"))
    is_above = random.low > goldfish.high
    return _finding(
        decide(reproduced=is_above, contradicted=not is_above),
        f"{random} with random gaps, {goldfish} with goldfish's",
        extractions(records, "random", "trained")[0],
        reproduced="the interval with random gaps lies above goldfish's",
        contradicted="the interval with random gaps reaches goldfish's",
    )


@claim(
    "G7",
    section="6.2",
    says="30 beams recite no passage either",
    paper="k = 3, 4 resist, larger k less (values not recoverable from the text we have)",
    conditions=_MINIATURE,
    rule="reproduced if the share recited by beam search (k=4) lies inside the control's 95 % "
    "interval; contradicted if above",
    scales=("laptop",),
    needs="the laptop scale",
)
def beams_fail(records: Records) -> Finding:
    """The adaptive attack."""
    events = [records[f"k4-seed{seed}"].last("beam") for seed in SEEDS]
    beam = pooled(events, "exact", "passages")
    control = recited(records, "k4", "control")
    searched = mean_rouge_l(events)
    greedy = mean_rouge_l(extractions(records, "k4", "trained"))
    resists = beam.value <= control.high
    return _finding(
        decide(reproduced=resists, contradicted=not resists),
        f"{beam} recited by 30 beams, {control} control; "
        f"ROUGE-L {searched.value:.3g} against {greedy.value:.3g} greedily",
        events[0],
        reproduced="the share lies inside the control's interval",
        contradicted="the share lies above the control's interval",
    )


@claim(
    "G8",
    section="6.1",
    says="Membership can still be inferred",
    paper="weakened, not prevented (loss and zlib criteria)",
    conditions=_MINIATURE,
    rule="reproduced if the 95 % interval over seeds of the loss criterion's AUC (k=4) lies above "
    "0.5; contradicted if below",
    scales=("smoke", "laptop"),
    needs="a GPU for the paper's size",
)
def membership_survives(records: Records) -> Finding:
    """The attack that goldfish does not prevent."""
    plain, goldfish = (membership_auc(records, arm, "loss_score") for arm in ("plain", "k4"))
    return _finding(
        decide(reproduced=goldfish.low > 0.5, contradicted=goldfish.high < 0.5),
        f"AUC {goldfish} with goldfish, {plain} with plain loss",
        extractions(records, "k4", "trained")[0],
        reproduced="goldfish's interval lies above chance",
        contradicted="goldfish's interval lies below chance",
        inconclusive="goldfish's interval holds chance",
    )


@claim(
    "G9",
    section="5.2",
    says="Validation loss is that of plain loss on as many supervised tokens",
    paper="curves coincide (TinyLlama-1.1B, 20 B tokens, k=4)",
    conditions="0.5 M parameters, 96 steps of 16 rows of 64 tokens without repetition, goldfish k=2 "
    "against plain loss with batches of 8; 3 seeds",
    rule="reproduced if the 95 % interval over seeds of the gap holds 0 or the mean gap is at most "
    "0.03 nats; contradicted otherwise",
    scales=("laptop",),
    needs="the laptop scale",
)
def equal_at_equal_supervision(records: Records) -> Finding:
    """The cost of leaving targets out."""
    full, half, goldfish = (
        validation_loss(records, series)
        for series in ("onepass-plain-16", "onepass-plain-8", "onepass-k2-16")
    )
    gap, cost = (
        over_seeds([a - b for a, b in zip(goldfish, other, strict=True)]) for other in (half, full)
    )
    is_equal = gap.low <= 0 <= gap.high or abs(gap.value) <= 0.03
    return _finding(
        decide(reproduced=is_equal, contradicted=not is_equal),
        f"{gap} nats above plain loss on as many supervised tokens, {cost} on as many inputs",
        records["onepass-k2-16-seed3"].last("validation"),
        reproduced="the gap's interval holds 0, or the gap is at most 0.03 nats",
        contradicted="the gap is above 0.03 nats and its interval does not hold 0",
    )


G10 = beyond_us(
    "G10",
    section="5.1",
    says="Benchmarks are not affected",
    paper="little to no impact on zero-shot suites (TinyLlama-1.1B)",
    conditions="none: a model of 1 M parameters is at chance on every one",
    rule="the difference's 95 % interval holds 0",
    needs="a model that is above chance: about 1 B parameters and 20 B tokens, a node of GPUs",
)


@claim(
    "G11",
    section="limitations",
    says="Near-duplicates undo the published hash, and not one of letters and digits",
    paper="named as a limitation; no number, and the second half is ours",
    conditions="the first 3,000 characters of 60 Wikipedia articles, wrapped at 72 columns and then "
    "not, k=4",
    rule="reproduced if the re-wrapped copy teaches more than 0.5 of the tokens that the published "
    "hash hides and less than 0.05 of those that a hash of 24 canonical characters hides; contradicted "
    "if the second share is larger; inconclusive if the first is smaller",
    scales=("laptop",),
    needs="the laptop scale",
)
def near_duplicates(records: Records) -> Finding:
    """The share that an altered copy teaches."""
    published, canonical = (
        records["near-duplicates"].only("leak", mask=mask, perturbation="lines re-wrapped")
        for mask in ("published", "canonical")
    )
    leaks, holds = published.number("leaked") > 0.5, canonical.number("leaked") < 0.05
    return _finding(
        decide(reproduced=leaks and holds, contradicted=leaks and not holds),
        f"{published.number('leaked'):.3f} of the hidden tokens with the published hash, "
        f"{canonical.number('leaked'):.3f} with ours",
        canonical,
        reproduced="hashing characters leaks less than 0.05",
        contradicted="hashing characters leaks 0.05 or more",
        inconclusive="the published mask leaks at most half of what it hides",
    )


@claim(
    "A1",
    section="AxoNN, memorisation",
    says="Larger models memorise in fewer passes",
    paper="70 B and 405 B recite after few passes, 1 B to 13 B hardly after six",
    conditions=_STUDY,
    rule="passes needed is the fewest repetitions at which half of a bucket is recited, pooled over "
    "seeds; reproduced if it never grows with size and the largest model needs fewer than the "
    "smallest; contradicted if it grows; inconclusive if all are equal",
    scales=("laptop",),
    needs="the laptop scale",
)
def larger_need_fewer(records: Records) -> Finding:
    """Passes needed by size of model."""
    needed = {size: passes_needed(records, size) for size in SIZES}
    values = [*needed.values()]
    grows = any(later > earlier for earlier, later in itertools.pairwise(values))
    return _finding(
        decide(reproduced=not grows and values[-1] < values[0], contradicted=grows),
        "; ".join(
            f"width {size[1:]}: {_passes(count)} [{_passes(passes_needed(records, size, 'high'))}, "
            f"{_passes(passes_needed(records, size, 'low'))}]"
            for size, count in needed.items()
        ),
        extractions(records, f"buckets-{SIZES[-1]}-plain", "trained", REPETITIONS[-1])[0],
        reproduced="passes never grow with size, and the largest needs fewer",
        contradicted="a larger model needs more passes than a smaller one",
        inconclusive="all sizes need equally many",
    )


def _passes(count: float) -> str:
    return "more than 64" if math.isinf(count) else str(int(count))


@claim(
    "A2",
    section="AxoNN, memorisation",
    says="With goldfish loss (k=2) every bucket stays at the control's level",
    paper="all buckets fall to the control's (405 B)",
    conditions=_STUDY,
    rule="reproduced if, in the largest model, the share of every trained bucket lies inside the "
    "control's 95 % interval while plain loss is above it at 64 passes; contradicted if one lies above",
    scales=("laptop",),
    needs="the laptop scale",
)
def study_goldfish(records: Records) -> Finding:
    """Every bucket under goldfish loss against the control."""
    plain, goldfish = (f"buckets-{SIZES[-1]}-{arm}" for arm in ("plain", "k2"))
    control = recited(records, goldfish, "control", 0)
    passes = [count for count in REPETITIONS if count]
    shares = {count: recited(records, goldfish, "trained", count) for count in passes}
    most = recited(records, plain, "trained", passes[-1])
    above = [count for count, share in shares.items() if share.value > control.high]
    memorises = most.low > control.high
    worst = max(shares.values(), key=lambda share: share.value)
    return _finding(
        decide(reproduced=memorises and not above, contradicted=memorises and bool(above)),
        f"at most {worst} in any bucket, {control} control; plain loss {most} at {passes[-1]} passes",
        extractions(records, goldfish, "trained", passes[-1])[0],
        reproduced="every bucket lies inside the control's interval",
        contradicted=f"above the control's interval at {above} passes",
        inconclusive="plain loss memorised too little for a comparison",
    )


A3 = beyond_us(
    "A3",
    section="AxoNN, memorisation",
    says="The largest models memorise in a single pass",
    paper="405 B recites pages seen once",
    conditions="none: our models need tens of passes",
    rule="the share recited after one pass lies above the control's 95 % interval",
    needs="a model of 70 B parameters or more, and a cluster",
)

S1 = claim(
    "S1",
    section="4.1",
    says="A pretrained model recites what it is fine-tuned on repeatedly",
    paper="84 of 100 (Llama-2-7B, 100 documents, 100 epochs)",
    conditions=_FINETUNED,
    rule="as G1",
    scales=("laptop",),
    needs="the laptop scale, which fine-tunes SmolLM2-135M",
)(_recites("smollm2-plain"))

S2 = claim(
    "S2",
    section="4.1",
    says="With goldfish loss (k=4) it does not",
    paper="0 of 100, same setting",
    conditions=_FINETUNED,
    rule="as G2",
    scales=("laptop",),
    needs="the laptop scale, which fine-tunes SmolLM2-135M",
)(_does_not("smollm2-plain", "smollm2-k4"))
