"""When tiles are gathered and when gradients are waited for: one layer early, one layer late.

Both need to know which layer comes next. A `Schedule` learns that by watching: it writes down the
order in which layers ask for their tiles during one forward and backward (recomputation under
activation checkpointing included), and in the next one starts the gather that will be asked for
next. A wrong guess costs a gather and no more: a tile is used only for the request it was made for.

The late end needs no list. Of the nodes that are ready, autograd runs first the one created last,
so the node that waits for a layer's gradient (`_AwaitGradient`) is created before the preceding
layer's product, together with the early gather, and its backward runs after that product's backward:
**the backward of "start the gather early" is "wait for the gradient late".** Autograd passes the
gradient on only after that node, so an accumulation hook never sees an unfinished one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from fourfold_parallel.grid.collectives import Axis, Context, Pending, under_way
from fourfold_parallel.grid.mesh import Mesh

Phase = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlaps:
    """The communication that runs under computation. The results do not depend on it."""

    input_gradient: bool = True
    """Sum the input's gradient while the weight's gradient is computed."""
    weight_gradient: bool = True
    """Spread the weight's gradient over `depth` while the preceding layer's backward runs."""
    weights: bool = True
    """Gather the next tile while the current product runs."""
    gathers_ahead: int = 1
    """How many layers' gathers may be under way before they are asked for."""


ALL_OVERLAPS = Overlaps()
NO_OVERLAP = Overlaps(input_gradient=False, weight_gradient=False, weights=False)


class DeferredGradient:
    """The gradient of one use of one parameter, between its start and its wait."""

    __slots__ = ("_pending", "_shape", "immediate")

    def __init__(self, shape: torch.Size, *, immediate: bool) -> None:
        self.immediate = immediate
        self._shape = shape
        self._pending: Pending | None = None

    def promise(self, pending: Pending) -> Tensor:
        """The stand-in that autograd gets for a gradient under way.

        The gradient itself if nobody waits for it later. Otherwise a placeholder, NaN everywhere
        and without memory, which `_AwaitGradient` replaces unread. Where autograd was asked for other
        gradients only (`torch.autograd.grad`), that node does not run, and `Schedule.drop` waits.
        """
        if self.immediate:
            return pending.wait()
        pending.is_promised = True
        self._pending = pending
        return pending.placeholder().expand(self._shape)

    def wait(self) -> Tensor:
        """The finished gradient."""
        pending, self._pending = self._pending, None
        assert pending is not None, "no gradient under way"
        return pending.wait()


AT_ONCE = DeferredGradient(torch.Size(), immediate=True)
"""Of every gradient that nobody waits for later: it remembers nothing."""


@dataclass(slots=True, kw_only=True)
class VisitParameter:
    """One parameter during one visit of its layer."""

    piece: Tensor
    """This rank's piece, known to autograd, in the number format of the computation."""
    late: DeferredGradient
    gather: Pending | None = None
    """The gather of the tile, once it was started."""


class Request(NamedTuple):
    """A layer asking for its parameters."""

    layer: Layer
    phase: Phase
    dtype: torch.dtype | None
    """The number format of the computation; None where each parameter keeps its own."""
    differentiable: bool
    """Whether autograd is on: it is off in backward, and on again where activations are recomputed."""


@dataclass(slots=True, kw_only=True)
class Visit:
    """One pass through one layer, forward or backward, with the parameters it holds."""

    request: Request
    parameters: dict[str, VisitParameter]
    made_for: tuple[Any, ...] = ()
    """State of the parameters, for a visit made ahead: if it has changed, the visit is void."""

    def start_gathers(self) -> None:
        """Start the gathers that are not yet under way."""
        layer = self.request.layer
        for name in layer.tiled:
            parameter = self.parameters[name]
            if parameter.gather is None:
                parameter.gather = layer.mesh.depth.all_gather(
                    parameter.piece.detach(), rows=layer.tile_rows[name], layer=layer.name
                )

    def wait_for_tile(self, name: str) -> Tensor:
        """The tile, waited for. The visit lets go of it: it may be asked for once."""
        parameter = self.parameters[name]
        gather, parameter.gather = parameter.gather, None
        assert gather is not None, f"{self.request.layer.name}: no gather of {name!r} under way"
        return gather.wait()

    def drop(self) -> None:
        """Let the gathers finish; nobody will use them."""
        for parameter in self.parameters.values():
            if parameter.gather is not None:
                parameter.gather.wait()


