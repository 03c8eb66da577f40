"""Gradients after the layers are done with them: their sum over data, and their norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from fourfold_parallel.grid.collectives import Axis, Pending
from fourfold_parallel.grid.mesh import Mesh

BUCKET_BYTES = 25 * 2**20
"""As in torch's DistributedDataParallel: large enough for the bandwidth, small enough to overlap."""


@dataclass(slots=True, kw_only=True)
class _Bucket:
    """Gradients that are sent together, in one stretch of memory that lasts from step to step."""

    flat: Tensor
    parts: dict[Tensor, Tensor]
    """Of each parameter, its gradient's place in `flat`, in the shape of the gradient."""
    arrived: list[Tensor] = field(default_factory=list)
    """Parameters whose gradients of this step are in their places."""

    @classmethod
    def of(cls, parameters: list[Tensor]) -> _Bucket:
        """A bucket for these parameters, which have gradients of one number format."""
        pieces = [local(parameter.grad) for parameter in parameters]
        flat = torch.empty(
            sum(piece.numel() for piece in pieces), dtype=pieces[0].dtype, device=pieces[0].device
        )
        places = flat.split([piece.numel() for piece in pieces])
        parts = {
            parameter: place.view(piece.shape)
            for parameter, place, piece in zip(parameters, places, pieces, strict=True)
        }
        return cls(flat=flat, parts=parts)

    def take(self, parameter: Tensor) -> None:
        """Move a parameter's gradient to its place, where it stays.

        Raises:
            RuntimeError: It is there already.
        """
        gradient, part = parameter.grad, self.parts[parameter]
        piece = local(gradient)
        if piece.numel() and piece.data_ptr() == part.data_ptr():
            raise RuntimeError(
                "a gradient was accumulated on top of its sum over data, which would count that sum "
                "once for every replica; clear gradients with zero_grad(set_to_none=True) after each "
                "step, put all microbatches but the last into `hold` (`no_sync`), and use "
                "non-reentrant activation checkpointing for a parameter used twice"
            )
        part.copy_(piece)
        if isinstance(gradient, DTensor):
            gradient._local_tensor = part  # noqa: SLF001 - a new DTensor a parameter costs time
        else:
            parameter.grad = part
        self.arrived.append(parameter)

    @property
    def is_whole(self) -> bool:
        """Whether every gradient is in its place."""
        return len(self.arrived) == len(self.parts)

    def send(self, axis: Axis) -> Pending:
        """Start the sum of what has arrived: of the memory itself if that is everything."""
        sent = self.flat
        if not self.is_whole:
            sent = torch.cat([self.parts[parameter].flatten() for parameter in self.arrived])
        return axis.all_reduce(sent, layer="gradients")

    def receive(self, summed: Tensor) -> None:
        """Put the sum where it belongs, unless it was computed there; the next step may begin."""
        if summed.data_ptr() != self.flat.data_ptr():
            parameters = self.parts if self.is_whole else self.arrived
            parts = [self.parts[parameter] for parameter in parameters]
            for part, total in zip(parts, summed.split([p.numel() for p in parts]), strict=True):
                part.copy_(total.view_as(part))
        self.arrived = []


