"""Cross-entropy from hidden states that never computes the logits of a target that is left out.

The rows that are kept are gathered first, then go through the head in chunks, so that time is that of the
kept targets and memory that of one chunk's logits. Gradients are made in the forward pass, while a chunk's
probabilities are at hand, and scaled in the backward pass.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fourfold_parallel.grid.collectives import Axis
from fourfold_parallel.grid.layers import vocabulary_cross_entropy
from fourfold_parallel.run.objective import IGNORE


@dataclass(frozen=True, slots=True)
class Split:
    """A head whose rows, one for each id, are cut over an axis of the runtime's grid."""

    axis: Axis
    vocabulary: int
    """Ids in the whole head; this rank holds those in `axis.bounds(vocabulary)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The way from the head's products to logits: `cap * tanh(scale * product / cap)`."""

    scale: float = 1.0
    """Factor behind the head: `logit_scale` of Cohere, one over `logits_scaling` of Granite."""
    cap: float = math.inf
    """Soft cap, `final_logit_softcapping` of Gemma; infinity caps nothing."""

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"cap={self.cap} must be positive; use math.inf for none")

    def __call__(
        self, products: Float[Tensor, "*batch vocabulary"]
    ) -> Float[Tensor, "*batch vocabulary"]:
        """The logits."""
        scaled = products if self.scale == 1 else products * self.scale
        return scaled if math.isinf(self.cap) else (scaled / self.cap).tanh() * self.cap

    def apply_(
        self, products: Float[Tensor, "row vocabulary"]
    ) -> tuple[Float[Tensor, "row vocabulary"], Float[Tensor, "#row #vocabulary"]]:
        """The logits, in the memory of the products, and their derivative with respect to the products."""
        products.mul_(self.scale)
        if math.isinf(self.cap):
            return products, products.new_full((1, 1), self.scale)
        bent = products.div_(self.cap).tanh_()
        slope = bent.square().sub_(1).mul_(-self.scale)
        return bent.mul_(self.cap), slope


PLAIN = Tail()
"""The products are the logits."""
Backend = Literal["torch", "triton"] | Split
"""The way from a chunk's logits to losses and slopes: torch operations, one Triton kernel (on a GPU), or
torch operations and collectives over a split vocabulary."""


def goldfish_cross_entropy(
    hidden: Float[Tensor, "batch token width"],
    lm_head: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, "batch token"],
    drop: Bool[Tensor, "batch token"],
    *,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int = 1024,
    backend: Backend = "torch",
    tail: Tail = PLAIN,
) -> Float[Tensor, ""]:
    """Loss in nats over the targets that are neither dropped nor ignored.

    Equal to `F.cross_entropy(tail(hidden @ lm_head.T), targets with -100 where dropped)`. Shapes depend on
    the mask, so a GPU waits for it once. A head with a bias is more than `lm_head`, and not served.

    Args:
        hidden: what the head would be given.
        lm_head: the head's weight; under `Split` this rank's rows of it.
        targets: `targets[b, i]` is the id that `hidden[b, i]` predicts; -100 counts for nothing.
        drop: True where a target is left out.
        reduction: over kept targets; `sum` where ranks or microbatches share one normalisation.
        chunk: rows whose logits are held at a time.
        backend: how losses come from logits.
        tail: what the model does to its head's products before they are logits.

    Raises:
        ValueError: for shapes that do not match, or ids that the head does not have.
    """
    rows, kept_targets = _kept(hidden, lm_head, targets, drop, chunk, backend)
    nats_sum = _CompactedCrossEntropy.apply(rows, lm_head, kept_targets, chunk, backend, tail)
    assert isinstance(nats_sum, Tensor)
    return nats_sum / max(1, len(rows)) if reduction == "mean" else nats_sum


@torch.no_grad()
def dropped_nats(
    hidden: Float[Tensor, "batch token width"],
    lm_head: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, "batch token"],
    drop: Bool[Tensor, "batch token"],
    *,
    chunk: int = 1024,
    backend: Backend = "torch",
    tail: Tail = PLAIN,
) -> tuple[Float[Tensor, ""], int]:
    """Summed loss on the targets that were left out, and their number: how well they are protected.

    From the same hidden states as the training loss, without a graph; costs their logits, so call it at
    intervals.
    """
    rows, left_out = _kept(hidden, lm_head, targets, ~drop, chunk, backend)
    nats_sum = _CompactedCrossEntropy.apply(rows, lm_head, left_out, chunk, backend, tail)
    assert isinstance(nats_sum, Tensor)
    return nats_sum, len(rows)


