"""The worth of a recurrence in parameters, as a law fitted to runs.

    L = E + A (N_once + r^phi N_rec)^-alpha + B D^-beta

The law is the iso-depth law of arXiv 2604.21106. phi = 0 says that a recurrence adds nothing to using the
looped weights once, phi = 1 that it is worth as many weights of its own. The objective is Huber's of log
losses, as scaling laws are fitted; a test of the workspace compares this fit with the certified minimum of
`fourfold_gemstones`, which a paper may not import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from fourfold_parallel.common.records import Record

DELTA = 1e-3
"""Huber's threshold in log loss."""
PUBLISHED, PUBLISHED_TRUNCATED = 0.46, 0.38
"""phi of 116 runs at scale (arXiv 2604.21106), and with truncated backpropagation."""
DRAWS = 200
"""Resamples of runs."""
LOW = (-20.0, -20.0, 0.0, -20.0, 0.0, -1.0)
HIGH = (5.0, 5.0, 5.0, 5.0, 5.0, 2.0)
"""Bounds of log E, log A, alpha, log B, beta and phi; logs of nats at the middle of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A run that was trained and is read at the same number of recurrences."""

    once: float
    """Weights in prelude and coda."""
    looped: float
    """Weights in the core and its adapter."""
    loops: int
    tokens: float
    loss_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopLaw:
    """The law with values for its parameters."""

    floor_nats: float
    size_nats: float
    """Of the size term, and below of the data term, at the geometric mean of the table."""
    alpha: float
    data_nats: float
    beta: float
    phi: float
    middle: tuple[float, float]
    """Logs of the weights and of the tokens that the terms count from."""

    @property
    def theta(self) -> Float[np.ndarray, "6"]:
        """The parameters in the order of `LOW`."""
        floor, size, data = np.log([self.floor_nats, self.size_nats, self.data_nats])
        return np.array([floor, size, self.alpha, data, self.beta, self.phi])

    def loss(self, points: Sequence[Point]) -> Float[np.ndarray, " run"]:
        """Predicted nats a token."""
        return np.exp(_log_loss(self.theta, _columns(points), self.middle))

    def effective(self, points: Sequence[Point]) -> Float[np.ndarray, " run"]:
        """N_once + r^phi N_rec of each run."""
        once, looped, loops, _, _ = _columns(points)
        return once + loops**self.phi * looped


def points_of(record: Record, arm: str) -> list[Point]:
    """The runs of an arm, read where they were trained."""
    return [
        Point(
            once=trained.number("once_parameters"),
            looped=trained.number("looped_parameters"),
            loops=int(trained.number("loops")),
            tokens=trained.number("tokens"),
            loss_nats=read.number("loss_nats"),
        )
        for trained in record.of("trained", arm=arm)
        for read in record.of("held_out", run=trained.values["run"])
        if read.number("recurrences") == trained.number("loops")
    ]


def with_truncated(record: Record) -> list[Point]:
    """The looped arm's runs, those that were trained with truncated gradients too in that form."""
    truncated = {(p.once, p.loops, p.tokens): p for p in points_of(record, "truncated")}
    return [truncated.get((p.once, p.loops, p.tokens), p) for p in points_of(record, "looped")]


def fit(points: Sequence[Point]) -> LoopLaw:
    """The law with the least objective over a grid of starts.

    Raises:
        ValueError: Fewer runs than the law has parameters.
    """
    if len(points) <= len(LOW):
        raise ValueError(f"{len(points)} runs tell no law of {len(LOW)} parameters; add runs")
    columns = _columns(points)
    middle = _middle(columns)
    least = float(np.log(columns[4]).min())
    starts = [
        (least - 1.0, least - 1.0, alpha, least - 1.0, beta, phi)
        for alpha, beta, phi in product((0.2, 0.6), (0.3, 0.8), (0.0, 0.5, 1.0))
    ]
    return _law(min((_descend(s, columns, middle) for s in starts), key=lambda d: d[1])[0], middle)


@lru_cache(maxsize=8)
def resampled_phi(points: tuple[Point, ...], seed: int = 0) -> Float[np.ndarray, " draw"]:
    """Phi of resamples of the runs with replacement, each refitted from the fit of all."""
    best = fit(points)
    columns = _columns(points)
    generator = np.random.default_rng(seed)
    values = []
    while len(values) < DRAWS:
        drawn = columns[:, generator.integers(len(points), size=len(points))]
        if min(len(np.unique(drawn[row])) for row in (1, 2, 3)) > 1:
            values.append(_descend(best.theta, drawn, best.middle)[0][5])
    return np.asarray(values)


def interval(values: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _columns(points: Sequence[Point]) -> Float[np.ndarray, "5 run"]:
    return np.array([(p.once, p.looped, p.loops, p.tokens, p.loss_nats) for p in points]).T


def _middle(columns: Float[np.ndarray, "5 run"]) -> tuple[float, float]:
    return float(np.log(columns[0]).mean()), float(np.log(columns[3]).mean())


def _log_loss(
    theta: Float[np.ndarray, "6"], columns: Float[np.ndarray, "5 run"], middle: tuple[float, float]
) -> Float[np.ndarray, " run"]:
    floor, size, alpha, data, beta, phi = theta
    once, looped, loops, tokens, _ = columns
    worth = np.log(once + loops**phi * looped) - middle[0]
    terms = np.stack(
        [
            np.full_like(tokens, floor),
            size - alpha * worth,
            data - beta * (np.log(tokens) - middle[1]),
        ]
    )
    return np.logaddexp.reduce(terms, axis=0)


def _descend(
    start: Sequence[float] | Float[np.ndarray, "6"],
    columns: Float[np.ndarray, "5 run"],
    middle: tuple[float, float],
) -> tuple[Float[np.ndarray, "6"], float]:
    """Parameters and objective at the end of a descent."""
    losses = np.log(columns[4])
    descent = least_squares(
        lambda theta: _log_loss(theta, columns, middle) - losses,
        np.clip(start, LOW, HIGH),
        bounds=(LOW, HIGH),
        loss="huber",
        f_scale=DELTA,
        x_scale="jac",
        max_nfev=400,
    )
    return descent.x, float(descent.cost)


def _law(theta: Float[np.ndarray, "6"], middle: tuple[float, float]) -> LoopLaw:
    floor, size, alpha, data, beta, phi = (float(value) for value in theta)
    return LoopLaw(
        floor_nats=float(np.exp(floor)),
        size_nats=float(np.exp(size)),
        alpha=alpha,
        data_nats=float(np.exp(data)),
        beta=beta,
        phi=phi,
        middle=middle,
    )
