"""The run to do next: the one that narrows a prescription most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fourfold_gemstones.laws import PowerLaw
from fourfold_gemstones.parametric import ParametricFit
from fourfold_gemstones.questions.allocation import Lattice, Planner
from fourfold_gemstones.uncertainty import Bootstrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A run to do next, and what it would teach."""

    width: float
    depth: float
    parameters: float
    """Both embedding tables counted."""
    tokens: float
    budget: float
    sd_before: float
    sd_after: float

    @property
    def shrinks(self) -> float:
        """Share of the standard deviation that the run is expected to remove."""
        return 1 - self.sd_after / self.sd_before


def suggest_next(
    fit: ParametricFit,
    draws: Bootstrap,
    planner: Planner,
    functional: Callable[[PowerLaw], float],
    budget: float,
    *,
    run_sd: float,
    candidates: int = 400,
) -> tuple[Suggestion, ...]:
    """Runs within a budget, ranked by how much they would narrow `functional`; best first.

    Each draw of the bootstrap predicts both the functional and the loss of a candidate run, and
    their covariance says what observing that loss, with an error of `run_sd` in log loss, would
    teach: Var(g) falls by Cov(g, l)² / (Var(l) + run_sd²), as in linear Gaussian updating.

    Raises:
        ValueError: `run_sd` is not positive, or the functional does not vary over the draws.
    """
    if not run_sd > 0:
        raise ValueError(f"run_sd={run_sd} must be positive; the spread of log loss between seeds")
    values = draws.values(functional)
    usable = np.isfinite(values)
    spread = float(values[usable].std(ddof=1)) if usable.any() else 0.0
    if not spread > 0:
        raise ValueError("the functional does not vary over the draws, so no run can narrow it")
    laws = [law for law, ok in zip(draws.estimates, usable, strict=True) if ok]
    centred = values[usable] - values[usable].mean()
    widths = fit.table.column("width")
    depths = fit.table.column("depth")
    side = max(2, math.isqrt(candidates // 4))
    unit = planner.shapes.head_width if isinstance(planner.shapes, Lattice) else 1
    w = np.unique(np.round(np.geomspace(widths.min() / 2, widths.max() * 2, side) / unit)) * unit
    w = w[w > 0]
    d = np.unique(np.round(np.geomspace(max(1, depths.min() / 2), depths.max() * 2, side)))
    width, depth, part = (
        axis.ravel() for axis in np.meshgrid(w, d, np.asarray([0.125, 0.25, 0.5, 1.0]))
    )
    size = planner.architecture.parameters(width, depth)
    tokens = planner.cost.tokens(planner.architecture, width, depth, budget) * part
    told = np.log(np.stack([planner.loss(law, width, depth, tokens) for law in laws]))
    told = told - told.mean(axis=0)
    covariance = centred @ told / (len(laws) - 1)
    variance = np.square(told).sum(axis=0) / (len(laws) - 1) + run_sd**2
    after = np.sqrt(np.maximum(spread**2 - covariance**2 / variance, 0.0))
    order = np.argsort(after)
    return tuple(
        Suggestion(
            width=float(width[row]),
            depth=float(depth[row]),
            parameters=float(size[row]),
            tokens=float(tokens[row]),
            budget=float(budget * part[row]),
            sd_before=spread,
            sd_after=float(after[row]),
        )
        for row in order
    )
