"""The paper's claims, and the rules, fixed before the runs, by which our records judge them."""

import sys

from fourfold_hpc_coder.reproduce.measures import gap, losses, paired, pooled, shares
from fourfold_hpc_coder.reproduce.recipes import Arm
from fourfold_parallel.reproduce.claims import (
    Finding,
    Interval,
    Records,
    Rule,
    Verdict,
    beyond_us,
    claim,
    claims_of,
    decide,
)
from fourfold_parallel.reproduce.scale import Scale

_MINIATURE = (
    "a Llama of 0.1 to 0.3 M parameters, 48 (smoke) or 192 (laptop) verified samples of a kernel grammar for "
    "OpenMP, held-out tasks of the same grammar, 3 seeds; at laptop scale all arms begin from weights "
    "pretrained on real OpenMP and CUDA sources. Only signs carry over, no numbers"
)
_BOTH: tuple[Scale, ...] = ("smoke", "laptop")
_LAPTOP: tuple[Scale, ...] = ("laptop",)
LITTLE = 0.05
"""Five points of pass@1: what the paper's "little difference" is taken to mean."""

_SIGN = (
    "reproduced if the 95 % interval (Student, paired by seed) of the difference in held-out loss lies "
    "above 0, contradicted if below; pass@1 and compile rate are shown and decide nothing, since both may "
    "be 0 here"
)
_WEIGHTS = {
    "section": "model card and abstract",
    "conditions": "not run: needs the published weights and prompts",
    "rule": "score the model's answers to ParEval's prompts with ParEval's drivers, and compare",
    "needs": "a GPU, the published weights and a ParEval checkout",
}


def _above_0(difference: Interval) -> Verdict:
    return decide(reproduced=difference.low > 0, contradicted=difference.high < 0)


_PLACE: dict[Verdict, str] = {
    "reproduced": "lies above 0",
    "contradicted": "lies below 0",
    "inconclusive": "reaches across 0",
}
"""The place of an interval in words, by the verdict that it gives."""


def loses(worse: Arm, better: Arm) -> Rule:
    """A rule: the first arm's held-out loss is above the second's; pass@1 is shown beside it."""

    def judge(records: Records) -> Finding:
        difference = gap(records, worse, better)
        verdict = _above_0(difference)
        passes = [pooled(records, arm, "counted").value for arm in (worse, better)]
        builds = [pooled(records, arm, "built").value for arm in (worse, better)]
        return Finding(
            verdict,
            f"loss {difference} nats per token higher; pass@1 {passes[0]:.2f} against {passes[1]:.2f}, "
            f"compile rate {builds[0]:.2f} against {builds[1]:.2f}",
            records[f"{worse}-seed0"].last("held-out"),
            f"the interval of the difference in held-out loss {_PLACE[verdict]}",
        )

    return judge


H1 = beyond_us(
    "H1",
    says="HPC-Coder-V2-6.7B answers ParEval's prompts in the six parallel models",
    paper="pass@1 31.17 (Phind-CodeLlama-34B-V2 32.12, GPT-4 37.75)",
    **_WEIGHTS,
)
H2 = beyond_us(
    "H2",
    says="At its release it is the best open model under 30 B parameters on ParEval",
    paper="by pass@1; no further number read",
    **_WEIGHTS,
)
H3 = claim(
    "H3",
    section="study of data amount",
    says="More instruction data for a parallel model gives better answers in it",
    paper="rises with the share of MPI samples (1.3 B)",
    conditions=_MINIATURE,
    rule=_SIGN + "; arms: all samples against a sixteenth, equal steps",
    scales=_BOTH,
    needs="",
)(loses("sixteenth", "full"))


