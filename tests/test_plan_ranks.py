"""The planner beside measured steps of this machine's ranks: `benchmarks/plan_ranks.jsonl`."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = (ROOT / "benchmarks" / "plan_ranks.jsonl").read_text(encoding="utf-8").splitlines()
RECORDS: list[dict[str, Any]] = [json.loads(line) for line in LINES]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The script that wrote the record."""
    path = ROOT / "benchmarks" / "plan_ranks.py"
    spec = importlib.util.spec_from_file_location("plan_ranks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['ranks']}-ranks-width-{r['width']}")
def test_predictions_keep_the_rules(record: dict[str, Any], benchmark: Any) -> None:
    """By the clock that is judged on such a machine, and by the wall's too."""
    assert record["rules"] == benchmark.RULES
    is_quiet = record["load_1min_before"] <= benchmark.QUIET
    assert record["judged_clock"] == ("wall" if is_quiet else "processor")
    for clock in {record["judged_clock"], "wall"}:
        verdict = record["clocks"][clock]
        assert [name for name in benchmark.RULES if not benchmark.keeps_rule(verdict, name)] == []


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['ranks']}-ranks-width-{r['width']}")
def test_verdicts_follow_from_the_rows(record: dict[str, Any], benchmark: Any) -> None:
    """Every grid is there, and each figure is what its rounds give."""
    layouts = benchmark.layouts_of(benchmark.job_of(record["width"]), record["ranks"])
    for clock in record["clocks"].values():
        grids = {tuple(row[axis] for axis in benchmark.sizes(layouts[0])) for row in clock["grids"]}
        assert grids == {tuple(benchmark.sizes(layout).values()) for layout in layouts}
        for row in clock["grids"]:
            assert len(row["rounds_s"]) == record["rounds"]
            assert row["measured_s"] == benchmark.statistics.median(row["rounds_s"])
        for name, value in benchmark.judged(clock["grids"], "predicted_s").items():
            assert clock[name] == pytest.approx(value)
        authors = benchmark.judged(clock["grids"], "authors_s")
        assert clock["authors_best_at"] == authors["best_at"]
        assert clock["authors_spearman"] == pytest.approx(authors["spearman"])


def test_judged_widths_are_not_those_of_the_development() -> None:
    """The terms were developed on width 384 and below 256."""
    assert {record["width"] for record in RECORDS} <= {256, 512}
