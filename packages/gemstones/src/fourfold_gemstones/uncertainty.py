"""Intervals of an estimate: bootstraps over runs, paired differences, leave-one-out.

Checkpoints of one run share that run's luck: its initialisation, its learning rate's fit to its
shape, the error of the law at its shape. Drawing rows as if they were independent gives intervals
that are far too narrow (`coverage` measures it), so what is drawn here is whole runs or shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from fourfold_gemstones.parametric import LawWarning
from fourfold_gemstones.runs import Grouping, RunTable

Functional = Callable[[Any], float]
"""A number read off an estimate: a slope, a prescription at a budget, a predicted loss."""
UNDEFINED = (ValueError, ZeroDivisionError, FloatingPointError, OverflowError)
"""Errors that a functional may raise on an estimate that has no such value."""
FEW_GROUPS = 8
"""Below this many groups a percentile interval is too narrow (Cameron, Gelbach and Miller 2008)."""


@runtime_checkable
class Law(Protocol):
    """An estimator that can be resampled and simulated: every form of law is one."""

    def fit(self, table: RunTable, /) -> Fit:
        """The fit to a table; the estimator itself does not change."""
        ...

    def refits(
        self, fit: Any, table: RunTable, weights: Float[np.ndarray, "draw row"], /
    ) -> tuple[Any, ...]:
        """One estimate per row of weights."""
        ...


@runtime_checkable
class Fit(Protocol):
    """A fit that can be resampled."""

    @property
    def law(self) -> Any:
        """The estimator."""
        ...

    @property
    def table(self) -> RunTable:
        """The rows it was fitted to."""
        ...

    @property
    def estimate(self) -> Any:
        """The value that functionals are read off."""
        ...

    def predict(self, table: RunTable, /) -> Float[np.ndarray, " row"]:
        """One number a row: a loss, or what is prescribed at the row's resource."""
        ...

    def score(self, table: RunTable, /) -> float:
        """Share of the variance of the logarithm that the fit explains (R²)."""
        ...


def slope(estimate: Any) -> float:
    """The exponent of compute in the prescription: of a power law or of a line."""
    return estimate.slope


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An interval, of the confidence it was asked for."""

    low: float
    high: float
    level: float

    def contains(self, value: float) -> bool:
        """True where `value` lies in it, ends included."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"[{self.low:.3f}, {self.high:.3f}]"


def percentile_interval(values: Float[np.ndarray, " draw"], level: float) -> Interval:
    """The central share `level` of the finite values."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1; for example 0.95")
    finite = values[np.isfinite(values)]
    if len(finite) < 20:
        raise ValueError(
            f"{len(finite)} of {len(values)} draws gave a finite value, and an interval needs 20; "
            "draw more, or choose a law that these runs identify"
        )
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), level=level)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bootstrap:
    """Estimates from resampled groups."""

    estimates: tuple[Any, ...]
    groups: Grouping
    number_of_groups: int

    def values(self, functional: Functional) -> Float[np.ndarray, " draw"]:
        """The functional on every draw; what it cannot be computed on gives NaN."""
        values = np.full(len(self.estimates), np.nan)
        for draw, estimate in enumerate(self.estimates):
            try:
                values[draw] = functional(estimate)
            except UNDEFINED:
                continue
        return values

    def interval(self, functional: Functional, *, level: float = 0.95) -> Interval:
        """Percentile interval of the functional."""
        return percentile_interval(self.values(functional), level)

    def standard_error(self, functional: Functional) -> float:
        """Standard deviation over the draws."""
        return float(np.nanstd(self.values(functional), ddof=1))


def group_counts(
    groups: int, draws: int, generator: np.random.Generator
) -> Float[np.ndarray, "draw group"]:
    """Draws of each group, with replacement, as many as there are groups."""
    if groups < 2:
        raise ValueError(f"{groups} group cannot be resampled; add runs, or group by row")
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1; 400 gives intervals to some 0.01")
    shares = np.full(groups, 1 / groups)
    return generator.multinomial(groups, shares, size=draws).astype(np.float64)


def bootstrap(
    fit: Fit, *, draws: int, generator: np.random.Generator, groups: Grouping = "run"
) -> Bootstrap:
    """Refit to resampled groups.

    Warns:
        LawWarning: There are fewer than `FEW_GROUPS` groups.
    """
    names, index = fit.table.groups(groups)
    if len(names) < FEW_GROUPS:
        warnings.warn(
            f"{fit.table.source} has {len(names)} groups by {groups}; below {FEW_GROUPS} a bootstrap "
            "interval is too narrow",
            LawWarning,
            stacklevel=2,
        )
    weights = group_counts(len(names), draws, generator)[:, index]
    return Bootstrap(
        estimates=fit.law.refits(fit, fit.table, weights),
        groups=groups,
        number_of_groups=len(names),
    )


def paired_bootstrap(
    fits: Sequence[Fit],
    *,
    draws: int,
    generator: np.random.Generator,
    groups: Grouping = "shape",
) -> tuple[Bootstrap, ...]:
    """Refit several tables of the same groups to the same draws of groups.

    What the draws share, most of their luck, cancels in a difference.

    Raises:
        ValueError: The tables do not have the same groups.
    """
    named = [fit.table.groups(groups) for fit in fits]
    common = set(named[0][0])
    for fit, (names, _) in zip(fits, named, strict=True):
        odd = sorted(common.symmetric_difference(names))
        if odd:
            raise ValueError(
                f"{fit.table.source} and {fits[0].table.source} differ in the groups {odd[:8]}; "
                "keep what they share: table.where(...) on both"
            )
    counts = group_counts(len(common), draws, generator)
    return tuple(
        Bootstrap(
            estimates=fit.law.refits(fit, fit.table, counts[:, index]),
            groups=groups,
            number_of_groups=len(names),
        )
        for fit, (names, index) in zip(fits, named, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference of a functional between two fits, over shared draws."""

    estimate: float
    interval: Interval
    share_above_zero: float

    @property
    def excludes_zero(self) -> bool:
        """True where the interval does not contain zero."""
        return not self.interval.contains(0.0)


def difference(
    fits: tuple[Fit, Fit],
    draws: tuple[Bootstrap, Bootstrap],
    functional: Functional,
    *,
    level: float = 0.95,
) -> Difference:
    """First less second; `draws` are theirs from one `paired_bootstrap`."""
    apart = draws[0].values(functional) - draws[1].values(functional)
    return Difference(
        estimate=functional(fits[0].estimate) - functional(fits[1].estimate),
        interval=percentile_interval(apart, level),
        share_above_zero=float(np.mean(apart[np.isfinite(apart)] > 0)),
    )


def shared_groups(tables: Sequence[RunTable], groups: Grouping = "shape") -> tuple[RunTable, ...]:
    """The rows of each table whose group is in every table."""
    named = [table.groups(groups) for table in tables]
    common = set.intersection(*(set(names) for names, _ in named))
    return tuple(
        table.where(np.asarray([name in common for name in names])[index])
        for table, (names, index) in zip(tables, named, strict=True)
    )


def leave_one_out(
    fit: Fit, functional: Functional, *, groups: Grouping = "run"
) -> Mapping[str, float]:
    """The functional without each group in turn, by the group's name."""
    names, index = fit.table.groups(groups)
    weights = (index[None] != np.arange(len(names))[:, None]).astype(np.float64)
    estimates = fit.law.refits(fit, fit.table, weights)
    return {name: functional(estimate) for name, estimate in zip(names, estimates, strict=True)}
