"""A certificate as a page: the verdict, how near each grid is, from grid to grid, and what was run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from fourfold_parallel.certify.certificate import Certificate, named
from fourfold_parallel.certify.compare import COARSER, EXACT, QUANTITIES, GridOutcome
from fourfold_parallel.certify.terminal import messages, numbers
from fourfold_parallel.common.files import write_text
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD, SHADES, style, svg
from fourfold_parallel.reproduce.page import inline, render
from fourfold_parallel.testing.grids import Sizes

TEMPLATE = Path(__file__).with_name("certificate.html.jinja")
COLOURS = dict(zip(QUANTITIES, (BASELINE, CONTROL, METHOD, SHADES[4]), strict=True))
ROUNDING = 1e-17
"""What is drawn of no difference at all."""


def write_page(certificate: Certificate, path: Path) -> None:
    """Write the page."""
    with style():
        drawn = {
            dtype: inline(
                svg(differences(by_grid, certificate.own() if dtype != "float64" else {})),
                prefix=f"{dtype}-",
            )
            for dtype, by_grid in certificate.grids.items()
            if any(outcome.differences for outcome in by_grid.values())
        }
    blocks = {name: None for outcome in certificate.outcomes for name in outcome.whole}
    page = render(
        TEMPLATE,
        certificate=certificate,
        drawn=drawn,
        named=named,
        numbers=numbers,
        messages=messages(certificate),
        quantities=QUANTITIES,
        blocks=[*blocks],
        exact=EXACT,
        coarser=COARSER,
        toy=json.dumps(certificate.toy, indent=1),
    )
    write_text(path, page)


def differences(by_grid: Mapping[Sizes, GridOutcome], own: Mapping[str, float]) -> Figure:
    """A dot for each quantity of each grid, on a logarithmic axis, and what it may be at most."""
    figure = Figure(figsize=(9.6, 1.1 + 0.24 * len(by_grid)))
    axes = figure.subplots()
    names = [named(sizes) for sizes in by_grid]
    for index, quantity in enumerate(QUANTITIES):
        rows = [row for row, o in enumerate(by_grid.values()) if quantity in o.differences]
        values = [o.differences[quantity] for o in by_grid.values() if quantity in o.differences]
        axes.scatter(
            [max(value, ROUNDING) for value in values], [row + 0.12 * (index - 1.5) for row in rows],
            color=COLOURS[quantity], s=22, label=quantity, zorder=3,
        )  # fmt: skip
        if quantity in own:
            axes.axvline(
                max(own[quantity], ROUNDING), color=COLOURS[quantity], linewidth=1, dashes=(2, 2)
            )
    if not own:
        axes.axvline(EXACT, color=IDEAL, linewidth=1, linestyle="dashed", label="allowed")
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("relative difference" + (" (dashed: one process)" if own else ""))
    figure.legend(loc="outside upper left", ncols=5, fontsize=8)
    return figure
