"""Claims judged on randomly inserted passages, each above its rule; rules were fixed before the runs."""

from fourfold_goldfish.reproduce.causal import (
    CAUSAL_SEEDS,
    CELLS,
    Remedy,
    contrast,
    effect,
    effects,
    more,
    nearly,
    pairs,
    recited_share,
    utility,
)
from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import Finding, Interval, Records, Verdict, claim, decide

_HARNESS = (
    "0.5 M parameters; pairs of Wikipedia passages of 65 tokens, one of each inserted by lot 12, 36 or 72 "
    "times, its twin held out; about 108,000 supervised targets; 16 tokens to recite; 3 seeds of 6 pairs a "
    "cell"
)
_EFFECT = "the twin's loss on the last 16 tokens less the inserted passage's, in nats a token"
_LAPTOP = "the laptop scale, which inserts passages by lot"
MOST = "72 spread"


def _above(gap: Interval, ours: str, event: Event, difference: str) -> Finding:
    """Reproduced where the interval of a difference lies above 0, contradicted where it lies below."""
    verdict = decide(reproduced=gap.low > 0, contradicted=gap.high < 0)
    place = {"reproduced": "lies above 0", "contradicted": "lies below 0"}.get(verdict, "holds 0")
    return Finding(verdict, ours, event, f"the interval of {difference} {place}")


def _judged(verdict: Verdict, ours: str, event: Event, **because: str) -> Finding:
    """A finding whose reason is the sentence of its verdict."""
    return Finding(verdict, ours, event, because[verdict])


@claim(
    "I1",
    section="Hubble, results",
    says="The more copies of a passage are inserted, the more of it the model holds",
    paper="extraction rises with duplication (1 B and 8 B models, 100 B and 500 B tokens)",
    conditions=_HARNESS,
    rule=f"the effect is {_EFFECT}; reproduced if its 95 % interval over pairs at 72 copies lies above "
    "that at 12; contradicted if below",
    scales=("laptop",),
    needs=_LAPTOP,
)
def dose_response(records: Records) -> Finding:
    """Effects of three doses under plain loss."""
    few, some, most = (effect(records, "plain", cell.name) for cell in CELLS[:3])
    return _judged(
        decide(reproduced=most.low > few.high, contradicted=most.high < few.low),
        f"{few} nats a token at 12 copies, {some} at 36, {most} at 72",
        pairs(records, "plain", MOST)[0],
        reproduced="the interval at 72 copies lies above that at 12",
        contradicted="the interval at 72 copies lies below that at 12",
        inconclusive="the intervals at 12 and 72 copies overlap",
    )


@claim(
    "I2",
    section="Hubble, results",
    says="Passages seen late are held better than passages seen early",
    paper="placing data early lowers its risk",
    conditions=_HARNESS,
    rule="36 copies in the last third against 36 in the first; reproduced if Welch's 95 % interval of the "
    "difference of effects lies above 0; contradicted if below",
    scales=("laptop",),
    needs=_LAPTOP,
)
def late_is_held(records: Records) -> Finding:
    """Time of the copies."""
    late, early = (effects(records, "plain", cell.name) for cell in (CELLS[4], CELLS[3]))
    gap = contrast(late, early)
    return _above(
        gap,
        f"{gap} nats a token more for late copies",
        pairs(records, "plain", CELLS[4].name)[0],
        "late less early",
    )


@claim(
    "I3",
    section="Hubble, results",
    says="Dilution lowers memorisation: the same copies among more background",
    paper="the risk depends on a passage's frequency relative to the size of the corpus",
    conditions=f"{_HARNESS}; four times the background",
    rule="the same 72 copies of the same passages; reproduced if the 95 % interval over pairs of the "
    "effect less that in four times the background lies above 0; contradicted if below",
    scales=("laptop",),
    needs=_LAPTOP,
)
def dilution_protects(records: Records) -> Finding:
    """The same pairs in a longer run."""
    gap = more(records, "plain", "dilute", MOST)
    return _above(
        gap,
        f"{gap} nats a token more without dilution; recited {recited_share(records, 'plain', MOST)} and, "
        f"diluted, {recited_share(records, 'dilute', MOST)}",
        pairs(records, "dilute", MOST)[0],
        "the plain run less the diluted one",
    )