class Schedule:
    """The layers of one model in the order of their execution, learnt from the last step."""

    def __init__(self, overlaps: Overlaps) -> None:
        self.overlaps = overlaps
        self._expected: dict[bool, list[Request]] = {True: [], False: []}
        self._seen: list[Request] = []
        self._training = True
        self._ready: deque[Visit] = deque()
        self._place = -1

    def __reduce__(self) -> tuple[type[Schedule], tuple[Overlaps]]:
        """A copy has learnt nothing and has nothing under way."""
        return Schedule, (self.overlaps,)

    def restart(self) -> None:
        """A forward of the whole model begins: what was seen since the last one is the order."""
        if self._seen:
            self._expected[self._training] = self._seen
        self._seen = []
        self._training = torch.is_grad_enabled()
        self._place = -1
        self.drop()

    def enter(self, request: Request) -> Visit:
        """The layer's parameters with their gathers under way, and the next layers' started."""
        if not request.layer.communicates or torch.compiler.is_compiling():
            visit = self._prepare(request)
            visit.start_gathers()
            return visit
        self._seen.append(request)
        self._advance(request)
        visit = self._take(request)
        visit.start_gathers()
        if self.overlaps.weights or self.overlaps.weight_gradient:
            self._look_ahead()
        if not self.overlaps.weights:
            for parameter in visit.parameters.values():
                if parameter.gather is not None:
                    parameter.gather.wait()
        return visit

    def _advance(self, request: Request) -> None:
        """Find the request in the expected order; after a surprise, behind the last place."""
        expected = self._expected[self._training]
        following = self._place + 1
        if following < len(expected) and expected[following] == request:
            self._place = following
            return
        self._drop_ahead()
        try:
            self._place = expected.index(request, following)
        except ValueError:
            self._place = len(expected)

    def _take(self, request: Request) -> Visit:
        if self._ready:
            visit = self._ready.popleft()
            if visit.request == request and visit.made_for == request.layer.state():
                return visit
            visit.drop()
            self._drop_ahead()
        return self._prepare(request)

    def _look_ahead(self) -> None:
        expected = self._expected[self._training]
        gathers = sum(bool(visit.request.layer.tiled) for visit in self._ready)
        following = self._place + 1 + len(self._ready)
        while gathers < self.overlaps.gathers_ahead and following < len(expected):
            visit = self._prepare(expected[following])
            visit.made_for = visit.request.layer.state()
            if self.overlaps.weights:
                visit.start_gathers()
            self._ready.append(visit)
            gathers += bool(visit.request.layer.tiled)
            following += 1

    def _prepare(self, request: Request) -> Visit:
        layer, phase, dtype, differentiable = request
        late = self.overlaps.weight_gradient and not torch.compiler.is_compiling()
        parameters: dict[str, VisitParameter] = {}
        for name in layer.parameter_names if phase == "forward" else layer.tiled:
            if differentiable == torch.is_grad_enabled():
                piece = layer.local(name, dtype)
            else:
                with torch.set_grad_enabled(differentiable):
                    piece = layer.local(name, dtype)
            ticket = AT_ONCE
            if late and layer.gradient_travels(name):
                ticket = DeferredGradient(piece.shape, immediate=False)
                if piece.requires_grad:
                    with torch.enable_grad():
                        piece = _AwaitGradient.apply(piece, ticket)
            parameters[name] = VisitParameter(piece=piece, late=ticket)
        return Visit(request=request, parameters=parameters)

    def drop(self) -> None:
        """Let what nobody will use finish: gathers made ahead, and gradients never asked for."""
        self._drop_ahead()
        for pending in under_way():
            if pending.is_promised:
                pending.wait()

    def _drop_ahead(self) -> None:
        while self._ready:
            self._ready.popleft().drop()


