"""Decoding on a GPU: four Triton kernels, for selection shared in groups.

    score   s[page]    the best ŝ of a page, for every query head; reads the leading coordinates once for
                       all heads of a group
    select             torch: heads are averaged and the best pages taken, on the device, without a sync
    gather  acc, m, l  attention over a part of the selected pages; key and value rows are read once for
                       all heads of a group, in one loop over one list of pages (online softmax)
    merge   out        the parts put together by their log-sum-exp

The group is padded to a power of two inside the kernels, so any number of query heads a key/value head
works. Everything is computed in float32, whatever the cache holds: the interpreter, which runs these kernels
on a CPU in tests, has no bfloat16 arithmetic.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fourfold_loki.cache import TILE
from fourfold_loki.kernels.page_read import PageRead, chosen_pages

SCORED = 128
"""Tokens that one program scores."""
PARTS = 8
"""Programs that share the selected pages of one key/value head (split-K)."""


@triton.jit
def score_kernel(
    queries,  # [stack, group, head_width]
    leading,  # [stack, tile, width, place]
    best,  # [stack, group, page_count]
    length,
    room,
    group: tl.constexpr,
    head_width: tl.constexpr,
    page_count,
    width: tl.constexpr,
    page: tl.constexpr,
    group_padded: tl.constexpr,
    width_padded: tl.constexpr,
    scored: tl.constexpr,
    tile: tl.constexpr,
):
    """The largest approximate score inside each page, for each query head of a group."""
    stack = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * scored + tl.arange(0, scored)
    head = tl.arange(0, group_padded)
    coordinate = tl.arange(0, width_padded)
    known = token < length
    keys = tl.load(
        leading
        + stack * room * width
        + ((token // tile)[None, :] * width + coordinate[:, None]) * tile
        + (token % tile)[None, :],
        mask=(coordinate < width)[:, None] & known[None, :],
        other=0.0,
    ).to(tl.float32)
    query = tl.load(
        queries + (stack * group + head[:, None]) * head_width + coordinate[None, :],
        mask=(head < group)[:, None] & (coordinate < width)[None, :],
        other=0.0,
    ).to(tl.float32)
    scores = tl.sum(query[:, :, None] * keys[None, :, :], axis=1)
    scores = tl.where(known[None, :], scores, float("-inf"))
    pages = tl.max(tl.reshape(scores, (group_padded, scored // page, page)), axis=2)
    place = tl.program_id(1) * (scored // page) + tl.arange(0, scored // page)
    tl.store(
        best + (stack * group + head[:, None]) * page_count + place[None, :],
        pages,
        mask=(head < group)[:, None] & (place < page_count)[None, :],
    )


@triton.jit
def gather_kernel(
    queries,  # [stack, group, head_width]
    keys,  # [stack, room, head_width]
    values,  # [stack, room, value_width]
    chosen,  # [stack, pages]
    output,  # [stack, part, group, value_width], not normalised
    largest,  # [stack, part, group]
    total,  # [stack, part, group]
    length,
    room,
    pages,
    parts,
    group: tl.constexpr,
    head_width: tl.constexpr,
    value_width: tl.constexpr,
    page: tl.constexpr,
    group_padded: tl.constexpr,
    head_padded: tl.constexpr,
    value_padded: tl.constexpr,
):
    """Attention of a group over one part of its pages, with a running maximum."""
    stack = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = tl.arange(0, group_padded)
    coordinate = tl.arange(0, head_padded)
    place = tl.arange(0, value_padded)
    query = tl.load(
        queries + (stack * group + head[:, None]) * head_width + coordinate[None, :],
        mask=(head < group)[:, None] & (coordinate < head_width)[None, :],
        other=0.0,
    ).to(tl.float32)
    running = tl.full((group_padded,), float("-inf"), tl.float32)
    weight = tl.zeros((group_padded,), tl.float32)
    summed = tl.zeros((group_padded, value_padded), tl.float32)
    for index in range(part, pages, parts):
        token = tl.load(chosen + stack * pages + index) * page + tl.arange(0, page)
        known = token < length
        key = tl.load(
            keys + (stack * room + token[:, None]) * head_width + coordinate[None, :],
            mask=known[:, None] & (coordinate < head_width)[None, :],
            other=0.0,
        ).to(tl.float32)
        scores = tl.sum(query[:, None, :] * key[None, :, :], axis=2)
        scores = tl.where(known[None, :], scores, float("-inf"))
        highest = tl.maximum(running, tl.max(scores, axis=1))
        shrink = tl.exp(running - highest)
        share = tl.exp(scores - highest[:, None])
        value = tl.load(
            values + (stack * room + token[:, None]) * value_width + place[None, :],
            mask=known[:, None] & (place < value_width)[None, :],
            other=0.0,
        ).to(tl.float32)
        weight = weight * shrink + tl.sum(share, axis=1)
        summed = summed * shrink[:, None] + tl.sum(share[:, :, None] * value[None, :, :], axis=1)
        running = highest
    row = (stack * parts + part) * group + head
    inside = head < group
    tl.store(largest + row, running, mask=inside)
    tl.store(total + row, weight, mask=inside)
    tl.store(
        output + row[:, None] * value_width + place[None, :],
        summed,
        mask=inside[:, None] & (place < value_width)[None, :],
    )


@triton.jit
def merge_kernel(
    parted,  # [stack, part, group, value_width]
    largest,  # [stack, part, group]
    total,  # [stack, part, group]
    merged,  # [stack, group, value_width]
    parts,
    group: tl.constexpr,
    value_width: tl.constexpr,
    parts_padded: tl.constexpr,
    value_padded: tl.constexpr,
):
    """Parts of one query head, weighted by their share of the softmax."""
    stack = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.arange(0, parts_padded)
    place = tl.arange(0, value_padded)
    row = (stack * parts + part) * group + head
    inside = part < parts
    highest = tl.load(largest + row, mask=inside, other=float("-inf"))
    weight = tl.exp(highest - tl.max(highest, axis=0))
    mass = tl.load(total + row, mask=inside, other=0.0)
    summed = tl.load(
        parted + row[:, None] * value_width + place[None, :],
        mask=inside[:, None] & (place < value_width)[None, :],
        other=0.0,
    )
    # Triton's stubs let `sum` be a tuple.
    result = tl.sum(summed * weight[:, None], axis=0) / tl.sum(mass * weight, axis=0)  # pyright: ignore[reportOperatorIssue]
    tl.store(
        merged + (stack * group + head) * value_width + place, result, mask=place < value_width
    )


def launch(kernel: Any, grid: tuple[int, int]) -> Any:
    """A kernel on its grid. Typed here, since a kernel's constants are declared as `constexpr`.

    Products and sums are fused, which Triton 3.10 no longer does unless it is asked.
    """
    return partial(kernel[grid], enable_fp_fusion=True)


def decode(
    queries: Float[Tensor, "batch heads 1 head_width"],
    keys: Float[Tensor, "batch kv_heads room head_width"],
    values: Float[Tensor, "batch kv_heads room value_width"],
    leading: Float[Tensor, "batch kv_heads tile width place"],
    read: PageRead,
) -> Float[Tensor, "batch heads 1 value_width"]:
    """As `cpu.decode`; pages are powers of two up to 128.

    Raises:
        ValueError: for another page.
    """
    if read.page not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError(f"page={read.page} on a GPU; use a power of two up to {SCORED}")
    batch, kv_heads, room, head_width = keys.shape
    width, stacks = leading.shape[3], batch * kv_heads
    packed = (queries * read.scaling).reshape(stacks, -1, head_width).contiguous()
    best = score_pages(
        packed, leading.view(stacks, -1, width, TILE), length=read.length, page=read.page
    )
    chosen = chosen_pages(best, read)
    output = attend_pages(
        packed,
        keys.view(stacks, room, head_width),
        values.view(stacks, room, -1),
        chosen,
        length=read.length,
        page=read.page,
    )
    return output.view(batch, -1, 1, values.shape[-1]).to(values.dtype)


def score_pages(
    queries: Float[Tensor, "stack group head_width"],
    leading: Float[Tensor, "stack tile width place"],
    *,
    length: int,
    page: int,
) -> Float[Tensor, "stack group page_count"]:
    """The best approximate score of every page, for every query head."""
    stacks, group, head_width = queries.shape
    width, room = leading.shape[2], leading.shape[1] * TILE
    count = -(-length // page)
    best = torch.empty(stacks, group, count, dtype=torch.float32, device=queries.device)
    launch(score_kernel, (stacks, -(-length // SCORED)))(
        queries,
        leading,
        best,
        length,
        room,
        group,
        head_width,
        count,
        width,
        page,
        triton.next_power_of_2(group),
        triton.next_power_of_2(width),
        SCORED,
        TILE,
    )
    return best


def attend_pages(
    queries: Float[Tensor, "stack group head_width"],
    keys: Float[Tensor, "stack room head_width"],
    values: Float[Tensor, "stack room value_width"],
    chosen: Int[Tensor, "stack pages"],
    *,
    length: int,
    page: int,
) -> Float[Tensor, "stack group value_width"]:
    """Attention over the chosen pages, each of which holds at least one token."""
    stacks, group, head_width = queries.shape
    pages, value_width = chosen.shape[1], values.shape[2]
    parts = min(PARTS, pages)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=queries.device)

    parted = empty(stacks, parts, group, value_width)
    largest, total = empty(stacks, parts, group), empty(stacks, parts, group)
    merged = empty(stacks, group, value_width)
    value_padded = triton.next_power_of_2(value_width)
    launch(gather_kernel, (stacks, parts))(
        queries,
        keys,
        values,
        chosen,
        parted,
        largest,
        total,
        length,
        keys.shape[1],
        pages,
        parts,
        group,
        head_width,
        value_width,
        page,
        triton.next_power_of_2(group),
        triton.next_power_of_2(head_width),
        value_padded,
    )
    launch(merge_kernel, (stacks, group))(
        parted,
        largest,
        total,
        merged,
        parts,
        group,
        value_width,
        triton.next_power_of_2(parts),
        value_padded,
    )
    return merged
