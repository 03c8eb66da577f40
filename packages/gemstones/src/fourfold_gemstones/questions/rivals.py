"""Two laws, by a test that is calibrated on these very runs, and by the power of runs yet to be done.

A law with more parameters always fits its runs better, and R² hardly tells: the question is whether it fits
better than it would if the simpler law were true. So the simpler law is made true: its own predictions,
each run's errors turned round or not as a whole, are fitted by both, many times (a wild bootstrap over
runs; Cameron, Gelbach and Miller 2008). What errors along a run have in common stays as it is, so that
checkpoints of one run count as one run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from fourfold_gemstones.minimise import huber
from fourfold_gemstones.runs import RunTable

SIGNIFICANT = 0.05
FEWEST_RUNS = 6
"""Runs below which turning errors round gives too few different tables for a test at .05."""


class LossLaw(Protocol):
    """A law of losses that can be fitted again to other losses of the same runs."""

    @property
    def delta(self) -> float:
        """Huber threshold of log loss."""
        ...

    def fit(self, table: RunTable, /) -> Any:
        """The fit to a table."""
        ...

    def refits(
        self,
        fit: Any,
        table: RunTable,
        weights: Float[np.ndarray, "draw row"],
        log_losses: Float[np.ndarray, "draw row"] | None = None,
        /,
    ) -> tuple[Any, ...]:
        """One estimate per row of weights and losses."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """The outcome of a test of a simple law against a rival."""

    gain: float
    """Log of the simple law's objective over the rival's, each at its optimum."""
    p_value: float
    """Share of tables made by the simple law on which the rival gains as much."""
    draws: int

    def __str__(self) -> str:
        refused = self.p_value < SIGNIFICANT
        return (
            f"the rival lowers the objective by {100 * (1 - np.exp(-self.gain)):.1f} %; were the first law "
            f"true, it would by as much in {100 * self.p_value:.1f} % of {self.draws} tables of these runs: "
            + ("the first law is refused" if refused else "these runs do not refuse the first law")
        )


def _fitted(law: LossLaw, table: RunTable) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return law.fit(table)


def _objectives(
    law: LossLaw, fit: Any, table: RunTable, log_losses: Float[np.ndarray, "draw row"]
) -> Float[np.ndarray, " draw"]:
    """The least objective of a law on each row of losses."""
    ones = np.ones_like(log_losses)
    told = [
        np.log(estimate.loss(law.inputs(table)))  # pyright: ignore[reportAttributeAccessIssue]
        for estimate in law.refits(fit, table, ones, log_losses)
    ]
    return huber(log_losses - np.stack(told), law.delta).sum(axis=1)


def _gains(
    first: LossLaw,
    rival: LossLaw,
    fits: tuple[Any, Any],
    table: RunTable,
    log_losses: Float[np.ndarray, "draw row"],
) -> Float[np.ndarray, " draw"]:
    ours = _objectives(first, fits[0], table, log_losses)
    theirs = _objectives(rival, fits[1], table, log_losses)
    return np.log(ours / np.maximum(theirs, 1e-300))


def turned(
    fit: Any, table: RunTable, *, draws: int, generator: np.random.Generator
) -> Float[np.ndarray, "draw row"]:
    """Log losses of a law made true: its predictions, with the errors of each run as they are or turned."""
    told = np.log(fit.predict(table))
    errors = np.log(table.column("loss_nats")) - told
    names, index = table.groups("run")
    signs = generator.choice((-1.0, 1.0), size=(draws, len(names)))
    return told + signs[:, index] * errors


def contest(
    first: LossLaw,
    rival: LossLaw,
    table: RunTable,
    *,
    draws: int,
    generator: np.random.Generator,
) -> Contest:
    """Whether runs refuse the first law for a rival that can do more.

    Raises:
        ValueError: There are fewer than `FEWEST_RUNS` runs, or a law refuses the table.
    """
    runs = len(set(table.run))
    if runs < FEWEST_RUNS:
        raise ValueError(
            f"{table.source} has {runs} runs, and a test over runs needs {FEWEST_RUNS}; add runs"
        )
    fits = _fitted(first, table), _fitted(rival, table)
    measured = np.log(table.column("loss_nats"))[None]
    gain = float(_gains(first, rival, fits, table, measured)[0])
    made = turned(fits[0], table, draws=draws, generator=generator)
    gains = _gains(first, rival, fits, table, made)
    return Contest(gain=gain, p_value=float((1 + (gains >= gain).sum()) / (1 + draws)), draws=draws)


def _within_runs(fit: Any, table: RunTable) -> float:
    """Standard deviation of log residuals about the mean of their run."""
    residual = np.log(table.column("loss_nats") / fit.predict(table))
    _, index = table.groups("run")
    means = np.bincount(index, residual) / np.bincount(index)
    return float((residual - means[index]).std())


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """Chances that runs tell two laws apart."""

    runs: int
    cost: float
    """6 N T of the runs that are not done yet."""
    power: float
    """Share of tables made by the rival on which the first law is refused, at `SIGNIFICANT`."""
    draws: int


def power(
    first: LossLaw,
    rival: LossLaw,
    table: RunTable,
    more: Mapping[str, Mapping[str, float]],
    *,
    run_sd: float,
    draws: int,
    generator: np.random.Generator,
) -> Power:
    """Chances that the runs of a table, with runs yet to be done, refuse the first law if its rival is true.

    Both laws are fitted to the runs that there are. Each then makes tables of all runs, with an error of
    `run_sd` in log loss for each run, and one for each checkpoint, as large as the rival's errors within
    runs; the first law's tables say which gain is too much, the rival's how
    often it is exceeded.

    Args:
        first: the simpler law.
        rival: a law that can do more.
        table: runs that are done.
        more: variables of runs yet to be done, by name; none asks about the runs that there are.
        run_sd: standard deviation of log loss between runs of one kind.
        draws: tables made by each law.
        generator: of the errors.

    Raises:
        ValueError: `run_sd` is not positive, or a law refuses the table.
    """
    from fourfold_gemstones.questions.forecast import planned

    if not run_sd > 0:
        raise ValueError(f"run_sd={run_sd} must be positive; the spread of log loss between seeds")
    fits = _fitted(first, table), _fitted(rival, table)
    whole, cost = table, 0.0
    if more:
        added = planned(more, table)
        whole = table.beside(added)
        cost = float((6 * added.column("parameters") * added.column("tokens")).sum())
    names, index = whole.groups("run")
    row_sd = _within_runs(fits[1], table)
    tables = []
    for fit in fits:
        told = np.log(fit.predict(whole))
        of_runs = generator.normal(0, run_sd, (draws, len(names)))[:, index]
        tables.append(told + of_runs + generator.normal(0, row_sd, (draws, len(whole))))
    chance, seen = (_gains(first, rival, fits, whole, made) for made in tables)
    critical = float(np.quantile(chance, 1 - SIGNIFICANT))
    return Power(runs=len(names), cost=cost, power=float((seen > critical).mean()), draws=draws)
