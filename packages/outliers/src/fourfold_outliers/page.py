"""The report as a page: the finding, where the outliers are, what they carry, and what they are worth."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from fourfold_outliers.charts import bars, heat, stack
from fourfold_outliers.report import Report
from fourfold_parallel.common.files import write_text
from fourfold_parallel.reproduce.figures import CONTROL, METHOD, style, svg
from fourfold_parallel.reproduce.page import inline, render

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    with style():
        drawn = {
            "strip": inline(svg(strip(report)), prefix="strip-"),
            "cosine": inline(svg(cosine(report)), prefix="cosine-"),
            "worth": inline(svg(worth(report)), prefix="worth-") if report.outliers else "",
        }
    write_text(path, render(TEMPLATE, report=report, drawn=drawn))


def strip(report: Report) -> Figure:
    """Heat of every coordinate that is an outlier somewhere, those of most layers first."""
    rows = {
        name: [layer.shares[name] for layer in report.layers] for name in report.layers[0].shares
    }
    ordered = dict(sorted(rows.items(), key=lambda item: -sum(item[1]))[:16])
    figure = Figure(figsize=(8.2, 1.3 + 0.26 * max(1, len(ordered))))
    axes = figure.subplots()
    if ordered:
        heat(axes, ordered)
    else:
        axes.set_axis_off()
    return figure


def cosine(report: Report) -> Figure:
    """Anisotropy by layer."""
    figure = Figure(figsize=(8.2, 3.4))
    stack(
        figure.subplots(),
        {str(d): [layer.contributions[str(d)] for layer in report.layers] for d in report.outliers},
        [layer.cosine for layer in report.layers],
        [layer.without for layer in report.layers],
    )
    return figure


def worth(report: Report) -> Figure:
    """Loss rises: the outliers together and alone, and random sets."""
    rows = [
        *((", ".join(map(str, each.coordinates)), each.rise, METHOD) for each in report.effects),
        *(
            (f"random: {', '.join(map(str, each.coordinates))}", each.rise, CONTROL)
            for each in report.random
        ),
    ]
    figure = Figure(figsize=(8.2, 1.1 + 0.27 * len(rows)))
    bars(figure.subplots(), rows)
    return figure
