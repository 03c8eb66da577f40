"""vAttention: the heaviest keys, and a sample of the others that is large enough (Desai et al. 2025).

Sinks, window and the keys that `heavy` ranks first are read for certain. Of the M others, n at random stand
for all with weight M / n. What a sum of exp(score) over them misses has a spread that a first, small sample
tells, so n can be chosen such that, with D the denominator of attention over all keys,

    P(|D̂ - D| <= epsilon D) >= 1 - delta            n = (z σ M / (epsilon D̂))²      "normal"
                                                    n = M² R² ln(2/δ) / (2 ε² D²)   "hoeffding"

The first is the paper's, by the central limit theorem: it trusts the first sample, and keys can be made
that betray it. The second holds for any keys (Hoeffding, without replacement) where R bounds every
exp(score) that was not read, as the largest score of `heavy` does for Exact and for Quest; D is there what
was read already.

Differences: the published code throws the first sample away, draws with replacement, and takes z for a one-
sided error. Here the first sample is read for certain like the heavy keys (which leaves the estimate
unbiased), the second is drawn from the rest without replacement, and z is two-sided. Heads of a group draw
the same keys, as many as the head that needs most. The guarantee is of the denominator, as in the published
code.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fourfold_loki.budget import Budget
from fourfold_loki.selectors.base import Candidates, Selection, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class VAttention(Selector):
    """The budget is that of the heavy keys; the sample comes on top of it."""

    heavy: Selector
    """Ranks the keys that are read for certain."""
    epsilon: float
    """Relative error of the denominator."""
    delta: float
    """Probability of a larger one."""
    first: float = 0.02
    """Share of the other keys that the first sample reads."""
    fewest: int = 64
    """Keys of the first sample, at least; of 16 the spread is often far too small."""
    bound: Literal["normal", "hoeffding"] = "normal"
    seed: int = 0
    samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and 0 < self.delta < 1 and 0 <= self.first <= 1):
            raise ValueError(
                f"epsilon={self.epsilon}, delta={self.delta}, first={self.first}; use an error above 0, a "
                "probability between 0 and 1, and a share from 0 to 1"
            )
        if self.fewest < 2:
            raise ValueError(
                f"fewest={self.fewest} keys have no spread; use 2 or more, 64 to trust it"
            )
        kind = type(self.heavy)
        is_whole = kind.compared is Selector.compared and kind.of_kept == 1
        if not is_whole or kind.samples or kind.keeps_count:
            raise ValueError(
                f"heavy={kind.__name__} evicts, samples, or reads parts of vectors; use one that ranks "
                "keys to be read whole, such as Loki or Exact"
            )

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """Those of the heavy keys."""
        return self.heavy.scores(among)

    def ranks_by(self) -> Selector:
        """The selector of the heavy keys."""
        return self.heavy

    def select(self, among: Candidates, budget: Budget) -> Selection:
        """Heavy keys, the first sample, and the second with its weights.

        Raises:
            ValueError: for pages.
        """
        if budget.page > 1:
            raise ValueError(
                f"VAttention samples single keys, not pages of {budget.page}; use page=1"
            )
        ranking = self.heavy.scores(among)
        batch, kv_heads, tokens, head_width = among.keys.shape
        heads, queries = among.queries.shape[1:3]
        keep = budget.keep(ranking, among.visible, kv_heads=kv_heads, layer=among.layer)
        rows = keep.shape[1]
        rest = among.visible & ~keep
        others = rest.sum(-1)
        # 1. A random order of the others, the same for the heads of a group.
        place = int(among.visible[0, 0, 0].sum())
        mixed = 0
        for number in (self.seed, among.layer, tokens, place):
            mixed = (mixed * 1_000_003 + number) % 2**62
        generator = torch.Generator().manual_seed(mixed)
        order = torch.rand(batch, kv_heads, queries, tokens, generator=generator).to(rest.device)
        order = order.repeat_interleave(rows // kv_heads, 1).masked_fill(~rest, 2.0)
        ascending = order.sort(-1).values
        fewest = (others * self.first).ceil().long().clamp(min=self.fewest).minimum(others)
        known = keep | upto(order, ascending, fewest)
        # 2. What the first sample says of the rest.
        left = others - fewest
        count = self._enough(among, ranking, known=known, base=known & ~keep, left=left)
        if rows != heads:
            count = count.unflatten(1, (kv_heads, -1)).amax(2)
        count = count.clamp(min=fewest).minimum(left)
        read = keep | upto(order, ascending, fewest + count)
        weight = (left.clamp(min=1) / count.clamp(min=1)).log()[..., None].expand(read.shape)
        return Selection(
            keep=read,
            mass=among.past_mass,
            log_weights=weight.masked_fill(known | ~read, 0),
            looked_up=self.heavy.tables(head_width=head_width) * (batch * kv_heads * queries),
        )

    def _enough(
        self,
        among: Candidates,
        ranking: Float[Tensor, "batch heads query token"],
        *,
        known: Bool[Tensor, "batch ranked query token"],
        base: Bool[Tensor, "batch ranked query token"],
        left: Int[Tensor, "batch ranked query"],
    ) -> Int[Tensor, "batch heads query"]:
        """Keys of the second sample, of the `left` ones that are not known."""
        heads = among.queries.shape[1]

        def of_heads(rows: Tensor) -> Tensor:
            return rows.repeat_interleave(heads // rows.shape[1], 1)

        known, base, remaining = of_heads(known), of_heads(base), of_heads(left).double()
        scores = among.scores().double()
        shift = scores.masked_fill(~known, -math.inf).amax(-1, keepdim=True)
        weights = (scores - shift).masked_fill(~known, -math.inf).exp()
        sure = weights.sum(-1)
        size = base.sum(-1).clamp(min=2).double()
        mean = (weights * base).sum(-1) / size
        if self.bound == "normal":
            spread = (weights - mean[..., None]).square().mul(base).sum(-1) / (size - 1)
            allowed = self.epsilon * (sure + mean * remaining)
            needed = with_replacement(spread, remaining, allowed, chance=self.delta / 2)
            # Without replacement, all of them leave no error.
            needed = needed / (1 + needed / remaining.clamp(min=1))
        else:
            unread = among.visible & ~known
            most = ranking.double().masked_fill(~unread, -math.inf).amax(-1) - shift[..., 0]
            largest = most.exp() * remaining / (self.epsilon * sure)
            needed = largest.square() * math.log(2 / self.delta) / 2
        return needed.ceil().minimum(remaining).long()

    def cost(self, *, head_width: int, group: int) -> float:
        """That of the heavy keys."""
        return self.heavy.cost(head_width=head_width, group=group)


def with_replacement(
    variance: Float[Tensor, "*rows"],
    others: Float[Tensor, "*rows"],
    allowed: Float[Tensor, "*rows"],
    *,
    chance: float,
) -> Float[Tensor, "*rows"]:
    """Draws after which an estimated sum over `others` is `allowed` too large with a chance, at most."""
    z = NormalDist().inv_cdf(1 - chance)
    return variance * (z * others / allowed).square()


def upto(
    order: Float[Tensor, "*rows token"],
    ascending: Float[Tensor, "*rows token"],
    counts: Int[Tensor, "*rows"],
) -> Bool[Tensor, "*rows token"]:
    """The first keys of a random order."""
    last = ascending.gather(-1, (counts - 1).clamp(min=0)[..., None])
    return (order <= last) & (counts > 0)[..., None]
