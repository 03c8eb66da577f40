"""A small storm: ranks are killed in parts of a step and of a save, and runs end as without kills."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import RecordWriter, header, read_record
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.storm import findings
from fourfold_parallel.storm.ranks import MOMENTS, drawn
from fourfold_parallel.storm.storm import storm
from fourfold_parallel.storm.study import Small, Storm


@pytest.mark.timeout(600)
def test_no_kill_of_a_small_storm_costs_more_than_the_steps_since_the_last_whole_checkpoint(
    tmp_path: Path,
) -> None:
    """Four kills on a grid; the planted flipped byte and stale shard are found, and survived."""
    grids = (Fourfold(depth=2),)
    study = Storm(
        runs=Small(steps=12, checkpoint_every=3, engines=grids), kills=4, pairs_of=2, seed=5
    )
    record = tmp_path / "storm.jsonl"
    with RecordWriter(record) as records:
        records.write_header(header(study, seed=5, world_size=2, materials=(), overrides=()))
        toll = storm(study, tmp_path / "storm", records, silent)
    assert toll.faults == []
    assert sum(toll.kills.values()) == 4
    # A save is on its way while the steps after it are taken: at most those of two intervals are lost.
    assert max(toll.lost) <= 2 * 3
    read = read_record(record)
    assert [event.values["found"] for event in read.of("planted")] == [True, True]
    assert all(
        life.values["losses_equal"] and life.values["weights_equal"] for life in read.of("life")
    )
    assert read.only("pairs").number("pairs") == 16
    assert "4 kills in" in findings.sentence(read)


def test_every_part_is_drawn_alike_and_by_the_seed() -> None:
    def kills(seed: int) -> list[object]:
        generator = random.Random(seed)
        return [
            drawn(generator, moment=moment, ranks=2, steps=8, collectives=6) for moment in MOMENTS
        ]

    assert kills(1) == kills(1) != kills(2)