@claim(
    "M1",
    section="ours",
    says="At equal supervised tokens goldfish ends recital; random gaps and loss truncation do not",
    paper="none: remedies were not compared on one harness",
    conditions=_HARNESS,
    rule="at 72 copies; reproduced if goldfish's share recited lies inside the twins' 95 % interval, and "
    "those of random gaps and of loss truncation have intervals above it; contradicted if goldfish's lies "
    "above",
    scales=("laptop",),
    needs=_LAPTOP,
)
def goldfish_ends_recital(records: Records) -> Finding:
    """Shares recited of four remedies."""
    arms: tuple[Remedy, ...] = ("plain", "ours", "random", "truncated")
    shares = {arm: recited_share(records, arm, MOST) for arm in arms}
    twins = recited_share(records, "ours", MOST, "twin")
    is_inside = shares["ours"].value <= twins.high
    others = all(shares[arm].low > twins.high for arm in ("random", "truncated"))
    return _judged(
        decide(reproduced=is_inside and others, contradicted=not is_inside),
        "; ".join(f"{arm} {share}" for arm, share in shares.items()) + f"; twins {twins}",
        pairs(records, "ours", MOST)[0],
        reproduced="goldfish lies inside the twins' interval, random gaps and truncation above it",
        contradicted="goldfish lies above the twins' interval",
        inconclusive="random gaps or truncation are not above the twins' interval",
    )


@claim(
    "M2",
    section="ours",
    says="Of copies that differ in formatting, a hash of letters lets less through than the published one",
    paper="near-duplicates are named as a limitation; no number",
    conditions=f"{_HARNESS}; 36 copies with 15 % of the blanks doubled at other places each time",
    rule="reproduced if the 95 % interval over pairs of the effect with the published hash less that with 24 "
    "letters and digits lies above 0; contradicted if below",
    scales=("laptop",),
    needs=_LAPTOP,
)
def letters_hold(records: Records) -> Finding:
    """Near-duplicates under two masks."""
    cell = CELLS[5].name
    gap = more(records, "published", "spelled", cell)
    both = [effect(records, arm, cell) for arm in ("plain", "published", "spelled")]
    return _above(
        gap,
        f"{gap} nats a token more with the published hash (plain {both[0]}, published {both[1]}, letters "
        f"{both[2]})",
        pairs(records, "spelled", cell)[0],
        "the published hash less that of letters",
    )


@claim(
    "M3",
    section="MemSinks, results",
    says="Memorisation sinks take the repetition, and dropping them costs nothing",
    paper="sinks isolate repeated text without loss of general ability (SmolLM-360M and 1.7 B)",
    conditions=f"{_HARNESS}; 30 % of the hidden units are sinks, a row uses 30 % of them",
    rule="reproduced if the 95 % interval over pairs of plain loss's effect at 72 copies less that with "
    "sinks dropped lies above 0 and validation is at most 0.05 nats worse; contradicted if the interval "
    "does not lie above 0; inconclusive if sinks help at a price",
    scales=("laptop",),
    needs=_LAPTOP,
)
def sinks_take_it(records: Records) -> Finding:
    """Risk and utility with sinks dropped."""
    gap = more(records, "plain", "sinks", MOST)
    price = utility(records, "sinks").value - utility(records, "plain").value
    helps = gap.low > 0
    return _judged(
        decide(reproduced=helps and price <= 0.05, contradicted=not helps),
        f"{gap} nats a token less with sinks, validation {price:+.3f} nats",
        pairs(records, "sinks", MOST)[0],
        reproduced="the interval lies above 0, and validation is at most 0.05 nats worse",
        contradicted="the interval does not lie above 0",
        inconclusive="sinks help, at a price in validation",
    )


