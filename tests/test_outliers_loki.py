"""Outliers and Loki meet in the attention sink: what one README says of both is in both ledgers."""

import re
from pathlib import Path

from fourfold_parallel.reproduce.claims import read_ledger

PACKAGES = Path(__file__).resolve().parent.parent / "packages"


def ours(package: str, claim: str) -> list[float]:
    """The numbers of a ledger row."""
    rows = {row.id: row for row in read_ledger(PACKAGES / package / "results" / "ledger.jsonl")}
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", rows[claim].ours)]


def test_the_paragraph_on_the_sink_has_the_numbers_of_both_records() -> None:
    page = (PACKAGES / "outliers" / "README.md").read_text()
    [paragraph] = re.findall(r"\*\*Where this meets Loki\.\*\*.*?\n\n", page, re.DOTALL)
    said = " ".join(paragraph.split())
    number, share, *_, times = ours("outliers", "N3")
    left, _, _, before, *_ = ours("outliers", "O5")
    assert number == 3
    assert f"hold {100 * share:.0f} % of the squared length" in said
    assert f"up to {times:.0f} times as long" in said
    assert f"falls from {before:.2f} to {left * before:.2f}" in said
    assert f"then costs {ours('loki', 'F1')[0]:.1f} % perplexity" in said
    assert f"a perfect choice costs {ours('loki', 'F1')[3]:.0f} %" in said
    assert f"{ours('loki', 'F1c')[0]:.2f} % in Gemma-3-270M" in said
