"""A model on grids of ranks against itself in one process: loss, logits, every gradient, one step.

`on_grids` runs on every rank of a launch, and `worst_of` makes one outcome of what the ranks say.
"""

from __future__ import annotations

import copy
import gc
import logging
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import fourfold_parallel
from fourfold_parallel.certify import toys
from fourfold_parallel.certify.toys import in_float64, toy_model
from fourfold_parallel.grid.check import AnotherModelError
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
QUANTITIES: tuple[str, ...] = ("loss", "logits", "gradients", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class GridOutcome:
    """The result of one grid, over all ranks."""

    result: Result
    differences: Mapping[str, float] = field(default_factory=dict[str, float])
    """Largest difference of each quantity, relative to the largest value of the dense model's."""
    own: Mapping[str, float] = field(default_factory=dict[str, float])
    """Those of the dense model in the same format; nought in float64."""
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
        values = {name: value for name, value in asdict(self).items() if value}
        if not any(self.own.values()):
            values.pop("own", None)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """The model's answers in one process."""

    logits: Tensor
    loss: Tensor
    gradients: Mapping[str, Tensor]
    stepped: Mapping[str, Tensor]
    """Parameters after one step."""
    loss_after: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyBatch:
    """Token ids and labels; some labels are ignored, in some rows all."""

    tokens: Tensor
    labels: Tensor

    def rows(self, rows: slice) -> ToyBatch:
        """A share of it."""
        return ToyBatch(tokens=self.tokens[rows], labels=self.labels[rows])


def batch_of(*, rows: int = ROWS, tokens: int = TOKENS) -> ToyBatch:
    """The same on every rank; its first rows have no valid label."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (rows, tokens), generator=generator)
    is_ignored = torch.rand(rows, tokens, generator=generator) < IGNORED_SHARE
    labels = ids.masked_fill(is_ignored, -100)
    labels[:SILENT_ROWS] = -100
    return ToyBatch(tokens=ids, labels=labels)


def precise(dtype: torch.dtype) -> AbstractContextManager[None]:
    """The scope in which a model of this format is computed."""
    return in_float64() if dtype == torch.float64 else nullcontext()


def quiet() -> None:
    """Keep what libraries say of every rank, and of configurations made on purpose, off the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)


def equal_on_ranks(model: nn.Module) -> None:
    """Give every rank the first one's values; some classes leave memory as they find it."""
    with torch.no_grad():
        tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        flat = torch.cat([tensor.to(torch.float64).flatten() for tensor in tensors])
        dist.broadcast(flat, 0)
        places = flat.split([tensor.numel() for tensor in tensors])
        for tensor, place in zip(tensors, places, strict=True):
            tensor.copy_(place.view(tensor.shape))


def forward_and_backward(model: PreTrainedModel, batch: ToyBatch) -> tuple[Tensor, Tensor]:
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


def dense(model: PreTrainedModel, batch: ToyBatch) -> Dense:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A piece of ours, and what it should be."""

    ours: Tensor
    theirs: Tensor
    scale: float
    """Largest value of the whole tensor."""


def apart(pairs: Mapping[str, Pair], *, exact: bool) -> tuple[float, str]:
    """The distance of pieces from what they should be, and the farthest piece.

    Args:
        pairs: By name.
        exact: The largest relative difference of any value, as float64 allows; else the root mean square of
            all differences over that of all values, which a few tokens that rounding sent to other experts
            do not decide.
    """
    by_name = {name: relative(p.ours, p.theirs, scale=p.scale) for name, p in pairs.items()}
    where = max(by_name, key=by_name.__getitem__)
    if exact or by_name[where] == float("inf"):
        return by_name[where], where
    squares = [
        ((p.ours.double() - p.theirs.double()).square().sum(), p.theirs.double().square().sum())
        for p in pairs.values()
    ]
    difference, whole = (
        torch.stack(parts).sum().sqrt().item() for parts in zip(*squares, strict=True)
    )
    return difference / max(whole, 1e-30), where


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, and what it gives in one process."""

    model: PreTrainedModel
    batch: ToyBatch
    reference: Dense
    """In its own format if that is float64, else in float64 with the same values."""
    own: Mapping[str, float]
    """How far the model in its own format is from the reference, in one process."""
    exact: bool

    def limits(self) -> dict[str, float]:
        """The allowed difference of each quantity."""
        if self.exact:
            return dict.fromkeys(QUANTITIES, EXACT)
        return {name: max(COARSE, COARSER * self.own[name]) for name in QUANTITIES}


COARSE, COARSER = 0.02, 3.0
"""A grid in bfloat16 rounds partial sums, so it may be so many times as far from float64 as one process
is, or within a few units of bfloat16's last place."""
_PREPARED: dict[tuple[str, torch.dtype, int], Subject] = {}


def subject_of(config: PretrainedConfig, dtype: torch.dtype, rows: int) -> Subject:
    """The toy of a configuration and its reference; kept for the next call. Every rank takes part."""
    key = (config.to_json_string(use_diff=False), dtype, rows)
    if key not in _PREPARED:
        _PREPARED.clear()
        exact, batch = dtype == torch.float64, batch_of(rows=rows)
        model = toy_model(config, dtype=dtype)
        equal_on_ranks(model)
        with in_float64():
            reference = dense(copy.deepcopy(model).double(), batch)
        own = (
            dict.fromkeys(QUANTITIES, 0.0)
            if exact
            else differences_of(dense(model, batch), reference)
        )
        _PREPARED[key] = Subject(
            model=model, batch=batch, reference=reference, own=own, exact=exact
        )
    return _PREPARED[key]


