"""The claims of KARMA's paper, each above the rule that judges it; rules were fixed before the runs.

Wahib, Zhang, Nguyen, Drozd, Domke, Zhang, Takano, Matsuoka: Scaling Distributed Deep Learning Workloads
beyond the Memory Capacity with KARMA. SC 2020 (arXiv 2008.11421). Its code was not published.
"""

from __future__ import annotations

import math

from fourfold_parallel.karma.measures import (
    gains,
    greedy_share,
    pipeline_ratios,
    prediction,
    ratios,
)
from fourfold_parallel.reproduce.claims import (
    Finding,
    Records,
    beyond_us,
    claim,
    decide,
    over_seeds,
)

_THROTTLED = (
    "Llamas of width 192 in one process on a CPU; the slower memory is a file, slowed so that everything, "
    "both "
    "ways, takes a set part of the computation's time; seconds of a microbatch, forward and backward"
)


@claim(
    "K1",
    section="abstract",
    says="Swapping and recomputing together beat the best of either alone",
    paper="1.52x on average over the best out-of-core method, six models",
    conditions=_THROTTLED
    + "; 4, 8 and 12 layers, the store 0.6, 1.2 and 2.4 of the computation, memory for 40 %; "
    "swapping alone and recomputing alone may keep blocks too, and are the best such choice",
    rule="geometric mean, over the nine cases, of the faster single strategy's seconds over ours, with a "
    "95 % "
    "interval over 7 interleaved rounds: reproduced if its low end is above 1.05, contradicted if its high "
    "end is "
    "below 1.02",
    scales=("laptop",),
    needs="minutes of an idle machine",
)
def hybrid(records: Records) -> Finding:
    """Each round's geometric mean."""
    interval = over_seeds(gains(records))
    return Finding(
        decide(reproduced=interval.low > 1.05, contradicted=interval.high < 1.02),
        f"{interval} times as fast",
        records["hybrid"].of("case")[0],
        f"the geometric mean over rounds is {interval.value:.3f}, from {interval.low:.3f} to "
        f"{interval.high:.3f}",
    )


@claim(
    "K2",
    section="III",
    says="A performance model of blocks, sizes and throughputs predicts the time of a step",
    paper="the occupancy is projected from block times, sizes and the slowest of three throughputs",
    conditions=_THROTTLED
    + "; 12 plans of one model of 8 layers under budgets that no other study uses, interleaved",
    rule="reproduced if Spearman's coefficient between predicted and measured seconds is at least 0.9 and "
    "the median "
    "error at most 10 %; contradicted if neither is so",
    scales=("laptop",),
    needs="minutes of an idle machine",
)
def predicts(records: Records) -> Finding:
    """Predictions were made from blocks timed one by one."""
    spearman, error = prediction(records)
    return Finding(
        decide(
            reproduced=spearman >= 0.9 and error <= 0.10,
            contradicted=spearman < 0.9 and error > 0.10,
        ),
        f"Spearman {spearman:.2f}, median error {error:.1%}",
        records["predictions"].of("plan")[0],
        f"Spearman's coefficient is {spearman:.2f} and the median error {error:.1%}",
    )


@claim(
    "K3",
    section="III",
    says="The capacity-based strategy (keep the last blocks, swap the others, recompute against stalls) is "
    "near the best",
    paper="the strategy that its planner follows; no bound is given",
    conditions="200 drawn stacks of 5 to 7 blocks, half of them of equal blocks, simulated; the best "
    "choice by "
    "exact search; the strategy as recalled, without the paper's search for a blocking",
    rule="share of stacks on which the strategy is within 1 % of the best, with Wilson's 95 % interval: "
    "reproduced if "
    "its low end is above 0.9, contradicted if its high end is below",
    scales=("smoke", "laptop"),
    needs="nothing",
)
def near_optimal(records: Records) -> Finding:
    """Simulated; the simulation is exact for its own rules."""
    share = greedy_share(records)
    return Finding(
        decide(reproduced=share.low > 0.9, contradicted=share.high < 0.9),
        f"{share} of stacks",
        records["stacks"].of("stacks")[0],
        f"the share is {share.value:.2f}, from {share.low:.2f} to {share.high:.2f}",
    )


@claim(
    "K4",
    section="IV",
    says="The exchange of gradients, pipelined with backward and with an update on the host, hides",
    paper="five stages: backward, gradients out, exchange in phases, update on the host, weights in",
    conditions="a Llama of 8 layers and width 192 on 2 gloo ranks of one machine, two cores; gradients leave "
    "and weights come back through ways that take 0.3 of a plain step each; 20 ms an exchange; whole "
    "steps; the sequence exchanges everything at once, or by layer, whichever is faster",
    rule="the pipelined step over the unpipelined one, with a 95 % interval over 7 interleaved rounds: "
    "reproduced if its high end is below 0.9, contradicted if its low end is above 1",
    scales=("laptop",),
    needs="minutes of an idle machine",
)
def exchange_hides(records: Records) -> Finding:
    """Each round's ratio."""
    interval = over_seeds(pipeline_ratios(records))
    return Finding(
        decide(reproduced=interval.high < 0.9, contradicted=interval.low > 1),
        f"{interval} of the unpipelined step",
        records["host-updates"].only("steps"),
        f"the ratio is {interval.value:.3f}, from {interval.low:.3f} to {interval.high:.3f}",
    )


@claim(
    "K5",
    section="abstract",
    says="Data parallelism out of core beats model parallelism with as much memory",
    paper='"can outperform" hybrid model parallelism on Megatron-LM and Turing-NLG',
    conditions="Llamas of 6 layers and three widths on 2 gloo ranks of one machine, two cores; DDP with "
    "what memory "
    "the grid takes, peaks matched within 5 %; the store takes 0.6 of the computation; microbatches, "
    "without updates",
    rule="reproduced if OutOfCore(DDP) is faster than Fourfold(row=2) and Fourfold(depth=2) at every width "
    "(medians of "
    "interleaved rounds), contradicted if slower than both at every width; a pair whose peaks differ by "
    "more than 5 % "
    "is not counted",
    scales=("laptop",),
    needs="minutes of an idle machine",
)
def against_model_parallelism(records: Records) -> Finding:
    """Seconds of ours over the grid's."""
    pairs = ratios(records)
    values = [ratio for ratio, _ in pairs.values()]
    words = ", ".join(f"{name} {ratio:.2f}" for name, (ratio, _) in pairs.items())
    return Finding(
        decide(
            reproduced=bool(values) and max(values) < 1,
            contradicted=bool(values) and min(values) > 1,
        ),
        f"seconds over the grid's: {words or 'no pair with equal peaks'}",
        records["equal-memory"].of("pair")[0],
        f"{sum(ratio < 1 for ratio in values)} of {len(values)} pairs are faster "
        f"(geometric mean {math.exp(sum(map(math.log, values)) / max(1, len(values))):.2f})",
    )


K6 = beyond_us(
    "K6",
    section="V",
    says="Out-of-core data parallelism scales to thousands of GPUs and to a model of 17 B parameters",
    paper="1.52x on average; up to 2,048 V100; Turing-NLG 17 B",
    rule="reproduced if data parallelism out of core is at least 1.2 times as fast as the best of our "
    "grids that fit, on "
    "64 GPUs or more",
    needs="64 GPUs or more",
)
