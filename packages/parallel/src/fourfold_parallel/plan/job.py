"""A model to be trained, and its layout over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeGuard

from fourfold_parallel.common.attention import Attention
from fourfold_parallel.common.axes import AxisName
from fourfold_parallel.plan.machine import BYTES, Precision
from fourfold_parallel.plan.transformer import Mixture, Part, Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Bytes of each parameter that outlive a step, by who holds them."""

    weight: int = 4
    """A rank's piece of the parameter."""
    gradient: int = 4
    master: int = 0
    """A copy that the optimizer steps, apart from the weight."""
    moments: int = 8
    wire: int = 4
    """Of a gradient summed over data."""
    update: int = 4
    """Temporaries of the update: torch's AdamW on GPUs works on all parameters at once, on CPUs on one."""


GRID = Storage()
"""fourfold's engine: parameters, gradients and AdamW's moments in float32, products under autocast."""
GRID_ON_CPU = Storage(update=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model and the batch of one step."""

    model: Transformer
    batch: int
    """Sequences of a step, over all ranks."""
    sequence: int
    """Tokens of a sequence."""
    precision: Precision = "bf16"
    attention: Attention = "sdpa"
    storage: Storage = GRID
    fused: bool = False
    """Norms, activations and the loss are fused kernels (compiled, or written by hand)."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.precision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A grid, and how each rank goes through its share of the batch."""

    data: int = 1
    depth: int = 1
    row: int = 1
    col: int = 1
    microbatch: int = 1
    """Sequences that a rank takes through the model at once."""
    recomputes: bool = False
    """Activations are kept at the borders of decoder layers only."""
    cuts_tokens: bool = False
    """The sequence form: between blocks, tokens are cut over row."""
    shards_optimizer: bool = False
    """ZeRO-1 over data."""
    keeps_tiles: bool = False
    """Tiles are kept from forward to backward, not gathered again."""
    experts: Literal["gathered", "exchanged"] = "gathered"
    """Weights of experts are gathered over depth, or tokens are sent over it to where they lie."""

    @property
    def ranks(self) -> int:
        """Of the grid."""
        return self.data * self.depth * self.row * self.col

    @property
    def shares(self) -> int:
        """Parts of the batch."""
        return self.data * self.depth

    def size(self, axis: AxisName) -> int:
        """Of an axis."""
        return {"data": self.data, "depth": self.depth, "row": self.row, "col": self.col}[axis]

    def stride(self, axis: AxisName) -> int:
        """Ranks between neighbours along an axis: col is innermost, then row, depth, data."""
        return {
            "col": 1,
            "row": self.col,
            "depth": self.col * self.row,
            "data": self.col * self.row * self.depth,
        }[axis]

    def leaves(self, part: Part) -> TypeGuard[Mixture]:
        """True of experts that stay where they are stored, and to which tokens are sent."""
        return isinstance(part, Mixture) and self.experts == "exchanged" and self.depth > 1

    @property
    def marks(self) -> str:
        """A letter for each form: r recomputes, s sequence form, z ZeRO-1, k keeps tiles, e exchanges."""
        forms = (self.recomputes, self.cuts_tokens, self.shards_optimizer, self.keeps_tiles)
        letters = [letter for letter, takes in zip("rszk", forms, strict=True) if takes]
        return "".join(letters) + "e" * (self.experts == "exchanged")

    def microbatches(self, batch: int) -> int:
        """Of a step, on every rank."""
        return math.ceil(batch / (self.shares * self.microbatch))

    def __str__(self) -> str:
        grid = " x ".join(f"{n} {self.size(n)}" for n in ("data", "depth", "row", "col"))
        extras = [f"microbatch {self.microbatch}"]
        extras += ["recompute"] * self.recomputes + ["sequence form"] * self.cuts_tokens
        extras += ["ZeRO-1"] * self.shards_optimizer + ["kept tiles"] * self.keeps_tiles
        extras += ["exchanged experts"] * (self.experts == "exchanged")
        return f"{grid}, {', '.join(extras)}"


def grids(ranks: int) -> Iterator[Layout]:
    """Every ordered factorisation of a number of ranks into data, depth, row and col."""
    for data in divisors(ranks):
        for depth in divisors(ranks // data):
            for row in divisors(ranks // (data * depth)):
                yield Layout(data=data, depth=depth, row=row, col=ranks // (data * depth * row))


def divisors(number: int) -> Iterator[int]:
    """All divisors, in order."""
    for candidate in range(1, number + 1):
        if number % candidate == 0:
            yield candidate
