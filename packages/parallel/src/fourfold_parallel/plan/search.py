"""Every grid of a number of devices, ranked; and why a given one is not first."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from fourfold_parallel.common.axes import AXES
from fourfold_parallel.plan.job import Job, Layout, divisors, grids
from fourfold_parallel.plan.machine import GIB, Machine
from fourfold_parallel.plan.memory import Memory, fits, memory_of
from fourfold_parallel.plan.simulate import Step, scout, simulate
from fourfold_parallel.plan.transformer import Mixture

MOST_MICROBATCH = 64
"""Sequences that a rank takes at once, at most."""
SIMULATED = 300
"""Layouts that are simulated whole, the best by a rough guess."""
MOST_RANKS = 1_000_000
CLOSE = 0.02
"""Plans within this of the best are called ties: the model is not sharper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A layout with its predicted step."""

    layout: Layout
    step: Step
    memory: Memory
    mfu: float
    """Model-FLOP utilisation: without recomputation, of the nominal peak."""
    hfu: float
    """Hardware-FLOP utilisation: with it."""
    tokens_per_s: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.step.seconds

    def __lt__(self, other: Plan) -> bool:
        return self.seconds < other.seconds


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The plans of a job on a number of devices, fastest first."""

    job: Job
    machine: Machine
    ranks: int
    plans: tuple[Plan, ...]
    scouted: tuple[tuple[float, Layout], ...]
    """Layouts beyond the first `SIMULATED` of a rough guess, with that guess in seconds."""
    refusals: tuple[tuple[Layout, str], ...]
    """Grids that cannot run, each with the reason."""

    @property
    def best(self) -> Plan:
        """The fastest plan.

        Raises:
            ValueError: Nothing fits; says how many devices would do.
        """
        if not self.plans:
            raise ValueError(nothing_fits(self.job, self.machine, self.ranks, self.refusals))
        return self.plans[0]

    @cached_property
    def grids(self) -> tuple[Plan, ...]:
        """The best plan of each grid, fastest first."""
        seen: dict[tuple[int, ...], Plan] = {}
        for plan in self.plans:
            seen.setdefault(grid_of(plan.layout), plan)
        return tuple(seen.values())

    def why_not(self, layout: Layout) -> str:
        """A sentence: what a grid loses against the best, and where; or why it cannot run."""
        if layout.ranks != self.ranks:
            return f"{layout}: has {layout.ranks} ranks, and the plan is for {self.ranks}"
        if grid_of(layout) == grid_of(self.best.layout):
            return f"{layout}: it is the best grid, as {self.best.layout}"
        reason = refusal(self.job, layout)
        if reason:
            return f"{layout}: {reason}"
        same = [plan for plan in self.plans if grid_of(plan.layout) == grid_of(layout)]
        same += [
            plan_of(self.job, candidate, self.machine)
            for _, candidate in self.scouted
            if grid_of(candidate) == grid_of(layout)
        ]
        if not same:
            return f"{layout}: {_too_large(self.job, layout, self.machine)}"
        return f"{min(same).layout}: {_loss(min(same), self.best)}"

    def sensitivities(self) -> Iterator[str]:
        """Sentences on how firm the first place is."""
        best, others = self.best, self.grids[1:]
        if not others:
            yield "No other grid can run."
            return
        second = others[0]
        yield (
            f"The second grid ({second.layout}) is {second.seconds / best.seconds - 1:.1%} slower: "
            f"{_loss(second, best)}."
        )
        ties = [p for p in others if p.seconds <= best.seconds * (1 + CLOSE)]
        if ties:
            yield f"{len(ties)} other grids are within {CLOSE:.0%}, which is less than the model's error."
        changes: dict[Layout, list[str]] = {}
        for words, machine in _variants(self.machine):
            winner = min(
                self.grids[:12], key=lambda p: simulate(self.job, p.layout, machine).seconds
            )
            changes.setdefault(winner.layout, []).append(words)
        changes.pop(best.layout, None)
        for layout, words in changes.items():
            yield f"If {', or if '.join(words)}, {layout} would win."


