"""The net under `parallelize`: a few tokens through the model before and after.

Rules are made of names, shapes and formulas; a model file may mean something else by them. So loss,
logits and the gradient of every parameter are computed once by the whole model and once on the grid,
and a model that became another one is refused, with the parameter that shows it most.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fourfold_parallel.grid.flow import in_evaluation
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.layout import decoder_name, text_config
from fourfold_parallel.grid.mesh import Mesh

TOKENS = 6
"""Of a row, at least: in the sequence form they divide over row."""
MOST_ROWS = 4
"""More shares of the batch than that get the same rows, without targets."""
TOLERANCE, COARSE_TOLERANCE = 2e-3, 0.15
"""Largest relative error, and the same in half precision; model files compute parts in float32, those
in float64 too. What it is there to catch was 0.3 and more in trials."""
SMALL = 1e-3
"""Of the model's largest gradient: a parameter's below that is rounding and no more."""


class AnotherModelError(ValueError):
    """The model on the grid answers something else than the whole model did."""


LossForm = Literal["function", "shifted", "aligned"]
"""How a model gets its loss: by its `loss_function`; or by itself, as the mean cross-entropy of the
next tokens, or of labels that stand where they are predicted."""


@torch.no_grad()
def loss_form(model: PreTrainedModel) -> LossForm:
    """The way in which a model gets its loss; one that computes it itself is asked, by a few tokens.

    Raises:
        ValueError: It computes something else, or has no values to ask it.
    """
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" in forward.__code__.co_names:
        return "function"
    name = type(model).__name__
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            f"{name} computes its loss itself, and not by its `loss_function`, and without values it "
            "cannot be asked which one; give a model with values"
        )
    tokens = torch.arange(2 * TOKENS, device=model.device).view(2, TOKENS) % 7 + 1
    labels = tokens.clone()
    labels[0, 2] = -100
    with in_evaluation(model):
        output = model(input_ids=tokens, labels=labels, use_cache=False)
    wide = output.logits.float()
    shifted = F.cross_entropy(wide[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    aligned = F.cross_entropy(wide.flatten(0, 1), labels.flatten())
    candidates: dict[LossForm, Tensor] = {"shifted": shifted, "aligned": aligned}
    allowed = COARSE_TOLERANCE / 5 if output.loss.itemsize < wide.itemsize else 1e-4
    for form, nats in candidates.items():
        if torch.isclose(nats, output.loss.float(), rtol=allowed):
            return form
    raise ValueError(
        f"{name} computes its loss itself, and it is not the mean cross-entropy of the next tokens: on "
        "a share of the batch it would be another one; it is not laid out"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The answers of the whole model to a few tokens."""

    mesh: Mesh
    tokens: Tensor
    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]
    largest_gradient: float

    @classmethod
    def of(cls, model: PreTrainedModel, mesh: Mesh) -> Check | None:
        """The answers of a model that is whole yet; None of one without values."""
        if any(p.is_meta for p in model.parameters()):
            return None
        rows = min(max(mesh.batch_size(), 2), MOST_ROWS)
        embedding: Any = model.get_input_embeddings()
        vocabulary = min(embedding.weight.shape[0], text_config(model).vocab_size)
        generator = torch.Generator().manual_seed(0)
        length = -(-TOKENS // mesh.row.size) * mesh.row.size
        tokens = torch.randint(1, vocabulary, (rows, length), generator=generator)
        tokens = tokens.to(model.device)
        kept = {name: p.grad for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = None
        try:
            with in_evaluation(model), torch.enable_grad():
                output = model(input_ids=tokens, labels=tokens, use_cache=False)
                if any(p.requires_grad for p in model.parameters()):
                    output.loss.backward()
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be checked: a forward and backward of {rows} rows of "
                f"{length} tokens fails before anything is laid out: {type(error).__name__}: {error}; "
                "pass checks=False to lay it out unchecked"
            ) from error
        gradients: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad
            parameter.grad = kept[name]
        return cls(
            mesh=mesh, tokens=tokens, loss=output.loss.detach(), logits=output.logits.detach(),
            gradients=gradients,
            largest_gradient=max((float(g.abs().max()) for g in gradients.values()), default=0.0),
        )  # fmt: skip

    def compare(self, model: PreTrainedModel, stored: Mapping[str, Any]) -> None:
        """Refuse a model on the grid that answers something else; its gradients are empty afterwards.

        Raises:
            AnotherModelError: Naming the largest difference and where it is.
            ValueError: It fails on the grid.
        """
        mesh, share = self.mesh, self.mesh.batch_rank()
        rows = len(self.tokens)
        # Every row once: the first shares of the batch take the rows in turn, the others none.
        mine = [row for row in range(rows) if row % mesh.batch_size() == share] or [0]
        tokens = self.tokens[mine]
        labels = tokens if share < rows else torch.full_like(tokens, -100)
        try:
            with in_evaluation(model), torch.enable_grad():
                output = model(input_ids=tokens, labels=labels, use_cache=False)
                if any(p.requires_grad for p in model.parameters()):
                    output.loss.backward()
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{type(model).__name__} ran whole and fails on the grid, which cuts the residual stream "
                f"between its blocks: {type(error).__name__}: {error}; use col=1, or compute the decoder "
                f"whole: rules={{{decoder_name(model)!r}: Whole()}}"
            ) from error
        worst = (_error(output.loss.detach(), self.loss), "the loss")
        logits = self.logits[mine]
        if output.logits.shape[-1] != logits.shape[-1]:
            start, stop = mesh.row.bounds(logits.shape[-1])
            logits = logits[..., start:stop]
        worst = max(worst, (_error(output.logits.detach(), logits), "the logits"))
        for name, parameter in model.named_parameters():
            worst = max(
                worst, (self._gradient_error(name, parameter, stored), f"{name}'s gradient")
            )
            parameter.grad = None
        largest = torch.tensor([worst[0]], dtype=torch.float64, device=self.logits.device)
        for axis in mesh.axes:
            largest = axis.all_reduce(largest, op="max", layer="check").wait()
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        allowed = max(COARSE_TOLERANCE if d.itemsize < 4 else TOLERANCE for d in dtypes)
        if not float(largest) <= allowed:
            where = worst[1] if worst[0] >= float(largest) else "what another rank names"
            raise AnotherModelError(
                f"{type(model).__name__} on the grid is another model: of {rows} rows of "
                f"{self.tokens.shape[1]} tokens, {where} differs by {float(largest):.2g} of its size "
                f"(allowed: {allowed:g}); this is a fault of the grid's rules for it: give "
                "rules={...: Whole()} for the part concerned, use col=1, or report it"
            )

    def _gradient_error(
        self, name: str, parameter: nn.Parameter, stored: Mapping[str, Any]
    ) -> float:
        expected = self.gradients.get(name)
        if expected is None or parameter.grad is None:
            has = parameter.grad is not None and bool(local(parameter.grad).any())
            return float(has and expected is None)
        cut = self.mesh.cut_of(parameter) if isinstance(parameter, DTensor) else {}
        how = stored[name]
        shape = how.keep_shape(expected.shape)
        piece = how.read(expected, self.mesh.slices(shape, cut), shape)
        scale = max(float(expected.abs().max()), SMALL * self.largest_gradient)
        difference = (local(parameter.grad) - piece).abs()
        return float(difference.max()) / scale if difference.numel() and scale else 0.0


def _error(found: Tensor, expected: Tensor) -> float:
    scale = float(expected.abs().max()) or 1.0
    return float((found - expected).abs().max()) / scale
