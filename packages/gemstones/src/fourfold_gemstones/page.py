"""From a table of runs to a page: fit, certificate, intervals, prescription, next run."""

from __future__ import annotations

import html
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fourfold_gemstones.allocation import (
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
)
from fourfold_gemstones.architecture import Architecture
from fourfold_gemstones.laws import CHINCHILLA, SHAPE_ONLY, WIDTH_DEPTH, PowerLaw, Variable
from fourfold_gemstones.next_run import Suggestion, suggest_next
from fourfold_gemstones.parametric import LawWarning, ParametricFit, ParametricLaw
from fourfold_gemstones.runs import RunTable
from fourfold_gemstones.uncertainty import Bootstrap, Interval, bootstrap, slope
from fourfold_parallel.common.files import write_text
from fourfold_parallel.reproduce.figures import BASELINE, METHOD, SHADES, style, svg

LAWS: dict[str, tuple[Variable, ...]] = {
    "parameters": CHINCHILLA,
    "compute": ("effective_parameters", "tokens"),
    "width-depth": WIDTH_DEPTH,
    "shape": SHAPE_ONLY,
}
"""Laws by the name that the command line gives them."""
NEAR_NATS = 0.002
"""Shapes whose expected loss is this near the best are listed beside it."""
SHOWN = 8
"""Rows shown of a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Everything the page shows."""

    fit: ParametricFit
    draws: Bootstrap
    run_sd: float
    """Standard deviation over runs of the mean log residual: what one run errs by."""
    slope: Interval | NoInterval
    band: Band
    near: tuple[Allocation, ...]
    suggestions: tuple[Suggestion, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoInterval:
    """The law has no closed-form slope."""


def analyse(
    table: RunTable,
    law: ParametricLaw,
    budget: float,
    *,
    architecture: Architecture,
    lattice: Lattice,
    draws: int,
    generator: np.random.Generator,
) -> Analysis:
    """Fit, resample, prescribe and suggest."""
    shaped = {"width", "depth"} <= set(law.variables)
    cost: Cost = Compute() if "width" in table.columns else SixNT()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LawWarning)
        fit = law.fit(table)
        drawn = bootstrap(fit, draws=draws, generator=generator)
        planner = Planner(
            architecture=architecture,
            cost=cost,
            shapes=Free() if shaped else Aspect(ratio=40.0),
            embeddings=law.embeddings,
        )
        band = allocate(fit, drawn, planner, budget)
    residual = np.log(table.column("loss_nats") / fit.predict(table))
    _, index = table.groups("run")
    means = np.asarray([residual[index == run].mean() for run in range(index.max() + 1)])
    run_sd = float(means.std(ddof=1))
    built = Planner(architecture=architecture, cost=cost, shapes=lattice, embeddings=law.embeddings)
    return Analysis(
        fit=fit,
        draws=drawn,
        run_sd=run_sd,
        slope=NoInterval() if shaped or len(law.variables) != 2 else drawn.interval(slope),
        band=band,
        near=built.near(fit.estimate, budget, within_nats=NEAR_NATS)[:SHOWN] if shaped else (),
        suggestions=suggest_next(
            fit,
            drawn,
            planner,
            lambda estimate: float(np.log(planner.allocate(estimate, budget).parameters)),
            budget,
            run_sd=max(run_sd, 1e-4),
        )[:SHOWN]
        if "width" in table.columns
        else (),
        warnings=tuple(str(one.message) for one in caught),
    )


def figure_fit(analysis: Analysis) -> Figure:
    """Measured losses against tokens, one colour per run, and the law through them."""
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _equation(law: PowerLaw) -> str:
    terms = [
        f"{np.exp(c):.4g} / {variable.replace('_', ' ')}^{e:.4f}"
        for variable, c, e in zip(law.variables, law.log_coefficients, law.exponents, strict=True)
    ]
    return "L = " + " + ".join([f"{np.exp(law.log_floor):.4f}", *terms])