def rank(job: Job, machine: Machine, ranks: int, *, grid: Sequence[Layout] = ()) -> Ranking:
    """Every grid and microbatch that can run, ranked by predicted time.

    Of each grid and microbatch the least wasteful form that fits is kept: without recomputation before
    with it, and the optimizer's state whole before cut over data. Tiles are kept for backward, or not.

    Args:
        job: The model and the batch.
        machine: The machine.
        ranks: Devices.
        grid: Only these grids, instead of all.
    """
    scouted: list[tuple[float, Layout]] = []
    refusals: list[tuple[Layout, str]] = []
    for layout in grid or grids(ranks):
        reason = refusal(job, layout)
        chosen = [] if reason else list(_fitting(job, layout, machine))
        if not chosen:
            refusals.append((layout, reason or _too_large(job, layout, machine)))
        scouted += [(scout(job, candidate, machine), candidate) for candidate in chosen]
    scouted.sort(key=lambda entry: entry[0])
    best = sorted(plan_of(job, layout, machine) for _, layout in scouted[:SIMULATED])
    return Ranking(
        job=job, machine=machine, ranks=ranks, plans=tuple(best),
        scouted=tuple(scouted[SIMULATED:]), refusals=tuple(refusals),
    )  # fmt: skip


def plan_of(job: Job, layout: Layout, machine: Machine) -> Plan:
    """The predicted step of one layout."""
    step = simulate(job, layout, machine)
    peak = layout.ranks * machine.rate(job.precision).flops_per_s * step.seconds
    model, sequence = job.model, job.sequence
    return Plan(
        layout=layout,
        step=step,
        memory=memory_of(job, layout),
        mfu=model.flops(tokens=job.tokens, sequence=sequence, recomputes=False) / peak,
        hfu=model.flops(tokens=job.tokens, sequence=sequence, recomputes=layout.recomputes) / peak,
        tokens_per_s=job.tokens / step.seconds,
    )


def grid_of(layout: Layout) -> tuple[int, ...]:
    """Its four sizes."""
    return tuple(layout.size(axis) for axis in AXES)


def refusal(job: Job, layout: Layout) -> str:
    """The reason that a grid cannot run whatever the memory; empty if it can."""
    model, row = job.model, layout.row
    if job.batch % layout.shares:
        return f"batch {job.batch} does not divide over data * depth = {layout.shares}"
    if model.splits_heads and model.heads % row:
        return f"{model.heads} heads do not divide over row {row}"
    for part in model.parts:
        if isinstance(part, Mixture) and part.hidden % (row * layout.col):
            shares = row * layout.col
            return (
                f"{part.hidden} hidden units of an expert do not divide over row * col = {shares}"
            )
    if model.splits_heads and model.kv_heads % row and row % model.kv_heads:
        return f"{model.kv_heads} key and value heads neither divide over row {row} nor are shared evenly"
    if layout.col > model.width:
        return f"width {model.width} has fewer features than col {layout.col}"
    if layout.cuts_tokens and job.sequence % row:
        return f"sequence {job.sequence} does not divide over row {row}"
    return ""


def nothing_fits(
    job: Job, machine: Machine, ranks: int, refusals: Sequence[tuple[Layout, str]]
) -> str:
    """A refusal that names the smallest number of devices that would do."""
    reasons = Counter(reason.partition(" (")[0] for _, reason in refusals).most_common(1)
    most = reasons[0][0] if reasons else "no grid"
    enough = next((n for n in _larger(ranks, machine) if _any_fits(job, machine, n)), None)
    way_out = (
        f"{enough} devices would do"
        if enough
        else "no number of devices up to a million does at this batch and sequence"
    )
    return (
        f"{job.model.name} ({job.model.parameters / 1e9:.1f} B parameters) with batch {job.batch} of "
        f"{job.sequence} tokens runs on no grid of {ranks} {machine.name} devices: mostly, {most}; {way_out}"
    )


