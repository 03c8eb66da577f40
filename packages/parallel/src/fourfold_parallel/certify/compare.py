"""A model on grids of ranks against itself in one process: loss, logits, every gradient, one step.

`on_grids` runs on every rank of a launch; `certified` starts ranks, calls it and takes the worst.
"""

from __future__ import annotations

import copy
import gc
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import fourfold_parallel
from fourfold_parallel.certify import toys
from fourfold_parallel.certify.toys import in_float64, toy_model
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.huggingface import Parallel, parallelize
from fourfold_parallel.testing.grids import Sizes, mesh_of, piece_of

ROWS, TOKENS, IGNORED_SHARE, SILENT_ROWS = 8, 16, 0.3, 2
FIRST_TOKEN, LAST_TOKEN = 4, 100
"""Between them lie tokens that no toy means anything else by."""
EXACT = 1e-9
"""Of float64 sums in another order, relative to the largest; a missing term shows at 1e-3 and more."""
RATE, EPSILON = 0.01, 1e-3
"""AdamW's, with a divisor so large that a gradient that is nought up to rounding moves nothing."""
SMALL_GRADIENT = 1e-3
"""A tensor's gradients are compared relative to its largest, or this share of the model's largest."""

Result = Literal["equal", "refused", "wrong", "crash"]
WORST: tuple[Result, ...] = ("equal", "refused", "wrong", "crash")
QUANTITIES = ("loss", "logits", "gradients", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one grid gave, over all ranks."""

    result: Result
    differences: Mapping[str, float] = field(default_factory=dict[str, float])
    """Largest difference of each quantity, relative to the largest value of the dense model's."""
    where: str = ""
    """The parameter whose gradient differs most."""
    message: str = ""
    """Of a refusal or a crash."""
    whole: tuple[str, ...] = ()
    """Blocks that every rank of row and col computes alike."""

    @property
    def difference(self) -> float:
        """The largest of all."""
        return max(self.differences.values(), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """For a record: without what is empty."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """What the model gives in one process."""

    logits: Tensor
    loss: Tensor
    gradients: Mapping[str, Tensor]
    stepped: Mapping[str, Tensor]
    """Parameters after one step."""
    loss_after: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token ids and labels; some labels are ignored, in some rows all."""

    tokens: Tensor
    labels: Tensor

    def rows(self, rows: slice) -> Batch:
        """A share of it."""
        return Batch(tokens=self.tokens[rows], labels=self.labels[rows])


def batch_of(*, rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    """The same on every rank; its first rows have no valid label."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (rows, tokens), generator=generator)
    is_ignored = torch.rand(rows, tokens, generator=generator) < IGNORED_SHARE
    labels = ids.masked_fill(is_ignored, -100)
    labels[:SILENT_ROWS] = -100
    return Batch(tokens=ids, labels=labels)


def precise(dtype: torch.dtype) -> AbstractContextManager[None]:
    """The scope in which a model of this format is computed."""
    return in_float64() if dtype == torch.float64 else nullcontext()


def equal_on_ranks(model: nn.Module) -> None:
    """Give every rank the first one's values; some classes leave memory as they find it."""
    with torch.no_grad():
        tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        flat = torch.cat([tensor.to(torch.float64).flatten() for tensor in tensors])
        dist.broadcast(flat, 0)
        places = flat.split([tensor.numel() for tensor in tensors])
        for tensor, place in zip(tensors, places, strict=True):
            tensor.copy_(place.view(tensor.shape))


def forward_and_backward(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and loss; gradients are left in the parameters."""
    out: Any = model(input_ids=batch.tokens, labels=batch.labels, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach()


@torch.no_grad()
def stepped(model: nn.Module) -> None:
    """One AdamW step on this process's pieces, in place."""
    pieces = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            piece = nn.Parameter(local(parameter.detach()))
            piece.grad = local(parameter.grad)
            pieces.append(piece)
    torch.optim.AdamW(pieces, lr=RATE, eps=EPSILON, weight_decay=0.1).step()


def dense(model: PreTrainedModel, batch: Batch) -> Dense:
    """Everything of a model in one process, in its own format; `model` is left as it was."""
    model = copy.deepcopy(model)
    logits, loss = forward_and_backward(model, batch)
    parameters = dict(model.named_parameters())
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in parameters.items()
    }
    stepped(model)
    after = {name: p.detach() for name, p in parameters.items()}
    with torch.no_grad():
        out: Any = model(input_ids=batch.tokens, labels=batch.labels, use_cache=False)
    return Dense(logits=logits, loss=loss, gradients=gradients, stepped=after, loss_after=out.loss)


def relative(ours: Tensor, theirs: Tensor, *, scale: float) -> float:
    """Largest difference over `scale`; infinite where shapes differ or a number is none."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    difference = (ours.detach().double() - theirs.detach().double()).abs().max().item()
    return difference / scale if difference == difference else float("inf")


def largest(tensor: Tensor) -> float:
    """Of its values without sign; never nought."""
    return max(tensor.abs().max().item() if tensor.numel() else 0.0, 1e-30)


def compared(parallel: Parallel, batch: Batch, reference: Dense) -> tuple[dict[str, float], str]:
    """Differences of a model on the grid from the dense one's values, on this rank; its worst gradient."""
    mesh = parallel.mesh
    share = len(batch.tokens) // mesh.batch_size()
    rows = slice(mesh.batch_rank() * share, (mesh.batch_rank() + 1) * share)
    logits, loss = forward_and_backward(parallel.model, batch.rows(rows))
    differences = {
        "loss": relative(loss, reference.loss, scale=largest(reference.loss)),
        "logits": relative(logits, reference.logits[rows], scale=largest(reference.logits)),
    }
    small = SMALL_GRADIENT * max(largest(g) for g in reference.gradients.values())
    parameters = dict(parallel.model.named_parameters())
    by_name = {}
    for name, parameter in parameters.items():
        expected = reference.gradients[name]
        piece = piece_of(parallel.stored[name].keep(expected), parameter, mesh)
        ours = torch.zeros_like(piece) if parameter.grad is None else local(parameter.grad)
        by_name[name] = relative(ours, piece, scale=max(largest(expected), small))
    missing = reference.gradients.keys() - parameters.keys()
    by_name.update(dict.fromkeys(missing, float("inf")))
    where = max(by_name, key=by_name.__getitem__)
    differences["gradients"] = by_name[where]
    stepped(parallel.model)
    moved = [
        relative(
            local(parameter.detach()),
            piece_of(parallel.stored[name].keep(reference.stepped[name]), parameter, mesh),
            scale=largest(reference.stepped[name]),
        )
        for name, parameter in parameters.items()
    ]
    parallel.settle(when="after a step")
    mine = batch.rows(rows)
    with torch.no_grad():
        out: Any = parallel.model(input_ids=mine.tokens, labels=mine.labels, use_cache=False)
    after = relative(out.loss, reference.loss_after, scale=largest(reference.loss_after))
    differences["step"] = max(*moved, after)
    return differences, where


def on_grids(
    config: PretrainedConfig,
    grids: Sequence[Sizes],
    dtype: torch.dtype,
    limit: float,
    how: Mapping[str, Any],
) -> list[Outcome]:
    """This rank's outcomes of each grid, against the dense model in the same format.

    Args:
        config: Of a toy; it is built whole on every rank.
        grids: Sizes along data, depth, row and col.
        dtype: In which both are computed.
        limit: The largest difference that counts as equal.
        how: Further arguments of `parallelize`.
    """
    with precise(dtype):
        model, batch = toy_model(config, dtype=dtype), batch_of()
        equal_on_ranks(model)
        reference = dense(model, batch)
        outcomes = [
            _on_grid(copy.deepcopy(model), sizes, batch, reference, limit, how) for sizes in grids
        ]
    gc.collect()
    return outcomes


def _on_grid(
    model: PreTrainedModel,
    sizes: Sizes,
    batch: Batch,
    reference: Dense,
    limit: float,
    how: Mapping[str, Any],
) -> Outcome:
    try:
        parallel = parallelize(model, mesh_of(sizes), **how)
        differences, where = compared(parallel, batch, reference)
    except Exception as error:  # noqa: BLE001 - whatever a model raises is its outcome
        return failed(error)
    worst = max(differences.values())
    return Outcome(
        result="equal" if worst <= limit else "wrong",
        differences=differences,
        where=where,
        whole=tuple(getattr(parallel, "whole", ())),
    )


OURS = str(Path(fourfold_parallel.__file__).parent)


def failed(error: Exception, *, ours: str = OURS) -> Outcome:
    """A refusal if code under `ours` raised a ValueError on purpose, else a crash."""
    frames = traceback.extract_tb(error.__traceback__)
    last = next(frame for frame in reversed(frames) if frame.filename != toys.__file__)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ValueError | NotImplementedError) and last.filename.startswith(ours):
        return Outcome(result="refused", message=str(error))
    return Outcome(result="crash", message=f"{text} ({Path(last.filename).name}:{last.lineno})")


def worst_of(outcomes: Sequence[Outcome]) -> Outcome:
    """One grid's outcome from those of its ranks."""
    worst = max(outcomes, key=lambda outcome: (WORST.index(outcome.result), outcome.difference))
    names = {name for outcome in outcomes for name in outcome.differences}
    differences = {
        name: max(outcome.differences.get(name, 0.0) for outcome in outcomes)
        for name in QUANTITIES
        if name in names
    }
    found = {outcome.result for outcome in outcomes}
    if "refused" in found and found != {"refused"}:
        worst = replace(
            worst, result="crash", message=f"ranks disagree: {sorted(found)}; {worst.message}"
        )
    return replace(worst, differences=differences)
