"""Estimators on losses whose law is known: the design null, and coverage.

The same runs, token counts and budgets, with losses from a known law. Without noise, what differs
from that law is the estimator's bias on this design; with noise, how often an interval covers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from fourfold_gemstones.architecture import GEMSTONES
from fourfold_gemstones.laws import WIDTH_DEPTH, PowerLaw
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.runs import Grouping, RunTable
from fourfold_gemstones.uncertainty import Functional, Law, bootstrap, slope

HALF = PowerLaw(
    variables=("parameters", "tokens"),
    log_coefficients=(float(np.log(400.0)), float(np.log(1500.0))),
    exponents=(0.34, 0.34),
    log_floor=float(np.log(1.8)),
)
"""A law with a = 1/2."""
EPOCH = PowerLaw(
    variables=("parameters", "tokens"),
    log_coefficients=(float(np.log(482.01)), float(np.log(2085.43))),
    exponents=(0.3478, 0.3658),
    log_floor=float(np.log(1.8172)),
)
"""Chinchilla as refitted by Besiroglu et al. 2024: a = 0.513."""


SAMPLE = PowerLaw(
    variables=WIDTH_DEPTH,
    log_coefficients=(1.08, -0.22, 6.1, 10.5),
    exponents=(0.22, 0.48, 0.36, 0.49),
    log_floor=0.43,
)
"""A law in width, depth, parameters and tokens, near the published one; `sample` follows it."""
SAMPLE_SHAPES = (
    (256, 8), (256, 23), (256, 40), (384, 12), (512, 6), (512, 12), (512, 24), (640, 30),
    (768, 4), (768, 40), (1024, 16), (1024, 28), (1280, 7), (1280, 36), (1536, 10), (1792, 7),
    (2048, 12), (2048, 27), (2560, 8), (3072, 12),
)  # fmt: skip
"""Widths and depths of the sample's runs."""


def sample() -> RunTable:
    """A made-up table of runs to try things on: twenty runs of `SAMPLE`, twelve checkpoints each.

    From 5 to 300 billion tokens; log losses err by .1 % along a run. Nothing of it was trained.
    """
    tokens = np.geomspace(5e9, 3e11, 12).round(-6)
    width, depth, count = (
        np.asarray(column, dtype=float)
        for column in zip(*[(w, d, t) for w, d in SAMPLE_SHAPES for t in tokens], strict=True)
    )
    table = RunTable.from_columns(
        {
            "run": [f"{w:g}x{d:g}" for w, d in zip(width, depth, strict=True)],
            "width": width,
            "depth": depth,
            "parameters": GEMSTONES.parameters(width, depth),
            "tokens": count,
            "loss_nats": np.ones_like(count),
        },
        architecture=GEMSTONES,
        source="the sample",
    )
    generator = np.random.default_rng(0)
    erring = noisy(table, SAMPLE, run_sd=0.001, correlation=0.95, generator=generator)
    return replace(table.with_losses(erring.column("loss_nats").round(5)), source="the sample")


def balanced(table: RunTable, *, alpha: float, beta: float) -> PowerLaw:
    """A law of given exponents whose three parts are each one nat at the table's mean size and tokens.

    For suites of another size than the published one, at which `HALF` and `EPOCH` predict nonsense.
    """
    size = float(np.log(table.column("parameters")).mean())
    tokens = float(np.log(table.column("tokens")).mean())
    return PowerLaw(
        variables=("parameters", "tokens"),
        log_coefficients=(alpha * size, beta * tokens),
        exponents=(alpha, beta),
        log_floor=0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Null:
    """One estimator on noise-free losses of one law."""

    true_slope: float
    estimated_slope: float

    @property
    def bias(self) -> float:
        """Estimate less truth."""
        return self.estimated_slope - self.true_slope


def noise_free(table: RunTable, truth: PowerLaw) -> RunTable:
    """The same runs with the losses of `truth`."""
    inputs = ParametricLaw(variables=truth.variables).inputs(table)
    return table.with_losses(truth.loss(inputs))


def noisy(
    table: RunTable,
    truth: PowerLaw,
    *,
    run_sd: float,
    correlation: float,
    generator: np.random.Generator,
) -> RunTable:
    """The losses of `truth` times exp(noise): a stationary AR(1) along each run.

    `run_sd` is the standard deviation of log loss at any row; `correlation` that of neighbours.
    """
    clean = noise_free(table, truth)
    _, index = table.groups("run")
    noise = np.empty(len(table))
    for run in range(index.max() + 1):
        rows = np.flatnonzero(index == run)
        shocks = generator.normal(size=len(rows))
        value = shocks[0]
        for row, shock in zip(rows, shocks, strict=True):
            if row != rows[0]:
                value = correlation * value + np.sqrt(1 - correlation**2) * shock
            noise[row] = run_sd * value
    return table.with_losses(clean.column("loss_nats") * np.exp(noise))


def design_null(
    table: RunTable,
    law: Law,
    truths: Sequence[PowerLaw] = (HALF, EPOCH),
) -> tuple[Null, ...]:
    """The estimator on noise-free losses over the table's own design, once per truth.

    Where two truths of different slope give one estimate, the estimate is about the design and not
    about the law.
    """
    return tuple(
        Null(
            true_slope=truth.slope,
            estimated_slope=slope(law.fit(noise_free(table, truth)).estimate),
        )
        for truth in truths
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The share of nominal intervals that contain the truth."""

    suites: int
    covered: int
    level: float
    mean_width: float

    @property
    def share(self) -> float:
        """Covered over simulated."""
        return self.covered / self.suites


def coverage(
    table: RunTable,
    law: ParametricLaw,
    truth: PowerLaw,
    *,
    functional: Functional = slope,
    suites: int,
    draws: int,
    run_sd: float,
    correlation: float,
    groups: Sequence[Grouping],
    seed: int,
    level: float = 0.95,
) -> tuple[Coverage, ...]:
    """Coverage of the bootstrap interval for each way of grouping, on the same simulated suites."""
    true = functional(truth)
    covers: Float[np.ndarray, "group suite"] = np.zeros((len(groups), suites))
    width = np.zeros((len(groups), suites))
    for suite in range(suites):
        generator = np.random.default_rng((seed, suite))
        fit = law.fit(
            noisy(table, truth, run_sd=run_sd, correlation=correlation, generator=generator)
        )
        for row, by in enumerate(groups):
            interval = bootstrap(fit, draws=draws, generator=generator, groups=by).interval(
                functional, level=level
            )
            covers[row, suite] = interval.contains(true)
            width[row, suite] = interval.high - interval.low
    return tuple(
        Coverage(
            suites=suites,
            covered=int(covers[row].sum()),
            level=level,
            mean_width=float(width[row].mean()),
        )
        for row in range(len(groups))
    )
