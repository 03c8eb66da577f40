"""Claims that our own suite can test, each with its rule: the spread between seeds is the yardstick."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import spearmanr

from fourfold_gemstones.envelope import overspent
from fourfold_gemstones.reproduce.measures import between
from fourfold_gemstones.reproduce.paper.slopes import (
    EMBEDDINGS_MOVE,
    EMBEDDINGS_RULE,
    embedding_order,
)
from fourfold_gemstones.reproduce.stages import own_laws, own_suite, suite_claim
from fourfold_gemstones.reproduce.suite.analyses import Spread, pooled, seed_spread
from fourfold_gemstones.reproduce.suite.train import (
    Suite,
    shape_of,
    suite_table,
)
from fourfold_parallel.common.records import Record
from fourfold_parallel.reproduce.claims import Finding, Records, decide

SIGNIFICANT = 0.05
STABLE_RANKS = 0.95
"""Rank correlation above which two texts rank models alike."""


def gains(record: Record) -> dict[str, list[float]]:
    """Gain of each cooldown on the loss that it forks from, in nats, by run, in order of the forks."""
    hot = {
        (event.values["run"], event.number("step")): event.number("loss_nats")
        for event in record.of("point")
        if event.values["schedule"] == "constant"
    }
    by_run: dict[str, list[float]] = {}
    for event in record.of("point"):
        if event.values["schedule"] == "cooled":
            run = str(event.values["run"])
            before = hot[run, event.number("forked_at")]
            by_run.setdefault(run, []).append(before - event.number("loss_nats"))
    return by_run


def gain_spread(by_run: dict[str, list[float]]) -> Spread:
    """Spread of the gain between seeds of a shape, pooled over shapes and forks."""
    by_shape: dict[str, list[list[float]]] = {}
    for run, values in by_run.items():
        by_shape.setdefault(run.split("-")[0], []).append(values)
    return pooled(
        [
            list(of_fork)
            for runs in by_shape.values()
            if len(runs) > 1
            for of_fork in zip(*runs, strict=True)
        ]
    )


@suite_claim(
    "S1",
    section="5",
    says="Cooling down lowers the loss at every size and length",
    paper="-.087 nats per token on average",
    rule="reproduced if every cooldown of every run gains more than twice the spread between seeds; "
    "contradicted if half of them do not",
)
def cooling_gains(records: Records) -> Finding:
    """Every cooldown's gain against twice its pooled spread between seeds."""
    record = own_suite(records)
    by_run = gains(record)
    spread = gain_spread(by_run)
    every = np.asarray([gain for values in by_run.values() for gain in values])
    above = int((every > 2 * spread.sd).sum())
    return Finding(
        decide(reproduced=above == len(every), contradicted=above <= len(every) / 2),
        f"-{every.mean():.4f} nats per byte on average, {every.min():.4f} to {every.max():.4f}",
        record.of("point")[-1],
        f"{above} of {len(every)} cooldowns gain more than twice the spread of "
        f"{spread.sd:.4f} nats between seeds ({spread.freedom} degrees of freedom)",
    )


@suite_claim(
    "S4",
    section="4.1",
    says="Deep shapes need fewer FLOPs for a loss, wide ones less time",
    paper="a figure",
    rule="rank correlation of w/d with what a run overspends at its end over the hull: reproduced if "
    "positive in FLOPs and negative in CPU-seconds, both at p < .05; contradicted if one has the other "
    "sign at p < .05",
)
def deep_in_flops_wide_in_time(records: Records) -> Finding:
    """Overspending over both hulls, first seeds."""
    record = own_suite(records)
    table = suite_table(record)
    suite = record.run
    assert isinstance(suite, Suite)
    table = table.where(table.column("seed") == suite.seed)
    last = np.r_[table.run[1:] != table.run[:-1], True]
    aspect = (table.column("width") / table.column("depth"))[last]
    ranks = {
        kind: np.asarray(spearmanr(aspect, overspent(table, kind)[last]))
        for kind in ("flops", "seconds")
    }
    signs = ((ranks["flops"], 1), (ranks["seconds"], -1))
    return Finding(
        decide(
            reproduced=all(rho * sign > 0 and p < SIGNIFICANT for (rho, p), sign in signs),
            contradicted=any(rho * sign < 0 and p < SIGNIFICANT for (rho, p), sign in signs),
        ),
        "; ".join(f"{kind}: Spearman {rho:+.2f} (p = {p:.2g})" for kind, (rho, p) in ranks.items()),
        record.of("point")[-1],
        f"{int(last.sum())} shapes at the end of their runs; positive means that wide shapes "
        "overspend",
    )


