"""Functions of this package's records that rules and figures share."""

from __future__ import annotations

from fourfold_parallel.common.records import Record
from fourfold_parallel.reproduce.claims import Records

AUTOMATON, LANGUAGE, EXACT = "automaton", "language", "exact"
DRAWS, ADDITION, RETROFIT, WORTH = "draws", "addition", "retrofit", "worth"
"""Names of the stages."""


def accuracies(record: Record, arm: str, seed: int) -> dict[tuple[int, int], float]:
    """Accuracy by (k, recurrences)."""
    return {
        (int(event.number("k")), int(event.number("recurrences"))): event.number("accuracy")
        for event in record.of("accuracy", arm=arm, seed=seed)
    }


def sums(record: Record, seed: int) -> dict[tuple[int, int], float]:
    """Accuracy of additions by (operands, recurrences)."""
    return {
        (int(event.number("operands")), int(event.number("recurrences"))): event.number("accuracy")
        for event in record.of("addition", seed=seed)
    }


def recurrences_needed(table: dict[tuple[int, int], float]) -> dict[int, int]:
    """The least recurrences with 90 % of the final accuracy, by operands, from two on."""
    depths = sorted({recurrences for _, recurrences in table})
    operands = sorted({count for count, _ in table if count >= 2})
    return {
        count: min(r for r in depths if table[count, r] >= 0.9 * table[count, depths[-1]])
        for count in operands
    }


def headline(records: Records) -> str:
    """The finding in a sentence: what sums of few and of many operands need."""
    record = records[ADDITION]
    needed = [recurrences_needed(sums(record, seed)) for seed in record.seeds("addition")]
    few, many = min(needed[0]), max(needed[0])
    ranges = [sorted({table[count] for table in needed}) for count in (few, many)]
    fewest, most = ("-".join(map(str, sorted({r[0], r[-1]}))) for r in ranges)
    return (
        f"Sums of {few} numbers need {fewest} recurrence{'s' if fewest != '1' else ''}, sums of {many} need "
        f"{most}: more thought for harder sums, from the same weights."
    )
