"""What the paper claims, and the rules, fixed before the runs, by which our records judge it.

Thresholds are those of the pre-registration; where a scale cannot test a claim, `needs` says why.
"""

from __future__ import annotations

from collections.abc import Callable

from fourfold_parallel.reproduce.claims import Claim, Finding, Records
from fourfold_parallel.reproduce.scale import Scale
from fourfold_recurrent_depth.reproduce.claims import automaton, depth, language

_CELLS = (
    "57 k parameters, cellular automaton of k = 1 to 3 steps, core of one block, mean recurrence 8, "
    "64,000 rows of 24 cells, 3 seeds"
)
_BYTES = (
    "0.2 M parameters, bytes of Python's standard library, mean recurrence 4, 300 steps, 3 seeds"
)
_DRAWS = (
    "57 k parameters, cellular automaton of k = 1 and 2 steps, core of one block, mean recurrence 4, "
    "420 steps of 32 rows of 12 cells, 3 seeds"
)
_SUMS = (
    "57 k parameters, prefix sums modulo 10 of 6 digits, core of one block, mean recurrence 4, 800 steps "
    "of 64 rows, 3 seeds"
)
_RETROFIT = (
    "a Llama of 6 layers, 0.3 M parameters, trained for 600 steps on bytes of Python's standard library, "
    "then on for the FLOPs of 400 steps at mean recurrence 4: dense, or cut into 2, 2 and 2 layers; 3 seeds"
)
_EXACT = "no training: random weights, or counts from the configuration"

Rule = Callable[[Records], Finding]


def _untestable(records: Records) -> Finding:
    raise ValueError(f"no rule for {sorted(records)}; the claim's `needs` says what is missing")


def _claim(
    number: str, statement: str, paper: str, rule_text: str, conditions: str, rule: Rule,
    scales: tuple[Scale, ...], needs: str, section: str,
) -> Claim:  # fmt: skip
    return Claim(
        id=number, section=section, statement=statement, paper_value=paper, conditions=conditions,
        rule_text=rule_text, rule=rule, scales=scales, needs=needs,
    )  # fmt: skip


def _missing(
    number: str, statement: str, paper: str, rule_text: str, needs: str, section: str
) -> Claim:
    return _claim(number, statement, paper, rule_text, "", _untestable, (), needs, section)


_TRAINED = "three trained seeds: the laptop scale"
_LAPTOP: tuple[Scale, ...] = ("laptop",)
_BOTH: tuple[Scale, ...] = ("smoke", "laptop")

