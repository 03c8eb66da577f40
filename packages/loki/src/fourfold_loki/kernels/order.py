"""Ranking: the k-th largest of many rows, as fast as the device allows, and one ranking for a group."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def boundary(
    scores: Float[Tensor, "*rows token"], counts: Int[Tensor, "*rows"]
) -> tuple[Float[Tensor, "*rows 1"], Float[Tensor, "*rows 1"]]:
    """The `counts`-th largest score of each row and the one after it; -inf where there is none.

    Counts outside of 1 to the number of tokens are taken for the nearest of these.
    """
    tokens = scores.shape[-1]
    counts = counts.clamp(1, tokens)
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        # numpy's vectorised sort of a whole row takes a fifth of the time of torch's topk on a CPU.
        wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).numpy()
        ascending = torch.from_numpy(np.sort(wide, axis=-1)).to(scores.dtype)
    else:
        ascending = scores.sort(-1).values
    last = ascending.gather(-1, (tokens - counts)[..., None])
    after = ascending.gather(-1, (tokens - counts - 1).clamp(min=0)[..., None])
    return last, after.masked_fill((counts == tokens)[..., None], -torch.inf)


def rank_in_groups(best: Float[Tensor, "stack group unit"]) -> Float[Tensor, "stack unit"]:
    """Sum over a group of its heads' weights; a group of one ranks by its scores.

    In float64, where no weight that could matter vanishes: half of the time of a log of sums.
    """
    if best.shape[1] == 1:
        return best[:, 0]
    return best.double().softmax(-1).sum(1)
