"""MLPerf HPC (Farrell et al. 2021): time to quality, taken apart.

A training is timed until an evaluation is as good as was asked for. With `N` samples until then, `r` samples
a second while it trains, and staging, evaluations, checkpoints and the rest beside,

    T = staging + N / r + evaluation + checkpoint + rest  =  N * (1 / r) * (T r / N)

so that between two systems three factors multiply to the whole ratio: how much sooner it learns
(convergence), how much faster it trains (compute), how much less there is beside training (overhead). The
last two are products of smaller factors in turn, one for each part of the time: if `S_k` is the time of the
first `k` parts, `T = N * S_1/N * S_2/S_1 * ... * T/S_last`.

Convergence is a distribution over seeds, and a miss is censored: what it cost was spent, and bought nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from fourfold_parallel.run.timeline import PARTS, PartName

TRAINING: tuple[PartName, ...] = ("compute", "exposed communication", "data")
"""Parts of the time in which samples are learnt, in the order of their factors."""
OVERHEAD: tuple[PartName, ...] = ("evaluation", "checkpoint", "rest", "staging")
"""Parts beside, in the order of their factors."""
DRAWS = 10_000
"""Of a bootstrap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A training towards a quality: what it learnt from, whether it got there, where its time went."""

    samples: float
    """Learnt from until the quality was met, or in vain."""
    is_reached: bool
    """Whether an evaluation met the quality; what the run says of itself counts for nothing."""
    seconds: Mapping[PartName, float]
    """By part; one that is not named took none."""

    @property
    def elapsed_s(self) -> float:
        """Seconds from the start of staging to the evaluation that met the quality, or to the end."""
        return math.fsum(self.seconds.values())

    @property
    def training_s(self) -> float:
        """Seconds in which samples were learnt."""
        return math.fsum(self.seconds.get(part, 0.0) for part in TRAINING)

    @property
    def samples_per_s(self) -> float:
        """`r`: samples a second while it trains."""
        return self.samples / self.training_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Factors of a ratio of two times to quality; each above 1 speaks for the second system."""

    convergence: float
    """`N_a / N_b`."""
    compute: float
    """`r_b / r_a`."""
    overhead: float
    """`(T_a r_a / N_a) / (T_b r_b / N_b)`."""
    by_part: Mapping[PartName, float]
    """Of compute and overhead: those of `TRAINING` multiply to the one, those of `OVERHEAD` to the other."""

    @property
    def whole(self) -> float:
        """The ratio of the times, `T_a / T_b`."""
        return self.convergence * self.compute * self.overhead


def factors(a: Attempt, b: Attempt) -> Factors:
    """Take the ratio of two times to quality apart, exactly.

    Raises:
        ValueError: One of them missed the quality, learnt from nothing or computed for no time.
    """
    for attempt in (a, b):
        if not attempt.is_reached:
            raise ValueError(
                "an attempt missed the quality, and has no time to it; take what is expected of several, "
                "expected(attempts), or name an easier target"
            )
    links_a, links_b = _links(a), _links(b)
    return Factors(
        convergence=a.samples / b.samples,
        compute=b.samples_per_s / a.samples_per_s,
        overhead=(a.elapsed_s / a.training_s) / (b.elapsed_s / b.training_s),
        by_part={part: links_a[part] / links_b[part] for part in (*TRAINING, *OVERHEAD)},
    )


def _links(attempt: Attempt) -> dict[PartName, float]:
    """The chain of an attempt's time over its samples: `S_1/N, S_2/S_1, ...`, by the part that is added."""
    links: dict[PartName, float] = {}
    before = attempt.samples
    within = 0.0
    for part in (*TRAINING, *OVERHEAD):
        within += attempt.seconds.get(part, 0.0)
        if before <= 0 or within <= 0:
            raise ValueError(
                f"samples={attempt.samples:g} and {within:g} s of {part}: a run that learnt from nothing, or "
                "in no time, has no factors; is its record cut short?"
            )
        links[part] = within / before
        before = within
    return links


