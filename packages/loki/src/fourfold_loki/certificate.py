"""A certificate for every step: bounds on what was not read, and reading until they hold.

An index knows the score of every key up to a radius. In a basis with W for queries and W^-T for keys,

    s_i = c q'·k'_i = ŝ_i + c q'[d:]·k'_i[d:]       |s_i - ŝ_i| <= c |q'[d:]| |k'_i[d:]| = ρ_i

so the leading coordinates and one norm a key bound every score. Let S be the keys that were read, U the
others, Z = Σ_S exp(s_i), X = Σ_U exp(ŝ_i + ρ_i) and Y = Σ_U exp(ŝ_i - ρ_i). Then

    mass of U      m <= X / (Z + X)
    output         |o_S - o| = |Σ_U p_i (v_i - o_S)| <= Σ_U exp(ŝ_i + ρ_i) (|v_i| + V) / (Z + Y)

with V the largest norm of a value, V >= |o_S|. Both fall with every key that is read, and are zero where
none is left. Of all diagonal scalings of the coordinates, the balanced basis is the one in which the expected
product of the norms, (E|q'[d:]|² E|k'[d:]|²)^½ = Σ_{i>d} σ_i, is the least (Cauchy and Schwarz).

What is bounded is the distance to attention over all keys of the cache in exact arithmetic: bounds are
computed in float64 from the numbers that the cache holds, norms are rounded up, and radii include the
rounding of sums. The output is rounded once, at the end, to the numbers of the model.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from fourfold_loki.attention import scores_of
from fourfold_loki.budget import Budget, Error

ROUNDING = 2.0**-32
"""Of a sum of up to a million terms in float64, in any order, relative to the sum of their sizes."""
FIRST = 16
"""Keys that a head reads in the first round."""
GROWTH = 1.25
"""Keys that a head has read after a round, over those before."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreBounds:
    """Scores as far as an index tells: each lies within `radius` of `centre`."""

    centre: Float[Tensor, "batch heads query token"]
    radius: Float[Tensor, "batch heads query token"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Certificate:
    """The output of attention over some keys, and at most how far it is from attention over all."""

    output: Float[Tensor, "batch heads query value_width"]
    unread: Float[Tensor, "batch heads query"]
    """Bound on the attention weight of the keys that were not read."""
    distance: Float[Tensor, "batch heads query"]
    """Bound on the norm of the output's error, head by head."""

    def relative(self) -> Float[Tensor, "batch query"]:
        """Bound on a layer's error over the norm of its dense output, heads side by side."""
        error = self.distance.square().sum(1).sqrt()
        least = self.output.square().sum((1, 3)).sqrt() - error
        return torch.where(error == 0, error, error / least.clamp(min=0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """Queries of one layer, what they could read, and what an index tells of it; all in float64."""

    scores: Float[Tensor, "batch heads query token"]
    """Exact; a key's is looked at where the key is read."""
    values: Float[Tensor, "batch kv_heads token value_width"]
    lengths: Float[Tensor, "batch kv_heads token"]
    """Norms of the values, rounded up."""
    bounds: ScoreBounds
    slack: Float[Tensor, "batch heads query"]
    """At most how far rounding moves a score."""
    visible: Bool[Tensor, "batch heads query token"]

    def grouped(self, keys: Float[Tensor, "batch kv_heads token"]) -> Float[Tensor, "b h 1 token"]:
        """A number a key, for each of the heads that read it."""
        return keys.repeat_interleave(self.scores.shape[1] // keys.shape[1], dim=1)[:, :, None]

    def weighed(
        self, weights: Float[Tensor, "batch heads query token"]
    ) -> Float[Tensor, "batch heads query value_width"]:
        """Sums of the values."""
        packed = rearrange(weights, "b (h g) q t -> b h (g q) t", h=self.values.shape[1])
        return rearrange(packed @ self.values, "b h (g q) v -> b (h g) q v", q=self.scores.shape[2])

    def certify(self, read: Bool[Tensor, "batch heads query token"]) -> Certificate:
        """Attention over the keys that are read, and the bounds of the two lines above."""
        left = self.visible & ~read
        seen = self.scores.masked_fill(~read, -torch.inf)
        upper = (self.bounds.centre + self.bounds.radius).masked_fill(~left, -torch.inf)
        lower = (self.bounds.centre - self.bounds.radius).masked_fill(~left, -torch.inf)
        # One shift for all; it cancels.
        shift = torch.maximum(seen.amax(-1, keepdim=True), upper.amax(-1, keepdim=True))
        shift = shift.clamp(min=torch.finfo(shift.dtype).min)
        weights, most, least = ((part - shift).exp() for part in (seen, upper, lower))
        weight, above, below = (part.sum(-1) for part in (weights, most, least))
        summed = self.weighed(weights)
        tiny = torch.finfo(weight.dtype).tiny
        output = summed / weight.clamp(min=tiny)[..., None]
        lengths = self.grouped(self.lengths)
        longest = lengths.masked_fill(~self.visible, 0).amax(-1)
        apart = (most * (lengths + longest[..., None])).sum(-1)
        apart = apart / (weight + below).clamp(min=tiny)
        looser = (1 + ROUNDING) * (2 * self.slack).exp()
        # The tiniest weight that is left counts, though its exponential may be zero.
        some = left.any(-1) * tiny
        unread = (looser * above / (weight + above).clamp(min=tiny) + some).clamp(max=1)
        distance = torch.minimum(looser * apart + some, 2 * longest * unread)
        return Certificate(output=output, unread=unread, distance=distance)


def scene_of(
    queries: Float[Tensor, "batch heads query head_width"],
    keys: Float[Tensor, "batch kv_heads token head_width"],
    values: Float[Tensor, "batch kv_heads token value_width"],
    bounds: ScoreBounds,
    visible: Bool[Tensor, " batch #heads query token"],
    *,
    scaling: float,
) -> Scene:
    """The scene that `read_until` reads from; queries and keys as they are compared."""
    scores = wide_scores(queries, keys, scaling=scaling)
    return Scene(
        scores=scores,
        values=values.double(),
        lengths=norms(values.double(), values.dtype),
        bounds=bounds,
        slack=rounding_of(queries, keys, scaling=scaling),
        visible=visible.expand(scores.shape),
    )


def read_until(
    error: Error, scene: Scene, budget: Budget
) -> tuple[Bool[Tensor, "batch heads query token"], Certificate]:
    """The keys that have to be read for the error, and their certificate.

    A head reads the keys (or pages) that could add most to its output first, a quarter more every round,
    until its share of the layer's error is no more than is allowed. Where it takes all keys, it takes all:
    the error is zero then.
    """
    kv_heads, shared = scene.values.shape[1], budget.selection == "shared in groups"
    visible = scene.visible
    upper = scene.bounds.centre + scene.bounds.radius
    tiny = torch.finfo(upper.dtype).tiny
    promise = (upper + scene.grouped(scene.lengths).clamp(min=tiny).log()).masked_fill(
        ~visible, -torch.inf
    )
    forced, units = budget.forced(visible), visible
    if budget.page > 1:
        promise, forced, units = (budget.paged(each) for each in (promise, forced, units))
    order = promise.masked_fill(forced, torch.inf).argsort(-1, descending=True)
    rank = order.argsort(-1)
    held, counts = units.sum(-1), forced.sum(-1).clamp(min=-(-FIRST // budget.page))
    takes_all = budget.is_dense(visible.sum(-1)) | (error.of_output == 0)
    counts = torch.where(takes_all, held, counts)
    while True:
        read = rank < counts[..., None]
        if budget.page > 1:
            read = read.repeat_interleave(budget.page, dim=-1)[..., : visible.shape[-1]]
        read = read & visible
        if shared:
            # What one head reads is there for all heads of its group.
            together = rearrange(read, "b (h g) q t -> b h g q t", h=kv_heads).any(2)
            read = together.repeat_interleave(read.shape[1] // kv_heads, dim=1)
        certificate = scene.certify(read)
        missed = certificate.relative() > error.of_output
        if not missed.any():
            return read, certificate
        size = certificate.output.square().sum((1, 3)).sqrt()
        share = error.of_output / (1 + error.of_output) * size / read.shape[1] ** 0.5
        grows = missed[:, None] & (certificate.distance > share[:, None])
        grown = (counts * GROWTH).ceil().long().minimum(held)
        # Rounding may leave a sum above the error where no summand is above its share.
        grows = torch.where(grows.any(1, keepdim=True), grows, missed[:, None])
        counts = torch.where(grows, grown, counts)


def wide_scores(
    queries: Float[Tensor, "batch heads query coordinate"],
    keys: Float[Tensor, "batch kv_heads token coordinate"],
    *,
    scaling: float,
) -> Float[Tensor, "batch heads query token"]:
    """`scores_of` in float64, which holds each product of two numbers of a cache."""
    return scores_of(queries.double(), keys.double(), scaling=scaling)


def rounding_of(
    queries: Float[Tensor, "batch heads query coordinate"],
    keys: Float[Tensor, "batch kv_heads token coordinate"],
    *,
    scaling: float,
) -> Float[Tensor, "batch heads query"]:
    """At most how far rounding moves a score of `wide_scores`, by the longest key."""
    longest = keys.double().norm(dim=-1).amax(-1)
    longest = longest.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    return ROUNDING * abs(scaling) * queries.double().norm(dim=-1) * longest[..., None]


def norms(vectors: Float[Tensor, "*size width"], kind: torch.dtype) -> Float[Tensor, "*size"]:
    """Norms of vectors of float64 as a cache of a type would hold them: each no less than it is."""
    numbers = torch.finfo(kind)
    above = vectors.norm(dim=-1) * (1 + ROUNDING) * (1 + numbers.eps) + numbers.tiny
    return above.to(kind).double()