class DataReducer:
    """Sums gradients over `data`, in buckets, while the rest of backward runs.

    The first backward puts gradients into buckets in the order in which they are finished; from then
    on each moves to its place in its bucket, and a bucket is sent when it is whole. The sum is
    computed in place. A bucket that some gradient has not reached is sent at the end, without it.

    What is accumulated on top of such a sum would be wrong, so it is refused: a second backward
    without clearing gradients, and a parameter used in two regions of reentrant activation
    checkpointing, each of which is a backward of its own. With one replica nothing is done.

    `restart` is called before each forward: parameters that have come to need a gradient are taken
    in, and a backward that broke off is forgotten.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], mesh: Mesh, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._data, self._bucket_bytes = mesh.data, bucket_bytes
        self._parameters = [*parameters]
        self._held = self._called = False
        self._buckets: dict[Tensor, _Bucket] = {}
        self._new: dict[torch.dtype, list[Tensor]] = {}
        self._finished: dict[Tensor, None] = {}
        self._sent: list[tuple[_Bucket, Pending]] = []
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self.restart()

    def restart(self) -> None:
        """A forward begins."""
        if self._data.size == 1:
            return
        for parameter in self._parameters:
            if parameter.requires_grad and parameter not in self._hooks:
                self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._join)
        if self._called:
            for _, pending in self._sent:
                pending.wait()
            for bucket in self._buckets.values():
                bucket.arrived = []
            self._called, self._sent, self._new, self._finished = False, [], {}, {}

    def remove(self) -> None:
        """Sum nothing any more."""
        for hook in self._hooks.values():
            hook.remove()
        self._parameters = []

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
        self._finished[parameter] = None
        if not self._called:
            self._called = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # noqa: SLF001 - as in DistributedDataParallel; no public name
        bucket = self._buckets.get(parameter)
        if bucket is not None:
            bucket.take(parameter)
            if bucket.is_whole:
                self._send(bucket)
            return
        gradient = local(parameter.grad)
        fellows = self._new.setdefault(gradient.dtype, [])
        fellows.append(parameter)
        if sum(local(fellow.grad).nbytes for fellow in fellows) >= self._bucket_bytes:
            self._close(self._new.pop(gradient.dtype))

    def _close(self, parameters: list[Tensor]) -> None:
        """Make a bucket of parameters that had none, and send it."""
        bucket = _Bucket.of(parameters)
        for parameter in parameters:
            self._buckets[parameter] = bucket
            bucket.take(parameter)
        self._send(bucket)

    def _send(self, bucket: _Bucket) -> None:
        self._sent.append((bucket, bucket.send(self._data)))

    def _finish(self) -> None:
        self._called = False
        for parameters in self._new.values():
            self._close(parameters)
        self._new = {}
        # In the order of arrival, which is the same on every rank.
        touched = {id(bucket): bucket for bucket in (self._buckets[p] for p in self._finished)}
        for bucket in touched.values():
            if not bucket.is_whole:
                self._send(bucket)
        for bucket, pending in self._sent:
            bucket.receive(pending.wait())
        self._sent = []
        self._finished = {}


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
    filled = [(grad, local(grad).detach()) for grad in gradients if local(grad).numel()]
    if not gradients:
        return torch.zeros((), device=torch.device(mesh.torch_mesh.device_type))
    dtype = torch.promote_types(local(gradients[0]).dtype, torch.float32)
    # Along the other axes every rank has the same sum: what was summed over data is bitwise equal.
    cuts = {
        grad.placements: {*mesh.cut_of(grad)} for grad in gradients if isinstance(grad, DTensor)
    }
    axes = [axis for axis in mesh.axes if any(axis.name in cut for cut in cuts.values())]
    norms = torch.zeros(1, dtype=dtype, device=local(gradients[0]).device)
    if filled:
        pieces = [piece for _, piece in filled]
        norms = torch.stack(torch._foreach_norm(pieces, order, dtype=dtype))  # pyright: ignore[reportPrivateImportUsage]  # noqa: SLF001 - as torch's own clipping
    if math.isinf(order):
        total = norms.max()
        for axis in axes:
            total = axis.all_reduce(total, op="max", layer="gradient_norm").wait()
        return total
    if axes and filled:
        copies = {
            placements: math.prod(axis.size for axis in axes if axis.name not in cut)
            for placements, cut in cuts.items()
        }
        everywhere = math.prod(axis.size for axis in axes)
        counts = [
            copies[grad.placements] if isinstance(grad, DTensor) else everywhere
            for grad, _ in filled
        ]
        norms = norms * norms.new_tensor(counts).pow(-1 / order)
    total = torch.linalg.vector_norm(norms, order)
    if not axes:
        return total
    total = total.pow(order)
    for axis in axes:
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
