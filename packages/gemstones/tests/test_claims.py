"""Rules decide what their words say, on records made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourfold_gemstones.reproduce.claims import CLAIMS
from fourfold_gemstones.reproduce.paper.downstream import texts_agree
from fourfold_gemstones.reproduce.paper.slopes import bootstraps_cover
from fourfold_gemstones.reproduce.stages import FRESH, LAWS, PUBLISHED, SUITE
from fourfold_gemstones.reproduce.suite import cooling
from fourfold_gemstones.reproduce.suite.analyses import pooled
from fourfold_parallel.common.records import read_record
from fourfold_parallel.reproduce import claims
from fourfold_parallel.reproduce.claims import Claim, LedgerRow, Records

RESULTS = Path(__file__).parents[1] / "results"
RULES = {claim.id: claim for claim in CLAIMS}


def judge(claim: Claim, stage: str, events: list[dict], folder: Path) -> tuple[str, str]:
    """Verdict and reason of a rule on a record of these events."""
    lines = [{"event": "run", "schema": 1, "run": {}, "run_sha256": "", "seed": 0}, *events]
    path = folder / f"{stage}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = judged(claim, {stage: read_record(path)})
    return row.verdict, row.because


def judged(claim: Claim, records: Records) -> LedgerRow:
    (row,) = claims.judge([claim], records, package="gemstones", scale="laptop")
    return row


def test_the_committed_ledger_follows_from_the_committed_records(tmp_path: Path) -> None:
    """Every rule on the records of the laptop scale gives the ledger to the byte."""
    stages = (PUBLISHED, SUITE, FRESH, LAWS)
    paths = {stage: RESULTS / f"{stage}.jsonl" for stage in stages}
    records = {stage: read_record(path) for stage, path in paths.items() if path.is_file()}
    rows = claims.judge(CLAIMS, records, package="gemstones", scale="laptop")
    claims.write_ledger(tmp_path / "ledger.jsonl", rows)
    assert (tmp_path / "ledger.jsonl").read_bytes() == (RESULTS / "ledger.jsonl").read_bytes()


def test_claims_have_names_of_their_own_and_wait_for_their_record() -> None:
    """P, C and S in order; without any record nothing is judged."""
    assert len(RULES) == len(CLAIMS)
    assert {f"C{number}" for number in range(1, 15)} <= set(RULES)
    assert [claim.id for claim in CLAIMS][:5] == ["P1", "P2", "P3", "P4", "C1"]
    for claim in CLAIMS:
        row = judged(claim, {})
        assert row.verdict == "not tested"
        assert row.because.startswith("needs: ")


def test_a_pooled_spread_is_that_within_groups() -> None:
    """Groups apart do not add to it; without two of a kind there is none."""
    spread = pooled([[1.0, 3.0], [101.0, 103.0], [5.0]])
    assert (spread.sd, spread.freedom) == (pytest.approx(2**0.5), 2)
    with pytest.raises(ValueError, match="no shape has two seeds"):
        pooled([[1.0], [2.0]])


def points(gain: float, spread: float) -> list[dict]:
    """A shape with three seeds and two forks, whose cooldowns gain about `gain`."""
    events = []
    for seed in range(3):
        run = {"event": "point", "run": f"16x2-seed{seed}"}
        for step in (10, 20):
            cooled = 3.0 - gain + spread * (seed - 1)
            events.append(run | {"schedule": "constant", "step": step, "loss_nats": 3.0})
            events.append(run | {"schedule": "cooled", "forked_at": step, "loss_nats": cooled})
    return events


@pytest.mark.parametrize(
    ("gain", "spread", "verdict"),
    [(0.1, 0.01, "reproduced"), (0.1, 0.2, "contradicted"), (0.1, 0.04, "inconclusive")],
)
def test_a_cooldown_counts_where_it_gains_more_than_seeds_differ(
    gain: float, spread: float, verdict: str, tmp_path: Path
) -> None:
    given, because = judge(RULES["S1"], SUITE, points(gain, spread), tmp_path)
    assert given == verdict
    assert f"{spread:.4f} nats between seeds (4 degrees of freedom)" in because


@pytest.mark.parametrize(
    ("won", "verdict"),
    [(12, "reproduced"), (10, "reproduced"), (6, "inconclusive"), (2, "contradicted")],
)
def test_wide_is_faster_where_it_wins_most_rounds(won: int, verdict: str, tmp_path: Path) -> None:
    """The pair that wins least decides."""
    events = []
    for number, pair in enumerate(cooling.PAIRS):
        for (w, d), base in zip(pair, (110, 100), strict=True):
            for turn in range(12):
                loses = number == 0 and w == pair[0][0] and turn >= won
                speed = 90 if loses else base
                events.append(
                    {"event": "speed", "width": w, "depth": d, "round": turn}
                    | {"tokens_per_cpu_s": speed}
                )
    assert judge(RULES["S3"], FRESH, events, tmp_path)[0] == verdict


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ((0.05, 0.06, 0.04), "reproduced"),
        ((0.001, -0.001, 0.0), "contradicted"),
        ((0.2, -0.2, 0.1), "inconclusive"),
    ],
)
def test_cooling_shifts_a_law_where_its_gain_changes_over_shapes(
    changes: tuple[float, ...], verdict: str, tmp_path: Path
) -> None:
    """Three shapes of two seeds that gain .1 nats first and more or less by `changes` at the end."""
    events = []
    for shape, change in enumerate(changes):
        for seed, apart in ((200, 0.001), (201, -0.001)):
            run = {"event": "point", "run": f"{16 * (shape + 1)}x2-seed{seed}"}
            for step, gain in ((10, 0.1), (20, 0.1 + change + apart)):
                events.append(run | {"schedule": "constant", "step": step, "loss_nats": 3.0})
                cooled = {"schedule": "cooled", "forked_at": step, "loss_nats": 3.0 - gain}
                events.append(run | cooled)
    assert judge(RULES["S2"], FRESH, events, tmp_path)[0] == verdict


@pytest.mark.parametrize(
    ("half", "steep", "verdict"),
    [
        ((0.45, 0.55), (0.65, 0.75), "reproduced"),
        ((0.45, 0.55), (0.50, 0.75), "contradicted"),
        ((0.35, 0.40), (0.50, 0.60), "inconclusive"),
    ],
)
def test_a_hull_tells_laws_apart_where_their_ranges_are(
    half: tuple[float, float], steep: tuple[float, float], verdict: str, tmp_path: Path
) -> None:
    measured = {"measured": 0.5, "measured_low": 0.4, "measured_high": 0.6}
    events = [
        {"event": "null", "true_slope": true, "low": low, "high": high} | measured
        for true, (low, high) in ((0.5, half), (0.7, steep))
    ]
    assert judge(RULES["S7"], LAWS, events, tmp_path)[0] == verdict


@pytest.mark.parametrize(
    ("runs", "rows", "verdict"),
    [(38, 18, "reproduced"), (35, 18, "contradicted"), (38, 36, "contradicted"), (40, 30, None)],
)
def test_coverage_is_judged_as_its_rule_says(
    runs: int, rows: int, verdict: str | None, tmp_path: Path
) -> None:
    events = [
        {
            "event": "coverage",
            "groups": groups,
            "suites": 40,
            "covered": covered,
            "share": covered / 40,
            "mean_width": 0.1,
        }
        for groups, covered in (("run", runs), ("row", rows))
    ]
    given, _ = judge(bootstraps_cover, "published", events, tmp_path)
    assert given == (verdict or "inconclusive")


def test_the_text_that_agrees_least_decides(tmp_path: Path) -> None:
    events = [
        {
            "event": "other_text",
            "text": text,
            "spearman": rho,
            "spearman_at_end": 1.0,
            "checkpoints": 770,
            "models": 22,
        }
        for text, rho in (("one", 0.99), ("other", 0.90), ("third", 0.97))
    ]
    assert judge(texts_agree, "published", events, tmp_path)[0] == "contradicted"
    assert judge(texts_agree, "published", events[::2], tmp_path)[0] == "reproduced"
