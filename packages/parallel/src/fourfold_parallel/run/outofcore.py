"""Training what does not fit: an engine around an engine, to keep, swap or recompute each layer.

The numbers are those of the inner engine to the bit, whatever is decided. The first forward of each shape
of input measures the blocks one by one, and the store; `plan.outofcore` then chooses, the same on every
rank; `run.flow` carries it out.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.common.held import Saved, State
from fourfold_parallel.launch import Ranks
from fourfold_parallel.plan.blocks import BlockCost, Stack, slowest
from fourfold_parallel.plan.machine import Channel
from fourfold_parallel.plan.outofcore import Choice, check_budget, choose
from fourfold_parallel.plan.timeline import Rules, timeline
from fourfold_parallel.run.engines import Engine, Session
from fourfold_parallel.run.flow import Flow, StepToll, Taken, decoder_layers, hidden_of, key_of
from fourfold_parallel.run.stores import Disk, Host, Throttled, Ways, probe

log = logging.getLogger(__name__)

ROUNDS = 3
"""Timed runs of each kind of block, of which the median counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """A choice made by hand: a letter a block in forward order, K (keep), S (swap) or R (recompute)."""

    letters: str
    budget: float = math.inf
    """Bytes, as the engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfCore:
    """Another engine with the activations of its decoder layers under a budget of memory (KARMA)."""

    takes_outlines: ClassVar[bool] = False
    inner: Engine
    budget: int | Decisions
    """Bytes that activations of decoder layers and their temporaries may take on a rank, or the decisions
    themselves."""
    store: Host | Disk | Throttled = field(default_factory=Host)
    """Takes what is swapped."""

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,
    ) -> Iterator[Session]:
        """The inner engine's session, whose decoder layers keep the budget.

        Raises:
            ValueError: As the inner engine, or the model has no decoder layers that transformers names.
        """
        with self.inner.open(
            model, optimizer, precision=precision, batch=batch, microbatch=microbatch
        ) as session:
            ways = Ways(self.store.open(session.device), session.device)
            try:
                with _Planner(session, ways, self.budget) as planner:
                    yield _OutOfCoreSession(session, planner)
            finally:
                ways.close()
                NOW.take()  # of steps that no record was written of


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost layers that transformers would checkpoint, in the order of the model.

    Raises:
        ValueError: There are none, or they are checkpointed already.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers (transformers' GradientCheckpointingLayer) to "
            "keep, swap "
            "or recompute; use the inner engine alone"
        )
    if any(layer.gradient_checkpointing for layer in layers):
        raise ValueError(
            "the inner engine recomputes its layers already (recomputes, gradient_checkpointing_enable); "
            "leave "
            "that to OutOfCore, whose budget decides it"
        )
    return layers


class _Planner:
    """Wraps the layers of a session's model; plans at the first forward of each shape of input."""

    def __init__(self, session: Session, ways: Ways, budget: int | Decisions) -> None:
        self._device, self._ways, self._budget = session.device, ways, budget
        self.flow = Flow(ways, session.device)
        self.model: nn.Module = session.model
        while isinstance(inner := getattr(self.model, "module", None), nn.Module):
            self.model = inner  # DDP, DeepSpeed
        self.layers = blocks_of(self.model)
        self.is_open = False
        self.plans: dict[tuple[Any, ...], tuple[Stack, str, Rules, float]] = {}
        self.choices: list[Choice] = []
        self.channel: Channel | None = None
        self._profile: _Profile | None = None
        self._ranks = Ranks()
        self._hook: Any = None

    def __enter__(self) -> _Planner:
        for layer in self.layers:
            layer.forward = partial(self._run, layer, layer.forward)
        # Before the inner engine's own, which restart what a forward of the whole model begins.
        self._hook = self.model.register_forward_pre_hook(
            self._before, with_kwargs=True, prepend=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        for layer in self.layers:
            del layer.forward  # the class's own shows again

    def _run(
        self, layer: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self._profile is not None:
            return self._profile.run(layer, original, args, kwargs)
        if not self.is_open or not torch.is_grad_enabled() or self.flow.now is None:
            return original(*args, **kwargs)
        return self.flow.run(layer, original, args, kwargs)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.is_open or not torch.is_grad_enabled() or self._profile is not None:
            return
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        key = (model.training, *((tuple(leaf.shape), leaf.dtype) for leaf in leaves))
        if key not in self.plans:
            self.plans[key] = self._planned(args, kwargs)
        self.flow.begin(*self.plans[key])

    def _planned(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Stack, str, Rules, float]:
        """Measure, agree with the other ranks, choose."""
        started_s = time.perf_counter()
        stack = self._measured(args, kwargs)
        if isinstance(self._budget, int):
            # Refused before the store is measured: this is all that the refusal needs.
            check_budget(slowest(self._ranks.gather(stack)), self._budget)
        if self.channel is None:
            typical = int(statistics.median(block.saved_bytes for block in stack.blocks))
            self.channel = probe(self._ways, typical, self._device)
        agreed = self._ranks.gather((stack, self.channel))
        stack = slowest([mine for mine, _ in agreed])
        channel = Channel(
            out_bytes_per_s=min(c.out_bytes_per_s for _, c in agreed),
            in_bytes_per_s=min(c.in_bytes_per_s for _, c in agreed),
            out_latency_s=max(c.out_latency_s for _, c in agreed),
            in_latency_s=max(c.in_latency_s for _, c in agreed),
        )
        measured_s = time.perf_counter() - started_s
        if isinstance(self._budget, Decisions):
            decisions, budget = self._budget.letters, self._budget.budget
            told = timeline(stack, channel, decisions, budget, draws=True)
            choice = Choice(decisions=decisions, budget=budget, timeline=told, bound_s=told.seconds)
        else:
            choice = choose(stack, channel, self._budget)
        self.choices.append(choice)
        told = choice.timeline
        NOW.news.append(("plan", {
            "decisions": choice.decisions, "budget_bytes": choice.budget,
            "predicted_s": told.seconds, "plain_s": stack.compute_s, "bound_s": choice.bound_s,
            "waits_s": told.waited_s, "recomputes_s": told.recomputed_s, "peak_bytes": told.peak_bytes,
            "stack": stack, "channel": channel, "measured_in_s": round(measured_s, 4),
            "chosen_in_s": round(time.perf_counter() - started_s - measured_s, 4),
        }))  # fmt: skip
        log.info(
            "out of core: %s within %s bytes; predicted %.3f s a microbatch, %.3f s with everything kept",
            choice.decisions, f"{choice.budget:,.0f}", told.seconds, stack.compute_s,
        )  # fmt: skip
        return stack, choice.decisions, Rules(stack, choice.decisions, choice.budget), choice.budget

    def _measured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stack:
        """A forward without a graph, in which each block is measured by itself as it is reached."""
        devices = [self._device] if self._device.type == "cuda" else []
        self._profile = _Profile(self._device)
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                started_s = _now_s(self._device)
                self.model.forward(*args, **kwargs)
                around_s = _now_s(self._device) - started_s - self._profile.spent_s
            blocks = tuple(self._profile.blocks)
        finally:
            self._profile = None
        # Head and loss, forward and twice as long backward; the embedding's share is small.
        return Stack(blocks=blocks, between_s=3 * max(0.0, around_s))


class _Profile:
    """Measures blocks as a forward reaches them; blocks that are alike once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[Any, ...], BlockCost] = {}
        self.blocks: list[BlockCost] = []
        self.spent_s = 0.0
        """In blocks, the forward itself included."""

    def run(
        self,
        layer: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Measure the block, and give its output."""
        started_s = _now_s(self._device)
        key = _kind(layer, args, kwargs)
        if key not in self._known:
            self._known[key] = measured(layer, original, args, kwargs, self._device)
        self.blocks.append(self._known[key])
        output = original(*args, **kwargs)
        self.spent_s += _now_s(self._device) - started_s
        return output


def _kind(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for layers that cost the same."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return (
        type(layer),
        getattr(layer, "attention_type", None),
        tuple((p.shape, p.dtype, p.requires_grad) for p in layer.parameters()),
        tuple((leaf.shape, leaf.dtype) for leaf in given),
    )


def measured(
    layer: nn.Module,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
) -> BlockCost:
    """The block of a layer, run forward and backward by itself. No gradient is accumulated."""
    hidden = hidden_of(args, kwargs)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def once(pack: Callable[[Tensor, Taken], Tensor] | None = None) -> tuple[float, float]:
        given = hidden.detach().requires_grad_()
        own_args, own_kwargs = tree_map(
            lambda leaf: given if leaf is hidden else leaf, (args, kwargs)
        )
        taken = Taken(layer, own_args, own_kwargs)
        with torch.enable_grad():
            started_s = _now_s(device)
            if pack is None:
                output = hidden_of((original(*own_args, **own_kwargs),), {})
            else:
                with torch.autograd.graph.saved_tensors_hooks(
                    lambda t: pack(t, taken), lambda t: t
                ):
                    output = hidden_of((original(*own_args, **own_kwargs),), {})
            forward_s = _now_s(device) - started_s
            weights = torch.ones_like(output)
            started_s = _now_s(device)
            torch.autograd.grad(output, [given, *trained], weights, allow_unused=True)
        return forward_s, _now_s(device) - started_s

    storages: dict[int, torch.UntypedStorage] = {}

    def count(tensor: Tensor, taken: Taken) -> Tensor:
        if not taken.takes(tensor):
            storages[key_of(tensor)] = tensor.untyped_storage()
        return tensor

    once(count)
    saved = sum(storage.nbytes() for storage in storages.values())
    storages.clear()
    entry = hidden.untyped_storage().nbytes()
    peak = _peak_of(once, device)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    times = [once() for _ in range(ROUNDS)]
    return BlockCost(
        forward_s=statistics.median(forward_s for forward_s, _ in times),
        backward_s=statistics.median(backward_s for _, backward_s in times),
        saved_bytes=saved, input_bytes=min(entry, saved),
        spare_bytes=max(0, peak - gradients - (saved - entry)),
    )  # fmt: skip


def _peak_of(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call has allocated at once, beyond what was there."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of each beginning and end on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    told: Any = profile
    changes = [e for e in told.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _OutOfCoreSession:
    """The inner session; a microbatch is also a pass of the flow."""

    def __init__(self, inner: Session, planner: _Planner) -> None:
        self.inner, self.planner = inner, planner
        self.rank: int = inner.rank
        self.ranks: int = inner.ranks
        self.is_main: bool = inner.is_main
        self.device: torch.device = inner.device
        self.model: nn.Module = inner.model
        self.optimizer: torch.optim.Optimizer = inner.optimizer
        self.sees_waits: bool = inner.sees_waits

    @contextmanager
    def microbatch(self, *, is_last: bool) -> Iterator[None]:
        self.planner.is_open = True
        has_failed = True
        try:
            with self.inner.microbatch(is_last=is_last):
                yield
            has_failed = False
        finally:
            self.planner.is_open = False
            _tell(self.planner.flow.end(has_failed=has_failed))

    def backward(self, loss: Tensor) -> None:
        self.inner.backward(loss)

    def update(self, max_grad_norm: float) -> float:
        return self.inner.update(max_grad_norm)

    def sum(self, value: Tensor) -> Tensor:
        return self.inner.sum(value)

    def state(self) -> State:
        return self.inner.state()

    def restoring(self, saved: Saved) -> AbstractContextManager[State]:
        return self.inner.restoring(saved)

    def wait(self) -> None:
        self.inner.wait()


def _tell(toll: StepToll) -> None:
    """Add a microbatch's costs to the step's record."""
    counts = NOW.counts
    for name, amount in (
        ("store_waited_s", toll.waited_s),
        ("recomputed_s", toll.recomputed_s),
        ("swapped_bytes", toll.swapped_bytes),
    ):
        counts[name] = round(counts.get(name, 0) + amount, 4)
    counts["held_bytes"] = max(counts.get("held_bytes", 0), toll.held_bytes)
