"""The figures of `docs/grid.md` are those of the committed records."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "packages/parallel/docs/grid.md").read_text(encoding="utf-8")
ROWS = {
    "`data`": "fourfold_data_{ranks}",
    "`depth`": "fourfold_depth_{ranks}",
    "`row`": "fourfold_row_{ranks}",
    "`col`": "fourfold_col_{ranks}",
    "`data=2, depth=2`": "fourfold_data_2_depth_2",
    "`data=2, row=2`": "fourfold_data_2_row_2",
    "DeepSpeed ZeRO-1": "deepspeed_zero_1",
    "FSDP2": "fsdp2",
    "FSDP2 with tensor parallel": "fsdp2_tensor_2",
}
"""What the record calls a row of the page's table."""


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
