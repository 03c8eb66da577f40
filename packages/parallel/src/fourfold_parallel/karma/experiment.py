"""The stages of the reproduction."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from fourfold_parallel.karma import recipes
from fourfold_parallel.karma.measure import (
    EVERYTHING,
    LARGE_PIECES,
    Measured,
    Trained,
    alternated,
    drawn,
    equal_memory,
    fixed,
    host_updates,
    in_turn,
    llama,
    road,
    trained,
)
from fourfold_parallel.karma.recipes import EqualMemory, HostUpdates, Hybrid, Predictions, Stacks
from fourfold_parallel.plan.blocks import Stack, middle
from fourfold_parallel.plan.machine import Channel
from fourfold_parallel.plan.outofcore import choose, greedy, pooch, seconds_of
from fourfold_parallel.reproduce.experiment import Stage, Workplace
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.outofcore import OutOfCore
from fourfold_parallel.testing.ranks import close_ranks, run_on_ranks


def simulate_stacks(study: Stacks, workplace: Workplace) -> None:
    """Losses of the greedy strategy and of PooCH's rule against the best; event "stacks"."""
    generator = random.Random(study.seed)  # noqa: S311 - no secret
    losses: dict[str, list[float]] = {"greedy_loss": [], "pooch_loss": [], "swap_loss": []}
    mixed = 0
    with workplace.recording(study, seed=study.seed) as records:
        for index in range(study.count):
            workplace.progress(index, study.count, "stacks")
            blocks = generator.randint(study.least_blocks, study.most_blocks)
            stack, channel, budget = drawn(generator, blocks)
            choice = choose(stack, channel, budget)
            mixed += {"S", "R"} <= set(choice.decisions)
            for name, decisions in (
                ("greedy_loss", greedy(stack, channel, budget)),
                ("pooch_loss", pooch(stack, channel, budget)),
                ("swap_loss", only(stack, channel, budget, "S")),
            ):
                seconds = seconds_of(stack, channel, decisions, budget)
                losses[name].append(round(seconds / choice.timeline.seconds - 1, 6))
        records.write("stacks", mixed=mixed, **losses)


def only(stack: Stack, channel: Channel, budget: float, letter: str) -> str:
    """The best choice of keeping and one other way. Swapping has one that fits always."""
    return choose(stack, channel, budget, letters="K" + letter).decisions


def time_hybrid(study: Hybrid, workplace: Workplace) -> None:
    """Ours, swapping and recomputing alone, in turn; events "case"."""
    torch.set_num_threads(1)
    models = study.models
    cases = [(layers, busy) for layers in models.layers for busy in study.busy]
    with workplace.recording(study, seed=0) as records:
        for index, (layers, busy) in enumerate(cases):
            workplace.progress(index, len(cases), f"{layers} layers, store {busy}")
            config = llama(layers, models.width)
            way = road(config, models.tokens, busy)
            budget = study.budget * way.stack.largest_budget
            plans = {
                "swap": only(way.stack, way.channel, budget, "S"),
                "recompute": only(way.stack, way.channel, budget, "R"),
                "ours": choose(way.stack, way.channel, budget).decisions,
            }
            engines = {name: fixed(way, letters, budget) for name, letters in plans.items()}
            times = in_turn(engines, config, models.tokens, models.rounds)
            seconds = {f"{name}_s": row for name, row in times.items()}
            predicted = {
                name: seconds_of(way.stack, way.channel, letters, budget)
                for name, letters in plans.items()
            }
            records.write(
                "case", layers=layers, busy=busy, budget_bytes=round(budget), stack=way.stack,
                channel=way.channel, plain_s=way.stack.compute_s, decisions=plans["ours"], plans=plans,
                predicted_s=predicted, **seconds,
            )  # fmt: skip


