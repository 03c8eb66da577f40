"""The elements of the cache that queries read, counted while a model runs."""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from fourfold_loki.budget import Amount, Error
from fourfold_loki.certificate import Certificate
from fourfold_loki.huggingface.sites import head_width
from fourfold_loki.selectors import Selector


@dataclass(slots=True, kw_only=True)
class Reads:
    """Keys that queries saw, and keys that they read in full, counted while a model ran.

    Only of queries under a selection, those below `dense_below` included, and outside of compiled code.
    """

    ranking: float
    """Share of a full read of the keys that ranking them takes (`Selector.cost`)."""
    head_width: int = 1
    """Numbers of a key, and of a value."""
    of_kept: float = 1.0
    """Share of both vectors of a kept key that is read (`Selector.of_kept`)."""
    looked_up: float = 0.0
    """Numbers read of tables, summed (`Selection.looked_up`)."""
    kept: float = 0.0
    """Keys read, summed over queries and key/value heads (a key counts once for its group)."""
    seen: float = 0.0
    """Keys that could have been read, summed likewise."""
    queries: int = 0
    """Layer calls times queries."""

    error: float = 0.0
    """Largest bound on the relative error of a layer's output, where a budget bounds it."""
    unread: float = 0.0
    """Largest bound on the attention weight that a head did not read, likewise."""

    @classmethod
    def of(cls, config: Any, selector: Selector, amount: Amount) -> "Reads":
        """For a model's (text) configuration, who ranks, and how much is kept."""
        heads = config.num_attention_heads
        width = head_width(config)
        group = heads // config.num_key_value_heads
        if isinstance(amount, Error):
            # Certificates take the norms of values too.
            cost = selector.bounds_cost(head_width=width, group=group) + 1 / width
        else:
            cost = selector.cost(head_width=width, group=group)
        of_kept = 1.0 if isinstance(amount, Error) else selector.of_kept
        return cls(ranking=cost, head_width=width, of_kept=of_kept)

    def add_masks(
        self,
        keep: Bool[Tensor, "batch ranked query token"],
        visible: Bool[Tensor, " batch #ranked query token"],
        *,
        kv_heads: int,
    ) -> None:
        """Count one call of one layer: the union over the query heads of a group is what is read."""
        per_head = keep
        if keep.shape[1] > kv_heads:
            # `any` over an inner dim takes forty times as long on a CPU.
            per_head = reduce(torch.logical_or, keep.unflatten(1, (kv_heads, -1)).unbind(2))
        self.kept += float(per_head.count_nonzero()) * kv_heads / per_head.shape[1]
        self.seen += float(visible.count_nonzero()) * kv_heads / visible.shape[1]
        self.queries += keep.shape[0] * keep.shape[2]

    def add(self, *, kept: int, seen: int, rows: int) -> None:
        """Count one decoding call of one layer: `rows` queries; keys over all key/value heads."""
        self.kept += kept
        self.seen += seen
        self.queries += rows

    def certified(self, certificate: Certificate) -> None:
        """Note what one call of one layer could not have missed."""
        self.error = max(self.error, float(certificate.relative().amax()))
        self.unread = max(self.unread, float(certificate.unread.amax()))

    @property
    def share(self) -> float:
        """Share of the visible keys that was read in full."""
        return self.kept / self.seen if self.seen else 1.0

    @property
    def read_share(self) -> float:
        """Elements of the cache that were read over those of dense attention.

        The ranking is included for every query, as if those below `dense_below` were ranked too.
        """
        tables = self.looked_up / (2 * self.head_width * self.seen) if self.seen else 0.0
        return self.of_kept * self.share + self.ranking / 2 + tables

    def __add__(self, other: "Reads") -> "Reads":
        """Both together, of one selector."""
        return Reads(
            ranking=self.ranking,
            head_width=self.head_width,
            of_kept=self.of_kept,
            looked_up=self.looked_up + other.looked_up,
            kept=self.kept + other.kept,
            seen=self.seen + other.seen,
            queries=self.queries + other.queries,
            error=max(self.error, other.error),
            unread=max(self.unread, other.unread),
        )

    def __str__(self) -> str:
        """As printed after `generate`."""
        if not self.queries:
            return "counted nothing: no query came alone to a layer that selects, or the model was compiled"
        bounded = (
            f"; errors of outputs are at most {self.error:.2g}, relative" if self.error else ""
        )
        return (
            f"read {self.share:.1%} of the keys in full, and {self.read_share:.1%} of the elements that "
            f"dense attention reads, over {self.queries} queries and layers{bounded}"
        )
