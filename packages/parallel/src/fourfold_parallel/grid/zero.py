"""ZeRO-1: the optimizer's state cut over `data`, so that no replica holds all of it.

The optimizer steps on a view of this replica's share of each piece. Gradients are reduce-scattered
over data into those shares, and after the step the shares are gathered into the pieces. A ring
moves as much as for the all-reduce of plain replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold_parallel.grid.collectives import Pending
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.mesh import Cut, Mesh


class ShardedReducer:
    """Spreads gradients over data while backward runs, and gathers parameters after a step.

    Args:
        parameters: The model's, on the grid; those without a gradient are left alone.
        mesh: The grid.
    """

    def __init__(self, parameters: list[nn.Parameter], mesh: Mesh) -> None:
        self._mesh = mesh
        self.shares = {
            parameter: self._share(parameter) for parameter in parameters if parameter.requires_grad
        }
        """This replica's share of each parameter: what the optimizer steps on."""
        self._held = self._called = False
        self._sent: list[tuple[nn.Parameter, Pending]] = []
        self._frozen = [parameter for parameter in parameters if parameter not in self.shares]
        for parameter in self.shares:
            parameter.register_post_accumulate_grad_hook(self._send)

    def restart(self) -> None:
        """A forward begins: a backward that broke off is forgotten.

        Raises:
            RuntimeError: A parameter needs a gradient that did not when shares were made.
        """
        if any(parameter.requires_grad for parameter in self._frozen):
            raise RuntimeError(
                "a parameter was unfrozen after its optimizer's state was cut over data, and would "
                "not be stepped; unfreeze it before the session is opened"
            )
        for parameter, pending in self._sent:
            pending.wait()
            parameter.grad = None
        self._called, self._sent = False, []

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Leave gradients where they are within, for all microbatches of a step but the last."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @torch.no_grad()
    def gather(self) -> None:
        """Put the stepped shares together again, in every replica's pieces."""
        under_way = [
            (local(parameter), local(share)) for parameter, share in self.shares.items()
        ]  # all started before the first is waited for
        pending = [
            self._mesh.data.all_gather(mine, rows=piece.shape[0], layer="parameters")
            for piece, mine in under_way
        ]
        for (piece, _), gather in zip(under_way, pending, strict=True):
            if self._mesh.data.size > 1:
                piece.copy_(gather.wait())

    def _share(self, parameter: nn.Parameter) -> nn.Parameter:
        """A view of this replica's rows of a piece, as a parameter that is cut over data too."""
        assert isinstance(parameter, DTensor)
        piece = local(parameter.detach())
        start, stop = self._mesh.data.bounds(piece.shape[0])
        cut: Cut = {**self._mesh.cut_of(parameter), "data": 0}
        view = self._mesh.assemble(piece[start:stop], tuple(parameter.shape), cut)
        return nn.Parameter(view)

    def _send(self, parameter: Tensor) -> None:
        if self._held:
            return
        assert isinstance(parameter, nn.Parameter)
        if not self._called:
            self._called = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # noqa: SLF001 - as in DistributedDataParallel; no public name
        gradient = local(parameter.grad)
        self._sent.append((parameter, self._mesh.data.reduce_scatter(gradient, layer="gradients")))

    def _finish(self) -> None:
        self._called = False
        for parameter, pending in self._sent:
            share = self.shares[parameter]
            assert isinstance(share, DTensor)
            mine = self._mesh.assemble(pending.wait(), tuple(share.shape), self._mesh.cut_of(share))
            share.grad = mine if share.grad is None else share.grad + mine
            parameter.grad = None
        self._sent = []
