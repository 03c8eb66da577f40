"""A model as a row of blocks, and the road to a slower memory: the planner's view of out-of-core training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """A decoder layer in one microbatch on one rank."""

    forward_s: float
    """Seconds; a recomputation takes as long."""
    backward_s: float
    saved_bytes: int
    """All that its backward reads and that is no weight, its input included."""
    input_bytes: int
    """Of its input alone, which a recomputation starts from."""
    spare_bytes: int = 0
    """Temporaries of its forward or backward at their fullest, beside what is saved."""

    @property
    def need_bytes(self) -> int:
        """Room in which its forward, or its backward, runs."""
        return self.saved_bytes + self.spare_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The blocks of a microbatch in the order of their forward, and the work around them."""

    blocks: tuple[BlockCost, ...]
    before_s: float = 0.0
    """The embedding's forward."""
    between_s: float = 0.0
    """From the last block's forward to its backward: head and loss, both ways."""
    after_s: float = 0.0
    """The embedding's backward."""

    @property
    def compute_s(self) -> float:
        """A microbatch in which everything is kept."""
        around = self.before_s + self.between_s + self.after_s
        return around + sum(block.forward_s + block.backward_s for block in self.blocks)

    @property
    def saved_bytes(self) -> int:
        """Of all blocks."""
        return sum(block.saved_bytes for block in self.blocks)

    @property
    def smallest_budget(self) -> int:
        """Bytes with which the stack runs at all: each block alone in the memory, the others in the store."""
        return max(block.need_bytes for block in self.blocks)

    @property
    def largest_budget(self) -> int:
        """Bytes beyond which more change nothing: everything is kept."""
        return self.saved_bytes + max(block.spare_bytes for block in self.blocks)


def middle(stacks: Sequence[Stack]) -> Stack:
    """The same blocks measured several times: of each time the median."""
    first = stacks[0]
    blocks = tuple(
        replace(
            same[0],
            forward_s=statistics.median(b.forward_s for b in same),
            backward_s=statistics.median(b.backward_s for b in same),
        )
        for same in zip(*(stack.blocks for stack in stacks), strict=True)
    )
    return replace(first, blocks=blocks, between_s=statistics.median(s.between_s for s in stacks))


def slowest(stacks: Sequence[Stack]) -> Stack:
    """The same blocks on several ranks: of each number the largest, so that a plan fits them all.

    Raises:
        ValueError: The ranks have not as many blocks.
    """
    counts = sorted({len(stack.blocks) for stack in stacks})
    if len(counts) > 1:
        raise ValueError(f"ranks have {counts} blocks; every rank must run the same layers")
    blocks = tuple(
        BlockCost(
            forward_s=max(b.forward_s for b in same), backward_s=max(b.backward_s for b in same),
            saved_bytes=max(b.saved_bytes for b in same), input_bytes=max(b.input_bytes for b in same),
            spare_bytes=max(b.spare_bytes for b in same),
        )
        for same in zip(*(stack.blocks for stack in stacks), strict=True)
    )  # fmt: skip
    return Stack(
        blocks=blocks,
        before_s=max(s.before_s for s in stacks),
        between_s=max(s.between_s for s in stacks),
        after_s=max(s.after_s for s in stacks),
    )
