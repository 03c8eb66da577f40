"""The runs of this package: functions that return complete, frozen values."""

from dataclasses import replace
from functools import cache
from typing import Literal

from fourfold_continual.forgetting import annealed, replayed, steps_for_equal_new
from fourfold_continual.held_out import Sampled
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.corpora import Corpus, PythonManual, PythonSource, Wikipedia
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.mixtures import Mixed
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Constant, Cosine, Phase, Phases
from fourfold_parallel.run.recipe import At, Run, Steps
from fourfold_parallel.run.tokenizers import SharedBytePairs
from fourfold_parallel.run.trained import Continued

Arm = Literal[
    "none",
    "r05",
    "r25",
    "only-old",
    "joint",
    "r05-longer",
    "r25-longer",
    "steady",
    "two-stage",
    "peak-1e-3",
    "peak-3e-4",
]
"""A continuation of the base by its replay (`none`, 5 %, 25 %, nothing but old text), and:

`joint`: no continuation, but one run from scratch with the rows of base and `r25` together, mixed throughout.
`r05-longer`, `r25-longer`: so many steps that they hold as much new text as `none`.
`two-stage`: 250 steps of `r25` at the peak, then 50 with a falling rate on text half of which is cleaner.
`steady`: the rates of `two-stage` on the text of `r25`, which tells the rates from the text.
`peak-1e-3`, `peak-3e-4`: `none`, re-warmed to a lower rate.
"""

SIZES: dict[str, Llama] = {
    "smoke": Llama(
        width=32, depth=1, heads=4, kv_heads=4, hidden=88, vocabulary=512, context=64, tied=True
    ),
    "small": Llama(
        width=96, depth=2, heads=4, kv_heads=4, hidden=264, vocabulary=1024, context=96, tied=True
    ),
    "large": Llama(
        width=168, depth=3, heads=4, kv_heads=4, hidden=462, vocabulary=1024, context=96, tied=True
    ),
}
"""0.03, 0.33 and 1.2 M parameters."""

SMALL_ARMS: tuple[Arm, ...] = (
    "none",
    "r25",
    "only-old",
    "r05",
    "joint",
    "two-stage",
    "steady",
    "peak-1e-3",
    "peak-3e-4",
    "r05-longer",
    "r25-longer",
)
SMOKE_ARMS: tuple[Arm, ...] = ("none", "r25", "only-old")
SEEDS = (1, 2, 3, 5)
"""Seed 0 was the pilot's, on which the rules were set; 4 was planned and not run."""
SMOKE_SEEDS = (1, 2, 3)

PEAK = 3e-3
REPLAY = {"none": 0.0, "r05": 0.05, "r25": 0.25, "only-old": 1.0}
"""Share of old text."""
SHOWN_AT = (50, 100, 150, 200, 250, 300)
"""Steps of a continuation after which every part is validated."""


@cache
def texts(scale: Scale) -> dict[str, Sampled]:
    """The texts of a study in one tokenizer's ids: Wikipedia is old, CPython's library new, its manual clean.

    At smoke scale the long articles and modules alone, and no clean text. That holds out its last twentieth,
    in which the docstrings of all held-out modules lie.
    """
    is_small = scale == "smoke"
    old: Corpus = Wikipedia(minimum_characters=60_000 if is_small else 1000)
    new: Corpus = PythonSource(minimum_characters=60_000 if is_small else 400)
    tokenizer = SharedBytePairs(corpora=(old, new), vocabulary=512 if is_small else 1024)

    def sampled(corpus: Corpus, held_out: float) -> Sampled:
        source = Packed(corpus=corpus, tokenizer=tokenizer, held_out=held_out)
        return Sampled(source=source, rows=24 if is_small else 96)

    read = {"old": sampled(old, 0.04), "new": sampled(new, 0.02)}
    return read if is_small else {**read, "clean": sampled(PythonManual(), 0.05)}


def base(size: str, seed: int, scale: Scale = "laptop") -> Run:
    """The model to begin from: 800 steps of 8 rows of 96 tokens of Wikipedia; code is validated on alone."""
    is_smoke = scale == "smoke"
    steps = 80 if is_smoke else 800
    return Run(
        name=f"{size}-base-seed{seed}",
        model=SIZES[size],
        data=replayed(texts(scale)["old"], texts(scale)["new"], replay=1.0),
        objective=NextToken(mask=KeepAll()),
        optimizer=_adamw(PEAK),
        schedule=Cosine(warmup_steps=20, floor=0.1),
        horizon=Steps(count=steps),
        batch=8,
        microbatch=8,
        sequence=64 if is_smoke else 96,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=seed,
        validate_every=At(steps=tuple(range(steps // 4, steps + 1, steps // 4))),
        checkpoint_every=steps // 2,
    )


def continued(size: str, arm: Arm, seed: int, scale: Scale = "laptop") -> Run:
    """An arm: 300 steps from the base's weights with a fresh optimizer, re-warmed to the base's peak.

    The old text goes on behind the rows that the base has read.
    """
    first = base(size, seed, scale)
    steps = 30 if scale == "smoke" else 300
    read = first.steps * first.batch
    sources = texts(scale)
    run = replace(
        first,
        name=f"{size}-{arm}-seed{seed}",
        model=Continued(parent=first, optimizer_state="fresh"),
        schedule=Cosine(warmup_steps=10, floor=0.1),
        horizon=Steps(count=steps),
        validate_every=At(steps=tuple(step for step in SHOWN_AT if step <= steps)),
        checkpoint_every=steps // 2,
    )

    def mixed(replay: float) -> Mixed:
        return replayed(sources["old"], sources["new"], replay=replay, first_old_row=read)

    def longer(replay: float) -> Run:
        count = steps_for_equal_new(steps, replay=replay)
        return replace(run, data=mixed(replay), horizon=Steps(count=count))

    falling = Phases(
        phases=(
            Phase(schedule=Constant(warmup_steps=10), steps=250),
            Phase(schedule=Cosine(warmup_steps=0, floor=0.1), steps=50),
        )
    )
    match arm:
        case "none" | "r05" | "r25" | "only-old":
            return replace(run, data=mixed(REPLAY[arm]))
        case "joint":
            return _joint(first, run, sources)
        case "r05-longer":
            return longer(0.05)
        case "r25-longer":
            return longer(0.25)
        case "steady":
            return replace(run, data=mixed(0.25), schedule=falling)
        case "two-stage":
            data = annealed(mixed(0.25), sources["clean"], share=0.375, steps=(250, 50))
            return replace(
                run, data=data, schedule=falling, validate_every=At(steps=(100, 200, 250, 300))
            )
        case "peak-1e-3":
            return replace(run, data=mixed(0.0), optimizer=_adamw(1e-3))
        case "peak-3e-4":
            return replace(run, data=mixed(0.0), optimizer=_adamw(3e-4))


def _joint(first: Run, run: Run, sources: dict[str, Sampled]) -> Run:
    """From scratch, for as many steps as base and continuation, with the rows of base and `r25` in all."""
    steps = first.steps + run.steps
    share = round((first.steps + 0.25 * run.steps) / steps, 6)
    return replace(
        run,
        model=first.model,
        data=replayed(sources["old"], sources["new"], replay=share),
        schedule=first.schedule,
        horizon=Steps(count=steps),
        validate_every=At(steps=(first.steps // 2, first.steps, steps)),
        checkpoint_every=first.checkpoint_every,
    )


def _adamw(learning_rate: float) -> AdamW:
    return AdamW(learning_rate=learning_rate, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8)
