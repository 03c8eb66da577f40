"""The reproduction: bases, arms that go on from them, and what each forgot and gained."""

from collections.abc import Sequence
from functools import partial

from fourfold_continual.reproduce import claims
from fourfold_continual.reproduce.measures import headline, trade_table
from fourfold_continual.reproduce.paper import launches
from fourfold_continual.reproduce.recipes import (
    SEEDS,
    SMALL_ARMS,
    SMOKE_ARMS,
    SMOKE_SEEDS,
    Arm,
    base,
    continued,
    texts,
)
from fourfold_continual.reproduce.study import begin, go_on
from fourfold_parallel.reproduce.claims import claims_of
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage
from fourfold_parallel.reproduce.scale import Scale


def _family(size: str, arms: tuple[Arm, ...], seed: int, scale: Scale) -> list[Stage]:
    """A base and the arms that go on from it."""
    first = base(size, seed, scale)
    stages = [Stage(name=first.name, run=first, perform=partial(begin, first, texts(scale)))]
    for arm in arms:
        run = continued(size, arm, seed, scale)
        stages.append(
            Stage(
                name=run.name,
                run=run,
                perform=partial(go_on, run, texts(scale)),
                reads=() if arm == "joint" else (first.name,),
            )
        )
    return stages


def _stages(scale: Scale) -> list[Stage]:
    """Seed by seed, so that an interrupted study holds whole seeds."""
    match scale:
        case "smoke":
            plan = [("smoke", SMOKE_ARMS, seed) for seed in SMOKE_SEEDS]
        case "laptop":
            plan = [("small", SMALL_ARMS, seed) for seed in SEEDS]
        case "paper":
            plan = []
    return [stage for size, arms, seed in plan for stage in _family(size, arms, seed, scale)]


def _drawings(scale: Scale) -> Sequence[Drawing]:
    from fourfold_continual.reproduce import figures  # needs matplotlib, and nothing else does

    return figures.drawings(scale)


EXPERIMENT = Experiment(
    package="continual",
    title="Aurora-M's curriculum",
    paper="Nakamura, Mishra, Tedeschi and others: Aurora-M: Open Source Continual Pre-training for "
    "Multilingual Language and Code. COLING 2025 (industry track), arXiv 2404.00399",
    idea="Go on training a finished model with new text, keep a share of the old in the mix, and end on "
    "cleaner text: held-out rows of each say what was forgotten and what was gained.",
    headline=headline,
    picture="forgetting",
    claims=claims_of(claims),
    stages=_stages,
    drawings=_drawings,
    launches=launches,
    tables={"trade": trade_table},
)
