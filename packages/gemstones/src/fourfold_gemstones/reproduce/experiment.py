"""The experiment: the published measurements analysed again, and a suite of our own; claims and figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fourfold_gemstones.reproduce import recipes, tables
from fourfold_gemstones.reproduce.claims import CLAIMS
from fourfold_gemstones.reproduce.measures import headline
from fourfold_gemstones.reproduce.paper.analyses import analyse
from fourfold_gemstones.reproduce.paper.settings import Revisit
from fourfold_gemstones.reproduce.stages import FRESH, LAWS, PUBLISHED, SUITE
from fourfold_gemstones.reproduce.suite.analyses import analyse_suite
from fourfold_gemstones.reproduce.suite.cooling import train_cooling
from fourfold_gemstones.reproduce.suite.train import train_suite
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.workers import cores, each
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace
from fourfold_parallel.reproduce.scale import Scale


def analyse_published(run: Revisit, workplace: Workplace, *, processes: int) -> None:
    """Write the record of every part of `revisit`."""
    material = Material(
        name="Gemstones measurements and published parameters",
        kind="measurements",
        licence="MIT",
        sha256=run.data_sha256,
        source="github.com/mcleish7/gemstone-scaling-laws, tables of which come with the package",
    )
    with workplace.recording(run, seed=run.seed, materials=(material,)) as records:
        parts = each(partial(analyse, run), run.parts, processes=processes)
        for done, (name, events) in enumerate(zip(run.parts, parts, strict=True), start=1):
            for kind, fields in events:
                records.write(kind, **fields)
            workplace.progress(done, len(run.parts), name)


def _stages(scale: Scale) -> Sequence[Stage]:
    """The published measurements, then our own suite and its laws."""
    match scale:
        case "smoke":
            processes = 1
        case "laptop":
            processes = cores()
        case "paper":
            return ()
    theirs = recipes.revisit(scale)
    mine = recipes.suite(scale)
    stages = [
        Stage(
            name=PUBLISHED,
            run=theirs,
            perform=partial(analyse_published, theirs, processes=processes),
        ),
        Stage(name=SUITE, run=mine, perform=partial(train_suite, mine, processes=processes)),
    ]
    if scale == "laptop":
        cooled = recipes.cooling()
        stages.append(
            Stage(
                name=FRESH,
                run=cooled,
                perform=partial(train_cooling, cooled, processes=processes),
            )
        )
        fitted = recipes.suite_laws()
        work = partial(analyse_suite, fitted)
        stages.append(Stage(name=LAWS, run=fitted, perform=work, reads=(SUITE,)))
    return tuple(stages)


def _drawings(scale: Scale) -> Sequence[Drawing]:
    """The figures of the stages that there are."""
    from fourfold_gemstones.reproduce import figures

    names = [stage.name for stage in _stages(scale)]
    theirs = figures.PUBLISHED_DRAWINGS if PUBLISHED in names else ()
    if scale != "laptop":
        theirs = tuple(drawing for drawing in theirs if drawing.name not in figures.SLOW)
    mine = figures.SUITE_DRAWINGS if SUITE in names else ()
    return (*theirs, *mine, *(figures.LAWS_DRAWINGS if LAWS in names else ()))


EXPERIMENT = Experiment(
    package="gemstones",
    title="Gemstones: scaling laws over width, depth, tokens and time",
    paper=(
        "McLeish, Kirchenbauer, Miller, Singh, Bhatele, Goldblum, Panda, Goldstein: Gemstones: A "
        "Model Suite for Multi-Faceted Scaling Laws, NeurIPS 2025 (arXiv 2502.06857)"
    ),
    idea="The compute-optimal size and shape of a language model depend on which runs, schedules and "
    "estimators the scaling law is fitted with.",
    headline=headline,
    picture="figure-slopes",
    claims=CLAIMS,
    stages=_stages,
    drawings=_drawings,
    launches=lambda: (),  # 163,000 device-hours: the paper's measurements are read instead
    tables=tables.TABLES,
)
"""Announced as the entry point `gemstones`."""
