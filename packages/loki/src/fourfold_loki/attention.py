"""Loki: attend to the few keys that matter, found by looking at a few coordinates of each.

The keys of an attention head lie near a subspace of few dimensions. Turn queries and keys into a basis
whose leading coordinates carry most of what scores are made of, rank all keys by those coordinates alone,
and read in full only the keys that rank first (Singhania et al. 2024, Algorithm 1):

    q', k' = q W, k W^-T            turning changes no score: q'·k' = q·k      `Rotation`
    ŝ      = c q'[:d] · k'[:d]      d of D coordinates, every key              `approximate_scores`
    I      = the keys with the largest ŝ, as many as the budget allows         `most_relevant`
    out    = softmax(c q'·k'[I]) v[I]      all D coordinates, few keys          `attend`

W is the matrix of principal components in the paper (orthonormal, so W^-T = W); `basis.py` fits it, and
better ones. With d = D the ranking is exact; with every key kept, so is the output.

Shapes: a key/value head serves `heads / kv_heads` query heads, neighbours in the order of heads. All
functions are plain torch, on any device; `kernels/` holds the fast twins of the last three lines.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The basis of one attention layer: one pair of maps a key/value head.

    `query_map` is W and `key_map` is W^-T, acting on row vectors, leading coordinates first.
    """

    query_map: Float[Tensor, "kv_heads head_width head_width"]
    key_map: Float[Tensor, "kv_heads head_width head_width"]

    def turn_queries(
        self, queries: Float[Tensor, "batch heads query head_width"]
    ) -> Float[Tensor, "batch heads query head_width"]:
        """Q' = q W, with the map of the key/value head that each query head reads."""
        kv_heads = self.query_map.shape[0]
        packed = rearrange(queries, "b (h g) q d -> b h (g q) d", h=kv_heads)
        turned = packed @ self.query_map.to(queries.dtype)
        return rearrange(turned, "b h (g q) d -> b (h g) q d", q=queries.shape[2])

    def turn_keys(
        self, keys: Float[Tensor, "batch kv_heads token head_width"]
    ) -> Float[Tensor, "batch kv_heads token head_width"]:
        """K' = k W^-T."""
        return keys @ self.key_map.to(keys.dtype)


def scores_of(
    queries: Float[Tensor, "batch heads query coordinate"],
    keys: Float[Tensor, "batch kv_heads token coordinate"],
    *,
    scaling: float,
) -> Float[Tensor, "batch heads query token"]:
    """C q·k of every query with every key of its key/value head."""
    packed = rearrange(queries * scaling, "b (h g) q d -> b h (g q) d", h=keys.shape[1])
    scores = packed @ keys.transpose(-1, -2)
    return rearrange(scores, "b h (g q) t -> b (h g) q t", q=queries.shape[2])


def approximate_scores(
    turned_queries: Float[Tensor, "batch heads query head_width"],
    turned_keys: Float[Tensor, "batch kv_heads token head_width"],
    *,
    width: int,
    scaling: float,
) -> Float[Tensor, "batch heads query token"]:
    """ŝ: the scores as far as the first `width` coordinates tell.

    Raises:
        ValueError: for a width that the head does not have.
    """
    head_width = turned_keys.shape[-1]
    if not 1 <= width <= head_width:
        raise ValueError(
            f"width={width} coordinates of a head of {head_width}; use 1 to {head_width}"
        )
    return scores_of(turned_queries[..., :width], turned_keys[..., :width], scaling=scaling)


def shared_in_groups(
    scores: Float[Tensor, "batch heads query token"],
    visible: Bool[Tensor, " batch #heads query token"],
    *,
    kv_heads: int,
) -> Float[Tensor, "batch kv_heads query token"]:
    """One ranking for the query heads of a key/value head: the mean of their attention weights, as a log.

    Without it each query head selects its own keys, and a group of G heads reads up to G times the budget
    from the cache that it shares.
    """
    # A finite number rather than -inf: a row that sees nothing must not become NaN.
    least = torch.finfo(scores.dtype).min / 2
    weights = (scores + shut(visible, scores.dtype, least)).log_softmax(-1)
    return rearrange(weights, "b (h g) q t -> b h g q t", h=kv_heads).logsumexp(2)


