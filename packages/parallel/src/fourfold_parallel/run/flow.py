"""One microbatch out of core: each block kept, swapped or recomputed in the order that the plan's rules fix.

Torch saves for backward through hooks. A swapped block's hooks take every saved tensor as a view of a
storage; each storage is counted once, whatever its views, and leaves when the block's forward has ended. A
handle that the graph holds stands in its place until backward asks. What is no activation stays as it is:
weights, buffers, what the block was given beside its input.

Four things are easy to get wrong, and each has a test. A storage is known by its object, which is held
until the block's forward ends: an address may be used again within a layer. Neither handles nor hooks hold
a tensor: the graph keeps them. A block waits for room *before* its forward, so that writes under way never
add up. And a saved tensor that was changed in place is refused when backward asks for it, as torch refuses
it.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fourfold_parallel.plan.blocks import Stack
from fourfold_parallel.plan.timeline import Rules
from fourfold_parallel.run.stores import StoreError, Ways

CASTS = {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "_PieceBackward"}
"""Nodes that make nothing of a weight but the weight in another form."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost layers that transformers would checkpoint, in the order of the model; maybe none."""
    if isinstance(model, GradientCheckpointingLayer):
        return [model]
    return [layer for child in model.children() for layer in decoder_layers(child)]


class Cell:
    """One storage that backward needs; it lives as long as a handle to it."""

    __slots__ = ("__weakref__", "nbytes", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage: torch.UntypedStorage | None = storage
        self.nbytes: int = storage.nbytes()


class Handle:
    """A saved tensor as the graph holds it: a view of a cell."""

    __slots__ = ("block", "cell", "dtype", "is_changed", "offset", "size", "stride")

    def __init__(self, block: Swapped, cell: Cell, tensor: Tensor) -> None:
        self.block, self.cell, self.dtype = block, cell, tensor.dtype
        self.size, self.stride = tensor.size(), tensor.stride()
        self.offset = tensor.storage_offset()
        self.is_changed = False

    def tensor(self) -> Tensor:
        """The tensor again; its cell is filled."""
        storage = self.cell.storage
        assert storage is not None
        empty: Any = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)


class Swapped:
    """A swapped block of one microbatch."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.cells: dict[int, Cell] = {}
        """While its forward runs: by the storage's object, which the cell holds."""
        self.watched: list[tuple[Tensor, int, Handle]] = []
        """Until it is written: what was saved, detached, and its version then."""
        self.members: list[weakref.ref[Cell]] = []
        """From then on, in the order in which they are written."""
        self.sizes: list[int] = []
        self.kept: Any = None
        self.out: Future[None] | None = None
        self.inward: Future[None] | None = None

    def nbytes(self) -> int:
        """Of its cells that are alive and filled."""
        cells = (member() for member in self.members)
        return sum(cell.nbytes for cell in cells if cell is not None and cell.storage is not None)


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream that a decoder layer is given: its first tensor."""
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            return leaf
    raise ValueError("a decoder layer was called without a tensor")


class Taken:
    """Tensors that are no activations of a block: not to be counted, not to be swapped."""

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_of(args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        others = [*layer.parameters(), *layer.buffers(), *(t for t in given if t is not hidden)]
        self._storages = {key_of(t) for t in others if not is_odd(t)} - {key_of(hidden)}

    def takes(self, tensor: Tensor) -> bool:
        """True for a tensor that a block's hooks leave alone."""
        if is_odd(tensor) or not tensor.numel() or key_of(tensor) in self._storages:
            return True
        return torch.is_autocast_enabled(tensor.device.type) and is_cast_weight(tensor)


def is_odd(tensor: Tensor) -> bool:
    """Not plain memory: a subclass of torch's, sparse, or a view that changes values."""
    return (
        type(tensor) not in (Tensor, nn.Parameter)
        or tensor.layout != torch.strided
        or tensor.is_conj()
        or tensor.is_neg()
    )


def key_of(tensor: Tensor) -> int:
    """Names its storage while that lives."""
    return tensor.untyped_storage()._cdata  # noqa: SLF001 - no public name


def is_cast_weight(tensor: Tensor) -> bool:
    """A weight in autocast's format: autocast keeps it, so that to swap it would free nothing."""
    node: Any = tensor.grad_fn
    for _ in range(4):
        if node is None:
            return False
        kind = type(node).__name__  # `node.name` may be a context's own attribute
        if kind == "AccumulateGrad":
            return True
        if kind not in CASTS or not node.next_functions:
            return False
        node = node.next_functions[0][0]
    return False


@dataclass(slots=True)
class StepToll:
    """Costs of a microbatch beside plain training."""

    waited_s: float = 0.0
    """For the store."""
    recomputed_s: float = 0.0
    swapped_bytes: int = 0
    """Written, and read again."""
    held_bytes: int = 0
    """The most that blocks held at once."""


