"""The runs of this package: functions that return complete, frozen values."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, cast

from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.corpora import PythonSource
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import DDP, Single
from fourfold_parallel.run.models import Llama, Model
from fourfold_parallel.run.objective import KeepAll, NextToken, Objective
from fourfold_parallel.run.optimizer import AdamW, Constant, Cosine
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import BytePairs
from fourfold_parallel.run.trained import TrainedBy
from fourfold_recurrent_depth.analysis.flops import Costs
from fourfold_recurrent_depth.reproduce.measurements import Exam
from fourfold_recurrent_depth.reproduce.models import Recurrent, dense_costs
from fourfold_recurrent_depth.reproduce.tasks.addition import BASE, Digits, Sums
from fourfold_recurrent_depth.reproduce.tasks.automaton import Automaton, EvolvedCells
from fourfold_recurrent_depth.training.ellis import Ellis
from fourfold_recurrent_depth.training.every_exit import EveryExit
from fourfold_recurrent_depth.training.models import RecurrentDepth
from fourfold_recurrent_depth.training.random_depth import (
    Always,
    LogNormalPoisson,
    RandomDepth,
    Recurrences,
    Supervision,
)

DepthArm = Literal["law", "fixed", "averaged"]
"""The choice of depth in training: by the paper's law; always the mean; or always the mean, with the loss
averaged over the predictions after each recurrence."""

Arm = DepthArm | Literal["shallow", "untied"]
"""Besides, always 1; or no recurrence.

The untied twin has as many blocks as the mean has recurrences, each with weights of its own, and runs
through them once: the same FLOPs in a pass, eight times the parameters.
"""

DrawArm = Literal["last 1", "last 2", "last 4", "all", "per row"]
"""Recurrences that carry gradient, with one draw for all rows; or the last 4, with one for each."""

RetrofitArm = Literal["dense", "constant", "curriculum", "fresh"]
"""Ways to train a dense model on: as it is, or recurrent by the law, at once or from depth 1 on.

The last is of the recurrent shape with fresh weights.
"""

SEEDS = (0, 1, 2)
CELLS_SEEDS = (50, 51, 52)
"""Of the automaton study: 0 to 5 and 13 to 15 trained earlier recipes, 40 to 45 piloted this one."""
MEAN = 4
"""Mean recurrences of the small models, in training and in evaluation, but for the automaton study's."""
CELLS_MEAN = 8
"""The automaton study's own: so many that one recurrence is hardly ever drawn in training."""
BACKPROP = 4
"""Recurrences that carry gradient, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Automaton runs and the exam that all of them sit."""

    members: tuple[tuple[Arm, Run], ...]
    exam: Exam
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Automaton runs that differ in how depth is drawn and how far gradients go."""

    members: tuple[tuple[DrawArm, Run], ...]
    exam: Exam
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Additions:
    """Addition runs, and on how many held-out rows they are examined."""

    members: tuple[tuple[DepthArm, Run], ...]
    rows: int
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Language-model runs on bytes and how the texts of those of random depth are continued."""

    members: tuple[tuple[DepthArm, Run], ...]
    rows: int
    """Held-out rows that are decoded."""
    read: int
    """Held-out rows of which the loss is taken at every depth."""
    prompt: int
    """Tokens of each that are given; the rest is decoded with teacher forcing."""
    generated: int
    """Tokens generated freely after the prompt."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrofits:
    """Dense models, and runs of equal FLOPs that go on from them."""

    members: tuple[tuple[RetrofitArm, Run], ...]
    rows: int
    """Held-out rows of the exam."""
    seed: int = 0


WorthArm = Literal["looped", "truncated", "untied"]
"""All gradients, those of the last 2 recurrences, or blocks of its own in the place of each recurrence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """Language models over width, recurrences and tokens, which the law of a recurrence is fitted to."""

    members: tuple[tuple[WorthArm, Run], ...]
    rows: int
    """Held-out rows of the exam."""
    depths: tuple[int, ...]
    """Recurrences at which every model is read."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Things that need no training: counts, sizes, equalities."""

    generated: int
    seed: int = 0


def depth_objectives(supervision: Supervision, *, mean: int) -> dict[DepthArm, Objective]:
    """The ways to train for `mean` recurrences, of which the first two carry gradient through the last 4."""
    laws: dict[DepthArm, Recurrences] = {
        "law": LogNormalPoisson(mean=mean, backprop=BACKPROP),
        "fixed": Always(recurrences=mean, backprop=BACKPROP),
    }
    made: dict[DepthArm, Objective] = {
        arm: RandomDepth(recurrences=law, supervision=supervision) for arm, law in laws.items()
    }
    return {**made, "averaged": EveryExit(recurrences=mean, supervision=supervision)}


