"""From a table of runs to a page: fit, certificate, intervals, prescription, next run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fourfold_gemstones.architecture import Architecture
from fourfold_gemstones.laws import PowerLaw
from fourfold_gemstones.parametric import LawWarning, ParametricFit, ParametricLaw
from fourfold_gemstones.questions.allocation import (
    Allocation,
    Aspect,
    Band,
    Compute,
    Cost,
    Free,
    Lattice,
    Planner,
    SixNT,
    allocate,
    doubts_of_shape,
)
from fourfold_gemstones.questions.next_run import Suggestion, suggest_next
from fourfold_gemstones.reading import read_table
from fourfold_gemstones.runs import RunsWarning, RunTable, StrPath
from fourfold_gemstones.uncertainty import Bootstrap, Interval, bootstrap, slope
from fourfold_parallel.common.files import write_text
from fourfold_parallel.reproduce.page import inline, render

if TYPE_CHECKING:  # matplotlib is an extra: the numbers come without it
    from matplotlib.figure import Figure

ASPECT = 40.0
"""Width over depth at which a law without shape counts FLOPs."""
NEAR_NATS = 0.002
"""Shapes whose expected loss is this near the best are listed beside it."""
SHOWN = 8
"""Rows shown of a list."""
TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prescription:
    """Size, tokens and, where the law has a shape, shape of least loss for a budget."""

    band: Band
    near: tuple[Allocation, ...]
    """Shapes that can be built whose expected loss is near the best one's; none without a shape."""
    suggestions: tuple[Suggestion, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoShape:
    """A law in width and depth whose optimal shape the table does not identify."""

    doubts: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"shape is not identified by this table: {'; '.join(self.doubts)}. Add runs of other widths and "
            "depths at one size, or fit a law without shape: --law parameters"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """All numbers of the page."""

    fit: ParametricFit
    draws: Bootstrap
    run_sd: float
    """Standard deviation over runs of the mean log residual: what one run errs by."""
    slope: Interval | NoInterval
    prescription: Prescription | NoShape
    warnings: tuple[str, ...]

    @property
    def shaped(self) -> bool:
        """True where the law has a shape."""
        return _shaped(self.fit.law)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoInterval:
    """The law has no closed-form slope."""


def _shaped(law: ParametricLaw) -> bool:
    return {"width", "depth"} <= set(law.variables)


def analyse(
    table: RunTable | StrPath,
    law: ParametricLaw,
    budget: float,
    *,
    architecture: Architecture,
    lattice: Lattice,
    draws: int,
    generator: np.random.Generator,
) -> Analysis:
    """Read, fit, resample, prescribe and suggest; what is warned of on the way is part of the analysis."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LawWarning)
        warnings.simplefilter("always", RunsWarning)
        if not isinstance(table, RunTable):
            table = read_table(table, architecture=architecture)
        cost: Cost = Compute() if table.has("width") else SixNT()
        fit = law.fit(table)
        resampled = bootstrap(fit, draws=draws, generator=generator)
        planner = Planner(
            architecture=architecture,
            cost=cost,
            shapes=Free() if _shaped(law) else Aspect(ratio=ASPECT),
            embeddings=law.embeddings,
        )
        band = allocate(fit, resampled, planner, budget)
    residual = np.log(table.column("loss_nats") / fit.predict(table))
    _, index = table.groups("run")
    means = np.asarray([residual[index == run].mean() for run in range(index.max() + 1)])
    run_sd = float(means.std(ddof=1))
    doubts = doubts_of_shape(fit, band) if _shaped(law) else ()
    return Analysis(
        fit=fit,
        draws=resampled,
        run_sd=run_sd,
        slope=NoInterval() if len(law.variables) != 2 else resampled.interval(slope),
        prescription=NoShape(doubts=doubts)
        if doubts
        else Prescription(
            band=band,
            near=_near(fit, planner, lattice, budget) if _shaped(law) else (),
            suggestions=_suggestions(fit, resampled, planner, budget, run_sd=run_sd),
        ),
        warnings=tuple(dict.fromkeys(str(warning.message) for warning in caught)),
    )


def _near(
    fit: ParametricFit, planner: Planner, lattice: Lattice, budget: float
) -> tuple[Allocation, ...]:
    built = Planner(
        architecture=planner.architecture,
        cost=planner.cost,
        shapes=lattice,
        embeddings=planner.embeddings,
    )
    return built.near(fit.estimate, budget, within_nats=NEAR_NATS)[:SHOWN]


def _suggestions(
    fit: ParametricFit, draws: Bootstrap, planner: Planner, budget: float, *, run_sd: float
) -> tuple[Suggestion, ...]:
    if not fit.table.has("width"):
        return ()

    def log_size(law: PowerLaw) -> float:
        return float(np.log(planner.allocate(law, budget).parameters))

    ranked = suggest_next(fit, draws, planner, log_size, budget, run_sd=max(run_sd, 1e-4))
    return ranked[:SHOWN]


def said(analysis: Analysis) -> Iterator[str]:
    """The main numbers in two sentences."""
    certificate = analysis.fit.certificate
    yield (
        f"{certificate.agreeing} of {certificate.starts} descents agree; "
        f"R² {analysis.fit.score(analysis.fit.table):.4f}"
    )
    match analysis.prescription:
        case NoShape() as reasons:
            yield str(reasons)
        case Prescription(band=band):
            best = band.best
            shape = f"width/depth {best.aspect:.3g}, " if analysis.shaped else ""
            yield (
                f"for {best.budget:.3g} FLOPs: {best.parameters:.3g} parameters "
                f"({band.parameters.low:.3g} to {band.parameters.high:.3g}), {best.tokens:.3g} tokens, "
                f"{shape}loss {best.loss_nats:.4f} nats"
            )


def figure_fit(analysis: Analysis) -> Figure:
    """Measured losses against tokens, one colour per run, and the law through them."""
    from matplotlib.figure import Figure

    from fourfold_parallel.reproduce.figures import SHADES

    table = analysis.fit.table
    names, index = table.groups("run")
    figure = Figure(figsize=(7.2, 4.2))
    axes = figure.add_subplot()
    predicted = analysis.fit.predict(table)
    tokens, loss = table.column("tokens"), table.column("loss_nats")
    for run in range(len(names)):
        rows = np.flatnonzero(index == run)
        colour = SHADES[run % len(SHADES)]
        axes.plot(tokens[rows], loss[rows], "o", color=colour, markersize=3, alpha=0.8)
        axes.plot(tokens[rows], predicted[rows], color=colour, linewidth=1.1)
    axes.set_xscale("log")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{len(names)} runs and the fitted law")
    return figure


def figure_residuals(analysis: Analysis) -> Figure:
    """Mean residual of each run, in order of size: where the law misses."""
    from matplotlib.figure import Figure

    from fourfold_parallel.reproduce.figures import BASELINE, METHOD

    table = analysis.fit.table
    names, index = table.groups("run")
    residual = 100 * np.log(table.column("loss_nats") / analysis.fit.predict(table))
    means = [residual[index == run].mean() for run in range(len(names))]
    size = [table.column("parameters")[index == run][0] for run in range(len(names))]
    order = np.argsort(size)
    figure = Figure(figsize=(7.2, 0.8 + 0.2 * min(len(names), 40)))
    axes = figure.add_subplot()
    shown = order[:40]
    axes.barh(range(len(shown)), [means[run] for run in shown], color=METHOD, height=0.6)
    axes.set_yticks(range(len(shown)), [names[run][:28] for run in shown], fontsize=7)
    axes.axvline(0, color=BASELINE, linewidth=1)
    axes.set_xlabel("mean residual of log loss (%), smallest models at the bottom")
    return figure


def _equation(law: PowerLaw) -> str:
    terms = [
        f"{np.exp(c):.4g} / {variable.replace('_', ' ')}^{e:.4f}"
        for variable, c, e in zip(law.variables, law.log_coefficients, law.exponents, strict=True)
    ]
    return "L = " + " + ".join([f"{np.exp(law.log_floor):.4f}", *terms])


def _numbers(analysis: Analysis, band: Band) -> list[tuple[str, str, str]]:
    """Name, best value and interval of each prescribed quantity."""
    rows: list[tuple[str, float, Interval, str]] = [
        ("parameters", band.best.parameters, band.parameters, ".3g"),
        ("tokens", band.best.tokens, band.tokens, ".3g"),
        ("tokens per parameter", band.best.tokens_per_parameter, band.tokens_per_parameter, ".3g"),
        ("loss (nats)", band.best.loss_nats, band.loss_nats, ".4f"),
    ]
    if analysis.shaped:
        rows.insert(3, ("width / depth", band.best.aspect, band.aspect, ".3g"))
    return [
        (name, f"{value:{digits}}", f"{interval.low:{digits}} to {interval.high:{digits}}")
        for name, value, interval, digits in rows
    ]


def _shapes(near: tuple[Allocation, ...]) -> list[tuple[str, ...]]:
    """Width, depth, parameters, tokens and expected loss of each shape."""
    return [
        (
            f"{shape.width:.0f}",
            f"{shape.depth:.0f}",
            f"{shape.parameters:.3g}",
            f"{shape.tokens:.3g}",
            f"{shape.loss_nats:.4f}",
        )
        for shape in near
    ]


def _next_runs(suggestions: tuple[Suggestion, ...], *, shaped: bool) -> list[tuple[str, ...]]:
    """Shape, or size where the law has none, tokens, FLOPs and gain of each suggestion."""
    return [
        (
            *((f"{run.width:.0f}", f"{run.depth:.0f}") if shaped else (f"{run.parameters:.3g}",)),
            f"{run.tokens:.3g}",
            f"{run.budget:.2g}",
            f"{100 * run.shrinks:.0f} %",
        )
        for run in suggestions
    ]


def page(analysis: Analysis) -> str:
    """A self-contained HTML page; needs matplotlib."""
    from fourfold_parallel.reproduce.figures import style, svg

    certificate = analysis.fit.certificate
    with style():
        drawings = [
            inline(svg(draw(analysis)), prefix=f"{draw.__name__}-")
            for draw in (figure_fit, figure_residuals)
        ]
    gaps = certificate.basins[1:]
    match analysis.prescription:
        case Prescription(band=band, near=near, suggestions=suggestions) as prescription:
            prescribed: dict[str, object] = {
                "prescription": prescription,
                "numbers": _numbers(analysis, band),
                "near": _shapes(near),
                "suggestions": _next_runs(suggestions, shaped=analysis.shaped),
            }
        case NoShape() as doubts:
            prescribed = {"prescription": None, "no_shape": str(doubts)}
    return render(
        TEMPLATE,
        analysis=analysis,
        runs=len(set(analysis.fit.table.run)),
        rows=len(analysis.fit.table),
        equation=_equation(analysis.fit.estimate),
        r_squared=analysis.fit.score(analysis.fit.table),
        slope=analysis.slope if isinstance(analysis.slope, Interval) else None,
        certificate={
            "descents that agree": f"{certificate.agreeing} of {certificate.starts}",
            "distinct optima": len(certificate.basins),
            "next best optimum": f"+{100 * gaps[0]:.3g} %" if gaps else "none",
            "gradient over objective": f"{certificate.relative_gradient:.1e}",
            "condition number": f"{certificate.condition:.3g}",
            "at a bound": ", ".join(certificate.at_bound) or "none",
        },
        counted=f"at a width of {ASPECT:g} times the depth"
        if analysis.fit.table.has("width")
        else "as 6 N T, since the table has no widths",
        near_nats=NEAR_NATS,
        fitted=drawings[0],
        residuals=drawings[1],
        **prescribed,
    )


def ready(path: StrPath) -> None:
    """See that a page can be written, before the work whose result it is to hold.

    Raises:
        ValueError: The path is a folder, or its folder cannot be made or written.
    """
    place = Path(path)
    if place.is_dir():
        raise ValueError(f"{place} is a folder; name the file to write: {place / 'report.html'}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder of {place} ({error}); name another") from error
    if not os.access(place.parent, os.W_OK):
        raise ValueError(f"cannot write in {place.parent}; name another folder for the page")


def write(path: StrPath, analysis: Analysis) -> None:
    """Write the page, whole."""
    write_text(Path(path), page(analysis))
