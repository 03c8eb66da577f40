"""Identifiability before any number: can these runs tell a law's parameters, and which run would help most?

A descent always ends somewhere. Six sizes trained on one number of tokens fit Chinchilla's law as well with
alpha .2 as with .5, and nothing in the fit says so. The questions here are asked first: does each variable
vary, and over how wide a range; how wide are the intervals over runs; is one exponent told only through
another; and what would one more run change, for its cost?
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from fourfold_gemstones.questions.forecast import planned
from fourfold_gemstones.runs import RunTable
from fourfold_gemstones.uncertainty import FEW_GROUPS, Bootstrap, Interval, bootstrap

NARROW = 4.0
"""Ratio of the ends of a variable's range below which an exponent of it is told by next to nothing."""
WIDE = 1.0
"""Width of a 95 % interval, over the estimate, above which a parameter is not told."""
TIED = 0.95
"""Correlation over draws above which two parameters are told only together."""
COSTS = (0.1, 0.3, 1.0, 3.0)
"""Costs of a next run, over that of the dearest run there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A parameter with its interval over runs."""

    name: str
    estimate: float
    interval: Interval

    @property
    def identified(self) -> bool:
        """True where the interval is narrow beside the estimate, and leaves zero out."""
        width = self.interval.high - self.interval.low
        return width <= WIDE * abs(self.estimate) and not self.interval.contains(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NextRun:
    """A run that would narrow the worst-told parameter, for its cost."""

    inputs: dict[str, float]
    cost: float
    """6 N T."""
    shrinks: float
    """Share of the parameter's standard deviation that it is expected to remove."""

    def __str__(self) -> str:
        of = ", ".join(f"{name} {value:.3g}" for name, value in self.inputs.items())
        return f"{of} ({self.cost:.2g} FLOPs): {100 * self.shrinks:.0f} % narrower"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identification:
    """Reasons not to read a law's parameters, the parameters with intervals, and runs that would help."""

    reasons: tuple[str, ...]
    told: tuple[Told, ...]
    worst: str
    """The parameter that is told worst, or "" where the law could not be fitted."""
    next_runs: tuple[NextRun, ...]

    @property
    def identified(self) -> bool:
        """True where there is no reason."""
        return not self.reasons


def exponents(fit: Any) -> dict[str, int]:
    """Positions, in an estimate's vector, of the parameters that say how fast loss falls."""
    if hasattr(fit.law, "form"):
        form = fit.law.form
        return {
            shape.name: len(form.terms) + at
            for at, shape in enumerate(form.shapes)
            if not shape.name.startswith("log_")
        }
    variables = fit.law.variables
    return {f"exponent of {name}": len(variables) + at for at, name in enumerate(variables)}


def vector(estimate: Any) -> Float[np.ndarray, " parameter"]:
    """The parameters of an estimate of either kind of law."""
    return np.asarray(estimate.values) if hasattr(estimate, "form") else estimate.vector()


def _ranges(law: Any, table: RunTable) -> Iterator[str]:
    """Variables that vary too little."""
    for name, values in law.inputs(table).items():
        ratio = float(values.max() / values.min())
        if ratio < 1 + 1e-9:
            yield (
                f"{name} is {values[0]:.4g} in all rows: what it does cannot be told; a run at "
                f"{values[0] / 4:.3g} and one at {values[0] * 4:.3g} would tell"
            )
        elif ratio < NARROW:
            yield f"{name} varies by a factor of {ratio:.2g} only, and a law needs {NARROW:g} and more"


def identify(
    law: Any, table: RunTable, *, draws: int, generator: np.random.Generator
) -> Identification:
    """Whether a table tells a law's exponents, asked of its ranges, its fit and its draws over runs."""
    reasons = list(_ranges(law, table))
    runs = len(set(table.run))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = law.fit(table)
            drawn = bootstrap(fit, draws=draws, generator=generator)
    except ValueError as refusal:
        return Identification(reasons=(*reasons, str(refusal)), told=(), worst="", next_runs=())
    if runs < FEW_GROUPS:
        reasons.append(
            f"there are {runs} runs; below {FEW_GROUPS} intervals over runs are too narrow"
        )
    vectors = np.stack([vector(estimate) for estimate in drawn.estimates])
    positions = exponents(fit)
    best = vector(fit.estimate)
    told = tuple(
        Told(name=name, estimate=float(best[at]), interval=_interval(vectors[:, at]))
        for name, at in positions.items()
    )
    reasons += [
        f"{parameter.name} is {parameter.estimate:.3g}, 95 % {parameter.interval}: these runs do not tell it"
        for parameter in told
        if not parameter.identified
    ]
    reasons += _ties(told, vectors, positions)
    if fit.certificate.at_bound:
        reasons.append(f"at its bound: {', '.join(fit.certificate.at_bound)}")
    worst = max(told, key=_relative_width)
    return Identification(
        reasons=tuple(reasons),
        told=told,
        worst=worst.name,
        next_runs=tuple(_next_runs(fit, drawn, vectors[:, positions[worst.name]])),
    )


def _interval(values: Float[np.ndarray, " draw"]) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(low=float(low), high=float(high), level=0.95)


def _relative_width(parameter: Told) -> float:
    width = parameter.interval.high - parameter.interval.low
    return width / max(abs(parameter.estimate), 1e-3)


def _ties(
    told: tuple[Told, ...],
    vectors: Float[np.ndarray, "draw parameter"],
    positions: dict[str, int],
) -> Iterator[str]:
    """Pairs of parameters of which neither is told alone."""
    loose = [parameter.name for parameter in told if not parameter.identified]
    for number, first in enumerate(loose):
        for second in loose[number + 1 :]:
            pair = vectors[:, [positions[first], positions[second]]]
            if (pair.std(axis=0) > 0).all():
                tie = float(np.corrcoef(pair.T)[0, 1])
                if abs(tie) > TIED:
                    yield (
                        f"{first} and {second} cannot be told apart: their correlation over draws is "
                        f"{tie:.2f}"
                    )


def _next_runs(fit: Any, drawn: Bootstrap, values: Float[np.ndarray, " draw"]) -> Iterator[NextRun]:
    """For each cost, the run whose loss would narrow a parameter most.

    Observing a loss with the error of a run narrows what varies with it over the draws: the variance of the
    parameter falls by Cov² / (Var + error²), as in linear Gaussian updating.
    """
    table: RunTable = fit.table
    inputs = fit.law.inputs(table)
    if (
        "tokens" not in inputs
        or not table.has("parameters")
        or not set(inputs)
        <= {
            "parameters",
            "tokens",
            "unique_tokens",
        }
    ):
        return  # shapes, loops and rates are planned by `suggest_next`
    size, tokens = table.column("parameters"), table.column("tokens")
    dearest = float((6 * size * tokens).max())
    residual = np.log(table.column("loss_nats") / fit.predict(table))
    error = max(float(residual.std()), 1e-4)
    spread = float(values.std())
    if not spread > 0:
        return
    for part in COSTS:
        grid = np.geomspace(size.min() / 4, size.max() * 4, 25)
        data = part * dearest / (6 * grid)
        near = (data >= tokens.min() / 8) & (data <= tokens.max() * 8)
        grid, data = grid[near], data[near]
        if not len(grid):
            continue
        plans = {
            f"plan {row}": {"parameters": float(n), "tokens": float(t)}
            | ({"unique_tokens": float(t)} if "unique_tokens" in inputs else {})
            for row, (n, t) in enumerate(zip(grid, data, strict=True))
        }
        plan = planned(plans, table)
        seen = fit.law.inputs(plan)
        told = np.log(np.stack([estimate.loss(seen) for estimate in drawn.estimates]))
        told = told - told.mean(axis=0)
        covariance = (values - values.mean()) @ told / (len(values) - 1)
        variance = np.square(told).sum(axis=0) / (len(values) - 1) + error**2
        left = np.sqrt(np.maximum(1 - covariance**2 / variance / spread**2, 0.0))
        best = int(np.argmin(left))
        yield NextRun(
            inputs=plans[f"plan {best}"], cost=part * dearest, shrinks=float(1 - left[best])
        )


def said(identification: Identification) -> Iterator[str]:
    """Sentences for a terminal, the verdict first."""
    if identification.identified:
        yield "these runs tell the law's exponents:"
    else:
        yield "NOT IDENTIFIED by these runs:"
        yield from (f"  {reason}" for reason in identification.reasons)
    for parameter in identification.told:
        yield f"  {parameter.name}: {parameter.estimate:.3f}, 95 % {parameter.interval}"
    if identification.next_runs:
        yield f"to narrow {identification.worst}, one more run of"
        yield from (f"  {run}" for run in identification.next_runs)
