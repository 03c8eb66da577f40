"""Updates on the host: a replica per rank on its device, the weights' originals and the optimizer beside it.

The five stages of KARMA (Wahib et al. 2020, section IV), a group of layers at a time: backward finds the
gradients of a group; they leave the device; the ranks sum them; the host updates its weights; the device
takes the new ones. The first three run behind backward, the last behind the update of the next groups and
behind the next forward. Clipping by the global norm stands between the third and the fourth: the norm is
exact, and no update begins before the last group is summed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.common.held import Saved, State, weights_of
from fourfold_parallel.launch import Ranks, device, is_launched, process_group, world_size
from fourfold_parallel.run.engines import PlainSession, Session, check_share
from fourfold_parallel.run.flow import decoder_layers
from fourfold_parallel.run.state import restoring, state_of
from fourfold_parallel.run.stores import Host, Throttled, Ways


@dataclass(frozen=True, slots=True, kw_only=True)
class HostUpdate:
    """A replica per rank whose optimizer works in the host's memory, in a pipeline with backward.

    Loss, gradients and weights are those of plain data parallelism. A decoder layer's weights are new when
    the layer is called, all others when a microbatch begins: a loss that reads a layer's weights before it
    calls the model may read old ones.
    """

    takes_outlines: ClassVar[bool] = False
    store: Host | Throttled = field(default_factory=Host)
    """The way between device and host; slowed, to see what a slower one would cost."""
    exchange_bytes: int = 1 << 22
    """Neighbouring layers are exchanged together until they hold so many bytes of gradients."""
    exchange_latency_s: float = 0.0
    """Of an exchange, at least: to see what a slower network would cost."""
    pipelined: bool = True
    """False: each stage begins when the one before it has ended for all layers, as a baseline."""

    def __post_init__(self) -> None:
        if self.exchange_bytes < 1:
            raise ValueError(
                f"exchange_bytes={self.exchange_bytes} holds no gradient; use 1 or more"
            )
        if isinstance(self.store, Throttled) and not isinstance(self.store.store, Host):
            raise ValueError(
                f"store={self.store} is no memory that the host computes in; use Host(), or Throttled "
                "around it"
            )

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,  # noqa: ARG002 - the protocol's
    ) -> Iterator[Session]:
        """A session over all launched ranks, or over this process where it was started alone."""
        check_share("HostUpdate", batch, world_size())
        on = device()
        is_group = is_launched() or dist.is_initialized()
        with process_group(on) if is_group else nullcontext():
            ways = Ways(self.store.open(on), on)
            exchange = ThreadPoolExecutor(1, "fourfold-exchange")
            has_failed = True
            try:
                yield _HostSession(self, model, optimizer, on, precision, ways, exchange)
                has_failed = False
            finally:
                # A rank that failed does not wait for an exchange that the others may never join.
                exchange.shutdown(wait=not has_failed, cancel_futures=has_failed)
                ways.close()
                NOW.take()  # of steps that no record was written of


class _Group:
    """Parameters that go through the stages together, of one type."""

    def __init__(
        self, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], *, is_layers: bool
    ) -> None:
        self.here = [on_device for on_device, _ in pairs]
        """The device's."""
        self.there = [on_host for _, on_host in pairs]
        """The host's, in the same order."""
        self.is_layers = is_layers
        """Whether decoder layers alone own them."""
        self.sizes = [parameter.numel() for parameter in self.there]
        # The gradients end to end, and behind them for each parameter how many ranks have one.
        self.flat = torch.zeros(sum(self.sizes) + len(pairs), dtype=self.there[0].dtype)
        self.gradients: list[Tensor] = [
            part.view_as(parameter)
            for part, parameter in zip(
                self.flat[: sum(self.sizes)].split(self.sizes), self.there, strict=True
            )
        ]
        self.missing = len(pairs)
        """Gradients that backward has not given yet."""
        self.summed: Future[None] | None = None
        self.taken: Future[None] | None = None
        """Done when the device has the new weights; none if it has them."""

    @property
    def presence(self) -> Tensor:
        """Of each parameter, on how many ranks it has a gradient."""
        return self.flat[sum(self.sizes) :]

    def give(self) -> None:
        """Hand the summed gradients to the host's parameters; none to those that no rank used."""
        for parameter, gradient, ranks in zip(
            self.there, self.gradients, self.presence.tolist(), strict=True
        ):
            parameter.grad = gradient if ranks else None

    def forget(self) -> None:
        """Take them back."""
        for parameter in self.there:
            parameter.grad = None