@dataclass(slots=True)
class Pass:
    """One forward and backward under way."""

    stack: Stack
    decisions: str
    rules: Rules
    budget: float
    blocks: dict[int, Swapped] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    """Bytes by block."""
    reads: list[int] = field(default_factory=list)
    """Swapped blocks whose read has not begun, the next one last."""
    entered: int = 0
    progress: int = 0
    """The block whose backward runs; as many as there are while forward does."""
    toll: StepToll = field(default_factory=StepToll)


class Flow:
    """Runs the blocks of microbatches, one microbatch after another.

    Args:
        ways: to the store.
        device: of the activations.
    """

    def __init__(self, ways: Ways, device: torch.device) -> None:
        self.ways, self.device = ways, device
        self.now: Pass | None = None
        self.events: list[tuple[str, int]] | None = None
        """Every change of what is held, with the sum after it, where somebody asks by setting a list."""
        self._lock = threading.Lock()

    def begin(self, stack: Stack, decisions: str, rules: Rules, budget: float) -> None:
        """A forward of the whole model begins.

        Raises:
            RuntimeError: Another has not been through its backward: the budget is for one.
        """
        if self.now is not None:
            raise RuntimeError(
                "a second forward began before the first one's backward, and the budget holds one; call the "
                "model once in a microbatch, or use the inner engine alone"
            )
        self.now = Pass(
            stack, decisions, rules, budget, reads=list(rules.swapped), progress=len(decisions)
        )

    def run(
        self,
        layer: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A block's forward.

        Raises:
            RuntimeError: The model has more blocks than the plan.
            StoreError: An earlier block could not be written.
        """
        now = self._pass()
        index = now.entered
        if index == len(now.decisions):
            raise RuntimeError(
                f"the model calls more decoder layers than the {index} that were planned for; a model "
                "whose depth "
                "changes from call to call cannot be planned: use the inner engine alone"
            )
        now.entered += 1
        self._await(now, now.rules.forward_after[index])
        self._hold(now, index, now.stack.blocks[index].saved_bytes, "forward")
        hidden = hidden_of(args, kwargs)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._left(now, index))
        match now.decisions[index]:
            case "S":
                output = self._swapping(now, index, layer, original, args, kwargs)
            case "R":
                output = self._recomputing(now, index, original, args, kwargs)
            case _:
                output = original(*args, **kwargs)
        if now.entered == len(now.decisions):
            last = hidden_of((output,), {})
            if last.requires_grad:
                last.register_hook(lambda _: self._turn(now, index))
        return output

    def end(self, *, has_failed: bool) -> StepToll:
        """The microbatch is over: nothing is under way after this, and the store is empty.

        Raises:
            StoreError: A transfer failed that nothing has waited for.
        """
        now, self.now = self.now, None
        if now is None:
            return StepToll()
        failure: BaseException | None = None
        for block in now.blocks.values():
            for transfer in (block.out, block.inward):
                error = transfer.exception() if transfer is not None else None
                failure = failure or error
            if block.kept is not None:
                self.ways.shelf.drop(block.kept)
                block.kept = None
        if failure is not None and not has_failed:
            raise failure
        return now.toll

    def _pass(self) -> Pass:
        assert self.now is not None
        return self.now

    # Swapping

    def _swapping(
        self,
        now: Pass,
        index: int,
        layer: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        block = now.blocks[index] = Swapped(index)
        taken = Taken(layer, args, kwargs)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _pack(block, taken, tensor), self._unpack
        ):
            output = original(*args, **kwargs)
        cells = [*block.cells.values()]
        block.cells.clear()
        block.members = [weakref.ref(cell) for cell in cells]
        block.sizes = [cell.nbytes for cell in cells]
        self._hold(now, index, sum(block.sizes), "saved")
        ready = self._event()
        block.out = self.ways.out(lambda: self._write(now, block, cells, ready))
        return output

    def _write(self, now: Pass, block: Swapped, cells: list[Cell], ready: Any) -> None:
        """On the thread of the way out. It empties `cells`, which the waiting job would hold."""
        if ready is not None:
            ready.synchronize()
        try:
            block.kept = self.ways.shelf.write([_bytes_of(cell) for cell in cells])
        except OSError as error:
            raise StoreError(f"block {block.index} could not be written: {error}") from error
        finally:
            for tensor, version, handle in block.watched:
                handle.is_changed = tensor._version != version  # noqa: SLF001 - no public version counter
            block.watched.clear()
        for cell in cells:
            now.toll.swapped_bytes += cell.nbytes
            cell.storage = None
        cells.clear()
        self._hold(now, block.index, 0, "written")

    def _read(self, now: Pass, block: Swapped) -> None:
        """On the thread of the way in."""
        for other in now.blocks.values():  # the room is there when every write has ended
            if other.out is not None:
                other.out.result()
        cells = [member() for member in block.members]
        if not any(cell is not None for cell in cells):
            return  # its backward is over, or will never be
        self._hold(now, block.index, sum(block.sizes), "reading")
        pieces = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in block.sizes]
        try:
            self.ways.shelf.read(block.kept, pieces)
        except OSError as error:
            raise StoreError(f"block {block.index} could not be read back: {error}") from error
        for cell, piece in zip(cells, pieces, strict=True):
            if cell is not None:
                cell.storage = piece.untyped_storage()
        kept, block.kept = block.kept, None
        self.ways.shelf.drop(kept)

    def _unpack(self, held: Tensor | Handle) -> Tensor:
        if isinstance(held, Tensor):
            return held
        block, now = held.block, self.now
        if now is not None and now.blocks.get(block.index) is block:
            self._turn(now, block.index)
            assert block.inward is not None
            started_s = time.perf_counter()
            block.inward.result()
            now.toll.waited_s += time.perf_counter() - started_s
        elif held.cell.storage is None:
            raise RuntimeError(
                f"block {block.index} is asked for after its microbatch has ended; call backward within "
                "`session.microbatch`"
            )
        if held.is_changed:
            raise RuntimeError(
                f"a tensor that backward needs, {held.dtype} {list(held.size)} of block {block.index}, was "
                "changed in place after it had been saved; use an operation that makes a new one"
            )
        return held.tensor()

    # Recomputing

    def _recomputing(
        self,
        now: Pass,
        index: int,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        calls = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                return original(*args, **kwargs)
            self._turn(now, index)
            self._hold(now, index, now.stack.blocks[index].saved_bytes, "again")
            started_s = self._clock_s()
            try:
                return original(*args, **kwargs)
            finally:
                now.toll.recomputed_s += self._clock_s() - started_s

        output = checkpoint(run, *args, use_reentrant=False, **kwargs)
        self._hold(now, index, now.stack.blocks[index].input_bytes, "input")
        return output

    # Order and room

    def _turn(self, now: Pass, index: int) -> None:
        """The backward of a block comes next: those after it are over, and reads may begin."""
        if index >= now.progress:
            return
        for done in range(min(now.progress, now.entered - 1), index, -1):
            self._settle(now, done)
        now.progress = index
        self._await(now, now.rules.backward_after[index])
        while now.reads and index <= now.rules.read_at[now.reads[-1]]:
            block = now.blocks.get(now.reads.pop())
            if block is None:
                continue  # the model ended before it
            block.inward = self.ways.inward(lambda block=block: self._read(now, block))

    def _left(self, now: Pass, index: int) -> None:
        """The backward of a block is over."""
        if index:
            self._turn(now, index - 1)
        else:
            self._settle(now, 0)

    def _settle(self, now: Pass, index: int) -> None:
        block = now.blocks.get(index)
        self._hold(now, index, block.nbytes() if block is not None else 0, "done")

    def _await(self, now: Pass, writes: int) -> None:
        """Wait for so many writes, the first ones."""
        started_s = time.perf_counter()
        for index in now.rules.swapped[:writes]:
            block = now.blocks.get(index)
            if block is not None and block.out is not None:
                block.out.result()
        now.toll.waited_s += time.perf_counter() - started_s

    def _hold(self, now: Pass, index: int, nbytes: int, what: str) -> None:
        """Note what a block holds from now on.

        Raises:
            RuntimeError: All together hold more than the budget: a block saved more than when it was
            measured.
        """
        with self._lock:
            now.held[index] = nbytes
            total = sum(now.held.values())
            now.toll.held_bytes = max(now.toll.held_bytes, total)
            if self.events is not None:
                self.events.append((f"{what} {index}", total))
        if total > now.budget:
            raise RuntimeError(
                f"blocks hold {total:,} bytes with block {index} ({nbytes:,}; measured before "
                f"{now.stack.blocks[index].saved_bytes:,}), and the budget is {now.budget:,.0f}: what a "
                "block saves "
                "changes from call to call; use a larger budget"
            )

    def _event(self) -> Any:
        """The end of all that has been launched; None where nothing is launched ahead."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _clock_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()


def _pack(block: Swapped, taken: Taken, tensor: Tensor) -> Tensor | Handle:
    if taken.takes(tensor):
        return tensor
    key = key_of(tensor)
    cell = block.cells.get(key)
    if cell is None:
        cell = block.cells[key] = Cell(tensor.untyped_storage())
    handle = Handle(block, cell, tensor)
    # Detached, it shares the version, and does not hold the graph that holds the handle.
    version = tensor._version  # noqa: SLF001 - no public version counter
    block.watched.append((tensor.detach(), version, handle))
    return handle


def _bytes_of(cell: Cell) -> Tensor:
    """The memory of a cell, as bytes."""
    storage = cell.storage
    assert storage is not None
    empty: Any = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage)
