"""Where the recurrence begins: a random state, a table of them, or the last token's thought."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fourfold_recurrent_depth.cache import RecurrentCache

CUT = 3.0
"""Standard deviations at which drawn states are cut, as published."""


@dataclass(frozen=True, slots=True, eq=False)
class StateTable:
    """One initial state for each position: a pass with a cache then equals the pass without."""

    states: Float[Tensor, "position width"]

    def at(self, positions: Int[Tensor, "#batch token"]) -> Float[Tensor, "#batch token width"]:
        """The states of some positions.

        Raises:
            ValueError: where the table is too short.
        """
        last = int(positions.max())
        if last >= len(self.states):
            raise ValueError(
                f"position {last} has no state in a table of {len(self.states)}; draw a longer table"
            )
        return self.states.to(positions.device)[positions]


@dataclass(frozen=True, slots=True)
class RowStates:
    """Initial states drawn from one seed for each row: alike on any layout of ranks, and after a resume."""

    seeds: tuple[int, ...]

    def like(self, e: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        """States for a batch of as many rows, drawn on the CPU.

        Raises:
            ValueError: where the rows are others.
        """
        if len(self.seeds) != len(e):
            raise ValueError(f"{len(self.seeds)} seeds for {len(e)} rows; give one for each row")
        std = math.sqrt(2 / (5 * e.shape[-1]))
        drawn = torch.empty(e.shape, dtype=torch.float32)
        for row, seed in zip(drawn, self.seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            nn.init.trunc_normal_(row, std=std, a=-CUT * std, b=CUT * std, generator=generator)
        return drawn * math.sqrt(e.shape[-1])


def state_table(positions: int, width: int, *, seed: int) -> StateTable:
    """A table drawn from the initial law N(0, 2/5), cut at three standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    std = math.sqrt(2 / (5 * width))
    table = torch.empty(positions, width)
    nn.init.trunc_normal_(table, std=std, a=-CUT * std, b=CUT * std, generator=generator)
    return StateTable(table * math.sqrt(width))


def draw_state(
    e: Float[Tensor, "batch token width"],
    positions: Int[Tensor, "#batch token"],
    initial: Float[Tensor, "batch token width"] | StateTable | RowStates | None,
    *,
    scale: float,
    warm: RecurrentCache | None,
) -> Float[Tensor, "batch token width"]:
    """s_0 of every token, in the embedding's number format.

    Args:
        e: the prelude's output, for shape and format.
        positions: of the tokens.
        initial: given states, or None to draw them.
        scale: multiplies the standard deviation of drawn states.
        warm: a cache whose last state the tokens begin from, if it has one.
    """
    if warm is not None and warm.last_state is not None:
        return warm.last_state.unsqueeze(1).expand_as(e)
    if isinstance(initial, StateTable):
        return initial.at(positions).to(e).expand_as(e)
    if isinstance(initial, RowStates):
        return initial.like(e).to(e)
    if initial is not None:
        return initial.to(e).expand_as(e)
    if scale == 0:
        return torch.zeros_like(e)
    std = math.sqrt(2 / (5 * e.shape[-1])) * scale
    drawn = torch.empty_like(e, dtype=torch.float32)
    nn.init.trunc_normal_(drawn, std=std, a=-CUT * std, b=CUT * std)
    return (drawn * math.sqrt(e.shape[-1])).to(e.dtype).detach()
