"""A ranking in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fourfold_parallel.common.axes import AXES
from fourfold_parallel.plan.job import Layout
from fourfold_parallel.plan.machine import GIB
from fourfold_parallel.plan.search import Plan, Ranking
from fourfold_parallel.planning.verify import Verified
from fourfold_parallel.reproduce.launches import Launch

COLUMNS = ("grid", "micro", "form", "s/step", "slower", "MFU", "HFU", "GiB", "waits", "mostly")


def say(text: str) -> None:
    """A line, as it is."""
    Console(highlight=False).print(text, soft_wrap=True, markup=False)


def show(ranking: Ranking, *, top: int, why_not: Sequence[Layout]) -> None:
    """The table of the best grids, how firm the first place is, and the grids asked about."""
    best = ranking.best
    say(
        f"{ranking.job.model.name} on {ranking.ranks} {ranking.machine.name} devices: {best.layout}\n"
        f"{best.seconds:.4g} s a step, {best.tokens_per_s:,.0f} tokens a second\n"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in COLUMNS:
        table.add_column(
            name, justify="left" if name in ("form", "mostly") else "right", no_wrap=True
        )
    for plan in ranking.grids[:top]:
        table.add_row(*_cells(plan, best))
    Console(highlight=False).print(table)
    for sentence in ranking.sensitivities():
        say(sentence)
    if unmodelled := ranking.job.model.unmodelled:
        say(f"Not in these times: what {', '.join(unmodelled)} does beside its matrices.")
    for layout in why_not:
        say(f"Why not {ranking.why_not(layout)}.")
    say(
        f"{len(ranking.grids)} grids simulated, {len(ranking.refusals)} cannot run. Grid and waits: data, "
        "depth, row, col. Form: r recomputes, s sequence form, z ZeRO-1, k keeps tiles, e exchanges."
    )


def _cells(plan: Plan, best: Plan) -> tuple[str, ...]:
    layout, step = plan.layout, plan.step
    return (
        "·".join(str(layout.size(axis)) for axis in AXES),
        str(layout.microbatch),
        layout.marks,
        f"{plan.seconds:.4g}",
        f"{plan.seconds / best.seconds - 1:.1%}",
        f"{plan.mfu:.1%}",
        f"{plan.hfu:.1%}",
        f"{plan.memory.peak / GIB:.1f}",
        " ".join(f"{step.exposed_s[axis] / plan.seconds:.0%}" for axis in AXES),
        step.bound.removesuffix(" exposed"),
    )


def show_launch(ranking: Ranking) -> None:
    """The engine of a recipe, and how to start it."""
    layout, machine = ranking.best.layout, ranking.machine
    sizes = ", ".join(f"{axis}={layout.size(axis)}" for axis in AXES)
    switches = "".join(
        f", {name}=True"
        for name in ("recomputes", "cuts_tokens", "shards_optimizer", "keeps_tiles")
        if getattr(layout, name)
    ) + (f", experts={layout.experts!r}" * (layout.experts == "exchanged"))
    per_node = min(machine.devices_per_node, ranking.ranks)
    launch = Launch(
        name=f"plan-{ranking.ranks}",
        title=f"{ranking.job.model.name} on {ranking.ranks} devices: {layout}",
        needs=f"{ranking.ranks} {machine.name} devices; train.py, which calls fourfold_parallel.train",
        command="train.py",
        nodes=-(-ranking.ranks // per_node),
        gpus=per_node,
        hours=24,
    )
    say(f"\nengine=Fourfold({sizes}{switches}), microbatch={layout.microbatch * layout.shares}\n")
    say(launch.torchrun)
    say(f"\n{launch.sbatch}")


def show_verified(rows: Sequence[Verified]) -> None:
    """Predicted and measured seconds, side by side."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("grid", "predicted s", "measured s", "error"):
        table.add_column(name, justify="left" if name == "grid" else "right")
    for row in rows:
        table.add_row(
            str(row.layout), f"{row.predicted_s:.4g}", f"{row.measured_s:.4g}", f"{row.error:+.1%}"
        )
    Console(highlight=False).print(table)
