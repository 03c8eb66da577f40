"""How much of the cache a query may read, and which keys it gets beside the best-ranked ones.

The same accounting for every selector: sinks, window and selection together never exceed the count.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fourfold_loki.attention import most_relevant, shared_in_groups, shut


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share of the keys that the query may see, at least one (k_f in the paper)."""

    of_visible: float

    def __post_init__(self) -> None:
        if not 0 < self.of_visible <= 1:
            raise ValueError(
                f"of_visible={self.of_visible} is no share of the keys; use more than 0 and at most 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """A fixed number of keys; the published code fixes k_f times the prompt's length."""

    keys: int

    def __post_init__(self) -> None:
        if self.keys < 1:
            raise ValueError(f"keys={self.keys} leaves nothing to attend to; use 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mass:
    """As many keys as hold a share of the attention mass that the ranking claims (top-p).

    A ranking from few coordinates overrates its favourites, so `claimed` is larger than the mass that is
    wanted; `tune.calibrated_mass` measures by how much, layer by layer.
    """

    claimed: tuple[float, ...]
    """One a layer."""
    floor: int
    """Keys that every query gets."""

    def __post_init__(self) -> None:
        wrong = [share for share in self.claimed if not 0 < share <= 1]
        if wrong or not self.claimed:
            raise ValueError(
                f"claimed={self.claimed} must hold shares above 0 and at most 1, one a layer"
            )
        if self.floor < 1:
            raise ValueError(f"floor={self.floor} may leave a query without keys; use 1 or more")


Amount = Share | Count | Mass


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a query may read in full."""

    amount: Amount
    sinks: int = 0
    """First visible tokens that are always kept; they count."""
    window: int = 0
    """Last visible tokens that are always kept; they count."""
    page: int = 1
    """Keys are kept in aligned runs of this many; a page ranks by its best key. A last page that is not
    full yet counts as a whole one."""
    selection: Literal["shared in groups", "per head"] = "shared in groups"
    """Whether the query heads of one key/value head keep the same keys."""
    dense_below: int = 0
    """A query that sees fewer keys than this keeps all of them."""

    def __post_init__(self) -> None:
        for field in ("sinks", "window", "dense_below"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} is negative; use 0 or more")
        if self.page < 1:
            raise ValueError(f"page={self.page} holds no key; use 1, or 16 to 64 for fast reading")
        if isinstance(self.amount, Count) and self.sinks + self.window > self.amount.keys:
            raise ValueError(
                f"sinks={self.sinks} and window={self.window} exceed the {self.amount.keys} keys of the "
                "budget, and nothing would be ranked; keep fewer of them, or more keys"
            )

    def check_fits(self, context: int) -> None:
        """Refuse a fixed count that a context cannot hold.

        Raises:
            ValueError: where the count exceeds the context.
        """
        if isinstance(self.amount, Count) and self.amount.keys > context:
            raise ValueError(
                f"a budget of {self.amount.keys} keys exceeds the context of {context}; "
                f"use Count(keys={context}) or fewer, or a Share"
            )

    def keep(
        self,
        scores: Float[Tensor, "batch heads query token"],
        visible: Bool[Tensor, " batch #heads query token"],
        *,
        kv_heads: int,
        layer: int,
    ) -> Bool[Tensor, "batch ranked query token"]:
        """The keys that each query reads, one row a query head or a key/value head."""
        position = visible.cumsum(-1)
        seen = position[..., -1:]
        forced = visible & ((position <= self.sinks) | (position > seen - self.window))
        allowed = visible
        if self.page > 1:
            scores = self._paged(scores + shut(visible, scores.dtype))
            allowed, forced = self._paged(visible), self._paged(forced)
        if self.selection == "shared in groups" and scores.shape[1] != kv_heads:
            scores = shared_in_groups(scores, allowed, kv_heads=kv_heads)
        counts = self._counts(scores, allowed, seen[..., 0], layer)
        if self.sinks or self.window:
            scores = scores.masked_fill(forced, torch.inf)
        keep = most_relevant(scores, allowed, counts)
        if self.page > 1:
            keep = keep.repeat_interleave(self.page, dim=-1)[..., : visible.shape[-1]] & visible
        if self.dense_below:
            keep = keep | (visible & (seen < self.dense_below))
        return keep

    def allowance(
        self, visible: Bool[Tensor, " batch #heads query token"]
    ) -> Int[Tensor, " batch #heads query"]:
        """Keys that each query may keep, for selectors that decide by it; all where ranking decides."""
        seen = visible.sum(-1)
        match self.amount:
            case Share(of_visible=share):
                return (seen * share).long().clamp(min=1)
            case Count(keys=keys):
                return torch.full_like(seen, keys)
            case Mass():
                return seen
            case _:
                assert_never(self.amount)

    def units(self, seen: int) -> int:
        """Keys, or pages of them, that a query which sees `seen` keys reads; at least one.

        Raises:
            ValueError: for an amount that depends on the scores.
        """
        match self.amount:
            case Share(of_visible=share):
                return max(1, int(seen * share) // self.page)
            case Count(keys=keys):
                return max(1, min(keys, seen) // self.page)
            case Mass():
                raise ValueError(f"{self.amount} is not known before ranking; use Share or Count")
            case _:
                assert_never(self.amount)

    def _counts(
        self,
        scores: Float[Tensor, "batch ranked query unit"],
        allowed: Bool[Tensor, " batch #ranked query unit"],
        seen: Int[Tensor, " batch #ranked query"],
        layer: int,
    ) -> Int[Tensor, " batch #ranked query"]:
        match self.amount:
            case Share(of_visible=share):
                return (seen * share).long().clamp(min=1) // self.page
            case Count(keys=keys):
                return torch.full_like(seen, keys) // self.page
            case Mass(claimed=claimed, floor=floor):
                weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
                ordered = weights.sort(-1, descending=True).values
                short = (ordered.cumsum(-1) < claimed[layer]).sum(-1)
                return (short + 1).clamp(min=-(-floor // self.page))
            case _:
                assert_never(self.amount)

    def _paged(self, keys: Tensor) -> Tensor:
        """The largest value of every page; a last page may be shorter."""
        lowest = False if keys.dtype == torch.bool else -torch.inf
        padded = F.pad(keys, (0, -keys.shape[-1] % self.page), value=lowest)
        return padded.unflatten(-1, (-1, self.page)).amax(-1)
