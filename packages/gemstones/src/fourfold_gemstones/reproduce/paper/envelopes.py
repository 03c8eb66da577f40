"""Slopes of the envelope, beside those it gives on losses of known laws."""

from __future__ import annotations

import math

import numpy as np

from fourfold_gemstones.envelope import Bins, EnvelopeLaw, Hull
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.published import published_frame
from fourfold_gemstones.questions.simulate import EPOCH, HALF, noise_free
from fourfold_gemstones.reproduce.measures import between
from fourfold_gemstones.reproduce.paper.settings import Events, Revisit
from fourfold_gemstones.reproduce.stages import BOTH, paper_claim, published
from fourfold_gemstones.uncertainty import bootstrap, leave_one_out, slope
from fourfold_parallel.reproduce.claims import Finding, Records, decide

TOKEN_FLOORS = (0.0, 5e9, 1e10, 2e10, 5e10, 1.2e11)
"""Least tokens of the rows an envelope sees: the selection that moves approach 1 most."""


def envelopes(run: Revisit) -> Events:
    """Hull slopes against the token floor, and what they are on noise-free laws of known slope."""
    whole = published_frame("hot_100b+_477")
    ours = run.fitted(ParametricLaw(), published_frame("hot_100b+")).estimate
    truths = (HALF, EPOCH, ours)
    selections = {
        **{f"T >= {floor / 1e9:g}B": (floor, math.inf) for floor in TOKEN_FLOORS},
        "T <= 100B": (0.0, 1.001e11),
    }
    for label, (low, high) in selections.items():
        tokens = whole.column("tokens")
        table = whole.where((tokens >= low) & (tokens <= high))
        for name, law in (
            ("hull", EnvelopeLaw()),
            ("hull, 6NT", EnvelopeLaw(resource="flops_6nt")),
            ("20 bins", EnvelopeLaw(method=Bins(count=20))),
        ):
            fit = law.fit(table)
            draws = bootstrap(fit, draws=run.draws, generator=run.generator())
            interval = draws.interval(slope)
            null = [law.fit(noise_free(table, truth)).estimate.slope for truth in truths]
            yield (
                "envelope",
                {
                    "selection": label,
                    "estimator": name,
                    "token_floor": low,
                    "slope": fit.estimate.slope,
                    "low": interval.low,
                    "high": interval.high,
                    "true_slopes": [truth.slope for truth in truths],
                    "null_slopes": null,
                },
            )
    ratio = EnvelopeLaw(target="tokens_per_parameter")
    table = published_frame("hot_477")
    fit = ratio.fit(table)
    draws = bootstrap(fit, draws=run.draws, generator=run.generator())
    interval = draws.interval(slope)
    yield (
        "ratio",
        {
            "slope": fit.estimate.slope,
            "low": interval.low,
            "high": interval.high,
            "mean_tokens_per_parameter": float(
                np.exp(np.log(ratio.targets(table)[fit.rows]).mean())
            ),
            "true_slopes": [truth.slope for truth in truths],
            "null_slopes": [ratio.fit(noise_free(table, truth)).estimate.slope for truth in truths],
        },
    )


def left_out(run: Revisit) -> Events:
    """Slopes without each model in turn: the law's, the hull's, and the binned envelope's."""
    table = published_frame("hot_477")
    ours = run.fitted(ParametricLaw(), published_frame("hot_100b+")).estimate
    for name, law in (
        ("hull", EnvelopeLaw(method=Hull())),
        ("750 bins", EnvelopeLaw(method=Bins(count=750))),
        ("20 bins", EnvelopeLaw(method=Bins(count=20))),
    ):
        fit = law.fit(table)
        without = leave_one_out(fit, slope)
        clean = law.fit(noise_free(table, ours)).estimate.slope
        yield (
            "left_out",
            {
                "estimator": name,
                "slope": fit.estimate.slope,
                "low": min(without.values()),
                "high": max(without.values()),
                "bias_on_fitted_law": clean - ours.slope,
            },
        )
    fit = run.fitted(ParametricLaw(), published_frame("hot_100b+"))
    without = leave_one_out(fit, slope)
    low, high = (
        min(without, key=lambda name: without[name]),
        max(without, key=lambda name: without[name]),
    )
    yield (
        "left_out",
        {
            "estimator": "law in N and T",
            "slope": fit.estimate.slope,
            "low": without[low],
            "high": without[high],
            "lowest_without": low.removeprefix("PyGemma-").removesuffix("_pretrain"),
            "highest_without": high.removeprefix("PyGemma-").removesuffix("_pretrain"),
        },
    )


