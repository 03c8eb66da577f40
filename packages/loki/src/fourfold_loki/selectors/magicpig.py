"""MagicPIG: sample keys by locality-sensitive hashing, and weigh them (Chen et al. 2024, arXiv 2410.16179).

A hash is the signs of `bits` random projections. A query looks up its bucket in each of `hashes` tables and
reads the keys that share two buckets with it at least: `Threshold(score=2)`. For an angle θ between query
and key, one table agrees with probability w = (1 - θ/π)^bits, and the key is read with

    p = 1 - (1-w)^L - L w (1-w)^(L-1)

so its weight is exp(score) / p: numerator and denominator of attention are unbiased over the projections.
Keys are hashed less their mean, which moves all scores of a query alike.

Differences: the authors' reference adds 1e-4 to p and takes the mean over a prompt's keys once; here it is
over the keys that a call's first query sees. Tables hold 32-bit places of keys, counted as they are read;
projections are weights and are not counted, as the maps of a basis.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourfold_loki.budget import Budget, Threshold
from fourfold_loki.selectors.base import Candidates, Selection, Selector

LEAST = 1e-12
"""Probability of a key that is read; float64 holds its complement no better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MagicPIG(Selector):
    """`hashes` tables by `bits` signs: by a Threshold it samples, by a number of keys it ranks, evenly."""

    hashes: int = 75
    bits: int = 8
    seed: int = 0
    samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.hashes < 1 or not 1 <= self.bits <= 15:
            raise ValueError(
                f"hashes={self.hashes} of bits={self.bits}; use 1 table or more, 1 to 15 bits"
            )

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """The number of tables in which a key shares the query's bucket."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + among.layer)
        maps = torch.randn(among.keys.shape[-1], self.hashes * self.bits, generator=generator)
        queries = self.codes(among.queries, maps)
        group = among.queries.shape[1] // among.keys.shape[1]
        keys = self.codes(centred(among), maps).repeat_interleave(group, 1)
        shared = torch.zeros(
            *queries.shape[:3], keys.shape[2], dtype=torch.int16, device=keys.device
        )
        for table in range(self.hashes):
            shared += queries[..., table, None] == keys[:, :, None, :, table]
        return shared.float()

    def codes(
        self, vectors: Float[Tensor, "batch heads token head_width"], maps: Float[Tensor, "d bit"]
    ) -> Int[Tensor, "batch heads token table"]:
        """The bucket in each table."""
        signs = (vectors.float() @ maps.to(vectors.device)) > 0
        powers = 2 ** torch.arange(self.bits, dtype=torch.int16, device=vectors.device)
        packed = signs.unflatten(-1, (self.hashes, self.bits)).to(torch.int16) * powers
        return packed.sum(-1, dtype=torch.int16)

    def select(self, among: Candidates, budget: Budget) -> Selection:
        """The keys that share enough buckets, weighted.

        Raises:
            ValueError: for a threshold under which a key's probability is not its own.
        """
        scores = self.scores(among)
        heads, kv_heads = among.queries.shape[1], among.keys.shape[1]
        keep = budget.keep(scores, among.visible, kv_heads=kv_heads, layer=among.layer)
        read = float((scores * among.visible).sum())
        log_weights = None
        if isinstance(budget.amount, Threshold):
            if budget.page > 1 or (budget.selection != "per head" and heads != kv_heads):
                raise ValueError(
                    f"MagicPIG samples keys for each query head, and page={budget.page} with "
                    f"selection={budget.selection!r} would read others with them; use page=1 and "
                    "selection='per head'"
                )
            by_chance = (scores >= budget.amount.score) & ~budget.forced(among.visible)
            by_chance = by_chance & ~budget.is_dense(among.visible.sum(-1))[..., None]
            chance = self.chance(among, at_least=math.ceil(budget.amount.score))
            log_weights = -chance.log().masked_fill(~by_chance, 0).to(scores.dtype)
        return Selection(
            keep=keep, mass=among.past_mass, log_weights=log_weights, looked_up=2 * read
        )

    def chance(
        self, among: Candidates, *, at_least: int
    ) -> Float[Tensor, "batch heads query token"]:
        """Probability over the projections that a key shares `at_least` buckets with the query."""
        group = among.queries.shape[1] // among.keys.shape[1]
        keys = torch.nn.functional.normalize(centred(among).double(), dim=-1)
        queries = torch.nn.functional.normalize(among.queries.double(), dim=-1)
        cosine = queries @ keys.repeat_interleave(group, 1).mT
        once = (1 - cosine.clamp(-1, 1).acos() / math.pi) ** self.bits
        fewer = torch.zeros_like(once)
        for count in range(min(at_least, self.hashes + 1)):
            ways = math.comb(self.hashes, count)
            fewer += ways * once**count * (1 - once) ** (self.hashes - count)
        return (1 - fewer).clamp(min=LEAST)


def centred(among: Candidates) -> Float[Tensor, "batch kv_heads token head_width"]:
    """Keys less the mean of those that the first query sees."""
    seen = among.visible[:, :1, 0, :, None]
    keys = among.keys.float()
    mean = (keys * seen).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
    return keys - mean
