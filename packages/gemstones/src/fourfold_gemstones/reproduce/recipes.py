"""The runs of this package: functions that return complete, frozen values."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fourfold_gemstones.architecture import Architecture
from fourfold_gemstones.published import digest
from fourfold_gemstones.reproduce.paper.analyses import PARTS, SLOW
from fourfold_gemstones.reproduce.paper.settings import Revisit
from fourfold_gemstones.reproduce.suite.analyses import SuiteLaws
from fourfold_gemstones.reproduce.suite.cooling import PAIRS, ROUNDS, Cooling
from fourfold_gemstones.reproduce.suite.train import Member, Suite, decoder, scaled_rate
from fourfold_parallel.run.corpora import Corpus, PythonSource, Wikipedia
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Constant
from fourfold_parallel.run.recipe import At, Run, Steps
from fourfold_parallel.run.tokenizers import BytePairs

BYTES = Architecture(vocabulary=257, context=128, head_width=16)
"""Bytes and an end token; heads an eighth of the paper's, for widths an eighth of the paper's."""
BASE_RATE = 0.7
"""Best of .25, .7 and 2 on 32x2, 32x8 and 96x2 alike, by a preflight of 120 steps."""
BATCH = 8
"""Rows of 128 bytes a step: small, because what is short at this scale is steps, not tokens."""
HELD_OUT = 0.0005
"""Share of the rows kept for validation: 32 of them, the same for every run."""
POINTS = 25
"""Validations of a run, in equal ratios from a twentieth of it to its end; the shortest, of 64 steps, have
a few less, since steps are whole."""
MOST_TOKENS = 229_376
"""Of the small shapes: fourteen a parameter for the smallest."""
MOST_FLOPS = 5e11
"""Of the large shapes, whose runs are shorter for it: minutes of two cores are what a laptop has."""

SHAPES = (
    ((64, 16), (128, 4), (256, 1)),
    ((64, 8), (128, 2)),
    ((64, 4), (96, 2), (128, 1)),
    ((32, 8), (64, 2), (48, 3)),
    ((32, 4), (64, 1), (32, 2)),
    ((16, 8), (32, 1), (16, 2)),
)
"""Widths and depths, a line each for some 1,050, 580, 300, 150, 75 and 25 thousand parameters."""
FIRST_SEED = 100
"""Of every run; the seeds below it belong to records that were discarded."""
FRESH_SEED = 200
"""Of the runs that judge claims whose rules changed after a record of the seeds below it."""
FORECAST = (((96, 4), MOST_TOKENS), ((128, 3), MOST_TOKENS), ((48, 3), 2 * MOST_TOKENS))
"""Shapes and tokens of runs that were forecast from the suite: two shapes and a length that it lacks."""
SEEDED = ((32, 4), (64, 1), (48, 3))
"""Shapes trained with three seeds: a wide and a deep one of one size, and a larger one."""
TWINNED = (*SEEDED, (64, 2), (32, 2), (16, 2))
"""Shapes that cooldowns fork from, and that have a twin at half the rate."""


def revisit(scale: Literal["smoke", "laptop"]) -> Revisit:
    """The published measurements revisited; smoke leaves slow parts out, searches and resamples little."""
    match scale:
        case "smoke":
            quick = tuple(name for name in PARTS if name not in SLOW)
            return Revisit(
                data_sha256=digest(),
                parts=quick,
                starts=8,
                draws=24,
                shaped_draws=20,
                suites=2,
                seed=0,
            )
        case "laptop":
            return Revisit(
                data_sha256=digest(),
                parts=tuple(PARTS),
                starts=24,
                draws=300,
                shaped_draws=100,
                suites=40,
                seed=0,
            )


def text(corpus: Corpus) -> Packed:
    """A corpus as bytes."""
    return Packed(
        corpus=corpus, tokenizer=BytePairs(vocabulary=BYTES.vocabulary), held_out=HELD_OUT
    )


def geometric(steps: int, points: int = POINTS) -> tuple[int, ...]:
    """Steps in equal ratios from a twentieth of the run to its end, rounded to whole ones."""
    return tuple(
        sorted({max(1, round(step)) for step in np.geomspace(0.05 * steps, steps, points).tolist()})
    )


def steps_of(width: int, depth: int, *, most_tokens: int, most_flops: float) -> int:
    """Steps of a shape: to a number of tokens, or to a number of FLOPs where that is less."""
    per_token = float(
        BYTES.flops_per_token(np.asarray([float(width)]), np.asarray([float(depth)]))[0]
    )
    return round(min(most_tokens, most_flops / per_token) / (BATCH * BYTES.context))


def member(
    width: int, depth: int, *, seed: int, steps: int, rate: float = 1.0, forks: tuple[int, ...] = ()
) -> Member:
    """One run of the suite: bytes of the Python standard library, 1,024 a step."""
    name = f"{width}x{depth}-seed{seed}" + ("" if rate == 1 else f"-rate{rate:g}")
    run = Run(
        name=name,
        model=decoder(width, depth, BYTES),
        data=text(PythonSource(minimum_characters=20_000)),
        objective=NextToken(mask=KeepAll()),
        optimizer=AdamW(
            learning_rate=rate * scaled_rate(BASE_RATE, width, depth),
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
        ),
        schedule=Constant(warmup_steps=min(10, max(2, steps // 10))),
        horizon=Steps(count=steps),
        batch=BATCH,
        microbatch=BATCH,
        sequence=BYTES.context,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=seed,
        validate_every=At(steps=geometric(steps)),
        checkpoint_every=steps,
    )
    return Member(run=run, rate=rate, forks=forks)


def suite_laws() -> SuiteLaws:
    """Laws fitted to the suite of the laptop scale."""
    return SuiteLaws(draws=200, shaped_draws=60, seed=0)


def cooling() -> Cooling:
    """Six shapes of three fresh seeds with two cooldowns each, three runs that were forecast, and speeds."""

    def forked(shape: tuple[int, int], seed: int) -> Member:
        steps = steps_of(*shape, most_tokens=MOST_TOKENS, most_flops=MOST_FLOPS)
        points = geometric(steps)
        return member(*shape, seed=seed, steps=steps, forks=(points[-13], points[-1]))

    return Cooling(
        members=tuple(
            forked(shape, FRESH_SEED + number) for shape in TWINNED for number in range(3)
        ),
        forecast=tuple(
            member(
                *shape,
                seed=FRESH_SEED + 3,
                steps=steps_of(*shape, most_tokens=tokens, most_flops=2 * MOST_FLOPS),
            )
            for shape, tokens in FORECAST
        ),
        timed=tuple(decoder(*shape, BYTES) for pair in PAIRS for shape in pair),
        architecture=BYTES,
        rounds=ROUNDS,
        seed=FRESH_SEED,
    )


def suite(scale: Literal["smoke", "laptop"]) -> Suite:
    """Seventeen shapes from 16 thousand to 1.1 million parameters, as the paper trains its 22.

    Laptop: up to 229 thousand bytes a run; six shapes with a twin at half the rate and with cooldowns
    from four points in equal ratios between a fifth of the run and its end; three shapes with three
    seeds. Smoke: the nine smallest, 8 thousand bytes, one seed, two twins; enough to run every line.
    """
    match scale:
        case "smoke":
            shapes = tuple(shape for group in SHAPES[3:] for shape in group)
            seeds, twinned = (FIRST_SEED,), TWINNED[:2]
            tokens, cooldowns, rounds = 8_192, slice(-1, None), 1
        case "laptop":
            shapes = tuple(shape for group in SHAPES for shape in group)
            seeds, twinned = (FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2), TWINNED
            tokens, cooldowns, rounds = MOST_TOKENS, slice(-13, None, 4), 5

    def runs(shape: tuple[int, int]) -> tuple[Member, ...]:
        steps = steps_of(*shape, most_tokens=tokens, most_flops=MOST_FLOPS)
        forks = geometric(steps)[cooldowns] if shape in twinned else ()
        members = [
            member(*shape, seed=seed, steps=steps, forks=forks)
            for seed in (seeds if shape in SEEDED else seeds[:1])
        ]
        if shape in twinned:
            members.append(member(*shape, seed=FIRST_SEED, steps=steps, rate=0.5))
        return tuple(members)

    return Suite(
        members=tuple(each for shape in shapes for each in runs(shape)),
        architecture=BYTES,
        second=text(Wikipedia()),
        rounds=rounds,
        seed=FIRST_SEED,
    )
