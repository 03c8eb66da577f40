"""Outlier coordinates and their part in anisotropy (Puccetti et al. 2022; Timkey and van Schijndel 2021).

A token's residual stream `h` after a layer has `width` coordinates. In a trained transformer a handful of
them lie far from the others, the same ones for most tokens and layers. Three definitions of an outlier are
in use and name different sets:

*by share*      more than half of the tokens have `|h_d - mean(h)| > 3 sd(h)` over their own coordinates
*by variance*   the variance of `h_d` over tokens is above 5 times the mean variance (Rudman et al. 2023)
*by parameter*  a norm's gain or bias lies beyond 3 sd of its vector in half of the norms (the paper's)

Anisotropy is the mean cosine of two tokens. With `u = h / |h|` over T tokens it needs no pairs:

    cosine = (norm(sum u)^2 - T) / (T (T - 1)) = sum over d of ((sum u_d)^2 - sum u_d^2) / (T (T - 1)),

so each coordinate has a share in it, and the shares add up. Everything here is a sum over tokens, kept
apart by document: one pass over a text of any length, added up over ranks, resampled by documents
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SIGMAS = 3.0
"""Standard deviations of a token's coordinates, or of a parameter's, beyond which one is far away."""
MOST = 0.5
"""Share of tokens, of layers or of norms from which on an outlier is one of most."""
TIMES = 5.0
"""Times the mean variance."""

Reduce = Callable[[Tensor], Tensor]
"""The sum over all pieces of something that is cut; the identity where nothing is."""


def alone(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The sum over the pieces of what is whole."""
    return tensor


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """States shifted and scaled by coordinate, layer by layer, before they are measured."""

    shift: Float[Tensor, "layers width"]
    scale: Float[Tensor, "layers width"]

    def __call__(
        self, layer: int, states: Float[Tensor, "*tokens width"]
    ) -> Float[Tensor, "*tokens width"]:
        """States of a layer as the view shows them."""
        shift, scale = (part[layer].to(states.device) for part in (self.shift, self.scale))
        return (states - shift) * scale


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Sums over the tokens of each document, in float64: all that is kept of a text.

    `width` may be a rank's piece of the residual stream; counts and norms are then of the whole.
    """

    tokens: Float[Tensor, "documents layers"]
    total: Float[Tensor, "documents layers width"]
    square: Float[Tensor, "documents layers width"]
    beyond: Float[Tensor, "documents layers width"]
    """Tokens in which a coordinate lies beyond `SIGMAS` of the token's others."""
    unit: Float[Tensor, "documents layers width"]
    """Of `u = h / |h|`."""
    unit_square: Float[Tensor, "documents layers width"]
    norm: Float[Tensor, "documents layers"]

    @classmethod
    def empty(cls, documents: int, layers: int, width: int) -> Self:
        """Of no tokens."""
        whole, flat = (documents, layers, width), (documents, layers)
        return cls(
            *(
                torch.zeros(
                    flat if field.name in ("tokens", "norm") else whole, dtype=torch.float64
                )
                for field in fields(cls)
            )
        )

    def add_(
        self,
        document: int,
        layer: int,
        states: Float[Tensor, "token width"],
        *,
        over_width: Reduce = alone,
    ) -> None:
        """Take in the states of some tokens, in place.

        Args:
            document: that they are of.
            layer: that they leave; 0 is the embedding.
            states: one row a token; on a grid this rank's coordinates.
            over_width: sums over the ranks that hold the other coordinates.
        """
        h = states.detach().double()
        power = h.square()
        size = over_width(torch.full((len(h),), float(h.shape[1]), dtype=h.dtype, device=h.device))
        of_token = over_width(torch.stack([h.sum(1), power.sum(1)]))
        mean = of_token[0] / size
        spread = (of_token[1] / size - mean.square()).clamp(min=0).sqrt()
        length = of_token[1].sqrt()
        far = (h - mean[:, None]).abs() > SIGMAS * spread[:, None]
        # A state of zeros has no direction; it counts as a token that is like no other.
        u = h / length.clamp(min=torch.finfo(h.dtype).tiny)[:, None]
        self.tokens[document, layer] += len(h)
        self.norm[document, layer] += length.sum().cpu()
        for kept, new in (
            (self.total, h), (self.square, power), (self.beyond, far.double()),
            (self.unit, u), (self.unit_square, u.square()),
        ):  # fmt: skip
            kept[document, layer] += new.sum(0).cpu()

    def __add__(self, other: Self) -> Self:
        return self.mapped(lambda name: getattr(self, name) + getattr(other, name))

    def mapped(self, change: Callable[[str], Tensor]) -> Self:
        """The sums that a function of each one's name gives."""
        return type(self)(*(change(field.name) for field in fields(self)))

    def drawn(self, weights: Float[Tensor, "draws documents"]) -> Self:
        """Sums of resamples: a draw holds document `i` so many times, and is one document of the result."""
        return self.mapped(
            lambda name: torch.einsum("bd,d...->b...", weights.double(), getattr(self, name))
        )

    def pooled(self) -> Self:
        """All documents as one."""
        return self.drawn(torch.ones(1, len(self.tokens)))

    def shares(self) -> Float[Tensor, "documents layers width"]:
        """Share of the tokens in which a coordinate is far from the token's others."""
        return self.beyond / self.tokens[..., None]

    def means(self) -> Float[Tensor, "documents layers width"]:
        """Mean of each coordinate over tokens."""
        return self.total / self.tokens[..., None]

    def variances(self) -> Float[Tensor, "documents layers width"]:
        """Variance of each coordinate over tokens."""
        return (self.square / self.tokens[..., None] - self.means().square()).clamp(min=0)

    def contributions(self) -> Float[Tensor, "documents layers width"]:
        """Part of each coordinate in the mean cosine of two distinct tokens; they add up to it."""
        pairs = self.tokens * (self.tokens - 1)
        return (self.unit.square() - self.unit_square) / pairs[..., None]

    def cosines(self) -> Float[Tensor, "documents layers"]:
        """Mean cosine of two distinct tokens: anisotropy."""
        return self.contributions().sum(-1)

    def norms(self) -> Float[Tensor, "documents layers"]:
        """Mean length of a token's state."""
        return self.norm / self.tokens

    def centred(self) -> View:
        """States less their mean over all tokens."""
        mean = self.pooled().means()[0]
        return View(mean, torch.ones_like(mean))

    def standardised(self) -> View:
        """States less their mean, every coordinate at variance one; one that never varies stays at zero."""
        whole = self.pooled()
        deviation = whole.variances()[0].sqrt()
        return View(
            whole.means()[0], torch.where(deviation > 0, 1 / deviation, torch.zeros_like(deviation))
        )

    def without(self, coordinates: tuple[int, ...]) -> View:
        """States with some coordinates left out."""
        scale = torch.ones_like(self.total[0])
        scale[:, list(coordinates)] = 0
        return View(torch.zeros_like(scale), scale)


