"""Numbers from the records, which rules, figures and tables share."""

from __future__ import annotations

import statistics

from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import Records

Grid = tuple[float, ...]
"""Its four sizes: data, depth, row, col."""


def points(records: Records) -> tuple[Event, ...]:
    """The weak-scaling points."""
    return records["weak-scaling"].of("point")


def error(point: Event) -> float:
    """The simulated rate against the paper's, less one."""
    return point.number("pflops_per_s") / point.number("paper_pflops_per_s") - 1


def errors(records: Records) -> dict[str, float]:
    """Of each weak-scaling point."""
    return {
        f"{p.values['model']} on {p.values['devices']} of {p.values['machine']}": error(p)
        for p in points(records)
    }


def headline(records: Records) -> str:
    """The sentence of the report's first screen."""
    middle = statistics.median(abs(e) for e in errors(records).values())
    return (
        f"The planner simulates the paper's {len(points(records))} weak-scaling runs, on up to 32,768 "
        f"devices, with a median error of {middle:.1%}: one constant a machine is fitted."
    )


def ranking(case: Event, key: str) -> dict[Grid, float]:
    """The grids of a ranking with their seconds, fastest first."""
    rows = case.values[key]
    assert isinstance(rows, list)
    table = [[float(str(cell)) for cell in row] for row in rows if isinstance(row, list)]
    return {tuple(sizes): seconds for *sizes, seconds in table}


def places(case: Event, *, first: int) -> list[int]:
    """Places of our first grids in the authors' ranking, from 1."""
    theirs = list(ranking(case, "theirs"))
    return [1 + theirs.index(grid) for grid in list(ranking(case, "ours"))[:first]]
