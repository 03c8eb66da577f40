"""Render the tables of the packages' documents from the committed ledgers and records.

scripts/env python scripts/tables.py            # write
scripts/env python scripts/tables.py --check    # exit 1 where a document and its records disagree
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import read_record
from fourfold_parallel.reproduce.claims import read_ledger
from fourfold_parallel.reproduce.experiment import experiment_of
from fourfold_parallel.reproduce.tables import check_recipes, filled, ledger_page

ROOT = Path(__file__).resolve().parent.parent


def rendered(package: Path) -> Iterator[tuple[Path, str]]:
    """Every document of a package with a rendered table, and what it should say."""
    results = package / "results"
    if not (results / "ledger.jsonl").exists():
        return
    rows = read_ledger(results / "ledger.jsonl")
    experiment = experiment_of(package.name)
    records = {
        path.stem: read_record(path)
        for path in results.glob("*.jsonl")
        if path.name != "ledger.jsonl"
    }
    check_recipes(records)
    yield results / "README.md", ledger_page(package.name, rows)
    for document in sorted([package / "README.md", *package.glob("docs/*.md")]):
        text = document.read_text(encoding="utf-8")
        if "<!-- ledger:" in text or "<!-- table:" in text:
            place = "results/" if document.parent == package else "../results/"
            yield document, filled(text, rows, experiment.tables, records, results=place)


def main() -> None:
    """Write or check every package's documents."""
    stale = []
    for package in sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml")):
        for document, text in rendered(package):
            if not document.exists() or document.read_text(encoding="utf-8") != text:
                stale.append(str(document.relative_to(ROOT)))
                if "--check" not in sys.argv:
                    write_text(document, text)
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run scripts/tables.py")
        sys.exit(1)


if __name__ == "__main__":
    main()
