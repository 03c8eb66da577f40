"""Numbers from the records, which rules and figures share."""

from __future__ import annotations

import math
import statistics

from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import Interval, Records, proportion
from fourfold_parallel.reproduce.tables import markdown

WITHIN = 0.01
"""A choice this near to the best counts as it."""
MATCHED = 0.05
"""Peaks that differ by no more are equal."""


def gains(records: Records) -> list[float]:
    """By round: the geometric mean over cases of the faster single strategy's seconds over ours."""
    cases = records["hybrid"].of("case")
    rows = [
        [min(swap, again) / mine for swap, again, mine in zip(*_times(case), strict=True)]
        for case in cases
    ]
    return [math.exp(statistics.fmean(map(math.log, column))) for column in zip(*rows, strict=True)]


def _times(case: Event) -> tuple[list[float], list[float], list[float]]:
    """The single strategy that is faster in the median stands for both in every round."""
    swap, again, mine = (case.numbers(f"{name}_s") for name in ("swap", "recompute", "ours"))
    best = min(swap, again, key=statistics.median)
    return best, best, mine


def prediction(records: Records) -> tuple[float, float]:
    """Spearman's coefficient and the median error of predicted against measured seconds."""
    from scipy import stats

    plans = records["predictions"].of("plan")
    predicted = [plan.number("predicted_s") for plan in plans]
    measured = [statistics.median(plan.numbers("measured_s")) for plan in plans]
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    coefficient: float = stats.spearmanr(predicted, measured)[0]  # pyright: ignore[reportAssignmentType]
    return float(coefficient), statistics.median(errors)


def pipeline_ratios(records: Records) -> list[float]:
    """By round: a pipelined step over the sequence's, with one exchange or many, whichever is faster."""
    event = records["host-updates"].only("steps")
    best = min(
        (event.numbers(f"{name}_s") for name in ("in_sequence", "in_one")), key=statistics.median
    )
    return [mine / other for mine, other in zip(event.numbers("pipelined_s"), best, strict=True)]


def greedy_share(records: Records) -> Interval:
    """The share of stacks on which the greedy strategy is within 1 % of the best."""
    event = records["stacks"].only("stacks")
    losses = event.numbers("greedy_loss")
    near = sum(loss <= WITHIN for loss in losses)
    return proportion(near, len(losses), seeds=1)


def ratios(records: Records) -> dict[str, tuple[float, float]]:
    """Of each pair with equal peaks: ours over the grid's median seconds, and the peaks'."""
    pairs = {}
    for pair in records["equal-memory"].of("pair"):
        peaks = pair.number("ours_peak_bytes") / pair.number("grid_peak_bytes")
        if abs(peaks - 1) <= MATCHED:
            ours, grid = (statistics.median(pair.numbers(f"{name}_s")) for name in ("ours", "grid"))
            pairs[f"{pair.values['grid']} width {pair.values['width']}"] = (ours / grid, peaks)
    return pairs


def table(records: Records) -> str:
    """Seconds of each strategy over plain training by case, and how well seconds are predicted."""
    rows = []
    for case in records["hybrid"].of("case"):
        plain_s = case.number("plain_s")
        over = [
            f"{statistics.median(case.numbers(f'{name}_s')) / plain_s:.2f}"
            for name in ("swap", "recompute", "ours")
        ]
        values = case.values
        rows.append([str(values["layers"]), str(values["busy"]), *over, str(values["decisions"])])
    spearman, error = prediction(records)
    head = ["layers", "store", "keep or swap", "keep or recompute", "any", "chosen"]
    told = (
        "Seconds of a microbatch over plain training's, with memory for 40 %. `store`: the time in which "
        "the store would move everything, both ways, over the computation's. Llamas of width 192, one "
        "thread of a shared machine. Of 12 other plans, predicted against measured: Spearman "
        f"{spearman:.2f}, median error {error:.1%}."
    )
    return markdown(head, rows) + "\n" + told + "\n"
