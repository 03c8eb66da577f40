"""Estimators on losses whose law is known: the design null, and coverage.

The same runs, token counts and budgets, with losses from a known law. Without noise, what differs
from that law is the estimator's bias on this design; with noise, how often an interval covers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fourfold_gemstones.envelope import EnvelopeLaw, IsoFlopLaw
from fourfold_gemstones.laws import PowerLaw
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.runs import Grouping, RunTable
from fourfold_gemstones.uncertainty import Functional, bootstrap, slope

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
    law: EnvelopeLaw | IsoFlopLaw | ParametricLaw,
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
