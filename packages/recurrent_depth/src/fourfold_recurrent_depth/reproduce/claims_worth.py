"""Claims on what a recurrence is worth in parameters (arXiv 2604.21106), and baselines beside them."""

from __future__ import annotations

from fourfold_parallel.reproduce.claims import Finding, Records, claim, decide, over_seeds
from fourfold_recurrent_depth.reproduce.measures import WORTH
from fourfold_recurrent_depth.reproduce.worth import (
    PUBLISHED,
    fit,
    interval,
    points_of,
    resampled_phi,
    with_truncated,
)

SUITE = (
    "48 models of bytes of Python's standard library, widths 24 to 64, 2 blocks once and 2 looped 1, 2, 4 or "
    "8 times, 0.15, 0.31 and 0.61 M tokens, each trained at its own depth with all gradients, one seed"
)
TRAINED = "a suite of trained models: the laptop scale"


@claim(
    "W1",
    section="2604.21106",
    says="A recurrence is worth more than nothing and less than blocks of its own",
    paper="phi = 0.46 of 116 runs",
    rule="95 % interval of phi over resamples of runs: reproduced if inside 0 to 1, contradicted if below 0 "
    "or above 1",
    conditions=SUITE,
    scales=("laptop",),
    needs=TRAINED,
)
def between_nothing_and_whole(records: Records) -> Finding:
    """Phi against 0 and 1."""
    points = tuple(points_of(records[WORTH], "looped"))
    law, (low, high) = fit(points), interval(resampled_phi(points))
    return Finding(
        decide(reproduced=low > 0 and high < 1, contradicted=high < 0 or low > 1),
        f"phi {law.phi:.2f} [{low:.2f}, {high:.2f}] of {len(points)} runs (alpha {law.alpha:.2f}, beta "
        f"{law.beta:.2f}, floor {law.floor_nats:.2f} nats)",
        records[WORTH].of("trained", arm="looped")[0],
        f"the interval is {low:.2f} to {high:.2f}",
    )


@claim(
    "W2",
    section="2604.21106",
    says="r recurrences are worth about the square root of r",
    paper="phi = 0.46",
    rule="95 % interval of phi over resamples of runs: reproduced if it holds 0.46 and is narrower than 0.5, "
    "contradicted if it does not hold 0.46",
    conditions=SUITE,
    scales=("laptop",),
    needs=TRAINED,
)
def square_root(records: Records) -> Finding:
    """Phi against the published value."""
    points = tuple(points_of(records[WORTH], "looped"))
    low, high = interval(resampled_phi(points))
    holds = low <= PUBLISHED <= high
    return Finding(
        decide(reproduced=holds and high - low < 0.5, contradicted=not holds),
        f"phi {fit(points).phi:.2f} [{low:.2f}, {high:.2f}]",
        records[WORTH].of("trained", arm="looped")[0],
        f"0.46 lies {'in' if holds else 'out'}side {low:.2f} to {high:.2f}",
    )


@claim(
    "W3",
    section="2604.21106",
    says="Truncated backpropagation lowers what a recurrence is worth",
    paper="0.38 against 0.46",
    rule="phi with all gradients less phi where 4 and 8 recurrences had those of the last 2, 95 % interval "
    "over paired resamples: reproduced if above 0, contradicted if below",
    conditions=SUITE + "; runs of 4 and 8 recurrences once more with the last 2 gradients",
    scales=("laptop",),
    needs=TRAINED,
)
def truncation_costs(records: Records) -> Finding:
    """The difference of two exponents."""
    record = records[WORTH]
    whole, shorter = tuple(points_of(record, "looped")), tuple(with_truncated(record))
    low, high = interval(resampled_phi(whole) - resampled_phi(shorter))
    return Finding(
        decide(reproduced=low > 0, contradicted=high < 0),
        f"phi {fit(whole).phi:.2f} with all gradients, {fit(shorter).phi:.2f} with the last 2: lower by "
        f"[{low:.2f}, {high:.2f}]",
        record.of("trained", arm="truncated")[0],
        f"the interval of the difference is {low:.2f} to {high:.2f}",
    )


@claim(
    "W4",
    section="2604.21106, a baseline",
    says="Looping a model that was trained without loops gains nothing",
    paper="none",
    rule="loss at 2 recurrences less that at 1 of every model trained at 1: reproduced if positive in all, "
    "contradicted if negative in all",
    conditions=SUITE,
    scales=("laptop",),
    needs=TRAINED,
)
def untrained_loops_gain_nothing(records: Records) -> Finding:
    """Twelve models trained at one recurrence, run at two."""
    record = records[WORTH]
    gaps = []
    for trained in record.of("trained", arm="looped", loops=1):
        by_depth = {
            int(read.number("recurrences")): read.number("loss_nats")
            for read in record.of("held_out", run=trained.values["run"])
        }
        gaps.append(by_depth[2] - by_depth[1])
    return Finding(
        decide(reproduced=min(gaps) > 0, contradicted=max(gaps) < 0),
        f"{min(gaps):+.2f} to {max(gaps):+.2f} nats at 2 recurrences, in {len(gaps)} models",
        record.of("trained", arm="looped", loops=1)[0],
        f"worse in {sum(gap > 0 for gap in gaps)} of {len(gaps)}",
    )


@claim(
    "W5",
    section="2604.21106, a baseline",
    says="At equal FLOPs a model whose blocks are its own is better",
    paper="410 M at 4 recurrences are worth 580 M at the cost of 1 B",
    rule="loss of a model with its own blocks in the place of each recurrence less that of the looped one, "
    "95 % interval over all pairs: reproduced if below 0, contradicted if above",
    conditions=SUITE + "; widths 48 and 64, 2, 4 and 8 recurrences, 0.31 M tokens",
    scales=("laptop",),
    needs=TRAINED,
)
def own_blocks_are_better(records: Records) -> Finding:
    """Untied less tied, pair by pair."""
    record = records[WORTH]
    looped = {
        (trained.number("width"), trained.number("loops"), trained.number("tokens")): trained
        for trained in record.of("trained", arm="looped")
    }
    gaps = []
    for untied in record.of("trained", arm="untied"):
        twin = looped[untied.number("width"), untied.number("unrolled"), untied.number("tokens")]
        [theirs] = record.of("held_out", run=untied.values["run"], recurrences=1)
        [ours] = record.of(
            "held_out", run=twin.values["run"], recurrences=int(twin.number("loops"))
        )
        gaps.append(theirs.number("loss_nats") - ours.number("loss_nats"))
    gap = over_seeds(gaps)
    return Finding(
        decide(reproduced=gap.high < 0, contradicted=gap.low > 0),
        f"{gap} nats over {len(gaps)} pairs",
        record.of("trained", arm="untied")[0],
        f"lower in {sum(value < 0 for value in gaps)} of {len(gaps)}",
    )
