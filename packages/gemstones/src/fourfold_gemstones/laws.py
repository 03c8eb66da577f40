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

This file holds the form of the third. Its neighbours: `parametric` fits it (with the solver in
`minimise`), `envelope` holds the other two. `uncertainty` and `profiles` say how sure an estimate
is, `simulate` how biased, `comparison` which law extrapolates. `allocation` spends a budget, and
`next_run` names the run to do next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Variable = Literal[
    "parameters",
    "effective_parameters",
    "once_parameters",
    "looped_parameters",
    "loops",
    "width",
    "depth",
    "tokens",
    "unique_tokens",
    "learning_rate",
    "batch_tokens",
]
"""Variables that a law may read. Effective parameters are FLOPs per token over six: a count that gives
attention, which has FLOPs and no weights, its share. Of a model that loops over some of its blocks, those
weights and the others are counted apart. Unique tokens are those of the text before any is repeated."""
CHINCHILLA: tuple[Variable, ...] = ("parameters", "tokens")
"""Equation 1."""
WIDTH_DEPTH: tuple[Variable, ...] = ("width", "depth", "parameters", "tokens")
"""Equation 2."""
SHAPE_ONLY: tuple[Variable, ...] = ("width", "depth", "tokens")
"""Equation 3."""


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
                    f"a law in {other} has no closed-form slope; use allocate(), or fit one in {CHINCHILLA}"
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


class Settings:
    """A frozen dataclass of settings, as tools that copy and search estimators ask for them."""

    __slots__ = ()

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002 - scikit-learn's
        """The settings by name; scikit-learn's `clone` rebuilds an estimator from them."""
        mine: Any = self
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(mine)}
