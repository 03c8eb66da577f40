"""Numbers from records that rules, figures and tables share."""

from __future__ import annotations

from collections.abc import Sequence

from fourfold_gemstones.reproduce.stages import PUBLISHED
from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Records

OPTIMUM = 0.03
"""Per cent above the global optimum from which a published fit counts as not at its optimum."""


def largest(events: Sequence[Event], key: str) -> Event:
    """The event with the largest value."""
    return max(events, key=lambda event: event.number(key))


def between(event: Event, low: str = "low", high: str = "high") -> str:
    """An interval as printed in ledgers."""
    return f"[{event.number(low):.3f}, {event.number(high):.3f}]"


def excludes_zero(event: Event, low: str = "low", high: str = "high") -> bool:
    """True where an interval lies on one side of zero."""
    return event.number(low) > 0 or event.number(high) < 0


def above_optimum(record: Record) -> Sequence[Event]:
    """Published fits more than `OPTIMUM` per cent above the optimum."""
    return [
        event for event in record.of("refit") if event.number("published_above_percent") > OPTIMUM
    ]


def headline(records: Records) -> str:
    """The finding in a sentence: fits that stopped early, and intervals that hold."""
    record = records[PUBLISHED]
    runs, rows = (record.only("coverage", groups=groups) for groups in ("run", "row"))
    return (
        f"{len(above_optimum(record))} of the {len(record.of('refit'))} published fits are not at the "
        f"minimum of their objective; intervals over whole runs hold the true slope in "
        f"{runs.number('covered'):.0f} of {runs.number('suites'):.0f} simulations, over single rows in "
        f"{rows.number('covered'):.0f}."
    )
