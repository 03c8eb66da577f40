"""A suite of our own, trained through the runtime the way the paper trained its own.

One constant learning rate after a short warm-up, base / (width sqrt(depth)), so that every validation
on the way is a point of the law; cooldowns fork from checkpoints of the constant run and fall linearly
to zero over a tenth more tokens. Beside the losses it measures what a time-optimal plan needs: how fast
each shape trains.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fourfold_gemstones.architecture import Architecture
from fourfold_gemstones.runs import RunTable
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import Event, Record, read_record
from fourfold_parallel.common.workers import each
from fourfold_parallel.reproduce.experiment import Workplace
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.checkpoint import Checkpoint
from fourfold_parallel.run.data import TokenSource
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import token_nats
from fourfold_parallel.run.optimizer import Cooldown
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.train import train, trained_model

SECOND_ROWS = 64
"""Rows of the second corpus on which every finished run is scored."""
TIMED_STEPS = 3
"""Steps of each shape in each round of the timing, after one that is not counted."""


def decoder(width: int, depth: int, architecture: Architecture) -> Llama:
    """The architecture's decoder of one shape: heads in pairs that share keys, four times the width.

    Raises:
        ValueError: where heads do not tile the width.
    """
    heads = width // architecture.head_width
    if width % architecture.head_width:
        raise ValueError(
            f"width={width} is not a multiple of head_width={architecture.head_width}; use a "
            f"multiple of {architecture.head_width}"
        )
    groups = max(1, heads // 2)
    return Llama(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=groups if heads % groups == 0 else 1,
        hidden=4 * width,
        vocabulary=architecture.vocabulary,
        context=architecture.context,
        tied=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A constant-rate run of the suite, and where cooldowns fork from it."""

    run: Run
    """Its model is a `Llama`; its horizon the longest point."""
    rate: float
    """Its learning rate over the rule's: one half for the twins."""
    forks: tuple[int, ...]
    """Steps after which a cooldown of a tenth as many steps is run beside the constant run."""

    @property
    def model(self) -> Llama:
        """The run's model."""
        assert isinstance(self.run.model, Llama)
        return self.run.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """All members, and what is measured of them beside their losses."""

    members: tuple[Member, ...]
    architecture: Architecture
    second: TokenSource
    """Text of another kind, on which every finished run is scored too."""
    rounds: int
    """Measurements of the speed of each shape, all shapes in turn."""
    seed: int

    @property
    def shapes(self) -> tuple[Llama, ...]:
        """Each shape once."""
        return tuple(dict.fromkeys(member.model for member in self.members))


def scaled_rate(base: float, width: int, depth: int) -> float:
    """The paper's learning rate: base / (width sqrt(depth)), section 3.1."""
    return base / (width * math.sqrt(depth))


def segments(member: Member) -> tuple[tuple[Run, Run | None], ...]:
    """Constant runs to each fork and to the end, each beside the cooldown that forks from its end."""
    pieces: list[tuple[Run, Run | None]] = []
    steps = member.run.steps
    for stop in sorted({*member.forks, steps}):
        constant = replace(
            member.run, name=f"{member.run.name}-to{stop}", horizon=Steps(count=stop)
        )
        cooled = None
        if stop in member.forks:
            extra = max(1, round(0.1 * stop))
            cooled = replace(
                member.run,
                name=f"{member.run.name}-cooled{stop}",
                horizon=Steps(count=stop + extra),
                schedule=Cooldown(warmup_steps=0, cooldown_steps=extra),
                validate_every=stop + extra,
            )
        pieces.append((constant, cooled))
    return tuple(pieces)


Fields = dict[str, float | str]
"""Values of one event of the record."""


def train_member(
    member: Member, folder: Path, second: TokenSource
) -> tuple[tuple[str, Fields], ...]:
    """Train one member and its forks; an event "point" for every validation, "second" at the end.

    A member that was finished before is read from its records; an interrupted one goes on.
    """
    torch.set_num_threads(1)
    about: Fields = {
        "run": member.run.name,
        "width": member.model.width,
        "depth": member.model.depth,
        "rate": member.rate,
        "seed": member.run.seed,
    }
    events: list[tuple[str, Fields]] = []
    last: Checkpoint | None = None
    points: list[Fields] = []
    for constant, cooled in segments(member):
        last, record = _train(constant, last, folder)
        points = _points(member.run, record)
        events += [("point", about | {"schedule": "constant"} | point) for point in points]
        if cooled is not None:
            _, record = _train(cooled, last, folder)
            forked: Fields = {"schedule": "cooled", "forked_at": constant.steps}
            events += [("point", about | forked | point) for point in _points(member.run, record)]
    assert last is not None
    scored = replace(member.run, horizon=Steps(count=last.step))
    second_nats = score(scored, last, second)
    events.append(
        ("second", about | {"loss_nats": points[-1]["loss_nats"], "second_nats": second_nats})
    )
    return tuple(events)


def _train(run: Run, source: Checkpoint | None, folder: Path) -> tuple[Checkpoint, Record]:
    checkpoints = folder / run.name / "checkpoints"
    if source is not None and not checkpoint.checkpoints(checkpoints):
        checkpoint.fork(source, run, checkpoints)
    record = folder / run.name / "record.jsonl"
    last = train(run, record=record, checkpoints=checkpoints, progress=silent)
    return last, read_record(record)


