"""What a model's attention is asked to do: read sparsely, or be watched."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from fourfold_loki.budget import Budget
from fourfold_loki.selectors.base import Selector

Observer = Callable[["Seen"], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """One call of one layer's attention, as an observer sees it: after the rotary embedding."""

    layer: int
    queries: Float[Tensor, "batch heads query head_width"]
    keys: Float[Tensor, "batch kv_heads token head_width"]
    visible: Bool[Tensor, " batch #heads query token"]
    scaling: float
    positions: tuple[Tensor, Tensor] | None
    """Cosines and sines of the rotary embedding [batch, query, rotary width], where the model tells."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sparse:
    """How a model reads its cache: who ranks, how much is kept, for which queries."""

    selector: Selector
    budget: Budget
    reach: Literal["decode", "every query"] = "decode"
    """`decode`: queries that come one at a time; a prompt and any longer block (a chunk of one, the
    candidates of assisted decoding) are dense, and not counted in `Reads`. `every query`: prompts too, as
    in the published perplexities."""
    dense_layers: tuple[int, ...] = ()
    """Layers that keep full attention; sliding-window layers always do."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observe:
    """Full attention, with somebody watching."""

    observer: Observer


Plan = Sparse | Observe
