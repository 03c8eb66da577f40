"""The four-dimensional engine: a recipe's model and optimizer on a grid, for the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fourfold_parallel.common.axes import AxisName
from fourfold_parallel.common.held import (
    Held,
    Saved,
    State,
    make_room,
    numbers_of,
    take_numbers,
    ties_of,
    weights_of,
)
from fourfold_parallel.grid.gradients import DataReducer, clip_gradients, local
from fourfold_parallel.grid.huggingface import Parallel, parallelize
from fourfold_parallel.grid.mesh import Mesh, check_sizes
from fourfold_parallel.grid.schedule import ALL_OVERLAPS, Overlaps
from fourfold_parallel.grid.zero import ShardedReducer
from fourfold_parallel.launch import check_launched, device, process_group, world_size

ELEMENTWISE = (
    torch.optim.AdamW,
    torch.optim.Adam,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)
"""Optimizers whose update of an element depends on that element's gradients alone."""


class Planned(Protocol):
    """A layout that the planner chose (`fourfold_parallel.plan.job.Layout`)."""

    @property
    def data(self) -> int: ...  # noqa: D102 - as `Fourfold`'s
    @property
    def depth(self) -> int: ...  # noqa: D102
    @property
    def row(self) -> int: ...  # noqa: D102
    @property
    def col(self) -> int: ...  # noqa: D102
    @property
    def cuts_tokens(self) -> bool: ...  # noqa: D102
    @property
    def shards_optimizer(self) -> bool: ...  # noqa: D102
    @property
    def recomputes(self) -> bool: ...  # noqa: D102
    @property
    def keeps_tiles(self) -> bool: ...  # noqa: D102
    @property
    def experts(self) -> Literal["gathered", "exchanged"]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Fourfold:
    """A grid of `data * depth * row * col` ranks (AxoNN); they multiply to the ranks launched."""

    takes_outlines: ClassVar[bool] = True
    data: int = 1
    """Replicas of the model."""
    depth: int = 1
    """Ranks that share a replica's batch and hold pieces of every weight."""
    row: int = 1
    """Parts of heads, hidden units and vocabulary."""
    col: int = 1
    """Parts of the residual stream."""
    overlaps: Overlaps = ALL_OVERLAPS
    """Which communication runs under computation."""
    shards_optimizer: bool = False
    """Cut the optimizer's state over data (ZeRO-1)."""
    cuts_tokens: bool = False
    """The sequence form: between blocks, cut the residual stream's tokens over row."""
    recomputes: bool = False
    """Keep activations at the borders of decoder layers only, and compute the others again in backward."""
    keeps_tiles: bool = False
    """Keep gathered tiles from forward to backward: two thirds of the traffic over depth, for the memory of
    all tiles."""
    experts: Literal["gathered", "exchanged"] = "gathered"
    """`exchanged` leaves experts where they are stored and sends tokens to them over depth (expert
    parallelism)."""
    logits: Literal["split", "whole"] = "split"
    """`split` leaves each rank its part of the vocabulary, which `token_nats` and the model's own loss
    understand; `whole` gathers them, for an objective that reads logits itself."""

    @classmethod
    def planned(cls, layout: Planned) -> Self:
        """The engine of the planner's choice: `Fourfold.planned(rank(job, machine, 8).best.layout)`."""
        return cls(
            data=layout.data, depth=layout.depth, row=layout.row, col=layout.col,
            cuts_tokens=layout.cuts_tokens, shards_optimizer=layout.shards_optimizer,
            recomputes=layout.recomputes, keeps_tiles=layout.keeps_tiles, experts=layout.experts,
        )  # fmt: skip

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,  # noqa: ARG002 - the protocol's
    ) -> Iterator[GridSession]:
        """A session over all launched ranks; gloo on CPUs, NCCL on GPUs.

        Raises:
            ValueError: The grid does not fit the ranks, the batch, the model or the optimizer.
        """
        sizes: dict[AxisName, int] = {
            "data": self.data, "depth": self.depth, "row": self.row, "col": self.col,
        }  # fmt: skip
        check_sizes(sizes, dist.get_world_size() if dist.is_initialized() else world_size())
        shares = self.data * self.depth
        if batch % shares:
            raise ValueError(
                f"batch={batch} does not divide over data={self.data} * depth={self.depth}; "
                f"use a multiple of {shares}"
            )
        if type(optimizer) not in ELEMENTWISE:
            raise ValueError(
                f"engine Fourfold steps each rank's piece of a matrix by itself, which is wrong for "
                f"{type(optimizer).__name__} unless it treats every element alike; use one of torch's "
                f"{', '.join(kind.__name__ for kind in ELEMENTWISE)}, or another engine"
            )
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"engine Fourfold lays out transformers models, not {type(model).__name__}; "
                "use a PreTrainedModel, or another engine"
            )
        check_launched("Fourfold")
        on = device()
        with process_group(on):
            mesh = Mesh(**sizes, device=on.type)
            if self.recomputes:
                # Its name until transformers 5.22.
                switch = getattr(model, "activation_checkpointing_enable", None)
                (switch or model.gradient_checkpointing_enable)({"use_reentrant": False})
            session = GridSession(model, optimizer, mesh, self, on, precision)
            try:
                yield session
            finally:  # the process group may end now
                session.parallel.abandon()
                if self.recomputes:
                    switch = getattr(model, "activation_checkpointing_disable", None)
                    (switch or model.gradient_checkpointing_disable)()


