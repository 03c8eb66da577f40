"""Blocks that every rank of row and col computes alike, and what of them is divided nevertheless.

What no rule covers is computed whole: the residual stream is gathered over col on the way in, each
rank keeps its features on the way out, and in between all ranks of row and col hold the same tensors
and the same gradients. Nothing of the block is held in copies: its parameters are cut over row, col
and depth, and gathered where they are used. The products are divided all the same where the kind of
a module says how:

- a linear layer (`Divided`): each rank computes its share of the output features, then they are
  gathered;
- a set of experts (`Experts`): each rank computes its share of every expert's hidden units, and the
  results, each one term of a sum, are added. Over depth either the experts are gathered, as every weight
  is, or each rank keeps its own and the tokens go to them (`ExchangedExperts`, expert parallelism).

What remains alike is what lies between: the attention of all heads, convolutions, states, routers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold_parallel.grid.collectives import Axis
from fourfold_parallel.grid.flow import Flow, mapped
from fourfold_parallel.grid.mesh import Cut, Mesh
from fourfold_parallel.grid.schedule import Around, Layer, Schedule, Visit

TOKENS_CHOICES_WEIGHTS = 3
"""Tensors that a set of experts is called with, the first by the name of `hidden_states`."""
TILED: Cut = {"row": 0, "col": 0, "depth": 0}
"""Of a parameter that is gathered whole, and of a linear layer whose outputs are divided."""


def experts_cut(dim: int) -> Cut:
    """Of a weight or a bias of all experts, `[experts, ...]`, whose hidden units lie along `dim`."""
    return {"row": dim, "col": dim, "depth": 0}


class Whole(Around):
    """A block that every rank of row and col computes alike.

    Args:
        inner: The block. Its own parameters and those of its modules, but for what is on the grid
            already, are taken over under their names.
        parameters: Those, by their name within the block.
        flow: What of the arguments and results is the residual stream.
        width: Of the residual stream.
        cuts_tokens: The sequence form: tokens are cut over row outside of the block.
        mesh: The grid.
        name: What messages and traces call it.
        schedule: Shared by all layers of a model.
    """

    def __init__(
        self,
        inner: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        flow: Flow,
        width: int,
        cuts_tokens: bool,
        mesh: Mesh,
        name: str,
        schedule: Schedule,
    ) -> None:
        super().__init__(inner, mesh=mesh, name=name, schedule=schedule)
        self.flow, self.width, self.cuts_tokens = flow, width, cuts_tokens
        self.gathers: dict[str, list[tuple[Axis, int, int]]] = {}
        """Of each parameter: the axes over which its tile is gathered, their dims, and the lengths."""
        for parameter_name, parameter in parameters.items():
            assert isinstance(parameter, DTensor)
            cut = mesh.cut_of(parameter)
            if "depth" in cut or parameter.ndim:
                self.hold_tiled(parameter_name, parameter)
            else:
                self.hold_copied(parameter_name, parameter, summed=[mesh.depth])
            steps = self.gathers[parameter_name] = []
            for axis in (mesh.col, mesh.row):
                if axis.name in cut:  # the inner cut is undone first
                    dim = cut.pop(axis.name)
                    outer: Cut = {"row": cut["row"]} if "row" in cut else {}
                    stretch = mesh.slices(parameter.shape, outer)[dim]
                    steps.append((axis, dim, stretch.stop - stretch.start))
        self._is_made = True

    def __getattr__(self, name: str) -> Any:
        """An attribute of the block that code outside reads, such as the kind of a decoder layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_is_made" not in self.__dict__:  # so that nothing is taken for there already
                raise
            return getattr(self._inner[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's result: of the residual stream, this rank's features."""
        if not self.flow.is_known and self.mesh.col.size > 1:
            raise ValueError(
                f"{self.name} is not called for text alone, so nothing says what it gives the "
                "residual stream; leave its inputs out, or use col=1"
            )
        values = self.gathered(self.visit(casts=False)) if self.parameter_names else {}
        *given, options = mapped((*args, kwargs), self._enter)
        return mapped(self.call(values, tuple(given), options), self._leave)

    def gathered(self, visit: Visit) -> dict[str, Tensor]:
        """The whole parameters; each rank keeps the gradient of its own piece."""
        values: dict[str, Tensor] = {}
        for name in self.parameter_names:
            values[name] = self.use(visit, name)
            for axis, dim, length in self.gathers[name]:
                values[name] = axis.whole(values[name], dim=dim, length=length, used="alike")
        return values

    def _enter(self, path: Any, x: Tensor) -> Tensor:
        is_whole = self.mesh.col.size > 1 and x.shape[-1] == self.width
        if path not in self.flow.inputs or is_whole:
            return x
        x = self.mesh.col.whole(x, dim=-1, length=self.width, used="alike")
        if self.cuts_tokens:
            row = self.mesh.row
            x = row.whole(x, dim=-2, length=x.shape[-2] * row.size, used="alike")
        return x

    def _leave(self, path: Any, x: Tensor) -> Tensor:
        if path not in self.flow.outputs or x.shape[-1] != self.width:
            return x
        if self.cuts_tokens:
            x = self.mesh.row.share(x, dim=-2)
        return self.mesh.col.share(x, dim=-1)


class Divided(Layer):
    """A linear layer of a whole block: `X` and `Y` whole on all ranks, the product divided among them.

    Each rank of row and col computes some of the output features, which are gathered. Backward, each
    has one term of dX, and their sum is taken over row and col.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        mesh: Mesh,
        name: str,
        schedule: Schedule,
    ) -> None:
        super().__init__(mesh=mesh, name=name, schedule=schedule)
        self.out_features, self.in_features = weight.shape
        self.hold_tiled("weight", weight)
        if bias is None:
            self.bias = None
        else:
            self.hold_tiled("bias", bias)

    def forward(self, x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch n"]:
        """All output features."""
        row, col = self.mesh.row, self.mesh.col
        visit = self.visit()
        weight = self.use(visit, "weight")
        bias = self.use(visit, "bias") if self.bias is not None else None
        y = F.linear(col.copy(row.copy(x)), weight, bias)
        rows = row.bounds(self.out_features)
        y = col.whole(y, dim=-1, length=rows[1] - rows[0], used="alike")
        return row.whole(y, dim=-1, length=self.out_features, used="alike")


class Experts(Around):
    """The experts of a whole block: each rank computes its share of every expert's hidden units.

    Args:
        inner: The experts; their forward gives a sum over hidden units.
        parameters: By name; hidden units cut over row and col, experts over depth.
        packed: Of parameters that hold gate and up one after the other, the dim of hidden units.
        once: Parameters that one rank alone may add: biases of the outputs.
        mesh: The grid.
        name: What messages and traces call it.
        schedule: Shared by all layers of a model.
    """

    def __init__(
        self,
        inner: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        packed: Mapping[str, int],
        once: tuple[str, ...],
        mesh: Mesh,
        name: str,
        schedule: Schedule,
    ) -> None:
        super().__init__(inner, mesh=mesh, name=name, schedule=schedule)
        self.packed, self.once = packed, once
        for parameter_name, parameter in parameters.items():
            if parameter_name in once:
                self.hold_copied(parameter_name, parameter, summed=[mesh.row, mesh.col, mesh.depth])
            else:
                self._take(parameter_name, parameter)

    def _take(self, name: str, parameter: nn.Parameter) -> None:
        self.hold_tiled(name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of the chosen experts' outputs for each token."""
        visit = self.visit(casts=False)
        values = {name: self._ready(name, self.use(visit, name)) for name in self.parameter_names}
        *given, options = mapped((*args, kwargs), lambda _, x: _copied(x, self.axes))
        return self.summed(self.call(values, tuple(given), options))

    @property
    def axes(self) -> list[Axis]:
        """Those over which hidden units are cut."""
        return [axis for axis in (self.mesh.row, self.mesh.col) if axis.size > 1]

    def summed(self, y: Tensor) -> Tensor:
        """The sum of all ranks' terms."""
        for axis in self.axes:
            y = axis.sum(y)
        return y

    def _ready(self, name: str, value: Tensor) -> Tensor:
        """A parameter as the module computes with it."""
        if name in self.packed:  # stored as `(unit part)`, computed with as `(part unit)`
            value = value.movedim(self.packed[name], -1)
            value = rearrange(value, "... (unit part) -> ... (part unit)", part=2)
            value = value.movedim(-1, self.packed[name]).contiguous()
        if name in self.once and (self.mesh.row.rank or self.mesh.col.rank):
            value = value * 0
        return value


class ExchangedExperts(Experts):
    """Experts that stay where they are stored: each rank of depth computes its own, for all ranks' tokens.

    A token goes to the ranks of the experts that its router chose, and their results come back: twice
    `tokens * choices * width` words a rank move over depth and as many backward, instead of all experts'
    weights forward and backward and their gradients. Nothing is dropped, so ranks whose experts are chosen
    more often compute more.

    Raises:
        ValueError: The module is not called with hidden states, choices and their weights alone.
    """

    def __init__(
        self,
        inner: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        mesh: Mesh,
        name: str,
        **how: Any,
    ) -> None:
        self.takes: list[str] = [*inspect.signature(inner.forward).parameters]
        if not takes_choices(inner):
            raise ValueError(
                f"{name}: {type(inner).__name__} is called with {', '.join(self.takes)}, so tokens cannot go "
                'to its experts; use experts="gathered"'
            )
        super().__init__(inner, parameters, mesh=mesh, name=name, **how)
        first = next(iter(parameters.values()))
        self.experts = first.shape[0]
        self.own = slice(*mesh.depth.bounds(self.experts))
        module: Any = inner
        module.num_experts = self.own.stop - self.own.start

    def _take(self, name: str, parameter: nn.Parameter) -> None:
        # All tokens of an expert come to it: its gradient is whole, and needs no sum over depth.
        self.hold_copied(name, parameter, summed=[])

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Float[Tensor, "token width"]:
        """The weighted sum of the chosen experts' outputs for each token."""
        given = dict(zip(self.takes, args, strict=False)) | kwargs
        hidden, chosen, weights = (_copied(given[name], self.axes) for name in self.takes)
        visit, depth = self.visit(casts=False), self.mesh.depth
        values = {name: self._ready(name, self.use(visit, name)) for name in self.parameter_names}
        for name in self.once:
            values[name] = values[name][self.own]

        # A row for each choice of each token, in the order of the experts, so of the ranks that hold them.
        step = -(-self.experts // depth.size)
        expert, order = chosen.reshape(-1).sort(stable=True)
        token = order // chosen.shape[-1]
        sends = torch.bincount(expert // step, minlength=depth.size)
        each, layer = [1] * depth.size, self.name
        out, back = sends.tolist(), depth.exchange(sends, each, each, layer=layer).tolist()
        rows = depth.exchange(hidden[token], out, back, layer=layer)
        factor = depth.exchange(weights.reshape(-1, 1)[order], out, back, layer=layer)
        local = depth.exchange(expert % step, out, back, layer=layer)[:, None]

        if len(rows):
            y: Tensor = self.call(values, (rows, local, factor), None)
        else:
            # Nobody's choice: a gradient of nought for each expert, and the backward exchanges all the same.
            y = rows * factor + sum(value.sum() * 0 for value in values.values())
        y = depth.exchange(self.summed(y), back, out, layer=layer)
        return torch.zeros_like(hidden).index_add(0, token, y.to(hidden.dtype))


def takes_choices(experts: nn.Module) -> bool:
    """True where experts are called with hidden states, choices and their weights, and nothing else."""
    takes = [*inspect.signature(experts.forward).parameters]
    return len(takes) == TOKENS_CHOICES_WEIGHTS and takes[0] == "hidden_states"


def _copied(x: Tensor, axes: list[Axis]) -> Tensor:
    if not x.is_floating_point():
        return x
    for axis in axes:
        x = axis.copy(x)
    return x


def elementwise(module: nn.Module, width: int) -> bool:
    """Whether a module without parameters treats each feature by itself, found out by asking it."""
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    half = width // 2 or 1
    was_training = module.training
    try:
        with torch.no_grad():
            whole = module.eval()(x)
            try:
                part = module(x[:, :half])
            except (RuntimeError, ValueError):  # it knows the width that it is made for
                return False
    except Exception:  # noqa: BLE001 - it wants something else than a residual stream
        return True
    finally:
        module.train(was_training)
    if not isinstance(whole, Tensor) or whole.shape != x.shape:
        return True
    return torch.equal(whole[:, :half], part)
