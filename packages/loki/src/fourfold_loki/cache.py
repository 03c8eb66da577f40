"""A cache that holds keys in the basis: rows for reading in full, and the leading coordinates apart.

Room is made ahead and doubled when it is used up, since growing by concatenation reads and writes the whole
cache at every token. The leading coordinates cost width / head_width of the keys' bytes on top. They are kept
in tiles, [tile, width, TILE]: those of 64 tokens lie together, so that ranking reads memory from end to end.
In one matrix [width, room] they would be as many streams as coordinates, which mostly lie a power of two
apart: at the same places of a processor's cache, where each drives out the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from fourfold_loki.attention import Rotation
from fourfold_loki.basis import Basis

TILE = 64
"""Tokens of a tile; the room of a cache is a multiple of it."""


def tiled(
    coordinates: Float[Tensor, "batch kv_heads room width"],
) -> Float[Tensor, "batch kv_heads tile width place"]:
    """Coordinates of the keys as the twins take them; `room` is a multiple of `TILE`."""
    return rearrange(coordinates, "b h (n t) w -> b h n w t", t=TILE).contiguous()


LARGEST_PAGE = TILE
"""Room is a multiple of it, so that pages of 16, 32 and 64 tokens are rows of a flattened view."""


def check_open(cache: str, is_open: Callable[[], bool]) -> None:
    """Refuse keys from outside of the session whose basis a cache's keys are in.

    Raises:
        ValueError: The session is not at work.
    """
    if not is_open():
        raise ValueError(
            f"{cache} holds keys in the basis of its session's model, and is being filled from "
            "elsewhere; use it inside `with loki(...)`, with that model"
        )


class LokiLayer(CacheLayerMixin):
    """One layer's values and turned keys.

    `gave` and `gave_values` are what its last update returned, and `is_new` is true where that was in this
    pass of the model.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self, rotation: Rotation, width: int, *, capacity: int, is_open: Callable[[], bool]
    ) -> None:
        super().__init__()
        self.rotation = rotation
        self.width = width
        self.length = 0
        self.gave: Tensor | None = None
        self.gave_values: Tensor | None = None
        self.is_new = False
        self._capacity = capacity
        self._is_open = is_open

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the first tokens."""
        kv_heads, head_width = self.rotation.key_map.shape[0], self.rotation.key_map.shape[-1]
        if key_states.shape[1] != kv_heads or key_states.shape[-1] != head_width:
            raise ValueError(
                f"keys of {key_states.shape[1]} heads of width {key_states.shape[-1]} for a cache in a "
                f"basis of {kv_heads} heads of width {head_width}; use the basis of this model"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        batch, room = key_states.shape[0], max(self._capacity, key_states.shape[2])
        self._allocate(batch, room, value_states.shape[-1])

    def _allocate(self, batch: int, room: int, value_width: int) -> None:
        room += -room % LARGEST_PAGE
        kv_heads, head_width = self.rotation.key_map.shape[0], self.rotation.key_map.shape[-1]

        def empty(*shape: int) -> Tensor:
            # Zeros: the unused end of a page is multiplied by weights of zero.
            return torch.zeros(batch, kv_heads, *shape, dtype=self.dtype, device=self.device)

        self.keys = empty(room, head_width)
        self.values = empty(room, value_width)
        self.leading = empty(room // TILE, self.width, TILE)

    def _grow(self, needed: int) -> None:
        old = self.keys, self.values, self.leading
        keys, values, leading = old
        assert keys is not None
        assert values is not None
        self._allocate(keys.shape[0], max(needed, 2 * keys.shape[2]), values.shape[-1])
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, : self.length] = keys[:, :, : self.length]
        self.values[:, :, : self.length] = values[:, :, : self.length]
        self.leading[:, :, : leading.shape[2]] = leading

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t v"]]:
        """Turn the new keys, append, and give all keys (turned) and values."""
        del args, kwargs
        check_open("a LokiCache", self._is_open)
        if not self.is_initialized or self._is_of_another_batch(len(key_states)):
            self.lazy_initialization(key_states, value_states)
        first, last = self.length, self.length + key_states.shape[2]
        if last > self.room:
            self._grow(last)
        assert self.keys is not None
        assert self.values is not None
        turned = self.rotation.turn_keys(key_states)
        self.keys[:, :, first:last] = turned
        self.values[:, :, first:last] = value_states
        self._lead(first, turned[..., : self.width])
        self.length = last
        self.gave, self.gave_values = self.keys[:, :, :last], self.values[:, :, :last]
        self.is_new = True
        return self.gave, self.gave_values

    def _lead(self, first: int, coordinates: Float[Tensor, "b h t w"]) -> None:
        """Put the leading coordinates of the tokens from `first` on into their tiles."""
        done, count = 0, coordinates.shape[2]
        if start := -first % TILE:  # the end of a tile that is begun
            done = min(start, count)
            self._lead_one(first, coordinates[:, :, :done])
        tiles = (count - done) // TILE
        if tiles:
            at, until = (first + done) // TILE, done + tiles * TILE
            self.leading[:, :, at : at + tiles] = tiled(coordinates[:, :, done:until])
            done = until
        if done < count:
            self._lead_one(first + done, coordinates[:, :, done:])

    def _lead_one(self, first: int, coordinates: Float[Tensor, "b h t w"]) -> None:
        """The same for tokens of one tile."""
        tile, place = divmod(first, TILE)
        self.leading[:, :, tile, :, place : place + coordinates.shape[2]] = coordinates.mT

    def _is_of_another_batch(self, batch: int) -> bool:
        """True where the room left by forgotten tokens is for another number of sequences."""
        return self.length == 0 and self.keys is not None and len(self.keys) != batch

    @property
    def room(self) -> int:
        """Tokens that fit before the next growth."""
        return self.keys.shape[2] if self.keys is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next mask covers, and their offset."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget the tokens and keep the room, for sequences as many as before."""
        self.length = 0
        self.gave = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a negative number, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): transformers counts what goes; pass a negative number"
            )
        self.length = max(0, self.length + tokens_to_remove)
        self.gave = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            self.keys = change(self.keys)
            self.values = change(self.values)
            self.leading = change(self.leading)
            self.gave = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every beam its parent's keys."""
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._each(lambda part: part[indices])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Bring everything back."""
        self._each(lambda part: part.to(self.device, non_blocking=True))


class LokiCache(Cache):
    """Turned keys for the layers that select, ordinary ones for the others. Made by `session.cache()`."""

    def __init__(
        self,
        basis: Basis,
        widths: Sequence[int],
        *,
        capacity: int,
        is_turned: Sequence[bool],
        is_open: Callable[[], bool],
    ) -> None:
        layers: list[Any] = []  # theirs is an invariant list of a union
        for layer, (width, turned) in enumerate(zip(widths, is_turned, strict=True)):
            if turned:
                layers.append(
                    LokiLayer(basis.rotation(layer), width, capacity=capacity, is_open=is_open)
                )
            else:
                layers.append(DynamicLayer())
        super().__init__(layers=layers)

    def begin_pass(self) -> None:
        """A pass of the model begins, in which no layer has given keys yet."""
        for layer in self.layers:
            if isinstance(layer, LokiLayer):
                layer.is_new = False
