"""Delays are found in the part of the time that they were put into. Sleeping moves the tests' clock."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.grid import collectives
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.run import shards
from fourfold_parallel.run.data import Packed, TokenStream
from fourfold_parallel.run.objective import NextToken
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.timeline import PARTS, seconds_by_part
from fourfold_parallel.run.train import train
from fourfold_parallel.testing.ranks import run_on_ranks

ROUNDED_S = 2e-4
"""A record's seconds have four digits, at most two numbers of which make a part of an event."""
EVENTS = 60
"""At most so many events of a run here make up a part."""


class Clock:
    """Stands still but for sleeping."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def read(self) -> float:
        return self.now_s


@contextmanager
def stopped_clock() -> Iterator[Clock]:
    clock = Clock()
    with (
        mock.patch.object(time, "sleep", clock.sleep),
        mock.patch.object(time, "perf_counter", clock.read),
    ):
        NOW._since = clock.read()
        yield clock
    NOW._since = time.perf_counter()


def slowed(kind: type, name: str, seconds: float) -> Any:
    """A method that takes so much longer."""
    original = getattr(kind, name)

    def slow(*args: Any, **how: Any) -> Any:
        time.sleep(seconds)
        return original(*args, **how)

    return mock.patch.object(kind, name, slow)


def slow_progress(done: int, total: int, note: str) -> None:
    time.sleep(0.005)


def test_a_delay_is_found_in_its_own_part(tmp_path: Path, small_run: Run) -> None:
    """2 s of staging, 50 ms of data, 10 ms of forward, 0.1 s of a save, 5 ms that no event claims."""
    run = replace(small_run, horizon=Steps(count=10), validate_every=5, checkpoint_every=5)
    with (
        stopped_clock() as clock,
        slowed(Packed, "open", 2.0),
        slowed(TokenStream, "batch", 0.05),
        slowed(NextToken, "loss", 0.01),
        slowed(shards.Image, "take", 0.1),
    ):
        began_s = clock.read()
        train(run, record=tmp_path / "r.jsonl", checkpoints=tmp_path / "c", progress=slow_progress)
        whole_s = clock.read() - began_s
    record = read_record(tmp_path / "r.jsonl")
    parts = seconds_by_part(record)
    validated = sum(event.number("tokens") for event in record.of("validation")) / run.sequence
    batches = validated / 2 / run.batch  # of each of the two validations
    expected = {
        "staging": 2.0,
        "data": 10 * 0.05,
        "compute": 10 * 0.01,
        "exposed communication": 0.0,
        "evaluation": 2 * 0.05 * -(-batches // 1),
        "checkpoint": 2 * 0.1,
        "rest": 10 * 0.005,
    }
    assert set(parts) == set(PARTS) == set(expected)
    for part in PARTS:
        assert parts[part] == pytest.approx(expected[part], abs=EVENTS * ROUNDED_S), part
    assert sum(parts.values()) == pytest.approx(whole_s, abs=0.002)  # a record's times are in ms


def slow_collectives(run: Run, folder: Path) -> tuple[Counter[str], dict[str, float]]:
    """A training whose every wait for a collective takes 20 ms: where they were, and the parts."""
    waits: Counter[str] = Counter()
    patience = collectives.patience

    def slow_patience() -> Any:
        """Asked for by each wait, within it."""
        time.sleep(0.02)
        waits[NOW.phase] += 1
        return patience()

    with stopped_clock(), mock.patch.object(collectives, "patience", slow_patience):
        train(run, record=folder / "r.jsonl", checkpoints=folder / "c", progress=silent)
    return waits, dict(seconds_by_part(read_record(folder / "r.jsonl")))


@pytest.mark.parametrize("engine", [Fourfold(data=2), Fourfold(row=2)], ids=str)
def test_a_slow_network_is_exposed_communication(
    tmp_path: Path, small_run: Run, engine: Fourfold
) -> None:
    """20 ms a collective on two ranks: as many as the steps waited for, and no other part."""
    run = replace(
        small_run, engine=engine, horizon=Steps(count=5), validate_every=5, checkpoint_every=5
    )
    (waits, parts), _ = run_on_ranks(2, slow_collectives, run=run, folder=tmp_path)
    in_steps = sum(waits[phase] for phase in ("data", "forward", "backward", "update"))
    assert in_steps >= 5
    assert parts["exposed communication"] == pytest.approx(0.02 * in_steps, abs=EVENTS * ROUNDED_S)
    assert parts["compute"] == pytest.approx(0.0, abs=EVENTS * ROUNDED_S)
    assert parts["evaluation"] == pytest.approx(0.02 * waits["validation"], abs=0.001)


def test_the_time_until_an_event_leaves_out_what_came_after(tmp_path: Path, small_run: Run) -> None:
    run = replace(small_run, horizon=Steps(count=10), validate_every=5)
    with stopped_clock(), slowed(NextToken, "loss", 0.01):
        train(run, record=tmp_path / "r.jsonl", checkpoints=tmp_path / "c", progress=silent)
    record = read_record(tmp_path / "r.jsonl")
    first = record.of("validation")[0]
    assert seconds_by_part(record)["compute"] == pytest.approx(0.1, abs=0.001)
    assert seconds_by_part(record, until=first)["compute"] == pytest.approx(0.05, abs=0.001)