def _points(run: Run, record: Record) -> list[Fields]:
    points: list[Fields] = []
    for event in record.of("validation"):
        step = int(event.number("step"))
        points.append(
            {
                "step": step,
                "tokens": step * run.tokens_per_step,
                "learning_rate": run.optimizer.learning_rate,
                "loss_nats": event.number("validation_loss_nats"),
            }
        )
    return points


@torch.no_grad()
def score(run: Run, last: Checkpoint, text: TokenSource) -> float:
    """Mean loss, in nats, of a trained model on the first `SECOND_ROWS` rows of another text."""
    rows = text.open(sequence=run.sequence, seed=0).batch(0, batch=SECOND_ROWS).tokens
    model = trained_model(run, last)
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return float(token_nats(logits, rows[:, 1:], model).double().mean())


def speeds(shapes: Sequence[Llama], first: Run, *, rounds: int, seed: int) -> list[Fields]:
    """Tokens of training per second of one thread, every shape once in each round.

    `first` gives batch, sequence and optimizer.

    Seconds are the process's own, so that what else the machine does counts little, and rounds go
    through all shapes in turn, so that what it does count falls on all alike.
    """
    torch.set_num_threads(1)
    tokens = torch.randint(
        shapes[0].vocabulary,
        (first.batch, first.sequence + 1),
        generator=torch.Generator().manual_seed(seed),
    )
    measured: list[Fields] = []
    for number in range(rounds):
        for shape in shapes:
            model = shape.build(seed=number)
            optimizer = first.optimizer.build(model)

            def step() -> None:
                logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # noqa: B023
                token_nats(logits, tokens[:, 1:], model).mean().backward()  # noqa: B023
                optimizer.step()  # noqa: B023
                optimizer.zero_grad(set_to_none=True)  # noqa: B023

            step()
            began_s = time.process_time()
            for _ in range(TIMED_STEPS):
                step()
            elapsed_s = time.process_time() - began_s
            rate = TIMED_STEPS * first.tokens_per_step / elapsed_s
            about: Fields = {"width": shape.width, "depth": shape.depth, "round": number}
            measured.append(about | {"tokens_per_cpu_s": rate})
    return measured


def each_member(
    members: Sequence[Member], second: TokenSource, workplace: Workplace, *, processes: int
) -> Iterator[tuple[tuple[str, Fields], ...]]:
    """The events of every member in order, as many trained at a time as there are `processes`."""
    work = partial(train_member, folder=workplace.scratch, second=second)
    for done, events in enumerate(each(work, members, processes=processes), start=1):
        workplace.progress(done, len(members), members[done - 1].run.name)
        yield events


def train_suite(suite: Suite, workplace: Workplace, *, processes: int) -> None:
    """Train every member, as many at a time as there are `processes`, and write one record of all."""
    first = suite.members[0].run
    # Tokenized once here, so that the workers find it in the cache.
    texts = [source.open(sequence=first.sequence, seed=0) for source in (first.data, suite.second)]
    materials = tuple(dict.fromkeys(item for text in texts for item in text.file.materials))
    with workplace.recording(suite, seed=suite.seed, materials=materials) as records:
        for events in each_member(suite.members, suite.second, workplace, processes=processes):
            for kind, fields in events:
                records.write(kind, **fields)
        for fields in speeds(suite.shapes, first, rounds=suite.rounds, seed=suite.seed):
            records.write("speed", **fields)


def suite_table(record: Record, *, schedule: str = "constant", rate: float = 1.0) -> RunTable:
    """The points of one schedule and one learning-rate rule, all seeds, as a table."""
    suite = record.run
    assert isinstance(suite, Suite)
    points = [
        event
        for event in record.of("point")
        if event.values["schedule"] == schedule and event.values["rate"] == rate
    ]
    keys = ("run", "width", "depth", "tokens", "loss_nats", "learning_rate", "seed")
    speed = speed_of(record)
    columns = {key: [event.values[key] for event in points] for key in keys}
    seconds = [event.number("tokens") / speed[shape_of(event)] for event in points]
    return RunTable.from_columns(
        {**columns, "seconds": seconds, "gpu_hours": [spent / 3600 for spent in seconds]},
        architecture=suite.architecture,
        source=f"{record.path.name}, {schedule}",
    )


Shape = tuple[int, int]
"""Width and depth."""


def shape_of(event: Event) -> Shape:
    """Width and depth of the model that an event is about."""
    return int(event.number("width")), int(event.number("depth"))


def speed_of(record: Record) -> dict[Shape, float]:
    """Median over the rounds of the tokens per second of each shape."""
    rounds = speed_rounds(record)
    return {shape: sorted(speeds)[len(speeds) // 2] for shape, speeds in rounds.items()}


def speed_rounds(record: Record) -> dict[Shape, list[float]]:
    """Tokens per second of each shape, in the order of the rounds."""
    rounds: dict[Shape, list[float]] = {}
    for event in record.of("speed"):
        rounds.setdefault(shape_of(event), []).append(event.number("tokens_per_cpu_s"))
    return rounds