@paper_claim(
    "C2",
    section="4.1",
    says="On the hull tokens per parameter are nearly constant",
    paper="slope -.018, ratio 49",
    rule="inconclusive if noise-free laws of other slopes give the same; else reproduced if the "
    "interval holds zero",
    scales=BOTH,
)
def constant_ratio(records: Records) -> Finding:
    """Tokens per parameter on the hull."""
    record = published(records)
    event = record.last("ratio")
    low, high = event.number("low"), event.number("high")
    null = event.numbers("null_slopes")
    ours = f"{event.number('slope'):.3f} {between(event)}"
    inside = min(null) <= high and low <= max(null)
    flat = low <= 0 <= high
    return Finding(
        decide(reproduced=flat and not inside, contradicted=not flat and not inside),
        ours,
        event,
        "noise-free laws of slope .50, .51 and .70 give "
        + ", ".join(f"{value:.3f}" for value in null)
        + " on the same runs: the estimate cannot tell them apart"
        if inside
        else "the interval lies outside what noise-free laws give",
    )


@paper_claim(
    "C3",
    section="4.1",
    says="The hull is more robust than a binned envelope when models are few",
    paper="a figure",
    rule="reproduced if the range over left-out models is smaller for the hull than for 750 bins",
    scales=BOTH,
)
def hull_robust(records: Records) -> Finding:
    """Leave-one-model-out range of the hull and of 750 bins."""
    record = published(records)
    hull = record.only("left_out", estimator="hull")
    bins = record.only("left_out", estimator="750 bins")
    spread = {
        name: event.number("high") - event.number("low")
        for name, event in (("hull", hull), ("bins", bins))
    }
    return Finding(
        "reproduced" if spread["hull"] < spread["bins"] else "contradicted",
        f"range over left-out models: hull {spread['hull']:.3f}, 750 bins {spread['bins']:.3f}",
        hull,
        f"on a noise-free law the hull is off by {hull.number('bias_on_fitted_law'):+.3f} and the "
        f"bins by {bins.number('bias_on_fitted_law'):+.3f}",
    )


@paper_claim(
    "C4",
    section="5, table of slopes",
    says="Approach 1's slope depends on the selection of data",
    paper=".458 to .799",
    rule="reproduced if the swing exceeds that of noise-free laws by more than its interval",
    scales=BOTH,
)
def swing_of_envelopes(records: Records) -> Finding:
    """Movement of the hull slope with the token floor, here and on noise-free laws."""
    record = published(records)
    first = record.only("envelope", estimator="hull", selection="T >= 0B")
    last = record.only("envelope", estimator="hull", selection="T >= 120B")
    swing = last.number("slope") - first.number("slope")
    ends = (event.numbers("null_slopes") for event in (first, last))
    null = [b - a for a, b in zip(*ends, strict=True)]
    reach = (
        math.hypot(
            first.number("high") - first.number("low"), last.number("high") - last.number("low")
        )
        / 2
    )
    beyond = all(abs(swing - clean) > reach for clean in null)
    return Finding(
        "reproduced" if beyond else "inconclusive",
        f"{swing:+.3f} +- {reach:.3f}; noise-free laws {min(null):+.3f} to {max(null):+.3f}",
        last,
        "the swing exceeds what any of the noise-free laws shows on the same runs"
        if beyond
        else "a law that does not change with the selection swings as far, so the swing is the design's",
    )
