"""The extended roofline of a training step: arithmetic, memory, network and files, counted and measured here.

A step takes at least the longest of `F/P`, `Q_memory/B_memory`, `Q_network/B_network` and `Q_io/B_io`, and
where nothing overlaps their sum. The work on the left of each line is counted: operations by torch's
counter, memory by every operation's operands, network by the grid's own counters, files by the kernel's.
The ceilings below are measured beside it, on the same ranks (`fourfold_parallel.plan.probe`'s stopwatch).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from fourfold_parallel.grid.collectives import Axis, Trace
from fourfold_parallel.grid.engine import Fourfold, GridSession
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.launch import world_size
from fourfold_parallel.plan.probe import Operands, Stopwatch
from fourfold_parallel.run.data import Stream
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.testing.ranks import run_on_ranks

Resource = Literal["arithmetic", "memory", "network", "files"]
RESOURCES: tuple[Resource, ...] = get_args(Resource)
PASSES = 5
"""Times that a ceiling is measured; the best counts."""
SQUARES = (256, 512, 1024, 2048)
"""Sizes of the products that look for the arithmetic's ceiling."""
SENT_BYTES = 2**26
"""Of the all-reduce that looks for the network's."""
FILE_BYTES = 2**26
SMALLEST_SET_BYTES = 2**22
LARGEST_SET_BYTES = 2**29
"""Working sets between which the memory's ceiling is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The demands of one step of one rank."""

    flops: float
    """Of matrix products and attention; operations element by element are not counted."""
    least_bytes: float
    """Moved to or from memory if every tensor were moved once, whatever reads it again."""
    most_bytes: float
    """Moved if nothing were fused or found in a cache: all operands of all operations."""
    wire_bytes: float
    """Sent by this rank, in rings."""
    calls: int
    """Collectives."""
    io_bytes: float
    """Read from devices; pages that the kernel held are not among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The best that this machine did, on all ranks at once."""

    flops_per_s: float
    memory_bytes_per_s: float
    """Of a triad whose arrays take at least as much as a step touches."""
    wire_bytes_per_s: float
    """Infinite on one rank, which sends nothing."""
    cold_bytes_per_s: float
    """Of a file that the kernel holds no page of, as far as it can be asked to."""
    warm_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A step's work, the machine's ceilings, and the step's time."""

    name: str
    ranks: int
    parameters: int
    tokens: int
    """Of a step, on one rank."""
    work: Work
    ceilings: Ceilings
    step_s: float
    """The median of the timed steps."""

    @property
    def bounds_s(self) -> Mapping[Resource, float]:
        """The least time that each resource allows."""
        work, ceilings = self.work, self.ceilings
        return {
            "arithmetic": work.flops / ceilings.flops_per_s,
            "memory": work.least_bytes / ceilings.memory_bytes_per_s,
            "network": work.wire_bytes / ceilings.wire_bytes_per_s,
            "files": work.io_bytes / ceilings.cold_bytes_per_s,
        }

    @property
    def unfused_s(self) -> float:
        """The time of memory where nothing is fused or cached: above it no cache helped."""
        return self.work.most_bytes / self.ceilings.memory_bytes_per_s

    @property
    def bound(self) -> Resource:
        """The resource that allows least."""
        bounds = self.bounds_s
        return max(RESOURCES, key=lambda resource: bounds[resource])

    @property
    def efficiency(self) -> float:
        """The longest bound over the measured step; 1 would be a perfect overlap at the ceiling."""
        return max(self.bounds_s.values()) / self.step_s


class Traffic(TorchDispatchMode):
    """Counts the bytes of operands: all of them, and each tensor's memory once."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self.once: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Perform an operation, and count what it reads and writes."""
        result = func(*args, **(kwargs or {}))
        if not _moves_nothing(func):
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                    self.most_bytes += tensor.numel() * tensor.element_size()
                    # The reference keeps the storage's name from being given to another one.
                    storage = tensor.untyped_storage()
                    reference = StorageWeakRef(storage)
                    self.once.setdefault(reference.cdata, (reference, storage.nbytes()))
        return result

    @property
    def least_bytes(self) -> int:
        """Bytes of all memory that was touched."""
        return sum(nbytes for _, nbytes in self.once.values())


def _moves_nothing(func: Any) -> bool:
    """True for views, and for memory that is only reserved."""
    aliases = [value.alias_info for value in func._schema.returns]  # noqa: SLF001 - no public name
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return is_view or func.__name__.startswith(("empty", "new_empty", "_to_copy.out"))


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


ATTENTION_ON_CPU: Mapping[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,  # noqa: SLF001
}
"""Torch 2.13's counter counts no attention on a CPU, and says nothing; shapes come in its place."""


def counted_work(step: Callable[[], object]) -> tuple[float, float, float]:
    """FLOPs, and bytes at least and at most, of what a function computes."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(ATTENTION_ON_CPU))
    with Traffic() as traffic, counter:
        step()
    return float(counter.get_total_flops()), float(traffic.least_bytes), float(traffic.most_bytes)


def wire_bytes(trace: Trace, axes: Mapping[str, Axis]) -> tuple[float, int]:
    """Bytes that a rank sends in rings for the collectives of a trace, and their number."""
    sent, calls = 0.0, 0
    for (axis, verb), (number, payload) in trace.volume().items():
        size = axes[axis].size
        sent += (2 if verb == "all_reduce" else 1) * (size - 1) / size * payload
        calls += number
    return sent, calls


def device_bytes_read() -> int:
    """Bytes that this process has had read from devices; 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def roofline_of(run: Run, *, ranks: int = 1, steps: int = 7) -> Roofline:
    """The roofline of a run's step on ranks of this machine that share its batch, one thread each.

    Raises:
        ValueError: The batch does not divide over the ranks.
    """
    if run.batch % ranks:
        raise ValueError(
            f"batch={run.batch} does not divide over {ranks} ranks; use a batch that they divide"
        )
    return run_on_ranks(ranks, measured, run=run, steps=steps)[0]


