"""Loki: rank by the leading coordinates of a rotated basis (Singhania et al. 2024)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fourfold_loki.attention import approximate_scores, scores_of
from fourfold_loki.basis import Basis
from fourfold_loki.certificate import ROUNDING, ScoreBounds, norms, rounding_of
from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loki(Selector):
    """The `widths[layer]` leading coordinates of `basis` decide."""

    basis: Basis
    widths: tuple[int, ...]
    """Coordinates that are read, one number a layer (d in the paper)."""
    bits: int = 8
    """Of each other coordinate, in the index that bounds scores; 0 where it holds their norm alone."""

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

        if not 0 <= self.bits <= 16:
            raise ValueError(f"bits={self.bits} of a coordinate; use 0 to 16, such as 8")

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """ŝ of every key."""
        queries, keys = self.turned(among)
        return approximate_scores(
            queries, keys, width=self.widths[among.layer], scaling=among.scaling
        )

    def bounds(self, among: Candidates) -> ScoreBounds:
        """By the leading coordinates, codes of the others, and the norm of what codes leave of a key.

        The error of a score is at most a product of two norms (Cauchy and Schwarz). Equal steps in all
        coordinates make it smaller than steps that follow their spread (measured, not derived).
        """
        width, rotation = self.widths[among.layer], self.basis.rotation(among.layer)
        heads, kv_heads = among.queries.shape[1], among.keys.shape[1]
        queries, keys = among.queries.double(), among.keys.double()
        rounding = rounding_of(queries, keys, scaling=among.scaling)
        if not among.turned:
            # Maps of float32 are no exact inverses of one another.
            off = rotation.query_map.double() @ rotation.key_map.double().mT
            off = torch.linalg.matrix_norm(off - torch.eye(off.shape[-1], device=off.device))
            rounding = rounding * (1 + off.repeat_interleave(heads // kv_heads)[:, None] / ROUNDING)
            queries, keys = rotation.turn_queries(queries), rotation.turn_keys(keys)
        ahead, rest = queries[..., width:], keys[..., width:]
        coded = as_coded(rest, self.bits, among.keys.dtype)
        left = norms(rest - coded, among.keys.dtype).repeat_interleave(heads // kv_heads, 1)
        rounding = rounding + rounding_of(queries, keys, scaling=among.scaling)
        size = abs(among.scaling) * ahead.norm(dim=-1)
        return ScoreBounds(
            centre=approximate_scores(queries, keys, width=width, scaling=among.scaling)
            + scores_of(ahead, coded, scaling=among.scaling),
            radius=size[..., None] * left[:, :, None] + rounding[..., None],
        )

    def bounds_cost(self, *, head_width: int, group: int) -> float:
        """Beside the leading coordinates: codes of the others in numbers of 16 bits, a scale, a norm."""
        del group
        extra = 1 + (self.bits > 0)
        numbers = [width + (head_width - width) * self.bits / 16 + extra for width in self.widths]
        return sum(numbers) / len(numbers) / head_width

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


def as_coded(
    vectors: Float[Tensor, "*size coordinate"], bits: int, kind: torch.dtype
) -> Float[Tensor, "*size coordinate"]:
    """Vectors as codes of `bits` tell them: 2^bits levels about zero, and a scale a vector, of a type."""
    if bits == 0 or vectors.shape[-1] == 0:
        return torch.zeros_like(vectors)
    largest = 2 ** (bits - 1) - 0.5
    scale = (vectors.abs().amax(-1, keepdim=True) / largest).to(kind).double()
    steps = (vectors / scale.clamp(min=torch.finfo(kind).tiny) - 0.5).round() + 0.5
    return steps.clamp(-largest, largest) * scale
