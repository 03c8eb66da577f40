"""Exact top-k: what a perfect ranking would keep. It reads every key, so it saves nothing on scores."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact(Selector):
    """Rank by the exact scores."""

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """C q·k."""
        return among.scores()

    def cost(self, *, head_width: int, group: int) -> float:
        """All coordinates of all keys."""
        del head_width, group
        return 1.0
