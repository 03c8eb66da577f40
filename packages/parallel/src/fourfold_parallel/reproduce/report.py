"""One self-contained HTML page: what was found, what this run measured beside it, and how to use it."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import Record, commit_date, read_record
from fourfold_parallel.reproduce.claims import LedgerRow, Verdict, read_ledger
from fourfold_parallel.reproduce.experiment import (
    Experiment,
    committed_results,
    experiment_of,
    installed,
)
from fourfold_parallel.reproduce.page import inline, render
from fourfold_parallel.run.timeline import is_timed, shown

HERE = Path(__file__).resolve().parent

ORDER: tuple[Verdict, ...] = ("contradicted", "reproduced", "inconclusive", "not tested")
"""Contradictions are why people read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A record line that a verdict rests on."""

    anchor: str
    where: str
    """`file:line`."""
    json: str
    commit: str
    date: str
    """Of the commit: `2026-11-22`; empty where git does not know it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure with its caption."""

    anchor: str
    caption: str
    drawing: Markup


class Results:
    """A package's ledger, records and figures in a folder; empty where it holds no ledger."""

    def __init__(self, folder: Path, *, package: str, name: str) -> None:
        """The results of a package, under a name (`committed`, `run`) that its anchors begin with."""
        self._folder, self._prefix = folder, f"{name}-{package}"
        ledger = folder / "ledger.jsonl"
        self.rows = {row.id: row for row in read_ledger(ledger)} if ledger.exists() else {}

    @property
    def scale(self) -> str:
        """The scale of the ledger; empty where there is none."""
        return next((row.scale for row in self.rows.values()), "")

    @property
    def tested(self) -> Mapping[str, LedgerRow]:
        """The rows that have a verdict, by claim."""
        return {row.id: row for row in self.rows.values() if row.verdict != "not tested"}

    @cached_property
    def records(self) -> Mapping[str, Record]:
        """Records by stage."""
        paths = sorted(self._folder.glob("*.jsonl")) if self.rows else ()
        return {path.stem: read_record(path) for path in paths if path.name != "ledger.jsonl"}

    @cached_property
    def pictures(self) -> Mapping[str, Picture]:
        """Figures by name, in the experiment's order."""
        if not self.rows:
            return {}
        return {name: self.picture(name, "figure") for name in self._captions}

    @cached_property
    def _captions(self) -> Mapping[str, str]:
        return json.loads((self._folder / "figures.json").read_text(encoding="utf-8"))

    def picture(self, name: str, place: str) -> Picture:
        """A figure, to be shown at a place of the page that has it once."""
        anchor = f"{self._prefix}-{name}"
        svg = (self._folder / f"{name}.svg").read_text(encoding="utf-8")
        drawing = inline(svg, prefix=f"{place}-{anchor}-")
        return Picture(anchor=anchor, caption=self._captions[name], drawing=drawing)

    @cached_property
    def lines(self) -> Mapping[str, Line]:
        """The record lines that verdicts rest on, by `file:line`."""
        return {row.record: self._line(row.record) for row in self.tested.values()}

    def _line(self, where: str) -> Line:
        name, _, number = where.partition(":")
        record = self.records[Path(name).stem]
        [event] = [event for event in record.events if event.line == int(number)]
        commit = str(record.events[0].values["commit"])
        return Line(
            anchor=f"{self._prefix}-{name}-{number}".replace(".", "-"),
            where=where,
            json=json.dumps(event.values, indent=1),
            commit=commit[:7],
            date=commit_date(commit),
        )

    @cached_property
    def timed(self) -> Mapping[str, tuple[tuple[str, float, float], ...]]:
        """Of each training among the records: what its time was spent on, in seconds and as a share."""
        return {
            stage: tuple(shown(record))
            for stage, record in self.records.items()
            if is_timed(record)
        }

    @property
    def materials(self) -> tuple[Mapping[str, str], ...]:
        """Data and weights that the records used, each once."""
        by_sha256: dict[str, Mapping[str, str]] = {}
        for record in self.records.values():
            listed: Any = record.events[0].values["materials"]
            for material in listed:
                by_sha256.setdefault(material["sha256"], material)
        return tuple(by_sha256.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A claim, the committed finding, and this run's; each is absent where it was not tested."""

    claim: LedgerRow
    committed: LedgerRow | None
    run: LedgerRow | None

    @property
    def finding(self) -> LedgerRow:
        """The row that is shown first."""
        return self.committed or self.run or self.claim

    @property
    def differs(self) -> bool:
        """True where this run decides otherwise than what is committed."""
        return bool(self.committed and self.run and self.committed.verdict != self.run.verdict)

    @property
    def anchor(self) -> str:
        """The claim's place on the page."""
        return f"{self.claim.package}-{self.claim.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One package's part of the page."""

    experiment: Experiment
    committed: Results
    run: Results
    readme: str
    """Its README, from the page; empty where the package is installed alone."""
    commands: str
    """The first commands of its README."""
    entries: tuple[Entry, ...]
    """Those where this run differs, then what is contradicted, then the others in the paper's order."""

    @property
    def headline(self) -> str:
        """The finding in a sentence, from the committed records."""
        return self.experiment.headline(self.committed.records) if self.committed.rows else ""

    @property
    def picture(self) -> tuple[Picture, ...]:
        """The figure that is shown first, if there is any."""
        results = self.committed if self.committed.pictures else self.run
        names = [*results.pictures]
        chosen = self.experiment.picture if self.experiment.picture in names else "".join(names[:1])
        return (results.picture(chosen, "card"),) if chosen else ()

    @property
    def counts(self) -> Counter[str]:
        """The number of claims with each verdict."""
        return Counter(entry.finding.verdict for entry in self.entries)


def write(
    folder: Path,
    *,
    scale: str,
    elapsed_s: float | None = None,
    committed: Callable[[str], Path] = committed_results,
) -> Path:
    """Render `folder/report.html` from the ledgers, figures and records in `folder` and the committed ones.

    Args:
        folder: holds a folder for each package that was run.
        scale: of the run.
        elapsed_s: the run took so long.
        committed: the folder of a package's committed results, which need not be there.

    Raises:
        ValueError: where the folder holds no ledger.
    """
    packages = [path.parent.name for path in sorted(folder.glob("*/ledger.jsonl"))]
    if not packages:
        raise ValueError(
            f"{folder} holds no ledger; run `fourfold reproduce` first, or name its folder"
        )
    others = [name for name in installed() if (committed(name) / "ledger.jsonl").exists()]
    sections = [
        _section(folder, committed(package), package)
        for package in dict.fromkeys([*packages, *others])
    ]
    page = render(
        HERE / "templates" / "report.html.jinja",
        sections=sections,
        scale=scale,
        elapsed_s=elapsed_s,
        order=ORDER,
        counts=sum((section.counts for section in sections), Counter[str]()),
        environment=next(iter(sections[0].run.records.values())).events[0].values,
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _section(folder: Path, committed: Path, package: str) -> Section:
    theirs = Results(committed, package=package, name="committed")
    mine = Results(folder / package, package=package, name="run")
    readme = committed.parent / "README.md"
    is_there = bool(theirs.rows) and readme.exists()
    return Section(
        experiment=experiment_of(package),
        committed=theirs,
        run=mine,
        readme=os.path.relpath(readme, folder) if is_there else "",
        commands=first_commands(readme.read_text(encoding="utf-8")) if is_there else "",
        entries=entries(theirs, mine),
    )


def compare(package: str, folder: Path) -> tuple[Entry, ...]:
    """The claims of a package, as a folder's ledger and the committed one judge them."""
    return entries(
        Results(committed_results(package), package=package, name="committed"),
        Results(folder, package=package, name="run"),
    )


def entries(committed: Results, run: Results) -> tuple[Entry, ...]:
    """The claims of both ledgers: where they differ, then contradicted ones, then the others."""
    claims = {**committed.rows, **run.rows}
    listed = [
        Entry(claim=row, committed=committed.tested.get(name), run=run.tested.get(name))
        for name, row in claims.items()
    ]
    return tuple(
        sorted(listed, key=lambda entry: (not entry.differs, ORDER.index(entry.finding.verdict)))
    )


def first_commands(readme: str) -> str:
    """The first commands under `## Use it`; empty where that part begins with Python."""
    part = readme.partition("## Use it\n")[2].partition("\n## ")[0]
    block = re.search(r"^```(\w*)\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
    return block[2].strip() if block and not block[1] else ""
