"""The runtime's objective without the logits of what is left out."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fourfold_goldfish.cross_entropy import PLAIN, Tail, goldfish_cross_entropy
from fourfold_parallel.grid.linear import Linear
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.objective import (
    IGNORE,
    MicrobatchLoss,
    NextToken,
    TargetMask,
    token_nats,
)

FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")
"""Names under which configurations keep a factor: some models multiply by it, others divide, others apply it
before the head."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names under which configurations keep a soft cap of logits."""
STEEPEST = 200.0
"""Products up to this, either way, are tried on what follows a head: far beyond caps in use."""
_TAILS: WeakKeyDictionary[nn.Module, Tail] = WeakKeyDictionary()
"""Tails that have been found, by model."""


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
            ValueError: for a head that another engine cut over ranks, or that is more than a matrix; where
                the model makes more of the head's products than a scale and a soft cap.
        """
        plain: Any = getattr(model, "module", model)
        head = plain.get_output_embeddings()
        weight = None if isinstance(head, Linear) else _whole_matrix(head)
        tail = tail_of(plain, batch.tokens[:1, :-1])
        hidden = _before_head(model, head, batch.tokens[:, :-1])
        dropped = targets == IGNORE
        if weight is None:
            logits = tail(head(hidden[~dropped]))
            nats_sum = token_nats(logits, targets[~dropped], plain).sum()
        else:
            nats_sum = goldfish_cross_entropy(
                hidden.to(weight.dtype),
                weight,
                targets,
                dropped,
                reduction="sum",
                chunk=self.chunk,
                tail=tail,
            )
        return MicrobatchLoss(
            nats_sum=nats_sum, telemetry={"dropped_targets": dropped.sum().to(nats_sum.dtype)}
        )


def _whole_matrix(head: Any) -> Float[Tensor, "vocabulary width"]:
    # A weight that FSDP2 cut over ranks is a DTensor, which knows its device mesh.
    weight = getattr(head, "weight", None)
    if type(head) is nn.Linear and head.bias is not None:
        raise ValueError("the head has a bias, which is added to every product; use NextToken")
    if type(head) is not nn.Linear or hasattr(weight, "device_mesh"):
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
    states, _ = _pass(model, head, tokens, lambda states: states[:, :0])
    return states


def _pass(
    model: nn.Module,
    head: nn.Module,
    tokens: Int[Tensor, "batch token"],
    seen: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "batch token width"], Float[Tensor, "..."]]:
    """The head's input, and the logits from a pass in which the head sees a part of it."""
    given: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        given.append(inputs[0])
        if inputs[0].shape[:-1] != tokens.shape:
            raise ValueError(
                f"the head is given states of shape {tuple(inputs[0].shape)} for tokens of shape "
                f"{tuple(tokens.shape)}, and not one a token; use NextToken"
            )
        return (seen(inputs[0]),)

    hook = head.register_forward_pre_hook(keep)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    if len(given) != 1:
        raise ValueError(
            f"{type(model).__name__} calls its head {len(given)} times in a pass, and not once; use NextToken"
        )
    return given[0], logits


def tail_of(model: Any, row: Int[Tensor, "1 token"]) -> Tail:
    """The scale and soft cap that a model applies behind its head, found once for each model.

    Values come from the configuration; whether and how a model uses them its own pass over a row says, in
    which the head sees two tokens and a ramp up to `STEEPEST` stands in place of its products for the second.

    Raises:
        ValueError: no scale and cap of the configuration make the model's logits of those products.
    """
    if model not in _TAILS:
        # Dropout and drawn states of the pass leave no trace: a resumed run is the uninterrupted one.
        devices = [row.device] if row.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad():
            products, logits = _products_and_logits(model, row)
        _TAILS[model] = _tail_between(model, products, logits)
    return _TAILS[model]


def _products_and_logits(
    model: Any, row: Int[Tensor, "1 token"]
) -> tuple[Float[Tensor, "1 2 vocabulary"], Float[Tensor, "..."]]:
    """The head's products of a real token and of a ramp, and what the model makes of both."""
    head = model.get_output_embeddings()
    kept: list[Tensor] = []

    def ramp(_: nn.Module, __: tuple[Tensor, ...], products: Tensor) -> Tensor:
        tried = products.clone()
        tried[:, 1] = torch.linspace(-STEEPEST, STEEPEST, tried.shape[-1])
        kept.append(tried.clone())
        return tried

    hook = head.register_forward_hook(ramp)
    try:
        _, logits = _pass(model, head, row, lambda states: states[:, [0, -1]])
    finally:
        hook.remove()
    [products] = kept
    return products, logits


def _tail_between(model: Any, products: Tensor, logits: Tensor) -> Tail:
    config = model.config.get_text_config()
    given = {name: getattr(config, name, None) for name in FACTORS + CAPS}
    values = {name: float(value) for name, value in given.items() if value}
    if logits.shape != products.shape:
        raise ValueError(
            f"{type(model).__name__} makes logits of shape {tuple(logits.shape)} from its head's "
            f"{tuple(products.shape)}; use NextToken, which reads the model's own logits"
        )
    factors = [values[name] for name in FACTORS if name in values]
    scales = [1.0, *factors, *(1 / factor for factor in factors)]
    caps = [PLAIN.cap, *(values[name] for name in CAPS if name in values)]
    coarse = min(products.dtype, logits.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    # Some models compute their tail in float32, whatever they are in.
    rounding = max(1e-5, 4 * torch.finfo(coarse).eps)
    for scale, cap in product(scales, caps):
        tail = Tail(scale=scale, cap=cap)
        made = tail(products.double())
        if torch.allclose(made, logits.double(), rtol=rounding, atol=rounding):
            return tail
    known = ", ".join(f"{name}={value:g}" for name, value in values.items()) or "none"
    raise ValueError(
        f"{type(model).__name__} makes something else of its head's products than a scale and a soft cap of "
        f"its configuration ({known}); use NextToken, which reads the model's own logits"
    )
