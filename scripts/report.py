"""One self-contained HTML page of what was reproduced: the ledger, the figures, the environment.

scripts/env python scripts/report.py out/smoke
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import Record, read_record
from fourfold_parallel.reproduce.claims import LedgerRow, read_ledger
from fourfold_parallel.reproduce.experiment import Experiment, installed

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One package's part of the page."""

    package: str
    title: str
    paper: str
    rows: tuple[LedgerRow, ...]
    figures: tuple[tuple[str, str, Markup], ...]
    """(name, caption, SVG)"""
    records: tuple[Record, ...]

    @property
    def lines(self) -> dict[str, tuple[str, str]]:
        """The record lines that verdicts rest on: "file:line" -> (anchor, the line's JSON)."""
        found = {}
        by_name = {record.path.name: record for record in self.records}
        for row in self.rows:
            name, _, number = row.record.partition(":")
            if name in by_name:
                event = next(one for one in by_name[name].events if one.line == int(number))
                anchor = f"{self.package}-{name}-{number}".replace(".", "-")
                found[row.record] = (anchor, json.dumps(event.values, indent=1))
        return found

    @property
    def materials(self) -> tuple[dict[str, Any], ...]:
        """Data and weights that the records used, each once."""
        held: dict[str, dict[str, Any]] = {}
        for record in self.records:
            listed: Any = record.events[0].values["materials"]
            for material in listed:
                held.setdefault(material["sha256"], material)
        return tuple(held.values())


def write(folder: Path, *, scale: str, elapsed_s: float | None = None) -> Path:
    """Render `folder/report.html` from the packages' ledgers, figures and records in `folder`.

    Raises:
        ValueError: where the folder holds no ledger.
    """
    known = installed()
    sections = [
        _section(path.parent, known.get(path.parent.name))
        for path in sorted(folder.glob("*/ledger.jsonl"))
    ]
    if not sections:
        raise ValueError(
            f"{folder} holds no ledger; run scripts/reproduce.py first, or name its folder"
        )
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("report.html.jinja")
    first = sections[0].records[0].events[0].values
    page = template.render(
        sections=sections,
        scale=scale,
        elapsed_s=elapsed_s,
        counts=Counter(row.verdict for section in sections for row in section.rows),
        environment=first,
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _section(folder: Path, experiment: Experiment | None) -> Section:
    captions: dict[str, str] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return Section(
        package=folder.name,
        title=experiment.title if experiment else folder.name,
        paper=experiment.paper if experiment else "",
        rows=read_ledger(folder / "ledger.jsonl"),
        figures=tuple(
            (name, caption, _inline(folder / f"{name}.svg")) for name, caption in captions.items()
        ),
        records=tuple(
            read_record(path)
            for path in sorted(folder.glob("*.jsonl"))
            if path.name != "ledger.jsonl"
        ),
    )


def _inline(path: Path) -> Markup:
    """The drawing as part of a page: no XML prolog, ids of its own, scaling with the column."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    prefix = f"{path.parent.name}-{path.stem}-"
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, mark + prefix)
    # Our own file, written by matplotlib: nothing of a stranger's reaches it.
    return Markup(text)  # noqa: S704


def main() -> None:
    """`scripts/report.py FOLDER`: render again from what is there."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: scripts/report.py out/SCALE\n\nRender FOLDER/report.html from its ledgers.")
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    folder = Path(sys.argv[1])
    try:
        print(write(folder, scale=folder.name))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
