"""The one place that calls torch's collectives.

An `Axis` is one direction of the grid as seen from one rank. Its verbs (`all_reduce`,
`all_gather`, `reduce_scatter`) start a collective and return a `Pending`, whose `wait` gives the
result; what a caller computes between the two is what hides the communication. On an axis of size
one every verb is the identity: nothing is called, so the same code is the dense reference.

In eager mode a verb is a plain asynchronous collective of `torch.distributed`. Its `Pending` owns
what is sent, what is received and the handle, and is on the list of what is `under_way`, until it is
waited for; so memory in which a collective works has an owner even where an exception has thrown
away whoever would have waited. A step, a save and a load end with nothing under way.

Torch's functional operators would serve eager mode and `torch.compile` alike, but on gloo their
all-gather is a coalesced one, and several of those under way at once corrupt memory, whoever holds
their handles (torch 2.13; `docs/grid.md` says more). They remain where a graph or a dispatch mode must
see an operator with a result: under `torch.compile`, where each layer's gather is waited for before
the next starts, and under selective checkpointing, where they are waited for at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group  # no public way from a name

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.launch import patience

_functional = torch.ops._c10d_functional  # noqa: SLF001 - the operators have no public name
# Torch 2.13 has new names for these two, and warns of those that 2.11 has.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

Context = Any
"""An autograd context, on which a function keeps what its backward needs."""
Verb = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchanged:
    """Send tensors as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Send tensors as `dtype`, and give the result back in the type that came in."""

    dtype: torch.dtype


Wire = Unchanged | Cast
"""The number format in which an axis communicates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEvent:
    """One thing that happened on this rank, in the order in which it happened."""

    moment: Literal["start", "wait", "product"]
    what: str
    """A verb, or for a product `forward`, `input_gradient` or `weight_gradient`."""
    layer: str
    """Name of the layer on whose behalf it happened."""
    axis: str = ""
    payload_bytes: int = 0
    """Size of the full tensor that the collective sums, assembles or spreads, not of the wire
    traffic: a ring moves `(size - 1) / size` of it, an all-reduce twice that."""


class Observer:
    """Sees every collective and every product of a grid, and by default does nothing."""

    __slots__ = ()

    def started(self, event: TraceEvent) -> float:
        """A collective was started; the result is handed to `waited`."""
        del event
        return 0.0

    def waited(self, event: TraceEvent, token: float) -> None:
        """The result of a collective is about to be used."""

    def product(self, what: str, layer: str) -> None:
        """A matrix product is about to be computed."""


SILENT = Observer()