def differences_of(coarse: Dense, reference: Dense) -> dict[str, float]:
    """The distance of a coarse run in one process from the reference."""

    def between(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
        pairs = {
            name: Pair(ours=ours[name], theirs=whole, scale=largest(whole))
            for name, whole in theirs.items()
        }
        return apart(pairs, exact=False)[0]

    after = between({"": coarse.loss_after[None]}, {"": reference.loss_after[None]})
    return {
        "loss": between({"": coarse.loss[None]}, {"": reference.loss[None]}),
        "logits": between({"": coarse.logits}, {"": reference.logits}),
        "gradients": between(coarse.gradients, reference.gradients),
        "step": max(between(coarse.stepped, reference.stepped), after),
    }


def compared(parallel: Parallel, subject: Subject) -> tuple[dict[str, float], str]:
    """Differences of a model on the grid from the reference, on this rank, and its worst gradient."""
    mesh, batch, reference = parallel.mesh, subject.batch, subject.reference
    share = len(batch.tokens) // mesh.batch_size()
    rows = slice(mesh.batch_rank() * share, (mesh.batch_rank() + 1) * share)
    mine = batch.rows(rows)

    def of(ours: Tensor, theirs: Tensor, whole: Tensor) -> float:
        pair = Pair(ours=ours, theirs=theirs, scale=largest(whole))
        return apart({"": pair}, exact=subject.exact)[0]

    logits, loss = forward_and_backward(parallel.model, mine)
    differences = {
        "loss": of(loss, reference.loss, reference.loss),
        "logits": of(logits, reference.logits[rows], reference.logits),
    }
    parameters = dict(parallel.model.named_parameters())
    missing = reference.gradients.keys() - parameters.keys()
    if missing:
        return {**differences, "gradients": float("inf")}, sorted(missing)[0]

    def piece(whole: Tensor, name: str) -> Tensor:
        return piece_of(parallel.stored[name].keep(whole), parameters[name], mesh)

    small = SMALL_GRADIENT * max(largest(g) for g in reference.gradients.values())
    pairs = {}
    for name, parameter in parameters.items():
        expected = reference.gradients[name]
        theirs = piece(expected, name)
        ours = torch.zeros_like(theirs) if parameter.grad is None else local(parameter.grad)
        pairs[name] = Pair(ours=ours, theirs=theirs, scale=max(largest(expected), small))
    differences["gradients"], where = apart(pairs, exact=subject.exact)
    stepped(parallel.model)
    moved = {
        name: Pair(ours=local(parameter.detach()), theirs=piece(whole, name), scale=largest(whole))
        for name, parameter in parameters.items()
        for whole in [reference.stepped[name]]
    }
    parallel.settle(when="after a step")
    with torch.no_grad():
        out: Any = parallel.model(input_ids=mine.tokens, labels=mine.labels, use_cache=False)
    after = of(out.loss, reference.loss_after, reference.loss_after)
    differences["step"] = max(apart(moved, exact=subject.exact)[0], after)
    return differences, where


def on_grids(
    config: PretrainedConfig,
    grids: Sequence[Sizes],
    dtype: torch.dtype,
    how: Mapping[str, Any],
    rows: int = ROWS,
) -> list[GridOutcome]:
    """This rank's outcomes of each grid.

    Args:
        config: Of a toy; it is built whole on every rank.
        grids: Sizes along data, depth, row and col.
        dtype: In which the grid computes. In float64 it must be the dense model; in another format it must
            be about as near to float64 as the dense model in that format.
        how: Further arguments of `parallelize`.
        rows: Of the batch; every number of shares divides it.
    """
    quiet()
    with precise(dtype):
        subject = subject_of(config, dtype, rows)
        outcomes = [_on_grid(subject, sizes, how) for sizes in grids]
    gc.collect()
    return outcomes


def _on_grid(subject: Subject, sizes: Sizes, how: Mapping[str, Any]) -> GridOutcome:
    try:
        parallel = parallelize(copy.deepcopy(subject.model), mesh_of(sizes), **how)
        differences, where = compared(parallel, subject)
    except Exception as error:  # noqa: BLE001 - whatever a model raises is its outcome
        return failed(error)
    limits = subject.limits()
    is_equal = all(difference <= limits[name] for name, difference in differences.items())
    return GridOutcome(
        result="equal" if is_equal else "wrong",
        differences=differences,
        own=subject.own,
        where=where,
        whole=tuple(parallel.whole),
    )


OURS = str(Path(fourfold_parallel.__file__).parent)


def failed(error: Exception, *, ours: str = OURS) -> GridOutcome:
    """A refusal if code under `ours` raised a ValueError on purpose, else a crash.

    An AnotherModelError is the grid's own check, which found the model to be another one.
    """
    frames = traceback.extract_tb(error.__traceback__)
    last = next(frame for frame in reversed(frames) if frame.filename != toys.__file__)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, AnotherModelError):
        return GridOutcome(result="wrong", message=str(error))
    if isinstance(error, ValueError) and last.filename.startswith(ours):
        return GridOutcome(result="refused", message=str(error))
    return GridOutcome(result="crash", message=f"{text} ({Path(last.filename).name}:{last.lineno})")


def worst_of(outcomes: Sequence[GridOutcome]) -> GridOutcome:
    """One grid's outcome from those of its ranks."""
    worst = max(outcomes, key=lambda outcome: (WORST.index(outcome.result), outcome.difference))
    names = {name for outcome in outcomes for name in outcome.differences}
    differences = {
        name: max(outcome.differences.get(name, 0.0) for outcome in outcomes)
        for name in QUANTITIES
        if name in names
    }
    results = {outcome.result for outcome in outcomes}
    if "refused" in results and results != {"refused"}:
        worst = replace(
            worst, result="crash", message=f"ranks disagree: {sorted(results)}; {worst.message}"
        )
    return replace(worst, differences=differences)