def measured(run: Run, steps: int) -> Roofline:
    """As `roofline_of`; every rank of the process group calls it."""
    ranks, trace = world_size(), Trace()
    mesh = Mesh(data=ranks).observed(trace)
    plain = run.model.build(seed=run.seed)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    stream = run.data.open(sequence=run.sequence, seed=run.seed)
    whole = run.model.build(seed=run.seed)
    rows = stream.batch(0, batch=run.batch, rank=mesh.data.rank, ranks=ranks).tokens
    flops, least, most = counted_work(
        _Step(whole, run.optimizer.build(whole), rows, run.microbatch)
    )
    session = GridSession(
        plain, run.optimizer.build(plain), mesh, Fourfold(data=ranks), torch.device("cpu"), run.precision,
    )  # fmt: skip
    try:
        seconds, wires, ios = _timed(session, run, stream, mesh, trace, steps)
    finally:
        session.parallel.abandon()
    sent, calls = wires[-1]
    work = Work(
        flops=flops, least_bytes=least, most_bytes=most, wire_bytes=sent, calls=calls,
        io_bytes=statistics.median(ios),
    )  # fmt: skip
    return Roofline(
        name=run.name, ranks=ranks, parameters=parameters, tokens=rows[:, 1:].numel(), work=work,
        ceilings=ceilings(mesh.data, least), step_s=statistics.median(seconds),
    )  # fmt: skip


class _Step:
    """Forward, backward and update of plain torch, for the counters."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        rows: Int[Tensor, "batch row"],
        microbatch: int,
    ) -> None:
        self._model, self._optimizer, self._rows = model, optimizer, rows
        self._microbatch = microbatch
        self()  # state that the optimizer makes at its first step is made now

    def __call__(self) -> None:
        for rows in self._rows.split(self._microbatch):
            _loss(self._model, rows).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _loss(model: Any, rows: Int[Tensor, "batch row"]) -> Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _timed(
    session: GridSession, run: Run, stream: Stream, mesh: Mesh, trace: Trace, steps: int
) -> tuple[list[float], list[tuple[float, int]], list[int]]:
    """Seconds, wire bytes with calls, and device bytes of each step; the first two are left out."""
    axes = {axis.name: axis for axis in (mesh.data, mesh.depth, mesh.row, mesh.col)}
    seconds, wires, ios = [], [], []
    for step in range(steps + 2):
        session.wait()
        trace.events.clear()
        read, started_s = device_bytes_read(), time.perf_counter()
        rows = stream.batch(step, batch=run.batch, rank=session.rank, ranks=session.ranks).tokens
        parts = rows.split(run.microbatch)
        for index, part in enumerate(parts):
            with session.microbatch(is_last=index == len(parts) - 1):
                session.backward(_loss(session.model, part) / len(parts))
        session.update(run.max_grad_norm)
        session.wait()
        seconds.append(time.perf_counter() - started_s)
        wires.append(wire_bytes(trace, axes))
        ios.append(device_bytes_read() - read)
    return seconds[2:], wires[2:], ios[2:]


# ceilings -----------------------------------------------------------------------------------------


def ceilings(axis: Axis, touched_bytes: float) -> Ceilings:
    """Measure this machine's ceilings, on all ranks of an axis at once."""
    watch = Stopwatch(device=torch.device("cpu"))
    make = Operands(device=torch.device("cpu"), dtype=torch.float32)
    smallest = int(min(max(touched_bytes, SMALLEST_SET_BYTES), LARGEST_SET_BYTES))
    sets = sorted({smallest, min(8 * smallest, LARGEST_SET_BYTES)})
    squares = {size: (make(size, size), make(size, size)) for size in SQUARES}
    triads = {nbytes: [make(nbytes // 12) for _ in range(3)] for nbytes in sets}
    sent = make(SENT_BYTES // 4) if axis.size > 1 else make(1)
    for _ in range(PASSES):
        for size, (x, y) in squares.items():
            watch.time(("product", size), lambda _, x=x, y=y: torch.mm(x, y))
        for nbytes, (a, b, c) in triads.items():
            watch.time(
                ("triad", nbytes), lambda _, a=a, b=b, c=c: torch.add(b, c, alpha=3.0, out=a)
            )
        if axis.size > 1:
            watch.time("all_reduce", lambda _: axis.all_reduce(sent).wait())

    def best_s(key: Any) -> float:
        return min(wall_s for wall_s, _ in watch.trials[key])

    cold, warm = _read_rates()
    wire = 2 * (axis.size - 1) / axis.size * SENT_BYTES
    return Ceilings(
        flops_per_s=max(2.0 * size**3 / best_s(("product", size)) for size in SQUARES),
        memory_bytes_per_s=max(3 * 4 * (n // 12) / best_s(("triad", n)) for n in sets),
        wire_bytes_per_s=wire / best_s("all_reduce") if axis.size > 1 else float("inf"),
        cold_bytes_per_s=cold,
        warm_bytes_per_s=warm,
    )


def _read_rates() -> tuple[float, float]:
    """Bytes a second of a fresh file, after its pages were given up, and again."""
    with tempfile.NamedTemporaryFile(prefix="fourfold-roofline-") as file:
        file.write(os.urandom(FILE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        rates = []
        for _ in range(2):
            with Path(file.name).open("rb", buffering=0) as again:
                started_s = time.perf_counter()
                while again.read(2**20):
                    pass
                rates.append(FILE_BYTES / (time.perf_counter() - started_s))
    return rates[0], rates[1]
