"""One reading of the cache, as every twin takes it, and the choice of pages that twins share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRead:
    """The tokens that a cache holds, and the pages of them that one decoding query reads."""

    length: int
    """Tokens that the cache holds, at least one."""
    pages: int
    """Pages to read, at most as many as are held."""
    page: int
    """Tokens of a page."""
    sinks: int
    """First tokens whose pages are always read."""
    window: int
    """Last tokens whose pages are always read."""
    scaling: float
    """Of the scores."""


def chosen_pages(
    best: Float[Tensor, "stack group page_count"], read: PageRead
) -> Int[Tensor, "stack pages"]:
    """The pages that rank first, in the order in which they lie in memory.

    A group ranks by the sum of its heads' weights, in float64, where no weight that could matter vanishes:
    half of the time of a log of sums. A group of one ranks by its scores.
    """
    ranked = best[:, 0] if best.shape[1] == 1 else best.double().softmax(-1).sum(1)
    if read.sinks:
        ranked[:, : -(-read.sinks // read.page)] = torch.inf
    if read.window:
        ranked[:, max(0, read.length - read.window) // read.page :] = torch.inf
    return ranked.topk(read.pages, dim=-1, sorted=False).indices.sort(-1).values
