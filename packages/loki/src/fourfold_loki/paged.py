"""Paged, append-only storage with block tables, as servers hold caches: fixed shapes, no copy on growth.

A layer's keys, values and leading coordinates lie in pools of blocks; a table, shared by the layers, says
which block holds which tokens of a sequence. Blocks are handed out as sequences grow and come back when they
end; sequences with the same beginning may share its whole blocks, to which nobody writes again. Selection
looks up the leading coordinates through the table, ranks pages, and reads those alone, as many as the budget
allows at the capacity: every step has the same shapes, so that one compiled graph serves every length.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fourfold_loki.attention import Rotation, attend, shut
from fourfold_loki.budget import Budget
from fourfold_loki.cache import LokiCache, LokiLayer, check_open


class BlockTable:
    """The blocks of every sequence, and the free ones."""

    def __init__(self, *, rows: int, capacity: int, block: int, blocks: int | None = None) -> None:
        """Room for `rows` sequences of up to `capacity` tokens, in `blocks` of `block` tokens.

        Without a number of blocks there are enough for all rows at capacity.

        Raises:
            ValueError: for sizes that hold nothing.
        """
        if min(rows, capacity, block) < 1:
            raise ValueError(
                f"rows={rows}, capacity={capacity} and block={block} hold nothing; use 1 or more"
            )
        a_row = -(-capacity // block)
        self.block = block
        self.blocks = rows * a_row if blocks is None else blocks
        self.places = torch.zeros(rows, a_row, dtype=torch.long)
        """The block that holds the tokens `block * i` to `block * (i + 1)` of a row."""
        self._held: list[list[int]] = [[] for _ in range(rows)]
        self._uses = [0] * self.blocks
        self._free = list(range(self.blocks))[::-1]

    @property
    def capacity(self) -> int:
        """Tokens of a row, at most."""
        return self.places.shape[1] * self.block

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    def reserve(self, row: int, tokens: int) -> None:
        """See that a row has blocks for its first `tokens` tokens.

        Raises:
            ValueError: where they exceed the capacity, or no block is free.
        """
        if tokens > self.capacity:
            raise ValueError(
                f"{tokens} tokens exceed the capacity of {self.capacity} of row {row}; make the cache "
                "with a larger one"
            )
        held = self._held[row]
        missing = -(-tokens // self.block) - len(held)
        if missing > len(self._free):
            raise ValueError(
                f"row {row} needs {missing} more blocks and {len(self._free)} of {self.blocks} are free; "
                "release a row, or make the cache with more blocks"
            )
        for _ in range(missing):
            self._take(row, self._free.pop())

    def share(self, row: int, other: int, tokens: int) -> None:
        """Let an empty row begin with the first `tokens` tokens of another, without a copy.

        Raises:
            ValueError: where the row holds something, or the tokens do not fill whole blocks of the other.
        """
        count, rest = divmod(tokens, self.block)
        if self._held[row] or rest or count > len(self._held[other]):
            raise ValueError(
                f"row {row} with {len(self._held[row])} blocks cannot begin with {tokens} tokens of row "
                f"{other} with {len(self._held[other])} blocks of {self.block}; release it first, and share "
                "whole blocks"
            )
        for place in self._held[other][:count]:
            self._take(row, place)

    def release(self, row: int) -> None:
        """Give the blocks of a row back; those that another row shares stay."""
        for place in self._held[row]:
            self._uses[place] -= 1
            if not self._uses[place]:
                self._free.append(place)
        self._held[row].clear()
        self.places[row] = 0

    def _take(self, row: int, place: int) -> None:
        self.places[row, len(self._held[row])] = place
        self._held[row].append(place)
        self._uses[place] += 1

    def to(self, device: torch.device) -> None:
        """Move the table beside the pools."""
        self.places = self.places.to(device)


class PagedLayer(LokiLayer):
    """One layer's pools. `update` returns the new keys and values; `paged_attention` reads the pools."""

    is_compileable = True

    def __init__(
        self, rotation: Rotation, width: int, *, table: BlockTable, is_open: Callable[[], bool]
    ) -> None:
        super().__init__(rotation, width, capacity=table.capacity, is_open=is_open)
        self.table = table
        self.lengths = torch.zeros(len(table.places), dtype=torch.long)
        """Tokens that each row holds."""
        self.shortest = 0
        """The least of them."""

    def _allocate(self, batch: int, room: int, value_width: int) -> None:
        del room
        if batch != len(self.lengths):
            raise ValueError(
                f"{batch} sequences for a paged cache of {len(self.lengths)} rows; make it with rows={batch}"
            )
        kv_heads, head_width = self.rotation.key_map.shape[0], self.rotation.key_map.shape[-1]

        def pool(*shape: int) -> Tensor:
            return torch.zeros(
                self.table.blocks, kv_heads, *shape, dtype=self.dtype, device=self.device
            )

        block = self.table.block
        self.keys, self.values = pool(block, head_width), pool(block, value_width)
        self.leading = pool(self.width, block)
        self.lengths = self.lengths.to(self.device)
        self.table.to(self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t v"]]:
        """Turn the new keys and put them into the rows' blocks; gives the new ones back, turned."""
        del args, kwargs
        check_open("a paged cache", self._is_open)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        if self.length + count > self.table.capacity:
            raise ValueError(
                f"{self.length + count} tokens exceed the paged cache's capacity of {self.table.capacity}; "
                "make it with a larger one"
            )
        assert self.keys is not None
        assert self.values is not None
        turned = self.rotation.turn_keys(key_states)
        new = self.lengths[:, None] + torch.arange(count, device=self.device)
        places = self.table.places.gather(1, new // self.table.block)
        slots = new % self.table.block
        # Indices around a slice go to the front: [batch, token, head, coordinate].
        self.keys[places, :, slots] = turned.transpose(1, 2)
        self.values[places, :, slots] = value_states.transpose(1, 2)
        self.leading[places, :, :, slots] = turned[..., : self.width].transpose(1, 2)
        self.lengths.add_(count)
        self.length += count
        self.shortest += count
        self.gave, self.gave_values = turned, value_states
        self.is_new = True
        return turned, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers the capacity, at every step."""
        del query_length
        return self.table.capacity, 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.table.capacity

    def hold(self, row: int, tokens: int) -> None:
        """Count a row's tokens anew: none, or those that it shares with another."""
        self.lengths[row] = tokens
        self.length, self.shortest = int(self.lengths.max()), int(self.lengths.min())

    def reset(self) -> None:
        """Forget all tokens; blocks stay with their rows."""
        self.lengths.zero_()
        self.length = self.shortest = 0
        self.gave = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row; a negative number, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): transformers counts what goes; pass a negative number"
            )
        self.lengths.add_(tokens_to_remove).clamp_(min=0)
        self.length = max(0, self.length + tokens_to_remove)
        self.shortest = max(0, self.shortest + tokens_to_remove)
        self.gave = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        del change
        raise ValueError(
            "blocks of a paged cache are appended to and never moved: beams, repeated or selected sequences "
            "and offloading need session.cache()"
        )

    def visible(self, queries: int) -> Bool[Tensor, "batch 1 query token"]:
        """The keys that the last `queries` tokens of each row see."""
        place = torch.arange(self.table.capacity, device=self.lengths.device)
        last = self.lengths[:, None] - queries + torch.arange(queries, device=self.lengths.device)
        return (place <= last[..., None])[:, None]