def groups_of(host: nn.Module, replica: nn.Module, exchange_bytes: int) -> list[_Group]:
    """The trained parameters from last to first, as backward is expected to give their gradients, in groups.

    Args:
        host: holds the originals.
        replica: on the device, of the same structure.
        exchange_bytes: groups are closed at this size.
    """
    layers = decoder_layers(replica)
    owner = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
    within = {id(module) for layer in layers for module in layer.modules()}
    others = [module for module in replica.modules() if id(module) not in within]
    layered = {*owner} - {id(p) for module in others for p in module.parameters(recurse=False)}
    pairs = [
        (here, there)
        for here, there in zip(replica.parameters(), host.parameters(), strict=True)
        if here.requires_grad
    ]
    pairs.reverse()
    groups: list[_Group] = []
    run: list[tuple[nn.Parameter, nn.Parameter]] = []

    def close() -> None:
        if run:
            groups.append(_Group(run, is_layers=id(run[0][0]) in layered))
            run.clear()

    for pair in pairs:
        if run:
            alike = pair[0].dtype == run[0][0].dtype
            alike = alike and (id(pair[0]) in layered) == (id(run[0][0]) in layered)
            mine = owner.get(id(pair[0]))
            new_layer = mine is None or mine != owner.get(id(run[-1][0]))
            full = sum(there.nbytes for _, there in run) >= exchange_bytes
            if not alike or (new_layer and full):
                close()
        run.append(pair)
    close()
    return groups


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class _HostSession(PlainSession):
    """The originals and their optimizer as they were given; a copy on the device computes."""

    def __init__(
        self,
        engine: HostUpdate,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        on: torch.device,
        precision: Literal["fp32", "bf16"],
        ways: Ways,
        exchange: ThreadPoolExecutor,
    ) -> None:
        super().__init__(copy.deepcopy(model).to(on), optimizer, on, precision)
        self._engine, self._host, self._ways, self._exchange = engine, model, ways, exchange
        self._ranks = Ranks()
        self.rank, self.ranks = self._ranks.rank, self._ranks.size
        self.is_main = self.rank == 0
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
            if on.type == "cuda":
                parameter.data = parameter.data.pin_memory()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.contiguous()
        self._groups = groups_of(model, self.model, engine.exchange_bytes)
        self._left = 0
        """Groups whose gradients have left the device."""
        self._is_last = False
        self._follow()

    def _follow(self) -> None:
        """Have backward tell of each gradient, and each layer wait for its weights."""
        group_of: dict[int, _Group] = {}
        for group in self._groups:
            for parameter in group.here:
                group_of[id(parameter)] = group
                parameter.register_post_accumulate_grad_hook(partial(self._gained, group))
        outside = [group for group in self._groups if not group.is_layers]
        self.model.register_forward_pre_hook(partial(self._before, outside), prepend=True)
        for layer in decoder_layers(self.model):
            own = {id(p): group_of[id(p)] for p in layer.parameters() if id(p) in group_of}
            needed = list({id(group): group for group in own.values()}.values())
            layer.register_forward_pre_hook(partial(self._before, needed), prepend=True)

    def _before(self, groups: Sequence[_Group], module: nn.Module, args: Any) -> None:
        del module, args
        self._await_weights(groups)

    def _await_weights(self, groups: Sequence[_Group]) -> None:
        started_s = time.perf_counter()
        for group in groups:
            if group.taken is not None:
                group.taken.result()
                group.taken = None
        self._count("weights_waited_s", started_s)

    def _count(self, name: str, since_s: float) -> None:
        NOW.counts[name] = round(NOW.counts.get(name, 0) + time.perf_counter() - since_s, 4)

    # Backward: gradients leave, and are summed.

    def _gained(self, group: _Group, parameter: nn.Parameter) -> None:
        """A gradient is complete, as far as this microbatch goes."""
        if not self._is_last:
            return
        if group.summed is not None:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} got a second gradient in the last microbatch "
                "of a step, after the first had left the device; call backward once a microbatch"
            )
        group.missing -= 1
        if self._engine.pipelined:
            # Every rank exchanges the groups in one order, whatever order its own backward finds.
            while self._left < len(self._groups) and not self._groups[self._left].missing:
                self._leave(self._groups[self._left])

    def _leave(self, group: _Group) -> None:
        """Send the group's gradients on their way. The device forgets them when they are out."""
        gradients = [parameter.grad for parameter in group.here]
        for parameter in group.here:
            parameter.grad = None
        out = self._ways.out(partial(self._out, group, gradients))
        group.summed = self._exchange.submit(self._sum, group, out)
        self._left += 1
        if not self._engine.pipelined:
            out.result()

    def _out(self, group: _Group, gradients: Sequence[Tensor | None]) -> None:
        shelf = self._ways.shelf
        given = [gradient for gradient in gradients if gradient is not None]
        kept = shelf.write([_bytes(gradient) for gradient in given])
        arrived = iter(kept)
        for index, gradient in enumerate(gradients):
            place = group.gradients[index]
            if gradient is None:
                place.zero_()
            else:
                place.copy_(next(arrived).view(place.dtype).view(place.shape))
            group.presence[index] = float(gradient is not None)
        shelf.drop(kept)

    def _sum(self, group: _Group, out: Future[None]) -> None:
        out.result()
        started_s = time.perf_counter()
        self._ranks.sum(group.flat)
        time.sleep(max(0.0, started_s + self._engine.exchange_latency_s - time.perf_counter()))

    # The update, and the way back.

    def update(self, max_grad_norm: float) -> float:
        started_s = time.perf_counter()
        for group in self._groups[self._left :]:
            self._leave(group)
        with NOW.waiting("the sum of the gradients"):
            for group in self._groups:
                assert group.summed is not None
                group.summed.result()
        self._count("exchange_waited_s", started_s)
        started_s = time.perf_counter()
        for group in self._groups:
            group.give()
        norm = nn.utils.clip_grad_norm_(self._host.parameters(), max_grad_norm)
        for group in self._groups:
            group.forget()
        # The first layers are needed first.
        for group in reversed(self._groups):
            group.give()
            self.optimizer.step()
            group.forget()
            if self._engine.pipelined:
                group.taken = self._ways.inward(partial(self._take, group))
        self._count("host_update_s", started_s)
        if not self._engine.pipelined:
            for group in self._groups:
                group.taken = self._ways.inward(partial(self._take, group))
            self._await_weights(self._groups)
        for group in self._groups:
            group.summed, group.missing = None, len(group.here)
        self._left = 0
        return float(norm)

    def _take(self, group: _Group) -> None:
        self._ways.shelf.read(
            [_bytes(parameter) for parameter in group.there],
            [_bytes(parameter) for parameter in group.here],
        )

    # The rest of a session.

    @contextmanager
    def microbatch(self, *, is_last: bool) -> Iterator[None]:
        if self._left:
            raise RuntimeError(
                f"the gradients of {self._left} groups have left for the update already; call update before "
                "another microbatch"
            )
        self._await_weights([group for group in self._groups if not group.is_layers])
        self._is_last = is_last
        try:
            with super().microbatch(is_last=is_last):
                yield
        finally:
            self._is_last = False

    def sum(self, value: Tensor) -> Tensor:
        return self._ranks.sum(value.detach().cpu().clone()).to(self.device)

    def state(self) -> State:
        """The host's: nothing leaves the device but buffers."""
        for (_, there), (_, here) in zip(
            weights_of(self._host), weights_of(self.model), strict=True
        ):
            if not isinstance(there, nn.Parameter):
                there.copy_(here)
        return state_of(self._host, self.optimizer)

    @contextmanager
    def restoring(self, saved: Saved) -> Iterator[State]:
        self._await_weights(self._groups)  # what is on its way is of before
        with restoring(self._host, self.optimizer, saved) as state:
            yield state
        with torch.no_grad():
            for (_, there), (_, here) in zip(
                weights_of(self._host), weights_of(self.model), strict=True
            ):
                here.copy_(there)

    def wait(self) -> None:
        self._ranks.gather(None)
