"""The runs of this package: functions that return complete, frozen values."""

from __future__ import annotations

from typing import Literal

from fourfold_gemstones.counting import Architecture
from fourfold_gemstones.revisit import QUICK, WHOLE, Revisit
from fourfold_gemstones.suite import Gem, Member, Suite, scaled_rate
from fourfold_parallel.run.corpora import PythonSource
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Constant
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import BytePairs

BYTES = Architecture(vocabulary=257, context=128, head_width=16)
"""Bytes and an end token; heads an eighth of the paper's, for widths an eighth of the paper's."""
BASE_RATE = 0.7
"""Best of .25, .7 and 2 on 32x2, 32x8 and 96x2 alike, by a preflight of 120 steps."""


def revisit(data_sha256: str, scale: Literal["smoke", "laptop"]) -> Revisit:
    """The published measurements revisited; smoke leaves the slow parts out and resamples little."""
    match scale:
        case "smoke":
            return Revisit(
                data_sha256=data_sha256, parts=QUICK, draws=24, shaped_draws=20, suites=2, seed=0
            )
        case "laptop":
            return Revisit(
                data_sha256=data_sha256,
                parts=WHOLE,
                draws=300,
                shaped_draws=100,
                suites=40,
                seed=0,
            )


def member(
    width: int, depth: int, *, seed: int, steps: int, forks: tuple[int, ...], rate: float = 1.0
) -> Member:
    """One run of the suite: bytes of the Python standard library, 2,048 a step."""
    name = f"{width}x{depth}-seed{seed}" + ("" if rate == 1 else f"-rate{rate:g}")
    run = Run(
        name=name,
        model=Gem(width=width, depth=depth, architecture=BYTES),
        data=Packed(
            corpus=PythonSource(minimum_characters=20_000),
            tokenizer=BytePairs(vocabulary=BYTES.vocabulary),
            held_out=0.003,
        ),
        objective=NextToken(mask=KeepAll()),
        optimizer=AdamW(
            learning_rate=rate * scaled_rate(BASE_RATE, width, depth),
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
        ),
        schedule=Constant(warmup_steps=max(2, steps // 40)),
        horizon=Steps(count=steps),
        batch=16,
        microbatch=16,
        sequence=BYTES.context,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=seed,
        validate_every=max(5, steps // 10),
        checkpoint_every=steps,
    )
    return Member(run=run, forks=forks)


def suite(scale: Literal["smoke", "laptop"]) -> Suite:
    """Nine shapes from 16 thousand to 150 thousand parameters, three of them with three seeds.

    Smoke: 15 steps and one seed, enough to run every line. Laptop: 250 steps, half a million bytes, cooldowns
    from the middle and the end of six shapes.
    """
    shapes = ((16, 2), (16, 8), (32, 1), (32, 2), (32, 4), (48, 3), (64, 1), (64, 2), (32, 8))
    seeded = ((16, 2), (32, 2), (64, 1))
    cooled = {*seeded, (32, 4), (48, 3), (64, 2)}
    match scale:
        case "smoke":
            steps, seeds, forks = 15, (), (15,)
        case "laptop":
            steps, seeds, forks = 250, (1, 2), (125, 250)
    members = [
        member(w, d, seed=0, steps=steps, forks=forks if (w, d) in cooled else ())
        for w, d in shapes
    ]
    members += [
        member(w, d, seed=seed, steps=steps, forks=forks) for w, d in seeded for seed in seeds
    ]
    return Suite(members=tuple(members), architecture=BYTES, seed=0)
