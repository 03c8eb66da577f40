"""The claims of the paper and its neighbours, each above the rule that judges it; rules preceded the runs."""

from fourfold_continual.reproduce.measures import (
    between,
    event_of,
    forgotten,
    shifted,
)
from fourfold_continual.reproduce.recipes import SEEDS, SMOKE_SEEDS, Arm
from fourfold_parallel.reproduce.claims import (
    Claim,
    Finding,
    Records,
    Rule,
    Verdict,
    beyond_us,
    claim,
    decide,
    over_seeds,
)
from fourfold_parallel.reproduce.scale import Scale

_TEXTS = (
    "Wikipedia is the old text and CPython's library the new one, both in one byte-level BPE; 300 steps from "
    "a base of 800 steps, 8 rows of 96 tokens a step, peak 3e-3 warmed up again; 96 held-out rows of each"
)
_SMALL = (
    f"0.33 M parameters; {_TEXTS}; {len(SEEDS)} seeds (smoke: 0.03 M, 30 steps from a base of 80, "
    f"{len(SMOKE_SEEDS)} seeds)"
)
_GPU = "a GPU for the paper's size"


def _at(records: Records) -> tuple[str, tuple[int, ...]]:
    """The size and the seeds that a scale's records hold."""
    if any(name.startswith("smoke-") for name in records):
        return "smoke", SMOKE_SEEDS
    return "small", SEEDS


def _finding(
    verdict: Verdict, ours: str, records: Records, size: str, arm: Arm, part: str
) -> Finding:
    seed = _at(records)[1][0]
    because = {
        "reproduced": "the interval lies where the rule asks for it",
        "contradicted": "the interval lies on the other side of the rule's bound",
        "inconclusive": "the interval lies across a bound of the rule",
        "not tested": "",
    }[verdict]
    return Finding(verdict, ours, event_of(records, size, arm, seed, part), because)


def _forgets(records: Records) -> Finding:
    """Without replay the old text is forgotten, by more than a new schedule does."""
    size, seeds = _at(records)
    shift = over_seeds([shifted(records, size, "none", seed).nats for seed in seeds])
    bits = over_seeds([shifted(records, size, "none", seed).bits_per_byte for seed in seeds])
    warmed = over_seeds([forgotten(records, size, "only-old", seed).nats for seed in seeds])
    return _finding(
        decide(reproduced=shift.low > 0.05, contradicted=shift.high < 0.02),
        f"{shift} nats a token ({bits} bits a byte) above going on with old text alone, which itself "
        f"changes by {warmed}",
        records, size, "none", "old",
    )  # fmt: skip


def _retains(records: Records) -> Finding:
    """A quarter of old text keeps most of it."""
    size, seeds = _at(records)
    ratios, kept, lost = [], [], []
    for seed in seeds:
        kept.append(forgotten(records, size, "r25", seed).nats)
        lost.append(forgotten(records, size, "none", seed).nats)
        ratios.append(kept[-1] / lost[-1])
    ratio = over_seeds(ratios)
    return _finding(
        decide(reproduced=ratio.high < 0.25, contradicted=ratio.low > 0.5),
        f"{ratio} of the forgetting without replay: {over_seeds(kept)} against {over_seeds(lost)} nats a "
        "token",
        records, size, "r25", "old",
    )  # fmt: skip


def _costs_nothing(records: Records) -> Finding:
    """A twentieth of old text takes nothing from the new, at equal tokens in all."""
    size, seeds = _at(records)
    cost = over_seeds([between(records, size, ("r05", "none"), seed, "new").nats for seed in seeds])
    return _finding(
        decide(reproduced=cost.high < 0.02, contradicted=cost.low > 0.02),
        f"{cost} nats a token on the new text",
        records, size, "r05", "new",
    )  # fmt: skip


def _equals_joint(records: Records) -> Finding:
    """Going on with replay is as good as one training on everything."""
    size, seeds = _at(records)
    parts = {
        part: [between(records, size, ("r25", "joint"), seed, part).nats for seed in seeds]
        for part in ("old", "new")
    }
    means = [sum(pair) / 2 for pair in zip(*parts.values(), strict=True)]
    mean = over_seeds(means)
    return _finding(
        decide(
            reproduced=mean.low > -0.05 and mean.high < 0.05,
            contradicted=mean.low > 0.05 or mean.high < -0.05,
        ),
        f"{mean} nats a token above joint training (old {over_seeds(parts['old'])}, new "
        f"{over_seeds(parts['new'])})",
        records, size, "r25", "new",
    )  # fmt: skip


def _claim(
    identity: str,
    judged: Rule,
    *,
    section: str,
    says: str,
    paper: str,
    rule: str,
    scales: tuple[Scale, ...] = ("laptop",),
) -> Claim:
    """A claim on the small size."""
    needs = _GPU if "smoke" in scales else "the laptop scale"
    return claim(
        identity, section=section, says=says, paper=paper, rule=rule, conditions=_SMALL, scales=scales,
        needs=needs,
    )(judged)  # fmt: skip


