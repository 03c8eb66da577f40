"""The part of the cache that a query may read, and the keys that it gets beside the best-ranked ones.

The same accounting for every selector: sinks, window and selection together never exceed the count.
"""

import math
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """As many keys as it takes for a bound on the error of a layer's output to hold, all where it takes all.

    The bound is never exceeded (`certificate.py`); it needs a selector that bounds scores: `Loki`, `Quest`
    and `Exact` do.
    """

    of_output: float
    """Norm of the error of a layer's heads, side by side before the output projection, over the norm of
    what attention to all keys gives. At 0 all keys are read."""

    def __post_init__(self) -> None:
        if not 0 <= self.of_output < 1:
            raise ValueError(
                f"of_output={self.of_output} is no error to ask for; use 0 (reads everything) or more, "
                "and less than 1, such as 0.01"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """The keys that a ranking gives a score at least, however many: one at least, sinks and window besides.

    The scale is the selector's. Where selection is shared in groups, a key is kept that any head keeps.
    """

    score: float

    def __post_init__(self) -> None:
        if math.isnan(self.score):
            raise ValueError("score=nan is above no score and below none; give a number")


Amount = Share | Count | Mass | Error | Threshold
Adaptive = Mass | Error | Threshold
"""Amounts that are known only when keys were scored."""


@dataclass(frozen=True, slots=True)
class WhereItPays:
    """The number of keys from which a short timing on this machine finds the selection faster than all keys.

    A session takes the timing when it begins (`kernels/choice.py`) and holds the number in its mode's budget.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The keys that a query may read in full."""

    amount: Amount
    sinks: int = 0
    """First visible tokens, kept before any other; they count. Where the amount is smaller than sinks and
    window together, as a Share of few keys may be, the earliest of them are kept."""
    window: int = 0
    """Last visible tokens, kept after the sinks and before any other; they count."""
    page: int = 1
    """Keys are kept in aligned runs of this many; a page ranks by its best key. A first or last page that
    is not full counts as a whole one. The amount is rounded down to pages, one at least, unless it holds
    all keys."""
    selection: Literal["shared in groups", "per head"] = "shared in groups"
    """The query heads of a key/value head keep the same keys, or each its own (the paper's way)."""
    dense_below: int | WhereItPays = 0
    """A query that sees fewer keys than this keeps all of them: attention is dense then, bit for bit."""

    def __post_init__(self) -> None:
        if not isinstance(self.amount, Share | Count | Mass | Error | Threshold):
            way_out = "Count(keys=...)" if isinstance(self.amount, int) else "Share(of_visible=...)"
            raise ValueError(
                f"amount={self.amount!r} may be a share or a number of keys; say which: amount={way_out}"
            )
        for field in ("sinks", "window", "dense_below"):
            if getattr(self, field) != WhereItPays() and getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} is negative; use 0 or more")
        if self.page < 1:
            raise ValueError(f"page={self.page} holds no key; use 1, or 16 to 64 for fast reading")
        forced = self._pages_of(self.sinks) + self._pages_of(self.window)
        if isinstance(self.amount, Count) and forced > self.amount.keys // self.page and forced:
            raise ValueError(
                f"sinks={self.sinks} and window={self.window} lie in up to {forced} pages of {self.page} "
                f"and exceed the {self.amount.keys} keys of the budget, so that some would be lost; keep "
                f"fewer of them, or {forced * self.page} keys"
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
        scores, allowed, counts = self.ranked(scores, visible, kv_heads=kv_heads, layer=layer)
        keep = most_relevant(scores, allowed, counts)
        # Back to keys; short queries keep all of theirs.
        if self.page > 1:
            keep = keep.repeat_interleave(self.page, dim=-1)[..., : visible.shape[-1]] & visible
        if self._dense_below():
            keep = keep | (visible & self.is_dense(visible.sum(-1))[..., None])
        return keep

    def ranked(
        self,
        scores: Float[Tensor, "batch heads query token"],
        visible: Bool[Tensor, " batch #heads query token"],
        *,
        kv_heads: int,
        layer: int,
    ) -> tuple[
        Float[Tensor, "batch ranked query unit"],
        Bool[Tensor, " batch #ranked query unit"],
        Int[Tensor, " batch #ranked query"],
    ]:
        """Scores of keys or pages, which of them may be read, and how many: what `keep` keeps."""
        # 1. Sinks and window.
        seen, forced = visible.sum(-1), self.forced(visible)
        # 2. Pages stand for their best key; from here on a unit is a key or a page.
        allowed = visible
        if self.page > 1:
            scores = self.paged(scores + shut(visible, scores.dtype))
            allowed, forced = self.paged(visible), self.paged(forced)
        if self.selection == "shared in groups" and scores.shape[1] != kv_heads:
            if isinstance(self.amount, Threshold):
                scores = scores.unflatten(1, (kv_heads, -1)).amax(2)
            else:
                scores = shared_in_groups(scores, allowed, kv_heads=kv_heads)
        # 3. Rank: what is forced comes before everything else, and counts.
        counts = self._counts(scores, allowed, forced, seen, layer)
        if self.sinks or self.window:
            scores = scores.masked_fill(forced, torch.inf)
        return scores, allowed, counts

    def forced(
        self, visible: Bool[Tensor, " batch #heads query token"]
    ) -> Bool[Tensor, " batch #heads query token"]:
        """Sinks and window, counted in visible keys, so that padding takes none of the budget."""
        position = visible.cumsum(-1)
        return visible & ((position <= self.sinks) | (position > position[..., -1:] - self.window))

    def is_dense_at(self, seen: int) -> bool:
        """True where a query that sees `seen` keys keeps all of them as too few."""
        return seen < self._dense_below()

    def is_dense(self, seen: Int[Tensor, "*queries"]) -> Bool[Tensor, "*queries"]:
        """`is_dense_at` of every query."""
        return seen < self._dense_below()

    def _dense_below(self) -> int:
        if isinstance(self.dense_below, WhereItPays):
            raise ValueError(
                "dense_below=WhereItPays() is known to a session, which times this machine; use the budget "
                "in `with loki(...)` or `with attending(...)`, or give a number of keys"
            )
        return self.dense_below

    def allowance(
        self, visible: Bool[Tensor, " batch #heads query token"]
    ) -> Int[Tensor, " batch #heads query"]:
        """Keys that each query may keep, for selectors that decide by it; all where ranking decides."""
        return self._allowed(visible.sum(-1))

    def units(self, seen: int) -> int:
        """Keys, or pages of them, that a query which sees `seen` keys from a page's beginning on reads.

        `_units` in plain numbers, which take a tenth of the time: every layer asks at every token.

        Raises:
            ValueError: for an amount that depends on the scores.
        """
        match self.amount:
            case Share(of_visible=share):
                allowed = max(1, int(seen * share))
            case Count(keys=keys):
                allowed = keys
            case Mass() | Error() | Threshold():
                raise ValueError(f"{self.amount} is not known before ranking; use Share or Count")
            case _:
                assert_never(self.amount)
        return max(1, allowed // self.page if allowed < seen else -(-seen // self.page))

    def _allowed(self, seen: Int[Tensor, "*queries"]) -> Int[Tensor, "*queries"]:
        match self.amount:
            case Share(of_visible=share):
                # In float64, as Python would: 0.29 of 100 keys are 28 there, and 29 in float32.
                return (seen.double() * share).long().clamp(min=1)
            case Count(keys=keys):
                return torch.full_like(seen, keys)
            case Mass() | Error() | Threshold():
                return seen
            case _:
                assert_never(self.amount)

    def _units(
        self, seen: Int[Tensor, "*queries"], pages: Int[Tensor, "*queries"]
    ) -> Int[Tensor, "*queries"]:
        """Keys or pages for queries that see `seen` keys in `pages`: one at least, all where allowed."""
        allowed = self._allowed(seen)
        return torch.where(allowed < seen, allowed // self.page, pages).clamp(min=1)

    def _counts(
        self,
        scores: Float[Tensor, "batch ranked query unit"],
        allowed: Bool[Tensor, " batch #ranked query unit"],
        forced: Bool[Tensor, " batch #ranked query unit"],
        seen: Int[Tensor, " batch #ranked query"],
        layer: int,
    ) -> Int[Tensor, " batch #ranked query"]:
        match self.amount:
            case Share() | Count():
                return self._units(seen, allowed.sum(-1) if self.page > 1 else seen)
            case Mass(claimed=claimed, floor=floor):
                weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
                ordered = weights.sort(-1, descending=True).values
                short = (ordered.cumsum(-1) < claimed[layer]).sum(-1)
                return (short + 1).clamp(min=-(-floor // self.page))
            case Threshold(score=least):
                return (allowed & ((scores >= least) | forced)).sum(-1).clamp(min=1)
            case Error():
                raise ValueError(
                    f"{self.amount} is kept by reading until a bound holds (certificate.read_until), and a "
                    "ranking alone bounds nothing; use Share, Count or Mass here"
                )
            case _:
                assert_never(self.amount)

    def _pages_of(self, tokens: int) -> int:
        """Pages that a run of tokens touches at most, wherever it begins."""
        return (tokens + 2 * self.page - 2) // self.page if tokens else 0

    def paged(self, keys: Tensor) -> Tensor:
        """The largest value of every page; a last page may be shorter."""
        lowest = False if keys.dtype == torch.bool else -torch.inf
        padded = F.pad(keys, (0, -keys.shape[-1] % self.page), value=lowest)
        return padded.unflatten(-1, (-1, self.page)).amax(-1)
