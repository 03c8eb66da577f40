"""Exact top-k: what a perfect ranking would keep. It reads every key, so it saves nothing on scores."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fourfold_loki.certificate import ScoreBounds, wide_scores
from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact(Selector):
    """Rank by the exact scores."""

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """C q·k."""
        return among.scores()

    def bounds(self, among: Candidates) -> ScoreBounds:
        """The scores themselves: with an Error, what somebody reads who knows the true mass."""
        scores = wide_scores(among.queries, among.keys, scaling=among.scaling)
        return ScoreBounds(centre=scores, radius=scores.new_zeros(1).expand_as(scores))

    def cost(self, *, head_width: int, group: int) -> float:
        """All coordinates of all keys."""
        del head_width, group
        return 1.0
