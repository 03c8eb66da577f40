"""What the paper claims, and the rules, fixed before the runs, by which our records judge it."""

from collections.abc import Callable

from fourfold_hpc_coder.reproduce.recipes import SEEDS, Arm
from fourfold_parallel.reproduce.claims import (
    Claim,
    Finding,
    Interval,
    Records,
    Verdict,
    over_seeds,
    proportion,
)
from fourfold_parallel.reproduce.scale import Scale

_MINIATURE = (
    "a Llama of 0.1 to 0.3 M parameters, 48 (smoke) or 192 (laptop) verified samples of a kernel grammar for "
    "OpenMP, held-out tasks of the same grammar, 3 seeds; at laptop scale all arms begin from weights "
    "pretrained on real OpenMP and CUDA sources. Only signs carry over, no numbers"
)
_SCALES: tuple[Scale, ...] = ("smoke", "laptop")
LITTLE = 0.05
"""Five points of pass@1: what the paper's "little difference" is taken to mean."""


def losses(records: Records, arm: Arm) -> list[float]:
    """Loss per token of held-out right answers, for each seed."""
    return [
        records[f"{arm}-seed{seed}"].last("held-out").number("answer_loss_nats") for seed in SEEDS
    ]


def shares(records: Records, arm: Arm, key: str) -> list[float]:
    """Share of held-out tasks whose answer is `built`, `right` or `counted`, for each seed."""
    events = [records[f"{arm}-seed{seed}"].last("answers") for seed in SEEDS]
    return [event.number(key) / event.number("tasks") for event in events]


def pooled(records: Records, arm: Arm, key: str) -> Interval:
    """The same share, over tasks and seeds together, with Wilson's interval."""
    events = [records[f"{arm}-seed{seed}"].last("answers") for seed in SEEDS]
    done = sum(int(event.number(key)) for event in events)
    return proportion(done, sum(int(event.number("tasks")) for event in events), seeds=len(SEEDS))


def gap(records: Records, worse: Arm, better: Arm) -> Interval:
    """Held-out loss of one arm above another's, paired by seed."""
    return over_seeds(
        [a - b for a, b in zip(losses(records, worse), losses(records, better), strict=True)]
    )


def _sign(interval: Interval) -> tuple[Verdict, str]:
    if interval.low > 0:
        return "reproduced", "the interval of the difference in held-out loss lies above 0"
    if interval.high < 0:
        return "contradicted", "the interval of the difference in held-out loss lies below 0"
    return "inconclusive", "the interval of the difference in held-out loss reaches across 0"


def _compared(worse: Arm, better: Arm) -> Callable[[Records], Finding]:
    """A rule: the first arm's held-out loss is above the second's; pass@1 is shown beside it."""

    def rule(records: Records) -> Finding:
        found = gap(records, worse, better)
        verdict, because = _sign(found)
        passes = [pooled(records, arm, "counted") for arm in (worse, better)]
        builds = [pooled(records, arm, "built") for arm in (worse, better)]
        return Finding(
            verdict=verdict,
            ours=f"loss {found} nats per token higher; pass@1 {passes[0].value:.2f} against "
            f"{passes[1].value:.2f}, compile rate {builds[0].value:.2f} against {builds[1].value:.2f}",
            evidence=f"{worse}-seed0",
            line=records[f"{worse}-seed0"].last("held-out").line,
            because=because,
        )

    return rule


def _little(records: Records) -> Finding:
    found = over_seeds(
        [
            a - b
            for a, b in zip(
                shares(records, "full", "counted"),
                shares(records, "masked", "counted"),
                strict=True,
            )
        ]
    )
    verdict: Verdict
    if not any(shares(records, "full", "counted") + shares(records, "masked", "counted")):
        verdict, because = (
            "inconclusive",
            "neither arm answered a task right, so pass@1 cannot tell them apart",
        )
    elif found.low >= -LITTLE and found.high <= LITTLE:
        verdict, because = (
            "reproduced",
            "the interval of the difference in pass@1 lies within 5 points",
        )
    elif found.low > LITTLE or found.high < -LITTLE:
        verdict, because = (
            "contradicted",
            "the interval of the difference in pass@1 lies beyond 5 points",
        )
    else:
        verdict, because = (
            "inconclusive",
            "the interval of the difference in pass@1 reaches across 5 points",
        )
    loss = gap(records, "masked", "full")
    return Finding(
        verdict=verdict,
        ours=f"pass@1 {found} higher with prompts in the loss; held-out loss {loss} nats lower",
        evidence="masked-seed0",
        line=records["masked-seed0"].last("answers").line,
        because=because,
    )


