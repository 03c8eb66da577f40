"""The beginning of the recurrence: s_0 ~ N(0, 2/5), cut at three standard deviations.

In training every state is drawn anew. In evaluation a state is by default a function of its token and the
token's position: as random from token to token, and the same in every call, whatever else the batch holds,
with a cache and without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

CUT = 3.0
"""Standard deviations at which drawn states are cut, as published."""
_ODD = (-0x4B47D0C5A8F3F2E5, 0x2545F4914F6CDD1D, -0x3504F333F9DE6485, -0x61C8864680B583EB)
"""Odd numbers of 64 bits, far from small multiples of one another: token, position, seed, feature."""


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
class TokenStates:
    """Initial states that are functions of each token and its position; the default in evaluation.

    Embeddings that are given in place of tokens get states by position alone.
    """

    seed: int = 0
    """Another seed, other states."""

    def of(
        self, tokens: Int[Tensor, "batch token"], positions: Int[Tensor, "#batch token"], width: int
    ) -> Float[Tensor, "batch token width"]:
        """The states, float32, the same on every device up to rounding."""
        token, position, seed, feature = _ODD
        features = torch.arange(width, device=tokens.device) * feature
        # Python's numbers do not wrap around by themselves, as a tensor's do.
        origin = (self.seed * seed + 2**63) % 2**64 - 2**63
        # Servers count in 32 bits.
        bits = (tokens.long() * token + positions.long() * position + origin).unsqueeze(
            -1
        ) + features
        # The finalizer of SplitMix64 (Steele, Lea, Flood 2014); products wrap around. Torch shifts copies of
        # the sign in, which the mask takes out again.
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * factor
        uniform = ((bits >> 40).float() + 0.5) * (math.erf(CUT / math.sqrt(2)) / 2**23)
        return torch.erfinv(uniform) * math.sqrt(2 * 2 / 5)


@dataclass(frozen=True, slots=True)
class FreshNoise:
    """States drawn anew in every pass from torch's global generator: as in training, and as published."""


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


InitialState = (
    Float[Tensor, "#batch #token width"] | TokenStates | FreshNoise | StateTable | RowStates
)
"""Choices of s_0: given by tensor, by position or by row, or drawn."""


def draw_state(
    like: Float[Tensor, "batch token piece"],
    tokens: Int[Tensor, "batch token"] | None,
    positions: Int[Tensor, "#batch token"],
    initial: InitialState,
    *,
    width: int,
    scale: float = 1.0,
) -> Float[Tensor, "batch token width"]:
    """s_0 of every token, in the embedding's number format.

    Args:
        like: the prelude's output, for batch, tokens and format; on a grid, a piece of its features.
        tokens: of the pass; None where it was given embeddings.
        positions: of the tokens.
        initial: given states, or how to draw them.
        width: of the whole residual stream.
        scale: multiplies the standard deviation of drawn states.

    Raises:
        ValueError: for states of other rows, tokens or width.
    """
    batch, length = like.shape[:2]
    if isinstance(initial, StateTable):
        given = initial.at(positions)
    elif isinstance(initial, RowStates):
        given = initial.of(batch, length, width)
    elif isinstance(initial, Tensor):
        given = initial
    elif not isinstance(initial, TokenStates | FreshNoise):
        raise ValueError(
            f"initial_state={initial!r} holds no states; give a tensor, TokenStates, FreshNoise, a "
            "StateTable or RowStates"
        )
    elif scale == 0:
        given = like.new_zeros(batch, length, width)
    elif isinstance(initial, TokenStates):
        tokens = positions.new_zeros(batch, length) if tokens is None else tokens
        given = initial.of(tokens, positions, width) * scale
    else:
        std = math.sqrt(2 / (5 * width)) * scale
        drawn = torch.empty(batch, length, width, device=like.device)
        nn.init.trunc_normal_(drawn, std=std, a=-CUT * std, b=CUT * std)
        given = drawn * math.sqrt(width)
    try:
        return given.to(like).expand(batch, length, width)
    except RuntimeError as error:
        raise ValueError(
            f"initial_state of shape {tuple(given.shape)} for {batch} rows of {length} tokens and width "
            f"{width}; give ({batch}, {length}, {width}), with ones where it is the same for all"
        ) from error