def _larger(ranks: int, machine: Machine) -> Iterator[int]:
    """More devices: one and a half times and twice as many, again and again, in whole nodes."""
    node = machine.devices_per_node
    base = max(node, ranks + -ranks % node) if ranks >= node else ranks
    while base < MOST_RANKS:
        for factor in (3, 4):
            more = base * factor // 2
            if more % min(node, more) == 0:
                yield more
        base *= 2


def _any_fits(job: Job, machine: Machine, ranks: int) -> bool:
    return any(
        not refusal(job, layout) and any(_fitting(job, layout, machine)) for layout in grids(ranks)
    )


def _fitting(job: Job, layout: Layout, machine: Machine) -> Iterator[Layout]:
    """Of each microbatch and sequence form, the least wasteful layout that fits."""
    share = job.batch // layout.shares
    cuts = (False, True) if layout.row > 1 and job.sequence % layout.row == 0 else (False,)
    shards = (False, True) if layout.data > 1 else (False,)
    kept = (False, True) if layout.depth > 1 else (False,)
    mixtures = [part for part in job.model.parts if isinstance(part, Mixture)]
    exchanges = layout.depth > 1 and mixtures and all(part.exchangeable for part in mixtures)
    ways: tuple[Literal["gathered", "exchanged"], ...] = ("gathered", "exchanged")[
        : 1 + bool(exchanges)
    ]
    for microbatch in divisors(share):
        if microbatch > MOST_MICROBATCH:
            return
        for cuts_tokens, keeps_tiles, experts in itertools.product(cuts, kept, ways):
            whole = replace(
                layout, microbatch=microbatch, cuts_tokens=cuts_tokens, keeps_tiles=keeps_tiles,
                experts=experts,
            )  # fmt: skip
            forms = (
                replace(whole, recomputes=r, shards_optimizer=z)
                for r in ((False,) if keeps_tiles else (False, True))
                for z in shards
            )
            fitting = (form for form in forms if fits(memory_of(job, form), machine))
            yield from itertools.islice(fitting, 1)


def _too_large(job: Job, layout: Layout, machine: Machine) -> str:
    smallest = replace(layout, recomputes=True, shards_optimizer=layout.data > 1)
    if layout.row > 1 and job.sequence % layout.row == 0:
        smallest = replace(smallest, cuts_tokens=True)
    memory = memory_of(job, smallest)
    limit = machine.memory_bytes * (1 - machine.memory_slack)
    largest = max(memory.parts(), key=memory.parts().__getitem__)
    return (
        f"does not fit (needs {memory.peak / GIB:.1f} GiB with recomputation, of {limit / GIB:.1f}; "
        f"most of it {largest})"
    )


def _loss(slower: Plan, best: Plan) -> str:
    """The parts of a step in which a plan loses time against the best."""
    more = {
        "computing": slower.step.compute_s - best.step.compute_s,
        **{
            f"waiting for {axis}": slower.step.exposed_s[axis] - best.step.exposed_s[axis]
            for axis in AXES
        },
    }
    total = slower.seconds - best.seconds
    worst = sorted(more.items(), key=lambda item: -item[1])[:2]
    lost = [f"{seconds:.3g} s more {name}" for name, seconds in worst if seconds > 0.05 * total]
    return f"{total:.3g} s a step more ({', '.join(lost) or 'spread over all parts'})"


def _variants(machine: Machine) -> Iterator[tuple[str, Machine]]:
    for words, factor in (("20 % slower", 0.8), ("20 % faster", 1.25)):
        yield (
            f"the network were {words}",
            replace(machine, node_bytes_per_s=machine.node_bytes_per_s * factor),
        )
        rings = tuple(replace(r, bytes_per_s=r.bytes_per_s * factor) for r in machine.rings)
        yield f"the links within a node were {words}", replace(machine, rings=rings)
        rates = tuple(replace(r, share=r.share * factor) for r in machine.rates)
        yield f"products were {words}", replace(machine, rates=rates)
    doubled = machine.network_latency_s * 2
    if not math.isclose(doubled, 0):
        yield "latencies of the network were doubled", replace(machine, network_latency_s=doubled)
