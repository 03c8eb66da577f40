"""The figures of `docs/` and of the README are those of the committed records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "packages/parallel/README.md").read_text(encoding="utf-8")
PLAN = (ROOT / "packages/parallel/docs/plan.md").read_text(encoding="utf-8")
OUT_OF_CORE = (ROOT / "packages/parallel/docs/outofcore.md").read_text(encoding="utf-8")
PAGE = (ROOT / "packages/parallel/docs/grid.md").read_text(encoding="utf-8")
ROWS = {
    "`data`": "fourfold_data_{ranks}",
    "`depth`": "fourfold_depth_{ranks}",
    "`depth`, keeping tiles": "fourfold_depth_{ranks}_keeping_tiles",
    "`row`": "fourfold_row_{ranks}",
    "`col`": "fourfold_col_{ranks}",
    "`data=2, depth=2`": "fourfold_data_2_depth_2",
    "`data=2, row=2`": "fourfold_data_2_row_2",
    "DeepSpeed ZeRO-1": "deepspeed_zero_1",
    "FSDP2": "fsdp2",
    "FSDP2 with tensor parallel": "fsdp2_tensor_2",
}
"""What the record calls a row of the page's table."""


def records(name: str) -> list[dict[str, Any]]:
    lines = (ROOT / "benchmarks" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_pages_step_times_are_the_records() -> None:
    """Every cell of the table, to the last digit; and every contender of the record but DDP is there."""
    lines = (ROOT / "benchmarks/grid_vs_peers.jsonl").read_text(encoding="utf-8").splitlines()
    timed = {
        (event["ranks"], event["model"]["hidden_size"]): event["median_ratio_to_ddp"]
        for event in map(json.loads, lines)
        if "median_ratio_to_ddp" in event
    }
    header, _, *rows = re.findall(r"^\|.*\|$", PAGE[PAGE.index("## Measured") :], re.MULTILINE)
    columns = [
        (int(ranks), int(width)) for ranks, width in re.findall(r"(\d) ranks, width (\d+)", header)
    ]
    assert sorted(columns) == sorted(timed)
    assert [cells(row)[0] for row in rows] == list(ROWS)
    for index, setting in enumerate(columns):
        expected = {**timed[setting]}
        assert expected.pop("ddp") == 1.0
        for row in rows:
            name, *figures = cells(row)
            ratio = expected.pop(ROWS[name].format(ranks=setting[0]), None)
            assert figures[index] == ("" if ratio is None else f"{ratio:.2f}"), (name, setting)
        assert not expected


def test_the_pages_overlap_is_the_records() -> None:
    text = (ROOT / "benchmarks/grid_overlap.jsonl").read_text(encoding="utf-8")
    ratio = json.loads(text)["ratio_to_none"]["all"]
    assert f"takes {ratio:.2f} of its time without overlaps" in PAGE


def test_the_planners_errors_on_published_steps_are_the_records() -> None:
    whole = {row["of"]: row for row in records("plan_cases.jsonl") if row["group"] == "all"}
    time, memory = (
        (row["cases"], f"{100 * row['median_absolute']:.1f} %")
        for row in (whole["time"], whole["memory"])
    )
    assert (
        f"median error {time[1]} of time ({time[0]}), {memory[1]} of memory ({memory[0]})" in README
    )
    assert f"| {time[0]} published steps of others" in PLAN
    assert f"| median {time[1]} |" in PLAN
    assert f"{memory[0]} with memory | median {memory[1]} |" in PLAN


def test_the_planners_errors_on_this_machine_are_the_records() -> None:
    rows = {
        (row["ranks"], row["width"]): row["clocks"]["wall"] for row in records("plan_ranks.jsonl")
    }
    settings = [(2, 256), (2, 512), (4, 256), (4, 512), (8, 256)]
    assert sorted(rows) == settings

    def told(key: str, form: str, scale: float = 1.0) -> str:
        found = [format(scale * rows[setting][key], form).lstrip("0") for setting in settings]
        return f"{', '.join(found[:2])}; {', '.join(found[2:4])}; {found[4]}"

    places, errors = told("best_at", ".0f"), told("median_error", ".0f", 100)
    ours, theirs = told("spearman", ".2f"), told("authors_spearman", ".2f")
    said = f"{places}; Spearman {ours} (authors' {theirs}); median error of seconds {errors} %"
    assert said in README


def test_the_planners_memory_is_the_records() -> None:
    rows = records("plan_memory.jsonl")
    close = sum(row["holds"] for row in rows)
    assert f"{len(rows)} grids and forms on 2 and 4 gloo ranks | | {close} within 8 %" in README
    assert (
        f"memory, {len(rows)} configurations (`benchmarks/plan_memory.jsonl`) | {close} within 8 %"
        in PLAN
    )


def test_the_page_on_training_out_of_core_says_what_was_recorded() -> None:
    ratios = [
        line["over_budget"] for line in records("outofcore.jsonl") if line["event"] == "memory"
    ]
    assert len(ratios) == 10
    assert f"from {min(ratios):.2f} to {max(ratios):.2f} of the budget" in OUT_OF_CORE
