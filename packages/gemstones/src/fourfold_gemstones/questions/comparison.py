"""Two laws side by side: error on runs that were held out, and information criteria."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from fourfold_gemstones.form import FormFit, FormLaw
from fourfold_gemstones.laws import CHINCHILLA
from fourfold_gemstones.parametric import LawWarning, ParametricFit, ParametricLaw
from fourfold_gemstones.runs import RunTable
from fourfold_gemstones.uncertainty import (
    Interval,
    paired_bootstrap,
    percentile_interval,
    slope,
)

SLOPED = (CHINCHILLA, ("effective_parameters", "tokens"))
"""Variables of laws whose optimum has a closed form."""
Rows = Callable[[RunTable], Bool[np.ndarray, " row"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A way of holding runs out: fit on some rows, judge on others, chosen beforehand."""

    name: str
    fit: Rows
    judge: Rows

    def apply(self, table: RunTable) -> tuple[RunTable, RunTable]:
        """Both parts.

        Raises:
            ValueError: They overlap, or one is empty.
        """
        left, right = self.fit(table), self.judge(table)
        if not left.any() or not right.any() or (left & right).any():
            raise ValueError(
                f"split {self.name!r} of {table.source} keeps {left.sum()} rows to fit and "
                f"{right.sum()} to judge, {(left & right).sum()} of them the same; choose thresholds "
                "inside the range of the table"
            )
        return table.where(left), table.where(right)


def _between(name: str, low: float, high: float) -> Rows:
    return lambda table: (table.column(name) >= low) & (table.column(name) <= high)


def _both(first: Rows, second: Rows) -> Rows:
    return lambda table: first(table) & second(table)


GEMSTONE_SPLITS = (
    Split(
        name="N <= 600M -> 1B",
        fit=_between("parameters", 0.0, 6e8),
        judge=_between("parameters", 9e8, 1.2e9),
    ),
    Split(
        name="N <= 600M -> 2B",
        fit=_between("parameters", 0.0, 6e8),
        judge=_between("parameters", 1.8e9, np.inf),
    ),
    Split(
        name="N <= 1.1B -> 2B",
        fit=_between("parameters", 0.0, 1.1e9),
        judge=_between("parameters", 1.8e9, np.inf),
    ),
    Split(
        name="T <= 100B -> T > 300B",
        fit=_between("tokens", 0.0, 1.001e11),
        judge=_between("tokens", 3.001e11, np.inf),
    ),
    Split(
        name="N <= 600M and T <= 100B -> 2B and T > 300B",
        fit=_both(_between("parameters", 0.0, 6e8), _between("tokens", 0.0, 1.001e11)),
        judge=_both(_between("parameters", 1.8e9, np.inf), _between("tokens", 3.001e11, np.inf)),
    ),
    Split(
        name="d <= 28 -> d >= 36",
        fit=_between("depth", 0.0, 28.0),
        judge=_between("depth", 36.0, np.inf),
    ),
    Split(
        name="w >= 384 -> w = 256",
        fit=_between("width", 384.0, np.inf),
        judge=_between("width", 0.0, 256.0),
    ),
)
"""Jumps in size, in tokens, in both, in depth and in width, on the published suite."""


def mean_error(law: ParametricLaw | FormLaw, table: RunTable, split: Split) -> float:
    """Mean absolute log error on the judged rows of the law fitted to the others."""
    left, right = split.apply(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        fit = law.fit(left)
    return float(np.abs(np.log(right.column("loss_nats") / fit.predict(right))).mean())


def quantile_errors(
    law: ParametricLaw | FormLaw,
    table: RunTable,
    split: Split,
    quantiles: Sequence[float] = (0.5, 0.25, 0.1),
) -> Mapping[float, float]:
    """Held-out error of the law as a quantile of the rows, for each of some: a middle, or a frontier.

    Where runs were tuned badly, they lie above what their size and tokens can reach, and none lies below. The
    error on runs that were tuned well says which quantile is theirs. A penalty on what is overestimated is
    the same choice under another name: (1 - q) / q.

    Raises:
        ValueError: A quantile is not in (0, .5], or the split keeps no rows.
    """
    for quantile in quantiles:
        if not 0 < quantile <= 0.5:
            raise ValueError(f"quantile={quantile} must be above 0 and at most .5, the middle")
    return {
        quantile: mean_error(replace(law, overestimate=(1 - quantile) / quantile), table, split)
        for quantile in quantiles
    }


def corrected_aic(fit: ParametricFit | FormFit) -> float:
    """AICc under Laplace errors of log loss, whose scale is profiled out.

    Rows of a run are not independent, so that differences are too large by about the number of
    rows per run: order laws by it, and judge them by held-out error.
    """
    residual = np.log(fit.table.column("loss_nats") / fit.predict(fit.table))
    rows, parameters = len(residual), fit.law.unknowns + 1
    if rows <= parameters + 1:
        raise ValueError(
            f"{fit.table.source} has {rows} rows, and AICc of a law with {parameters} parameters needs "
            f"{parameters + 2}; add runs"
        )
    deviance = 2 * rows * (1 + float(np.log(2 * np.abs(residual).mean())))
    return deviance + 2 * parameters * rows / (rows - parameters - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two laws on one table."""

    errors: Mapping[str, tuple[float, float]]
    """Mean absolute log error by split, first and second law."""
    corrected_aic: tuple[float, float]
    slope_difference: Interval | NoSlope
    """First less second over the same draws of runs."""

    @property
    def wins(self) -> int:
        """Splits on which the first law is the better."""
        return sum(first < second for first, second in self.errors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class NoSlope:
    """At least one of the laws has no closed-form slope."""


def compare(
    first: ParametricLaw | FormLaw,
    second: ParametricLaw | FormLaw,
    table: RunTable,
    splits: Sequence[Split],
    *,
    draws: int,
    generator: np.random.Generator,
) -> Comparison:
    """Held-out errors, information criteria, and the paired difference in slope."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        fits = first.fit(table), second.fit(table)
        sloped = all(
            isinstance(law, ParametricLaw) and law.variables in SLOPED for law in (first, second)
        )
        apart: Interval | NoSlope = NoSlope()
        if sloped:
            both = paired_bootstrap(fits, draws=draws, generator=generator, groups="run")
            values: Float[np.ndarray, " draw"] = both[0].values(slope) - both[1].values(slope)
            apart = percentile_interval(values, 0.95)
    return Comparison(
        errors={
            split.name: (mean_error(first, table, split), mean_error(second, table, split))
            for split in splits
        },
        corrected_aic=(corrected_aic(fits[0]), corrected_aic(fits[1])),
        slope_difference=apart,
    )