CLAIMS: tuple[Claim, ...] = (
    _claim(
        "C1", "Accuracy rises with recurrences at test time, and saturates",
        "ARC-E 49.1, 65.1, 69.5, 69.9 at r = 4, 8, 16, 32",
        "every k non-decreasing in r within 2 points and 0.95 at the mean recurrence, in every seed; "
        "contradicted if within 5 points of r=1 for every k, or falling, in every seed",
        _CELLS, automaton.depth_helps, _LAPTOP, _TRAINED, "5.1, table 1",
    ),
    _claim(
        "C2", "Harder tasks saturate later",
        "HellaSwag at 8 recurrences, GSM8K at 32 to 64",
        "Spearman of k and the least r with 90 % of the final accuracy at least 0.9 in every seed; "
        "contradicted if that r is the same for every k",
        _CELLS, automaton.saturation_by_difficulty, _LAPTOP, _TRAINED, "5.2, figure 7",
    ),
    _claim(
        "C3", "At r=1 the model stops improving while r=32 improves",
        "ARC-E 34.0 to 34.9 at r=1, GSM8K 0",
        "from 30 % of training on, at k=3, r=1 changes by at most 5 points and the mean recurrence gains 20, "
        "in every seed; contradicted if both gains are within 5 points of each other",
        _CELLS + "; the hardest k asked for rises over the first 37.5 % of the rows",
        automaton.skill_lives_in_the_core, _LAPTOP, _TRAINED, "5.3, figure 9",
    ),
    _claim(
        "C4", "A recurrent model beats its twin without recurrence at equal parameters and tokens",
        "GSM8K CoT 9.0 against 1.8 at 180 B tokens",
        "30 points at the hardest k and at most 5 at k=1 in every seed; contradicted if the gap is uniform",
        _CELLS, automaton.beats_the_shallow_twin, _LAPTOP, _TRAINED, "5.3, table 4",
    ),
    _missing(
        "C5", "Benchmarks of the released model", "GSM8K CoT 34.8 strict, 42.1 flexible at r=32",
        "the harness's numbers, and that averaging weights lowers the loss",
        "the published weights (7 GB), lm-eval's data sets and one GPU; the adapter is harness.py",
        "5.1, tables 1 to 3",
    ),
    _claim(
        "C6", "Unrolled, the model is as large as 50 B parameters and trains at the cost of 32 B",
        "54.3 B at r=32; 172 GFLOP a token",
        "our count within 0.5 % of torch's counter for r in 1, 4, 32 and three pairs; totals as published",
        _EXACT, language.flops, _BOTH, "nothing", "3 and 4",
    ),
    _missing(
        "C7", "Data-parallel training reaches 52 to 64 TFLOP/s a GPU on 4,096",
        "108.75 TFLOP/s on one node, 41 to 51 % of the achievable at 4,096",
        "locked-step draws faster than independent ones on 2 ranks",
        "two idle machines or GPUs: gloo ranks that share two cores measure contention", "4.2",
    ),
    _claim(
        "C8", "One draw for all ranks and rows costs no convergence", "stated, small scale",
        "held-out loss of one draw for all rows less that of one draw for each row, on average over paired "
        "seeds, below one standard deviation of the former over seeds; contradicted if it is above, and its "
        "95 % interval above 0",
        _DRAWS, depth.one_draw_for_all, _LAPTOP, _TRAINED, "4.1",
    ),
    _claim(
        "C9", "Backpropagating through the last 8 recurrences is enough", "k = 8 of 32 on average",
        "accuracy with gradient through the last 4 recurrences, the mean, at most 2 points below that with "
        "all of them, in every seed; contradicted if more than 2 points below in every seed",
        _DRAWS + "; 1, 2, 4 and all; 8, which all but a tenth of the draws lie within, was left out",
        depth.truncation_is_enough, _LAPTOP, _TRAINED, "3.3",
    ),
    _claim(
        "C10", "Random depth in training generalises over depth, fixed depth does not",
        "stated; issue 15 of the reference",
        "law at r=64 within 2 points of the mean recurrence, fixed loses 10 somewhere, in every seed; "
        "contradicted if both behave alike",
        _CELLS, automaton.random_depth_generalises, _LAPTOP, _TRAINED, "3.3",
    ),
    _claim(
        "C11", "Tokens can stop by themselves: easier ones earlier, at no loss",
        "KL < 5e-4: 12.7 steps (high school maths) to 16.2 (moral scenarios) of 32",
        "Spearman of exit step and k 0.8 per token, 30 % fewer recurrences, 1 point lost, and better than a "
        "fixed depth of equal FLOPs with the checks counted, in every seed; contradicted if uncorrelated or "
        "if equal FLOPs do as well",
        _CELLS, automaton.exits_follow_difficulty, _LAPTOP, _TRAINED, "6.1, figure 10",
    ),
    _claim(
        "C12", "Keys of one recurrence are enough in the cache", "MT-Bench 5.86 against 5.66",
        "loss at most 1 % higher with one recurrence kept, in every seed; contradicted above 5 %",
        _BYTES, language.shared_cache, _LAPTOP, _TRAINED, "6.2",
    ),
    _claim(
        "C13", "Starting from the last token's state saves steps", "14.6 to 13.5 (philosophy)",
        "5 % fewer steps with less than 0.5 % change of loss, in every seed; contradicted if no seed saves "
        "or all change",
        _BYTES, language.warm_start_saves, _LAPTOP, _TRAINED, "6.4",
    ),
    _missing(
        "C14", "Without sandwich norms, scale and adapter training collapses", "figure 5",
        "correlation above 0.9 for the first bad run and no use of depth for the second at one rate",
        "width 5,280 and thousands of steps: the paper says that small scales do not tell them apart",
        "4.3, figure 5",
    ),
    _claim(
        "C15", "Drafts of few recurrences can be verified by the full depth", "stated; no number",
        "the same tokens as greedy for every draft depth and batch, acceptance rising with it; contradicted "
        "by any other token",
        _BYTES + "; at smoke scale random weights", language.speculation_is_exact, _BOTH, "nothing", "6.3",
    ),
    _claim(
        "C16", "Sampling like a diffusion model needs a fifth of the passes",
        "4.4 times faster on GSM8K (arXiv 2510.14961)",
        "half the core passes at 98 % agreement with greedy in every seed; contradicted below 95 % at any "
        "speed-up",
        _BYTES, language.diffusion, _LAPTOP, _TRAINED, "2510.14961",
    ),
    _missing(
        "C17", "More context makes more recurrence useful",
        "ARC-C saturates at 8 to 12 (0-shot), 32 (25-shot)",
        "r90 rises with the number of shots, 95 % interval above 0",
        "a model that solves in-context lookups: a pilot did not in six minutes", "5.2, figure 8",
    ),
    _missing(
        "C18", "Given the facts, the model closes the gap", "OBQA 38.2 to 49.2",
        "the gain over a fixed-depth model is larger with facts in the context than in the weights",
        "a model that follows chains of facts: see C17", "5.2",
    ),
    _claim(
        "C19", "The end does not depend on the beginning", "figures 22 to 25",
        "95 % of tokens within 2 % and 95 % with the same prediction at r=64 from 5 initial states, in every "
        "seed; contradicted if the distance does not shrink",
        _CELLS, automaton.path_independent, _LAPTOP, _TRAINED, "7",
    ),
    _claim(
        "C20", "Some tokens settle, some orbit, some slide", "figure 12",
        "exploratory, no bar: the shares of each end are reported",
        _CELLS, automaton.orbits, _LAPTOP, _TRAINED, "7, figure 12",
    ),
    _claim(
        "C21", "How fast a token settles is its own", "figure 11",
        "variance over tokens at least 4 times that over initial states, in every seed; contradicted below 1",
        _CELLS, automaton.convergence_is_token_specific, _LAPTOP, _TRAINED,
        "7, figure 11",
    ),
    _claim(
        "C22", "Additions of more operands need more recurrences", "1.0 to 0 for 2 to 6 operands",
        "for 2 to 6 operands accuracy non-decreasing in r within 2 points, the least r with 90 % of the "
        "final accuracy non-decreasing in operands and larger for 6 than for 2, in every seed; contradicted "
        "if the mean recurrence is within 5 points of r=1 for all of them in every seed",
        _SUMS, depth.more_operands_need_more, _LAPTOP, _TRAINED, "7, figure 14",
    ),
    _claim(
        "C23", "A pretrained model can be made recurrent", "a curriculum on recurrences keeps quality at "
        "lower cost (arXiv 2511.07384)",
        "at equal FLOPs and the mean recurrence, a curriculum loses neither to a constant mean nor to the "
        "dense model trained on nor to fresh weights of the same shape, in every seed; contradicted if it "
        "loses to the constant mean and the dense model in every seed",
        _RETROFIT, depth.curriculum_keeps_up, _LAPTOP, _TRAINED, "2511.07384",
    ),
)  # fmt: skip
