"""An experiment: named stages that write records, claims judged from them, figures drawn from them.

`perform` is what every command line calls. A stage that is finished for this very recipe is not run
again; one that was interrupted goes on from its last checkpoint.
"""

import importlib.metadata
import importlib.util
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.progress import DONE, Progress
from fourfold_parallel.common.records import Material, Record, RecordWriter, header, read_record
from fourfold_parallel.common.sinks import OpenSink
from fourfold_parallel.common.values import describes, to_json
from fourfold_parallel.reproduce import costs
from fourfold_parallel.reproduce.claims import Claim, LedgerRow, Records, judge, write_ledger
from fourfold_parallel.reproduce.launches import Launch
from fourfold_parallel.reproduce.scale import Scale

log = logging.getLogger(__name__)

ENTRY_POINTS = "fourfold.experiments"
"""Where installed packages announce their experiment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """The files that a stage reads and writes."""

    record: Path
    """The stage's own record; its last line must be an event "finished"."""
    scratch: Path
    """Checkpoints and other files that may be thrown away once the stage is finished."""
    finished: Records
    """Records of the stages before this one."""
    progress: Progress
    sinks: Sequence[OpenSink] = ()
    """Get every event of the record; a stage that trains hands them on."""
    overrides: Sequence[str] = ()
    """Fields set otherwise than in the recipe, which mark the record; a stage that trains hands them on."""

    @contextmanager
    def recording(
        self, run: object, *, seed: int, materials: Sequence[Material] = ()
    ) -> Iterator[RecordWriter]:
        """A fresh record of `run`, whose block writes the events; it ends as finished.

        Where the block raises, what it wrote stays, unfinished.
        """
        self.record.unlink(missing_ok=True)
        with RecordWriter(self.record, self.sinks) as records:
            records.write_header(
                header(run, seed=seed, world_size=1, materials=materials, overrides=self.overrides)
            )
            yield records
            records.write("finished")

    @contextmanager
    def concluding(self) -> Iterator[RecordWriter]:
        """The record that a training began: what the block adds to it, after which it is finished."""
        with RecordWriter(self.record, self.sinks) as records:
            yield records
            records.write("finished")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A named piece of work that leaves one record."""

    name: str
    """Lower case, for file names; also the record's key for rules and figures."""
    run: object
    """The frozen value that decides the result. A record is of this stage where it rebuilds an equal one."""
    perform: Callable[[Workplace], None]
    reads: tuple[str, ...] = ()
    """Earlier stages whose records it works on: it is done again whenever one of them is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure and what it shows."""

    name: str
    """`figure-1`: as in the paper, or as near as the scale allows."""
    caption: str
    """What is seen, the scale and the seeds."""
    draw: Callable[[Records], Any]
    """Gives a `matplotlib.figure.Figure`; the extra `figures` need not be installed for anything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A paper's reproduction: one value per package, announced as an entry point."""

    package: str
    """Folder under `packages/`: `goldfish`."""
    title: str
    paper: str
    """Authors, title, venue, year."""
    idea: str = ""
    """The paper in one sentence, for those who have not read it."""
    headline: Callable[[Records], str] = lambda _: ""
    """The finding in one sentence, from the committed records."""
    picture: str = ""
    """The drawing that the report shows first; otherwise its first."""
    claims: Sequence[Claim]
    stages: Callable[[Scale], Sequence[Stage]]
    """The stages at a scale, in order; none where the scale is launched by hand."""
    drawings: Callable[[Scale], Sequence[Drawing]]
    """The figures that the records of a scale allow."""
    launches: Callable[[], Sequence[Launch]]
    """The paper's own runs."""
    tables: Mapping[str, Callable[[Records], str]] = field(default_factory=dict)
    """Markdown tables of the package's documents, by the name in `<!-- table: NAME -->`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The results that `perform` left in its folder."""

    folder: Path
    rows: tuple[LedgerRow, ...]
    figures: tuple[Path, ...]


def installed() -> tuple[str, ...]:
    """Names of the installed packages that announce an experiment, in order; none is imported."""
    return tuple(sorted(importlib.metadata.entry_points(group=ENTRY_POINTS).names))