def _plateau(records: Records) -> Finding:
    sixteenth, quarter, full = (losses(records, arm) for arm in ("sixteenth", "quarter", "full"))
    found = over_seeds(
        [(a - b) - (b - c) for a, b, c in zip(sixteenth, quarter, full, strict=True)]
    )
    verdict, _ = _sign(found)
    return Finding(
        verdict=verdict,
        ours=f"the first fourfold gains {gap(records, 'sixteenth', 'quarter')} nats, "
        f"the second {gap(records, 'quarter', 'full')}",
        evidence="quarter-seed0",
        line=records["quarter-seed0"].last("held-out").line,
        because="the first gain less the second, paired by seed, "
        + {
            "reproduced": "lies above 0",
            "contradicted": "lies below 0",
            "inconclusive": "reaches across 0",
            "not tested": "",
        }[verdict],
    )


_RULE = (
    "reproduced if the 95 % interval (Student, paired by seed) of the difference in held-out loss lies "
    "above 0, contradicted if below; pass@1 and compile rate are shown and decide nothing, since both may "
    "be 0 here"
)


def _untested(records: Records) -> Finding:
    raise ValueError(f"a claim without a scale was judged on {len(records)} records")


def _needs_weights(identifier: str, statement: str, value: str) -> Claim:
    return Claim(
        id=identifier,
        section="model card and abstract",
        statement=statement,
        paper_value=value,
        conditions="not run: needs the published weights and prompts",
        rule_text="score the model's answers to ParEval's prompts with ParEval's drivers, and compare",
        rule=_untested,
        scales=(),
        needs="a GPU, the published weights and a ParEval checkout",
    )


CLAIMS = (
    _needs_weights(
        "H1",
        "HPC-Coder-V2-6.7B answers ParEval's prompts in the six parallel models",
        "pass@1 31.17 (Phind-CodeLlama-34B-V2 32.12, GPT-4 37.75)",
    ),
    _needs_weights(
        "H2",
        "At its release it is the best open model under 30 B parameters on ParEval",
        "by pass@1; no further number read",
    ),
    Claim(
        id="H3",
        section="study of data amount",
        statement="More instruction data for a parallel model gives better answers in it",
        paper_value="rises with the share of MPI samples (1.3 B)",
        conditions=_MINIATURE,
        rule_text=_RULE + "; arms: all samples against a sixteenth, equal steps",
        rule=_compared("sixteenth", "full"),
        scales=_SCALES,
        needs="",
    ),
    Claim(
        id="H4",
        section="study of data amount",
        statement="The gain levels off with more data",
        paper_value="plateau about 6 k samples of that model (1.3 B; from secondary notes)",
        conditions=_MINIATURE,
        rule_text="reproduced if the loss gained from 1/16 to 1/4 of the samples exceeds that from 1/4 to "
        "all (Student's 95 % interval, paired by seed, above 0), contradicted if below",
        rule=_plateau,
        scales=("laptop",),
        needs="the laptop scale, which has three amounts",
    ),
    Claim(
        id="H5",
        section="study of prompt masking",
        statement="Leaving prompts out of the loss makes little difference",
        paper_value="little difference (the published 1.3 B is the unmasked one)",
        conditions=_MINIATURE
        + ". The paper's bases are pretrained on trillions of tokens, ours on 0.2 M",
        rule_text="reproduced if the 95 % interval of the difference in pass@1 (Student, paired by seed) "
        "lies within 5 points, contradicted if it lies beyond them; inconclusive otherwise, and where "
        "neither arm answers any task right",
        rule=_little,
        scales=("laptop",),
        needs="the laptop scale, which has the masked arm",
    ),
    Claim(
        id="H6",
        section="study of base models",
        statement="A base model is a better start than an instruction-tuned one",
        paper_value="about 4 points of pass@1 at 1.3 B (from secondary notes)",
        conditions=_MINIATURE + ". Instruction-tuned: on serial programming samples of the grammar",
        rule_text=_RULE,
        rule=_compared("instructed", "full"),
        scales=("laptop",),
        needs="the laptop scale, which has both starts",
    ),
    Claim(
        id="H7",
        section="study of teachers",
        statement="The quality of the answers in the data matters",
        paper_value="up to about 6 points between teachers (from secondary notes)",
        conditions=_MINIATURE
        + ". Half of the answers spoiled and none verified, against all verified",
        rule_text=_RULE,
        rule=_compared("spoiled", "full"),
        scales=("laptop",),
        needs="the laptop scale, which has the spoiled arm",
    ),
    Claim(
        id="H8",
        section="study of model size",
        statement="A larger base model gives better answers",
        paper_value="1.3 B below 6.7 B, near 16 B",
        conditions=_MINIATURE + ". Width 32 against 96",
        rule_text=_RULE,
        rule=_compared("small", "full"),
        scales=("laptop",),
        needs="the laptop scale, which has two sizes",
    ),
    Claim(
        id="H9",
        section="data mixture",
        statement="Parallel samples alone serve parallel answers better than a mixture with generic code",
        paper_value="the published mixture adds two generic sets; no ablation of it was found",
        conditions=_MINIATURE
        + ". Half serial samples, half parallel ones, against parallel ones alone",
        rule_text=_RULE,
        rule=_compared("mixed", "full"),
        scales=("laptop",),
        needs="the laptop scale, which has the mixture",
    ),
)
