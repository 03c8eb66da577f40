"""Rules of the automaton runs: depth, difficulty, exits and paths."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from scipy import stats

from fourfold_parallel.common.records import Record
from fourfold_parallel.reproduce.claims import Finding, Records, over_seeds
from fourfold_recurrent_depth.reproduce.claims.common import (
    AUTOMATON,
    all_or_none,
    finding,
    of,
    seeds_of,
)
from fourfold_recurrent_depth.reproduce.recipes import CELLS_MEAN


def accuracies(record: Record, arm: str, seed: int) -> dict[tuple[int, int], float]:
    """Accuracy by (k, recurrences)."""
    return {
        (int(event.number("k")), int(event.number("recurrences"))): event.number("accuracy")
        for event in of(record, "accuracy", arm=arm, seed=seed)
    }


def _grid(table: Mapping[tuple[int, int], float]) -> tuple[list[int], list[int]]:
    return sorted({k for k, _ in table}), sorted({r for _, r in table})


def depth_helps(records: Records) -> Finding:
    """C1."""
    record = records[AUTOMATON]
    held, failed, finals, firsts = [], [], [], []
    for seed in seeds_of(record, "accuracy", arm="law"):
        table = accuracies(record, "law", seed)
        ks, depths = _grid(table)
        rises = all(table[k, b] >= table[k, a] - 0.02 for k in ks for a, b in pairwise(depths))
        reaches = all(table[k, CELLS_MEAN] >= 0.95 for k in ks)
        flat = all(abs(table[k, CELLS_MEAN] - table[k, 1]) <= 0.05 for k in ks)
        held.append(rises and reaches)
        failed.append(flat or not rises)
        finals.append(min(table[k, CELLS_MEAN] for k in ks))
        firsts.append(min(table[k, 1] for k in ks))
    event = of(record, "accuracy", arm="law", recurrences=CELLS_MEAN)[-1]
    return finding(
        all_or_none(held, failed),
        f"hardest k: {over_seeds(firsts)} at r=1, {over_seeds(finals)} at r={CELLS_MEAN}",
        event,
        f"rises and reaches 0.95 for every k in {sum(held)} of {len(held)} seeds",
        AUTOMATON,
    )


def saturation_by_difficulty(records: Records) -> Finding:
    """C2."""
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
    return finding(
        all_or_none([rho >= 0.9 for rho in rhos], [len(set(one)) == 1 for one in columns]),
        f"r90 by k: {'; '.join(','.join(map(str, one)) for one in columns)}",
        event,
        f"Spearman of r90 and k: {', '.join(f'{rho:.2f}' for rho in rhos)}",
        AUTOMATON,
    )


def skill_lives_in_the_core(records: Records) -> Finding:
    """C3."""
    record = records[AUTOMATON]
    shallow, deep = [], []
    for seed in seeds_of(record, "on_the_way", arm="law"):
        events = of(record, "on_the_way", arm="law", seed=seed)
        hardest = max(int(event.number("k")) for event in events)
        steps = of(record, "trained", arm="law", seed=seed)[0].number("steps")
        final = accuracies(record, "law", seed)
        for gains, r in ((shallow, 1), (deep, CELLS_MEAN)):
            early = [
                event.number("accuracy")
                for event in of(
                    record, "on_the_way", arm="law", seed=seed, k=hardest, recurrences=r
                )
                if event.number("step") <= 0.3 * steps
            ]
            gains.append(final[hardest, r] - early[-1])
    pairs = list(zip(shallow, deep, strict=True))
    return finding(
        all_or_none(
            [abs(s) <= 0.05 and d >= 0.20 for s, d in pairs], [d - s <= 0.05 for s, d in pairs]
        ),
        f"from 30 % of training on {over_seeds(shallow)} at r=1, {over_seeds(deep)} at r={CELLS_MEAN}",
        of(record, "on_the_way", arm="law")[0],
        "at the hardest k, at most 5 points of change at r=1 and a gain of 20 at the mean recurrence",
        AUTOMATON,
    )


def beats_the_shallow_twin(records: Records) -> Finding:
    """C4."""
    record = records[AUTOMATON]
    hard, easy, untied = [], [], []
    untied_seeds = seeds_of(record, "accuracy", arm="untied")
    for seed in seeds_of(record, "accuracy", arm="shallow"):
        deep, twin = accuracies(record, "law", seed), accuracies(record, "shallow", seed)
        ks, _ = _grid(deep)
        hard.append(deep[ks[-1], CELLS_MEAN] - twin[ks[-1], 1])
        easy.append(deep[1, CELLS_MEAN] - twin[1, 1])
        if seed in untied_seeds:
            other = accuracies(record, "untied", seed)
            untied.append(deep[ks[-1], CELLS_MEAN] - other[ks[-1], 1])
    held = [h >= 0.30 and e <= 0.05 for h, e in zip(hard, easy, strict=True)]
    failed = [abs(h - e) <= 0.05 for h, e in zip(hard, easy, strict=True)]
    return finding(
        all_or_none(held, failed),
        f"{over_seeds(hard)} at the hardest k, {over_seeds(easy)} at k=1; over an untied model of equal "
        f"FLOPs {', '.join(f'{gap:.3f}' for gap in untied)} at the hardest k",
        of(record, "accuracy", arm="shallow")[0],
        f"30 points at the hardest k and at most 5 at k=1 in {sum(held)} of {len(held)} seeds",
        AUTOMATON,
    )


def random_depth_generalises(records: Records) -> Finding:
    """C10."""
    record = records[AUTOMATON]
    law_drop, fixed_drop = [], []
    for seed in seeds_of(record, "accuracy", arm="fixed"):
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
    return finding(
        all_or_none(
            [law <= 0.02 and fixed >= 0.10 for law, fixed in pairs],
            [(law <= 0.02) == (fixed < 0.10) for law, fixed in pairs],
        ),
        f"largest drop: law {over_seeds(law_drop)} at r=64, fixed {over_seeds(fixed_drop)} at some r >= 2",
        of(record, "accuracy", arm="fixed")[0],
        "the law's model may lose 2 points at r=64, the fixed one must lose 10 somewhere",
        AUTOMATON,
    )


def exits_follow_difficulty(records: Records) -> Finding:
    """C11."""
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
    return finding(
        all_or_none(held, failed),
        f"Spearman {over_seeds(rhos)}, recurrences saved {over_seeds(saved)}, accuracy lost "
        f"{over_seeds(lost)}",
        of(record, "exits", arm="law", criterion="kl")[0],
        f"Spearman 0.8, 30 % saved, 1 point lost, better than equal FLOPs: {sum(held)} of {len(held)} seeds",
        AUTOMATON,
    )


def path_independent(records: Records) -> Finding:
    """C19."""
    record = records[AUTOMATON]
    events = of(record, "path", arm="law", recurrences=64)
    shares = [event.number("share_within_2_percent") for event in events]
    same = [event.number("share_same_prediction") for event in events]
    early = [e.number("mean_distance") for e in of(record, "path", arm="law", recurrences=4)]
    late = [event.number("mean_distance") for event in events]
    return finding(
        all_or_none(
            [s >= 0.95 and a >= 0.95 for s, a in zip(shares, same, strict=True)],
            [b >= a for a, b in zip(early, late, strict=True)],
        ),
        f"{over_seeds(shares)} of tokens within 2 %, {over_seeds(same)} same prediction",
        events[0],
        "95 % of tokens within 2 % of each other at r=64, for 5 initial states, in every seed",
        AUTOMATON,
    )


def orbits(records: Records) -> Finding:
    """C20."""
    record = records[AUTOMATON]
    events = of(record, "ends", arm="law")
    kinds = ("fixed_point", "orbit", "slider", "unsettled")
    totals = {kind: sum(int(event.number(kind)) for event in events) for kind in kinds}
    whole = max(1, sum(totals.values()))
    return finding(
        "inconclusive",
        ", ".join(f"{kind.replace('_', ' ')} {totals[kind] / whole:.1%}" for kind in kinds),
        events[0],
        "exploratory: fractions are reported, no bar was set",
        AUTOMATON,
    )


def convergence_is_token_specific(records: Records) -> Finding:
    """C21."""
    record = records[AUTOMATON]
    events = of(record, "convergence", arm="law")
    ratios = [
        e.number("variance_over_tokens") / max(1e-9, e.number("variance_over_initial_states"))
        for e in events
    ]
    return finding(
        all_or_none([ratio >= 4 for ratio in ratios], [ratio < 1 for ratio in ratios]),
        f"variance over tokens is {over_seeds(ratios)} times that over initial states",
        events[0],
        "at least 4 times in every seed; contradicted below 1 in every seed",
        AUTOMATON,
    )
