"""The law of a recurrence at gemstones' certified minimum. Papers combined, so it lives here."""

from pathlib import Path

import numpy as np
import pytest

ours = pytest.importorskip(
    "fourfold_recurrent_depth.reproduce.worth", reason="needs the package recurrent_depth"
)
gemstones = pytest.importorskip("fourfold_gemstones", reason="needs the package gemstones")

RECORD = Path(__file__).parent.parent / "packages/recurrent_depth/results/worth.jsonl"


@pytest.mark.parametrize("arm", ["looped", "truncated"])
def test_the_committed_runs_have_that_law(arm: str, tmp_path: Path) -> None:
    from fourfold_gemstones.reading import read_table
    from fourfold_gemstones.registry.loops import ENTRY
    from fourfold_parallel.common.records import read_record

    record = read_record(RECORD)
    points = ours.points_of(record, arm) if arm == "looped" else ours.with_truncated(record)
    table = tmp_path / "suite.csv"
    rows = [
        f"{n},{p.once},{p.looped},{p.once + p.looped},{p.loops},{p.tokens},{p.loss_nats}"
        for n, p in enumerate(points)
    ]
    head = "run,once parameters,looped parameters,parameters,loops,tokens,loss"
    table.write_text("\n".join([head, *rows]) + "\n")
    with pytest.warns(
        gemstones.LawWarning, match="at its bound: floor"
    ):  # these runs do not tell it
        certified = ENTRY.law.fit(read_table(table))
    mine = ours.fit(points)
    named = certified.estimate.named()
    assert mine.phi == pytest.approx(named["phi"], abs=2e-3)
    predicted = mine.loss(points)
    theirs = certified.predict(certified.table)
    assert np.allclose(predicted, theirs, rtol=2e-4)