class Layer(nn.Module):
    """A module whose parameters live on the grid.

    Args:
        mesh: The grid.
        name: What messages and traces call it.
        schedule: Shared by all layers of a model.
    """

    def __init__(self, *, mesh: Mesh, name: str, schedule: Schedule) -> None:
        super().__init__()
        self.mesh, self.name, self.schedule = mesh, name, schedule
        self.tiled: tuple[str, ...] = ()
        self.tile_rows: dict[str, int] = {}
        """Rows of the tile of each tiled parameter: its local rows, with the cut over depth undone."""
        self.parameter_names: tuple[str, ...] = ()
        """Names of the parameters that the layer holds itself."""
        self.communicates = False
        """Whether a use of the layer's parameters needs any collective."""
        self._summed: dict[str, tuple[Axis, ...]] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        """Called by `to`, `float` and the like: does nothing where nothing changes, and refuses elsewhere.

        Torch would exchange each parameter's inside for a new one that no hook watches any more, so
        that gradients would not be summed over data.

        Raises:
            ValueError: The device or the number format would change.
        """
        del recurse
        for name in self.parameter_names:
            piece = self._held(name)._local_tensor  # noqa: SLF001 - to_local would build a graph node
            before = torch.empty(0, dtype=piece.dtype, device=piece.device)
            after = fn(before)
            if (after.dtype, after.device) != (before.dtype, before.device):
                raise ValueError(
                    f"{self.name}.{name} lies on the grid as {before.dtype} on {before.device} and "
                    f"cannot become {after.dtype} on {after.device}; convert the model before "
                    "`parallelize`"
                )
        return self

    def hold_tiled(self, name: str, parameter: nn.Parameter) -> None:
        """Take a parameter that is cut over `depth`, and gathered whenever it is used."""
        self._register(name, parameter)
        self.tiled = (*self.tiled, name)
        assert isinstance(parameter, DTensor)
        cut = self.mesh.cut_of(parameter)
        cut.pop("depth", None)
        rows = self.mesh.slices(parameter.shape, cut)[0]
        self.tile_rows[name] = rows.stop - rows.start
        self._hold(name)

    def hold_copied(self, name: str, parameter: nn.Parameter, *, summed: Sequence[Axis]) -> None:
        """Take a parameter of which ranks along `summed` hold copies and partial gradients."""
        self._register(name, parameter)
        self._summed[name] = tuple(axis for axis in summed if axis.size > 1)
        self._hold(name)

    def _register(self, name: str, parameter: nn.Parameter) -> None:
        """Put a parameter in its place, of the layer itself or of a module within (`gate.weight`)."""
        owner, _, own_name = name.rpartition(".")
        self.get_submodule(owner).register_parameter(own_name, parameter)

    def _held(self, name: str) -> DTensor:
        parameter = self.get_parameter(name) if "." in name else getattr(self, name)
        assert isinstance(parameter, DTensor)
        return parameter

    def _hold(self, name: str) -> None:
        self.parameter_names = (*self.parameter_names, name)
        self.communicates = self.communicates or self.gradient_travels(name)

    def gradient_travels(self, name: str) -> bool:
        """Whether the gradient of a parameter needs a collective before it is final."""
        if name in self.tiled:
            return self.mesh.depth.size > 1
        return bool(self._summed[name])

    def visit(self, *, casts: bool = True) -> Visit:
        """Enter the layer: its parameters, with their gathers under way.

        Args:
            casts: Give them in autocast's number format, if it is on, rather than in their own.
        """
        dtype = compute_dtype(self._held(self.parameter_names[0])) if casts else None
        return self.schedule.enter(Request(self, "forward", dtype, torch.is_grad_enabled()))

    def revisit(self, dtype: torch.dtype) -> Visit:
        """Enter the layer again in its backward: its tiles only, with their gathers under way."""
        return self.schedule.enter(Request(self, "backward", dtype, differentiable=False))

    def use(self, visit: Visit, name: str) -> Float[Tensor, "..."]:
        """A parameter ready for ordinary torch code; its gradient finds its own way."""
        if name in self.tiled:
            return _Tile.apply(visit.parameters[name].piece, self, visit, name)
        if axes := self._summed[name]:
            return _Copied.apply(
                visit.parameters[name].piece, axes, visit.parameters[name].late, self.name
            )
        return visit.parameters[name].piece

    def local(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """This rank's piece of a parameter, known to autograd, in the computation's format."""
        parameter = self._held(name)
        if torch.compiler.is_compiling():
            piece = parameter.to_local()
        else:
            piece = _Piece.apply(parameter, f"{self.name}.{name}")
        return piece if dtype is None else piece.to(dtype)

    def state(self) -> tuple[Any, ...]:
        """The state that a visit depends on: the parameters' storage and versions; unknown where compiled."""
        if torch.compiler.is_compiling():
            return ()
        return tuple(_state(self._held(name)) for name in self.parameter_names)

    def refuse_changes(self, *, since: tuple[Any, ...]) -> None:
        """Check what autograd checks for tensors that it saves; it saves no DTensors and no gathered tiles.

        Raises:
            RuntimeError: A parameter is not what it was at `since`.
        """
        for name, before, now in zip(self.parameter_names, since, self.state(), strict=False):
            _refuse_change(f"{self.name}.{name}", before, now)


class Around(Layer):
    """A layer that calls a published module with values of its own in the place of its parameters.

    Args:
        inner: The module. Its modules become modules of this layer; its own parameters are given up for
            those that the layer holds, so that no published tensor stays in memory.
        mesh: The grid.
        name: What messages and traces call it.
        schedule: Shared by all layers of a model.
    """

    def __init__(self, inner: nn.Module, *, mesh: Mesh, name: str, schedule: Schedule) -> None:
        super().__init__(mesh=mesh, name=name, schedule=schedule)
        for child_name, child in inner.named_children():
            self.add_module(child_name, child)
        self._inner = (inner,)  # in a tuple: it is no module of this one

    def _register(self, name: str, parameter: nn.Parameter) -> None:
        super()._register(name, parameter)
        if "." not in name:
            self._inner[0].register_parameter(name, parameter)

    def call(self, values: dict[str, Tensor], args: Any, kwargs: dict[str, Any] | None) -> Any:
        """The module's result, of these values of its parameters."""
        return functional_call(self._inner[0], values, args, kwargs)


def _state(parameter: DTensor) -> tuple[int, int, int]:
    """Changes when the parameter does: what steps on the piece counts there, all else on the parameter."""
    piece = parameter._local_tensor  # noqa: SLF001 - to_local would build a graph node
    return piece.data_ptr(), piece._version, parameter._version  # noqa: SLF001 - no public version counter


def _refuse_change(name: str, before: tuple[int, ...], now: tuple[int, ...]) -> None:
    if before != now:
        raise RuntimeError(
            f"{name} was changed between a forward and its backward, whose gradients would be of "
            "neither value; call backward before what changes it (such as optimizer.step)"
        )


class _Piece(torch.autograd.Function):
    """This rank's piece of a parameter, forward; backward, the piece of the parameter's gradient.

    What `DTensor.to_local` does, without working out at every use how the gradient is cut: it is
    cut as the parameter is. A parameter that was changed in between is refused.
    """

    @staticmethod
    def forward(ctx: Context, parameter: DTensor, name: str) -> Tensor:
        ctx.spec = parameter._spec  # noqa: SLF001 - no public name
        ctx.parameter, ctx.name, ctx.state = parameter, name, _state(parameter)
        piece = parameter._local_tensor  # noqa: SLF001 - to_local would build a second graph node
        return piece.view_as(piece)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[DTensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse_change(ctx.name, ctx.state, _state(ctx.parameter))
        return DTensor(gradient.contiguous(), ctx.spec, requires_grad=False), None


class _AwaitGradient(torch.autograd.Function):
    """The parameter itself, forward; backward, the wait for its gradient."""

    @staticmethod
    def forward(ctx: Context, parameter: Tensor, late: DeferredGradient) -> Tensor:
        ctx.late = late
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, placeholder: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        del placeholder
        return ctx.late.wait(), None


class _Tile(torch.autograd.Function):
    """The tile, forward; backward, the start of the reduce-scatter of its gradient."""

    @staticmethod
    def forward(ctx: Context, piece: Tensor, layer: Layer, visit: Visit, name: str) -> Tensor:
        del piece  # autograd's end of the tile, which the visit has been gathering
        ctx.layer, ctx.late = layer, visit.parameters[name].late
        tile = visit.wait_for_tile(name)
        return tile.view_as(tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pending = ctx.layer.mesh.depth.reduce_scatter(gradient, layer=ctx.layer.name)
        return ctx.late.promise(pending), None, None, None


class _Copied(torch.autograd.Function):
    """The parameter itself, forward; backward, the start of the sum of its gradient."""

    @staticmethod
    def forward(
        ctx: Context, parameter: Tensor, axes: tuple[Axis, ...], late: DeferredGradient, layer: str
    ) -> Tensor:
        ctx.axes, ctx.late, ctx.layer = axes, late, layer
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.late.promise(_sum(gradient.clone(), ctx.axes, ctx.layer)), None, None, None


def _sum(gradient: Tensor, axes: Sequence[Axis], layer: str) -> Pending:
    """Start the sum over several axes; only the last may be waited for late."""
    *first, last = axes
    for axis in first:
        gradient = axis.all_reduce(gradient, layer=layer).wait()
    return last.all_reduce(gradient, layer=layer)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The number format in which a product of this tensor would run: autocast's, if it is on."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype
