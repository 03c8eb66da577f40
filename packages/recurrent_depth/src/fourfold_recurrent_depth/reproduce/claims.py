"""The paper's claims, and the rules, fixed before the runs, by which our records judge them.

Thresholds are those of the pre-registration. The rules stand in `claims_automaton.py`, `claims_training.py`,
`claims_inference.py`, `claims_depth.py` and `claims_worth.py`; here are the claims that no scale can test,
and all of them.
"""

from fourfold_parallel.reproduce.claims import beyond_us, claims_of
from fourfold_recurrent_depth.reproduce import (
    claims_automaton,
    claims_depth,
    claims_inference,
    claims_training,
    claims_worth,
)

C5 = beyond_us(
    "C5",
    section="5.1, tables 1 to 3",
    says="Benchmarks of the released model",
    paper="GSM8K CoT 34.8 strict, 42.1 flexible at r=32",
    rule="the harness's numbers, and that averaging weights lowers the loss",
    needs="the published weights (7 GB), lm-eval's data sets and one GPU; the adapter is harness.py",
)
C7 = beyond_us(
    "C7",
    section="4.2",
    says="Data-parallel training reaches 52 to 64 TFLOP/s a GPU on 4,096",
    paper="108.75 TFLOP/s on one node, 41 to 51 % of the achievable at 4,096",
    rule="locked-step draws faster than independent ones on 2 ranks",
    needs="two idle machines or GPUs: gloo ranks that share two cores measure contention",
)
C14 = beyond_us(
    "C14",
    section="4.3, figure 5",
    says="Without sandwich norms, scale and adapter training collapses",
    paper="figure 5",
    rule="correlation above 0.9 for the first bad run and no use of depth for the second at one rate",
    needs="width 5,280 and thousands of steps: the paper says that small scales do not tell them apart",
)
C17 = beyond_us(
    "C17",
    section="5.2, figure 8",
    says="More context makes more recurrence useful",
    paper="ARC-C saturates at 8 to 12 (0-shot), 32 (25-shot)",
    rule="r90 rises with the number of shots, 95 % interval above 0",
    needs="a model that solves in-context lookups: a pilot did not in six minutes",
)
C18 = beyond_us(
    "C18",
    section="5.2",
    says="Given the facts, the model closes the gap",
    paper="OBQA 38.2 to 49.2",
    rule="the gain over a fixed-depth model is larger with facts in the context than in the weights",
    needs="a model that follows chains of facts: see C17",
)

CLAIMS = tuple(
    sorted(
        (
            *claims_of(
                claims_automaton, claims_training, claims_inference, claims_depth, claims_worth
            ),
            *(C5, C7, C14, C17, C18),
        ),
        key=lambda claim: (claim.id[0], int(claim.id[1:])),
    )
)
