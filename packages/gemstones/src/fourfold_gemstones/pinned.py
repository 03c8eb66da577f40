"""The least objective at each value of a functional: what a profile is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from fourfold_gemstones.solve import (
    PATIENCE,
    Descent,
    Parameters,
    Problem,
    bounds,
    descend,
    thresholds,
)


@dataclass(frozen=True, slots=True)
class _Pinned(Descent):
    """The objective plus a spring that pulls a functional of each start towards its target.

    The least of the sum is the least of the objective alone among all parameters with the value of
    the functional that was reached, however stiff the spring.
    """

    functional: Callable[[Float[np.ndarray, " parameter"]], float]
    targets: Float[np.ndarray, " start"]
    stiffness: float

    def value(self, theta: Parameters, delta: float) -> Float[np.ndarray, " start"]:
        reached = np.asarray([self.functional(row) for row in theta])
        free = Descent(self.log_inputs, self.log_loss, self.weights).value(theta, delta)
        total = free + 0.5 * self.stiffness * (reached - self.targets) ** 2
        return np.where(np.isfinite(total), total, np.inf)

    def derivatives(
        self, theta: Parameters, delta: float
    ) -> tuple[
        Float[np.ndarray, "start parameter"],
        Float[np.ndarray, "start parameter parameter"],
        Float[np.ndarray, "start parameter"],
    ]:
        free = Descent(self.log_inputs, self.log_loss, self.weights)
        gradient, hessian, scale = free.derivatives(theta, delta)
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

    def select(self, keep: Bool[np.ndarray, " start"]) -> _Pinned:
        return _Pinned(
            self.log_inputs,
            self.log_loss,
            self.weights,
            self.functional,
            self.targets[keep],
            self.stiffness,
        )


def pinned(
    problem: Problem,
    parameters: Float[np.ndarray, " parameter"],
    functional: Callable[[Float[np.ndarray, " parameter"]], float],
    targets: Float[np.ndarray, " start"],
    *,
    stiffness: float,
) -> tuple[Float[np.ndarray, " start"], Float[np.ndarray, " start"]]:
    """Values of `functional` that were reached, and the least objective at each of them.

    The targets are approached one after another, away from `parameters`, each from the solution
    of its neighbour.
    """
    m = problem.log_inputs.shape[1]
    centre = problem.centre
    lower, upper = bounds(problem.log_loss, m)

    def uncentred(theta: Float[np.ndarray, " parameter"]) -> Float[np.ndarray, " parameter"]:
        moved = theta.copy()
        moved[:m] += moved[m : 2 * m] * centre
        return moved

    ones = np.ones((1, len(problem.log_loss)))
    start = parameters.copy()
    start[:m] -= start[m : 2 * m] * centre
    free = Descent(problem.log_inputs - centre, problem.log_loss, ones)
    origin = functional(parameters)
    reached, least = np.empty(len(targets)), np.empty(len(targets))
    for side in (targets >= origin, targets < origin):
        theta = start[None]
        for index in np.flatnonzero(side)[np.argsort(np.abs(targets[side] - origin))]:
            spring = _Pinned(
                free.log_inputs,
                free.log_loss,
                ones,
                lambda row: functional(uncentred(row)),
                targets[[index]],
                stiffness,
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
