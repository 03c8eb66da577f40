"""Rules of the runs on draws, truncated backpropagation, additions and retrofitting."""

from __future__ import annotations

import statistics
from itertools import pairwise

from fourfold_parallel.reproduce.claims import Finding, Records, over_seeds
from fourfold_recurrent_depth.reproduce.claims.common import (
    ADDITION,
    DRAWS,
    RETROFIT,
    all_or_none,
    finding,
    of,
    seeds_of,
)
from fourfold_recurrent_depth.reproduce.recipes import MEAN


def _held_out(records: Records, arm: str, field: str) -> list[float]:
    record = records[DRAWS]
    seeds = seeds_of(record, "held_out", arm=arm)
    return [of(record, "held_out", arm=arm, seed=seed)[0].number(field) for seed in seeds]


def one_draw_for_all(records: Records) -> Finding:
    """C8."""
    together, apart = (_held_out(records, arm, "loss_nats") for arm in ("last 4", "per row"))
    costs = [one - other for one, other in zip(together, apart, strict=True)]
    spread = statistics.stdev(together)
    is_small = statistics.fmean(costs) < spread
    interval = over_seeds(costs)
    if is_small:
        verdict = "reproduced"
    else:
        verdict = "contradicted" if interval.low > 0 else "inconclusive"
    return finding(
        verdict,
        f"held-out loss {interval} nats above that of one draw per row; deviation over seeds {spread:.3g}",
        of(records[DRAWS], "held_out", arm="per row")[0],
        "the mean difference stays below one standard deviation over seeds",
        DRAWS,
    )


def truncation_is_enough(records: Records) -> Finding:
    """C9."""
    arms = {
        arm: _held_out(records, arm, "accuracy") for arm in ("last 1", "last 2", "last 4", "all")
    }
    lost = [full - last for full, last in zip(arms["all"], arms["last 4"], strict=True)]
    means = ", ".join(f"{statistics.fmean(values):.3f} {arm}" for arm, values in arms.items())
    return finding(
        all_or_none([loss <= 0.02 for loss in lost], [loss > 0.02 for loss in lost]),
        f"accuracy lost by the last 4 against all {over_seeds(lost)} (means: {means})",
        of(records[DRAWS], "held_out", arm="all")[0],
        "at most 2 points in every seed",
        DRAWS,
    )


def more_operands_need_more(records: Records) -> Finding:
    """C22."""
    record = records[ADDITION]
    held, failed, columns = [], [], []
    for seed in seeds_of(record, "addition"):
        table = {
            (int(event.number("operands")), int(event.number("recurrences"))): event.number(
                "accuracy"
            )
            for event in of(record, "addition", seed=seed)
        }
        operands = sorted({m for m, _ in table if m >= 2})
        depths = sorted({r for _, r in table})
        rises = all(
            table[m, b] >= table[m, a] - 0.02 for m in operands for a, b in pairwise(depths)
        )
        needed = [
            min(r for r in depths if table[m, r] >= 0.9 * table[m, depths[-1]]) for m in operands
        ]
        later = needed == sorted(needed) and needed[-1] > needed[0]
        held.append(rises and later)
        failed.append(all(abs(table[m, MEAN] - table[m, 1]) <= 0.05 for m in operands))
        columns.append(",".join(map(str, needed)))
    return finding(
        all_or_none(held, failed),
        f"r90 for 2 to 6 operands: {'; '.join(columns)}",
        of(record, "addition")[0],
        f"rises with r and saturates later for more operands in {sum(held)} of {len(held)} seeds",
        ADDITION,
    )


def curriculum_keeps_up(records: Records) -> Finding:
    """C23."""
    record = records[RETROFIT]
    seeds = seeds_of(record, "held_out", arm="dense")

    def losses(arm: str, recurrences: int | None) -> list[float]:
        return [
            of(record, "held_out", arm=arm, seed=seed, recurrences=recurrences)[0].number(
                "loss_nats"
            )
            for seed in seeds
        ]

    dense = losses("dense", None)
    risen, constant, fresh = (losses(arm, MEAN) for arm in ("curriculum", "constant", "fresh"))
    above = {
        name: [one - other for one, other in zip(risen, others, strict=True)]
        for name, others in (("constant", constant), ("dense", dense), ("fresh", fresh))
    }
    held = [all(gap <= 0 for gap in gaps) for gaps in zip(*above.values(), strict=True)]
    failed = [c > 0 and d > 0 for c, d in zip(above["constant"], above["dense"], strict=True)]
    return finding(
        all_or_none(held, failed),
        f"loss above that of a constant mean {over_seeds(above['constant'])}, of the dense model trained on "
        f"{over_seeds(above['dense'])}, of fresh weights {over_seeds(above['fresh'])} nats",
        of(record, "held_out", arm="curriculum", recurrences=MEAN)[0],
        f"below all three in {sum(held)} of {len(held)} seeds, above constant and dense in {sum(failed)}",
        RETROFIT,
    )
