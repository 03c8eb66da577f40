"""Where the recurrence begins: a random state, a table of them, or the last token's thought."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

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

    def of(self, batch: int, tokens: int, width: int) -> Float[Tensor, "batch token width"]:
        """States for a batch of as many rows, drawn on the CPU.

        Raises:
            ValueError: where the rows are others.
        """
        if len(self.seeds) != batch:
            raise ValueError(f"{len(self.seeds)} seeds for {batch} rows; give one for each row")
        std = math.sqrt(2 / (5 * width))
        drawn = torch.empty(batch, tokens, width)
        for row, seed in zip(drawn, self.seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            nn.init.trunc_normal_(row, std=std, a=-CUT * std, b=CUT * std, generator=generator)
        return drawn * math.sqrt(width)


def state_table(positions: int, width: int, *, seed: int) -> StateTable:
    """A table drawn from the initial law N(0, 2/5), cut at three standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    std = math.sqrt(2 / (5 * width))
    table = torch.empty(positions, width)
    nn.init.trunc_normal_(table, std=std, a=-CUT * std, b=CUT * std, generator=generator)
    return StateTable(table * math.sqrt(width))


def draw_state(
    like: Float[Tensor, "batch token piece"],
    positions: Int[Tensor, "#batch token"],
    initial: Float[Tensor, "#batch #token width"] | StateTable | RowStates | None,
    *,
    width: int,
    scale: float = 1.0,
) -> Float[Tensor, "batch token width"]:
    """s_0 of every token, in the embedding's number format.

    Args:
        like: the prelude's output, for batch, tokens and format; on a grid, a piece of its features.
        positions: of the tokens.
        initial: given states, or None to draw them.
        width: of the whole residual stream.
        scale: multiplies the standard deviation of drawn states.

    Raises:
        ValueError: for states of other rows, tokens or width.
    """
    batch, tokens = like.shape[:2]
    if isinstance(initial, StateTable):
        given = initial.at(positions)
    elif isinstance(initial, RowStates):
        given = initial.of(batch, tokens, width)
    elif isinstance(initial, Tensor):
        given = initial
    elif initial is not None:
        raise ValueError(
            f"initial_state={initial!r} holds no states; give a tensor, a StateTable or RowStates"
        )
    elif scale == 0:
        given = like.new_zeros(batch, tokens, width)
    else:
        std = math.sqrt(2 / (5 * width)) * scale
        drawn = torch.empty(batch, tokens, width, device=like.device)
        nn.init.trunc_normal_(drawn, std=std, a=-CUT * std, b=CUT * std)
        given = drawn * math.sqrt(width)
    try:
        return given.to(like).expand(batch, tokens, width)
    except RuntimeError as error:
        raise ValueError(
            f"initial_state of shape {tuple(given.shape)} for {batch} rows of {tokens} tokens and width "
            f"{width}; give ({batch}, {tokens}, {width}), with ones where it is the same for all"
        ) from error