def experiment_of(package: str) -> Experiment:
    """The experiment that a package announces.

    Raises:
        ValueError: No installed package of this name announces one.
    """
    if package not in installed():
        raise ValueError(f"no package {package!r} is installed; there are {', '.join(installed())}")
    [point] = importlib.metadata.entry_points(group=ENTRY_POINTS, name=package)
    return point.load()


def committed_results(package: str) -> Path:
    """The folder of a package's committed results: beside its source, which only a checkout has."""
    [point] = importlib.metadata.entry_points(group=ENTRY_POINTS, name=package)
    spec = importlib.util.find_spec(point.module.partition(".")[0])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[2] / "results"


def perform(
    experiment: Experiment,
    scale: Scale,
    folder: Path,
    *,
    resume: bool,
    progress: Callable[[Stage], Progress],
    sinks: Sequence[OpenSink] = (),
) -> Outcome:
    """Run what is not finished, judge the claims, draw the figures.

    Args:
        experiment: the paper.
        scale: how large.
        folder: receives `<stage>.jsonl`, `ledger.jsonl`, `<figure>.svg`, `figures.json` and `times.json`.
        resume: keep finished stages and go on from checkpoints; otherwise start over.
        progress: gives the progress of a stage.
        sinks: get every event of the records.

    Raises:
        ValueError: where the scale has no stages.
    """
    stages = experiment.stages(scale)
    if not stages:
        raise ValueError(
            f"{experiment.package} has nothing to run here at scale {scale!r}; "
            f"see its launch lines: python -m fourfold_{experiment.package} reproduce --scale paper"
        )
    experiment.drawings(scale)  # a figure library that is missing is missed now, not after hours
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    records: dict[str, Record] = {}
    for stage in stages:
        path = folder / f"{stage.name}.jsonl"
        report = progress(stage)
        if not _is_done(path, stage):
            workplace = Workplace(
                record=path,
                scratch=folder / "scratch" / stage.name,
                finished=dict(records),
                progress=report,
                sinks=sinks,
            )
            _discard_other(path, workplace.scratch, stage)
            for later in stages:
                if stage.name in later.reads:
                    (folder / f"{later.name}.jsonl").unlink(missing_ok=True)
            started_s = time.perf_counter()
            stage.perform(workplace)
            costs.note(folder, stage.name, time.perf_counter() - started_s)
            shutil.rmtree(workplace.scratch, ignore_errors=True)
        report(1, 1, DONE)
        records[stage.name] = read_record(path)
    return conclude(experiment, scale, folder, records)


def conclude(experiment: Experiment, scale: Scale, folder: Path, records: Records) -> Outcome:
    """Judge and draw from finished records."""
    rows = judge(experiment.claims, records, package=experiment.package, scale=scale)
    write_ledger(folder / "ledger.jsonl", rows)
    drawn = list(_draw(experiment, scale, folder, records))
    captions = {path.stem: caption for path, caption in drawn}
    write_text(folder / "figures.json", json.dumps(captions, indent=1) + "\n")
    return Outcome(folder=folder, rows=rows, figures=tuple(path for path, _ in drawn))


def load(experiment: Experiment, scale: Scale, folder: Path) -> Records:
    """The finished records of a scale in a folder; a missing or unfinished one is left out."""
    finished: dict[str, Record] = {}
    for stage in experiment.stages(scale):
        path = folder / f"{stage.name}.jsonl"
        if _is_done(path, stage):
            finished[stage.name] = read_record(path)
    return finished


def _draw(
    experiment: Experiment, scale: Scale, folder: Path, records: Records
) -> Iterator[tuple[Path, str]]:
    from fourfold_parallel.reproduce import figures

    for drawing in experiment.drawings(scale):
        path = folder / f"{drawing.name}.svg"
        with figures.style():
            figures.save(drawing.draw(records), path)
        yield path, drawing.caption


def _is_done(path: Path, stage: Stage) -> bool:
    if not path.exists():
        return False
    try:
        record = read_record(path)
    except ValueError:
        return False
    first = record.events[0].values
    return record.is_finished and not first["overrides"] and describes(first["run"], stage.run)


def _discard_other(path: Path, scratch: Path, stage: Stage) -> None:
    """Remove what an earlier version of the stage left, so that it is not taken for this one's."""
    mark = scratch / "stage.json"
    mine = json.dumps(to_json(stage.run), sort_keys=True)
    if not mark.exists() or mark.read_text(encoding="utf-8") != mine:
        path.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        write_text(mark, mine)