def time_predictions(study: Predictions, workplace: Workplace) -> None:
    """Two plans for each budget: ours, and the best swapping; events "plan".

    The blocks are measured in each round too, by themselves: what they come to is the prediction.
    """
    torch.set_num_threads(1)
    models = study.models
    [layers] = models.layers
    config = llama(layers, models.width)
    with workplace.recording(study, seed=0) as records:
        way = road(config, models.tokens, study.busy)
        plans: dict[str, tuple[str, float]] = {}
        for share in study.budgets:
            budget = share * way.stack.largest_budget
            ours = choose(way.stack, way.channel, budget).decisions
            other = only(way.stack, way.channel, budget, "S")
            if other == ours:
                other = greedy(way.stack, way.channel, budget)
            plans |= {f"ours {share}": (ours, budget), f"other {share}": (other, budget)}
        workplace.progress(1, 3, f"{len(plans)} plans in turn")
        with ExitStack() as scope:
            whole = trained(OutOfCore(inner=Single(), budget=EVERYTHING), config, models.tokens)
            blocks = Measured(scope.enter_context(whole))
            ready: dict[str, Trained | Measured] = {"blocks": blocks}
            for name, plan in plans.items():
                ready[name] = scope.enter_context(trained(fixed(way, *plan), config, models.tokens))
            times = alternated(ready, models.rounds)
        stack = middle(blocks.stacks[1:])
        for name, (letters, budget) in plans.items():
            records.write(
                "plan", name=name, decisions=letters, budget_bytes=round(budget), stack=stack,
                channel=way.channel, measured_s=times[name], plain_s=stack.compute_s,
                predicted_s=seconds_of(stack, way.channel, letters, budget),
            )  # fmt: skip


def time_equal_memory(study: EqualMemory, workplace: Workplace) -> None:
    """Data parallelism out of core beside a grid of two ranks; events "pair"."""
    os.environ.update(LARGE_PIECES)  # for the server of the ranks, which starts with the first law
    pairs = [(grid, width) for width in study.widths for grid in ("row", "depth")]
    with workplace.recording(study, seed=0) as records:
        for index, (grid, width) in enumerate(pairs):
            workplace.progress(index, len(pairs), f"{grid}, width {width}")
            told = run_on_ranks(
                2, equal_memory, grid=grid, width=width, layers=study.layers, tokens=study.tokens,
                busy=study.busy, rounds=study.rounds,
            )  # fmt: skip
            slower = max(told, key=lambda mine: statistics.median(mine["ours_s"]))
            records.write("pair", grid=f"{grid} 2", width=width, **slower)
        close_ranks(2)


def time_host_updates(study: HostUpdates, workplace: Workplace) -> None:
    """Steps of two ranks, their stages in a pipeline and in sequence; event "steps" of the slower rank."""
    with workplace.recording(study, seed=0) as records:
        workplace.progress(0, 1, "2 ranks")
        told = run_on_ranks(
            2, host_updates, layers=study.layers, width=study.width, tokens=study.tokens, busy=study.busy,
            latency_s=study.latency_s, rounds=study.rounds,
        )  # fmt: skip
        records.write("steps", **max(told, key=lambda mine: statistics.median(mine["pipelined_s"])))
        close_ranks(2)


def _stage(name: str, run: object, perform: Callable[..., None]) -> Stage:
    return Stage(name=name, run=run, perform=partial(perform, run))


def stages(scale: Scale) -> Sequence[Stage]:
    """The measurements of a scale; the smoke scale simulates only."""
    if scale == "paper":
        return ()
    simulated = (_stage("stacks", recipes.stacks(), simulate_stacks),)
    if scale == "smoke":
        return simulated
    return (
        *simulated,
        _stage("hybrid", recipes.hybrid(), time_hybrid),
        _stage("predictions", recipes.predictions(), time_predictions),
        _stage("equal-memory", recipes.equal_memory(), time_equal_memory),
        _stage("host-updates", recipes.host_updates(), time_host_updates),
    )