def automaton_run(
    arm: Arm,
    seed: int,
    *,
    hardest: int,
    cells: int,
    steps: int,
    mean: int = MEAN,
    batch: int = 48,
    width: int = 64,
    heads: int = 4,
    rate: float = 3e-3,
) -> Run:
    """One automaton model: a core of one block, no prelude and no coda, so that depth is recurrence.

    With a prelude and a coda a small model solves the small k without recurring. With three heads a block
    sees as many cells as one step of the automaton reads.
    """
    at_once = RandomDepth(recurrences=Always(recurrences=1, backprop=1), supervision=EvolvedCells())
    by_depth = depth_objectives(EvolvedCells(), mean=mean)
    objectives: dict[Arm, Objective] = {"shallow": at_once, "untied": at_once, **by_depth}
    return Run(
        name=f"automaton-{arm}-seed{seed}",
        model=RecurrentDepth(
            width=width,
            heads=heads,
            prelude=0,
            core=mean if arm == "untied" else 1,
            coda=0,
            hidden=width * 11 // 4,
            vocabulary=2 * hardest,
            context=cells,
            mean_recurrence=mean,
            mean_backprop=BACKPROP,
        ),
        data=Automaton(hardest=hardest, rows=batch * steps, ramp=batch * steps * 3 // 8),
        objective=objectives[arm],
        optimizer=AdamW(learning_rate=rate, weight_decay=0.01, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Cosine(warmup_steps=min(50, steps // 4), floor=0.05),
        horizon=Steps(count=steps),
        batch=batch,
        microbatch=batch,
        sequence=cells,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=seed,
        validate_every=steps,
        checkpoint_every=max(1, steps // 10),
    )


def cells(scale: Literal["smoke", "laptop"]) -> Cells:
    """The automaton study (C1 to C4, C10, C11, C19 to C21, D1 to D4).

    Smoke: one short run per arm, enough to run every line. Laptop: three seeds, and one of the untied twin.
    """
    match scale:
        case "smoke":
            hardest, length, steps, seeds, rows = 2, 12, 30, CELLS_SEEDS[:1], 8
            arms: tuple[Arm, ...] = ("law", "shallow")
        case "laptop":
            hardest, length, steps, seeds, rows = 3, 24, 4000, CELLS_SEEDS, 64
            arms = ("law", "fixed", "averaged", "shallow")
    named: list[tuple[Arm, int]] = [(arm, seed) for arm in arms for seed in seeds]
    if scale == "laptop":
        named.append(("untied", seeds[0]))
    shape: dict[str, Any] = {
        "hardest": hardest, "cells": length, "steps": steps, "mean": CELLS_MEAN, "batch": 32, "width": 96,
        "heads": 3, "rate": 2e-3,
    }  # fmt: skip
    members: tuple[tuple[Arm, Run], ...] = tuple(
        (arm, automaton_run(arm, seed, **shape)) for arm, seed in named
    )
    return Cells(members=members, exam=Exam(hardest=hardest, cells=length, rows=rows))


def draws(scale: Literal["laptop"]) -> Draws:  # noqa: ARG001 - one scale has it so far
    """The study of draws and of truncated backpropagation (C8, C9), three seeds of their own."""
    law = LogNormalPoisson(mean=MEAN, backprop=MEAN)
    last: dict[DrawArm, int] = {"last 1": 1, "last 2": 2, "last 4": 4, "all": 10_000}
    objectives: dict[DrawArm, RandomDepth] = {
        arm: RandomDepth(recurrences=replace(law, backprop=backprop), supervision=EvolvedCells())
        for arm, backprop in last.items()
    }
    objectives["per row"] = RandomDepth(recurrences=law, supervision=EvolvedCells(), per="row")
    steps, batch, length = 420, 32, 12
    members: list[tuple[DrawArm, Run]] = []
    for arm, objective in objectives.items():
        for seed in (10, 11, 12):
            run = automaton_run("law", seed, hardest=2, cells=length, steps=steps)
            data = Automaton(hardest=2, rows=batch * steps, ramp=batch * steps * 3 // 8)
            name = f"draws-{arm.replace(' ', '-')}-seed{seed}"
            run = replace(run, name=name, objective=objective, data=data, batch=batch)
            members.append((arm, replace(run, microbatch=batch, checkpoint_every=steps)))
    return Draws(members=tuple(members), exam=Exam(hardest=2, cells=length, rows=128))


def additions(scale: Literal["laptop"]) -> Additions:  # noqa: ARG001 - one scale has it so far
    """The study of additions (C22, D1 to D4), three seeds of their own."""
    steps, batch, operands = 800, 64, 6
    members: list[tuple[DepthArm, Run]] = []
    for arm, objective in depth_objectives(Sums(), mean=MEAN).items():
        for seed in (10, 11, 12):
            run = automaton_run(arm, seed, hardest=BASE // 2, cells=operands, steps=steps)
            rate = replace(cast(AdamW, run.optimizer), learning_rate=4e-3)
            name = f"addition-{arm}-seed{seed}"
            run = replace(run, name=name, objective=objective, optimizer=rate)
            run = replace(run, data=Digits(rows=batch * steps), batch=batch, microbatch=batch)
            members.append((arm, replace(run, checkpoint_every=steps)))
    return Additions(members=tuple(members), rows=512)


def language_run(seed: int, *, steps: int) -> Run:
    """A byte-level language model of the Python standard library: one block each, iterated 4 times."""
    return Run(
        name=f"bytes-seed{seed}",
        model=RecurrentDepth(
            width=64,
            heads=4,
            prelude=1,
            core=1,
            coda=1,
            hidden=176,
            vocabulary=257,
            context=192,
            mean_recurrence=MEAN,
            mean_backprop=MEAN,
        ),
        data=Packed(
            corpus=PythonSource(minimum_characters=20_000),
            tokenizer=BytePairs(vocabulary=257),
            held_out=0.003,
        ),
        objective=RandomDepth(
            recurrences=LogNormalPoisson(mean=MEAN, backprop=MEAN),
            supervision=NextToken(mask=KeepAll()),
        ),
        optimizer=AdamW(learning_rate=4e-3, weight_decay=0.05, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Cosine(warmup_steps=min(20, steps // 4), floor=0.05),
        horizon=Steps(count=steps),
        batch=16,
        microbatch=16,
        sequence=64,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=seed,
        validate_every=steps * 1000,
        checkpoint_every=steps,
    )


def language(scale: Literal["laptop"]) -> Bytes:  # noqa: ARG001 - one scale has it so far
    """The language study (C12, C13, C15, C16, D1 to D4, K1), three seeds."""
    members: list[tuple[DepthArm, Run]] = []
    for arm, objective in depth_objectives(NextToken(mask=KeepAll()), mean=MEAN).items():
        for seed in SEEDS:
            run = language_run(seed, steps=300)
            members.append((arm, replace(run, name=f"bytes-{arm}-seed{seed}", objective=objective)))
    return Bytes(members=tuple(members), rows=8, read=256, prompt=32, generated=48)


def dense_run(seed: int, *, steps: int) -> Run:
    """The dense model that is made recurrent: six blocks, bytes of the Python standard library."""
    recurrent = language_run(seed, steps=steps)
    model = Llama(
        width=64, depth=6, heads=4, kv_heads=4, hidden=176, vocabulary=257, context=192, tied=False
    )
    plain = NextToken(mask=KeepAll())
    return replace(recurrent, name=f"dense-seed{seed}", model=model, objective=plain)


def retrofits(scale: Literal["laptop"]) -> Retrofits:  # noqa: ARG001 - one scale has it so far
    """The study of retrofitting (C23), three seeds: two layers read, two think, two speak.

    Each arm spends the FLOPs of 400 steps at a constant mean. The curriculum raises the mean from 1 over
    three quarters of its steps, of which it can afford more.
    """
    reference = 400
    law = LogNormalPoisson(mean=MEAN, backprop=MEAN)
    keep = NextToken(mask=KeepAll())
    members: list[tuple[RetrofitArm, Run]] = []
    for seed in (20, 21, 22):
        dense = TrainedBy(run=dense_run(seed + 100, steps=600))
        recurrent = Recurrent(dense=dense, prelude=2, core=2, coda=2)
        price = recurrent.costs(context=64)
        budget = _training_flops(price, law, reference)
        longer = round(budget / dense_costs(dense, context=64).training(0, 0))
        risen = _curriculum_within(price, law, budget)
        at_once = RandomDepth(recurrences=law, supervision=keep)
        arms: dict[RetrofitArm, tuple[int, Model, Objective]] = {
            "dense": (longer, dense, keep),
            "constant": (reference, recurrent, at_once),
            "curriculum": (risen.ramp * 4 // 3, recurrent, replace(at_once, recurrences=risen)),
            "fresh": (reference, replace(recurrent, fresh=True), at_once),
        }
        for arm, (count, model, objective) in arms.items():
            run = language_run(seed, steps=count)
            rate = replace(cast(AdamW, run.optimizer), learning_rate=2e-3)
            run = replace(run, name=f"retrofit-{arm}-seed{seed}", model=model, objective=objective)
            members.append((arm, replace(run, optimizer=rate)))
    return Retrofits(members=tuple(members), rows=256)


def flops_of(arm: RetrofitArm, run: Run) -> float:
    """FLOPs of a run of that study."""
    if arm == "dense":
        price = dense_costs(cast(TrainedBy, run.model), context=run.sequence)
        return run.steps * run.tokens_per_step * price.training(0, 0)
    price = cast(Recurrent, run.model).costs(context=run.sequence)
    recurrences = cast(RandomDepth, run.objective).recurrences
    return run.tokens_per_step * _training_flops(price, recurrences, run.steps)


def _training_flops(price: Costs, recurrences: Recurrences, steps: int) -> float:
    """Per token of a batch, over so many steps."""
    return sum(price.training(*recurrences.draw(number)) for number in range(steps))


def _curriculum_within(price: Costs, law: LogNormalPoisson, budget: float) -> LogNormalPoisson:
    """The longest curriculum, rising over 3 of each 4 steps, that the budget pays for."""

    def spent(quarter: int) -> float:
        return _training_flops(price, replace(law, ramp=3 * quarter), 4 * quarter)

    quarters = range(1, 1000)
    return replace(law, ramp=3 * quarters[bisect_right(quarters, budget, key=spent) - 1])


def worth_run(
    arm: WorthArm, *, width: int, loops: int, steps: int, prelude: int = 1, core: int = 2
) -> Run:
    """One model of the suite: a block before and one behind, a core of two, always the same recurrences."""
    run = language_run(30, steps=steps)
    untied = arm == "untied"
    recurrences = 1 if untied else loops
    backprop = min(2, loops) if arm == "truncated" else recurrences
    model = replace(
        cast(RecurrentDepth, run.model),
        width=width,
        prelude=prelude,
        core=core * loops if untied else core,
        hidden=width * 11 // 4,
        mean_recurrence=recurrences,
        mean_backprop=recurrences,
    )
    objective = RandomDepth(
        recurrences=Always(recurrences=recurrences, backprop=backprop),
        supervision=NextToken(mask=KeepAll()),
    )
    rate = replace(cast(AdamW, run.optimizer), learning_rate=4e-3 * (64 / width) ** 0.5)
    name = f"worth-{arm}-w{width}-r{loops}-s{steps}"
    return replace(run, name=name, model=model, objective=objective, optimizer=rate)


def worth(scale: Literal["laptop"]) -> Worth:  # noqa: ARG001 - one scale has it so far
    """The suite of the iso-depth law (W1 to W5): 48 models, 24 with truncated gradients, 6 untied."""
    widths, loops, lengths = (24, 32, 48, 64), (1, 2, 4, 8), (150, 300, 600)
    shapes: dict[WorthArm, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
        "looped": (widths, loops, lengths),
        "truncated": (widths, loops[2:], lengths),
        "untied": ((48, 64), loops[1:], (300,)),
    }
    members: list[tuple[WorthArm, Run]] = []
    for arm, axes in shapes.items():
        for width, r, steps in product(*axes):
            members.append((arm, worth_run(arm, width=width, loops=r, steps=steps)))
    return Worth(members=tuple(members), rows=256, depths=loops)


def exact(scale: Literal["smoke", "laptop"]) -> Exact:
    """Counts, sizes and equalities on random weights (C6, C9's memory, C15's exactness)."""
    return Exact(generated=12 if scale == "smoke" else 24)


def table_1(scale: Scale) -> Run:
    """Huginn-0125's own run (section 4): 3.5 B parameters, 16.8 M tokens a step, 47,360 steps.

    One row of 4,096 tokens per GPU on 4,096 GPUs; constant rate after warm-up. The corpus named here
    stands in for the published data mix: replace `data` by that mix, packed.

    Raises:
        ValueError: at any scale but the paper's.
    """
    if scale != "paper":
        raise ValueError(f"scale={scale!r} has no such run; use paper, or the functions above")
    small = language_run(0, steps=47_360)
    return replace(
        small,
        name="huginn-0125",
        model=RecurrentDepth(
            width=5280,
            heads=55,
            prelude=2,
            core=4,
            coda=2,
            hidden=17_920,
            vocabulary=65_536,
            context=4096,
            mean_recurrence=32,
            mean_backprop=8,
            attention="flash_attention_2",
        ),
        data=Packed(
            corpus=PythonSource(minimum_characters=20_000),
            tokenizer=BytePairs(vocabulary=65_536),
            held_out=0.003,
        ),
        objective=RandomDepth(
            recurrences=LogNormalPoisson(mean=32, backprop=8), supervision=NextToken(mask=KeepAll())
        ),
        optimizer=Ellis(learning_rate=4e-5, weight_decay=4e-5),
        schedule=Constant(warmup_steps=4096),
        batch=4096,
        microbatch=1,
        sequence=4096,
        precision="bf16",
        engine=DDP(),
        seed=233,
        validate_every=128,
        checkpoint_every=1000,
    )
