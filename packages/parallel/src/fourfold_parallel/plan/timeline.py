"""A microbatch under a budget, told without tensors: compute, the ways out and in, what is resident.

Each block is kept (K), swapped to a store (S) or recomputed (R). The decisions and the budget settle the
*order* (`Rules`): which writes a forward waits for, and how early a block may be read back. So the peak
does not depend on any speed, and what runs the plan keeps the budget by keeping the order. The speeds then
settle when everything happens (`timeline`).

Forward, in order: a block needs room for what it saves and its temporaries. K keeps what it saved, R its
input alone, S all until it is written: writes are made one after another, each from the end of its block's
forward. Backward, in reverse: reads are made one after another, each as early as the room allows until its
block's turn. The last block that is swapped is read first and written last, so no read begins before the
last write has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fourfold_parallel.plan.blocks import Stack
from fourfold_parallel.plan.machine import Channel
from fourfold_parallel.plan.simulate import Span

Decision = Literal["K", "S", "R"]
"""Keep, swap, recompute."""


class BudgetError(ValueError):
    """Memory that is too small for the decisions."""


class Rules:
    """The order of events that keeps the budget, for some decisions.

    Args:
        stack: the blocks.
        decisions: a letter of `Decision` for each block, in forward order.
        budget: bytes.

    Raises:
        BudgetError: No order keeps it.
    """

    def __init__(self, stack: Stack, decisions: str, budget: float) -> None:
        blocks = stack.blocks
        count = len(blocks)
        if len(decisions) != count or set(decisions) - set("KSR"):
            raise ValueError(
                f"decisions={decisions!r} for {count} blocks; use {count} letters of K (keep), S (swap) "
                "and R (recompute)"
            )
        self.swapped: list[int] = [i for i, letter in enumerate(decisions) if letter == "S"]
        """Blocks that are written, in this order, and read in reverse."""
        self.forward_after: list[int] = []
        """Writes that have ended before each block's forward begins."""
        self.backward_after: list[int] = [0] * count
        """Writes that have ended before each block's backward begins."""
        self.read_at: dict[int, int] = {}
        """The block whose backward may be under way, at the earliest, when a swapped block's read begins."""
        self.peak_bytes = 0.0
        """The most that is resident, temporaries included."""
        lasting = [0]  # of blocks before: kept whole, or their inputs
        pending = [0]  # of swapped blocks before
        for index, (block, letter) in enumerate(zip(blocks, decisions, strict=True)):
            room = budget - lasting[-1] - block.need_bytes
            waits = self._writes(pending, room, f"the forward of block {index}")
            self.forward_after.append(waits)
            after = max(waits, self.forward_after[index - 1] if index else 0)
            self.forward_after[index] = after
            self._fill(lasting[-1] + block.need_bytes + pending[-1] - pending[after])
            kept = {"K": block.saved_bytes, "R": block.input_bytes, "S": 0}[letter]
            lasting.append(lasting[-1] + kept)
            if letter == "S":
                pending.append(pending[-1] + block.saved_bytes)
        self._backward(stack, decisions, budget, lasting, pending)

    def _writes(self, pending: list[int], room: float, what: str) -> int:
        """The fewest writes whose end leaves room: those after them still hold their bytes."""
        if room < 0:
            raise BudgetError(f"{what} does not fit")
        done = 0
        while pending[-1] - pending[done] > room:
            done += 1
        return done

    def _fill(self, nbytes: float) -> None:
        self.peak_bytes = max(self.peak_bytes, nbytes)

    def _backward(
        self, stack: Stack, decisions: str, budget: float, lasting: list[int], pending: list[int]
    ) -> None:
        count = len(decisions)
        # What is there while each block's backward runs, without swapped blocks before it.
        there = []
        for index, (block, letter) in enumerate(zip(stack.blocks, decisions, strict=True)):
            own = block.saved_bytes if letter == "K" else block.input_bytes if letter == "R" else 0
            there.append(lasting[index + 1] - own + block.need_bytes)
        upper = count - 1  # blocks from here on are done, or the reads before took their room
        for place in range(len(self.swapped) - 1, -1, -1):
            index = self.swapped[place]
            if there[index] > budget:
                raise BudgetError(f"the backward of block {index} does not fit")
            earliest, ahead, at = index, stack.blocks[index].saved_bytes, place
            for under_way in range(index + 1, upper + 1):
                # Swapped blocks between were read before it, and `there` counts the one under way itself.
                held = there[under_way] + ahead
                if held > budget:
                    break
                earliest = under_way
                if at + 1 < len(self.swapped) and self.swapped[at + 1] == under_way:
                    ahead += stack.blocks[under_way].saved_bytes
                    at += 1
            upper = self.read_at[index] = earliest
        last = self.swapped[-1] if self.swapped else -1
        after = self.forward_after[-1]
        for index in range(count - 1, -1, -1):
            if there[index] > budget:
                raise BudgetError(f"the backward of block {index} does not fit")
            if index > last:  # writes may be under way still, and no read is
                what = f"the backward of block {index}"
                after = max(after, self._writes(pending, budget - there[index], what))
                self.backward_after[index] = after
                self._fill(there[index] + pending[-1] - pending[after])
            ahead = sum(
                stack.blocks[j].saved_bytes for j, at in self.read_at.items() if j < index <= at
            )
            self._fill(there[index] + ahead)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One microbatch."""

    seconds: float
    compute_s: float
    """Of it in computation, recomputation included; the rest is waiting for the channel."""
    recomputed_s: float
    swapped_bytes: int
    """Written, and read again."""
    peak_bytes: float
    """The most that is resident at once, temporaries included: by the order alone, whatever the speeds."""
    spans: tuple[Span, ...]
    """On lanes `compute`, `out` and `in`; empty where they were not asked for."""
    resident: tuple[tuple[float, float], ...] = ()
    """(seconds, bytes that are resident from then on), without temporaries; as the spans."""

    @property
    def waited_s(self) -> float:
        """Seconds without computation."""
        return self.seconds - self.compute_s

    @property
    def occupancy(self) -> float:
        """The share of the time in which the device computes."""
        return self.compute_s / self.seconds


def timeline(
    stack: Stack, channel: Channel, decisions: str, budget: float, *, draws: bool = False
) -> Timeline:
    """Simulate a microbatch.

    Args:
        stack: the blocks.
        channel: to and from the store.
        decisions: a letter for each block.
        budget: bytes of activations and temporaries.
        draws: give spans and the resident bytes too.

    Raises:
        BudgetError: The decisions do not fit the budget.
    """
    rules = Rules(stack, decisions, budget)
    clock = _Clock(stack, channel, decisions, rules, draws=draws)
    clock.forward()
    clock.backward()
    recomputed = sum(
        b.forward_s for b, letter in zip(stack.blocks, decisions, strict=True) if letter == "R"
    )
    return Timeline(
        seconds=clock.now + stack.after_s,
        compute_s=stack.compute_s + recomputed,
        recomputed_s=recomputed,
        swapped_bytes=sum(stack.blocks[i].saved_bytes for i in rules.swapped),
        peak_bytes=rules.peak_bytes,
        spans=tuple(clock.spans),
        resident=_running(clock.changes),
    )


class _Clock:
    """The three lanes."""

    def __init__(
        self, stack: Stack, channel: Channel, decisions: str, rules: Rules, *, draws: bool
    ) -> None:
        self.stack, self.channel, self.decisions, self.rules = stack, channel, decisions, rules
        self.draws = draws
        self.now = stack.before_s
        self.written: list[float] = []
        """When each write ended."""
        self.spans: list[Span] = []
        self.changes: list[tuple[float, float]] = []

    def forward(self) -> None:
        out = 0.0
        for index, (block, letter) in enumerate(
            zip(self.stack.blocks, self.decisions, strict=True)
        ):
            self._await_writes(self.rules.forward_after[index])
            start = self.now
            self.now += block.forward_s
            self._draw("compute", f"F{index + 1}", start, self.now)
            self._hold(start, block.saved_bytes)
            if letter == "R":
                self._hold(self.now, block.input_bytes - block.saved_bytes)
            if letter == "S":
                begin = max(self.now, out)
                out = begin + self.channel.out_s(block.saved_bytes)
                self.written.append(out)
                self._draw("out", f"{index + 1}", begin, out)
                self._hold(out, -block.saved_bytes)
        start, self.now = self.now, self.now + self.stack.between_s
        self._draw("compute", "head", start, self.now)

    def backward(self) -> None:
        reads = list(self.rules.swapped)
        arrived: dict[int, float] = {}
        inward = self.written[-1] if self.written else 0.0
        for index in range(len(self.decisions) - 1, -1, -1):
            block, letter = self.stack.blocks[index], self.decisions[index]
            while reads and index <= self.rules.read_at[reads[-1]]:
                j = reads.pop()
                begin = max(inward, self.now)
                inward = arrived[j] = begin + self.channel.in_s(self.stack.blocks[j].saved_bytes)
                self._draw("in", f"{j + 1}", begin, inward)
                self._hold(begin, self.stack.blocks[j].saved_bytes)
            self._await_writes(self.rules.backward_after[index])
            self.now = max(self.now, arrived.get(index, 0.0))
            start = self.now
            if letter == "R":
                self.now += block.forward_s
                self._draw("compute", f"R{index + 1}", start, self.now)
                self._hold(start, block.saved_bytes - block.input_bytes)
                start = self.now
            self.now += block.backward_s
            self._draw("compute", f"B{index + 1}", start, self.now)
            self._hold(self.now, -block.saved_bytes)

    def _await_writes(self, count: int) -> None:
        if count:
            self.now = max(self.now, self.written[count - 1])

    def _draw(self, lane: str, name: str, start_s: float, stop_s: float) -> None:
        if self.draws:
            self.spans.append(Span(lane=lane, name=name, start_s=start_s, stop_s=stop_s))

    def _hold(self, at_s: float, nbytes: float) -> None:
        if self.draws:
            self.changes.append((at_s, nbytes))


def _running(changes: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Sums of changes in the order of time; what is freed at a moment goes before what comes."""
    total, sums = 0.0, []
    for at_s, nbytes in sorted(changes):
        total += nbytes
        sums.append((at_s, total))
    return tuple(sums)
