"""A plan as a page: the winner, why it wins, its grid, its step, its memory, and the runners-up."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from fourfold_parallel.common.files import write_text
from fourfold_parallel.plan.machine import GIB
from fourfold_parallel.plan.search import Ranking
from fourfold_parallel.plan.simulate import simulate
from fourfold_parallel.planning import figures
from fourfold_parallel.reproduce.figures import style, svg
from fourfold_parallel.reproduce.page import inline, render

SHOWN = 12
TEMPLATE = Path(__file__).with_name("plan.html.jinja")


def write_page(ranking: Ranking, path: Path) -> None:
    """Write the page of a ranking that has a plan."""
    best, machine = ranking.best, ranking.machine
    limit = machine.memory_bytes * (1 - machine.memory_slack)
    detailed = simulate(ranking.job, best.layout, machine, records=True)
    with style():
        drawings = {
            "ranking": figures.ranking(ranking.grids[:SHOWN]),
            "grid": figures.grid(best.layout),
            "timeline": figures.timeline(detailed.spans),
            "volume": figures.volume(best),
            "memory": figures.memory(best, limit),
        }
        drawn: dict[str, Markup] = {
            name: inline(svg(figure), prefix=f"{name}-") for name, figure in drawings.items()
        }
    page = render(
        TEMPLATE,
        ranking=ranking,
        best=best,
        job=ranking.job,
        machine=machine,
        gib=GIB,
        drawn=drawn,
        shown=ranking.grids[:SHOWN],
        sensitivities=list(ranking.sensitivities()),
        refusals=ranking.refusals[:40],
    )
    write_text(path, page)
