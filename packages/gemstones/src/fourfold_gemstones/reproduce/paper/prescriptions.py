"""Shapes and tokens that the width-depth law prescribes, and the cost of departing from them."""

from __future__ import annotations

import math

import numpy as np

from fourfold_gemstones.architecture import GEMSTONES
from fourfold_gemstones.envelope import overspent
from fourfold_gemstones.laws import WIDTH_DEPTH
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.published import published_fits, published_frame
from fourfold_gemstones.questions.allocation import Compute, Free, Planner
from fourfold_gemstones.reproduce.measures import between, largest
from fourfold_gemstones.reproduce.paper.settings import Events, Revisit, spearman
from fourfold_gemstones.reproduce.stages import BOTH, paper_claim, published
from fourfold_gemstones.runs import Resource
from fourfold_gemstones.uncertainty import bootstrap, percentile_interval
from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Finding, Records, decide

BUDGETS = (1e18, 1e19, 1e20, 1e21, 1e22)
"""FLOPs; the largest published run spent 4.5e21."""
FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
"""Multiples of the optimal ratio of tokens to parameters."""
SIGNIFICANT = 0.05
"""Of a rank correlation."""


def prescriptions(run: Revisit) -> Events:
    """Compute-optimal shapes of the width-depth law, with bands, on hot and on cooled checkpoints."""
    planner = Planner(architecture=GEMSTONES, cost=Compute(), shapes=Free())
    by_frame = {
        fit.frame: fit.estimate
        for fit in published_fits()
        if fit.name.startswith("delta-4") and len(fit.law.variables) == 4
    }
    for frame in ("hot_100b+", "cool_end"):
        fit = run.fitted(ParametricLaw(variables=WIDTH_DEPTH), published_frame(frame))
        draws = bootstrap(fit, draws=run.shaped_draws, generator=run.generator())
        drawn = [[planner.allocate(law, budget) for budget in BUDGETS] for law in draws.estimates]
        for number, budget in enumerate(BUDGETS):
            best = planner.allocate(fit.estimate, budget)
            theirs = planner.allocate(by_frame[frame], budget)
            fields: dict[str, object] = {
                "frame": frame,
                "budget_flops": budget,
                "published_aspect": theirs.aspect,
                "published_tokens_per_parameter": theirs.tokens_per_parameter,
                "draws": run.shaped_draws,
                "share_at_edge": float(np.mean([plans[number].at_edge for plans in drawn])),
            }
            for name in ("width", "depth", "aspect", "parameters", "tokens_per_parameter"):
                values = np.asarray([getattr(plans[number], name) for plans in drawn])
                interval = percentile_interval(values, 0.95)
                fields |= {
                    name: getattr(best, name),
                    f"{name}_low": interval.low,
                    f"{name}_high": interval.high,
                }
            yield "prescription", fields
        # Growth over the budgets that were measured, 1e19 to the largest run's 4.5e21.
        span = math.log(BUDGETS[3] / BUDGETS[1])
        for name in ("aspect", "tokens_per_parameter"):
            growth = [
                math.log(getattr(plans[3], name) / getattr(plans[1], name)) / span
                for plans in drawn
            ]
            interval = percentile_interval(np.asarray(growth), 0.95)
            ends = [planner.allocate(fit.estimate, BUDGETS[at]) for at in (1, 3)]
            yield (
                "growth",
                {
                    "frame": frame,
                    "quantity": name,
                    "exponent": math.log(getattr(ends[1], name) / getattr(ends[0], name)) / span,
                    "low": interval.low,
                    "high": interval.high,
                },
            )


def overtraining(run: Revisit) -> Events:
    """Cost of training longer or shorter than optimal at the same FLOPs."""
    planner = Planner(architecture=GEMSTONES, cost=Compute(), shapes=Free())
    for frame in ("hot_100b+", "cool_end"):
        fit = run.fitted(ParametricLaw(variables=WIDTH_DEPTH), published_frame(frame))
        for budget in (1e20, 1e21, 1e22):
            best = planner.allocate(fit.estimate, budget)
            for factor, plan in zip(
                FACTORS, planner.overtrained(fit.estimate, budget, FACTORS), strict=True
            ):
                yield (
                    "overtraining",
                    {
                        "frame": frame,
                        "budget_flops": budget,
                        "factor": factor,
                        "cost_nats": plan.loss_nats - best.loss_nats,
                    },
                )


def overspending(run: Revisit) -> Events:
    """FLOPs and device-hours at 300 B tokens over what the hull needs for the same loss."""
    del run
    table = published_frame("hot_100b+_477")
    tokens = table.column("tokens")
    late = table.where((tokens > 2.99e11) & (tokens < 3.01e11))
    last = late.where(np.r_[late.run[1:] != late.run[:-1], True])
    aspect = last.column("width") / last.column("depth")
    kinds: tuple[Resource, ...] = ("flops", "gpu_hours")
    over = {kind: overspent(last, kind) for kind in kinds}
    for row in range(len(last)):
        yield (
            "overspending",
            {
                "width": float(last.column("width")[row]),
                "depth": float(last.column("depth")[row]),
                "flops_percent": float(100 * np.expm1(over["flops"][row])),
                "gpu_hours_percent": float(100 * np.expm1(over["gpu_hours"][row])),
            },
        )
    correlation = {kind: spearman(aspect, values) for kind, values in over.items()}
    yield (
        "overspending_correlation",
        {
            "models": len(last),
            **{f"{kind}_spearman": test[0] for kind, test in correlation.items()},
            **{f"{kind}_p": test[1] for kind, test in correlation.items()},
        },
    )