A1 = _claim(
    "A1",
    _forgets,
    section="abstract; no arm of the paper's",
    says="Continual pretraining without replay forgets",
    paper="said, not measured: there is no arm without replay",
    rule="L_old(none) - L_old(only old): reproduced if its 95 % interval over seeds lies above 0.05 nats, "
    "contradicted if below 0.02",
    scales=("smoke", "laptop"),
)
A2 = _claim(
    "A2",
    _retains,
    section="abstract, figure 1",
    says="Old text in the mix retains what was known",
    paper="benchmarks of English and code before and after 435 B tokens",
    rule="forgot(25 %) / forgot(0): reproduced if its 95 % interval over seeds lies below 0.25, contradicted "
    "if above 0.5",
    scales=("smoke", "laptop"),
)
A3 = _claim(
    "A3",
    _costs_nothing,
    section="Ibrahim et al. 2024",
    says="A little replay costs the new text nothing",
    paper="5 % of replay for a weak shift",
    rule="L_new(5 %) - L_new(0) at equal tokens in all: reproduced if its 95 % interval over seeds lies "
    "below 0.02 nats, contradicted if above",
)


@claim(
    "A4",
    section="CAP and CAT",
    says="A second stage on cleaner text with replay keeps the old text and lowers both losses",
    paper="377 B tokens, then 58 B of cleaner and instruction-like text",
    conditions=f"{_SMALL}; 250 steps of 25 % replay at the peak, then 50 with a rate that falls to a tenth "
    "on 25 % old, 37.5 % new and 37.5 % manual and docstrings, against 300 steps of 25 % replay under one "
    "cosine",
    rule="the two-stage run's loss less the one-stage run's, on old and on new held-out rows: reproduced if "
    "both 95 % intervals over seeds lie below 0, contradicted if both above, else inconclusive",
    scales=("laptop",),
    needs="the laptop scale",
)
def two_stages_help(records: Records) -> Finding:
    """Two stages against one, and beside it the same rates on the first stage's text."""
    size, seeds = "small", SEEDS

    def above(arms: tuple[Arm, Arm], part: str) -> list[float]:
        return [between(records, size, arms, seed, part).nats for seed in seeds]

    old, new = (over_seeds(above(("two-stage", "r25"), part)) for part in ("old", "new"))
    rates = [over_seeds(above(("steady", "r25"), part)) for part in ("old", "new")]
    clean = over_seeds(above(("two-stage", "r25"), "clean"))
    return _finding(
        decide(
            reproduced=old.high < 0 and new.high < 0, contradicted=old.low > 0 and new.low > 0
        ),
        f"old {old}, new {new} nats a token (the rates alone: old {rates[0]}, new {rates[1]}; cleaner text: "
        f"{clean})",
        records, size, "two-stage", "new",
    )  # fmt: skip


A5 = _claim(
    "A5",
    _equals_joint,
    section="Ibrahim et al. 2024",
    says="Re-warming, decay and replay equal training on everything",
    paper="405 M and 10 B parameters: they match on average",
    rule="mean over both texts of L(25 %) - L(joint) at equal tokens in all and of each text: reproduced if "
    "its 95 % interval over seeds lies inside -0.05 to 0.05 nats, contradicted if outside",
)


@claim(
    "A6",
    section="Ibrahim et al. 2024",
    says="Forgetting follows the learning rate that the continuation is warmed up to",
    paper="re-warming itself forgets; no order is given",
    conditions=f"{_SMALL}; no replay; peaks 3e-4, 1e-3, 3e-3",
    rule="reproduced if in at least 4 of 5 seeds (of fewer, in all) forgetting rises with the peak (Spearman "
    "1); contradicted if in as many it does not",
    scales=("laptop",),
    needs="the laptop scale",
)
def forgetting_follows_the_rate(records: Records) -> Finding:
    """Forgetting by peak rate."""
    arms: tuple[Arm, ...] = ("peak-3e-4", "peak-1e-3", "none")
    by_seed = [[forgotten(records, "small", arm, seed).nats for arm in arms] for seed in SEEDS]
    ordered = sum(values == sorted(values) for values in by_seed)
    means = [over_seeds(list(values)) for values in zip(*by_seed, strict=True)]
    allowed = len(SEEDS) // 5
    event = event_of(records, "small", "none", SEEDS[0], "old")
    return Finding(
        decide(reproduced=ordered >= len(SEEDS) - allowed, contradicted=ordered <= allowed),
        f"in {ordered} of {len(SEEDS)} seeds; forgot {means[0]}, {means[1]} and {means[2]} nats a token",
        event,
        f"{ordered} of {len(SEEDS)} seeds have the order of the rates",
    )


A7 = beyond_us(
    "A7",
    section="abstract",
    says="435 B tokens in six languages and code, English and code retained, and safety after tuning",
    paper="15 B parameters, 2 T tokens in all",
    rule="the paper's own benchmarks before and after",
    needs="48 days of LUMI; the launch lines name the mixture and its stages",
)
L1 = beyond_us(
    "L1",
    section="no section of the paper's",
    says="A1 to A3 and A5 at 1.2 M parameters",
    paper="none at this size",
    conditions="the shape is in recipes.py (`large`); base and arms as for 0.33 M parameters",
    rule="as A1 to A3 and A5, 3 seeds",
    needs="eight idle core-minutes a seed, which the machine of these runs, shared by others, did not have",
)
S1 = beyond_us(
    "S1",
    section="no section of the paper's",
    says="A pretrained model of 135 M parameters that goes on with code keeps Wikipedia by replay",
    paper="none",
    conditions="SmolLM2-135M from its wheel, CPython's library as new text",
    rule="as A1 to A3, 3 seeds",
    needs="one GPU for ten minutes: four arms of 300 steps of 64 rows of 1,024 tokens",
)
