"""Tables of documents, rendered from committed ledgers and records.

A document holds `<!-- ledger: laptop G1 G2 -->` (those rows) or `<!-- table: NAME -->` (a table that the
package's experiment renders), each up to `<!-- end -->`.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from fourfold_parallel.reproduce.claims import LedgerRow, Records

_LEDGER = re.compile(r"(<!-- ledger: (\w+)((?: \w+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: bool = False) -> str:
    """A Markdown table; where `numeric`, all but the first column are flush right."""
    rule = ["---", *["---:" if numeric else "---"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def ledger(rows: Sequence[LedgerRow], *, results: str) -> str:
    """Rows of a ledger as a Markdown table; `results` is the folder of the records, from the document."""
    return markdown(
        ["claim", "paper", "ours", "verdict", "record"],
        [
            [
                f"{row.id} {row.statement}",
                row.paper_value,
                row.ours or row.because,
                row.verdict,
                f"[`{row.record}`]({results}{row.record.partition(':')[0]})" if row.record else "",
            ]
            for row in rows
        ],
    )


def check_recipes(records: Records) -> None:
    """See that every record is of a recipe as it stands.

    Raises:
        ValueError: One is marked: its run had overrides.
    """
    for record in records.values():
        marks = record.events[0].values["overrides"]
        if marks:
            raise ValueError(
                f"{record.path} is of a run with overrides {marks}; no table takes its numbers. Make "
                "it again without --set, or remove it"
            )


def ledger_page(package: str, rows: Sequence[LedgerRow]) -> str:
    """The whole ledger of a package as the document `results/README.md`: every row with its rule."""
    sections = [
        f"### {row.id}: {row.verdict}\n\n"
        f"{row.statement} (section {row.section}).\n\n"
        f"- Paper: {row.paper_value}\n"
        f"- Ours: {row.ours or row.because}\n"
        f"- Rule, fixed before the run: {row.rule_text}\n"
        + (f"- Conditions: {row.conditions}\n" if row.conditions else "")
        + (f"- Applied: {row.because}\n" if row.ours else "")
        for row in rows
    ]
    return (
        f"# Ledger of {package}, {rows[0].scale} scale\n\n"
        "Rendered from `ledger.jsonl` by `scripts/tables.py`. Each verdict links to the record whose line "
        "decides it.\n\n"
        + ledger(rows, results="")
        + "\n## Rules and conditions\n\n"
        + "\n".join(sections)
    )


def filled(
    text: str,
    rows: Sequence[LedgerRow],
    tables: Mapping[str, Callable[[Records], str]],
    records: Records,
    *,
    results: str,
) -> str:
    """A document with its tables rendered again.

    Args:
        text: the document.
        rows: the package's ledger.
        tables: renderers by name.
        records: what they render.
        results: the folder of the records, from the document: `results/`.

    Raises:
        ValueError: The document names a scale, a claim or a table that is not there.
    """
    by_id = {row.id: row for row in rows}

    def of_ledger(match: re.Match[str]) -> str:
        if any(row.scale != match[2] for row in rows):
            raise ValueError(f"the table is of scale {match[2]!r}, the ledger of {rows[0].scale!r}")
        names = match[3].split() or list(by_id)
        unknown = [name for name in names if name not in by_id]
        if unknown:
            raise ValueError(f"no claim {unknown[0]!r}; there are {', '.join(by_id)}")
        return match[1] + ledger([by_id[name] for name in names], results=results) + match[4]

    def of_records(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise ValueError(f"no table {match[2]!r}; there are {', '.join(tables)}")
        return match[1] + tables[match[2]](records) + match[3]

    return _TABLE.sub(of_records, _LEDGER.sub(of_ledger, text))
