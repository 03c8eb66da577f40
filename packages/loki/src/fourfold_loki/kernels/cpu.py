"""Decoding on a CPU: rank pages in one sweep, copy the best ones together, attend.

What makes it fast (benchmarks/loki_decode.py): the leading coordinates lie apart and in tiles; the query
heads of a group are one matrix; pages are rows of a flattened view, since `index_select` copies rows and
`gather` moves single numbers, ten to a hundred times slower; a head's pages are copied into the same small
buffer as those of the head before, so that they are still in the processor's cache when they are multiplied.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fourfold_loki.cache import TILE
from fourfold_loki.kernels.page_read import PageRead, chosen_pages


def decode(
    queries: Float[Tensor, "batch heads 1 head_width"],
    keys: Float[Tensor, "batch kv_heads room head_width"],
    values: Float[Tensor, "batch kv_heads room value_width"],
    leading: Float[Tensor, "batch kv_heads tile width place"],
    read: PageRead,
) -> Float[Tensor, "batch heads 1 value_width"]:
    """Loki for one query a sequence, with selection shared in groups.

    Args:
        queries: in the basis of the layer.
        keys: in the basis, with room for more than `read.length` tokens; a multiple of `page`.
        values: as cached.
        leading: the first coordinates of the keys, in tiles; see `cache`.
        read: which tokens are held, and how many pages of them to read.
    """
    batch, kv_heads, room, head_width = keys.shape
    width, stacks = leading.shape[3], batch * kv_heads
    page, length = read.page, read.length
    group = queries.shape[1] // kv_heads
    packed = (queries * read.scaling).reshape(stacks, group, head_width)
    # 1. Rank: score all tokens by their leading coordinates; a page ranks by its best token.
    whole = -(-length // page)
    tiles = leading.view(stacks, room // TILE, width, TILE)[:, : -(-whole * page // TILE)]
    scores = (packed[:, None, :, :width] @ tiles).transpose(1, 2).flatten(2)[..., : whole * page]
    if whole * page != length:
        scores[..., length:] = -torch.inf
    # Pooling takes half of the time of `amax` over a dim of 16.
    chosen = chosen_pages(F.max_pool1d(scores.float(), page), read)
    # 2. Attend, one key/value head after the other: copy its pages together, multiply, weigh the values.
    value_width = values.shape[-1]
    some_keys = keys.new_empty(read.pages, page * head_width)
    some_values = values.new_empty(read.pages, page * value_width)
    output = values.new_empty(stacks, group, value_width)
    for stack, (own, all_keys, all_values) in enumerate(
        zip(
            chosen,
            keys.view(stacks, room // page, page * head_width),
            values.view(stacks, room // page, page * value_width),
            strict=True,
        )
    ):
        torch.index_select(all_keys, 0, own, out=some_keys)
        exact = packed[stack] @ some_keys.view(-1, head_width).mT
        # Sorted, so that only the last page can reach beyond the end.
        if ahead := max(0, (int(own[-1]) + 1) * page - length):
            exact[:, -ahead:] = -torch.inf
        weights = exact.softmax(-1, dtype=torch.float32).to(values.dtype)
        torch.index_select(all_values, 0, own, out=some_values)
        torch.mm(weights, some_values.view(-1, value_width), out=output[stack])
    return output.view(*queries.shape[:3], value_width)


def dense_sdpa(
    queries: Float[Tensor, "batch heads 1 head_width"],
    keys: Float[Tensor, "batch kv_heads room head_width"],
    values: Float[Tensor, "batch kv_heads room value_width"],
    *,
    length: int,
    scaling: float,
) -> Float[Tensor, "batch heads 1 value_width"]:
    """`dense` by torch's fused attention."""
    packed = queries.reshape(*keys.shape[:2], -1, keys.shape[3])
    filled = keys[:, :, :length], values[:, :, :length]
    output = F.scaled_dot_product_attention(packed, *filled, scale=scaling)
    return output.reshape(*queries.shape[:3], values.shape[-1])


def dense(
    queries: Float[Tensor, "batch heads 1 head_width"],
    keys: Float[Tensor, "batch kv_heads room head_width"],
    values: Float[Tensor, "batch kv_heads room value_width"],
    *,
    length: int,
    scaling: float,
) -> Float[Tensor, "batch heads 1 value_width"]:
    """Full attention with the query heads of a group as one matrix."""
    batch, kv_heads, room, head_width = keys.shape
    group = queries.shape[1] // kv_heads
    packed = (queries * scaling).reshape(batch * kv_heads, group, head_width)
    filled = keys.view(batch * kv_heads, room, head_width)[:, :length]
    weights = (packed @ filled.mT).softmax(-1, dtype=torch.float32).to(values.dtype)
    output = weights @ values.view(batch * kv_heads, room, values.shape[-1])[:, :length]
    return output.view(*queries.shape[:3], values.shape[-1])


DENSE = {"two products": dense, "fused attention": dense_sdpa}
"""Full attention by the names that records have for it."""
