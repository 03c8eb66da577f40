"""Skip-softmax: pass over blocks whose scores lie far below the largest so far (BLASST, Yuan et al. 2025).

A kernel that goes through the keys in blocks knows the largest score so far, m. A block whose own largest
score is below m + ln λ would add little, so its values are not read and its softmax is not computed. All
keys are read: half of what dense attention reads is the least that it can do. The amount is the threshold,
`Threshold(score=ln λ)`; calibrated ones fall with the length, as λ = a / tokens.

Differences: published kernels decide for a tile of query rows at once; here a query decides, with its group
where selection is shared, which is the tile of a decoded token.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fourfold_loki.attention import shut
from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipSoftmax(Selector):
    """Blocks of `block` keys, in their order."""

    block: int = 64
    of_kept: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block={self.block} holds no key; use 1 or more, such as 64")

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """The largest score of a key's block less the largest before it: above zero where it exceeds that."""
        tokens = among.keys.shape[2]
        scores = among.scores() + shut(among.visible, among.queries.dtype)
        padded = F.pad(scores, (0, -tokens % self.block), value=-math.inf)
        largest = padded.unflatten(-1, (-1, self.block)).amax(-1)
        before = F.pad(largest.cummax(-1).values[..., :-1], (1, 0), value=-math.inf)
        lowest = torch.finfo(scores.dtype).min
        apart = largest.clamp(min=lowest / 2) - before.clamp(min=lowest / 2)
        return apart.repeat_interleave(self.block, dim=-1)[..., :tokens]

    def cost(self, *, head_width: int, group: int) -> float:
        """All keys; of what is kept, the values remain."""
        del head_width, group
        return 1.0
