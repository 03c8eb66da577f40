"""Render the ledger tables of the READMEs from the committed ledgers.

scripts/env python scripts/tables.py            # write
scripts/env python scripts/tables.py --check    # exit 1 where a README and its ledger disagree
"""

import re
import sys
from pathlib import Path

from fourfold_parallel.common.files import write_text
from fourfold_parallel.reproduce.claims import read_ledger

ROOT = Path(__file__).resolve().parent.parent
_PLACE = re.compile(r"(<!-- ledger: (\w+) -->\n).*?(<!-- /ledger -->)", re.DOTALL)


def rendered(readme: Path) -> str:
    """The README with every ledger table as its package's committed records say."""

    def table(match: re.Match[str]) -> str:
        rows = read_ledger(readme.parent / "results" / "ledger.jsonl")
        lines = ["| claim | paper | ours | verdict | record |", "|---|---|---|---|---|"]
        for row in rows:
            if row.scale != match[2]:
                raise ValueError(
                    f"{readme}: the table is of scale {match[2]!r}, results/ledger.jsonl of {row.scale!r}"
                )
            record = f"[`{row.record}`](results/{row.record.split(':')[0]})" if row.record else ""
            cells = (
                f"{row.id} {row.statement}",
                row.paper_value,
                row.ours or row.because,
                row.verdict,
                record,
            )
            lines.append("| " + " | ".join(cells) + " |")
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return _PLACE.sub(table, readme.read_text(encoding="utf-8"))


def main() -> None:
    """Write or check every package's README."""
    stale = []
    for readme in sorted(ROOT.glob("packages/*/README.md")):
        text = rendered(readme)
        if text != readme.read_text(encoding="utf-8"):
            stale.append(readme.relative_to(ROOT))
            if "--check" not in sys.argv:
                write_text(readme, text)
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(map(str, stale))}; run scripts/tables.py")
        sys.exit(1)


if __name__ == "__main__":
    main()
