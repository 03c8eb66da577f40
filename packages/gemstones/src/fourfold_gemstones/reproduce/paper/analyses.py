"""Every analysis of the published measurements by name."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from fourfold_gemstones.reproduce.paper.downstream import benchmarks, other_texts
from fourfold_gemstones.reproduce.paper.envelopes import envelopes, left_out
from fourfold_gemstones.reproduce.paper.optimum import (
    chinchilla,
    lines,
    refits,
    restarts,
    thresholds,
)
from fourfold_gemstones.reproduce.paper.prescriptions import (
    overspending,
    overtraining,
    prescriptions,
)
from fourfold_gemstones.reproduce.paper.schedules import cooldown, held_out, learning_rates
from fourfold_gemstones.reproduce.paper.settings import Events, Fields, Revisit
from fourfold_gemstones.reproduce.paper.slopes import (
    embeddings,
    paired,
    profiles,
    simulated_coverage,
    slopes,
)

PARTS: MappingProxyType[str, Callable[[Revisit], Events]] = MappingProxyType(
    {
        "coverage": simulated_coverage,
        "prescriptions": prescriptions,
        "published fits": refits,
        "restarts from them": restarts,
        "published lines": lines,
        "Chinchilla points": chinchilla,
        "slopes and intervals": slopes,
        "profiles": profiles,
        "paired differences": paired,
        "envelopes and their null": envelopes,
        "left-out models": left_out,
        "Huber thresholds": thresholds,
        "embeddings": embeddings,
        "held-out error": held_out,
        "overtraining": overtraining,
        "overspending": overspending,
        "cooldown": cooldown,
        "learning rates": learning_rates,
        "benchmarks": benchmarks,
        "other texts": other_texts,
    }
)
"""In the order in which they are done: the two that take minutes first."""
SLOW = frozenset(
    {
        "coverage",
        "prescriptions",
        "profiles",
        "restarts from them",
        "Huber thresholds",
        "embeddings",
        "held-out error",
    }
)
"""Parts that take more than a few seconds."""


def analyse(run: Revisit, name: str) -> tuple[tuple[str, Fields], ...]:
    """The events of one part, by name; for a worker process."""
    return tuple(PARTS[name](run))
