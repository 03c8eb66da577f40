"""The optimizer that Huginn-0125 was trained with: Adam through an arctangent, clipped tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SMALLEST_SQUARE = 1e-12
"""Floor of the second moment."""


class ELLISAdam(torch.optim.Optimizer):
    """As published: atan2 in place of a division, update clipping, weight decay apart from the rate.

        m <- beta1 m + (1 - beta1) g,     v <- max(beta2 v + (1 - beta2) g^2, 1e-12)
        rate' = rate / max(1, rms(g / sqrt(v)))                            (for each tensor)
        p <- (1 - rate / peak * decay) p - rate' / (1 - beta1^t) * atan2(m, sqrt(v / (1 - beta2^t)))

    The moments begin as the first gradient and its square, and are corrected for a beginning at zero
    all the same, so that the first step is longer than those that follow: warm up.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "peak": lr, "betas": betas, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        Raises:
            ValueError: for a closure, which one pass has no use for.
        """
        if closure is not None:
            raise ValueError("ELLISAdam looks at gradients once; call step() without a closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state |= {"step": 0, "mean": gradient.clone(), "square": gradient.square()}
        beta1, beta2 = group["betas"]
        state["step"] += 1
        mean, square = state["mean"], state["square"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).clamp_(SMALLEST_SQUARE)
        rms = (gradient.square() / square).mean().sqrt()
        rate = group["lr"] / rms.clamp(min=1.0) / (1 - beta1 ** state["step"])
        width = square.sqrt().div_(math.sqrt(1 - beta2 ** state["step"]))
        parameter.mul_(1 - group["lr"] / group["peak"] * group["weight_decay"])
        parameter.sub_(torch.atan2(mean, width).mul_(rate))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ellis:
    """`ELLISAdam` as a recipe's value; vectors and the attention's biases are not decayed."""

    learning_rate: float
    """Peak rate, multiplied by the schedule's factor at each step."""
    weight_decay: float
    """Share of a weight lost in a step at the peak rate."""
    beta1: float = 0.9
    beta2: float = 0.95

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the model's trainable parameters."""
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": decay} for decay in (self.weight_decay, 0.0)
        ]
        for parameter in model.parameters():
            if parameter.requires_grad:
                groups[0 if parameter.ndim == 2 else 1]["params"].append(parameter)
        return ELLISAdam(groups, lr=self.learning_rate, betas=(self.beta1, self.beta2))
