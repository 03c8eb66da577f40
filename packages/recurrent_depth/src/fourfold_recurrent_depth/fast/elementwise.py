"""The two elementwise steps of a block with backward passes that save and touch less than autograd's.

A block is four norms and one gate around four products. At the widths that train on a CPU the products
are small, so these steps are most of the time and of the saved tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def rms_norm(
    x: Float[Tensor, "*batch width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*batch width"]:
    """Root-mean-square norm: x / rms(x) in float32 or wider, rounded to x's format, times the gain.

    Where the gain's format is wider than x's, so is the result: in mixed precision the residual stream
    stays float32, as in the published training.
    """
    wide = x.dtype in (torch.float32, torch.float64)
    if not wide:
        normal = F.rms_norm(x.float(), weight.shape, None, eps)
        return normal.to(x.dtype) * weight
    if torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else normalised(x, weight, eps)


def normalised(
    x: Float[Tensor, "*batch width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*batch width"]:
    """The norm in six kernels, without a backward pass; x in float32 or wider."""
    return (x * _scale(x, eps)).mul_(weight)


def _scale(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def gated_silu(x: Float[Tensor, "*batch twice"]) -> Float[Tensor, "*batch hidden"]:
    """The silu of the first half, times the second."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _GatedSilu.apply(x)
    return gated(x)


def gated(x: Float[Tensor, "*batch twice"]) -> Float[Tensor, "*batch hidden"]:
    """The same without a backward pass."""
    gate, up = x.chunk(2, dim=-1)
    # Exponentials over rows with gaps take more than twice the time of a copy and of those without.
    return F.silu(gate.contiguous()).mul_(up)


def eager_attention(
    module: nn.Module,
    query: Float[Tensor, "batch head token width"],
    key: Float[Tensor, "batch head context width"],
    value: Float[Tensor, "batch head context width"],
    attention_mask: Float[Tensor, "batch 1 token context"] | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Float[Tensor, "batch token head width"], Float[Tensor, "batch head token context"]]:
    """Attention as a formula, with transformers' signature: the backend `eager`."""
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    weights = scores if attention_mask is None else scores + attention_mask
    weights = weights.softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        along = gradient * normal
        share = (along @ weight).unsqueeze(-1).div_(x.shape[-1])
        of_weight = along.flatten(0, -2).sum(0)
        of_x = torch.mul(gradient, weight, out=along)
        of_x.addcmul_(normal, share, value=-1).mul_(scale)
        return of_x, of_weight, None


class _GatedSilu(torch.autograd.Function):
    """Saves its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gated(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        gate = gate.contiguous()
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        of_x = torch.empty_like(x)
        of_gate, of_up = of_x.chunk(2, dim=-1)
        torch.mul(gradient, silu, out=of_up)
        # silu' = sigmoid + silu (1 - sigmoid)
        slope = silu.sub_(silu * sigmoid).add_(sigmoid)
        torch.mul(gradient, up, out=of_gate)
        of_gate.mul_(slope)
        return of_x
