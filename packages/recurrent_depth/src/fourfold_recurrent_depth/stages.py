"""One forward pass as its blocks see it, and the seam through which faster forms of them come in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.utils.generic import TransformersKwargs

FOR_THE_LOSS = ("num_items_in_batch", "shift_labels")
"""Options of a forward pass that are the loss's."""
FOR_ATTENTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal")
"""Options that transformers' attention functions take."""
IGNORED = (*TransformersKwargs.__annotations__,)
"""Options that transformers' tools hand to every model, and ours has nothing to do for."""
_UNHEARD = {
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
}
"""Values of such options that ask for something all the same."""


def refuse_unknown(options: Mapping[str, Any], parameters: Sequence[str]) -> None:
    """Raise for options of a forward pass that nothing would read.

    Raises:
        TypeError: A name is unknown; the nearest parameter is named.
        ValueError: A known option asks for what no model here gives, or packs texts by lengths alone.
    """
    known = {*FOR_THE_LOSS, *FOR_ATTENTION, *IGNORED}
    for name, value in options.items():
        if name not in known and value is not None:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(parameters)}"
            raise TypeError(f"forward takes no argument {name!r}; {hint}")
    for name, value in _UNHEARD.items():
        if options.get(name) is value:
            raise ValueError(f"{name}={value} is not served here; leave it out")


def refuse_lengths_alone(
    options: Mapping[str, Any], position_ids: Tensor | None, attention: str
) -> None:
    """Raise where texts are packed by their lengths, which this attention function does not read."""
    packed = [name for name in ("cu_seq_lens_q", "seq_idx") if options.get(name) is not None]
    reads_lengths = "flash" in attention and packed == ["cu_seq_lens_q"]
    if packed and position_ids is None and not reads_lengths:
        raise ValueError(
            f"{packed[0]} without position_ids: {attention} attention would let the texts of a row see one "
            "another; give position_ids that begin anew with each text"
        )


def either(first: Any, second: Any, names: tuple[str, str]) -> Any:
    """The value of an argument that has two names.

    Raises:
        ValueError: Both are given.
    """
    if first is not None and second is not None:
        raise ValueError(
            f"{names[0]} and {names[1]} are one argument, and both are given; give one"
        )
    return second if first is None else first


class Stage(Protocol):
    """The blocks of prelude, core or coda."""

    def __call__(
        self,
        x: Float[Tensor, "batch token width"],
        this_pass: Pass,
        slots: Sequence[int],
        injected: Float[Tensor, "batch token width"] | None = None,
    ) -> Float[Tensor, "batch token width"]:
        """All blocks once for each of `slots`, each time behind the adapter where something is injected.

        A slot is the cache's for the first block; the other blocks use those that follow it.
        """
        ...


@dataclass(slots=True, kw_only=True)
class Pass:
    """The things that all blocks of one forward pass share."""

    rotary: Complex[Tensor, "#batch token 1 half"]
    """Rotation of each position, as complex numbers of length one."""
    mask: Any
    """In the form that the attention backend takes; None is plain causal attention."""
    cache: Cache | None
    """A `RecurrentCache`, or the candidates beside it."""
    options: dict[str, Any]
    """Further keyword arguments of transformers' attention functions."""
    stages: Mapping[str, Stage]
    """By name: `prelude`, `core_block`, `coda`. By default loops over the model's modules."""
    takes_any_mask: bool
    """True where the attention backend takes masks of any pattern, as `versions` needs."""
    tokens: Int[Tensor, "batch token"] | None = None
    """For blocks that look something up by token."""
    is_served: bool = False
    """True where a server keeps the keys, and the attention functions know it by their options."""

    def of_rows(self, rows: Int[Tensor, " row"]) -> Pass:
        """The same pass for some rows of the batch."""
        mask, rotary = self.mask, self.rotary
        if isinstance(mask, Tensor) and mask.shape[0] > 1:
            mask = mask[rows]
        if rotary.shape[0] > 1:
            rotary = rotary[rows]
        tokens = None if self.tokens is None else self.tokens[rows]
        return replace(self, rotary=rotary, mask=mask, tokens=tokens)

    def of_token(self, token: int, *, cached: int) -> Pass:
        """The same pass for one of its tokens, of which `cached` are behind it."""
        mask, column = self.mask, slice(token, token + 1)
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = mask[:, :, column, : cached + 1]
        elif isinstance(mask, Tensor):
            mask = mask[:, : cached + 1]
        tokens = None if self.tokens is None else self.tokens[:, column]
        return replace(self, rotary=self.rotary[:, column], mask=mask, tokens=tokens)

    def versions(self, count: int, cache: Cache) -> Pass:
        """The pass in which `count` versions of one token see what is cached and themselves alone."""
        mask = self.mask
        if count > 1:
            own = torch.eye(count, dtype=torch.bool, device=self.rotary.device)[None, None]
            if mask is None:
                cached = own.new_ones(1, 1, count, cache.get_seq_length())
            else:
                cached = mask[..., :-1].expand(-1, -1, count, -1)
                own = own.expand(len(mask), -1, -1, -1)
                if mask.dtype != torch.bool:
                    own = torch.zeros_like(own, dtype=mask.dtype).masked_fill(
                        ~own, torch.finfo(mask.dtype).min
                    )
            mask = torch.cat([cached, own], dim=-1)
        return replace(self, mask=mask, cache=cache)