def shut(
    visible: Bool[Tensor, "*rows token"], dtype: torch.dtype, least: float = -torch.inf
) -> Float[Tensor, "*rows token"]:
    """Zero where a key is visible, `least` where not: to be added to scores.

    Adding a row for all heads takes a tenth of the time of filling by a mask that is repeated for each.
    """
    return torch.where(visible, visible.new_zeros((), dtype=dtype), least)


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


def most_relevant(
    scores: Float[Tensor, "batch ranked query token"],
    visible: Bool[Tensor, " batch #ranked query token"],
    counts: Int[Tensor, " batch #ranked query"],
) -> Bool[Tensor, "batch ranked query token"]:
    """The `counts` visible keys with the largest scores, for each query; of equal ones the earliest.

    A score of -inf says "never", so fewer may be kept.
    """
    scores = scores + shut(visible, scores.dtype)
    last, next_after = boundary(scores, counts.expand(scores.shape[:-1]))
    keep = scores >= last.clamp(min=torch.finfo(scores.dtype).min)
    if torch.compiler.is_compiling() or bool((last == next_after).any()):
        above, level = scores > last, scores == last
        spare = counts[..., None] - above.sum(-1, keepdim=True)
        keep = keep & (above | (level & (level.cumsum(-1) <= spare)))
    return keep


def attend(
    queries: Float[Tensor, "batch heads query head_width"],
    keys: Float[Tensor, "batch kv_heads token head_width"],
    values: Float[Tensor, "batch kv_heads token value_width"],
    keep: Bool[Tensor, "batch ranked query token"],
    *,
    scaling: float,
    log_weights: Float[Tensor, "batch ranked query token"] | None = None,
) -> Float[Tensor, "batch heads query value_width"]:
    """Exact attention over the kept keys; a query that keeps none gives zeros.

    `keep` has one row a query head, a key/value head (shared in the group), or all heads. A key that was
    kept by chance stands for others: `log_weights`, as many rows, are added to its logits.
    """
    kv_heads, heads = keys.shape[1], queries.shape[1]

    def of_heads(rows: Shaped[Tensor, "batch ranked query token"]) -> Tensor:
        if rows.shape[1] == heads:
            return rearrange(rows, "b (h g) q t -> b h (g q) t", h=kv_heads)
        return repeat(rows, "b h q t -> b h (g q) t", g=heads // kv_heads)

    packed = rearrange(queries, "b (h g) q d -> b h (g q) d", h=kv_heads)
    bias = shut(of_heads(keep), queries.dtype)  # torch takes half as long with it as with booleans
    if log_weights is not None:
        bias = bias + of_heads(log_weights).to(queries.dtype)
    output = F.scaled_dot_product_attention(packed, keys, values, attn_mask=bias, scale=scaling)
    return rearrange(output, "b h (g q) d -> b (h g) q d", q=queries.shape[2])


def loki_attention(
    queries: Float[Tensor, "batch heads query head_width"],
    keys: Float[Tensor, "batch kv_heads token head_width"],
    values: Float[Tensor, "batch kv_heads token value_width"],
    *,
    rotation: Rotation,
    width: int,
    counts: Int[Tensor, " batch #ranked query"],
    visible: Bool[Tensor, " batch #ranked query token"],
    scaling: float,
    selection: Literal["per head", "shared in groups"],
) -> Float[Tensor, "batch heads query value_width"]:
    """Algorithm 1, whole: rotate, rank by the leading coordinates, keep, attend.

    `selection="per head"` is the paper's; it is ours too where there is one query head a key/value head.
    """
    turned_queries, turned_keys = rotation.turn_queries(queries), rotation.turn_keys(keys)
    scores = approximate_scores(turned_queries, turned_keys, width=width, scaling=scaling)
    if selection == "shared in groups":
        scores = shared_in_groups(scores, visible, kv_heads=keys.shape[1])
    keep = most_relevant(scores, visible, counts)
    return attend(turned_queries, turned_keys, values, keep, scaling=scaling)
