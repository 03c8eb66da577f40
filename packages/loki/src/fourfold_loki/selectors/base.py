"""The question that every selector answers, and the queries and keys that it may look at."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from fourfold_loki.attention import scores_of
from fourfold_loki.budget import Budget
from fourfold_loki.certificate import ScoreBounds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """The queries of one layer and the keys they could read."""

    queries: Float[Tensor, "batch heads query head_width"]
    keys: Float[Tensor, "batch kv_heads token head_width"]
    visible: Bool[Tensor, " batch #heads query token"]
    """The keys that causality and padding allow."""
    scaling: float
    layer: int
    turned: bool
    """True where queries and keys are in the basis of the selector's layer already (from a `LokiCache`)."""
    past_mass: Float[Tensor, "batch heads token"]
    """Attention weights that earlier queries gave to each key, summed; zeros where nobody kept count."""
    allowance: Int[Tensor, " batch #heads query"]
    """Keys that the budget will let each query keep."""

    def scores(self) -> Float[Tensor, "batch heads query token"]:
        """Exact scores; not masked."""
        return scores_of(self.queries, self.keys, scaling=self.scaling)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """The keys that queries read, and how they count."""

    keep: Bool[Tensor, "batch ranked query token"]
    mass: Float[Tensor, "batch heads token"]
    """`Candidates.past_mass` of the next call."""
    log_weights: Float[Tensor, "batch ranked query token"] | None = None
    """Added to the logits of kept keys: -log of the probability with which chance kept them."""
    looked_up: float = 0.0
    """Numbers that were read of tables, over all queries and key/value heads, beside `Selector.cost`."""


class Selector(ABC):
    """Ranks keys: the one method that a method of sparse attention overrides.

    A method that samples overrides `select` besides: its keys have weights.
    """

    keeps_count: ClassVar[bool] = False
    """True where it needs `Candidates.past_mass`."""
    samples: ClassVar[bool] = False
    """True where chance has a part in what is read, so that no compiled graph holds it."""
    of_kept: ClassVar[float] = 1.0
    """Share of both vectors of a kept key that are read after ranking."""

    @abstractmethod
    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """A score for each query and key, larger where the key seems to matter more.

        The budget keeps the largest, and none of -inf.
        Values are logits, as far as selection is shared in groups: heads are averaged after a softmax.
        """

    def cost(self, *, head_width: int, group: int) -> float:
        """Share of a full read of all keys that ranking them reads, a key/value head."""
        del head_width, group
        return 0.0

    def ranks_by(self) -> "Selector":
        """The selector that it ranks by, where that is another."""
        return self

    def tables(self, *, head_width: int) -> float:
        """Numbers that ranking reads for a query and key/value head, however many keys there are."""
        del head_width
        return 0.0

    def select(self, among: Candidates, budget: Budget) -> Selection:
        """The keys that the budget keeps of the ranking."""
        scores, mass = self.follow(among)
        batch, kv_heads, _, head_width = among.keys.shape
        return Selection(
            keep=budget.keep(scores, among.visible, kv_heads=kv_heads, layer=among.layer),
            mass=mass,
            looked_up=self.tables(head_width=head_width)
            * (batch * kv_heads * among.queries.shape[2]),
        )

    def bounds(self, among: Candidates) -> ScoreBounds:
        """Bounds on every exact score of `compared`, by what is read of all keys; in float64.

        Raises:
            ValueError: where the method knows none.
        """
        del among
        raise ValueError(
            f"{type(self).__name__} bounds no score that it has not read, so an Error cannot be kept; use "
            "Loki, Quest or Exact, or a Share, Count or Mass of the keys"
        )

    def bounds_cost(self, *, head_width: int, group: int) -> float:
        """`cost` of `bounds`: with the norms of the rest, where it needs them."""
        return self.cost(head_width=head_width, group=group)

    def follow(
        self, among: Candidates
    ) -> tuple[Float[Tensor, "batch heads query token"], Float[Tensor, "batch heads token"]]:
        """The scores, and `past_mass` for the next call where the selector keeps count."""
        return self.scores(among), among.past_mass

    def compared(
        self, among: Candidates
    ) -> tuple[
        Float[Tensor, "batch heads query coordinate"],
        Float[Tensor, "batch kv_heads token coordinate"],
    ]:
        """The queries and keys that weigh the values of what was kept: the whole ones."""
        return among.queries, among.keys