def _prescription(band: Band) -> list[list[str]]:
    best = band.best
    return [
        [
            "parameters",
            f"{best.parameters:.3g}",
            f"{band.parameters.low:.3g} to {band.parameters.high:.3g}",
        ],
        ["tokens", f"{best.tokens:.3g}", f"{band.tokens.low:.3g} to {band.tokens.high:.3g}"],
        [
            "tokens per parameter",
            f"{best.tokens_per_parameter:.3g}",
            f"{band.tokens_per_parameter.low:.3g} to {band.tokens_per_parameter.high:.3g}",
        ],
        ["width / depth", f"{best.aspect:.3g}", f"{band.aspect.low:.3g} to {band.aspect.high:.3g}"],
        [
            "loss (nats)",
            f"{best.loss_nats:.4f}",
            f"{band.loss_nats.low:.4f} to {band.loss_nats.high:.4f}",
        ],
    ]


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1f2328;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid #e5e7ea;white-space:nowrap}
code{background:#f4f5f6;padding:.1rem .3rem}svg{max-width:100%;height:auto}
.warn{border-left:3px solid #c2410c;padding-left:.8rem}
"""


def page(analysis: Analysis) -> str:
    """A self-contained HTML page."""
    fit, certificate = analysis.fit, analysis.fit.certificate
    table = fit.table
    with style():
        drawings = [svg(figure_fit(analysis)), svg(figure_residuals(analysis))]
    drawings = [drawing[drawing.index("<svg") :] for drawing in drawings]
    warned = "".join(f'<p class="warn">{html.escape(text)}</p>' for text in analysis.warnings)
    gaps = certificate.basins[1:]
    next_best = f"+{100 * gaps[0]:.3g} %" if gaps else "none"
    certified = [
        ["descents that agree", f"{certificate.agreeing} of {certificate.starts}"],
        ["distinct optima", str(len(certificate.basins))],
        ["next best optimum", next_best],
        ["gradient over objective", f"{certificate.relative_gradient:.1e}"],
        ["condition number", f"{certificate.condition:.3g}"],
        ["at a bound", ", ".join(certificate.at_bound) or "none"],
    ]
    match analysis.slope:
        case Interval() as interval:
            slopes = (
                f"<p>Compute-optimal size grows as C<sup>a</sup>, a = {fit.estimate.slope:.3f}, "
                f"95&nbsp;% over runs {html.escape(str(interval))}.</p>"
            )
        case NoInterval():
            slopes = ""
    near = _table(
        ["width", "depth", "parameters", "tokens", "expected loss"],
        [
            [
                f"{one.width:.0f}",
                f"{one.depth:.0f}",
                f"{one.parameters:.3g}",
                f"{one.tokens:.3g}",
                f"{one.loss_nats:.4f}",
            ]
            for one in analysis.near
        ],
    )
    suggested = _table(
        ["width", "depth", "tokens", "FLOPs", "narrows the prescription by"],
        [
            [
                f"{one.width:.0f}",
                f"{one.depth:.0f}",
                f"{one.tokens:.3g}",
                f"{one.budget:.2g}",
                f"{100 * one.shrinks:.0f} %",
            ]
            for one in analysis.suggestions
        ],
    )
    parts = [
        f"<h1>Scaling law of {html.escape(table.source)}</h1>",
        f"<p>{len(table)} rows of {len(set(table.run))} runs, SHA-256 "
        f"<code>{table.digest[:16]}</code>; "
        f"Huber threshold {fit.law.delta:g}; {len(analysis.draws.estimates)} draws over runs.</p>",
        warned,
        f"<h2>The law</h2><p><code>{html.escape(_equation(fit.estimate))}</code></p>",
        f"<p>R² {fit.score(table):.4f}; runs err by {100 * analysis.run_sd:.2f} % (standard "
        f"deviation over runs).</p>{slopes}{drawings[0]}",
        "<h2>Certificate</h2><p>Is this the global minimum, and is it sharp?</p>",
        _table(["", ""], certified),
        f"<h2>For {analysis.band.best.budget:.3g} FLOPs</h2>",
        _table(["", "best", "95 % over runs"], _prescription(analysis.band)),
        f"<p>The budget is {analysis.band.beyond_largest_run:.2g} times that of the largest "
        "run.</p>",
        f"<h2>Shapes that can be built, within {NEAR_NATS} nats</h2>{near}"
        if analysis.near
        else "",
        "<h2>What to run next</h2><p>Runs within the budget that narrow the optimal size most.</p>"
        f"{suggested}"
        if analysis.suggestions
        else "",
        f"<h2>Where the law misses</h2>{drawings[1]}",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Scaling law of {html.escape(table.source)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def write(path: Path, analysis: Analysis) -> None:
    """Write the page, whole."""
    write_text(path, page(analysis))
