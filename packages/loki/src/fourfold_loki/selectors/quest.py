"""Quest: rank pages of keys by a bound on the best score inside (Tang et al. 2024)."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fourfold_loki.attention import scores_of
from fourfold_loki.certificate import ScoreBounds, rounding_of
from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(Selector):
    """Each page of keys is known by its coordinate-wise smallest and largest values."""

    page: int

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ValueError(f"page={self.page} holds no key; use 1 or more, 16 in the paper")

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """The bound: sum over coordinates of max(q_i min_i, q_i max_i); the same for a page's keys.

        A page's bounds include keys that a query of a block may not see yet, as where pages are filled
        before a block is scored.
        """
        return self._largest(among.queries, among.keys, among.scaling)

    def _largest(self, queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        tokens = keys.shape[2]
        padded = F.pad(keys, (0, 0, 0, -tokens % self.page), value=float("nan"))
        pages = padded.unflatten(2, (-1, self.page))
        smallest = pages.nan_to_num(nan=float("inf")).amin(3)
        largest = pages.nan_to_num(nan=float("-inf")).amax(3)
        bound = scores_of(queries.clamp(min=0), largest, scaling=scaling) + scores_of(
            queries.clamp(max=0), smallest, scaling=scaling
        )
        return bound.repeat_interleave(self.page, dim=-1)[..., :tokens]

    def bounds(self, among: Candidates) -> ScoreBounds:
        """The largest and the smallest score that a page's extremes allow."""
        queries, keys = among.queries.double(), among.keys.double()
        above = self._largest(queries, keys, among.scaling)
        below = -self._largest(-queries, keys, among.scaling)
        rounding = rounding_of(queries, keys, scaling=among.scaling)
        return ScoreBounds(
            centre=(above + below) / 2, radius=(above - below) / 2 + rounding[..., None]
        )

    def cost(self, *, head_width: int, group: int) -> float:
        """Two vectors a page."""
        del head_width, group
        return 2 / self.page
