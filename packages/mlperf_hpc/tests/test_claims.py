"""The rules, on the public round and on numbers made here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fourfold_mlperf_hpc.reproduce import claims
from fourfold_mlperf_hpc.reproduce.experiment import EXPERIMENT, take_round_apart
from fourfold_mlperf_hpc.reproduce.recipes import (
    PublishedRound,
    rooflines,
    staging_share,
    to_quality,
)
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import Event, Record, read_record
from fourfold_parallel.reproduce.claims import Claim
from fourfold_parallel.reproduce.experiment import Workplace


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Record]:
    folder = tmp_path_factory.mktemp("published")
    place = Workplace(
        record=folder / "published.jsonl", scratch=folder, finished={}, progress=silent
    )
    take_round_apart(PublishedRound(facts_sha256=""), place)
    return {"published": read_record(place.record)}


@pytest.mark.parametrize(
    ("claim", "verdict", "told"),
    [
        (claims.gains, "reproduced", "CosmoFlow 17.5, DeepCAM 11.9; within one machine and division 2.46"),
        (claims.batches_cost_epochs, "reproduced", "over 90 runs"),
        (claims.techniques_lift, "reproduced", "times the epochs at four times the batch"),
        (claims.staging_grows, "reproduced", "0.62 % to 3.71 %"),
        (claims.superlinear, "reproduced", "2.24 [2.20, 2.29] times"),
        (claims.status_is_true, "contradicted", "2 of 135"),
    ],
)  # fmt: skip
def test_the_public_round_is_judged(
    published: Mapping[str, Record], claim: Claim, verdict: str, told: str
) -> None:
    finding = claim.judge(published)
    assert finding.verdict == verdict
    assert told in finding.ours


def test_the_factors_in_the_record_multiply_to_the_ratio_of_scores(
    published: Mapping[str, Record],
) -> None:
    pairs = published["published"].of("pair")
    assert len(pairs) == 5
    for event in pairs:
        whole = event.number("convergence") * event.number("compute") * event.number("overhead")
        assert whole == pytest.approx(event.number("whole"), rel=1e-12)
        assert whole == pytest.approx(event.number("a_min") / event.number("b_min"), rel=1e-3)


def recorded(kind: str, rows: Sequence[Mapping[str, object]]) -> Record:
    events = [{"event": kind, **row} for row in rows]
    return Record(Path("made"), tuple(Event(i, dict(e), "made") for i, e in enumerate(events)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("slow", "verdict"), [(1.0, "reproduced"), (1.3, "contradicted")])
def test_the_staging_law_is_held_to_five_percent(slow: float, verdict: str) -> None:
    """Of a device that is as fast as it says, and of one that is not."""
    rows = [
        {"speedup": k, "seconds": {"staging": 2.0, "compute": 8.0 / k * (slow if k > 1 else 1.0)}}
        for k in (1, 2, 4)
    ]
    records = {"staging": recorded("speed", rows)}
    assert claims.our_staging_grows.judge(records).verdict == verdict


@pytest.mark.parametrize(
    ("large", "verdict"),
    [((900, 950, 1000, 980, 930), "reproduced"), ((90, 95, 80, 85, 99), "contradicted"),
     ((80, 120, 95, 105, 100), "inconclusive")],
)  # fmt: skip
def test_larger_batches_are_judged_by_samples(large: tuple[int, ...], verdict: str) -> None:
    def attempts(samples: Sequence[int]) -> Record:
        return recorded(
            "attempt",
            [
                {"seed": seed, "target_loss_nats": 3.7, "samples": number, "is_reached": True,
                 "seconds": {"compute": 1.0}}
                for seed, number in enumerate(samples)
            ],
        )  # fmt: skip

    records = {"batch16": attempts((100, 101, 99, 102, 98)), "batch256": attempts(large)}
    assert claims.our_batches_cost_samples.judge(records).verdict == verdict


def test_recipes_are_of_seeds_that_no_pilot_used() -> None:
    """And one run a seed: what differs between batches is the batch, its rate, warm-up and validations."""
    study = to_quality(64, "laptop")
    assert set(study.seeds) == {0, 1, 2, 3, 4}
    assert study.run_of(3).seed == 3
    assert study.run.horizon.count * 64 == to_quality(8, "laptop").run.horizon.count * 8
    with pytest.raises(ValueError, match="scale='paper' has no run here"):
        to_quality(64, "paper")
    assert len(rooflines("laptop").runs) == 3
    assert staging_share("laptop").run_of(4).objective != staging_share("laptop").run.objective


def test_the_scales_have_their_stages() -> None:
    names = [stage.name for stage in EXPERIMENT.stages("laptop")]
    assert {"published", "batch8", "batch256", "batch16-ranks2", "staging", "rooflines"} <= {*names}
    assert not EXPERIMENT.stages("paper")
