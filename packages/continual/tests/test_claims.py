"""Rules on records whose effects are planted: each verdict is reached, and only by what it asks for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fourfold_continual.forgetting import HeldOutLoss
from fourfold_continual.held_out import write_held_out
from fourfold_continual.reproduce import claims
from fourfold_continual.reproduce.measures import headline
from fourfold_continual.reproduce.recipes import SEEDS, SMALL_ARMS
from fourfold_parallel.common.records import Record, RecordWriter, header, read_record
from fourfold_parallel.reproduce.claims import Claim, claims_of, judge

PLANTED = {
    "base": (4.0, 7.0, 6.0),
    "none": (5.0, 4.0, 4.5),
    "r05": (4.5, 4.01, 4.5),
    "r25": (4.1, 4.1, 4.5),
    "only-old": (3.9, 7.2, 6.1),
    "joint": (4.1, 4.1, 4.5),
    "r05-longer": (4.5, 3.99, 4.5),
    "r25-longer": (4.05, 4.0, 4.5),
    "steady": (4.1, 4.1, 4.5),
    "two-stage": (4.0, 4.0, 3.9),
    "peak-1e-3": (4.6, 4.3, 4.8),
    "peak-3e-4": (4.2, 4.9, 5.0),
}
"""Losses on old, new and clean text."""


FIRST = header({}, seed=0, world_size=1, materials=(), overrides=())


def planted(folder: Path, **changed: tuple[float, float, float]) -> dict[str, Record]:
    """Records of the small size; seeds differ by hundredths."""
    records = {}
    generator = np.random.default_rng(0)
    for arm in ("base", *SMALL_ARMS):
        for seed in SEEDS:
            path = folder / f"small-{arm}-seed{seed}.jsonl"
            losses = np.asarray(changed.get(arm.replace("-", "_"), PLANTED[arm]))
            losses = losses + 0.002 * generator.standard_normal(3)
            path.unlink(missing_ok=True)
            with RecordWriter(path) as writer:
                writer.write_header({**FIRST, "seed": seed})
                rows = {
                    part: HeldOutLoss(nats=np.full(8, loss * 96), targets=96, text_bytes=2000)
                    for part, loss in zip(("old", "new", "clean"), losses, strict=True)
                }
                write_held_out(writer, rows)
                writer.write("finished", elapsed_s=0.0)
            records[path.stem] = read_record(path)
    return records


@pytest.mark.parametrize(
    ("rule", "changed", "verdict"),
    [
        (claims.A1, {}, "reproduced"),
        (claims.A1, {"none": (3.9, 4.0, 4.5)}, "contradicted"),
        (claims.A1, {"none": (3.94, 4.0, 4.5)}, "inconclusive"),
        (claims.A2, {}, "reproduced"),
        (claims.A2, {"r25": (4.7, 4.1, 4.5)}, "contradicted"),
        (claims.A2, {"r25": (4.4, 4.1, 4.5)}, "inconclusive"),
        (claims.A3, {}, "reproduced"),
        (claims.A3, {"r05": (4.5, 4.05, 4.5)}, "contradicted"),
        (claims.A3, {"r05": (4.5, 4.02, 4.5)}, "inconclusive"),
        (claims.two_stages_help, {}, "reproduced"),
        (claims.two_stages_help, {"two_stage": (4.2, 4.2, 3.0)}, "contradicted"),
        (claims.two_stages_help, {"two_stage": (4.0, 4.2, 3.0)}, "inconclusive"),
        (claims.A5, {}, "reproduced"),
        (claims.A5, {"joint": (4.0, 4.0, 4.5)}, "contradicted"),
        (claims.A5, {"joint": (4.05, 4.05, 4.5)}, "inconclusive"),
        (claims.forgetting_follows_the_rate, {}, "reproduced"),
        (claims.forgetting_follows_the_rate, {"peak_1e_3": (5.2, 4, 4)}, "contradicted"),
    ],
)
def test_each_verdict_has_its_effect(
    tmp_path: Path, rule: Claim, changed: dict[str, tuple[float, float, float]], verdict: str
) -> None:
    records = planted(tmp_path, **changed)
    [row] = judge([rule], records, package="continual", scale="laptop")
    assert row.verdict == verdict, row.ours
    assert row.record


def test_what_no_scale_can_test_says_what_it_needs(tmp_path: Path) -> None:
    records = planted(tmp_path)
    rows = {row.id: row for row in judge(claims_of(claims), records, package="c", scale="laptop")}
    assert rows["A1"].verdict == "reproduced"
    for identity in ("A7", "L1", "S1"):
        assert rows[identity].verdict == "not tested"
        assert "needs:" in rows[identity].because
    assert len(rows) == 9


def test_the_headline_is_read_from_the_records(tmp_path: Path) -> None:
    sentence = headline(planted(tmp_path))
    assert (
        "forgets 1.00 nats a token of Wikipedia, with 5 % replay 0.50, with 25 % 0.10" in sentence
    )


def test_figures_are_drawn_from_the_records(tmp_path: Path) -> None:
    """Those that need no curves."""
    figures = pytest.importorskip("fourfold_continual.reproduce.figures")
    records = planted(tmp_path)
    draw: Callable[..., object]
    for draw in (figures.trade, figures.two_stage, figures.rates):
        assert draw(records) is not None
