"""The choice of what is kept, swapped and recomputed: the fastest within a budget, or how far from it.

To nine blocks the choice is exact: decisions are simulated in the order of a lower bound of their time,
until the bound passes the best time. Beyond, patterns of equal blocks (a kept suffix, recomputation spread
over the rest) begin a search by exchange, and the gap to a bound that holds for every choice is stated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fourfold_parallel.plan.blocks import BlockCost, Stack
from fourfold_parallel.plan.job import Job, Layout
from fourfold_parallel.plan.machine import Channel, Machine
from fourfold_parallel.plan.memory import GRADIENTS_OF_A_LAYER, memory_of
from fourfold_parallel.plan.simulate import simulate
from fourfold_parallel.plan.timeline import BudgetError, Timeline, timeline

EXACT_BLOCKS = 9
TRIALS = 6000
"""Simulations of a search that is not exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Decisions, and what they come to."""

    decisions: str
    """A letter for each block in forward order: K, S or R."""
    budget: float
    """Bytes."""
    timeline: Timeline
    bound_s: float
    """No choice within the budget is faster."""

    @property
    def gap(self) -> float:
        """The most by which the best choice may be faster than this one, of this one's bound."""
        return self.timeline.seconds / self.bound_s - 1


def stack_of(job: Job, layout: Layout, machine: Machine) -> Stack:
    """The blocks of a rank of a layout on a machine, without running anything.

    Times are those that `simulate` finds for one decoder layer more, memory is `memory_of`'s; temporaries
    are the gradients of half a layer's activations. `choose(stack_of(...), machine.host, budget)` plans a
    GPU from here.
    """
    rows = layout.shares * layout.microbatch
    plain, again = (replace(layout, recomputes=recomputes) for recomputes in (False, True))
    blocks: list[BlockCost] = []
    around_s = 0.0
    for layer, number in job.model.stack:
        few, more = (
            replace(job, batch=rows, model=replace(job.model, stack=((layer, layers),)))
            for layers in (2, 3)
        )
        layer_s, redone_s = (
            simulate(more, form, machine).seconds - simulate(few, form, machine).seconds
            for form in (plain, again)
        )
        saved = memory_of(more, plain).activations - memory_of(few, plain).activations
        inputs = memory_of(more, again).activations - memory_of(few, again).activations
        block = BlockCost(
            forward_s=redone_s - layer_s, backward_s=2 * layer_s - redone_s, saved_bytes=round(saved),
            input_bytes=round(inputs), spare_bytes=round(GRADIENTS_OF_A_LAYER * saved),
        )  # fmt: skip
        blocks += [block] * number
        around_s = simulate(few, plain, machine).seconds - 2 * layer_s
    return Stack(blocks=tuple(blocks), between_s=max(0.0, around_s))


def choose(stack: Stack, channel: Channel, budget: float, *, letters: str = "KSR") -> Choice:
    """The fastest decisions that keep a budget.

    Args:
        stack: the blocks.
        channel: to and from the store.
        budget: bytes of activations and temporaries.
        letters: the decisions that may be taken, for comparisons; the bound is of all.

    Raises:
        BudgetError: None does; names the smallest budget that would.
    """
    check_budget(stack, budget)
    if len(letters) < len("KSR") or len(stack.blocks) <= EXACT_BLOCKS:
        decisions = _exact(stack, channel, budget, letters)
        told = timeline(stack, channel, decisions, budget, draws=True)
        return Choice(decisions=decisions, budget=budget, timeline=told, bound_s=told.seconds)
    decisions = _searched(stack, channel, budget)
    told = timeline(stack, channel, decisions, budget, draws=True)
    bound_s = min(told.seconds, bound(stack, channel, budget))
    return Choice(decisions=decisions, budget=budget, timeline=told, bound_s=bound_s)


