"""Gemstones (McLeish et al. 2025): how loss falls with width, depth, tokens, compute and time.

The paper trains 22 decoders, from 256 wide and 23 deep to 3072 wide and 12 deep, for 350 billion
tokens each at a constant learning rate, and evaluates them on the way. Each evaluation is a point
(width w, depth d, parameters N, tokens T, FLOPs C, loss L). It asks which shape and how many tokens
give the lowest loss for a budget, and how the answer depends on choices that others leave unsaid.
Two of Hoffmann et al.'s (2022) three approaches are followed, and the third is here too:

- Approach 1, the *envelope* (`EnvelopeLaw`): of all points, keep those on the lower left of
  (log C, log L); a line through their (log C, log N) is the rule for N. The paper replaces the
  usual best point per bin by the convex hull, which needs fewer models.
- Approach 2, *isoFLOP parabolas* (`IsoFlopLaw`): at a few budgets, a parabola in log N; its vertex.
- Approach 3, the *parametric law* (`ParametricLaw`): every term a power of one variable,

      L(x) = exp(E) + sum_j exp(c_j) x_j^(-e_j)

  with x = (N, T), equation 1, the law of Chinchilla; (w, d, N, T), equation 2, which can tell
  shapes apart; or (w, d, T), equation 3. It is fitted by the Huber loss of log residuals, and its
  least loss under a budget is the prescription.

The third is in this file, the others in `envelope`. How the law is solved (`solve`), how sure each
estimate is (`uncertainty`), how biased (`null`), and what it prescribes (`allocate`) are its neighbours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from fourfold_gemstones import solve
from fourfold_gemstones.counting import Embeddings
from fourfold_gemstones.settings import Settings
from fourfold_gemstones.table import RunTable

Variable = Literal["parameters", "effective_parameters", "width", "depth", "tokens"]
"""What a term of a law may be a power of. Effective parameters are FLOPs per token over six: a
count that gives attention, which has FLOPs and no weights, its share."""
CHINCHILLA: tuple[Variable, ...] = ("parameters", "tokens")
"""Equation 1."""
WIDTH_DEPTH: tuple[Variable, ...] = ("width", "depth", "parameters", "tokens")
"""Equation 2."""
SHAPE_ONLY: tuple[Variable, ...] = ("width", "depth", "tokens")
"""Equation 3."""


class LawWarning(UserWarning):
    """A fit that can be used, with a weakness that its user must know; the message names rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """L(x) = exp(E) + sum_j exp(c_j - e_j log x_j): a floor, and one falling term per variable."""

    variables: tuple[Variable, ...]
    log_coefficients: tuple[float, ...]
    """c_j, in log nats."""
    exponents: tuple[float, ...]
    """e_j; alpha belongs to parameters and beta to tokens."""
    log_floor: float
    """E; exp(E) nats is the loss that no size and no amount of data removes."""

    def loss(
        self, inputs: Mapping[Variable, Float[np.ndarray, "*shape"]]
    ) -> Float[np.ndarray, "*shape"]:
        """Predicted nats per token."""
        terms = zip(self.variables, self.log_coefficients, self.exponents, strict=True)
        return np.exp(self.log_floor) + sum(
            np.exp(c - e * np.log(inputs[variable])) for variable, c, e in terms
        )

    @property
    def slope(self) -> float:
        """The exponent a of the compute-optimal N = G (C/6)^a for C = 6 N T: beta / (alpha + beta).

        Raises:
            ValueError: The law has other variables than parameters and tokens.
        """
        alpha, beta = self._alpha_beta()
        return beta / (alpha + beta)

    def optimum(self, flops: float) -> tuple[float, float]:
        """N and T of least loss under 6 N T = `flops` (Hoffmann et al. 2022, equation 4).

        At the optimum one more per cent of either buys the same:
        alpha A N^-alpha = beta B T^-beta.
        """
        alpha, beta = self._alpha_beta()
        log_a, log_b = self.log_coefficients
        log_g = (np.log(alpha / beta) + log_a - log_b) / (alpha + beta)
        parameters = float(np.exp(log_g + self.slope * np.log(flops / 6)))
        return parameters, flops / 6 / parameters

    def _alpha_beta(self) -> tuple[float, float]:
        match self.variables:
            case ("parameters" | "effective_parameters", "tokens"):
                return self.exponents[0], self.exponents[1]
            case other:
                raise ValueError(
                    f"a law in {other} has no closed-form slope; use allocate(), or fit a law in "
                    f"{CHINCHILLA}"
                )

    def vector(self) -> Float[np.ndarray, " parameter"]:
        """(c_1..c_m, e_1..e_m, E)."""
        return np.asarray([*self.log_coefficients, *self.exponents, self.log_floor])

    @classmethod
    def from_vector(
        cls, variables: tuple[Variable, ...], vector: Float[np.ndarray, " parameter"]
    ) -> PowerLaw:
        """The inverse of `vector`."""
        m = len(variables)
        values = [float(value) for value in vector]
        return cls(
            variables=variables,
            log_coefficients=tuple(values[:m]),
            exponents=tuple(values[m : 2 * m]),
            log_floor=values[2 * m],
        )


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
        if self.starts < 1:
            raise ValueError(f"starts={self.starts} must be at least 1; 24 is the default")

    def inputs(self, table: RunTable) -> dict[Variable, Float[np.ndarray, " row"]]:
        """The variables of each row, under this law's convention of counting embeddings."""
        return {variable: self._input(table, variable) for variable in self.variables}

    def _input(self, table: RunTable, variable: Variable) -> Float[np.ndarray, " row"]:
        match variable:
            case "parameters":
                return table.parameters(self.embeddings)
            case "effective_parameters":
                return table.flops() / table.column("tokens") / 6
            case "width" | "depth" | "tokens":
                return table.column(variable)

    def problem(self, table: RunTable) -> solve.Problem:
        """The minimisation that fitting this law to `table` is.

        Raises:
            ValueError: Too few models or rows, a variable that does not vary, or variables of which
                one is a power of the others.
        """
        inputs = self.inputs(table)
        x = np.log(np.stack([inputs[variable] for variable in self.variables], axis=1))
        unknowns = 2 * len(self.variables) + 1
        if len(table) < unknowns:
            raise ValueError(
                f"{table.source} has {len(table)} rows, and a law in {self.variables} has "
                f"{unknowns} "
                "parameters; add runs, or choose a law with fewer variables"
            )
        for variable, values in zip(self.variables, x.T, strict=True):
            distinct = len(np.unique(values.round(9)))
            if distinct < 2:
                raise ValueError(
                    f"{variable} is {np.exp(values[0]):g} in all {len(table)} rows of "
                    f"{table.source}: "
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
                f"one of {self.variables} is a power of the others in {table.source}, so that "
                "their "
                "exponents cannot be told apart; add shapes, or leave one out"
            )
        return solve.Problem(
            log_inputs=x, log_loss=np.log(table.column("loss_nats")), delta=self.delta
        )

    def fit(self, table: RunTable) -> ParametricFit:
        """The global minimum, with a certificate.

        Warns:
            LawWarning: Measured losses lie below the fitted floor, or a parameter is at its bound.
        """
        found = solve.minimise(self.problem(table), starts=self.starts, names=self.variables)
        estimate = PowerLaw.from_vector(self.variables, found.parameters)
        below = np.flatnonzero(table.column("loss_nats") < np.exp(estimate.log_floor))
        if len(below):
            warnings.warn(
                f"{len(below)} losses lie below the fitted floor of "
                f"{np.exp(estimate.log_floor):.4g} nats: rows {below[:8].tolist()} of "
                f"{table.source}",
                LawWarning,
                stacklevel=2,
            )
        if found.certificate.at_bound:
            warnings.warn(
                f"at its bound: {', '.join(found.certificate.at_bound)}. {table.source} does not "
                "identify it; do not extrapolate this law",
                LawWarning,
                stacklevel=2,
            )
        return ParametricFit(
            law=self,
            table=table,
            estimate=estimate,
            objective=found.objective,
            certificate=found.certificate,
        )

    def refits(
        self, fit: ParametricFit, table: RunTable, weights: Float[np.ndarray, "draw row"]
    ) -> tuple[PowerLaw, ...]:
        """The law refitted once per row of weights, from the basins of `fit`."""
        found = solve.refit(self.problem(table), fit.estimate.vector(), weights)
        return tuple(PowerLaw.from_vector(self.variables, vector) for vector in found)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParametricFit:
    """A fitted parametric law."""

    law: ParametricLaw
    table: RunTable
    estimate: PowerLaw
    objective: float
    """Sum over rows of Huber's function of the log residual."""
    certificate: solve.Certificate

    def predict(self, table: RunTable) -> Float[np.ndarray, " row"]:
        """Loss in nats per token for each row."""
        return self.estimate.loss(self.law.inputs(table))

    def score(self, table: RunTable) -> float:
        """Share of the variance of log loss that the law explains (R²)."""
        log_loss = np.log(table.column("loss_nats"))
        residual = log_loss - np.log(self.predict(table))
        return 1 - float(np.square(residual).sum() / np.square(log_loss - log_loss.mean()).sum())
