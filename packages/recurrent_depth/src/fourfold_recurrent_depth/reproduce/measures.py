"""What rules and figures both read off the records of this package."""

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