class GridSession:
    """A model and its optimizer on a grid."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        engine: Fourfold,
        device: torch.device,
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self.rank: int = mesh.batch_rank()
        self.ranks: int = mesh.batch_size()
        self.is_main: bool = dist.get_rank() == 0
        self.device: torch.device = device
        self.sees_waits: bool = True
        before = {id(p): name for name, p in model.named_parameters()}
        begun = {before[id(p)]: state for p, state in optimizer.state.items()}
        self.parallel: Parallel = parallelize(
            model,
            mesh,
            overlaps=engine.overlaps,
            logits=engine.logits,
            keeps_tiles=engine.keeps_tiles,
            cuts_tokens=engine.cuts_tokens,
            experts=engine.experts,
            empty=True,
        )
        self.model: nn.Module = model
        self.optimizer: torch.optim.Optimizer = optimizer
        owners = dict(model.named_parameters())
        self._reducer: DataReducer | ShardedReducer = self.parallel.reducer
        if engine.shards_optimizer:
            self.parallel.reducer.remove()
            self._reducer = ShardedReducer([*model.parameters()], mesh)
            shares = self._reducer.shares
            owners = {name: shares.get(p, p) for name, p in owners.items()}
        self._owners: dict[str, nn.Parameter] = owners
        # An elementwise optimizer need not know of other ranks, and on plain tensors its operations
        # do not pass DTensor's dispatch. The pieces share the owners' memory.
        self._pieces: dict[str, nn.Parameter] = {
            name: nn.Parameter(local(p.detach()), requires_grad=p.requires_grad)
            for name, p in owners.items()
        }
        for group in optimizer.param_groups:
            group["params"] = [self._pieces[before[id(p)]] for p in group["params"]]
        self._names = {id(p): name for name, p in self._pieces.items()}
        self._mesh, self._precision = mesh, precision
        optimizer.state.clear()
        for name, values in begun.items():  # what an optimizer such as Adagrad makes at once
            optimizer.state[self._pieces[name]] = {
                key: self._piece(name, value) if isinstance(value, Tensor) and value.ndim else value
                for key, value in values.items()
            }
        if isinstance(self._reducer, ShardedReducer):
            reducer = self._reducer
            model.register_forward_pre_hook(lambda *_: reducer.restart())

    @contextmanager
    def microbatch(self, *, is_last: bool) -> Iterator[None]:
        """The scope of one forward and backward; only the last sums gradients over data.

        Nothing is under way after it, nor after an exception within.

        Raises:
            RuntimeError: A collective was started within and not waited for.
        """
        casts = self._precision == "bf16"
        autocast = torch.autocast(self.device.type, torch.bfloat16) if casts else nullcontext()
        sums_wait: AbstractContextManager[None] = nullcontext() if is_last else self._reducer.hold()
        try:
            with sums_wait, autocast:
                yield
        except BaseException:
            self.parallel.abandon()
            raise
        self.parallel.settle(when="after a microbatch")

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Backpropagate this rank's share of the loss."""
        loss.backward()

    def update(self, max_grad_norm: float) -> float:
        """Clip to a global 2-norm, step, clear gradients; gives the norm before clipping."""
        norm = clip_gradients([*self._owners.values()], self._mesh, max_norm=max_grad_norm)
        for name, owner in self._owners.items():
            self._pieces[name].grad = None if owner.grad is None else local(owner.grad)
            owner.grad = None
        self.optimizer.step()
        if isinstance(self._reducer, ShardedReducer):
            self._reducer.gather()
        self.optimizer.zero_grad(set_to_none=True)
        self.parallel.settle(when="after a step")
        return float(norm)

    def sum(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A tensor summed over all shares of the batch."""
        return self._mesh.sum_over_batch(value)

    def state(self) -> State:
        """This rank's share, as views of the memory in use, in the published names and shapes."""
        self.parallel.settle(when="before a save")
        weights = {
            name: self.parallel.held(name, tensor, local(tensor))
            if isinstance(tensor, DTensor)
            else Held.whole(tensor)  # a buffer
            for name, tensor in weights_of(self.model)
        }
        moments: dict[str, Held] = {}
        for piece, values in self.optimizer.state.items():
            name = self._names[id(piece)]
            owner = self._owners[name]
            assert isinstance(owner, DTensor)
            for key, value in values.items():
                if isinstance(value, Tensor) and value.ndim:
                    moments[f"{name}/{key}"] = self.parallel.held(name, owner, value)
        return State(
            weights=weights, moments=moments, numbers=numbers_of(self.optimizer, self._names),
            ties=ties_of(self.model),
        )  # fmt: skip

    @contextmanager
    def restoring(self, saved: Saved) -> Iterator[State]:
        """Room for what was saved on any layout: tensors to fill within; numbers are set after it."""
        self.parallel.settle(when="before a load")
        pieces = self._pieces
        make_room(
            self.optimizer,
            (
                (pieces[n], key, tuple(pieces[n].shape), dtype)
                for n, key, _, dtype in saved.moments()
            ),
        )
        yield self.state()
        take_numbers(self.optimizer, saved.numbers, self._pieces)

    def wait(self) -> None:
        """Return when every rank has called this."""
        dist.barrier()

    def _piece(self, name: str, published: Any) -> Tensor:
        """This rank's piece of something that has the shape of a published parameter."""
        owner = self._owners[name]
        assert isinstance(owner, DTensor)
        kept = tuple(owner.shape)
        slices = self._mesh.slices(kept, self._mesh.cut_of(owner))
        piece = self.parallel.stored[name].read(published, slices, kept)
        return piece.to(self.device, copy=True).contiguous()