def check_budget(stack: Stack, budget: float) -> None:
    """Refuse a budget that no decisions keep.

    Raises:
        BudgetError: Names the smallest that would do.
    """
    least = stack.smallest_budget
    if budget < least:
        needs = [block.need_bytes for block in stack.blocks]
        raise BudgetError(
            f"budget={budget:,.0f} bytes is too small: block {needs.index(least)} alone needs {least:,} to "
            "run; "
            f"use {least:,} or more, or a smaller microbatch ({stack.largest_budget:,} keep everything)"
        )


def seconds_of(stack: Stack, channel: Channel, decisions: str, budget: float) -> float:
    """Seconds of a microbatch under some decisions; infinite where they do not fit."""
    try:
        return timeline(stack, channel, decisions, budget).seconds
    except BudgetError:
        return math.inf


def _exact(stack: Stack, channel: Channel, budget: float, letters: str) -> str:
    bounded = sorted(
        (bound_of(stack, channel, "".join(row)), "".join(row))
        for row in itertools.product(letters, repeat=len(stack.blocks))
        if _may_fit(stack, row, budget)
    )
    best, best_s = "", math.inf
    for least_s, decisions in bounded:
        if least_s >= best_s:
            break
        seconds = seconds_of(stack, channel, decisions, budget)
        if seconds < best_s:
            best, best_s = decisions, seconds
    if not best:
        raise BudgetError(
            f"budget={budget:,.0f} bytes: no choice of {' and '.join(letters)} keeps it"
        )
    return best


def _may_fit(stack: Stack, letters: Iterable[str], budget: float) -> bool:
    """Whether what lasts from forward to backward leaves the last block its room."""
    *before, last = zip(stack.blocks, letters, strict=True)
    lasting = sum(
        block.saved_bytes if letter == "K" else block.input_bytes if letter == "R" else 0
        for block, letter in before
    )
    return lasting + last[0].need_bytes <= budget


def bound_of(stack: Stack, channel: Channel, decisions: str) -> float:
    """No timeline of these decisions is shorter, whatever the budget.

    Computation with its recomputation; and the ways out and in, one after the other, between the first
    swapped block's forward and its backward.
    """
    blocks = stack.blocks
    recomputed = sum(
        b.forward_s for b, letter in zip(blocks, decisions, strict=True) if letter == "R"
    )
    computed = stack.compute_s + recomputed
    first = decisions.find("S")
    if first < 0:
        return computed
    swapped = [b.saved_bytes for b, letter in zip(blocks, decisions, strict=True) if letter == "S"]
    out = sum(map(channel.out_s, swapped))
    inward = sum(map(channel.in_s, swapped))
    start = stack.before_s + sum(b.forward_s for b in blocks[: first + 1])
    rest = sum(b.forward_s for b in blocks[first + 1 :]) + stack.between_s
    end = stack.after_s + sum(b.backward_s for b in blocks[: first + 1]) + sum(
        b.forward_s for b, letter in zip(blocks[:first], decisions, strict=False) if letter == "R"
    )  # fmt: skip
    return max(computed, start + max(out, rest) + inward + end)


def bound(stack: Stack, channel: Channel, budget: float) -> float:
    """No choice within the budget is faster: whole blocks are relaxed to shares of them.

    Before the last block's forward, bytes beyond the budget have left: swapped, within what both ways
    carry, or to be recomputed, the cheapest bytes first. The shortest time in which the two together are
    enough.
    """
    *before, last = stack.blocks
    excess = sum(b.saved_bytes for b in before) + last.need_bytes - budget
    if excess <= 0:
        return stack.compute_s
    least = min(b.backward_s for b in stack.blocks)
    forward = stack.before_s + sum(b.forward_s for b in stack.blocks) + stack.between_s
    started = stack.before_s + min(b.forward_s for b in stack.blocks)
    both = 1 / channel.out_bytes_per_s + 1 / channel.in_bytes_per_s
    rates = sorted(
        (b.forward_s / (b.saved_bytes - b.input_bytes), b.saved_bytes - b.input_bytes)
        for b in stack.blocks
        if b.saved_bytes > b.input_bytes
    )

    def is_enough(seconds: float) -> bool:
        swapped = min(
            (seconds - stack.after_s - least - forward) * channel.in_bytes_per_s,
            (seconds - stack.after_s - least - started) / both,
        )
        left, missing = seconds - stack.compute_s, excess - max(0.0, swapped)
        for rate, nbytes in rates:
            if missing <= 0 or left <= 0:
                break
            share = min(nbytes, missing, left / rate if rate else nbytes)
            missing, left = missing - share, left - share * rate
        return missing <= 0

    low, high = stack.compute_s, stack.compute_s * 2 + excess * both + forward
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return low