@dataclass(slots=True, kw_only=True)
class Trace(Observer):
    """Keeps every event; can make each collective take at least `latency_s`, as a network does."""

    latency_s: float = 0.0
    """Time in seconds between the start of a collective and the earliest end of its wait."""
    events: list[TraceEvent] = field(default_factory=list)

    def started(self, event: TraceEvent) -> float:
        """Note the start and its time."""
        self.events.append(event)
        return time.perf_counter()

    def waited(self, event: TraceEvent, token: float) -> None:
        """Note the wait, after the rest of the latency."""
        self.events.append(event)
        time.sleep(max(0.0, token + self.latency_s - time.perf_counter()))

    def product(self, what: str, layer: str) -> None:
        """Note the product."""
        self.events.append(TraceEvent(moment="product", what=what, layer=layer))

    def volume(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Calls and payload bytes by (axis, verb)."""
        totals: dict[tuple[str, str], tuple[int, int]] = {}
        for event in self.events:
            if event.moment == "start":
                calls, payload = totals.get((event.axis, event.what), (0, 0))
                totals[event.axis, event.what] = (calls + 1, payload + event.payload_bytes)
        return totals


@dataclass(slots=True, kw_only=True, eq=False)
class Pending:
    """A collective under way. Its result exists only after `wait`."""

    _tensor: Tensor
    """What is received."""
    _rows: int
    """Rows of the result; more may be under way, as padding."""
    _dtype: torch.dtype
    _axis: Axis
    _verb: Verb
    _layer: str
    _sent: Tensor | None = None
    _work: dist.Work | None = None
    """The handle; None where there was nothing to do, and of a functional operator."""
    _terms: int = 1
    """Ranks whose terms are received one after the other, and added here."""
    _token: float = 0.0
    _under_way: bool = True
    is_promised: bool = False
    """Whether it is a gradient that autograd was promised, and may never ask for."""
    _direction: str = ""
    """"backward" for one that autograd's backward started, else "forward"."""

    def wait(self) -> Tensor:
        """The result. On a GPU this orders streams; it does not stop the host."""
        if self._under_way:
            self._under_way = False
            observer = self._axis.observer
            if observer is not SILENT:
                event = TraceEvent(
                    moment="wait", what=self._verb, layer=self._layer, axis=self._axis.name
                )
                observer.waited(event, self._token)
            if self._work is not None:
                self._finish(self._work)
            elif torch.compiler.is_compiling():
                self._tensor = _functional.wait_tensor(self._tensor)
            if self._terms > 1:
                self._tensor = self._tensor.unflatten(0, (self._terms, -1)).sum(
                    0, dtype=self._dtype
                )
            if self._tensor.ndim and self._tensor.shape[0] != self._rows:
                self._tensor = self._tensor.narrow(0, 0, self._rows)
            self._tensor = self._tensor.to(self._dtype)
        return self._tensor

    def placeholder(self) -> Tensor:
        """A NaN of the result's number format, on its device."""
        return torch.full((), torch.nan, dtype=self._dtype, device=self._tensor.device)

    def __str__(self) -> str:
        return (
            f"{self._verb} of {self._layer or 'no layer'} over {self._axis.name}"
            f"{f' in {self._direction}' if self._direction else ''}"
        )

    def _finish(self, work: dist.Work) -> None:
        NOW.begin_waiting(self)
        try:
            if self._tensor.is_cpu:
                # gloo's own limit is that of the communicator, half an hour. After one failure the others
                # under way will not end either.
                work.wait(timedelta(milliseconds=1) if _failed else patience())
            else:
                work.wait()  # orders streams; NCCL keeps its time by itself
        except RuntimeError as error:
            _failed.append(str(self))
            axis = self._axis
            error.add_note(f"in {self}, as rank {axis.rank} of {axis.size} along {axis.name}")
            raise
        finally:  # one that failed has ended as well
            NOW.end_waiting()
            del _under_way[self]
            self._work = self._sent = None


_failed: list[str] = []
"""Collectives that failed in this process: its communicators are of no use any more."""
_under_way: dict[Pending, None] = {}
"""In the order of their start. Of the process, as its communicators are."""


def under_way() -> tuple[Pending, ...]:
    """The collectives that this process has started in eager mode and not waited for, oldest first."""
    return tuple(_under_way)


def refuse_under_way(*, when: str) -> None:
    """Check that nothing is under way.

    Raises:
        RuntimeError: Something is; it names it, and when that was.
    """
    if _under_way:
        names = ", ".join(str(pending) for pending in _under_way)
        raise RuntimeError(
            f"still under way {when}: {names}; wait for each Pending, or call `finish_under_way` to "
            "throw their results away"
        )


def finish_under_way() -> None:
    """Let everything that is under way end, for nobody to use: after an exception.

    A collective that fails here, such as for a rank that died, has ended too: what went wrong is the
    exception that brought us here.
    """
    for pending in under_way():
        with suppress(RuntimeError):
            pending.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One direction of the grid, seen from one rank. Holds names only, so it copies and pickles.

    A length that the size does not divide is cut as `torch.chunk` cuts it: pieces of
    `ceil(length / size)`, the last ones shorter or empty, which is also what `DTensor` stores.
    """

    name: str
    size: int
    rank: int
    sum_group: str = ""
    """Name of the communicator for `all_reduce` and `reduce_scatter`."""
    gather_group: str = ""
    """Name of the communicator for `all_gather`. Where weights move (depth, data) it is a second
    one, so that a gather never queues behind a scatter of the other direction."""
    wire: Wire = Unchanged()
    observer: Observer = SILENT

    def bounds(self, length: int) -> tuple[int, int]:
        """Start and stop of this rank's piece of `length` things."""
        step = -(-length // self.size)
        return min(self.rank * step, length), min((self.rank + 1) * step, length)

    def all_reduce(
        self, tensor: Shaped[Tensor, "..."], *, op: Literal["sum", "max"] = "sum", layer: str = ""
    ) -> Pending:
        """Start the sum (or maximum) of equally shaped tensors over the axis.

        Takes `tensor` over: the result is written into it, unless someone may have kept it.
        """
        if self.size == 1 or tensor.numel() == 0:
            return self._nothing(tensor, "all_reduce")
        sent = self._on_wire(tensor).contiguous()
        if _needs_operators():
            result, work = _functional.all_reduce(sent, op, self.sum_group), None
        else:
            group = _group(self.sum_group)
            result, work = sent, dist.all_reduce(sent, _REDUCTIONS[op], group, async_op=True)
        rows = tensor.shape[0] if tensor.ndim else 0
        return self._started(
            sent, result, work, tensor.dtype, rows, sent.nbytes, "all_reduce", layer
        )

    def all_gather(
        self, piece: Shaped[Tensor, "piece ..."], *, rows: int, layer: str = ""
    ) -> Pending:
        """Start assembling the pieces of a tensor of `rows` rows that is cut along dim 0."""
        if self.size == 1 or rows == 0:
            return self._nothing(piece, "all_gather")
        sent = _pad(self._on_wire(piece), -(-rows // self.size)).contiguous()
        if _needs_operators():
            result = _functional.all_gather_into_tensor(sent, self.size, self.gather_group)
            work = None
        else:
            group = _group(self.gather_group)
            result = sent.new_empty(sent.shape[0] * self.size, *sent.shape[1:])
            work = _all_gather(result, sent, group, async_op=True)
        payload = sent.nbytes * self.size
        return self._started(sent, result, work, piece.dtype, rows, payload, "all_gather", layer)

    def reduce_scatter(self, whole: Shaped[Tensor, "rows ..."], *, layer: str = "") -> Pending:
        """Start summing over the axis a tensor of which each rank keeps its piece of dim 0."""
        rows = whole.shape[0]
        if self.size == 1 or rows == 0:
            return self._nothing(whole, "reduce_scatter")
        sent = _pad(self._on_wire(whole), -(-rows // self.size) * self.size).contiguous()
        terms = 1
        if _needs_operators():
            result = _functional.reduce_scatter_tensor(sent, "sum", self.size, self.sum_group)
            work = None
        elif sent.is_cpu:
            # Gloo's reduce-scatter is an all-reduce and a copy. Each rank gets the terms of its piece
            # instead, and adds them: half the traffic.
            terms, result = self.size, torch.empty_like(sent)
            group = _group(self.sum_group)
            work = dist.all_to_all_single(result, sent, group=group, async_op=True)
        else:
            group = _group(self.sum_group)
            result = sent.new_empty(sent.shape[0] // self.size, *sent.shape[1:])
            work = _reduce_scatter(result, sent, group=group, async_op=True)
        start, stop = self.bounds(rows)
        payload = sent.nbytes
        return self._started(
            sent, result, work, whole.dtype, stop - start, payload, "reduce_scatter", layer, terms
        )

    def all_to_all(
        self,
        rows: Shaped[Tensor, "rows ..."],
        sends: Sequence[int],
        receives: Sequence[int],
        *,
        layer: str = "",
    ) -> Pending:
        """Start handing out rows: the first `sends[0]` to rank 0, ...; `receives[r]` come from rank r."""
        if self.size == 1:
            return self._nothing(rows, "all_to_all")
        sent, group = self._on_wire(rows).contiguous(), self.sum_group
        if _needs_operators():
            result = _functional.all_to_all_single(sent, list(receives), list(sends), group)
            work = None
        else:
            result = sent.new_empty(sum(receives), *sent.shape[1:])
            work = dist.all_to_all_single(
                result, sent, list(receives), list(sends), _group(group), async_op=True
            )
        payload = max(sent.nbytes, result.nbytes)
        return self._started(
            sent, result, work, rows.dtype, sum(receives), payload, "all_to_all", layer
        )

    def exchange(
        self,
        rows: Shaped[Tensor, "rows ..."],
        sends: Sequence[int],
        receives: Sequence[int],
        *,
        layer: str = "",
    ) -> Shaped[Tensor, "received ..."]:
        """Rows handed out to the ranks of the axis, forward; backward, their gradients come back."""
        if self.size == 1:
            return rows
        return _Exchange.apply(rows, self, tuple(sends), tuple(receives), layer)

    def sum(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over the axis, forward; backward, the gradient as it is.

        For partial results that meet and are then used by every rank alike.
        """
        return _Sum.apply(tensor, self) if self.size > 1 else tensor

    def copy(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The tensor as it is, forward; backward, the sum of the ranks' gradients.

        For a tensor that every rank holds whole and each uses for its own part of the work.
        """
        return _Copy.apply(tensor, self) if self.size > 1 else tensor

    def whole(
        self,
        piece: Shaped[Tensor, "*shape"],
        *,
        dim: int,
        length: int,
        used: Literal["alike", "apart"],
    ) -> Shaped[Tensor, "*whole"]:
        """All pieces along `dim`, forward; backward, this rank's piece of the gradient.

        Where the ranks use the result `alike`, their gradients are equal and each takes its piece;
        where each uses its own part (`apart`), the gradients are summed on the way.
        """
        return _Whole.apply(piece, self, dim, length, used) if self.size > 1 else piece

    def split(self, whole: Shaped[Tensor, "*shape"], *, dim: int) -> Shaped[Tensor, "*piece"]:
        """This rank's piece along `dim` of the sum, forward; backward, all pieces' gradients."""
        return _Split.apply(whole, self, dim) if self.size > 1 else whole

    def share(self, whole: Shaped[Tensor, "*shape"], *, dim: int) -> Shaped[Tensor, "*piece"]:
        """This rank's piece along `dim` of a tensor that all hold; backward, all pieces' gradients."""
        return _Share.apply(whole, self, dim) if self.size > 1 else whole

    def _on_wire(self, tensor: Tensor) -> Tensor:
        if isinstance(self.wire, Cast) and tensor.is_floating_point():
            return tensor.to(self.wire.dtype)
        return tensor

    def _nothing(self, tensor: Tensor, verb: Verb) -> Pending:
        return Pending(
            _tensor=tensor, _rows=0, _dtype=tensor.dtype, _axis=self, _verb=verb, _layer="",
            _under_way=False,
        )  # fmt: skip

    def _started(
        self,
        sent: Tensor,
        result: Tensor,
        work: dist.Work | None,
        dtype: torch.dtype,
        rows: int,
        payload: int,
        verb: Verb,
        layer: str,
        terms: int = 1,
    ) -> Pending:
        token = 0.0
        if self.observer is not SILENT:
            token = self.observer.started(
                TraceEvent(
                    moment="start", what=verb, layer=layer, axis=self.name, payload_bytes=payload
                )
            )
        if work is None and not torch.compiler.is_compiling():
            result = _functional.wait_tensor(result)  # at once: never two of them under way
        direction = ""
        if work is not None:  # so not while a graph is made
            # In backward a graph task is under way; there is no public way to ask.
            direction = "backward" if torch._C._current_graph_task_id() >= 0 else "forward"  # noqa: SLF001
        pending = Pending(
            _tensor=result, _sent=sent, _work=work, _rows=rows, _dtype=dtype, _axis=self, _verb=verb,
            _layer=layer, _token=token, _terms=terms, _direction=direction,
        )  # fmt: skip
        if work is not None:
            _under_way[pending] = None
        return pending


ALONE = Axis(name="alone", size=1, rank=0)
"""No axis at all: every verb is the identity."""


def _needs_operators() -> bool:
    """Whether a graph is being made, or a dispatch mode sees every tensor.

    Selective checkpointing keeps some results for later, by the operator that gave them, and nothing
    may be written into a result that was kept.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0  # noqa: SLF001 - no public name


def _group(name: str) -> dist.ProcessGroup:
    """This process' communicator of a name."""
    return _resolve_process_group(cast(Any, name))  # to newer torch a type of its own


def _pad(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with zero rows added at the end, or itself."""
    missing = rows - tensor.shape[0]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, tensor: Tensor, axis: Axis) -> Tensor:  # noqa: ARG004
        return axis.all_reduce(tensor.clone()).wait()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # noqa: ARG004
        return gradient, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.axis.all_reduce(gradient.clone()).wait(), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, piece: Tensor, axis: Axis, dim: int, length: int, used: str
    ) -> Tensor:
        ctx.axis, ctx.dim, ctx.used = axis, dim, used
        pieces = piece.movedim(dim, 0)
        return axis.all_gather(pieces, rows=length).wait().movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = gradient.movedim(ctx.dim, 0)
        if ctx.used == "alike":
            start, stop = ctx.axis.bounds(rows.shape[0])
            piece = rows[start:stop]
        else:
            piece = ctx.axis.reduce_scatter(rows).wait()
        return piece.movedim(0, ctx.dim).contiguous(), None, None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        rows: Tensor,
        axis: Axis,
        sends: tuple[int, ...],
        receives: tuple[int, ...],
        layer: str,
    ) -> Tensor:
        ctx.axis, ctx.sends, ctx.receives, ctx.layer = axis, sends, receives, layer
        return axis.all_to_all(rows, sends, receives, layer=layer).wait()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pending = ctx.axis.all_to_all(gradient, ctx.receives, ctx.sends, layer=ctx.layer)
        return pending.wait(), None, None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, whole: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim, ctx.length = axis, dim, whole.shape[dim]
        return axis.reduce_scatter(whole.movedim(dim, 0)).wait().movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gathered(ctx, gradient), None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, whole: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim, ctx.length = axis, dim, whole.shape[dim]
        start, stop = axis.bounds(whole.shape[dim])
        return whole.narrow(dim, start, stop - start).contiguous()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gathered(ctx, gradient), None, None


def _gathered(ctx: Context, gradient: Tensor) -> Tensor:
    pieces = ctx.axis.all_gather(gradient.movedim(ctx.dim, 0), rows=ctx.length).wait()
    return pieces.movedim(0, ctx.dim).contiguous()
