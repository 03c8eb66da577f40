"""The three matrix products of a linear layer, and the choice of how to compute them."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Products:
    """The products as torch would compute them for `torch.nn.Linear`, bit for bit."""

    def forward(
        self,
        x: Float[Tensor, "*batch k"],
        tile: Float[Tensor, "n k"],
        bias: Float[Tensor, " n"] | None,
    ) -> Float[Tensor, "*batch n"]:
        """`X Wᵀ + b`."""
        return F.linear(x, tile, bias)

    def input_gradient(
        self, dy: Float[Tensor, "*batch n"], tile: Float[Tensor, "n k"]
    ) -> Float[Tensor, "*batch k"]:
        """`dY W`."""
        return dy.flatten(0, -2).mm(tile).unflatten(0, dy.shape[:-1])

    def weight_gradient(
        self, dy: Float[Tensor, "*batch n"], x: Float[Tensor, "*batch k"]
    ) -> Float[Tensor, "n k"]:
        """`dYᵀ X`."""
        return dy.flatten(0, -2).t().mm(x.flatten(0, -2))
