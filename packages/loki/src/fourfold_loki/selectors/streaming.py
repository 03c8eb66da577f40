"""StreamingLLM: the first tokens and the last ones, whatever they say (Xiao et al. 2023)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming(Selector):
    """`sinks` first visible tokens, then the most recent ones."""

    sinks: int

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} is negative; use 0 or more")

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """Recency, with the sinks above everything."""
        position = among.visible.cumsum(-1).float()  # bfloat16 tells no neighbours above 256 apart
        ranked = torch.where(position <= self.sinks, position + among.keys.shape[2], position)
        return ranked.expand(-1, among.queries.shape[1], -1, -1)
