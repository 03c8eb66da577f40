"""What the paper claims, and the rules, fixed before the runs, by which our records judge it."""

from collections.abc import Iterator

from fourfold_goldfish.recipes import SEEDS, Arm
from fourfold_parallel.run.claims import Claim, Finding, Interval, Records, over_seeds, proportion
from fourfold_parallel.run.records import Event

_MINIATURE = (
    "smoke: 1.1 M parameters, 24 Wikipedia passages of 65 tokens seen 56 times in one pass, prompt 49, "
    "16 to recite; laptop: 1.9 M parameters, 40 passages of 97 tokens seen 56 times, 24 to recite; "
    "ordered hash, exclusive window; 3 seeds"
)


def extraction(records: Records, arm: Arm, bucket: str) -> Iterator[Event]:
    """The "extraction" event of a bucket, for each seed."""
    for seed in SEEDS:
        events = records[f"{arm}-seed{seed}"].of("extraction")
        yield next(event for event in events if event.values["bucket"] == bucket)


def recited(records: Records, arm: Arm, bucket: str) -> Interval:
    """Share of passages recited verbatim, pooled over seeds."""
    events = [*extraction(records, arm, bucket)]
    exact = sum(int(event.number("exact")) for event in events)
    return proportion(exact, sum(int(e.number("passages")) for e in events), seeds=len(events))


def _plain_recites(records: Records) -> Finding:
    trained = recited(records, "plain", "trained")
    control = recited(records, "plain", "control")
    is_clear = trained.low > max(0.5, control.high)
    return Finding(
        verdict="reproduced" if is_clear else "inconclusive",
        ours=f"{trained} of trained passages, {control} of unseen ones",
        evidence="plain-seed0",
        line=next(extraction(records, "plain", "trained")).line,
        because="the interval of the trained passages lies above one half and above the control's"
        if is_clear
        else "too little was memorised to prevent: the interval reaches one half or the control's",
    )


def _goldfish_does_not(records: Records) -> Finding:
    plain = recited(records, "plain", "trained")
    goldfish = recited(records, "k4", "trained")
    control = recited(records, "k4", "control")
    if plain.low <= max(0.5, control.high):
        verdict, because = "inconclusive", "plain loss memorised too little for a comparison"
    elif goldfish.value <= control.high:
        verdict, because = "reproduced", "goldfish lies inside the control's interval"
    else:
        verdict, because = "contradicted", "goldfish lies above the control's interval"
    return Finding(
        verdict=verdict,
        ours=f"{goldfish} with goldfish, {plain} with plain loss, {control} control",
        evidence="k4-seed0",
        line=next(extraction(records, "k4", "trained")).line,
        because=because,
    )


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


CLAIMS = (
    Claim(
        id="G1",
        section="4.1",
        statement="With plain loss, passages that recur are recited verbatim",
        paper_value="84 of 100 (Llama-2-7B, 100 documents, 100 epochs)",
        conditions=_MINIATURE,
        rule_text="reproduced if the 95 % interval of the share recited lies above 0.5 and above the "
        "unseen passages' interval; otherwise inconclusive, since there is nothing to prevent",
        rule=_plain_recites,
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
        rule=_goldfish_does_not,
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
        conditions="1.9 M parameters, 40 passages of 97 tokens seen 56 times, n = 24 to recite, 3 seeds",
        rule_text="reproduced if, for k = 2, 4, 8 and 32, (1 - 1/k)^24 lies inside the 95 % interval of "
        "the share recited; contradicted otherwise",
        rule=_recall_by_k,
        scales=("laptop",),
        needs="the laptop scale, which sweeps k",
    ),
)
