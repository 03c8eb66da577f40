"""Loki: rank by the leading coordinates of a rotated basis (Singhania et al. 2024)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fourfold_loki.attention import approximate_scores
from fourfold_loki.basis import Basis
from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loki(Selector):
    """The `widths[layer]` leading coordinates of `basis` decide."""

    basis: Basis
    widths: tuple[int, ...]
    """Coordinates that are read, one number a layer (d in the paper)."""

    def __post_init__(self) -> None:
        if len(self.widths) != self.basis.layers:
            raise ValueError(
                f"{len(self.widths)} widths for a basis of {self.basis.layers} layers; give one a layer"
            )
        wrong = [width for width in self.widths if not 1 <= width <= self.basis.head_width]
        if wrong:
            raise ValueError(
                f"width={wrong[0]} of a basis for heads of {self.basis.head_width}; "
                f"use 1 to {self.basis.head_width}"
            )

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """ŝ of every key."""
        queries, keys = self.turned(among)
        return approximate_scores(
            queries, keys, width=self.widths[among.layer], scaling=among.scaling
        )

    def turned(
        self, among: Candidates
    ) -> tuple[
        Float[Tensor, "batch heads query head_width"],
        Float[Tensor, "batch kv_heads token head_width"],
    ]:
        """Queries and keys in the basis."""
        if among.turned:
            return among.queries, among.keys
        rotation = self.basis.rotation(among.layer)
        return rotation.turn_queries(among.queries), rotation.turn_keys(among.keys)

    def cost(self, *, head_width: int, group: int) -> float:
        """D of D coordinates, mean over layers."""
        del group
        return sum(self.widths) / len(self.widths) / head_width
