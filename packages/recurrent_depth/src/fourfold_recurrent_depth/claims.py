"""What the paper claims, and the rules, fixed before the runs, by which our records judge it.

Thresholds are those of the pre-registration; where a scale cannot test a claim, `needs` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from scipy import stats

from fourfold_parallel.run.claims import Claim, Finding, Records, Verdict, over_seeds
from fourfold_parallel.run.recipe import Scale
from fourfold_parallel.run.records import Event, Record
from fourfold_recurrent_depth.recipes import MEAN

AUTOMATON, LANGUAGE, EXACT = "automaton", "language", "exact"
"""Names of the stages."""

_CELLS = (
    "57 k parameters, cellular automaton of k = 1 to 3 steps, core of one block, mean recurrence 4, "
    "38,400 rows of 16 cells, 3 seeds"
)
_BYTES = (
    "0.2 M parameters, bytes of Python's standard library, mean recurrence 4, 300 steps, 3 seeds"
)
_EXACT = "no training: random weights, or counts from the configuration"


def of(record: Record, kind: str, **fields: object) -> tuple[Event, ...]:
    """Events of a kind with certain values."""
    return tuple(
        event
        for event in record.of(kind)
        if all(event.values.get(name) == value for name, value in fields.items())
    )


def seeds_of(record: Record, kind: str, **fields: object) -> tuple[int, ...]:
    """Seeds that have such events."""
    return tuple(sorted({int(event.number("seed")) for event in of(record, kind, **fields)}))


def accuracies(record: Record, arm: str, seed: int) -> dict[tuple[int, int], float]:
    """Accuracy by (k, recurrences)."""
    return {
        (int(event.number("k")), int(event.number("recurrences"))): event.number("accuracy")
        for event in of(record, "accuracy", arm=arm, seed=seed)
    }


def _grid(table: Mapping[tuple[int, int], float]) -> tuple[list[int], list[int]]:
    return sorted({k for k, _ in table}), sorted({r for _, r in table})


def _finding(
    verdict: Verdict, ours: str, event: Event, because: str, stage: str = AUTOMATON
) -> Finding:
    return Finding(verdict=verdict, ours=ours, evidence=stage, line=event.line, because=because)


def _all_or_none(held: Sequence[bool], failed: Sequence[bool]) -> Verdict:
    """Reproduced where every seed holds, contradicted where every seed fails, else inconclusive."""
    if all(held):
        return "reproduced"
    return "contradicted" if all(failed) else "inconclusive"


def _depth_helps(records: Records) -> Finding:
    record = records[AUTOMATON]
    held, failed, finals, firsts = [], [], [], []
    for seed in seeds_of(record, "accuracy", arm="law"):
        table = accuracies(record, "law", seed)
        ks, depths = _grid(table)
        rises = all(table[k, b] >= table[k, a] - 0.02 for k in ks for a, b in pairwise(depths))
        reaches = all(table[k, MEAN] >= 0.95 for k in ks)
        flat = all(abs(table[k, MEAN] - table[k, 1]) <= 0.05 for k in ks)
        held.append(rises and reaches)
        failed.append(flat or not rises)
        finals.append(min(table[k, MEAN] for k in ks))
        firsts.append(min(table[k, 1] for k in ks))
    event = of(record, "accuracy", arm="law", recurrences=MEAN)[-1]
    return _finding(
        _all_or_none(held, failed),
        f"hardest k: {over_seeds(firsts)} at r=1, {over_seeds(finals)} at r={MEAN}",
        event,
        f"rises and reaches 0.95 for every k in {sum(held)} of {len(held)} seeds",
    )


def _saturation_by_difficulty(records: Records) -> Finding:
    record = records[AUTOMATON]
    rhos, columns = [], []
    for seed in seeds_of(record, "accuracy", arm="law"):
        table = accuracies(record, "law", seed)
        ks, depths = _grid(table)
        needed = [min(r for r in depths if table[k, r] >= 0.9 * table[k, depths[-1]]) for k in ks]
        columns.append(needed)
        spearman: Any = stats.spearmanr(ks, needed) if len(set(needed)) > 1 else None
        rho = 0.0 if spearman is None else float(spearman.statistic)
        rhos.append(rho)
    event = of(record, "accuracy", arm="law")[0]
    return _finding(
        _all_or_none([rho >= 0.9 for rho in rhos], [len(set(one)) == 1 for one in columns]),
        f"r90 by k: {'; '.join(','.join(map(str, one)) for one in columns)}",
        event,
        f"Spearman of r90 and k: {', '.join(f'{rho:.2f}' for rho in rhos)}",
    )


def _skill_lives_in_the_core(records: Records) -> Finding:
    record = records[AUTOMATON]
    shallow, deep = [], []
    for seed in seeds_of(record, "on_the_way", arm="law"):
        events = of(record, "on_the_way", arm="law", seed=seed)
        hardest = max(int(event.number("k")) for event in events)
        steps = of(record, "trained", arm="law", seed=seed)[0].number("steps")
        final = accuracies(record, "law", seed)
        for gains, r in ((shallow, 1), (deep, MEAN)):
            early = [
                event.number("accuracy")
                for event in of(
                    record, "on_the_way", arm="law", seed=seed, k=hardest, recurrences=r
                )
                if event.number("step") <= 0.3 * steps
            ]
            gains.append(final[hardest, r] - early[-1])
    pairs = list(zip(shallow, deep, strict=True))
    return _finding(
        _all_or_none(
            [abs(s) <= 0.05 and d >= 0.20 for s, d in pairs], [d - s <= 0.05 for s, d in pairs]
        ),
        f"from 30 % of training on {over_seeds(shallow)} at r=1, {over_seeds(deep)} at r={MEAN}",
        of(record, "on_the_way", arm="law")[0],
        "at the hardest k, at most 5 points of change at r=1 and a gain of 20 at the mean recurrence",
    )


def _beats_the_shallow_twin(records: Records) -> Finding:
    record = records[AUTOMATON]
    hard, easy = [], []
    for seed in seeds_of(record, "accuracy", arm="shallow"):
        deep, twin = accuracies(record, "law", seed), accuracies(record, "shallow", seed)
        ks, _ = _grid(deep)
        hard.append(deep[ks[-1], MEAN] - twin[ks[-1], 1])
        easy.append(deep[1, MEAN] - twin[1, 1])
    held = [h >= 0.30 and e <= 0.05 for h, e in zip(hard, easy, strict=True)]
    failed = [abs(h - e) <= 0.05 for h, e in zip(hard, easy, strict=True)]
    return _finding(
        _all_or_none(held, failed),
        f"{over_seeds(hard)} at the hardest k, {over_seeds(easy)} at k=1",
        of(record, "accuracy", arm="shallow")[0],
        f"30 points at the hardest k and at most 5 at k=1 in {sum(held)} of {len(held)} seeds",
    )


def _random_depth_generalises(records: Records) -> Finding:
    record = records[AUTOMATON]
    law_drop, fixed_drop = [], []
    for seed in seeds_of(record, "accuracy", arm="fixed"):
        law, fixed = accuracies(record, "law", seed), accuracies(record, "fixed", seed)
        ks, depths = _grid(law)
        law_drop.append(max(law[k, MEAN] - law[k, 64] for k in ks))
        fixed_drop.append(
            max(fixed[k, MEAN] - fixed[k, r] for k in ks for r in depths if r not in (1, MEAN))
        )
    pairs = list(zip(law_drop, fixed_drop, strict=True))
    return _finding(
        _all_or_none(
            [law <= 0.02 and fixed >= 0.10 for law, fixed in pairs],
            [(law <= 0.02) == (fixed < 0.10) for law, fixed in pairs],
        ),
        f"largest drop: law {over_seeds(law_drop)} at r=64, fixed {over_seeds(fixed_drop)} at some r >= 2",
        of(record, "accuracy", arm="fixed")[0],
        "the law's model may lose 2 points at r=64, the fixed one must lose 10 somewhere",
    )


def _exits_follow_difficulty(records: Records) -> Finding:
    record = records[AUTOMATON]
    held, failed, rhos, saved, lost = [], [], [], [], []
    for event in of(record, "exits", arm="law", criterion="kl"):
        rho = event.number("spearman")
        share = 1 - event.number("mean_recurrences") / event.number("full_recurrences")
        loss = event.number("full_accuracy") - event.number("accuracy")
        beats_equal = event.number("accuracy") > event.number("equal_cost_accuracy")
        held.append(rho >= 0.8 and share >= 0.30 and loss <= 0.01 and beats_equal)
        failed.append(rho < 0.2 or not beats_equal)
        rhos.append(rho)
        saved.append(share)
        lost.append(loss)
    return _finding(
        _all_or_none(held, failed),
        f"Spearman {over_seeds(rhos)}, recurrences saved {over_seeds(saved)}, accuracy lost "
        f"{over_seeds(lost)}",
        of(record, "exits", arm="law", criterion="kl")[0],
        f"Spearman 0.8, 30 % saved, 1 point lost, better than equal FLOPs: {sum(held)} of {len(held)} seeds",
    )


def _path_independent(records: Records) -> Finding:
    record = records[AUTOMATON]
    events = of(record, "path", arm="law", recurrences=64)
    shares = [event.number("share_within_2_percent") for event in events]
    same = [event.number("share_same_prediction") for event in events]
    early = [e.number("mean_distance") for e in of(record, "path", arm="law", recurrences=4)]
    late = [event.number("mean_distance") for event in events]
    return _finding(
        _all_or_none(
            [s >= 0.95 and a >= 0.95 for s, a in zip(shares, same, strict=True)],
            [b >= a for a, b in zip(early, late, strict=True)],
        ),
        f"{over_seeds(shares)} of tokens within 2 %, {over_seeds(same)} same prediction",
        events[0],
        "95 % of tokens within 2 % of each other at r=64, for 5 initial states, in every seed",
    )


def _orbits(records: Records) -> Finding:
    record = records[AUTOMATON]
    events = of(record, "ends", arm="law")
    kinds = ("fixed_point", "orbit", "slider", "unsettled")
    totals = {kind: sum(int(event.number(kind)) for event in events) for kind in kinds}
    whole = max(1, sum(totals.values()))
    return _finding(
        "inconclusive",
        ", ".join(f"{kind.replace('_', ' ')} {totals[kind] / whole:.1%}" for kind in kinds),
        events[0],
        "exploratory: fractions are reported, no bar was set",
    )


def _convergence_is_token_specific(records: Records) -> Finding:
    record = records[AUTOMATON]
    events = of(record, "convergence", arm="law")
    ratios = [
        e.number("variance_over_tokens") / max(1e-9, e.number("variance_over_initial_states"))
        for e in events
    ]
    return _finding(
        _all_or_none([ratio >= 4 for ratio in ratios], [ratio < 1 for ratio in ratios]),
        f"variance over tokens is {over_seeds(ratios)} times that over initial states",
        events[0],
        "at least 4 times in every seed; contradicted below 1 in every seed",
    )


def _flops(records: Records) -> Finding:
    events = records[EXACT].of("flops")
    worst = max(event.number("relative_error") for event in events)
    huginn = records[EXACT].last("huginn")
    materialised = huginn.number("materialised_parameters")
    training = huginn.number("training_flops")
    near = abs(materialised / 54.3e9 - 1) < 0.005 and abs(training / 172e9 - 1) < 0.01
    return _finding(
        "reproduced" if worst <= 0.005 and near else "contradicted",
        f"worst difference {worst:.2%}; {materialised / 1e9:.1f} B parameters, "
        f"{training / 1e9:.0f} GFLOP a token",
        huginn,
        "formula and counter agree within 0.5 %, and the published totals follow",
        EXACT,
    )


def _speculation_is_exact(records: Records) -> Finding:
    events = records[LANGUAGE].of("speculation") if LANGUAGE in records else ()
    stage = LANGUAGE if events else EXACT
    events = events or records[EXACT].of("speculation")
    equal = all(bool(event.values["equals_greedy"]) for event in events)
    shares: dict[int, list[float]] = {}
    for event in events:
        shares.setdefault(int(event.number("draft_steps")), []).append(
            event.number("accepted_share")
        )
    means = {steps: sum(values) / len(values) for steps, values in sorted(shares.items())}
    rises = list(means.values()) == sorted(means.values())
    return _finding(
        "reproduced" if equal and rises else "contradicted" if not equal else "inconclusive",
        "equal to greedy; accepted " + ", ".join(f"{v:.0%} at {k}" for k, v in means.items())
        if equal
        else "tokens differ from greedy",
        events[0],
        "the same tokens for every draft, and more of them accepted from deeper drafts",
        stage,
    )


def _shared_cache(records: Records) -> Finding:
    record = records[LANGUAGE]
    rises = []
    for seed in seeds_of(record, "cache"):
        loss = {
            int(e.number("recurrences_kept")): e.number("loss_nats")
            for e in of(record, "cache", seed=seed)
        }
        rises.append(loss[1] / loss[max(loss)] - 1)
    return _finding(
        _all_or_none([rise <= 0.01 for rise in rises], [rise > 0.05 for rise in rises]),
        f"loss rises by {over_seeds([100 * rise for rise in rises])} %",
        of(record, "cache", recurrences_kept=1)[0],
        "at most 1 % with one recurrence kept; contradicted above 5 %",
        LANGUAGE,
    )


def _warm_start_saves(records: Records) -> Finding:
    record = records[LANGUAGE]
    saved, changed = [], []
    for seed in seeds_of(record, "warm_start"):
        (cold,), (warm,) = (of(record, "warm_start", seed=seed, warm=w) for w in (False, True))
        saved.append(1 - warm.number("mean_recurrences") / cold.number("mean_recurrences"))
        changed.append(warm.number("loss_nats") / cold.number("loss_nats") - 1)
    pairs = list(zip(saved, changed, strict=True))
    return _finding(
        _all_or_none(
            [s >= 0.05 and c < 0.005 for s, c in pairs], [s <= 0 or c >= 0.005 for s, c in pairs]
        ),
        f"exit steps fall by {over_seeds([100 * s for s in saved])} %, loss changes by "
        f"{over_seeds([100 * c for c in changed])} %",
        of(record, "warm_start", warm=True)[0],
        "5 % fewer steps and less than 0.5 % change of loss in every seed",
        LANGUAGE,
    )


def _diffusion(records: Records) -> Finding:
    record = records[LANGUAGE]
    events = record.of("diffusion")
    speedups = [event.number("pass_ratio") for event in events]
    agreements = [event.number("agreement") for event in events]
    pairs = list(zip(speedups, agreements, strict=True))
    return _finding(
        _all_or_none(
            [s >= 2 and a >= 0.98 for s, a in pairs], [s > 1 and a < 0.95 for s, a in pairs]
        ),
        f"{over_seeds(speedups)} times fewer core passes, {over_seeds(agreements)} of tokens as greedy",
        events[0],
        "half the core passes at 98 % agreement in every seed",
        LANGUAGE,
    )


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


_LAPTOP: tuple[Scale, ...] = ("laptop",)
_BOTH: tuple[Scale, ...] = ("smoke", "laptop")

CLAIMS: tuple[Claim, ...] = (
    _claim(
        "C1", "Accuracy rises with recurrences at test time, and saturates",
        "ARC-E 49.1, 65.1, 69.5, 69.9 at r = 4, 8, 16, 32",
        "every k non-decreasing in r within 2 points and 0.95 at the mean recurrence, in every seed; "
        "contradicted if within 5 points of r=1 for every k, or falling, in every seed",
        _CELLS, _depth_helps, _LAPTOP, "three trained seeds: the laptop scale", "5.1, table 1",
    ),
    _claim(
        "C2", "Harder tasks saturate later",
        "HellaSwag at 8 recurrences, GSM8K at 32 to 64",
        "Spearman of k and the least r with 90 % of the final accuracy at least 0.9 in every seed; "
        "contradicted if that r is the same for every k",
        _CELLS, _saturation_by_difficulty, _LAPTOP, "three trained seeds: the laptop scale", "5.2, figure 7",
    ),
    _claim(
        "C3", "At r=1 the model stops improving while r=32 improves",
        "ARC-E 34.0 to 34.9 at r=1, GSM8K 0",
        "from 30 % of training on, at k=3, r=1 changes by at most 5 points and the mean recurrence gains 20, "
        "in every seed; contradicted if both gains are within 5 points of each other",
        _CELLS + "; the hardest k asked for rises over the first 37.5 % of the rows",
        _skill_lives_in_the_core, _LAPTOP, "three trained seeds: the laptop scale", "5.3, figure 9",
    ),
    _claim(
        "C4", "A recurrent model beats its twin without recurrence at equal parameters and tokens",
        "GSM8K CoT 9.0 against 1.8 at 180 B tokens",
        "30 points at the hardest k and at most 5 at k=1 in every seed; contradicted if the gap is uniform",
        _CELLS, _beats_the_shallow_twin, _LAPTOP, "three trained seeds: the laptop scale", "5.3, table 4",
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
        _EXACT, _flops, _BOTH, "nothing", "3 and 4",
    ),
    _missing(
        "C7", "Data-parallel training reaches 52 to 64 TFLOP/s a GPU on 4,096",
        "108.75 TFLOP/s on one node, 41 to 51 % of the achievable at 4,096",
        "locked-step draws faster than independent ones on 2 ranks",
        "two idle machines or GPUs: gloo ranks that share two cores measure contention", "4.2",
    ),
    _missing(
        "C8", "One draw for all ranks and rows costs no convergence", "stated, small scale",
        "final losses of per-row and per-microbatch draws within one standard deviation",
        "three more language runs, two minutes of a core (RandomDepth(per='row') is there)", "4.1",
    ),
    _missing(
        "C9", "Backpropagating through the last 8 recurrences is enough", "k = 8",
        "accuracy at k >= 4 within 2 points of full; saved memory constant in n",
        "twelve more automaton runs, a quarter of an hour; the memory is a law of the tests", "3.3",
    ),
    _claim(
        "C10", "Random depth in training generalises over depth, fixed depth does not",
        "stated; issue 15 of the reference",
        "law at r=64 within 2 points of the mean recurrence, fixed loses 10 somewhere, in every seed; "
        "contradicted if both behave alike",
        _CELLS, _random_depth_generalises, _LAPTOP, "three trained seeds: the laptop scale", "3.3",
    ),
    _claim(
        "C11", "Tokens can stop by themselves: easier ones earlier, at no loss",
        "KL < 5e-4: 12.7 steps (high school maths) to 16.2 (moral scenarios) of 32",
        "Spearman of exit step and k 0.8 per token, 30 % fewer recurrences, 1 point lost, and better than a "
        "fixed depth of equal FLOPs with the checks counted, in every seed; contradicted if uncorrelated or "
        "if equal FLOPs do as well",
        _CELLS, _exits_follow_difficulty, _LAPTOP, "three trained seeds: the laptop scale", "6.1, figure 10",
    ),
    _claim(
        "C12", "Keys of one recurrence are enough in the cache", "MT-Bench 5.86 against 5.66",
        "loss at most 1 % higher with one recurrence kept, in every seed; contradicted above 5 %",
        _BYTES, _shared_cache, _LAPTOP, "three trained seeds: the laptop scale", "6.2",
    ),
    _claim(
        "C13", "Starting from the last token's state saves steps", "14.6 to 13.5 (philosophy)",
        "5 % fewer steps with less than 0.5 % change of loss, in every seed; contradicted if no seed saves "
        "or all change",
        _BYTES, _warm_start_saves, _LAPTOP, "three trained seeds: the laptop scale", "6.4",
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
        _BYTES + "; at smoke scale random weights", _speculation_is_exact, _BOTH, "nothing", "6.3",
    ),
    _claim(
        "C16", "Sampling like a diffusion model needs a fifth of the passes",
        "4.4 times faster on GSM8K (arXiv 2510.14961)",
        "half the core passes at 98 % agreement with greedy in every seed; contradicted below 95 % at any "
        "speed-up",
        _BYTES, _diffusion, _LAPTOP, "three trained seeds: the laptop scale", "2510.14961",
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
        _CELLS, _path_independent, _LAPTOP, "three trained seeds: the laptop scale", "7",
    ),
    _claim(
        "C20", "Some tokens settle, some orbit, some slide", "figure 12",
        "exploratory, no bar: the shares of each end are reported",
        _CELLS, _orbits, _LAPTOP, "three trained seeds: the laptop scale", "7, figure 12",
    ),
    _claim(
        "C21", "How fast a token settles is its own", "figure 11",
        "variance over tokens at least 4 times that over initial states, in every seed; contradicted below 1",
        _CELLS, _convergence_is_token_specific, _LAPTOP, "three trained seeds: the laptop scale",
        "7, figure 11",
    ),
    _missing(
        "C22", "Additions of more operands need more recurrences", "1.0 to 0 for 2 to 6 operands",
        "accuracy rises with r for every number of operands, and saturates later for more",
        "the addition task and minutes of training per seed", "7, figure 14",
    ),
    _missing(
        "C23", "A pretrained model can be made recurrent", "arXiv 2511.07384",
        "a curriculum on recurrences loses to neither a constant mean nor the dense model at equal FLOPs",
        "a pretrained model worth keeping and hours on a GPU; `retrofit` is there", "2511.07384",
    ),
)  # fmt: skip
