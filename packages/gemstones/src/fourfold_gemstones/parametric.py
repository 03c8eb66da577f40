"""Approach 3: the power law of `laws.py` as an estimator, fitted to a table of runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from fourfold_gemstones import minimise
from fourfold_gemstones.architecture import Embeddings
from fourfold_gemstones.laws import (
    CHINCHILLA,
    PowerLaw,
    Settings,
    Variable,
)
from fourfold_gemstones.runs import RunTable

LEAST_EXPLAINED = 0.3
"""Share of the absolute deviations of log loss below which a law does not describe its table: an R² of about
a half, where no row is an outlier."""


class LawWarning(UserWarning):
    """A fit that can be used, with a weakness that its user must know; the message names rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParametricLaw(Settings):
    """Approach 3: the power law of least Huber loss in log residuals, over all checkpoints.

    `fit` leaves this value unchanged and returns a `ParametricFit`, which predicts and scores.
    """

    variables: tuple[Variable, ...] = CHINCHILLA
    delta: float = 1e-4
    """Huber threshold in log loss; the paper's. Residuals are some 1e-2, so this is nearly least
    absolute deviations."""
    embeddings: Embeddings = Embeddings.BOTH
    starts: int = 24
    """Descents to follow from the best and most distinct seeds."""
    overestimate: float = 1.0
    """Factor on the rows that the law overestimates. Runs that were tuned badly lie above the frontier and
    none lies below it: with (1 - q) / q the law is nearly the quantile q of log loss."""
    residuals: Literal["log", "nats"] = "log"
    """Differences of log losses, as the paper and Hoffmann et al. have them, or of losses."""

    def __post_init__(self) -> None:
        if not self.variables or len(set(self.variables)) != len(self.variables):
            raise ValueError(
                f"variables={self.variables} must name at least one variable, each once; for "
                f"example {CHINCHILLA}"
            )
        if not 1e-12 <= self.delta <= 10:
            raise ValueError(
                f"delta={self.delta} is outside [1e-12, 10]; the paper uses 1e-4 and 1e-3"
            )
        if not self.overestimate >= 1:
            raise ValueError(
                f"overestimate={self.overestimate} must be at least 1, where the law runs through the "
                "middle; 9 makes it the quantile .1"
            )
        if self.starts < 1:
            raise ValueError(f"starts={self.starts} must be at least 1; 24 is the default")

    def inputs(self, table: RunTable) -> dict[Variable, Float[np.ndarray, " row"]]:
        """The variables of each row, under this law's convention of counting embeddings."""
        return {name: variable_of(table, name, self.embeddings) for name in self.variables}

    @property
    def unknowns(self) -> int:
        """Parameters that are fitted."""
        return 2 * len(self.variables) + 1

    def problem(self, table: RunTable) -> minimise.Problem:
        """The minimisation that fitting this law to `table` is.

        Raises:
            ValueError: Too few models or rows, a variable that does not vary, or variables of which
                one is a power of the others.
        """
        inputs = self.inputs(table)
        x = np.log(np.stack([inputs[variable] for variable in self.variables], axis=1))
        unknowns = self.unknowns
        if len(table) < unknowns:
            raise ValueError(
                f"{table.source} has {len(table)} rows, and a law in {self.variables} has {unknowns} "
                "parameters; add runs, or choose a law with fewer variables"
            )
        for variable, values in zip(self.variables, x.T, strict=True):
            distinct = len(np.unique(values.round(9)))
            if distinct < 2:
                raise ValueError(
                    f"{variable} is {np.exp(values[0]):g} in all {len(table)} rows of {table.source}: "
                    "its exponent cannot be told; add runs that vary it, or leave it out of the law"
                )
        model_terms = [name for name in self.variables if name != "tokens"]
        models = len(
            np.unique(x[:, [name != "tokens" for name in self.variables]].round(9), axis=0)
        )
        if model_terms and models <= 2 * len(model_terms):
            raise ValueError(
                f"{table.source} has {models} distinct models, and the terms in {model_terms} have "
                f"{2 * len(model_terms)} parameters and share a floor; train at least "
                f"{2 * len(model_terms) + 1} shapes, or choose a law with fewer variables"
            )
        scaled = (x - x.mean(axis=0)) / x.std(axis=0)
        smallest = np.linalg.svd(scaled, compute_uv=False)[-1] / np.sqrt(len(table))
        if smallest < 1e-6:
            raise ValueError(
                f"one of {self.variables} is a power of the others in {table.source}, so that their "
                "exponents cannot be told apart; add shapes, or leave one out"
            )
        return minimise.Problem(
            log_inputs=x,
            log_loss=np.log(table.column("loss_nats")),
            delta=self.delta,
            overestimate=self.overestimate,
            nats=self.residuals == "nats",
        )

    def fit(self, table: RunTable) -> ParametricFit:
        """The global minimum, with a certificate.

        Warns:
            LawWarning: The law explains less than `LEAST_EXPLAINED`, the descent does not rest, measured
                losses lie below the fitted floor, or a parameter is at its bound.
        """
        optimum = minimise.minimise(
            self.problem(table), starts=self.starts, names=labels(self.variables)
        )
        estimate = PowerLaw.from_vector(self.variables, optimum.parameters)
        fit = ParametricFit(
            law=self,
            table=table,
            estimate=estimate,
            objective=optimum.objective,
            certificate=optimum.certificate,
        )
        for weakness in weaknesses(fit):
            warnings.warn(weakness, LawWarning, stacklevel=2)
        return fit

    def refits(
        self,
        fit: ParametricFit,
        table: RunTable,
        weights: Float[np.ndarray, "draw row"],
        log_losses: Float[np.ndarray, "draw row"] | None = None,
    ) -> tuple[PowerLaw, ...]:
        """The law refitted once per row of weights, and of losses, from the basins of `fit`."""
        vectors = minimise.refit(
            self.problem(table), fit.estimate.vector(), weights, log_losses=log_losses
        )
        return tuple(PowerLaw.from_vector(self.variables, vector) for vector in vectors)


