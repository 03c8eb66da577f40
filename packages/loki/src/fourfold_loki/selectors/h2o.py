"""H2O: keep the keys that were attended to most so far, and the recent ones (Zhang et al. 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(Selector):
    """Half the budget for heavy hitters, half for recent keys; what is evicted does not come back.

    The rule is the published one: every query adds its (full) attention weights to the account of the
    keys that survive; then all but the heaviest go.
    """

    keeps_count: ClassVar[bool] = True

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """+1 for kept keys and -inf for evicted ones, query by query in their order."""
        return self._followed(among)[0]

    def account(self, among: Candidates) -> Float[Tensor, "batch heads token"]:
        """What survives, with its mass; -inf marks what was evicted."""
        return self._followed(among)[1]

    def _followed(self, among: Candidates) -> tuple[Tensor, Tensor]:
        weights = among.scores().masked_fill(~among.visible, -torch.inf).softmax(-1).float()
        visible = among.visible.expand(weights.shape)
        mass = among.past_mass.float()
        position = visible.cumsum(-1)
        heavy = (among.allowance.expand(weights.shape[:-1]) // 2).clamp(min=1)
        recent = visible & (position > position[..., -1:] - heavy[..., None] - 1)
        kept = torch.empty_like(visible)
        for query in range(weights.shape[2]):
            kept[:, :, query], mass = _evict(
                mass, weights[:, :, query], visible[:, :, query], heavy[:, :, query]
            )
        scores = torch.where(kept | recent, 1.0, -torch.inf).to(among.queries.dtype)
        return scores, mass

    def cost(self, *, head_width: int, group: int) -> float:
        """Nothing: the account is a number a key."""
        del head_width, group
        return 0.0


def _evict(
    mass: Float[Tensor, "batch heads token"], weights: Tensor, visible: Tensor, heavy: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys kept for one query, and the account after it."""
    tokens = mass.shape[-1]
    index = torch.arange(tokens, device=mass.device)
    newest = torch.where(visible, index, -1).amax(-1, keepdim=True)
    within = visible.sum(-1, keepdim=True) <= heavy[..., None]
    before = mass.masked_fill(~visible | (index == newest), -torch.inf)
    spare = (heavy - 1).clamp(min=0)
    largest = int(spare.max())
    best = before.topk(min(max(largest, 1), tokens), dim=-1)
    rank_kept = torch.arange(best.indices.shape[-1], device=mass.device) < spare[..., None]
    kept = torch.zeros_like(visible).scatter(-1, best.indices, rank_kept)
    kept = (kept & (before > -torch.inf)) | (index == newest)
    kept = torch.where(within, visible, kept)
    survivors = kept | ~visible
    return kept, (mass + weights).masked_fill(~survivors, -torch.inf)
