"""Every family of transformers in every package: `benchmarks/families.jsonl`, and the page of it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ("loki", "goldfish", "retrofit")


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The script that wrote the record."""
    for package in ("loki", "goldfish", "recurrent_depth"):
        pytest.importorskip(f"fourfold_{package}", reason=f"needs the package {package}")
    path = ROOT / "benchmarks" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record() -> list[dict[str, Any]]:
    text = (ROOT / "benchmarks" / "families.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_page_is_the_records(benchmark: Any, record: list[dict[str, Any]]) -> None:
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(record)


def test_the_readmes_figures_are_the_records(benchmark: Any, record: list[dict[str, Any]]) -> None:
    assert benchmark.row(record) in benchmark.README.read_text(encoding="utf-8").splitlines()


def test_every_type_is_there_once(benchmark: Any, record: list[dict[str, Any]]) -> None:
    """As the transformers of the record has them; each built one with every package and grid."""
    assert len({event["transformers"] for event in record}) == 1
    names = [event["family"] for event in record]
    assert names == sorted(set(names))
    if record[0]["transformers"] == benchmark.transformers.__version__:
        assert names == benchmark.causal_types()
    for event in record:
        assert "not_built" in event or {"plan", "parallel", *PAPERS} <= event.keys()
        assert "not_built" in event or event["parallel"].keys() == benchmark.GRIDS.keys()


def test_no_family_is_wrong_and_none_crashes(record: list[dict[str, Any]]) -> None:
    for event in record:
        for name in ("parallel", *PAPERS):
            found = event.get(name, {})
            outcomes = found.values() if name == "parallel" else [found] if found else []
            for outcome in outcomes:
                assert outcome["result"] in ("equal", "refused"), (event["family"], name, outcome)
                if outcome["result"] == "refused":
                    assert len(outcome["message"]) > 20


def test_equal_means_equal(benchmark: Any, record: list[dict[str, Any]]) -> None:
    """Float64 to 1e-9 and better, all four quantities; loki in float32."""
    for event in record:
        for outcome in event.get("parallel", {}).values():
            if outcome["result"] == "equal":
                assert outcome["differences"].keys() == {"loss", "logits", "gradients", "step"}
                assert max(outcome["differences"].values()) <= benchmark.EXACT
        for name, limit in (
            ("loki", benchmark.ROUNDED),
            ("goldfish", benchmark.EXACT),
            ("retrofit", benchmark.EXACT),
        ):
            if event.get(name, {}).get("result") == "equal":
                assert max(event[name]["differences"].values()) <= limit


def test_a_papers_outcome_is_measured_again(benchmark: Any) -> None:
    """One type of each package, as the record has it."""
    for name, model_type in (
        ("loki", "qwen3"),
        ("goldfish", "gemma2"),
        ("retrofit", "deepseek_v2"),
    ):
        assert benchmark.of_paper(name, benchmark.default_toy(model_type)).result == "equal"