class PagedCache(LokiCache):
    """Paged layers over one table; static ones for layers that stay dense. Made by `session.paged_cache`."""

    def __init__(self, layers: Sequence[CacheLayerMixin], table: BlockTable) -> None:
        Cache.__init__(self, layers=list(layers))
        self.table = table

    def release(self, row: int) -> None:
        """Forget a sequence and give its blocks back."""
        self.table.release(row)
        for layer in self._paged():
            layer.hold(row, 0)

    def share(self, row: int, other: int, tokens: int) -> None:
        """Let an empty row begin with the first tokens of another: whole blocks, without a copy.

        Raises:
            ValueError: as `BlockTable.share`, and where layers stay dense, whose rows lie apart.
        """
        if len(self._paged()) != len(self.layers):
            raise ValueError(
                "layers that stay dense hold rows apart, so that none can share a beginning"
            )
        self.table.share(row, other, tokens)
        for layer in self._paged():
            layer.hold(row, tokens)

    def _paged(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]


def whole(
    layer: PagedLayer, pool: Float[Tensor, "blocks kv_heads block coordinate"]
) -> Float[Tensor, "batch kv_heads token coordinate"]:
    """A pool in the order of every row's tokens: a copy of the capacity, as dense attention reads it."""
    return rearrange(pool[layer.table.places], "b m h t d -> b h (m t) d")


