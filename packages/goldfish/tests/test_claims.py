"""Claims are judged as their rules say: the committed records, and made-up ones with verdicts that follow."""

from pathlib import Path
from typing import Any

import pytest

from fourfold_goldfish.reproduce import claims
from fourfold_goldfish.reproduce.experiment import EXPERIMENT
from fourfold_goldfish.reproduce.measures import recital_law
from fourfold_goldfish.reproduce.recipes import ONE_PASS_SEEDS, REPETITIONS, SEEDS, SIZES
from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import judge, write_ledger
from fourfold_parallel.reproduce.experiment import load

RESULTS = Path(__file__).parents[1] / "results"


def test_the_committed_records_are_judged_as_committed(tmp_path: Path) -> None:
    """The ledger of the laptop scale, equal to the byte."""
    stages = {stage.name for stage in EXPERIMENT.stages("laptop")}
    records = load(EXPERIMENT, "laptop", RESULTS)
    assert records.keys() == stages
    rows = judge(EXPERIMENT.claims, records, package="goldfish", scale="laptop")
    write_ledger(tmp_path / "ledger.jsonl", rows)
    committed = (RESULTS / "ledger.jsonl").read_bytes()
    assert (tmp_path / "ledger.jsonl").read_bytes() == committed


def record(*events: dict[str, Any]) -> Record:
    return Record(
        Path("made-up.jsonl"),
        tuple(Event(line, event, "made-up.jsonl") for line, event in enumerate(events, 2)),
    )


def bucket(name: str, exact: int, *, of: int = 32, repetitions: int = 48) -> dict[str, Any]:
    return {
        "event": "extraction",
        "bucket": name,
        "repetitions": repetitions if name == "trained" else 0,
        "passages": of,
        "exact": exact,
        "mean_rouge_l": exact / of,
        "diverged": of - exact,
        "diverged_on_dropped": of - exact,
    }


def series(name: str, *events: dict[str, Any]) -> dict[str, Record]:
    return {f"{name}-seed{seed}": record(*events) for seed in SEEDS}


@pytest.mark.parametrize(
    ("plain", "goldfish", "verdict"),
    [(32, 0, "reproduced"), (32, 5, "contradicted"), (10, 0, "inconclusive")],
)
def test_goldfish_is_judged_against_the_control_if_there_is_recital(
    plain: int, goldfish: int, verdict: str
) -> None:
    records = series("plain", bucket("trained", plain), bucket("control", 0))
    records |= series("k4", bucket("trained", goldfish), bucket("control", 0))
    assert claims.G2.judge(records).verdict == verdict
    premise = "reproduced" if plain == 32 else "inconclusive"
    assert claims.G1.judge(records).verdict == premise


def test_random_gaps_must_be_recited_more_than_hashed_ones() -> None:
    hashed = series("k4", bucket("trained", 3), bucket("control", 0))
    for exact, verdict in ((20, "reproduced"), (4, "contradicted")):
        records = hashed | series("random", bucket("trained", exact), bucket("control", 0))
        assert claims.gaps_must_stay.judge(records).verdict == verdict


def test_recital_by_k_is_held_to_the_law() -> None:
    """Within sampling error of (1 - 1/k)^24 at each k, or contradicted by name."""
    expected = {k: round(32 * recital_law(k, 24)) for k in (2, 4, 8, 32)}
    records = {}
    for k, exact in expected.items():
        records |= series(f"k{k}", bucket("trained", exact), bucket("control", 0))
    assert claims.recall_by_k.judge(records).verdict == "reproduced"
    records |= series("k8", bucket("trained", 20), bucket("control", 0))
    finding = claims.recall_by_k.judge(records)
    assert finding.verdict == "contradicted"
    assert "[8]" in finding.because


def study(needed: dict[str, int], arm: str = "plain") -> dict[str, Record]:
    """Sizes that recite all of a bucket from so many passes on, and nothing before."""
    records: dict[str, Record] = {}
    for size, passes in needed.items():
        events = [
            bucket(
                "trained" if count else "control", 8 * (count >= passes), of=8, repetitions=count
            )
            for count in REPETITIONS
        ]
        records |= series(f"buckets-{size}-{arm}", *events)
    return records


@pytest.mark.parametrize(
    ("passes", "verdict"),
    [
        ((99, 64, 64, 36, 24), "reproduced"),
        ((64, 64, 64, 64, 64), "inconclusive"),
        ((99, 36, 64, 36, 24), "contradicted"),
    ],
)
def test_larger_models_must_never_need_more_passes(passes: tuple[int, ...], verdict: str) -> None:
    assert (
        claims.larger_need_fewer.judge(study(dict(zip(SIZES, passes, strict=True)))).verdict
        == verdict
    )


def test_every_bucket_under_goldfish_is_held_to_the_control() -> None:
    plain = study({SIZES[-1]: 24})
    assert claims.study_goldfish.judge(plain | study({SIZES[-1]: 99}, "k2")).verdict == "reproduced"
    leaky = claims.study_goldfish.judge(plain | study({SIZES[-1]: 64}, "k2"))
    assert leaky.verdict == "contradicted"
    assert "[64]" in leaky.because
    nothing = study({SIZES[-1]: 99}) | study({SIZES[-1]: 99}, "k2")
    assert claims.study_goldfish.judge(nothing).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((0.01, 0.02, 0.015), "reproduced"),
        ((-0.2, 0.3, 0.1), "reproduced"),
        ((0.2, 0.22, 0.21), "contradicted"),
    ],
)
def test_the_cost_is_judged_at_equal_supervision(gaps: tuple[float, ...], verdict: str) -> None:
    def runs(name: str, losses: list[float]) -> dict[str, Record]:
        return {
            f"onepass-{name}-seed{seed}": record(
                {"event": "validation", "step": 96, "validation_loss_nats": loss}
            )
            for seed, loss in zip(ONE_PASS_SEEDS, losses, strict=True)
        }

    records = runs("plain-16", [5.5] * 3) | runs("plain-8", [5.8] * 3)
    records |= runs("k2-16", [5.8 + gap for gap in gaps])
    assert claims.equal_at_equal_supervision.judge(records).verdict == verdict


@pytest.mark.parametrize(
    ("published", "canonical", "verdict"),
    [(0.7, 0.01, "reproduced"), (0.7, 0.2, "contradicted"), (0.3, 0.01, "inconclusive")],
)
def test_near_duplicates_are_judged_on_both_masks(
    published: float, canonical: float, verdict: str
) -> None:
    events = [
        {"event": "leak", "mask": mask, "perturbation": "lines re-wrapped", "leaked": leaked}
        for mask, leaked in (("published", published), ("canonical", canonical))
    ]
    assert claims.near_duplicates.judge({"near-duplicates": record(*events)}).verdict == verdict
