"""How a claim is written down: the rule beside the words that describe it, fixed before the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Claim, Finding, Records, Verdict
from fourfold_parallel.reproduce.scale import Scale

PUBLISHED = "published"
"""Name of the stage that analyses the published measurements."""
SUITE = "suite"
"""Name of the stage that trains our own suite."""
LAWS = "laws"
"""Name of the stage that fits laws to our own suite."""
ABSENT = {
    PUBLISHED: "needs: a copy of the paper's repository at ./gemstone-scaling-laws",
    SUITE: "needs: the stage that trains our own suite",
    LAWS: "needs: the stage that fits laws to our own suite",
}
"""Why a rule has no record to judge."""
BOTH: tuple[Scale, ...] = ("smoke", "laptop")
LAPTOP: tuple[Scale, ...] = ("laptop",)
THEIRS = "the paper's own measurements"
"""Conditions of a claim judged on what the paper measured."""
OURS = (
    "bytes of Python source, 17 shapes of 16 thousand to 1.1 million parameters, up to 229 thousand "
    "bytes each"
)
"""Conditions of our own suite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a rule found in one stage's record."""

    verdict: Verdict
    ours: str
    event: Event
    """The deciding line."""
    because: str


def judged(verdict: Verdict, ours: str, event: Event, because: str) -> Judged:
    """A finding, in the order in which ledgers show it."""
    return Judged(verdict=verdict, ours=ours, event=event, because=because)


def decide(*, reproduced: bool, contradicted: bool) -> Verdict:
    """The verdict of two conditions that exclude each other; neither leaves it open."""
    return "reproduced" if reproduced else "contradicted" if contradicted else "inconclusive"


def claim(
    identity: str,
    *,
    stage: str,
    section: str,
    statement: str,
    paper: str,
    rule: str,
    scales: tuple[Scale, ...] = LAPTOP,
) -> Callable[[Callable[[Record], Judged]], Claim]:
    """Make a function of one stage's record the claim that it judges.

    Without the record, or without the event that it asks for last, the claim is not tested.
    """

    def of(judge: Callable[[Record], Judged]) -> Claim:
        def apply(records: Records) -> Finding:
            if stage not in records:
                return _untested(ABSENT[stage])
            try:
                judged = judge(records[stage])
            except NoMaterialError as missing:
                return _untested(f"needs: {missing}")
            return Finding(
                verdict=judged.verdict,
                ours=judged.ours,
                evidence=stage,
                line=judged.event.line,
                because=judged.because,
            )

        return Claim(
            id=identity,
            section=section,
            statement=statement,
            paper_value=paper,
            conditions=THEIRS if stage == PUBLISHED else OURS,
            rule_text=rule,
            rule=apply,
            scales=scales,
            needs="the laptop scale",
        )

    return of


class NoMaterialError(Exception):
    """The record was made without the files that a claim is about; the message names them."""


def material(record: Record, kind: str, files: str) -> Event:
    """The last event of a kind that is written only where some files are there.

    Raises:
        NoMaterialError: There is none.
    """
    if not record.of(kind):
        raise NoMaterialError(files)
    return record.last(kind)


def _untested(because: str) -> Finding:
    return Finding(verdict="not tested", ours="", evidence="", line=0, because=because)


def where(record: Record, kind: str, **fields: object) -> Event:
    """The one event of a kind with these fields."""
    found = [
        event
        for event in record.of(kind)
        if all(event.values.get(name) == value for name, value in fields.items())
    ]
    if len(found) != 1:
        raise ValueError(
            f"{record.path} has {len(found)} events {kind!r} with {fields}; expected 1"
        )
    return found[0]


def largest(events: Sequence[Event], key: str) -> Event:
    """The event with the largest value."""
    return max(events, key=lambda event: event.number(key))


def numbers(event: Event, key: str) -> list[float]:
    """A list of numbers of an event."""
    values = event.values[key]
    assert isinstance(values, list)
    return [float(value) for value in values if isinstance(value, int | float)]


def between(event: Event, low: str = "low", high: str = "high") -> str:
    """An interval as printed in ledgers."""
    return f"[{event.number(low):.3f}, {event.number(high):.3f}]"


def excludes_zero(event: Event, low: str = "low", high: str = "high") -> bool:
    """Whether an interval lies on one side of zero."""
    return event.number(low) > 0 or event.number(high) < 0