def _kept(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, drop: Tensor, chunk: int, backend: Backend
) -> tuple[Float[Tensor, "kept width"], Int[Tensor, " kept"]]:
    """The rows that count and their targets."""
    shape = tuple(hidden.shape[:2])
    if tuple(targets.shape) != shape or tuple(drop.shape) != shape or drop.dtype != torch.bool:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} and a {drop.dtype} mask of shape "
            f"{tuple(drop.shape)} do not match hidden states [batch, token] = {shape}; "
            "give one id and one bool per hidden state"
        )
    if not isinstance(backend, Split) and backend not in ("torch", "triton"):
        raise ValueError(
            f"backend={backend!r} is none of 'torch', 'triton' and Split(axis, vocabulary); Liger's fused "
            "loss is none of them: it computes the logits of what is left out; give it labels of -100"
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk} holds no row; use 1 or more")
    keep = (~drop & (targets != IGNORE)).flatten().nonzero().squeeze(1)
    kept = targets.flatten()[keep]
    vocabulary = backend.vocabulary if isinstance(backend, Split) else len(lm_head)
    if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < vocabulary:
        raise ValueError(
            f"targets hold ids {int(kept.min())} to {int(kept.max())}, the head has {vocabulary}; "
            f"use ids of the head, and {IGNORE} for targets that do not count"
        )
    return hidden.flatten(0, 1)[keep], kept


class _CompactedCrossEntropy(torch.autograd.Function):
    """Summed loss of rows; their gradient and the head's are made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        backend: Backend,
        tail: Tail,
    ) -> Tensor:
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(rows.dtype, torch.float32)
        nats_sum = torch.zeros((), dtype=wide, device=rows.device)
        rows_slope = torch.empty_like(rows) if needs_rows else None
        weight_slope = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for first in range(0, len(rows), chunk):
            # One chunk's logits are in memory at a time, and become their own gradient in place.
            part = rows[first : first + chunk]
            logits, bend = tail.apply_((part @ weight.T).to(wide))
            nats, slope = _losses_and_slopes(logits, targets[first : first + chunk], backend)
            nats_sum += nats.sum()
            slope = slope.mul_(bend).to(weight.dtype)
            # Back through the product: a row's gradient is written once, the head's is summed.
            if rows_slope is not None:
                torch.mm(slope, weight, out=rows_slope[first : first + chunk])
            if weight_slope is not None:
                if weight_slope.dtype == slope.dtype:
                    weight_slope.addmm_(slope.T, part)
                else:
                    weight_slope += slope.T @ part
        if rows_slope is not None and isinstance(backend, Split):
            # Each rank knows its ids' share of a row's gradient.
            rows_slope = backend.axis.all_reduce(rows_slope, layer="loss").wait()
        ctx.slopes = rows_slope, None if weight_slope is None else weight_slope.to(weight.dtype)
        return nats_sum

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_slope, weight_slope = (
            None if slope is None else slope * gradient.to(slope.dtype) for slope in ctx.slopes
        )
        return rows_slope, weight_slope, None, None, None, None


def _losses_and_slopes(
    logits: Float[Tensor, "row vocabulary"], targets: Int[Tensor, " row"], backend: Backend
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row vocabulary"]]:
    """Losses of a chunk in nats and their gradient with respect to its logits, which are overwritten."""
    if isinstance(backend, Split):
        with torch.enable_grad():
            leaf = logits.requires_grad_()
            nats = vocabulary_cross_entropy(
                leaf, targets, row=backend.axis, vocabulary=backend.vocabulary
            )
            [slope] = torch.autograd.grad(nats.sum(), leaf)
        return nats.detach(), slope
    if backend == "triton":
        from fourfold_goldfish.kernels import losses_and_slopes

        return losses_and_slopes(logits, targets), logits
    # Softmax less one at the true id, in the memory of the logits; the loss is read off on the way.
    true = targets[:, None]
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    nats = -logits.gather(-1, true).squeeze(-1)
    partition = logits.exp_().sum(dim=-1)
    logits.div_(partition[:, None])
    logits.scatter_add_(-1, true, torch.full_like(true, -1, dtype=logits.dtype))
    return nats + partition.log(), logits
