"""A training step minimises an objective. Papers bring a target mask, or an objective of their own."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fourfold_parallel.run.data import Batch, RowParts

IGNORE = -100
"""Target id that no loss counts, as in torch and transformers."""
TARGET_MASKS = "fourfold.target_masks"
"""Entry points by which installed packages announce a mask that others may train with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchLoss:
    """Sums over one microbatch, so that any grouping into microbatches and ranks adds up."""

    nats_sum: Float[Tensor, ""]
    """Summed loss over supervised targets, in nats, with its graph."""
    telemetry: dict[str, Float[Tensor, ""]]
    """Further sums worth recording, without a graph; added over microbatches and ranks."""


class Objective(Protocol):
    """A training objective as a value."""

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """Next-token targets of `batch.tokens[:, :-1]`, `IGNORE` where a target is not supervised."""
        ...

    def loss(
        self, model: nn.Module, batch: Batch, targets: Int[Tensor, "batch token"]
    ) -> MicrobatchLoss:
        """The summed loss of one microbatch."""
        ...


class TargetMask(Protocol):
    """Leaves some targets out of the loss."""

    def drop(
        self, tokens: Int[Tensor, "batch row"], document_ids: Int[Tensor, "batch row"] | None = None
    ) -> Bool[Tensor, "batch row"]:
        """True where `tokens[b, i]`, as a target, is left out."""
        ...


class MaskMaker(Protocol):
    """Makes a package's mask; announced under `TARGET_MASKS`."""

    def __call__(self, *, k: int, exempt: tuple[int, ...]) -> TargetMask:
        """A mask that leaves out about one target in `k`, and never an id of `exempt`."""
        ...


def announced_mask(name: str, *, k: int, exempt: Sequence[int] = ()) -> TargetMask:
    """The target mask that an installed package announces under a name.

    Raises:
        ValueError: No installed package announces this name.
    """
    announced = importlib.metadata.entry_points(group=TARGET_MASKS)
    if name not in announced.names:
        known = ", ".join(sorted(announced.names)) or "none"
        raise ValueError(
            f"target mask {name!r} belongs to no installed package (installed: {known}); "
            f"install fourfold-{name}"
        )
    make: MaskMaker = announced[name].load()
    return make(k=k, exempt=tuple(exempt))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAll:
    """No target is left out: plain cross-entropy."""

    def drop(
        self,
        tokens: Int[Tensor, "batch row"],
        document_ids: Int[Tensor, "batch row"] | None = None,  # noqa: ARG002 - the protocol's
    ) -> Bool[Tensor, "batch row"]:
        """All False."""
        return torch.zeros_like(tokens, dtype=torch.bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class NextToken:
    """Cross-entropy of the next token, in float32, over the targets that `mask` keeps."""

    mask: TargetMask

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """The row shifted by one, `IGNORE` where the mask drops."""
        dropped = self.mask.drop(batch.tokens, batch.document_ids)
        return batch.tokens.masked_fill(dropped, IGNORE)[:, 1:]

    def loss(
        self, model: nn.Module, batch: Batch, targets: Int[Tensor, "batch token"]
    ) -> MicrobatchLoss:
        """Loss on kept targets; from the same pass, without a graph, the loss on dropped ones."""
        logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
        nats = token_nats(logits, targets, model)
        nats_sum = nats.sum()
        dropped = targets == IGNORE
        with torch.no_grad():
            left_out = batch.tokens[:, 1:][dropped]
            dropped_sum = token_nats(logits.detach()[dropped], left_out, model).sum()
        return MicrobatchLoss(
            nats_sum=nats_sum,
            telemetry={
                "dropped_nats_sum": dropped_sum,
                "dropped_targets": dropped.sum().to(nats_sum.dtype),
                **of_parts(batch.parts, nats.detach(), targets),
            },
        )


def of_parts(
    parts: RowParts, nats: Float[Tensor, "batch token"], targets: Int[Tensor, "batch token"]
) -> dict[str, Float[Tensor, ""]]:
    """Sums of the losses and numbers of the supervised targets of each part of a mixture.

    Every part has its two entries on every rank, though none of its rows be there.
    """
    if not parts.names:
        return {}
    of_rows = torch.tensor(parts.of_rows, device=nats.device)
    none = nats.new_zeros(len(parts.names))
    losses = none.index_add(0, of_rows, nats.sum(dim=1))
    supervised = none.index_add(0, of_rows, (targets != IGNORE).sum(dim=1).to(nats.dtype))
    return {
        key: value
        for name, *sums in zip(parts.names, losses, supervised, strict=True)
        for key, value in zip((f"nats_sum_of_{name}", f"targets_of_{name}"), sums, strict=True)
    }


def token_nats(
    logits: Float[Tensor, "*batch vocabulary"], targets: Int[Tensor, "*batch"], model: nn.Module
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of each target in nats; 0 where the target is `IGNORE`.

    Computed in float32 at least. On a grid that cuts the vocabulary, `model` knows which part its logits are
    of, and they are not gathered.
    """
    on_the_grid = getattr(getattr(model, "loss_function", None), "nats", None)
    if on_the_grid is not None:
        return on_the_grid(logits, targets)
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(targets.shape)
