"""H2O: keep the keys that were attended to most so far, and the recent ones (Zhang et al. 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourfold_loki.attention import shut
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
        return self.follow(among)[0]

    def follow(
        self, among: Candidates
    ) -> tuple[Float[Tensor, "batch heads query token"], Float[Tensor, "batch heads token"]]:
        """The scores, and what survives with its mass; -inf marks what was evicted."""
        weights = (among.scores() + shut(among.visible, among.queries.dtype)).softmax(-1).float()
        batch, heads, queries, tokens = weights.shape
        position = among.visible.cumsum(-1)
        seen = position[..., -1]
        heavy = (among.allowance // 2).clamp(min=1).expand(seen.shape)
        if bool((seen != seen[:1, :1]).any()):
            raise ValueError(
                "H2O evicts at the same time in all sequences of a batch; use sequences of one length"
            )
        recent = among.visible & (position > (seen - heavy - 1)[..., None])
        kept = torch.zeros_like(weights, dtype=torch.bool)
        mass = among.past_mass.float()
        before = int(seen[0, 0, 0]) - 1
        survivors = int((mass[0, 0, :before] > -torch.inf).sum())
        # Survivors as lists: their places in the cache, and their mass.
        places = mass[..., :before].topk(survivors, dim=-1).indices
        weight = mass.gather(-1, places)
        # Query by query, since what one evicts the next can no longer see: let the newest key in and the
        # lightest out, then credit the survivors with this query's weights.
        for query in range(queries):
            newest, room = before + query, int(heavy[0, 0, query])
            places, weight = _evict(places, weight, newest=newest, room=room)
            weight = weight + weights[:, :, query].gather(-1, places)
            kept[:, :, query].scatter_(-1, places, True)
        scores = torch.where(kept | recent, 1.0, -torch.inf).to(among.queries.dtype)
        gone = torch.full((batch, heads, tokens), -torch.inf, device=mass.device)
        gone[..., before + queries :] = 0.0
        return scores, gone.scatter(-1, places, weight)

    def cost(self, *, head_width: int, group: int) -> float:
        """Nothing: the account is a number a key."""
        del head_width, group
        return 0.0


def _evict(
    places: Int[Tensor, "batch heads survivor"],
    weight: Float[Tensor, "batch heads survivor"],
    *,
    newest: int,
    room: int,
) -> tuple[Tensor, Tensor]:
    """Let the newest key in, and the lightest out, so that at most `room` remain."""
    entering = places.new_full((*places.shape[:-1], 1), newest)
    nothing = weight.new_zeros((*places.shape[:-1], 1))
    if places.shape[-1] == room:
        lightest = weight.argmin(-1, keepdim=True)
        return places.scatter(-1, lightest, entering), weight.scatter(-1, lightest, nothing)
    if places.shape[-1] > room:
        weight, chosen = weight.topk(room - 1, dim=-1)
        places = places.gather(-1, chosen)
    return torch.cat([places, entering], -1), torch.cat([weight, nothing], -1)
