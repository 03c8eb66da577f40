"""The profile of a functional: the least objective at each of its values, and the interval that gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import chi2

from fourfold_gemstones.laws import PowerLaw
from fourfold_gemstones.minimise import (
    PATIENCE,
    Derivatives,
    Descent,
    Parameters,
    Problem,
    descend,
    thresholds,
)
from fourfold_gemstones.parametric import ParametricFit
from fourfold_gemstones.uncertainty import UNDEFINED, Bootstrap, Interval, percentile_interval


@dataclass(frozen=True, slots=True)
class Spring:
    """An objective plus a spring that pulls a functional of each start towards its target.

    The least of the sum is the least of the objective alone among all parameters with the value of
    the functional that was reached, however stiff the spring.
    """

    free: Descent
    functional: Callable[[Float[np.ndarray, " parameter"]], float]
    targets: Float[np.ndarray, " start"]
    stiffness: float

    def value(self, theta: Parameters, delta: float) -> Float[np.ndarray, " start"]:
        """Objective and energy of the spring; infinite where the functional has no value."""
        reached = np.asarray([self.functional(row) for row in theta])
        energy = 0.5 * self.stiffness * (reached - self.targets) ** 2
        total = self.free.value(theta, delta) + energy
        return np.where(np.isfinite(total), total, np.inf)

    def derivatives(self, theta: Parameters, delta: float) -> Derivatives:
        """Those of the objective, and the spring's by central differences of the functional."""
        gradient, hessian, scale = self.free.derivatives(theta, delta)
        step = 1e-5 * np.eye(theta.shape[1])
        for start, row in enumerate(theta):
            pull = self.functional(row) - self.targets[start]
            slope = np.asarray(
                [(self.functional(row + s) - self.functional(row - s)) / 2e-5 for s in step]
            )
            slope = np.where(np.isfinite(slope), slope, 0.0)
            gradient[start] += self.stiffness * pull * slope
            hessian[start] += self.stiffness * np.outer(slope, slope)
            scale[start] += self.stiffness * slope**2
        return gradient, hessian, scale

    def slopes(self, theta: Parameters) -> Float[np.ndarray, "start parameter row"]:
        """Those of the objective: a spring has no rows."""
        return self.free.slopes(theta)

    def select(self, keep: Bool[np.ndarray, " start"]) -> Spring:
        """The same springs for some of the starts."""
        return Spring(self.free.select(keep), self.functional, self.targets[keep], self.stiffness)


def pinned(
    problem: Problem,
    parameters: Float[np.ndarray, " parameter"],
    functional: Callable[[Float[np.ndarray, " parameter"]], float],
    targets: Float[np.ndarray, " start"],
    *,
    stiffness: float,
) -> tuple[Float[np.ndarray, " start"], Float[np.ndarray, " start"]]:
    """Values of `functional` that were reached, and the least objective at each of them.

    A spring gives way, so that the value is read where its descent ended. The targets are approached
    one after another, away from `parameters`, each from the solution of its neighbour.
    """
    lower, upper = problem.bounds()

    def uncentred(theta: Float[np.ndarray, " parameter"]) -> Float[np.ndarray, " parameter"]:
        return problem.uncentred(theta[None])[0]

    start = problem.centred(parameters[None])[0]
    free = problem.descent(np.ones((1, len(problem.log_loss))))
    origin = functional(parameters)
    reached, least = np.empty(len(targets)), np.empty(len(targets))
    for side in (targets >= origin, targets < origin):
        theta = start[None]
        for index in np.flatnonzero(side)[np.argsort(np.abs(targets[side] - origin))]:
            spring = Spring(
                free, lambda row: functional(uncentred(row)), targets[[index]], stiffness
            )
            for delta in thresholds(problem.delta)[-3:]:
                theta, _ = descend(
                    spring,
                    theta,
                    delta,
                    lower=lower,
                    upper=upper,
                    steps=80,
                    tolerance=1e-10,
                    patience=PATIENCE,
                )
            reached[index] = functional(uncentred(theta[0]))
            least[index] = free.value(theta, problem.delta)[0]
    return reached, least


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """The least objective at each value of a functional, and the interval it gives.

    A Huber objective is no log likelihood, and rows of a run are not independent, so the curve is
    scaled: half a unit at one bootstrap standard error either side of the estimate. Its shape is
    the law's, its width the clusters'.
    """

    values: Float[np.ndarray, " point"]
    excess: Float[np.ndarray, " point"]
    """Objective above its minimum, in the scaled unit: the interval ends at chi2/2."""
    estimate: float
    interval: Interval


def profile(
    fit: ParametricFit,
    functional: Callable[[PowerLaw], float],
    draws: Bootstrap,
    *,
    points: int = 31,
    level: float = 0.95,
) -> Profile:
    """Profile of any functional of a power law."""
    values = draws.values(functional)
    low, high = percentile_interval(values, 0.95).low, percentile_interval(values, 0.95).high
    error = (high - low) / (2 * 1.96)
    estimate = functional(fit.estimate)
    problem = fit.law.problem(fit.table)
    targets = np.linspace(estimate - 3.5 * error, estimate + 3.5 * error, points)

    def of_vector(vector: Float[np.ndarray, " parameter"]) -> float:
        try:
            return functional(PowerLaw.from_vector(fit.law.variables, vector))
        except UNDEFINED:
            return float("nan")

    reached, least = pinned(
        problem,
        fit.estimate.vector(),
        of_vector,
        targets,
        stiffness=100 * fit.objective / error**2,
    )
    order = np.argsort(reached)
    reached, excess = reached[order], np.maximum(least[order] - fit.objective, 0.0)
    beside = np.interp([estimate - error, estimate + error], reached, excess)
    excess = excess * 0.5 / max(float(beside.mean()), 1e-300)
    threshold = float(chi2.ppf(level, 1)) / 2
    below, above = reached <= estimate, reached >= estimate
    ends = (
        np.interp(-threshold, -excess[below], reached[below]),
        np.interp(threshold, excess[above], reached[above]),
    )
    return Profile(
        values=reached,
        excess=excess,
        estimate=estimate,
        interval=Interval(low=float(ends[0]), high=float(ends[1]), level=level),
    )
