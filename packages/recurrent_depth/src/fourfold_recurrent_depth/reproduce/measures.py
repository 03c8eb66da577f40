"""Functions of this package's records that rules and figures share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fourfold_parallel.common.records import Record
from fourfold_parallel.reproduce.claims import Records
from fourfold_recurrent_depth.reproduce.recipes import CELLS_MEAN, MEAN

AUTOMATON, LANGUAGE, EXACT = "automaton", "language", "exact"
DRAWS, ADDITION, RETROFIT, WORTH = "draws", "addition", "retrofit", "worth"
"""Names of the stages."""


def accuracies(record: Record, arm: str, seed: int) -> dict[tuple[int, int], float]:
    """Accuracy by (k, recurrences)."""
    return {
        (int(event.number("k")), int(event.number("recurrences"))): event.number("accuracy")
        for event in record.of("accuracy", arm=arm, seed=seed)
    }


def sums(record: Record, arm: str, seed: int) -> dict[tuple[int, int], float]:
    """Accuracy of additions by (operands, recurrences)."""
    return {
        (int(event.number("operands")), int(event.number("recurrences"))): event.number("accuracy")
        for event in record.of("addition", arm=arm, seed=seed)
    }


DEPTH_ARMS = {"law": "random depth", "fixed": "one depth", "averaged": "averaged exits"}
"""Ways to train, as documents name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthTask:
    """A task on which models are read at many depths; a higher score is better."""

    name: str
    mean: int
    """Recurrences of training, on average."""
    scores: Callable[[Records, str], list[dict[int, float]]]
    """Of an arm: for each seed in order, the score by recurrences."""


def _of_hardest(
    stage: str, kind: str, table_of: Callable[[Record, str, int], dict[tuple[int, int], float]]
) -> Callable[[Records, str], list[dict[int, float]]]:
    def scores(records: Records, arm: str) -> list[dict[int, float]]:
        record = records[stage]
        tables = [table_of(record, arm, seed) for seed in record.seeds(kind, arm=arm)]
        return [
            {r: right for (hard, r), right in table.items() if hard == max(k for k, _ in table)}
            for table in tables
        ]

    return scores


def _language(records: Records, arm: str) -> list[dict[int, float]]:
    record = records[LANGUAGE]
    return [
        {
            int(event.number("recurrences")): -event.number("loss_nats")
            for event in record.of("held_out", arm=arm, seed=seed)
        }
        for seed in record.seeds("held_out", arm=arm)
    ]


DEPTH_TASKS = (
    DepthTask(name="additions of 6", mean=MEAN, scores=_of_hardest(ADDITION, "addition", sums)),
    DepthTask(
        name="automaton, k=3",
        mean=CELLS_MEAN,
        scores=_of_hardest(AUTOMATON, "accuracy", accuracies),
    ),
    DepthTask(name="bytes of Python", mean=MEAN, scores=_language),
)
"""Where more depth at test time is asked about: shares of right answers, and nats below zero."""


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
    seeds = record.seeds("addition", arm="law")
    needed = [recurrences_needed(sums(record, "law", seed)) for seed in seeds]
    few, many = min(needed[0]), max(needed[0])
    ranges = [sorted({table[count] for table in needed}) for count in (few, many)]
    fewest, most = ("-".join(map(str, sorted({r[0], r[-1]}))) for r in ranges)
    return (
        f"Sums of {few} numbers need {fewest} recurrence{'s' if fewest != '1' else ''}, sums of {many} need "
        f"{most}: more thought for harder sums, from the same weights."
    )