def variable_of(
    table: RunTable, variable: Variable, embeddings: Embeddings
) -> Float[np.ndarray, " row"]:
    """A variable of each row, under a convention of counting embeddings."""
    match variable:
        case "parameters":
            return table.parameters(embeddings)
        case "effective_parameters":
            return table.flops() / table.column("tokens") / 6
        case other:
            return table.column(other)


def labels(variables: tuple[Variable, ...]) -> tuple[str, ...]:
    """Names of a power law's parameters, in the order of its vector."""
    return (
        *(f"coefficient of {name}" for name in variables),
        *(f"exponent of {name}" for name in variables),
        "floor",
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParametricFit:
    """A fitted parametric law."""

    law: ParametricLaw
    table: RunTable
    estimate: PowerLaw
    objective: float
    """Sum over rows of Huber's function of the residual."""
    certificate: minimise.Certificate

    def predict(self, table: RunTable) -> Float[np.ndarray, " row"]:
        """Loss in nats per token for each row."""
        return self.estimate.loss(self.law.inputs(table))

    def score(self, table: RunTable) -> float:
        """Share of the variance of log loss that the law explains (R²)."""
        log_loss = np.log(table.column("loss_nats"))
        residual = log_loss - np.log(self.predict(table))
        return 1 - float(np.square(residual).sum() / np.square(log_loss - log_loss.mean()).sum())


def weaknesses(fit: Any) -> Iterator[str]:
    """Sentences on a fit that can be used, the gravest first; none for a good one."""
    source, loss = fit.table.source, fit.table.column("loss_nats")
    log_loss = np.log(loss)
    left = np.abs(log_loss - np.log(fit.predict(fit.table))).sum()
    deviations = np.abs(log_loss - np.median(log_loss)).sum()
    if left > (1 - LEAST_EXPLAINED) * deviations > 0:
        yield (
            f"the law explains next to nothing of {source}: R² {fit.score(fit.table):.2f}, and "
            f"{1 - left / deviations:.0%} of the absolute deviations of log loss, of which a law that holds "
            f"explains {LEAST_EXPLAINED:.0%} and more. Its numbers mean nothing; see that all losses are of "
            "one text and tokenizer, and every column in one unit"
        )
    if not fit.certificate.rests:
        yield (
            "the best descent does not rest: its relative gradient is "
            f"{fit.certificate.relative_gradient:.1e}, above {minimise.LARGEST_GRADIENT:g}; "
            f"raise starts above {fit.law.starts}"
        )
    floor = np.exp(fit.estimate.log_floor)
    below = np.flatnonzero(loss < floor)
    if len(below):
        yield (
            f"{len(below)} losses lie below the fitted floor of {floor:.4g} nats: rows "
            f"{below[:8].tolist()} of {source}"
        )
    if fit.certificate.at_bound:
        yield (
            f"at its bound: {', '.join(fit.certificate.at_bound)}. {source} does not identify it; do not "
            "extrapolate this law"
        )