def expected(attempts: Sequence[Attempt]) -> Attempt:
    """The attempt to expect where one goes on with the next seed after a miss.

    All samples and seconds, over the number of attempts that got there: the mean where none missed, and
    the most likely mean of censored samples where chances do not change with time.

    Raises:
        ValueError: All missed.
    """
    reached = sum(attempt.is_reached for attempt in attempts)
    if not reached:
        raise ValueError(
            f"none of {len(attempts)} attempts met the quality; name an easier target, or train for longer"
        )
    return Attempt(
        samples=math.fsum(attempt.samples for attempt in attempts) / reached,
        is_reached=True,
        seconds={
            part: math.fsum(attempt.seconds.get(part, 0.0) for attempt in attempts) / reached
            for part in PARTS
        },
    )


def counted(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """The attempts that the rules count: all but the fastest and the slowest; a miss is the slowest.

    Raises:
        ValueError: Fewer than three, or so many misses that one counts.
    """
    if len(attempts) < 3:
        raise ValueError(f"{len(attempts)} attempts leave none to count; the rules ask for 5 or 10")
    ranked = sorted(attempts, key=lambda attempt: (not attempt.is_reached, attempt.elapsed_s))
    kept = tuple(ranked[1:-1])
    missed = sum(not attempt.is_reached for attempt in attempts)
    if not all(attempt.is_reached for attempt in kept):
        raise ValueError(
            f"{missed} of {len(attempts)} attempts missed the quality; the rules forgive one"
        )
    return kept


def score_s(attempts: Sequence[Attempt]) -> float:
    """The score of the benchmark's rules in seconds: the mean of the attempts that count (`counted`)."""
    return expected(counted(attempts)).elapsed_s


def bootstrap(
    a: Sequence[Attempt],
    b: Sequence[Attempt],
    of: Callable[[Factors], float],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """A 95 % interval of a factor between two sets of attempts, whose seeds are drawn with replacement.

    A draw in which all of one side missed counts as an infinite ratio against that side.
    """
    generator = np.random.default_rng(seed)
    ratios = np.empty(draws)
    for draw in range(draws):
        sides = [
            [side[index] for index in generator.integers(len(side), size=len(side))]
            for side in (a, b)
        ]
        hopeless = [not any(attempt.is_reached for attempt in side) for side in sides]
        if any(hopeless):
            ratios[draw] = 1.0 if all(hopeless) else math.inf if hopeless[0] else 0.0
        else:
            ratios[draw] = of(factors(expected(sides[0]), expected(sides[1])))
    low, high = np.quantile(ratios, (0.025, 0.975), method="nearest")
    return float(low), float(high)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLaw:
    """Samples to quality by batch: `N = least * (1 + batch / critical)` (McCandlish et al. 2018)."""

    least: float
    """Samples that a small batch needs."""
    critical: float
    """The batch that needs twice as many."""

    def samples(self, batch: float) -> float:
        """Samples to quality at a batch."""
        return self.least * (1 + batch / self.critical)


def batch_law(
    batches: Float[np.ndarray, " point"], samples: Float[np.ndarray, " point"]
) -> BatchLaw:
    """The law through samples to quality at several batches, by least squares of their logarithms.

    Raises:
        ValueError: Fewer than two batches differ.
    """
    if len(set(batches.tolist())) < 2:
        raise ValueError(f"batches {sorted(set(batches.tolist()))} tell no law; take two or more")

    def misfit(parameters: Float[np.ndarray, "2"]) -> Float[np.ndarray, " point"]:
        least, critical = parameters
        return least + np.log1p(batches * np.exp(-critical)) - np.log(samples)

    start = np.log([samples.min(), np.median(batches)])
    # A law without a rise lies at an infinite critical batch; a thousandfold tells no more.
    bounds = ([-np.inf, math.log(batches.min() / 1000)], [np.inf, math.log(batches.max() * 1000)])
    least, critical = least_squares(misfit, start, bounds=bounds, x_scale="jac").x
    return BatchLaw(least=float(np.exp(least)), critical=float(np.exp(critical)))
