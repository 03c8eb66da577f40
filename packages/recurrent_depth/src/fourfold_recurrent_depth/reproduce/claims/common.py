"""What all rules of this package share: stages, events, and the verdict over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Finding, Verdict

AUTOMATON, LANGUAGE, EXACT = "automaton", "language", "exact"
DRAWS, ADDITION, RETROFIT = "draws", "addition", "retrofit"
"""Names of the stages."""


def of(record: Record, kind: str, **fields: object) -> tuple[Event, ...]:
    """Events of a kind with certain values."""
    return tuple(
        event
        for event in record.of(kind)
        if all(event.values.get(name) == value for name, value in fields.items())
    )


def seeds_of(record: Record, kind: str, **fields: object) -> tuple[int, ...]:
    """Seeds that have such events."""
    return tuple(sorted({int(event.number("seed")) for event in of(record, kind, **fields)}))


def finding(verdict: Verdict, ours: str, event: Event, because: str, stage: str) -> Finding:
    """A rule's answer, with the event that it stands on."""
    return Finding(verdict=verdict, ours=ours, evidence=stage, line=event.line, because=because)


def all_or_none(held: Sequence[bool], failed: Sequence[bool]) -> Verdict:
    """Reproduced where every seed holds, contradicted where every seed fails, else inconclusive."""
    if all(held):
        return "reproduced"
    return "contradicted" if all(failed) else "inconclusive"
