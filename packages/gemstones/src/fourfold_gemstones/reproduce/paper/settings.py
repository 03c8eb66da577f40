"""The settings that every analysis of the published measurements is given, and the events it gives back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.stats import spearmanr

from fourfold_gemstones.parametric import LawWarning, ParametricFit, ParametricLaw
from fourfold_gemstones.runs import RunTable

Fields = Mapping[str, object]
"""Values of one event, by key."""
Events = Iterator[tuple[str, Fields]]
"""Kind and fields of each event of a record: plain numbers, never the measurements themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revisit:
    """Amounts of searching and resampling in the analysis of the published measurements."""

    data_sha256: str
    """Over the names and bytes of every file that is read."""
    parts: tuple[str, ...]
    """Names of the analyses to do."""
    starts: int
    """Descents of every fit."""
    draws: int
    """Bootstrap draws of two-term laws."""
    shaped_draws: int
    """Bootstrap draws of the width-depth law, which takes ten times as long."""
    suites: int
    """Simulated suites of the coverage check."""
    seed: int

    def fitted(self, law: ParametricLaw, table: RunTable) -> ParametricFit:
        """The fit, without the warnings, whose content the events carry."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LawWarning)
            return replace(law, starts=self.starts).fit(table)

    def generator(self) -> np.random.Generator:
        """The same draws for every analysis."""
        return np.random.default_rng(self.seed)


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Rank correlation and its p-value."""
    test = np.asarray(spearmanr(x, y))
    return float(test[0]), float(test[1])
