"""Gradients after the layers are done with them: their sum over data, and their norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from fourfold_parallel.grid.collectives import Pending
from fourfold_parallel.grid.mesh import Mesh

BUCKET_BYTES = 25 * 2**20
"""As in torch's DistributedDataParallel: large enough for the bandwidth, small enough to overlap."""


class DataReducer:
    """Sums gradients over `data`, in buckets, while the rest of backward runs.

    Every gradient that backward finishes joins the open bucket; a full bucket is sent, and after
    the last gradient the results are written back. With one replica it does nothing.

    A parameter whose gradient is accumulated twice in one backward (used in two regions under
    reentrant activation checkpointing) cannot be summed on the way: it is refused.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], mesh: Mesh, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._data, self._bucket_bytes = mesh.data, bucket_bytes
        self._held = False
        self._open: list[Tensor] = []
        self._sent: list[tuple[list[Tensor], Pending]] = []
        self._called = False
        self._hooks: list[RemovableHandle] = []
        if mesh.data.size > 1:
            self._hooks = [
                parameter.register_post_accumulate_grad_hook(self._join)
                for parameter in parameters
                if parameter.requires_grad
            ]

    def remove(self) -> None:
        """Sum nothing any more."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Leave gradients unsummed within, for all microbatches of a step but the last."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def _join(self, parameter: Tensor) -> None:
        if self._held:
            return
        gradient = local(parameter.grad)
        if any(gradient is other for other in self._open) or any(
            gradient is other for gradients, _ in self._sent for other in gradients
        ):
            raise RuntimeError(
                "a gradient was accumulated twice in one backward, after its sum over data had "
                "begun; use non-reentrant activation checkpointing for a parameter used twice"
            )
        self._open.append(gradient)
        if not self._called:
            self._called = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # noqa: SLF001 - as in DistributedDataParallel; no public name
        if sum(gradient.nbytes for gradient in self._open) >= self._bucket_bytes:
            self._send()

    def _send(self) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for gradient in self._open:
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._sent.append((gradients, self._data.all_reduce(flat, layer="gradients")))
        self._open = []

    def _finish(self) -> None:
        self._called = False
        if self._open:
            self._send()
        for gradients, pending in self._sent:
            parts = pending.wait().split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                gradients,
                [part.view_as(own) for part, own in zip(parts, gradients, strict=True)],
            )
        self._sent = []


def gradient_norm(
    parameters: Iterable[nn.Parameter], mesh: Mesh, *, order: float
) -> Float[Tensor, ""]:
    """The norm of all gradients together, as if they were one vector on one device.

    A rank sums over the elements it holds, each divided by the number of ranks that hold a copy.

    Args:
        parameters: Those with a gradient count.
        mesh: The grid.
        order: 1, 2, any positive number, or infinity.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    pieces = [local(gradient).detach() for gradient in gradients]
    dtype = torch.promote_types(pieces[0].dtype, torch.float32) if pieces else torch.float32
    device = pieces[0].device if pieces else torch.device(mesh.torch_mesh.device_type)
    norms = [torch.linalg.vector_norm(p, order, dtype=dtype) for p in pieces if p.numel()]
    if math.isinf(order):
        total = torch.stack(norms).max() if norms else torch.zeros((), dtype=dtype, device=device)
        for axis in mesh.axes:
            total = axis.all_reduce(total, op="max", layer="gradient_norm").wait()
        return total
    copies = [
        _copies(gradient, mesh) for gradient, p in zip(gradients, pieces, strict=True) if p.numel()
    ]
    total = torch.zeros((), dtype=dtype, device=device)
    for norm, count in zip(norms, copies, strict=True):
        total = total + norm.pow(order) / count
    for axis in mesh.axes:
        total = axis.all_reduce(total, layer="gradient_norm").wait()
    return total.pow(1 / order)


@torch.no_grad()
def clip_gradients(
    parameters: Sequence[nn.Parameter], mesh: Mesh, *, max_norm: float, order: float = 2.0
) -> Float[Tensor, ""]:
    """Scale all gradients down to a norm of `max_norm`; gives the norm before.

    Args:
        parameters: Those with a gradient count.
        mesh: The grid.
        max_norm: Largest norm that is left as it is.
        order: Of the norm: 1, 2, any positive number, or infinity.

    Raises:
        ValueError: `max_norm` or `order` is not positive.
    """
    if not max_norm > 0 or not order > 0:
        raise ValueError(f"max_norm={max_norm} and order={order} must both be above zero")
    norm = gradient_norm(parameters, mesh, order=order)
    # torch.nn.utils.clip_grad_norm_ adds the same 1e-6, and a clipped run must equal its serial twin.
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    pieces = [local(p.grad) for p in parameters if p.grad is not None]
    if pieces:
        torch._foreach_mul_(pieces, factor)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def local(tensor: Tensor | None) -> Tensor:
    """This rank's piece, without a graph."""
    assert tensor is not None
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # noqa: SLF001 - to_local would build a graph


def _copies(gradient: Tensor, mesh: Mesh) -> int:
    if not isinstance(gradient, DTensor):
        return mesh.size
    cut = mesh.cut_of(gradient)
    return math.prod(axis.size for axis in mesh.axes if axis.name not in cut)