@claim(
    "M4",
    section="ours",
    says="De-duplication holds less of exact copies than goldfish loss does",
    paper="de-duplication is the usual remedy (Lee et al. 2022); no comparison",
    conditions=_HARNESS,
    rule="reproduced if the 95 % interval over pairs of goldfish's effect at 72 copies less that of "
    "de-duplicated data lies above 0; contradicted if below",
    scales=("laptop",),
    needs=_LAPTOP,
)
def one_copy_holds_less(records: Records) -> Finding:
    """The remedy that needs to know its copies."""
    gap = more(records, "ours", "deduplicated", MOST)
    return _above(
        gap,
        f"{gap} nats a token more with goldfish",
        pairs(records, "deduplicated", MOST)[0],
        "goldfish less de-duplication",
    )


_LEAKS = (
    "targets that are never supervised, at 72 copies, with the true text before them; reproduced if the "
    "95 % interval over pairs of the twin's loss less the inserted passage's lies above 0; contradicted "
    "if it lies below 0.1 nats a token"
)


def _leak(records: Records, remedy: Remedy) -> Finding:
    gap = effect(records, remedy, MOST, "never_nats")
    return _judged(
        decide(reproduced=gap.low > 0, contradicted=gap.low <= 0 and gap.high < 0.1),
        f"{gap} nats a token",
        pairs(records, remedy, MOST)[0],
        reproduced="the interval lies above 0",
        contradicted="the interval reaches 0 or less, and stays below 0.1 nats a token",
        inconclusive="the interval reaches from 0 or less to 0.1 nats a token or more",
    )


@claim(
    "C1",
    section="EACL 2026, personal data in inputs",
    says="Text that is only ever input leaks: under prompt masking",
    paper="personal data leaks though it was never a target",
    conditions=f"{_HARNESS}; the first half of every row is a masked prompt",
    rule=_LEAKS,
    scales=("laptop",),
    needs=_LAPTOP,
)
def prompts_leak(records: Records) -> Finding:
    """Prompts of rows that recur."""
    return _leak(records, "prompt")


@claim(
    "C2",
    section="EACL 2026, personal data in inputs",
    says="Text that is only ever input leaks: the targets that goldfish leaves out",
    paper="not tested there",
    conditions=_HARNESS,
    rule=_LEAKS,
    scales=("laptop",),
    needs=_LAPTOP,
)
def gaps_leak(records: Records) -> Finding:
    """Left-out targets of passages that recur."""
    return _leak(records, "ours")


@claim(
    "N1",
    section="ours",
    says="With goldfish loss nothing comes out nearly word for word either",
    paper="none: the promise is about verbatim recital",
    conditions=f"{_HARNESS}; within 2 edits of the 16 tokens, draws from the 5 likeliest, at most 256 "
    "passes a passage",
    rule="chance that one sample is within 2 edits, mean over the inserted passages at 72 copies; "
    "reproduced if the 95 % interval of the upper bound lies below 0.1; contradicted if that of the "
    "certified lower bound lies above",
    scales=("laptop",),
    needs=_LAPTOP,
)
def nothing_nearly(records: Records) -> Finding:
    """Bounds from both sides."""
    lower, upper = (nearly(records, "ours", "inserted", bound) for bound in ("lower", "upper"))
    plain = nearly(records, "plain", "inserted", "lower")
    twins = nearly(records, "ours", "twin", "upper")
    event = next(iter(records[f"causal-ours-seed{CAUSAL_SEEDS[0]}"].of("near", side="inserted")))
    return _judged(
        decide(reproduced=upper.high < 0.1, contradicted=lower.low > 0.1),
        f"between {lower} and {upper} with goldfish; at least {plain} with plain loss; twins at most {twins}",
        event,
        reproduced="the upper bound's interval lies below 0.1",
        contradicted="the lower bound's interval lies above 0.1",
        inconclusive="the bounds lie on either side of 0.1, or their intervals reach it",
    )
