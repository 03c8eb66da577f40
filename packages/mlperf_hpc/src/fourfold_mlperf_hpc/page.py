"""Pages: a decomposition with its waterfall, and a roofline with its chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fourfold_mlperf_hpc import charts
from fourfold_mlperf_hpc.decomposition import OVERHEAD, TRAINING, Attempt, Factors, expected
from fourfold_mlperf_hpc.roofline import Roofline
from fourfold_parallel.common.files import write_text
from fourfold_parallel.reproduce.figures import SHADES, style, svg
from fourfold_parallel.reproduce.page import inline, render
from fourfold_parallel.run.timeline import PARTS

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_factors(
    sides: Mapping[str, Sequence[Attempt]],
    parts: Factors,
    interval: tuple[float, float] | None,
    path: Path,
) -> None:
    """Write the page of a ratio of two times to quality."""
    means = {name: expected(attempts) for name, attempts in sides.items()}
    named = {"convergence": parts.convergence, "compute": parts.compute, "overhead": parts.overhead}
    with style():
        drawn = [
            ("Factors of the ratio of the times", svg(_waterfall(parts))),
            ("Seconds to quality by part", svg(_seconds(means))),
        ]
    rows = [[name, f"{factor:.3f}"] for name, factor in named.items()]
    if interval:
        rows[0][1] += f" [{interval[0]:.3f}, {interval[1]:.3f}] over seeds"
    rows += [[f"of which {part}", f"{x:.3f}"] for part, x in parts.by_part.items() if x != 1.0]
    rows.append(["whole", f"{parts.whole:.3f}"])
    a, b = means
    _write(
        path,
        title=f"{parts.whole:.2f} times from {a} to {b}",
        lead="Time to quality, taken apart: factors above 1 speak for the second, and multiply to the whole.",
        drawn=drawn,
        rows=rows,
    )


def write_roofline(line: Roofline, path: Path) -> None:
    """Write the page of a step's roofline."""
    work, tops = line.work, line.ceilings
    name = f"{line.name}, {line.ranks} rank{'s' if line.ranks > 1 else ''}"
    with style():
        figure = Figure(figsize=(8.4, 3.4))
        left, right = figure.subplots(1, 2)
        charts.roofline(
            left, flops_per_s=tops.flops_per_s, bytes_per_s=tops.memory_bytes_per_s,
            points=[
                (name, work.flops / work.most_bytes, work.flops / work.least_bytes, work.flops / line.step_s)
            ],
        )  # fmt: skip
        charts.bounds(right, [(name, {**line.bounds_s}, line.step_s)])
        drawn = [("The step under its roofs, and the least time of each resource", svg(figure))]
    rows = [
        [f"{resource}, at least", f"{1000 * s:.3f} ms"] for resource, s in line.bounds_s.items()
    ]
    rows += [
        ["measured step", f"{1000 * line.step_s:.3f} ms"],
        ["best product", f"{tops.flops_per_s / 1e9:.1f} GFLOP/s"],
        ["triad", f"{tops.memory_bytes_per_s / 1e9:.2f} GB/s"],
        ["all-reduce of 64 MB", f"{tops.wire_bytes_per_s / 1e9:.2f} GB/s"],
        ["file, cold", f"{tops.cold_bytes_per_s / 1e9:.2f} GB/s"],
        ["file, warm", f"{tops.warm_bytes_per_s / 1e9:.2f} GB/s"],
    ]  # fmt: skip
    _write(
        path,
        title=f"{name}: bound by {line.bound}",
        lead=f"{100 * line.efficiency:.0f} % of its ceiling. Work is counted, ceilings measured beside it.",
        drawn=drawn,
        rows=rows,
    )


def _waterfall(parts: Factors) -> Figure:
    figure = Figure(figsize=(6.4, 3.4))
    steps = [("convergence", parts.convergence, charts.GROUPS["convergence"])]
    for group, inner in (("compute", TRAINING), ("overhead", OVERHEAD)):
        steps += [
            (part, parts.by_part[part], charts.GROUPS[group])
            for part in inner
            if parts.by_part[part] != 1.0
        ]
    charts.waterfall(figure.subplots(), steps, title="Factors, above 1 for the second")
    return figure


def _seconds(means: Mapping[str, Attempt]) -> Figure:
    figure = Figure(figsize=(6.4, 0.9 + 0.5 * len(means)))
    axes = figure.subplots()
    left = [0.0] * len(means)
    for index, part in enumerate(PARTS):
        widths = [mean.seconds.get(part, 0.0) for mean in means.values()]
        if max(widths) > 0:
            axes.barh([*means], widths, left=left, color=SHADES[index % len(SHADES)], label=part)
            left = [at + width for at, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds to quality")
    figure.legend(loc="outside upper left", ncols=4, fontsize=8)
    return figure


def _write(
    path: Path,
    *,
    title: str,
    lead: str,
    drawn: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
) -> None:
    drawings = [(caption, inline(text, prefix=f"d{i}-")) for i, (caption, text) in enumerate(drawn)]
    write_text(path, render(TEMPLATE, title=title, lead=lead, drawings=drawings, rows=rows))
