"""One forward pass as its blocks see it, and the seam through which faster forms of them come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from transformers import Cache


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

    def of_rows(self, rows: Int[Tensor, " row"]) -> Pass:
        """The same pass for some rows of the batch."""
        mask, rotary = self.mask, self.rotary
        if isinstance(mask, Tensor) and mask.shape[0] > 1:
            mask = mask[rows]
        if rotary.shape[0] > 1:
            rotary = rotary[rows]
        return replace(self, rotary=rotary, mask=mask)

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
