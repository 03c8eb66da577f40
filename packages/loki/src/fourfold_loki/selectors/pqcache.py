"""PQCache: rank by product-quantised keys (Zhang et al. 2024, arXiv 2407.12820).

A key is cut into parts, and each part is known by the nearest of 2^bits centroids (k-means over the keys of
the sequence). A query multiplies the centroids once; a key's score is the sum of its parts' entries.

Differences: the published code fits centroids to a prompt, in another process, and gives later keys their
nearest ones. Here each call fits to the keys that its first query sees, as a prompt's are before a block; a
server would keep centroids and codes. Lloyd's rounds are a fixed number. The sinks and the window that are
kept there are the budget's here.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fourfold_loki.attention import scores_of
from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class PQCache(Selector):
    """`parts` codes of `bits` bits a key."""

    parts: int = 2
    bits: int = 6
    rounds: int = 10
    """Of k-means."""
    seed: int = 0
    """Of the keys that centroids begin as."""

    def __post_init__(self) -> None:
        if self.parts < 1 or not 1 <= self.bits <= 16 or self.rounds < 0:
            raise ValueError(
                f"parts={self.parts} of bits={self.bits} after rounds={self.rounds}; use 1 part or more, 1 "
                "to 16 bits, 0 rounds or more"
            )

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """Scores with every part of a key replaced by its centroid.

        Raises:
            ValueError: for heads that do not divide into the parts.
        """
        head_width = among.keys.shape[-1]
        if head_width % self.parts:
            raise ValueError(
                f"parts={self.parts} of a head of {head_width}; use a number that divides it"
            )
        cut = among.keys.float().unflatten(-1, (self.parts, -1)).transpose(2, 3)
        seen = among.visible[:, 0, 0]
        coded = torch.stack(
            [
                quantised(keys, self._centroids(keys[:, :, visible]))
                for keys, visible in zip(cut, seen.expand(len(cut), -1), strict=True)
            ]
        )
        keys = coded.transpose(2, 3).flatten(3).to(among.keys.dtype)
        return scores_of(among.queries, keys, scaling=among.scaling)

    def _centroids(
        self, keys: Float[Tensor, "kv_heads part token width"]
    ) -> Float[Tensor, "kv_heads part centroid width"]:
        """K-means over the keys, begun at some of them; one key a centroid where there are no more."""
        tokens = keys.shape[2]
        generator = torch.Generator().manual_seed(self.seed)
        begun = torch.randperm(tokens, generator=generator)[: 2**self.bits]
        return lloyd(keys, keys[:, :, begun.to(keys.device)], rounds=self.rounds)

    def cost(self, *, head_width: int, group: int) -> float:
        """Codes, in numbers of 16 bits."""
        del group
        return min(1.0, self.parts * self.bits / 16 / head_width)

    def tables(self, *, head_width: int) -> float:
        """All centroids, for every query."""
        return 2.0**self.bits * head_width


def nearest(
    keys: Float[Tensor, "*parts token width"], centroids: Float[Tensor, "*parts centroid width"]
) -> Int[Tensor, "*parts token"]:
    """The centroid of least distance."""
    # |k|² is the same for all.
    return (centroids.square().sum(-1)[..., None, :] - 2 * keys @ centroids.mT).argmin(-1)


def lloyd(
    keys: Float[Tensor, "*parts token width"],
    centroids: Float[Tensor, "*parts centroid width"],
    *,
    rounds: int,
) -> Float[Tensor, "*parts centroid width"]:
    """Centroids moved to the mean of their keys, `rounds` times; those without keys stay."""
    for _ in range(rounds):
        # A product with ones and zeros: adding by places takes ten times as long on a CPU.
        codes = nearest(keys, centroids)[..., None]
        belongs = keys.new_zeros(*codes.shape[:-1], centroids.shape[-2]).scatter_(-1, codes, 1.0)
        count = belongs.sum(-2)[..., None]
        mean = belongs.mT @ keys / count.clamp(min=1)
        centroids = torch.where(count > 0, mean, centroids)
    return centroids


def quantised(
    keys: Float[Tensor, "kv_heads part token width"],
    centroids: Float[Tensor, "kv_heads part centroid width"],
) -> Float[Tensor, "kv_heads part token width"]:
    """Every key's centroids."""
    codes = nearest(keys, centroids)[..., None]
    return centroids.gather(-2, codes.expand(keys.shape))
