"""Keys and values of a recurrent model: preallocated, one slot per layer and kept recurrence.

A token's keys exist once per recurrence. Recurrence i of a new token attends to slot i of the older
tokens; an older token that stopped at depth d < i is read at d, its deepest (paper, remark 6.1). This
cache makes that a plain view: when a token stops, its last keys and values are copied into the slots of
the recurrences it did not take, so every slot of every token holds something. That is the invariant.

With a budget of n recurrences, recurrence i uses the slot of i mod n (section 6.2).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from fourfold_recurrent_depth.configuration import RecurrentDepthConfig

CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)
"""The installed transformers' name for a cache among arguments and results; `cache` from 5.24 on."""


class Layout(Protocol):
    """Numbers of layers in each part of a model."""

    @property
    def n_layers_in_prelude(self) -> int: ...  # noqa: D102
    @property
    def n_layers_in_recurrent_block(self) -> int: ...  # noqa: D102
    @property
    def n_layers_in_coda(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlotView:
    """Memory of slots that a pass reads or writes by itself, where `Cache.update` would copy."""

    keys: Float[Tensor, "slot row head place width"]
    values: Float[Tensor, "slot row head place width"]
    rows: Int[Tensor, " row"] | None = None
    """The rows of this memory that the pass has; None for all, in order."""
    first_slot: int = 0
    """The number of the slot that comes first here."""
    place: int = 0
    """Place at which the tokens begin."""
    is_one_slot: bool = False
    """One slot serves every layer in turn."""


class Unpaged:
    """A model whose cache is none of transformers' paged ones, which continuous batching needs."""

    def init_continuous_batching(self, *_: object, **__: object) -> NoReturn:
        """Called by `generate_batch`, which would otherwise answer with empty rows.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"generate_batch keeps one page of keys for each layer, and {type(self).__name__} has keys of "
            "every recurrence; use fourfold_recurrent_depth.serve, or generate with a padded batch"
        )


class Assisted:
    """An assistant is handed the arguments that its forward pass has, and not this model's own."""

    forward: Any

    def _get_candidate_generator(
        self,
        generation_config: Any,
        input_ids: Any,
        inputs_tensor: Any,
        logits_processor: Any,
        model_kwargs: dict[str, Any],
        assistant_model: Any = None,
        target_tokenizer: Any = None,
        assistant_tokenizer: Any = None,
    ) -> Any:
        """Called by `generate`, which would hand on `num_steps` to a model that knows of none."""
        if assistant_model is not None:
            theirs = inspect.signature(assistant_model.forward).parameters
            ours = inspect.signature(self.forward).parameters
            model_kwargs = {
                name: value
                for name, value in model_kwargs.items()
                if name in theirs or name not in ours
            }
        generation: Any = super()
        return generation._get_candidate_generator(  # noqa: SLF001 - transformers' own way
            generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs,
            assistant_model, target_tokenizer, assistant_tokenizer,
        )  # fmt: skip


class RecurrentCache(Cache):
    """A cache for `RecurrentDepthForCausalLM`, as transformers' generation uses one.

    Args:
        config: the model's shape.
        steps: recurrences that get slots of their own; `grow` gives more.
        budget: recurrences kept at most, or None for all: `Latest` reads each token at min(i, depth).
        capacity: tokens to allocate for at once; more are allocated as they come.
    """

    in_place = True
    """Passes may read and write its memory by themselves; see `views`."""

    def __init__(
        self,
        config: Layout,
        *,
        steps: int,
        budget: int | None = None,
        capacity: int = 64,
    ) -> None:
        super().__init__(layers=[])
        if budget is not None and not budget >= 1:
            raise ValueError(
                f"kv_budget={budget} keeps no recurrence; use 1 or more, or None to keep all"
            )
        if budget is not None and budget > steps:
            raise ValueError(
                f"kv_budget={budget} keeps more recurrences than the {steps} that a pass takes; "
                f"use {steps} or fewer, or None to keep all"
            )
        if steps < 1:
            raise ValueError(f"steps={steps} gives the cache no recurrence; use 1 or more")
        self.around = config.n_layers_in_prelude + config.n_layers_in_coda
        self.per_step = config.n_layers_in_recurrent_block
        self.budget = budget
        self.steps = steps if budget is None else min(steps, budget)
        self.capacity = capacity
        self.length = 0
        self.exit_steps: Int[Tensor, "batch token"] | None = None
        """Recurrences of every cached token."""
        self.last_state: Float[Tensor, "batch width"] | None = None
        """Final state of the last token, for a warm start."""
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._key_slots: tuple[Tensor, ...] = ()
        self._value_slots: tuple[Tensor, ...] = ()
        self._opened = 0
        self._asked = 0
        self._depth = 1
        self._rows: Tensor | None = None
        self._running: Tensor | None = None

    # What a forward pass does, in this order: open, update once per layer call, close.

    def open(self, batch: int, tokens: int, *, steps: int) -> None:
        """A pass of `tokens` new tokens begins; they take at most `steps` recurrences.

        Raises:
            ValueError: where the batch is not the one that the cache holds.
        """
        self._refuse_batch(batch)
        self._opened, self._rows, self._running, self._depth = tokens, None, None, steps
        self._asked = batch
        if self.budget is None:
            self._grow(steps=max(steps, self.steps))

    def update(
        self,
        key_states: Float[Tensor, "row head token width"],
        value_states: Float[Tensor, "row head token width"],
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[Float[Tensor, "row head context width"], Float[Tensor, "row head context width"]]:
        """Write the pass's keys and values into a slot, and give the slot up to them.

        Only the rows of `select` are written and given; of their tokens, only those still running.

        Raises:
            ValueError: for tensors that carry gradient, which memory that is written in place would lose.
        """
        if key_states.requires_grad:
            raise ValueError(
                "a RecurrentCache, which exits use too, keeps no gradient; call the model under "
                "torch.no_grad(), or leave use_cache, past_key_values and exit out"
            )
        tokens = key_states.shape[2]
        self._reserve(key_states, value_states)
        stop = self.length + tokens
        filled = []
        for slots, states in (
            (self._key_slots, key_states),
            (self._value_slots, value_states),
        ):
            slot = slots[layer_idx]
            if self._rows is None:
                new = slot[:, :, self.length : stop]
                if self._running is not None:
                    states = torch.where(self._running, states, new)  # noqa: PLW2901
                new.copy_(states)
                filled.append(slot[:, :, :stop])
            else:
                # One copy of the survivors' context, and the write into both.
                here = slot[:, :, :stop].index_select(0, self._rows)
                new = here[:, :, self.length :]
                if self._running is not None:
                    states = torch.where(self._running, states, new)  # noqa: PLW2901
                new.copy_(states)
                slot[:, :, self.length : stop].index_copy_(0, self._rows, new)
                filled.append(here)
        return filled[0], filled[1]

    def views(
        self, like: Float[Tensor, "row head token width"], slots: Sequence[int], layers: int
    ) -> tuple[SlotView, SlotView, Bool[Tensor, "row token"] | None]:
        """Memory for an update without copies: the cached tokens, the pass's own, and which of them write.

        Args:
            like: the keys of the pass, for their shape and format.
            slots: those of the first layer, in turn.
            layers: how many slots from each of these are used.

        Raises:
            ValueError: where rows, heads, format or slots are not those that the cache holds.
        """
        self._reserve(like, like)
        keys, values, rows = self._keys, self._values, self._rows
        assert keys is not None
        assert values is not None
        known = (
            keys.shape[1] if rows is None else len(rows),
            keys.shape[2],
            keys.shape[-1],
            keys.dtype,
        )
        given = (like.shape[0], like.shape[1], like.shape[-1], like.dtype)
        if given != known or max(slots) + layers > len(keys):
            raise ValueError(
                f"rows, heads, width and format {given} for a cache of {known}, slot "
                f"{max(slots) + layers - 1} of {len(keys)}; use a cache that was opened for this pass"
            )
        running = None if self._running is None else self._running[:, 0, :, 0].contiguous()
        cached = SlotView(keys=keys, values=values, rows=rows)
        return cached, SlotView(keys=keys, values=values, rows=rows, place=self.length), running

    def read(
        self, slot: int
    ) -> tuple[Float[Tensor, "row head cached width"], Float[Tensor, "row head cached width"]]:
        """A slot of the cached tokens, for the rows of `select`."""
        keys, values = self._key_slots[slot], self._value_slots[slot]
        keys, values = keys[:, :, : self.length], values[:, :, : self.length]
        if self._rows is None:
            return keys, values
        return keys.index_select(0, self._rows), values.index_select(0, self._rows)

    @property
    def rows(self) -> Int[Tensor, " row"] | None:
        """The rows of `select`."""
        return self._rows

    def slots(
        self, which: slice
    ) -> tuple[
        Float[Tensor, "slot batch head cached width"], Float[Tensor, "slot batch head cached width"]
    ]:
        """Keys and values of the cached tokens in some slots: prelude and coda first, then the core's.

        Raises:
            ValueError: nothing is cached.
        """
        if self._keys is None or self._values is None:
            raise ValueError("this cache holds nothing; run a pass with it first")
        return self._keys[which, ..., : self.length, :], self._values[which, ..., : self.length, :]

    def write(
        self,
        slot: int,
        rows: Int[Tensor, " row"],
        key_states: Float[Tensor, "row head width"],
        value_states: Float[Tensor, "row head width"],
    ) -> None:
        """Keys and values of the one new token of some rows."""
        self._key_slots[slot][rows, :, self.length] = key_states
        self._value_slots[slot][rows, :, self.length] = value_states

    def select(
        self, rows: Int[Tensor, " row"] | None, running: Bool[Tensor, "row token"] | None
    ) -> None:
        """Choose what the next updates are about: some rows of the batch, and which of their tokens write."""
        self._rows = rows
        self._running = None if running is None else running[:, None, :, None]

    def stop(
        self, row: Int[Tensor, " stopped"], token: Int[Tensor, " stopped"], *, depth: int
    ) -> None:
        """Tokens of this pass stop after `depth` recurrences: fill the slots they did not reach."""
        if depth >= self.steps:
            return
        place = token + self.length
        for store in (self._keys, self._values):
            assert store is not None
            core = store[self.around :].unflatten(0, (self.steps, self.per_step))
            core[depth:, :, row, :, place] = core[depth - 1, :, row, :, place].unsqueeze(1)

    def close(
        self,
        *,
        state: Float[Tensor, "batch token width"],
        steps: Int[Tensor, "batch token"] | None,
    ) -> None:
        """The pass ends: its tokens are cached now.

        Args:
            state: their final states.
            steps: their recurrences where they differ, their slots being filled already.
        """
        batch, tokens = state.shape[:2]
        if steps is None:
            if self._depth < self.steps:
                stop = self.length + tokens
                for store in (self._keys, self._values):
                    assert store is not None
                    core = store[self.around :].unflatten(0, (self.steps, self.per_step))
                    last = core[self._depth - 1 : self._depth, ..., self.length : stop, :]
                    core[self._depth :, ..., self.length : stop, :] = last
            steps = torch.full((batch, tokens), self._depth, device=state.device)
        known = [] if self.exit_steps is None else [self.exit_steps]
        self.exit_steps = torch.cat([*known, steps], dim=1)
        self.last_state = state[:, -1].detach()
        self.length += tokens
        self._rows, self._running = None, None

    def kept(self, step: int) -> int:
        """The kept recurrence that stands for recurrence `step`, counted from 0."""
        return step if self.budget is None else step % self.steps

    def nbytes(self) -> int:
        """Bytes of the cached tokens' keys and values (what is allocated ahead is not counted)."""
        if self._keys is None or self._values is None:
            return 0
        stores = (self._keys, self._values)
        return sum(s[..., 0, :].numel() * s.element_size() for s in stores) * self.length

    # transformers' interface.

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all slots are as long
        """Tokens cached."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of the keys that a pass sees."""
        return self.length + query_length, 0

    @property
    def is_compileable(self) -> bool:
        """The length of what a pass reads is not static."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True where anything is allocated."""
        return self._keys is not None

    @property
    def is_croppable(self) -> bool:
        """Tokens can be removed and leave no trace."""
        return True

    @property
    def batch_size(self) -> int:
        """Rows, or -1 where nothing is cached yet."""
        return -1 if self._keys is None else self._keys.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -n tokens (n is negative, as transformers counts): nothing moves.

        Raises:
            ValueError: for a positive number, or where fewer are cached.
        """
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop({tokens_to_remove}) of {self.length} cached tokens; use -n to forget the last n"
            )
        self.length += tokens_to_remove
        if self.exit_steps is not None:
            self.exit_steps = self.exit_steps[:, : self.length]
        if tokens_to_remove:
            self.last_state = None

    def reset(self) -> None:
        """Forget everything but the memory."""
        self.length, self.exit_steps, self.last_state = 0, None, None

    def reorder_cache(self, beam_idx: Int[Tensor, " batch"]) -> None:
        """Rows in a new order, some of them more than once."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(
        self, indices: Int[Tensor, " chosen"] | Bool[Tensor, " batch"]
    ) -> None:
        """Keep some rows."""
        self._over_rows(lambda x, dim: x.index_select(dim, _as_index(indices).to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times, one after another."""
        self._over_rows(lambda x, dim: x.repeat_interleave(repeats, dim=dim))

    def _over_rows(self, change: Callable[[Tensor, int], Tensor]) -> None:
        if self._keys is None or self._values is None:
            return
        self._hold(change(self._keys, 1), change(self._values, 1))
        self._over_ends(change)

    def _over_ends(self, change: Callable[[Tensor, int], Tensor]) -> None:
        if self.exit_steps is not None:
            self.exit_steps = change(self.exit_steps, 0)
        if self.last_state is not None:
            self.last_state = change(self.last_state, 0)

    def _refuse_batch(self, batch: int) -> None:
        if self.batch_size not in (-1, batch):
            raise ValueError(
                f"the cache holds {self.batch_size} rows, the pass has {batch}; "
                "use a new cache, or select its rows first"
            )

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self._key_slots, self._value_slots = keys.unbind(0), values.unbind(0)

    def _reserve(self, keys: Tensor, values: Tensor) -> None:
        """Room for the tokens of a pass, at least doubling, with what is cached copied over.

        Values of latent attention are narrower than keys.

        Raises:
            ValueError: for another number of heads, or other widths, than those that the cache holds.
        """
        _, heads, tokens, _ = keys.shape
        needed = self.length + tokens
        if self._keys is not None and self._values is not None:
            held = (self._keys.shape[2], self._keys.shape[-1], self._values.shape[-1])
            given = (heads, keys.shape[-1], values.shape[-1])
            if held != given:
                raise ValueError(
                    "keys and values of {} heads, {} and {} wide in a RecurrentCache of {} heads, {} and {} "
                    "wide; use a model whose layers are alike in them".format(*given, *held)
                )
        if self._keys is not None and needed <= self._keys.shape[-2]:
            return
        known = 0 if self._keys is None else self._keys.shape[-2]
        room = max(needed, self.capacity if known == 0 else 2 * known)
        slots = self.around + self.steps * self.per_step
        # One allocation of both where they are alike, as they nearly always are.
        shape = (slots, self._asked, heads, room)
        if keys.shape[-1] == values.shape[-1]:
            fresh = [*_zeros((2, *shape, keys.shape[-1]), keys)]
        else:
            fresh = [_zeros((*shape, states.shape[-1]), states) for states in (keys, values)]
        if self._keys is not None and self._values is not None:
            # A pass that is under way has written its own tokens too.
            known = min(known, needed)
            for new, old in zip(fresh, (self._keys, self._values), strict=True):
                new[..., :known, :] = old[..., :known, :]
        self._hold(fresh[0], fresh[1])

    def _grow(self, *, steps: int) -> None:
        """Slots for more recurrences, in which cached tokens stand at their deepest."""
        if steps == self.steps:
            return
        if self._keys is not None and self._values is not None:
            extra = steps - self.steps
            grown = []
            for store in (self._keys, self._values):
                last = store[-self.per_step :]
                grown.append(torch.cat([store, last.repeat(extra, *[1] * (last.ndim - 1))]))
            self._hold(grown[0], grown[1])
        self.steps = steps


class CandidateCache(Cache):
    """Versions of one new token beside a cache: they see what is cached, and nothing is written.

    Until `keep` chooses a version for a row.
    """

    def __init__(self, cache: RecurrentCache) -> None:
        super().__init__(layers=[])
        self._cache = cache
        self.in_place = cache.in_place
        self._versions: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self,
        key_states: Float[Tensor, "row head version width"],
        value_states: Float[Tensor, "row head version width"],
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[Float[Tensor, "row head context width"], Float[Tensor, "row head context width"]]:
        """The cached tokens of a slot, and the versions behind them."""
        self._versions[layer_idx] = (key_states, value_states)
        keys, values = self._cache.read(layer_idx)
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all slots are as long
        """Tokens cached, without the versions."""
        return self._cache.length

    def views(
        self, like: Float[Tensor, "row head version width"], slots: Sequence[int], layers: int
    ) -> tuple[SlotView, SlotView, None]:
        """The cached tokens, and new memory for the versions; see `RecurrentCache.views`."""
        cached, _, _ = self._cache.views(like[:, :, :0], slots, layers)
        keys, values = like.new_empty(2, layers, *like.shape)
        self._versions = {slots[0] + i: (keys[i], values[i]) for i in range(layers)}
        return cached, SlotView(keys=keys, values=values, first_slot=slots[0]), None

    def keep(self, row: Int[Tensor, " kept"], rows: Int[Tensor, " kept"], *, version: int) -> None:
        """Write a version of some rows: `row` counts among those selected, `rows` in the batch."""
        for slot, (keys, values) in self._versions.items():
            self._cache.write(slot, rows, keys[row, :, version], values[row, :, version])


def estimate_cache_bytes(
    config: RecurrentDepthConfig,
    *,
    tokens: int,
    steps: int,
    batch: int = 1,
    budget: int | None = None,
    rank: int | None = None,
    element_bytes: int = 2,
) -> int:
    """Bytes of keys and values of cached tokens: (around + layers * recurrences) * 2 * width of keys each.

    Huginn-0125 in bfloat16 at 32 recurrences: 2.79 MB a token; with a budget of 1, 0.17 MB. A layer of
    the core takes `rank` numbers in a `LatentCache` of that rank.

    Raises:
        ValueError: for what no `RecurrentCache` would be.
    """
    if steps < 1 or (budget is not None and not 1 <= budget <= steps):
        raise ValueError(
            f"steps={steps}, budget={budget} are of no cache; use 1 or more, and a budget of {steps} or fewer"
        )
    if rank is not None and (budget is not None or rank < 1):
        raise ValueError(
            f"rank={rank}, budget={budget} are of no cache; use a rank of 1 or more, and no budget beside it"
        )
    kept = steps if budget is None else budget
    around = config.n_layers_in_prelude + config.n_layers_in_coda
    width = 2 * config.num_key_value_heads * config.head_dim
    of_layer = kept * width if rank is None else rank
    numbers = around * width + config.n_layers_in_recurrent_block * of_layer
    return numbers * element_bytes * tokens * batch


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros that cost nothing until they are written, where the system has them: a deep cache is large."""
    if not like.is_cpu or 0 in shape:
        return like.new_zeros(shape)
    raw = np.zeros(math.prod(shape) * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(raw).view(like.dtype).view(shape)


def _as_index(indices: Tensor) -> Tensor:
    return indices.nonzero().flatten() if indices.dtype == torch.bool else indices
