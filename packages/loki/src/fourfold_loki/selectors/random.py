"""Random keys: the floor that any selector must beat."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class Random(Selector):
    """Scores without meaning: a function of the seed, the layer and the number of keys."""

    seed: int

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """Uniform draws, other ones for every head and query."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + among.layer)
        heads, queries = among.queries.shape[1:3]
        shape = (among.queries.shape[0], heads, queries, among.keys.shape[2])
        return torch.rand(shape, generator=generator).to(among.queries)
