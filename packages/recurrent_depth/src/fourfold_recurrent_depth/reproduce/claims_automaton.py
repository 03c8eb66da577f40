"""Claims that the automaton runs judge: depth, difficulty, exits and paths."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from scipy import stats

from fourfold_parallel.reproduce.claims import Finding, Records, claim, over_seeds, unanimous
from fourfold_recurrent_depth.reproduce.measures import AUTOMATON, accuracies
from fourfold_recurrent_depth.reproduce.recipes import CELLS_MEAN

CELLS = (
    "0.13 M parameters, cellular automaton of k = 1 to 3 steps, core of one block of three heads, mean "
    "recurrence 8, 128,000 rows of 24 cells, 3 seeds"
)
TRAINED = "three trained seeds: the laptop scale"


def _grid(table: Mapping[tuple[int, int], float]) -> tuple[list[int], list[int]]:
    return sorted({k for k, _ in table}), sorted({r for _, r in table})


@claim(
    "C1",
    section="5.1, table 1",
    says="Accuracy rises with recurrences at test time, and saturates",
    paper="ARC-E 49.1, 65.1, 69.5, 69.9 at r = 4, 8, 16, 32",
    rule=(
        "every k non-decreasing in r within 2 points and 0.95 at the mean recurrence, in every seed; "
        "contradicted if within 5 points of r=1 for every k, or falling, in every seed"
    ),
    conditions=CELLS,
    scales=("laptop",),
    needs=TRAINED,
)
def depth_helps(records: Records) -> Finding:
    """Accuracy of the hardest k at one recurrence and at the mean, over seeds."""
    record = records[AUTOMATON]
    holds, fails, finals, firsts = [], [], [], []
    for seed in record.seeds("accuracy", arm="law"):
        table = accuracies(record, "law", seed)
        ks, depths = _grid(table)
        rises = all(table[k, b] >= table[k, a] - 0.02 for k in ks for a, b in pairwise(depths))
        reaches = all(table[k, CELLS_MEAN] >= 0.95 for k in ks)
        flat = all(abs(table[k, CELLS_MEAN] - table[k, 1]) <= 0.05 for k in ks)
        holds.append(rises and reaches)
        fails.append(flat or not rises)
        finals.append(min(table[k, CELLS_MEAN] for k in ks))
        firsts.append(min(table[k, 1] for k in ks))
    event = record.of("accuracy", arm="law", recurrences=CELLS_MEAN)[-1]
    return Finding(
        unanimous(holds=holds, fails=fails),
        f"hardest k: {over_seeds(firsts)} at r=1, {over_seeds(finals)} at r={CELLS_MEAN}",
        event,
        f"rises and reaches 0.95 for every k in {sum(holds)} of {len(holds)} seeds",
    )


@claim(
    "C2",
    section="5.2, figure 7",
    says="Harder tasks saturate later",
    paper="HellaSwag at 8 recurrences, GSM8K at 32 to 64",
    rule=(
        "Spearman of k and the least r with 90 % of the final accuracy at least 0.9 in every seed; "
        "contradicted if that r is the same for every k"
    ),
    conditions=CELLS,
    scales=("laptop",),
    needs=TRAINED,
)
def saturation_by_difficulty(records: Records) -> Finding:
    """Recurrences that each k needs for 90 % of its final accuracy, ranked against k."""
    record = records[AUTOMATON]
    rhos, columns = [], []
    for seed in record.seeds("accuracy", arm="law"):
        table = accuracies(record, "law", seed)
        ks, depths = _grid(table)
        needed = [min(r for r in depths if table[k, r] >= 0.9 * table[k, depths[-1]]) for k in ks]
        columns.append(needed)
        spearman: Any = stats.spearmanr(ks, needed) if len(set(needed)) > 1 else None
        rho = 0.0 if spearman is None else float(spearman.statistic)
        rhos.append(rho)
    event = record.of("accuracy", arm="law")[0]
    return Finding(
        unanimous(
            holds=[rho >= 0.9 for rho in rhos], fails=[len(set(column)) == 1 for column in columns]
        ),
        f"r90 by k: {'; '.join(','.join(map(str, column)) for column in columns)}",
        event,
        f"Spearman of r90 and k: {', '.join(f'{rho:.2f}' for rho in rhos)}",
    )


@claim(
    "C3",
    section="5.3, figure 9",
    says="At r=1 the model stops improving while r=32 improves",
    paper="ARC-E 34.0 to 34.9 at r=1, GSM8K 0",
    rule=(
        "from 30 % of training on, at k=3, r=1 changes by at most 5 points and the mean recurrence gains 20, "
        "in every seed; contradicted if both gains are within 5 points of each other"
    ),
    conditions=CELLS + "; the hardest k asked for rises over the first 37.5 % of the rows",
    scales=("laptop",),
    needs=TRAINED,
)
def skill_lives_in_the_core(records: Records) -> Finding:
    """Accuracy gained in the last 70 % of training, at one recurrence and at the mean."""
    record = records[AUTOMATON]
    shallow, deep = [], []
    for seed in record.seeds("on_the_way", arm="law"):
        events = record.of("on_the_way", arm="law", seed=seed)
        hardest = max(int(event.number("k")) for event in events)
        steps = record.of("trained", arm="law", seed=seed)[0].number("steps")
        final = accuracies(record, "law", seed)
        for gains, r in ((shallow, 1), (deep, CELLS_MEAN)):
            early = [
                event.number("accuracy")
                for event in record.of("on_the_way", arm="law", seed=seed, k=hardest, recurrences=r)
                if event.number("step") <= 0.3 * steps
            ]
            gains.append(final[hardest, r] - early[-1])
    pairs = list(zip(shallow, deep, strict=True))
    return Finding(
        unanimous(
            holds=[abs(s) <= 0.05 and d >= 0.20 for s, d in pairs],
            fails=[d - s <= 0.05 for s, d in pairs],
        ),
        f"from 30 % of training on {over_seeds(shallow)} at r=1, {over_seeds(deep)} at r={CELLS_MEAN}",
        record.of("on_the_way", arm="law")[0],
        "at the hardest k, at most 5 points of change at r=1 and a gain of 20 at the mean recurrence",
    )


@claim(
    "C4",
    section="5.3, table 4",
    says="A recurrent model beats its twin without recurrence at equal parameters and tokens",
    paper="GSM8K CoT 9.0 against 1.8 at 180 B tokens",
    rule="30 points at the hardest k and at most 5 at k=1 in every seed; contradicted if the gap is uniform",
    conditions=CELLS,
    scales=("laptop",),
    needs=TRAINED,
)
def beats_the_shallow_twin(records: Records) -> Finding:
    """Accuracy above that of a model trained with one recurrence, for the hardest k and for k=1."""
    record = records[AUTOMATON]
    hard, easy, untied = [], [], []
    untied_seeds = record.seeds("accuracy", arm="untied")
    for seed in record.seeds("accuracy", arm="shallow"):
        deep, twin = accuracies(record, "law", seed), accuracies(record, "shallow", seed)
        ks, _ = _grid(deep)
        hard.append(deep[ks[-1], CELLS_MEAN] - twin[ks[-1], 1])
        easy.append(deep[1, CELLS_MEAN] - twin[1, 1])
        if seed in untied_seeds:
            other = accuracies(record, "untied", seed)
            untied.append(deep[ks[-1], CELLS_MEAN] - other[ks[-1], 1])
    holds = [h >= 0.30 and e <= 0.05 for h, e in zip(hard, easy, strict=True)]
    fails = [abs(h - e) <= 0.05 for h, e in zip(hard, easy, strict=True)]
    return Finding(
        unanimous(holds=holds, fails=fails),
        f"{over_seeds(hard)} at the hardest k, {over_seeds(easy)} at k=1; over an untied model of equal "
        f"FLOPs {', '.join(f'{gap:.3f}' for gap in untied)} at the hardest k",
        record.of("accuracy", arm="shallow")[0],
        f"30 points at the hardest k and at most 5 at k=1 in {sum(holds)} of {len(holds)} seeds",
    )


@claim(
    "C10",
    section="3.3",
    says="Random depth in training generalises over depth, fixed depth does not",
    paper="stated; issue 15 of the reference",
    rule=(
        "law at r=64 within 2 points of the mean recurrence, fixed loses 10 somewhere, in every seed; "
        "contradicted if both behave alike"
    ),
    conditions=CELLS,
    scales=("laptop",),
    needs=TRAINED,
)
def random_depth_generalises(records: Records) -> Finding:
    """Accuracy lost away from the mean, by a model of random depth and by one of fixed depth."""
    record = records[AUTOMATON]
    law_drop, fixed_drop = [], []
    for seed in record.seeds("accuracy", arm="fixed"):
        law, fixed = accuracies(record, "law", seed), accuracies(record, "fixed", seed)
        ks, depths = _grid(law)
        law_drop.append(max(law[k, CELLS_MEAN] - law[k, 64] for k in ks))
        fixed_drop.append(
            max(
                fixed[k, CELLS_MEAN] - fixed[k, r]
                for k in ks
                for r in depths
                if r not in (1, CELLS_MEAN)
            )
        )
    pairs = list(zip(law_drop, fixed_drop, strict=True))
    return Finding(
        unanimous(
            holds=[law <= 0.02 and fixed >= 0.10 for law, fixed in pairs],
            fails=[(law <= 0.02) == (fixed < 0.10) for law, fixed in pairs],
        ),
        f"largest drop: law {over_seeds(law_drop)} at r=64, fixed {over_seeds(fixed_drop)} at some r >= 2",
        record.of("accuracy", arm="fixed")[0],
        "the law's model may lose 2 points at r=64, the fixed one must lose 10 somewhere",
    )


@claim(
    "C11",
    section="6.1, figure 10",
    says="Tokens can stop by themselves: easier ones earlier, at no loss",
    paper="KL < 5e-4: 12.7 steps (high school maths) to 16.2 (moral scenarios) of 32",
    rule=(
        "Spearman of exit step and k 0.8 per token, 30 % fewer recurrences, 1 point lost, and better than a "
        "fixed depth of equal FLOPs with the checks counted, in every seed; contradicted if uncorrelated or "
        "if equal FLOPs do as well"
    ),
    conditions=CELLS,
    scales=("laptop",),
    needs=TRAINED,
)
def exits_follow_difficulty(records: Records) -> Finding:
    """Exit steps by difficulty, recurrences saved, accuracy lost."""
    record = records[AUTOMATON]
    holds, fails, rhos, saved, lost = [], [], [], [], []
    for event in record.of("exits", arm="law", criterion="kl"):
        rho = event.number("spearman")
        share = 1 - event.number("mean_recurrences") / event.number("full_recurrences")
        loss = event.number("full_accuracy") - event.number("accuracy")
        beats_equal = event.number("accuracy") > event.number("equal_cost_accuracy")
        holds.append(rho >= 0.8 and share >= 0.30 and loss <= 0.01 and beats_equal)
        fails.append(rho < 0.2 or not beats_equal)
        rhos.append(rho)
        saved.append(share)
        lost.append(loss)
    return Finding(
        unanimous(holds=holds, fails=fails),
        f"Spearman {over_seeds(rhos)}, recurrences saved {over_seeds(saved)}, accuracy lost "
        f"{over_seeds(lost)}",
        record.of("exits", arm="law", criterion="kl")[0],
        f"Spearman 0.8, 30 % saved, 1 point lost, better than equal FLOPs: {sum(holds)} of {len(holds)} "
        "seeds",
    )


@claim(
    "C19",
    section="7",
    says="The end does not depend on the beginning",
    paper="figures 22 to 25",
    rule=(
        "95 % of tokens within 2 % and 95 % with the same prediction at r=64 from 5 initial states, in every "
        "seed; contradicted if the distance does not shrink"
    ),
    conditions=CELLS,
    scales=("laptop",),
    needs=TRAINED,
)
def path_independent(records: Records) -> Finding:
    """Distance between final states that began at five random states."""
    record = records[AUTOMATON]
    events = record.of("path", arm="law", recurrences=64)
    shares = [event.number("share_within_2_percent") for event in events]
    same = [event.number("share_same_prediction") for event in events]
    early = [e.number("mean_distance") for e in record.of("path", arm="law", recurrences=4)]
    late = [event.number("mean_distance") for event in events]
    return Finding(
        unanimous(
            holds=[s >= 0.95 and a >= 0.95 for s, a in zip(shares, same, strict=True)],
            fails=[b >= a for a, b in zip(early, late, strict=True)],
        ),
        f"{over_seeds(shares)} of tokens within 2 %, {over_seeds(same)} same prediction",
        events[0],
        "95 % of tokens within 2 % of each other at r=64, for 5 initial states, in every seed",
    )


@claim(
    "C20",
    section="7, figure 12",
    says="Some tokens settle, some orbit, some slide",
    paper="figure 12",
    rule="exploratory, no bar: the shares of each end are reported",
    conditions=CELLS,
    scales=("laptop",),
    needs=TRAINED,
)
def orbits(records: Records) -> Finding:
    """Shares of the ends that trajectories come to."""
    record = records[AUTOMATON]
    events = record.of("ends", arm="law")
    kinds = ("fixed_point", "orbit", "slider", "unsettled")
    totals = {kind: sum(int(event.number(kind)) for event in events) for kind in kinds}
    whole = max(1, sum(totals.values()))
    return Finding(
        "inconclusive",
        ", ".join(f"{kind.replace('_', ' ')} {totals[kind] / whole:.1%}" for kind in kinds),
        events[0],
        "exploratory: fractions are reported, no bar was set",
    )


@claim(
    "C21",
    section="7, figure 11",
    says="How fast a token settles is its own",
    paper="figure 11",
    rule=(
        "variance over tokens at least 4 times that over initial states, in every seed; "
        "contradicted below 1"
    ),
    conditions=CELLS,
    scales=("laptop",),
    needs=TRAINED,
)
def convergence_is_token_specific(records: Records) -> Finding:
    """Variance of the settling time over tokens and over initial states."""
    record = records[AUTOMATON]
    events = record.of("convergence", arm="law")
    ratios = [
        e.number("variance_over_tokens") / max(1e-9, e.number("variance_over_initial_states"))
        for e in events
    ]
    return Finding(
        unanimous(holds=[ratio >= 4 for ratio in ratios], fails=[ratio < 1 for ratio in ratios]),
        f"variance over tokens is {over_seeds(ratios)} times that over initial states",
        events[0],
        "at least 4 times in every seed; contradicted below 1 in every seed",
    )