def paged_attention(
    queries: Float[Tensor, "batch heads query head_width"],
    layer: PagedLayer,
    visible: Bool[Tensor, "batch 1 query token"],
    budget: Budget,
    *,
    number: int,
    scaling: float,
    is_dense: bool,
) -> tuple[Float[Tensor, "batch heads query value_width"], Int[Tensor, ""]]:
    """Attention over a paged layer, and the keys that were read, over key/value heads.

    Args:
        queries: in the basis of the layer; one a row where it selects.
        layer: with the rows' tokens, these ones included.
        visible: what each query may see.
        budget: which pages are read; a page divides a block.
        number: of the layer.
        scaling: of the scores.
        is_dense: read everything.

    Raises:
        ValueError: for a budget that the pools cannot serve.
    """
    assert layer.keys is not None
    assert layer.values is not None
    kv_heads = layer.keys.shape[1]
    if is_dense:
        keys, values = whole(layer, layer.keys), whole(layer, layer.values)
        return attend(queries, keys, values, visible, scaling=scaling), visible.sum() * kv_heads
    table, page = layer.table, budget.page
    if table.block % page or (budget.selection == "per head" and queries.shape[1] != kv_heads):
        raise ValueError(
            f"page={page} and selection={budget.selection!r} over blocks of {table.block}: a page divides a "
            "block, and the query heads of a group read the same pages; use page=16 and shared in groups"
        )
    # 1. Rank all pages by the leading coordinates.
    packed = rearrange(queries * scaling, "b (h g) 1 d -> b 1 h g d", h=kv_heads)
    scores = packed[..., : layer.width] @ layer.leading[table.places]
    scores = rearrange(scores, "b m h g t -> b (h g) 1 (m t)")
    ranked, allowed, counts = budget.ranked(scores, visible, kv_heads=kv_heads, layer=number)
    # 2. As many pages as the capacity would allow; what a row may not read yet gets no weight.
    most = min(ranked.shape[-1], budget.units(table.capacity) + 1)
    # Stable, since of equal ones (forced pages above all) the earliest comes first.
    best = (ranked + shut(allowed, ranked.dtype)).sort(dim=-1, descending=True, stable=True)
    taken = torch.arange(most, device=queries.device) < counts[..., None]
    taken = (taken & (best.values[..., :most] > -torch.inf))[:, :, 0]
    chosen = best.indices[:, :, 0, :most, None]
    tokens = chosen * page + torch.arange(page, device=queries.device)
    tokens = tokens.flatten(2)
    places = table.places[:, None].expand(-1, kv_heads, -1).gather(2, tokens // table.block)
    head = torch.arange(kv_heads, device=queries.device)[:, None]
    keys = layer.keys[places, head, tokens % table.block]
    values = layer.values[places, head, tokens % table.block]
    keep = taken.repeat_interleave(page, dim=-1)
    keep = keep & visible[:, :, 0].expand(-1, kv_heads, -1).gather(2, tokens)
    return attend(queries, keys, values, keep[:, :, None], scaling=scaling), keep.sum()
