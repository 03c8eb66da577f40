"""Functions of this package's records that rules and figures share."""

from __future__ import annotations

from fourfold_parallel.common.records import Record

AUTOMATON, LANGUAGE, EXACT = "automaton", "language", "exact"
DRAWS, ADDITION, RETROFIT = "draws", "addition", "retrofit"
"""Names of the stages."""


def accuracies(record: Record, arm: str, seed: int) -> dict[tuple[int, int], float]:
    """Accuracy by (k, recurrences)."""
    return {
        (int(event.number("k")), int(event.number("recurrences"))): event.number("accuracy")
        for event in record.of("accuracy", arm=arm, seed=seed)
    }
