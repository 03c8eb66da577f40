"""The same quantities by slow and obvious ways."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import pytest
from scipy.optimize import differential_evolution, minimize
from scipy.special import huber as scipy_huber
from scipy.special import logsumexp

from fourfold_gemstones import minimise
from fourfold_gemstones.laws import WIDTH_DEPTH
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.published import chinchilla_points, published_frame
from fourfold_gemstones.runs import RunTable


def slow_objective(problem: minimise.Problem, theta: np.ndarray) -> float:
    """The objective as the paper writes it, one row at a time."""
    m = problem.log_inputs.shape[1]
    total = 0.0
    for x, y in zip(problem.log_inputs, problem.log_loss, strict=True):
        terms = [math.exp(theta[j] - theta[m + j] * x[j]) for j in range(m)]
        residual = y - math.log(math.exp(theta[2 * m]) + sum(terms))
        if abs(residual) <= problem.delta:
            total += residual**2 / 2
        else:
            total += problem.delta * (abs(residual) - problem.delta / 2)
    return total


@pytest.mark.parametrize("delta", [1e-1, 1e-3])
def test_the_objective_is_the_papers(suite: RunTable, delta: float) -> None:
    problem = ParametricLaw(delta=delta).problem(suite)
    theta = np.asarray([5.1, 12.2, 0.28, 0.56, 0.7])
    ours = minimise.objective(problem, theta[None], np.ones((1, len(suite))))[0]
    assert ours == pytest.approx(slow_objective(problem, theta), rel=1e-12)


@pytest.mark.parametrize("residuals", ["log", "nats"])
@pytest.mark.parametrize("overestimate", [1.0, 9.0])
def test_derivatives_are_those_of_finite_differences(
    suite: RunTable, residuals: Literal["log", "nats"], overestimate: float
) -> None:
    """Gradient and Hessian at a point away from the kinks, by central differences."""
    problem = ParametricLaw(
        variables=WIDTH_DEPTH, delta=1.0, residuals=residuals, overestimate=overestimate
    ).problem(suite)
    weights = np.random.default_rng(1).uniform(0.5, 2, (1, len(suite)))
    descent = problem.descent(weights)
    theta = np.asarray([[-1.5, -1.2, -1.0, -1.4, 0.3, 0.4, 0.35, 0.5, 0.5]])
    gradient, hessian, _ = descent.derivatives(theta, 1.0)
    for p, step in enumerate(1e-5 * np.eye(9)):
        up, down = theta + step, theta - step
        slope = (descent.value(up, 1.0) - descent.value(down, 1.0)) / 2e-5
        assert gradient[0, p] == pytest.approx(slope[0], rel=1e-6, abs=1e-8)
        curvature = (descent.derivatives(up, 1.0)[0] - descent.derivatives(down, 1.0)[0]) / 2e-5
        assert hessian[0, p] == pytest.approx(curvature[0], rel=1e-5, abs=1e-7)


def reference_grid(problem: minimise.Problem, starts: int, generator: np.random.Generator) -> float:
    """Best of L-BFGS-B from nodes of the field's grid, with scipy's default stopping rules."""
    m = problem.log_inputs.shape[1]
    nodes = list(
        itertools.product(
            *[[0, 5, 10, 15, 20, 25]] * m, *[[0, 0.5, 1, 1.5, 2]] * m, [-1, -0.5, 0, 0.5, 1]
        )
    )

    def objective(theta: np.ndarray) -> float:
        terms = theta[:m] - theta[m : 2 * m] * problem.log_inputs
        floor = np.full((len(terms), 1), theta[2 * m])
        predicted = logsumexp(np.concatenate([terms, floor], axis=1), axis=1)
        return float(scipy_huber(problem.delta, problem.log_loss - predicted).sum())

    chosen = generator.choice(len(nodes), size=starts, replace=False)
    return min(
        minimize(objective, np.asarray(nodes[node], dtype=float), method="L-BFGS-B").fun
        for node in chosen
    )


def test_the_fields_own_search_never_finds_less(suite: RunTable) -> None:
    law = ParametricLaw()
    best = reference_grid(law.problem(suite), 40, np.random.default_rng(0))
    assert law.fit(suite).objective <= best * (1 + 1e-9)


GLOBAL = [
    ("hot", ("parameters", "tokens"), 1e-4),
    ("hot_100b+", ("parameters", "tokens"), 1e-4),
    ("hot_120b+_only", ("parameters", "tokens"), 1e-4),
    ("lr_ablation_hot", ("parameters", "tokens"), 1e-4),
    ("cool_begin", ("parameters", "tokens"), 1e-4),
    ("cool_end", ("parameters", "tokens"), 1e-3),
    ("cool_end", ("parameters", "tokens"), 1e-4),
    ("slim_chinchilla", ("parameters", "tokens"), 1e-4),
    ("hot_sampled_like_chinchilla", ("parameters", "tokens"), 1e-4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("frame", "variables", "delta"), GLOBAL)
def test_differential_evolution_finds_the_same_minimum(
    frame: str, variables: tuple, delta: float
) -> None:
    """A search without derivatives, seeds or homotopy ends at our objective, on nine data sets."""
    fit = ParametricLaw(variables=variables, delta=delta).fit(published_frame(frame))
    assert evolved(fit.law.problem(fit.table)) == pytest.approx(fit.objective, rel=1e-7)


@pytest.mark.slow
def test_differential_evolution_on_chinchilla() -> None:
    fit = ParametricLaw(delta=1e-3).fit(chinchilla_points())
    assert evolved(fit.law.problem(fit.table)) == pytest.approx(fit.objective, rel=1e-7)


def evolved(problem: minimise.Problem) -> float:
    """Minimum by differential evolution in the centred coordinates."""
    m = problem.log_inputs.shape[1]
    descent = minimise.Descent(
        problem.log_inputs - problem.centre,
        problem.log_loss,
        np.ones((1, len(problem.log_loss))),
    )
    bounds = [(-8, 2)] * m + [(0.01, 2)] * m + [(-2, 1.2)]
    search = differential_evolution(
        lambda theta: descent.value(np.ascontiguousarray(theta.T), problem.delta),
        bounds,
        popsize=20,
        maxiter=1500,
        tol=1e-12,
        init="sobol",
        vectorized=True,
        updating="deferred",
        polish=False,
        rng=np.random.default_rng(0),
    )
    return float(search.fun)
