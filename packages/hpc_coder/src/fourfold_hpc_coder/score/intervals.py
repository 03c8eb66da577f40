"""The sureness of a rate: Wilson's interval over samples, and the bootstrap's over problems.

The two answer two questions. Wilson's (1927) takes the samples for independent draws of one chance: how far
would the rate move if the same prompts were answered again, all equally hard? The bootstrap draws whole
problems anew: how far would it move on other problems of the kind? Samples of one prompt resemble one
another, so the second is usually the wider, and the one to read.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

Interval = tuple[float, float]
"""Lower and upper end, of 95 %."""
NO_INTERVAL: Interval = (math.nan, math.nan)
Z = 1.959963984540054
"""Of the normal distribution, for 95 % on both sides."""
DRAWS = 2000
SEED = 20260601
"""Draws are the same each time: equal results have equal intervals."""
T = TypeVar("T")


def wilson(successes: int, samples: int) -> Interval:
    """Wilson's score interval of a share (95 %); NaN for no samples.

    Raises:
        ValueError: for more successes than samples, or fewer than none.
    """
    if not 0 <= successes <= samples:
        raise ValueError(f"{successes} of {samples}: use successes between 0 and the samples")
    if samples == 0:
        return NO_INTERVAL
    share, spread = successes / samples, Z * Z / samples
    middle = (share + spread / 2) / (1 + spread)
    reach = Z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    # At the ends the interval is one-sided, and rounding must not take it beyond them.
    low = 0.0 if successes == 0 else middle - reach
    high = 1.0 if successes == samples else middle + reach
    return low, high


def bootstrap(problems: Sequence[T], statistic: Callable[[Sequence[T]], float]) -> Interval:
    """The percentile bootstrap's interval (95 %) of a mean over problems; NaN for fewer than two.

    Args:
        problems: each with its samples.
        statistic: a mean over problems of a value of each, so that resampling may draw those values.
    """
    if len(problems) < 2:
        return NO_INTERVAL
    values = np.array([statistic([problem]) for problem in problems])
    if np.isnan(values).any():
        return NO_INTERVAL
    generator = np.random.default_rng(SEED)
    means = values[generator.integers(len(values), size=(DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
