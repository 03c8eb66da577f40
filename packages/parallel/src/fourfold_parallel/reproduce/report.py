"""One self-contained HTML page of what was reproduced: the ledger, the figures, the environment."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import Record, read_record
from fourfold_parallel.reproduce.claims import LedgerRow, read_ledger
from fourfold_parallel.reproduce.experiment import experiment_of, installed
from fourfold_parallel.reproduce.page import inline, render

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
        lines = {}
        by_name = {record.path.name: record for record in self.records}
        for row in self.rows:
            name, _, number = row.record.partition(":")
            if name in by_name:
                event = next(event for event in by_name[name].events if event.line == int(number))
                anchor = f"{self.package}-{name}-{number}".replace(".", "-")
                lines[row.record] = (anchor, json.dumps(event.values, indent=1))
        return lines

    @property
    def materials(self) -> tuple[dict[str, Any], ...]:
        """Data and weights that the records used, each once."""
        by_sha256: dict[str, dict[str, Any]] = {}
        for record in self.records:
            listed: Any = record.events[0].values["materials"]
            for material in listed:
                by_sha256.setdefault(material["sha256"], material)
        return tuple(by_sha256.values())


def write(folder: Path, *, scale: str, elapsed_s: float | None = None) -> Path:
    """Render `folder/report.html` from the packages' ledgers, figures and records in `folder`.

    Raises:
        ValueError: where the folder holds no ledger.
    """
    sections = [_section(path.parent) for path in sorted(folder.glob("*/ledger.jsonl"))]
    if not sections:
        raise ValueError(
            f"{folder} holds no ledger; run `fourfold reproduce` first, or name its folder"
        )
    first = sections[0].records[0].events[0].values
    page = render(
        HERE / "templates" / "report.html.jinja",
        sections=sections,
        scale=scale,
        elapsed_s=elapsed_s,
        counts=Counter(row.verdict for section in sections for row in section.rows),
        environment=first,
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _section(folder: Path) -> Section:
    experiment = experiment_of(folder.name) if folder.name in installed() else None
    captions: dict[str, str] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return Section(
        package=folder.name,
        title=experiment.title if experiment else folder.name,
        paper=experiment.paper if experiment else "",
        rows=read_ledger(folder / "ledger.jsonl"),
        figures=tuple(
            (name, caption, _drawing(folder, name)) for name, caption in captions.items()
        ),
        records=tuple(
            read_record(path)
            for path in sorted(folder.glob("*.jsonl"))
            if path.name != "ledger.jsonl"
        ),
    )


def _drawing(folder: Path, name: str) -> Markup:
    svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
    return inline(svg, prefix=f"{folder.name}-{name}-")
