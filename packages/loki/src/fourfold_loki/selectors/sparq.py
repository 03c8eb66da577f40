"""SparQ: rank by the coordinates in which the query itself is large (Ribar et al. 2023)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fourfold_loki.attention import scores_of
from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class SparQ(Selector):
    """The `channels` coordinates of largest `|q|`, chosen by every query for itself."""

    channels: int

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(
                f"channels={self.channels} ranks by nothing; use 1 to the head's width"
            )

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """Scores of the query with its small coordinates set to zero, at the temperature of the paper.

        The temperature divides by the share of `|q|` that is left (Ribar et al. 2023, equation 5); it does
        not change a ranking but the mean over a group.

        Raises:
            ValueError: for more channels than a head has.
        """
        head_width = among.queries.shape[-1]
        if self.channels > head_width:
            raise ValueError(
                f"channels={self.channels} of a head of {head_width}; use 1 to {head_width}"
            )
        size = among.queries.abs()
        largest = size.topk(self.channels, dim=-1).indices
        kept = torch.zeros_like(among.queries).scatter(
            -1, largest, among.queries.gather(-1, largest)
        )
        left = kept.abs().sum(-1, keepdim=True) / size.sum(-1, keepdim=True).clamp(min=1e-12)
        return scores_of(kept / left.clamp(min=1e-12).sqrt(), among.keys, scaling=among.scaling)

    def cost(self, *, head_width: int, group: int) -> float:
        """Every query head of a group may choose other channels."""
        return min(1.0, self.channels * group / head_width)
