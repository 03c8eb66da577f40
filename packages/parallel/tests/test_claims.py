"""Laws of the ledger's statistics, and that untestable claims say so."""

import math
from pathlib import Path

import numpy as np
import pytest

from fourfold_parallel.reproduce.claims import (
    Claim,
    Finding,
    Records,
    judge,
    over_seeds,
    proportion,
    read_ledger,
    write_ledger,
)


def test_an_interval_over_seeds_covers_the_mean_in_95_of_100_experiments() -> None:
    """With three seeds, on 4,000 simulated experiments."""
    random = np.random.default_rng(0)
    intervals = [over_seeds(random.normal(2.0, 0.3, 3).tolist()) for _ in range(4000)]
    covered = np.mean([one.low <= 2.0 <= one.high for one in intervals])
    assert abs(covered - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 4000)


def test_a_share_of_nothing_or_everything_still_has_an_interval() -> None:
    none, all_ = proportion(0, 72, seeds=3), proportion(72, 72, seeds=3)
    assert none.low == 0.0 < none.high < 0.06
    assert all_.high == pytest.approx(1.0)
    assert 0.94 < all_.low < 1.0


def test_too_little_for_an_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="1 seeds"):
        over_seeds([1.0])
    with pytest.raises(ValueError, match="3 of 2"):
        proportion(3, 2, seeds=1)


def _unreachable(records: Records) -> Finding:
    raise AssertionError(records)


def test_a_claim_that_a_scale_cannot_test_is_never_shown_as_reproduced(tmp_path: Path) -> None:
    claim = Claim(
        id="X1",
        section="1",
        says="Large models fly",
        paper="90 %",
        conditions="none",
        rule="never applied here",
        judge=_unreachable,
        scales=("paper",),
        needs="4,096 GPUs",
    )
    rows = judge([claim], {}, package="parallel", scale="smoke")
    assert rows[0].verdict == "not tested"
    assert rows[0].because == "needs: 4,096 GPUs"
    write_ledger(tmp_path / "ledger.jsonl", rows)
    assert read_ledger(tmp_path / "ledger.jsonl") == rows