@suite_claim(
    "S5",
    section="3.1",
    says="One base rate over width times root depth suits every shape",
    paper="one base for 22 shapes",
    rule="reproduced if no twin at half the rate ends lower than its shape by more than twice the spread "
    "between seeds; else contradicted",
)
def one_base_rate(records: Records) -> Finding:
    """Last log losses of the twins, beside those of the same seed at the rule's rate."""
    record = own_suite(records)
    spread = seed_spread(suite_table(record))
    ends = {
        (shape_of(event), event.number("rate"), event.number("seed")): event.number("loss_nats")
        for event in record.of("second")
    }
    regret = {
        shape: math.log(ends[shape, 1.0, seed] / loss)
        for (shape, rate, seed), loss in ends.items()
        if rate != 1.0
    }
    most = max(regret, key=lambda shape: regret[shape])
    fine = regret[most] <= 2 * spread.sd
    return Finding(
        decide(reproduced=fine, contradicted=not fine),
        f"half the rate changes log loss by {-max(regret.values()):+.4f} to "
        f"{-min(regret.values()):+.4f}",
        record.last("second"),
        f"best for {most[0]}x{most[1]}; twice the spread of log loss between seeds is "
        f"{2 * spread.sd:.4f} ({spread.freedom} degrees of freedom), {len(regret)} twins",
    )


@suite_claim(
    "S6",
    section="appendix",
    says="Rankings agree across validation sets",
    paper="Spearman .9994",
    rule=f"reproduced if the losses of all runs' ends on source code and on English prose have a rank "
    f"correlation above {STABLE_RANKS}; else contradicted",
)
def ranks_agree(records: Records) -> Finding:
    """Held-out source and Wikipedia, every run at the rule's rate."""
    record = own_suite(records)
    ends = [event for event in record.of("second") if event.number("rate") == 1.0]
    rho = float(
        np.asarray(
            spearmanr(
                [event.number("loss_nats") for event in ends],
                [event.number("second_nats") for event in ends],
            )
        )[0]
    )
    return Finding(
        decide(reproduced=rho > STABLE_RANKS, contradicted=rho <= STABLE_RANKS),
        f"Spearman {rho:.4f}",
        ends[-1],
        f"{len(ends)} runs trained on Python source, scored on it and on Wikipedia",
    )


@suite_claim(
    "S7",
    section="4.1",
    says="The hull's slope tells laws apart",
    paper="slope .499",
    rule="hull slopes of laws of slope .50 and .70 on our own runs, with the spread between seeds as noise: "
    "reproduced if their 95 % ranges are apart and hold their law's slope; contradicted if they overlap",
)
def hull_tells(records: Records) -> Finding:
    """Simulated ranges of the hull's slope."""
    record = own_laws(records)
    half, steep = record.of("null")
    overlap = half.number("high") >= steep.number("low")
    true = all(e.number("low") <= e.number("true_slope") <= e.number("high") for e in (half, steep))
    return Finding(
        decide(reproduced=true and not overlap, contradicted=overlap),
        f"{half.number('true_slope'):.2f} gives {between(half)}, "
        f"{steep.number('true_slope'):.2f} gives {between(steep)}; measured "
        f"{half.number('measured'):.3f} {between(half, 'measured_low', 'measured_high')}",
        half,
        "200 simulated suites of each law; the ranges "
        + ("overlap" if overlap else "hold their slopes" if true else "miss their law's slope"),
    )


@suite_claim(
    "S8",
    section="5",
    says="Counting embeddings moves the slope",
    paper=EMBEDDINGS_MOVE,
    rule=EMBEDDINGS_RULE,
)
def embeddings_move(records: Records) -> Finding:
    """Slopes by convention of counting, on our own suite."""
    return embedding_order(own_laws(records))


@suite_claim(
    "S9",
    section="4.3",
    says="The optimal width over depth grows with compute",
    paper="48 at 1e18 to 147 at 1e24",
    rule="the exponent of the optimal w/d in FLOPs from 1e11 to 1e12: reproduced if its interval over runs "
    "lies above zero, contradicted if below",
)
def aspect_grows(records: Records) -> Finding:
    """Growth under the width-depth law."""
    record = own_laws(records)
    event = record.last("growth")
    return Finding(
        decide(reproduced=event.number("low") > 0, contradicted=event.number("high") < 0),
        f"{event.number('exponent'):+.3f} {between(event)}",
        event,
        f"in {event.number('share_at_edge'):.0%} of the draws an optimum lies at the edge of the "
        "shapes searched",
    )
