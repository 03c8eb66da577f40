"""Claims S2 and S3, judged by rules that were written before any run of this stage.

Earlier rules of both were changed after the records that they judge had been seen. So the rules below are
new, and so are the runs: seeds that no other record has, more of them, and a speed that is compared round by
round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fourfold_gemstones.architecture import Architecture
from fourfold_gemstones.reproduce.stages import fresh, fresh_claim
from fourfold_gemstones.reproduce.suite.claims import gains
from fourfold_gemstones.reproduce.suite.train import (
    Member,
    Shape,
    each_member,
    speed_rounds,
    speeds,
)
from fourfold_parallel.common.records import Record
from fourfold_parallel.reproduce.claims import Finding, Records, decide, over_seeds
from fourfold_parallel.reproduce.experiment import Workplace
from fourfold_parallel.run.models import Llama

PAIRS: tuple[tuple[Shape, Shape], ...] = (
    ((64, 1), (32, 4)),
    ((128, 1), (64, 4)),
    ((128, 2), (64, 8)),
    ((256, 1), (64, 16)),
)
"""A wide and a deep shape of one size, within a fifth."""
ROUNDS = 12
"""Rounds of the timing, in each of which every shape is timed once."""
MOST_ROUNDS, FEWEST_ROUNDS = 10, 2
"""Rounds won from which, or up to which, twelve rounds decide: p = .019 by the sign test, one-sided."""
NEGLIGIBLE = 0.25
"""Share of the mean gain below which a change of the gain would not shift a law."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooling:
    """Runs with two cooldowns each, runs that were forecast, and shapes whose speed is measured."""

    members: tuple[Member, ...]
    forecast: tuple[Member, ...]
    """Runs of new shapes and lengths, whose last losses were forecast before."""
    timed: tuple[Llama, ...]
    architecture: Architecture
    rounds: int
    seed: int


def train_cooling(run: Cooling, workplace: Workplace, *, processes: int) -> None:
    """Train every member and time every shape, and write one record of all."""
    first = run.members[0].run
    text = first.data.open(sequence=first.sequence, seed=0)
    with workplace.recording(run, seed=run.seed, materials=text.file.materials) as records:
        members = (*run.members, *run.forecast)
        for events in each_member(members, first.data, workplace, processes=processes):
            for kind, fields in events:
                records.write(kind, **fields)
        for fields in speeds(run.timed, first, rounds=run.rounds, seed=run.seed):
            records.write("speed", **fields)


def changes(record: Record) -> list[float]:
    """Gain of the last cooldown less that of the first: the mean over seeds, for each shape."""
    by_shape: dict[str, list[float]] = {}
    for run, of_run in gains(record).items():
        by_shape.setdefault(run.split("-")[0], []).append(of_run[-1] - of_run[0])
    return [float(np.mean(values)) for values in by_shape.values()]


@fresh_claim(
    "S2",
    section="5",
    says="What cooling down gains changes with the tokens, so that it shifts the law",
    paper="slope .499 to .597 (approach 1)",
    rule="six shapes of three seeds, cooled after a fifth of the run and at its end; a shape's change is the "
    "mean over its seeds of the last gain less the first: reproduced if Student's 95 % interval of the mean "
    "over shapes excludes zero; contradicted if it lies within a quarter of the mean gain of zero",
)
def cooling_shifts(records: Records) -> Finding:
    """The interval of the mean change over shapes."""
    record = fresh(records)
    change = over_seeds(changes(record))
    every = [gain for of_run in gains(record).values() for gain in of_run]
    small = NEGLIGIBLE * abs(float(np.mean(every)))
    excludes = change.low > 0 or change.high < 0
    return Finding(
        decide(
            reproduced=excludes,
            contradicted=not excludes and -small <= change.low and change.high <= small,
        ),
        f"gain changes by {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}] nats from the first "
        "fork to the last",
        record.of("point")[-1],
        f"mean of {change.seeds} shapes; a quarter of the mean gain is {small:.4f} nats",
    )


@fresh_claim(
    "S3",
    section="4.1",
    says="Of two shapes of one size the wider trains faster",
    paper="a figure: GPU-hours fall with width",
    rule=f"four pairs of one size, {ROUNDS} rounds, all shapes in turn: reproduced if in each pair the wider "
    f"trains more tokens per CPU-second in at least {MOST_ROUNDS} rounds; contradicted if in some pair it "
    f"does in at most {FEWEST_ROUNDS}",
)
def wide_is_faster(records: Records) -> Finding:
    """Rounds that the wider shape of each pair wins."""
    record = fresh(records)
    rounds = speed_rounds(record)
    won = [
        sum(w > d for w, d in zip(rounds[wide], rounds[deep], strict=True)) for wide, deep in PAIRS
    ]
    ratios = "; ".join(
        f"{wide[0]}x{wide[1]} over {deep[0]}x{deep[1]}: "
        f"{np.median(rounds[wide]) / np.median(rounds[deep]):.2f}"
        for wide, deep in PAIRS
    )
    return Finding(
        decide(
            reproduced=min(won) >= MOST_ROUNDS,
            contradicted=min(won) <= FEWEST_ROUNDS,
        ),
        ratios,
        record.of("speed")[-1],
        f"the wider wins {', '.join(map(str, won))} of {len(rounds[PAIRS[0][0]])} rounds, one CPU thread",
    )