@claim(
    "H4",
    section="study of data amount",
    says="The gain levels off with more data",
    paper="plateau about 6 k samples of that model (1.3 B; from secondary notes)",
    conditions=_MINIATURE,
    rule="reproduced if the loss gained from 1/16 to 1/4 of the samples exceeds that from 1/4 to "
    "all (Student's 95 % interval, paired by seed, above 0), contradicted if below",
    scales=_LAPTOP,
    needs="the laptop scale, which has three amounts",
)
def plateau(records: Records) -> Finding:
    """The gain of the first fourfold of data less that of the second."""
    sixteenth, quarter, full = (losses(records, arm) for arm in ("sixteenth", "quarter", "full"))
    first = [a - b for a, b in zip(sixteenth, quarter, strict=True)]
    second = [a - b for a, b in zip(quarter, full, strict=True)]
    verdict = _above_0(paired(first, second))
    return Finding(
        verdict,
        f"the first fourfold gains {gap(records, 'sixteenth', 'quarter')} nats, "
        f"the second {gap(records, 'quarter', 'full')}",
        records["quarter-seed0"].last("held-out"),
        f"the first gain less the second, paired by seed, {_PLACE[verdict]}",
    )


@claim(
    "H5",
    section="study of prompt masking",
    says="Leaving prompts out of the loss makes little difference",
    paper="little difference (the published 1.3 B is the unmasked one)",
    conditions=_MINIATURE
    + ". The paper's bases are pretrained on trillions of tokens, ours on 0.2 M",
    rule="reproduced if the 95 % interval of the difference in pass@1 (Student, paired by seed) "
    "lies within 5 points, contradicted if it lies beyond them; inconclusive otherwise, and where "
    "neither arm answers any task right",
    scales=_LAPTOP,
    needs="the laptop scale, which has the masked arm",
)
def little_difference(records: Records) -> Finding:
    """pass@1 with prompts in the loss less pass@1 without."""
    full, masked = (shares(records, arm, "counted") for arm in ("full", "masked"))
    difference = paired(full, masked)
    verdict = decide(
        reproduced=difference.low >= -LITTLE and difference.high <= LITTLE,
        contradicted=difference.low > LITTLE or difference.high < -LITTLE,
    )
    places: dict[Verdict, str] = {
        "reproduced": "lies within 5 points",
        "contradicted": "lies beyond 5 points",
        "inconclusive": "reaches across 5 points",
    }
    because = f"the interval of the difference in pass@1 {places[verdict]}"
    if not any(full + masked):
        verdict = "inconclusive"
        because = "neither arm answered a task right, so pass@1 cannot tell them apart"
    return Finding(
        verdict,
        f"pass@1 {difference} higher with prompts in the loss; "
        f"held-out loss {gap(records, 'masked', 'full')} nats lower",
        records["masked-seed0"].last("answers"),
        because,
    )


H6 = claim(
    "H6",
    section="study of base models",
    says="A base model is a better start than an instruction-tuned one",
    paper="about 4 points of pass@1 at 1.3 B (from secondary notes)",
    conditions=_MINIATURE + ". Instruction-tuned: on serial programming samples of the grammar",
    rule=_SIGN,
    scales=_LAPTOP,
    needs="the laptop scale, which has both starts",
)(loses("instructed", "full"))
H7 = claim(
    "H7",
    section="study of teachers",
    says="The quality of the answers in the data matters",
    paper="up to about 6 points between teachers (from secondary notes)",
    conditions=_MINIATURE + ". Half of the answers spoiled and none verified, against all verified",
    rule=_SIGN,
    scales=_LAPTOP,
    needs="the laptop scale, which has the spoiled arm",
)(loses("spoiled", "full"))
H8 = claim(
    "H8",
    section="study of model size",
    says="A larger base model gives better answers",
    paper="1.3 B below 6.7 B, near 16 B",
    conditions=_MINIATURE + ". Width 32 against 96",
    rule=_SIGN,
    scales=_LAPTOP,
    needs="the laptop scale, which has two sizes",
)(loses("small", "full"))
H9 = claim(
    "H9",
    section="data mixture",
    says="Parallel samples alone serve parallel answers better than a mixture with generic code",
    paper="the published mixture adds two generic sets; no ablation of it was found",
    conditions=_MINIATURE
    + ". Half serial samples, half parallel ones, against parallel ones alone",
    rule=_SIGN,
    scales=_LAPTOP,
    needs="the laptop scale, which has the mixture",
)(loses("mixed", "full"))

CLAIMS = claims_of(sys.modules[__name__])
