"""The bytes that a decoded token reads, and the time that they take.

Per layer and decoded token, in elements of the cache: dense attention reads keys and values of S tokens,
2 H S D; Loki reads d coordinates of all keys and both vectors of the selected, H (S d + 2 n D).
Singhania et al. 2024, section 4.2, give the ratio as d/(2D) + k_f.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fourfold_loki.budget import Budget
from fourfold_loki.huggingface.sites import head_width
from fourfold_loki.selectors import Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Something with memory that a decoded token is bound by."""

    name: str
    bytes_per_s: float
    source: str


DEVICES = (
    Device(
        name="two channels of DDR5-4800",
        bytes_per_s=76.8e9,
        source="2 x 8 bytes x 4.8e9 per second",
    ),
    Device(name="A100 80 GB SXM", bytes_per_s=2.039e12, source="NVIDIA A100 datasheet"),
    Device(name="H100 80 GB SXM", bytes_per_s=3.35e12, source="NVIDIA H100 datasheet"),
)
"""Peak bandwidths; kernels reach a part of them, dense and sparse ones alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a model that decide the traffic of a decoded token."""

    layers: int
    heads: int
    kv_heads: int
    head_width: int
    weights: int
    """Parameters that a token reads besides the cache."""
    bytes_each: int
    """Of a number, in weights and cache."""

    @classmethod
    def of(cls, config: Any, *, weights: int, bytes_each: int) -> "Shape":
        """From a model's (text) configuration."""
        return cls(
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_width=head_width(config),
            weights=weights,
            bytes_each=bytes_each,
        )

    def cache_bytes(self, tokens: int, *, share: float = 1.0, width: int = 0) -> float:
        """Read for one token of one sequence: `width` coordinates of all keys, a share of both vectors."""
        numbers = tokens * (width + 2 * share * self.head_width)
        return numbers * self.layers * self.kv_heads * self.bytes_each


def read_share(
    selector: Selector, budget: Budget, seen: Sequence[int], *, head_width: int, group: int
) -> float:
    """Elements that queries read over those of dense attention, before any is asked.

    Keys in full, the index of all keys, and tables; selection is shared in groups, and sequences begin at a
    page's beginning.

    Args:
        selector: ranks, and does not sample.
        budget: a Share or a Count.
        seen: keys that each query sees.
        head_width: numbers of a key.
        group: query heads of a key/value head.

    Raises:
        ValueError: for reads that depend on scores or chance.
    """
    if selector.samples or (budget.page > 1 and not budget.window):
        raise ValueError(
            f"the reads of {type(selector).__name__} in pages of {budget.page} with "
            f"window={budget.window} depend on chance or scores; count them while a model runs"
        )
    kept, page = 0, budget.page
    for tokens in seen:
        pages = math.ceil(tokens / page)
        units = min(budget.units(tokens), pages)
        # The window keeps the last page, which may be short, unless earlier ones fill the amount.
        forced = {*range(math.ceil(min(budget.sinks, tokens) / page))}
        forced |= {*range(max(0, tokens - budget.window) // page, pages)}
        kept += units * page - (-tokens % page if units >= len(forced) else 0)
    total = sum(seen)
    tables = selector.tables(head_width=head_width) * len(seen) / (2 * head_width * total)
    index = selector.cost(head_width=head_width, group=group) / 2
    return selector.of_kept * kept / total + index + tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One decoded token of a batch, bound by memory alone."""

    dense_s: float
    sparse_s: float

    @property
    def speedup(self) -> float:
        """Of the whole token, weights included."""
        return self.dense_s / self.sparse_s


def predict(
    shape: Shape, device: Device, *, tokens: int, batch: int, share: float, width: int
) -> Prediction:
    """Time of a token if every byte is read once, at the device's bandwidth; nothing else takes time."""

    def seconds(cache: float) -> float:
        return (shape.weights * shape.bytes_each + batch * cache) / device.bytes_per_s

    return Prediction(
        dense_s=seconds(shape.cache_bytes(tokens)),
        sparse_s=seconds(shape.cache_bytes(tokens, share=share, width=width)),
    )