def by_share(sums: Sums) -> Bool[Tensor, "layers width"]:
    """Outliers by share, over all documents."""
    return sums.pooled().shares()[0] > MOST


def by_variance(sums: Sums) -> Bool[Tensor, "layers width"]:
    """Outliers by variance, over all documents."""
    variance = sums.pooled().variances()[0]
    return variance > TIMES * variance.mean(-1, keepdim=True)


def parameter_shares(vectors: Float[Tensor, "norms width"]) -> Float[Tensor, " width"]:
    """Share of a model's norms in which a coordinate's gain, or bias, is far from the others'."""
    mean, spread = vectors.mean(-1, keepdim=True), vectors.std(-1, keepdim=True, correction=0)
    return ((vectors - mean).abs() > SIGMAS * spread).double().mean(0)


def by_parameter(vectors: Float[Tensor, "norms width"]) -> Bool[Tensor, " width"]:
    """Outliers by parameter: gains, or biases, of a model's norms."""
    return parameter_shares(vectors) >= MOST


def lasting(outliers: Bool[Tensor, "layers width"]) -> tuple[int, ...]:
    """Coordinates that are outliers in at least half of the layers; give it the inner ones."""
    return tuple(torch.nonzero(outliers.double().mean(0) >= MOST).flatten().tolist())


def top_share(
    contributions: Float[Tensor, "*layers width"], top: int = 3
) -> Float[Tensor, "*layers"]:
    """Share of the mean cosine that the coordinates with the largest parts carry."""
    largest = contributions.topk(min(top, contributions.shape[-1]), dim=-1).values
    return largest.sum(-1) / contributions.sum(-1)


def partition_isotropy(states: Float[Tensor, "token width"]) -> float:
    """Least over greatest partition function along the principal axes; 1 is isotropic.

    `Z(c) = sum of exp(c h)` over tokens, for `c` each unit eigenvector of the second moment and its opposite
    (Arora et al. 2016; Mu and Viswanath 2018). States are scaled to a mean square length of 1 first, without
    which the number would tell their scale. Directions in which no state lies have `Z = tokens`.
    """
    h = states.double()
    h = h / h.square().sum(1).mean().sqrt()
    _, _, axes = torch.linalg.svd(h, full_matrices=False)
    along = h @ axes.T
    partitions = [torch.logsumexp(along, 0), torch.logsumexp(-along, 0)]
    if len(h) < h.shape[1]:
        partitions.append(h.new_tensor([float(len(h))]).log())
    logarithms = torch.cat(partitions)
    return float((logarithms.min() - logarithms.max()).exp())
