"""Tables in a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from fourfold_mlperf_hpc.decomposition import OVERHEAD, TRAINING, Attempt, Factors, expected
from fourfold_mlperf_hpc.published import Submission
from fourfold_parallel.run.timeline import PARTS, PartName

if TYPE_CHECKING:
    from fourfold_mlperf_hpc.roofline import Roofline


def _table(*heads: str) -> Table:
    table = Table(box=None)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index == 0 else "right")
    return table


def shown_factors(
    sides: Mapping[str, Sequence[Attempt]], parts: Factors, interval: tuple[float, float] | None
) -> Group:
    """Two sets of attempts: their times by part, and the factors of their ratio.

    Args:
        sides: attempts by name; the first is what the ratio is of.
        parts: its factors.
        interval: 95 % of the factor of convergence over seeds, where there are seeds.
    """
    means = {name: expected(attempts) for name, attempts in sides.items()}
    times = _table("", *means)
    times.add_row("attempts", *(str(len(attempts)) for attempts in sides.values()))
    times.add_row(
        "missed", *(str(sum(not a.is_reached for a in attempts)) for attempts in sides.values())
    )
    times.add_row("samples to quality", *(f"{mean.samples:,.0f}" for mean in means.values()))
    times.add_row("samples/s in training", *(f"{m.samples_per_s:,.1f}" for m in means.values()))
    for part in PARTS:
        if any(mean.seconds.get(part) for mean in means.values()):
            seconds = (mean.seconds.get(part, 0.0) for mean in means.values())
            times.add_row(f"{part}, s", *(f"{s:,.2f}" for s in seconds))
    times.add_row("time to quality, s", *(f"{mean.elapsed_s:,.2f}" for mean in means.values()))
    ratios = _table("factor", "of the ratio", "95 % over seeds")
    told = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "one seed a side"
    ratios.add_row("convergence", f"{parts.convergence:.3f}", told)
    for name, factor, inner in (
        ("compute", parts.compute, TRAINING),
        ("overhead", parts.overhead, OVERHEAD),
    ):
        ratios.add_row(name, f"{factor:.3f}", "")
        for part in inner:
            if parts.by_part[part] != 1.0:
                ratios.add_row(f"  {part}", f"{parts.by_part[part]:.3f}", "")
    ratios.add_row("whole", f"{parts.whole:.3f}", "")
    return Group(times, "", ratios)


def shown_attempts(attempts: Sequence[Attempt]) -> Table:
    """Attempts from the fastest to the slowest."""
    table = _table("attempt", "samples", "s", "quality")
    ranked = sorted(attempts, key=lambda attempt: (not attempt.is_reached, attempt.elapsed_s))
    for number, attempt in enumerate(ranked, start=1):
        table.add_row(
            str(number), f"{attempt.samples:,.0f}", f"{attempt.elapsed_s:.2f}",
            "met" if attempt.is_reached else "missed",
        )  # fmt: skip
    return table


def shown_parts(seconds: Mapping[PartName, float]) -> Table:
    """Seconds by part, with their share of the whole."""
    table = _table("part", "seconds", "share")
    whole_s = sum(seconds.values())
    for part in PARTS:
        table.add_row(part, f"{seconds[part]:.2f}", f"{100 * seconds[part] / whole_s:.1f} %")
    return table


def shown_systems(submissions: Sequence[Submission]) -> Table:
    """Public systems: minutes by the rules, and what they are made of."""
    table = _table(
        "system", "benchmark", "batch", "score, min", "missed", "staging", "epochs", "epoch, min",
        "evaluation",
    )  # fmt: skip
    for submission in submissions:
        runs = submission.finished
        table.add_row(
            submission.title, submission.benchmark, f"{submission.batch:,}",
            f"{submission.score_min:.2f}", str(submission.misses or ""),
            f"{submission.mean_min([run.staging_s for run in runs]):.2f}",
            f"{statistics.fmean(run.epochs_begun for run in runs):.1f}",
            f"{submission.mean_min([run.epoch_s for run in runs]):.3f}",
            f"{submission.mean_min([run.evaluation_s for run in runs]):.1f}",
        )  # fmt: skip
    return table


def shown_roofline(line: Roofline) -> Group:
    """A step's demands, ceilings and bounds."""
    work, tops = line.work, line.ceilings
    table = _table("resource", "a step", "ceiling", "at least, ms")
    rows = {
        "arithmetic": (f"{work.flops / 1e9:.3f} GFLOP", f"{tops.flops_per_s / 1e9:.1f} GFLOP/s"),
        "memory": (f"{work.least_bytes / 1e6:.2f} MB", f"{tops.memory_bytes_per_s / 1e9:.2f} GB/s"),
        "network": (f"{work.wire_bytes / 1e6:.3f} MB", f"{tops.wire_bytes_per_s / 1e9:.2f} GB/s"),
        "files": (f"{work.io_bytes / 1e6:.3f} MB", f"{tops.cold_bytes_per_s / 1e9:.2f} GB/s"),
    }
    for name, seconds in line.bounds_s.items():
        table.add_row(name, *rows[name], f"{1000 * seconds:.3f}")
    return Group(
        f"{line.name} on {line.ranks} rank{'s' if line.ranks > 1 else ''}: a step takes "
        f"{1000 * line.step_s:.2f} ms",
        table,
        f"bound by {line.bound}, at {100 * line.efficiency:.0f} % of its ceiling; with nothing fused or "
        f"cached memory alone would take {1000 * line.unfused_s:.2f} ms",
    )