def _patterns(count: int) -> Iterator[str]:
    """A kept suffix; before it some recomputed blocks, first, last or evenly spread, the rest swapped."""
    for kept in range(count + 1):
        rest = count - kept
        for again in range(rest + 1):
            spread = "".join(
                "R" if (i + 1) * again // rest > i * again // rest else "S" for i in range(rest)
            )
            forms = {"R" * again + "S" * (rest - again), "S" * (rest - again) + "R" * again, spread}
            yield from (form + "K" * kept for form in sorted(forms))


def _searched(stack: Stack, channel: Channel, budget: float) -> str:
    """Patterns, then exchanges of one and of two letters until none helps or the trials are used up."""
    count = len(stack.blocks)
    seen: dict[str, float] = {}

    def seconds(decisions: str) -> float:
        if decisions not in seen:
            seen[decisions] = seconds_of(stack, channel, decisions, budget)
        return seen[decisions]

    starts = sorted([*_patterns(count), greedy(stack, channel, budget)], key=seconds)
    best = starts[0]
    most = len(seen) + TRIALS
    while len(seen) < most:
        better = min(_neighbours(best), key=seconds)
        if seconds(better) >= seconds(best):
            break
        best = better
    return best


def _neighbours(decisions: str) -> Iterator[str]:
    letters = list(decisions)
    for index, letter in enumerate(letters):
        for other in "KSR".replace(letter, ""):
            yield decisions[:index] + other + decisions[index + 1 :]
    for left, right in itertools.combinations(range(len(letters)), 2):
        if letters[left] != letters[right]:
            swapped = letters.copy()
            swapped[left], swapped[right] = swapped[right], swapped[left]
            yield "".join(swapped)


def greedy(stack: Stack, channel: Channel, budget: float) -> str:
    """KARMA's strategy: keep the last blocks that fit, swap the others, recompute against stalls.

    Wahib et al. 2020 as recalled; without the search for a blocking.
    """
    count = len(stack.blocks)
    kept = next(
        k for k in range(count, -1, -1)
        if math.isfinite(seconds_of(stack, channel, "S" * (count - k) + "K" * k, budget))
    )  # fmt: skip
    decisions = "S" * (count - kept) + "K" * kept
    best_s = seconds_of(stack, channel, decisions, budget)
    for index in range(count - kept - 1, -1, -1):
        other = decisions[:index] + "R" + decisions[index + 1 :]
        seconds = seconds_of(stack, channel, other, budget)
        if seconds < best_s:
            decisions, best_s = other, seconds
    return decisions


def pooch(stack: Stack, channel: Channel, budget: float) -> str:
    """PooCH's rule (Ito et al. 2019) as recalled: of all swapped, keep what gains most; then recompute."""
    decisions = "S" * len(stack.blocks)
    for letter in "KR":
        while True:
            others = [
                decisions[:i] + letter + decisions[i + 1 :]
                for i, former in enumerate(decisions)
                if former == "S"
            ]
            now_s = seconds_of(stack, channel, decisions, budget)
            best = min(
                others, key=lambda other: seconds_of(stack, channel, other, budget), default=""
            )
            if not best or seconds_of(stack, channel, best, budget) >= now_s:
                break
            decisions = best
    return decisions
