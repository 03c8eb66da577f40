"""Laws of forgetting and of the curriculum."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold_continual import (
    HeldOutLoss,
    annealed,
    due_to_shift,
    forgot,
    gained,
    replayed,
    steps_for_equal_new,
)

FLOATS = st.lists(st.floats(0, 500), min_size=4, max_size=4)


def loss(nats: list[float]) -> HeldOutLoss:
    return HeldOutLoss(nats=np.asarray(nats), targets=12, text_bytes=150)


@settings(max_examples=100, deadline=None)
@given(first=FLOATS, second=FLOATS, third=FLOATS)
def test_changes_add_up(first: list[float], second: list[float], third: list[float]) -> None:
    """Over a stop on the way; what is gained is what is not forgotten; and the shift is what an arm forgets
    beyond the arm of old text alone, whatever the base was."""
    base, middle, end = loss(first), loss(second), loss(third)
    whole = forgot(base, end)
    parts = forgot(base, middle), forgot(middle, end)
    assert whole.nats == pytest.approx(sum(part.nats for part in parts), abs=1e-9)
    assert whole.bits_per_byte == pytest.approx(sum(part.bits_per_byte for part in parts), abs=1e-9)
    won = gained(base, end)
    assert (won.nats, won.bits_per_byte) == (-whole.nats, -whole.bits_per_byte)
    shift = due_to_shift(end, middle)
    assert shift.nats == pytest.approx(whole.nats - parts[0].nats, abs=1e-9)


def test_bits_and_nats_are_one_loss() -> None:
    """A byte costs what its targets cost: nats a target times targets a byte, over ln 2."""
    row = loss([10.0, 20.0, 30.0, 44.0])
    assert row.loss_nats == pytest.approx(104 / 48)
    assert row.bits_per_byte == pytest.approx(row.loss_nats * 48 / 150 / math.log(2))


def test_the_error_is_paired() -> None:
    """Rows that differ much among themselves and change alike leave no doubt; the law is that of the mean
    of differences."""
    before = loss([1.0, 100.0, 10.0, 400.0])
    same = forgot(before, replace(before, nats=before.nats + 6))
    assert same.nats == pytest.approx(0.5)
    assert same.error_nats == pytest.approx(0, abs=1e-12)
    after = replace(before, nats=before.nats + np.asarray([0.0, 12.0, 24.0, 36.0]))
    spread = np.asarray([0.0, 1.0, 2.0, 3.0]).std(ddof=1) / 2
    assert forgot(before, after).error_nats == pytest.approx(spread)


def test_other_rows_are_not_compared() -> None:
    before = loss([1.0, 2.0, 3.0, 4.0])
    for other in (
        replace(before, nats=before.nats[:3]),
        replace(before, targets=13),
        replace(before, text_bytes=149),
    ):
        with pytest.raises(ValueError, match="read both models on the same held-out rows"):
            forgot(before, other)


@pytest.mark.parametrize("replay", [0.0, 0.01, 0.05, 0.25, 0.5])
@pytest.mark.parametrize("steps", [30, 300])
def test_equal_new_tokens(place: Any, replay: float, steps: int) -> None:
    """The longer run holds the new rows of the shorter one, and by its share a step less would not."""
    batch = 8
    longer = steps_for_equal_new(steps, replay=replay)
    mixed = replayed(place.source(place.old), place.source(place.new), replay=replay)
    stream = mixed.open(sequence=16, seed=0)

    def new_rows(count: int) -> int:
        return sum(int((stream.numbers(step, batch=batch)[0] == 1).sum()) for step in range(count))

    # A prefix holds its share to within half a row.
    assert new_rows(longer) >= steps * batch - 1
    assert (1 - replay) * (longer - 1) < steps
    with pytest.raises(ValueError, match="leaves no new text"):
        steps_for_equal_new(steps, replay=1.0)


def test_the_old_text_goes_on_behind_what_was_read(place: Any) -> None:
    """And is measured where none of it is replayed."""
    old, new = place.source(place.old), place.source(place.new)
    only = replayed(old, new, replay=1.0, first_old_row=16)
    alone = old.open(sequence=16, seed=3)
    assert (
        only.open(sequence=16, seed=3).batch(0, batch=8).addresses
        == alone.batch(2, batch=8).addresses
    )
    held_out = replayed(old, new, replay=0.0).validation(sequence=16)
    assert list(held_out.streams) == ["old", "new"]
    assert dict(held_out.weights) == {"old": 0.0, "new": 1.0}


def test_a_second_stage_keeps_the_replay(place: Any) -> None:
    """Cleaner text takes from the new; each text is read on over the change of stage."""
    old, new = place.source(place.old), place.source(place.new)
    clean = place.source(place.new, held_out=0.1)
    staged = annealed(replayed(old, new, replay=0.25), clean, share=0.375, steps=(10, 6))
    stream = staged.open(sequence=16, seed=0)
    read = [stream.numbers(step, batch=8) for step in range(16)]
    counts = np.asarray([np.bincount(parts, minlength=3) for parts, _ in read])
    assert counts[:10].sum(axis=0).tolist() == [20, 60, 0]
    assert counts[10:].sum(axis=0).tolist() == [12, 18, 18]
    for part in range(3):
        numbers = [int(n) for parts, row in read for n in row[parts == part]]
        assert numbers == list(range(len(numbers)))
