"""The runtime's objective without the logits of what is left out."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from fourfold_goldfish.cross_entropy import goldfish_cross_entropy
from fourfold_parallel.grid.linear import Linear
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.objective import (
    IGNORE,
    MicrobatchLoss,
    NextToken,
    TargetMask,
    token_nats,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactedNextToken:
    """`NextToken`, with the head applied to the kept targets alone: engines `Single`, `DDP`, `Fourfold`.

    Equal losses and gradients; the telemetry counts the targets left out but does not know their loss.
    """

    mask: TargetMask
    chunk: int = 1024
    """Rows whose logits are held at a time where the head is whole. On a grid a rank holds those of all
    its rows, of its part of the vocabulary."""

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """The row shifted by one, -100 where the mask drops."""
        return NextToken(mask=self.mask).targets(batch)

    def loss(
        self, model: nn.Module, batch: Batch, targets: Int[Tensor, "batch token"]
    ) -> MicrobatchLoss:
        """Summed loss on kept targets.

        Raises:
            ValueError: for a head that another engine cut over ranks, or that is more than a matrix.
        """
        plain: Any = getattr(model, "module", model)
        head = plain.get_output_embeddings()
        hidden = _before_head(model, head, batch.tokens[:, :-1])
        dropped = targets == IGNORE
        if isinstance(head, Linear):
            nats_sum = token_nats(head(hidden[~dropped]), targets[~dropped], plain).sum()
        else:
            weight = _whole_matrix(head)
            nats_sum = goldfish_cross_entropy(
                hidden.to(weight.dtype), weight, targets, dropped, reduction="sum", chunk=self.chunk
            )
        return MicrobatchLoss(
            nats_sum=nats_sum, telemetry={"dropped_targets": dropped.sum().to(nats_sum.dtype)}
        )


def _whole_matrix(head: Any) -> Float[Tensor, "vocabulary width"]:
    # A weight that FSDP2 cut over ranks is a DTensor, which knows its device mesh.
    weight = getattr(head, "weight", None)
    is_whole = type(head) is nn.Linear and not hasattr(weight, "device_mesh")
    if not is_whole or head.bias is not None:
        raise ValueError(
            f"the head {type(head).__name__} is not one whole matrix on this rank; "
            "use NextToken, or goldfish_cross_entropy with Split"
        )
    assert isinstance(weight, Tensor)
    return weight


def _before_head(
    model: nn.Module, head: nn.Module, tokens: Int[Tensor, "batch token"]
) -> Float[Tensor, "batch token width"]:
    """The head's input, from a pass through the model in which the head sees no token."""
    given: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        given.append(inputs[0])
        return (inputs[0][:, :0],)

    hook = head.register_forward_pre_hook(keep)
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
    [hidden] = given
    return hidden