def _growth(record: Record, quantity: str) -> tuple[tuple[Event, ...], str]:
    """Growth of an optimum with FLOPs, on hot and on cooled checkpoints, and as it is printed."""
    events = tuple(
        record.only("growth", frame=frame, quantity=quantity) for frame in ("hot_100b+", "cool_end")
    )
    return events, "; ".join(
        f"{event.values['frame']} {event.number('exponent'):+.3f} {between(event)}"
        for event in events
    )


@paper_claim(
    "C7",
    section="4.3",
    says="The optimal width over depth grows with compute",
    paper="48 at 1e18 to 147 at 1e24",
    rule="reproduced if both intervals of the exponent, on hot and on cooled checkpoints, lie above "
    "zero; contradicted if one lies below",
)
def aspect_grows(records: Records) -> Finding:
    """Growth of the optimal width over depth."""
    record = published(records)
    events, ours = _growth(record, "aspect")
    grows = all(event.number("low") > 0 for event in events)
    return Finding(
        decide(reproduced=grows, contradicted=any(e.number("high") < 0 for e in events)),
        ours,
        events[0],
        "exponent of the optimal w/d in FLOPs between 1e19 and 1e21; intervals over models "
        + ("exclude zero" if grows else "hold zero or differ in sign"),
    )


@paper_claim(
    "C7b",
    section="4.3",
    says="The optimal tokens per parameter fall with compute",
    paper="53 at 1e18 to 2.8 at 1e22",
    rule="reproduced if both intervals of the exponent lie below zero",
)
def ratio_falls(records: Records) -> Finding:
    """Fall of the optimal tokens per parameter."""
    record = published(records)
    events, ours = _growth(record, "tokens_per_parameter")
    falls = all(event.number("high") < 0 for event in events)
    return Finding(
        decide(reproduced=falls, contradicted=False),
        ours,
        events[0],
        "both intervals over models lie below zero between 1e19 and 1e21 FLOPs"
        if falls
        else "an interval over models holds zero",
    )


def _overspending(record: Record, kind: str, *, sign: int) -> Finding:
    """Rank correlation of overspending with width over depth, of the sign that the paper says."""
    event = record.last("overspending_correlation")
    rho, p = event.number(f"{kind}_spearman"), event.number(f"{kind}_p")
    sure = p < SIGNIFICANT
    return Finding(
        decide(reproduced=sure and rho * sign > 0, contradicted=sure and rho * sign < 0),
        f"Spearman {rho:+.2f} (p = {p:.2g}), {event.number('models'):.0f} models at 300 B tokens",
        event,
        "rank correlation of w/d with overspending over the interpolated hull; positive means "
        "that wide shapes overspend",
    )


@paper_claim(
    "C8",
    section="4.1",
    says="Deep models need fewer FLOPs for a loss",
    paper="a figure",
    rule="reproduced if overspending in FLOPs rises with w/d at p < .05",
    scales=BOTH,
)
def deep_in_flops(records: Records) -> Finding:
    """Overspending in FLOPs rises with width over depth."""
    record = published(records)
    return _overspending(record, "flops", sign=1)


@paper_claim(
    "C8b",
    section="4.1",
    says="Wide models need fewer GPU-hours for a loss, under tensor parallelism alone",
    paper="256x80: +358 %",
    rule="reproduced if overspending in device-hours falls with w/d at p < .05",
    scales=BOTH,
)
def wide_in_time(records: Records) -> Finding:
    """Overspending in device-hours falls with width over depth."""
    record = published(records)
    return _overspending(record, "gpu_hours", sign=-1)


@paper_claim(
    "C9",
    section="4.4",
    says="Training longer than optimal costs little",
    paper=".006 to .03 nats for 4 times the ratio",
    rule="reproduced if four times the ratio costs less than .05 nats at 1e20 to 1e22 FLOPs",
    scales=BOTH,
)
def overtraining_cheap(records: Records) -> Finding:
    """Four times the optimal ratio of tokens to parameters."""
    record = published(records)
    events = [event for event in record.of("overtraining") if event.number("factor") == 4]
    worst = largest(events, "cost_nats")
    cheap = worst.number("cost_nats") < 0.05
    return Finding(
        "reproduced" if cheap else "contradicted",
        f"at most {worst.number('cost_nats'):.3f} nats, at {worst.number('budget_flops'):.0e} "
        "FLOPs",
        worst,
        "costs less than .05 nats at 1e20, 1e21 and 1e22, on hot and cooled checkpoints"
        if cheap
        else "costs .05 nats or more at some budget",
    )
