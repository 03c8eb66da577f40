"""Numbers from the records, which rules, figures and tables share."""

from __future__ import annotations

from collections.abc import Sequence

from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import Records


def events(records: Records, stage: str, kind: str) -> list[Event]:
    """The events of a kind in a stage's record."""
    return [e for e in records[stage].events if e.kind == kind]


def event(records: Records, stage: str, kind: str) -> Event:
    """The first of them."""
    return events(records, stage, kind)[0]


def errors(records: Records) -> dict[str, float]:
    """Of each weak-scaling point, the simulated rate against the paper's, less one."""
    return {
        f"{p.values['model']} on {p.values['devices']} of {p.values['machine']}": p.values["pflops_per_s"]
        / p.values["paper_pflops_per_s"]
        - 1
        for p in events(records, "weak-scaling", "point")
    }  # fmt: skip


def place(grid: Sequence[float], ranking: Sequence[Sequence[float]]) -> int:
    """Where a grid stands in a ranking, from 1; rows are the four sizes and the seconds."""
    return 1 + [list(row[:4]) for row in ranking].index(list(grid[:4]))
