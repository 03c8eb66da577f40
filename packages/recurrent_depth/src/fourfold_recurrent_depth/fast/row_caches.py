"""Rows that are each at a place and a recurrence of their own, as one cache of a pass of one new token a row.

The core has one set of weights, so rows at recurrences 3, 11 and 30 go through it in one product. They
differ in where their keys are: every row keeps a cache of its own, and a pass is told where each one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from fourfold_recurrent_depth.cache import Layout, RecurrentCache
from fourfold_recurrent_depth.stages import Stage

HELD, DONE, SHALLOWEST, COLUMNS = 4, 6, 8, 9
"""Columns of `lines`: tokens cached, recurrences of the new token so far, the least of a cached one; all."""


class RowCache(RecurrentCache):
    """The cache of one row, in which slots that a token did not reach stay empty.

    A reader goes by `depths` instead: memory that a recurrence did not need is never touched.
    """

    def __init__(
        self,
        config: Layout,
        *,
        steps: int,
        budget: int | None,
        prompt: int,
        capacity: int,
        stages: Mapping[str, Stage] | None = None,
    ) -> None:
        super().__init__(config, steps=steps, budget=budget, capacity=capacity)
        self.stages = stages
        """Those of the pass that reads the prompt: made once for many prompts, with their packed weights."""
        self.depths: Int[Tensor, " token"] = torch.full((capacity,), steps)
        """Recurrences of every token; the prompt's, while it is read, fill all slots that are asked for."""
        self._prompt = prompt

    def stop(
        self, row: Int[Tensor, " stopped"], token: Int[Tensor, " stopped"], *, depth: int
    ) -> None:
        """Tokens of the prompt stop: where all do, nothing reads what they do not reach."""
        if len(token) < self._prompt:
            super().stop(row, token, depth=depth)

    def close(self, *, state: Tensor, steps: Int[Tensor, "1 token"] | None) -> None:
        """The prompt is read."""
        super().close(state=state, steps=steps)
        assert self.exit_steps is not None
        self.depths[: self.length] = self.exit_steps[0].cpu()

    def line(self) -> list[int]:
        """Addresses of keys and values, strides of a slot and of a head, tokens, slots a layer, 0; depths."""
        keys, values = self._keys, self._values
        assert keys is not None
        assert values is not None
        least = int(self.depths[: self.length].min())
        return [
            keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(2), self.length, self.steps, 0,
            self.depths.data_ptr(), least,
        ]  # fmt: skip

    def held(
        self, kept: int, layer: int
    ) -> tuple[Float[Tensor, "1 head token width"], Float[Tensor, "1 head token width"]]:
        """Cached keys and values of a layer of the core, each token's at this recurrence or at its last."""
        assert self._keys is not None
        assert self._values is not None
        depth = self.depths[: self.length].clamp(max=kept + 1).to(self._keys.device) - 1
        slot, place = self.around + depth * self.per_step + layer, torch.arange(self.length)
        keys, values = self._keys[slot, 0, :, place], self._values[slot, 0, :, place]
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]


class RowCaches(Cache):
    """The caches of some rows of one model and one budget, each with one new token under way."""

    def __init__(self, around: int, per_step: int) -> None:
        super().__init__(layers=[])
        self.around, self.per_step = around, per_step
        self.caches: list[RowCache] = []
        self.lines: Int[Tensor, "row column"] = torch.zeros(0, COLUMNS, dtype=torch.int64)
        """As the compiled blocks read them (`Line`)."""

    def add(self, cache: RowCache, *, done: int = 0) -> None:
        """One row more, whose new token has taken `done` recurrences and has room in the cache."""
        self.caches.append(cache)
        line = torch.tensor([cache.line()], dtype=torch.int64)
        line[:, DONE] = done
        self.lines = torch.cat([self.lines, line])

    def drop(self, row: int) -> None:
        """One row less; those behind it move up."""
        del self.caches[row]
        self.lines = torch.cat([self.lines[:row], self.lines[row + 1 :]])

    def of(self, rows: Int[Tensor, " row"]) -> RowCaches:
        """Some of the rows, as they are now."""
        some = RowCaches(self.around, self.per_step)
        some.caches = [self.caches[row] for row in rows.tolist()]
        some.lines = self.lines.index_select(0, rows.cpu())
        return some

    def advance(self, count: int) -> None:
        """Every row's token has taken `count` recurrences more."""
        self.lines[:, DONE] += count

    def close(self, rows: Sequence[int]) -> None:
        """The new tokens of some rows stop where they are: they are cached now, and the next ones begin."""
        for row in rows:
            line, cache = self.lines[row], self.caches[row]
            cache.depths[cache.length] = line[DONE]
            cache.length += 1
            line[HELD] += 1
            line[SHALLOWEST] = torch.minimum(line[SHALLOWEST], line[DONE])
            line[DONE] = 0

    def seen(self) -> Bool[Tensor, "row context"]:
        """True where `update` gives a key of the row, and not filling: rows end together."""
        places = torch.arange(self.get_seq_length() + 1)
        return places >= len(places) - 1 - self.lines[:, HELD, None]

    # What a pass asks of a cache.

    def kept(self, step: int) -> int:
        """Recurrences are counted from where each row is."""
        return step

    def update(
        self,
        key_states: Float[Tensor, "row head 1 width"],
        value_states: Float[Tensor, "row head 1 width"],
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[Float[Tensor, "row head context width"], Float[Tensor, "row head context width"]]:
        """Write each row's new key into its own cache, and give each row's slot, filled up on the left."""
        step, layer = divmod(layer_idx - self.around, self.per_step)
        longest = self.get_seq_length() + 1
        shape = (*key_states.shape[:2], longest)
        keys = key_states.new_zeros(*shape, key_states.shape[3])
        values = value_states.new_zeros(*shape, value_states.shape[3])
        for row, cache in enumerate(self.caches):
            here, slot, kept = slice(row, row + 1), layer_idx, 0
            if step >= 0:
                kept = cache.kept(int(self.lines[row, DONE]) + step)
                slot = self.around + self.per_step * kept + layer
            given = cache.update(key_states[here], value_states[here], slot)
            older = (
                cache.held(kept, layer) if step >= 0 else tuple(part[:, :, :-1] for part in given)
            )
            for whole, before, now in zip((keys, values), older, given, strict=True):
                place = longest - 1 - cache.length
                whole[here, :, place:-1], whole[here, :, -1:] = before, now[:, :, -1:]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all slots are as long
        """Tokens cached of the row that has most."""
        return max(cache.length for cache in self.caches)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of the keys that a pass sees."""
        return self.get_seq_length() + query_length, 0
