"""HashAttention: rank by signatures of bits that are learned (Desai et al. 2024, arXiv 2412.14468).

Two small networks a head map queries and keys to `bits` numbers, of which the signs are kept. They are
learned on calibration text so that the signatures' product tells whether a key is among a query's heaviest:
binary cross-entropy of sigmoid(Σ tanh · tanh) against the exact top keys, which weigh `WEIGHT` times the
others, by Adam. At work a key is known by its bits, and ranked by how many it shares with the query.

Differences: published keys have a network, and bits, for every query head; here for every key/value head,
so that heads of a group read the same ones. Networks may be smaller, and learn from thousands of tokens
instead of millions. The first and last 128 keys, which are kept and not learned from there, are the
budget's here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from fourfold_loki.attention import scores_of
from fourfold_loki.moments import Moments, Statistics
from fourfold_loki.selectors.base import Candidates, Selector

HEAVIEST = 32
"""Keys of a query that are to be told from the others."""
WEIGHT = 20.0
"""Of one of these in the loss."""
RATE = 1e-3
"""Adam's."""
BATCH = 64
"""Queries of a step."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Networks:
    """A network a head, in one layer: linear maps with SiLU between them."""

    weights: tuple[Float[Tensor, "heads inputs outputs"], ...]
    offsets: tuple[Float[Tensor, "heads outputs"], ...]

    def __call__(
        self, vectors: Float[Tensor, "batch heads token head_width"]
    ) -> Float[Tensor, "batch heads token bit"]:
        """The numbers whose signs are the bits."""
        hidden = vectors.float()
        for place, (weight, offset) in enumerate(zip(self.weights, self.offsets, strict=True)):
            hidden = F.silu(hidden) if place else hidden
            hidden = hidden @ weight.to(hidden.device) + offset[:, None].to(hidden.device)
        return hidden

    @classmethod
    def begun(cls, heads: int, sizes: Sequence[int], generator: torch.Generator) -> "Networks":
        """Uniform in ± inputs^-½, as torch's linear maps begin; they want gradients."""

        def uniform(inputs: int, *shape: int) -> Tensor:
            drawn = 2 * torch.rand(heads, *shape, generator=generator) - 1
            return (drawn / inputs**0.5).requires_grad_()

        pairs = list(pairwise(sizes))
        return cls(
            weights=tuple(uniform(inputs, inputs, outputs) for inputs, outputs in pairs),
            offsets=tuple(uniform(inputs, outputs) for inputs, outputs in pairs),
        )

    def detached(self) -> "Networks":
        """The same without gradients."""
        return Networks(
            weights=tuple(part.detach() for part in self.weights),
            offsets=tuple(part.detach() for part in self.offsets),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HashAttention(Selector):
    """Signatures by two sets of networks, one of each a layer; a `Learner` makes them."""

    queries: tuple[Networks, ...]
    keys: tuple[Networks, ...]

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """Bits that agree less bits that do not: the logit that the networks learned, by signs alone."""
        queries = self.queries[among.layer](among.queries).sign()
        keys = self.keys[among.layer](among.keys).sign()
        return scores_of(queries, keys, scaling=1.0)

    def cost(self, *, head_width: int, group: int) -> float:
        """The bits of a key, in numbers of 16."""
        del group
        return min(1.0, self.keys[0].offsets[-1].shape[-1] / 16 / head_width)

    @classmethod
    def from_statistics(cls, statistics: Statistics, *, bits: int = 32) -> "HashAttention":
        """Learned for a moment on normal draws with the moments of a calibration.

        For trying it out; `calibration.learn_signatures` learns from a model's own queries and keys.
        """
        layers, kv_heads, width, _ = statistics.keys.outer.shape
        group = round(float(statistics.queries.count[0, 0] / statistics.keys.count[0, 0]))
        learner = Learner(
            heads=kv_heads * group, kv_heads=kv_heads, sizes=(width, 2 * width, bits), steps=20
        )
        for layer in range(layers):
            queries = normal_draws(statistics.queries, layer, count=BATCH * group, seed=0)
            keys = normal_draws(statistics.keys, layer, count=4 * BATCH, seed=1)
            learner.learn(
                layer,
                rearrange(queries, "h (g q) d -> (h g) q d", g=group),
                keys,
                torch.ones(BATCH, keys.shape[1], dtype=torch.bool),
            )
        return learner.selector()


def normal_draws(
    moments: Moments, layer: int, *, count: int, seed: int
) -> Float[Tensor, "kv_heads vector head_width"]:
    """Normal vectors with the mean and covariance of a layer's."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    values, vectors = torch.linalg.eigh(moments.covariance(centred=True)[layer])
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    mean = moments.total[layer] / moments.count[layer][:, None]
    normal = torch.randn(len(mean), count, mean.shape[-1], generator=generator, dtype=root.dtype)
    return (normal @ root.mT + mean[:, None]).float()


def lesson_loss(
    of_queries: Networks,
    of_keys: Networks,
    queries: Float[Tensor, "heads query head_width"],
    keys: Float[Tensor, "kv_heads token head_width"],
    visible: Bool[Tensor, "query token"],
) -> Float[Tensor, ""]:
    """Cross-entropy between the soft signatures' products and membership in the heaviest keys."""
    exact = scores_of(queries[None], keys[None], scaling=1.0)[0].masked_fill(~visible, -torch.inf)
    heaviest = exact.topk(min(HEAVIEST, keys.shape[1]), dim=-1).indices
    target = torch.zeros_like(exact).scatter(-1, heaviest, 1.0)
    softly = of_queries(queries[None]).tanh(), of_keys(keys[None]).tanh()
    logits = scores_of(*softly, scaling=1.0)[0]
    weight = visible * (1 + (WEIGHT - 1) * target)
    return F.binary_cross_entropy_with_logits(logits, target, weight=weight)


@dataclass(slots=True, kw_only=True)
class Learner:
    """Networks that learn layer by layer, from as many passes over a text as there are."""

    heads: int
    kv_heads: int
    sizes: tuple[int, ...]
    """Of the networks, from the head's width to the bits."""
    steps: int
    """A lesson, each on `BATCH` of its queries."""
    seed: int = 0
    losses: dict[int, list[float]] = field(default_factory=dict)
    """Of every step, by layer."""
    _layers: dict[int, tuple[Networks, Networks, torch.optim.Adam]] = field(default_factory=dict)

    @torch.enable_grad()
    def learn(
        self,
        layer: int,
        queries: Float[Tensor, "heads query head_width"],
        keys: Float[Tensor, "kv_heads token head_width"],
        visible: Bool[Tensor, "query token"],
    ) -> None:
        """A lesson: some steps on a layer's queries and keys."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        if layer not in self._layers:
            ours = Networks.begun(self.heads, self.sizes, generator)
            theirs = Networks.begun(self.kv_heads, self.sizes, generator)
            parts = [*ours.weights, *ours.offsets, *theirs.weights, *theirs.offsets]
            self._layers[layer] = ours, theirs, torch.optim.Adam(parts, lr=RATE)
        of_queries, of_keys, adam = self._layers[layer]
        losses = self.losses.setdefault(layer, [])
        queries, keys = queries.detach(), keys.detach()
        for _ in range(self.steps):
            some = torch.randperm(queries.shape[1], generator=generator)[:BATCH]
            loss = lesson_loss(of_queries, of_keys, queries[:, some], keys, visible[some])
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))

    def selector(self) -> HashAttention:
        """The networks as they are now."""
        layers = [self._layers[layer] for layer in sorted(self._layers)]
        return HashAttention(
            queries=tuple(queries.detached() for queries, _, _ in layers),
            keys=tuple(keys.detached() for _, keys, _ in layers),
        )
