"""The two ways in which a model attends during a session: by a selection, or in full and watched."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from fourfold_loki.budget import Budget
from fourfold_loki.selectors.base import Candidates, Selector

NEVER = 1 << 62
"""More tokens than any cache holds."""

Observer = Callable[["AttentionCall"], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionCall:
    """One call of one layer's attention, as an observer sees it: after the rotary embedding."""

    layer: int
    queries: Float[Tensor, "batch heads query head_width"]
    keys: Float[Tensor, "batch kv_heads token head_width"]
    values: Float[Tensor, "batch kv_heads token value_width"]
    visible: Bool[Tensor, " batch #heads query token"]
    scaling: float
    positions: tuple[Tensor, Tensor] | None
    """Cosines and sines of the rotary embedding [batch, query, rotary width], where the model tells."""

    def candidates(self, *, queries: int) -> Candidates:
        """The keys as a selector sees them, for the last `queries` queries alone."""
        visible = self.visible[:, :, -queries:]
        return Candidates(
            queries=self.queries[:, :, -queries:],
            keys=self.keys,
            visible=visible,
            scaling=self.scaling,
            layer=self.layer,
            turned=False,
            past_mass=self.queries.new_zeros(1, self.queries.shape[1], self.keys.shape[2]),
            allowance=visible.sum(-1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """The fastest forms that a timing found."""

    dense: str
    """A name of `cpu.DENSE`."""
    sparse: str
    """`compiled`, `torch` or `triton`."""
    pays_from: int
    """Tokens in the cache from which the selection is faster; `NEVER` where it is at no length timed."""
    instructions: str
    """What the compiled form was built for."""

    def __str__(self) -> str:
        where = "at no length timed" if self.pays_from == NEVER else f"from {self.pays_from} tokens"
        return (
            f"selection by {self.sparse} ({self.instructions} instructions) pays {where}; "
            f"dense attention by {self.dense}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sparse:
    """Reading the cache by a selection: who ranks, how much is kept, for which queries."""

    selector: Selector
    budget: Budget
    reach: Literal["decode", "every query"] = "decode"
    """`decode`: queries that come one at a time; a prompt and any longer block (a chunk of one, the
    candidates of assisted decoding) are dense, and not counted in `Reads`. `every query`: prompts too, as
    in the published perplexities."""
    dense_layers: tuple[int, ...] = ()
    """Layers that keep full attention; sliding-window layers always do."""
    forms: Forms | None = None
    """How to decode, where it was timed: see `WhereItPays`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observe:
    """Full attention, with somebody watching."""

    observer: Observer


AttentionMode = Sparse | Observe
