"""Measure the machine on which this process and its fellow ranks run.

Nothing is guessed about what will be asked: every grid is simulated on a machine that answers nothing
and notes each product, piece and collective that it is asked for (`Questions`). These are then timed, by
all ranks at once, since ranks share cores, memory and links. So the planner reads a measured time
wherever its simulation asks for one, and nothing here is fitted to the steps that it predicts.

Two clocks are read at every measurement. `wall` is what a step takes on a machine of one's own.
`processor` is the processor time of all ranks, threads of collectives included, over the cores that they
share: what the wall shows on a CPU whose cores are all busy, also where other work takes turns with ours.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import isotonic_regression
from torch import Tensor
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import (
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from fourfold_parallel.common.attention import FUSED
from fourfold_parallel.launch import local_world_size
from fourfold_parallel.plan.job import Job, Layout, divisors, grids
from fourfold_parallel.plan.machine import (
    Collective,
    Curve,
    Machine,
    Part,
    PartName,
    Precision,
    Product,
    Rate,
    Ring,
)
from fourfold_parallel.plan.simulate import simulate

# Torch 2.13 has new names for these two, and warns of those that 2.11 has.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
ClockName = Literal["wall", "processor"]
CLOCKS: tuple[ClockName, ...] = ("wall", "processor")
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
PASSES = 3
"""Times that everything is measured, apart from one another; the median counts."""
SHORTEST_S = 0.01
"""A measurement repeats what is shorter until it has taken about so long ..."""
REPEATS = 20
"""... but no oftener."""
ROTATED_BYTES = 2**26
"""Operands take turns until they fill so much: a step does not find them in a cache."""
POINTS = 6
"""Of a collective's curve."""
COPIED_BYTES = 2**25
TINY_CALLS = 500
TINY_NODES = 20
LEAST_S = 1e-6
"""Of a collective."""
BETWEEN = (128, 512, 512)
"""A product computed before each collective, and subtracted: in a step caches are cold and threads asleep."""


class Questions(Machine):
    """A machine that knows nothing, and notes what it is asked."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    @cached_property
    def asked_products(self) -> set[tuple[int, int, int]]:
        """`(m, n, k)`."""
        return set()

    @cached_property
    def asked_parts(self) -> set[tuple[PartName, tuple[int, ...]]]:
        """Kind and shape."""
        return set()

    @cached_property
    def asked_sums(self) -> set[tuple[Collective, int, int, float]]:
        """Kind, stride, size and payload in bytes."""
        return set()

    @property
    def is_probed(self) -> bool:
        """It is asked for everything that a measured machine is."""
        return True

    def product(self, m: int, n: int, k: int, precision: Precision) -> float | None:
        """Note it."""
        del precision
        self.asked_products.add((m, n, k))
        return None

    def part(self, kind: PartName, shape: tuple[int, ...]) -> Part | None:
        """Note it."""
        self.asked_parts.add((kind, shape))
        return None

    def seconds(self, kind: Collective, payload: float, *, stride: int, size: int) -> float:
        """Note it."""
        if size > 1:
            self.asked_sums.add((kind, stride, size, payload))
        return 0.0


def questions(job: Job, layouts: Sequence[Layout]) -> Questions:
    """All that the planner asks about a machine to predict these layouts."""
    asked = Questions(
        name="", sources=(), memory_bytes=1.0, memory_bytes_per_s=1.0, devices_per_node=1, rings=(),
        rates=(Rate(precision=job.precision, flops_per_s=1.0, share=1.0, attention_share=1.0),),
        node_bytes_per_s=1.0, network_latency_s=0.0, kernel_s=0.0, host_computes=True,
    )  # fmt: skip
    for layout in layouts:
        simulate(job, layout, asked)
    return asked


def layouts_of(job: Job, ranks: int) -> list[Layout]:
    """Every grid that the model's heads and the batch fit, its share of the batch in one microbatch."""
    return [
        replace(grid, microbatch=job.batch // grid.shares)
        for grid in grids(ranks)
        if job.batch % grid.shares == 0
        and job.model.heads % grid.row == 0
        and job.model.width % grid.col == 0
    ]


@dataclass(slots=True, kw_only=True)
class Stopwatch:
    """Times an operation on all ranks at once, by both clocks, and keeps every pass."""

    device: torch.device
    trials: dict[Any, list[tuple[float, float]]] = field(default_factory=dict)
    _counts: dict[Any, int] = field(default_factory=dict)

    def time(self, key: Any, operation: Callable[[int], object], calls: int = 1) -> None:
        """Run `operation(turn)` often enough, and note the seconds of each of its `calls`."""
        if key not in self._counts:
            self._run(operation, 1)  # the first run makes buffers
            longest = self._shared(torch.tensor([self._run(operation, 1)[0]]), dist.ReduceOp.MAX)[0]
            self._counts[key] = max(1, min(REPEATS, int(SHORTEST_S / max(longest, 1e-9))))
        repeats = self._counts[key]
        wall_s, processor_s = self._run(operation, repeats)
        sums = self._shared(torch.tensor([wall_s, processor_s]), dist.ReduceOp.SUM)
        ranks = dist.get_world_size()
        cores = min(local_world_size(), os.cpu_count() or 1) * ranks / local_world_size()
        each = sums[0] / ranks / repeats / calls, sums[1] / cores / repeats / calls
        self.trials.setdefault(key, []).append(each)

    def _run(self, operation: Callable[[int], object], repeats: int) -> tuple[float, float]:
        dist.barrier()
        started_s, begun_s = time.perf_counter(), time.process_time()
        for turn in range(repeats):
            operation(turn)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started_s, time.process_time() - begun_s

    def _shared(self, values: Tensor, op: Any) -> list[float]:
        values = values.to(self.device, torch.float32)
        dist.all_reduce(values, op)
        return values.tolist()

    def repeats(self, key: Any) -> int:
        """Turns of an operation in one pass."""
        return self._counts[key]

    def seconds(self, key: Any, clock: ClockName) -> float:
        """The median of the passes."""
        return statistics.median(trial[CLOCKS.index(clock)] for trial in self.trials[key])


def probe(job: Job, *, name: str, device: torch.device) -> dict[ClockName, Machine]:
    """This machine as all ranks of the process group see it, by each clock; the same on every rank.

    Args:
        job: What will be planned: products and pieces are measured at its local shapes, on every grid of
            as many ranks as there are.
        name: Of the machine.
        device: This rank's.

    Raises:
        ValueError: No grid fits.
    """
    ranks = dist.get_world_size()
    layouts = layouts_of(job, ranks)
    if not layouts:
        raise ValueError(
            f"no grid of {ranks} ranks fits batch={job.batch}, {job.model.heads} heads and width "
            f"{job.model.width}; use another number of ranks, or a batch that it divides"
        )
    asked = questions(job, layouts)
    watch = Stopwatch(device=device)
    make = Operands(device=device, dtype=DTYPES[job.precision])
    groups = {
        (stride, size): _group(stride, size)
        for stride in divisors(ranks)
        for size in divisors(ranks // stride)
        if size > 1
    }
    between = _product_between(make)
    for _ in range(PASSES):
        watch.time("between", between)
        for m, n, k in sorted(asked.asked_products):
            _time_product(watch, make, m, n, k)
        for kind, shape in sorted(asked.asked_parts):
            _time_part(watch, make, job, kind, shape)
        for (stride, size), group in groups.items():
            for kind in KINDS:
                for payload in _payloads(asked, kind, stride, size):
                    _time_collective(watch, make, kind, (stride, size), payload, group, between)
        _time_memory(watch, make)
        _time_calls(watch, make, between)
        _time_update(watch, make, job, ranks)
        if groups:
            _time_theft(watch, make, asked, groups[1, ranks])
    return {clock: _machine(watch, asked, job, name, device, clock) for clock in CLOCKS}


def llama_config(*, width: int, sequence: int) -> LlamaConfig:
    """Four layers of eight heads, four of them for keys and values."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=3 * width, vocab_size=2048, max_position_embeddings=sequence,
        use_cache=False,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """Makes tensors on a device."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int, grad: bool = False) -> Tensor:
        """Random numbers in `[0, 1)`."""
        return torch.rand(shape, device=self.device, dtype=self.dtype, requires_grad=grad)

    def sets(self, *shapes: tuple[int, ...], grad: bool = False) -> list[list[Tensor]]:
        """So many sets of operands that no cache holds them all; at most four."""
        size = sum(torch.Size(shape).numel() for shape in shapes) * self.dtype.itemsize
        number = max(1, min(4, ROTATED_BYTES // max(size, 1)))
        return [[self(*shape, grad=grad) for shape in shapes] for _ in range(number)]


# products and pieces ------------------------------------------------------------------------------


def _time_product(watch: Stopwatch, make: Operands, m: int, n: int, k: int) -> None:
    """The three products of a linear layer, as the grid computes them: their mean."""
    sets = make.sets((m, k), (n, k), (m, n))

    def three(turn: int) -> None:
        x, weight, dy = sets[turn % len(sets)]
        F.linear(x, weight)
        dy.mm(weight)
        dy.t().mm(x)

    watch.time(("product", m, n, k), three, calls=3)


def _time_part(
    watch: Stopwatch, make: Operands, job: Job, kind: PartName, shape: tuple[int, ...]
) -> None:
    sets, compute = PIECES[kind](make, job, *shape)
    watch.time(("forward", kind, shape), lambda turn: compute(*sets[turn % len(sets)]))
    results = [compute(*operands) for operands in sets]
    gradient = torch.ones_like(results[0])

    def backward(turn: int) -> None:
        index = turn % len(sets)
        torch.autograd.grad(results[index], sets[index], gradient, retain_graph=True)

    watch.time(("backward", kind, shape), backward)


Piece = tuple[list[list[Tensor]], Callable[..., Tensor]]


def _embedding(make: Operands, job: Job, tokens: int, rows: int, width: int) -> Piece:
    whole = job.model.vocabulary
    drawn = torch.randint(0, whole, (tokens,), device=make.device)
    elsewhere = drawn >= rows

    def look_up(table: Tensor) -> Tensor:
        vectors = F.embedding(drawn.masked_fill(elsewhere, 0), table)
        return vectors.masked_fill(elsewhere.unsqueeze(-1), 0)

    return make.sets((rows, width), grad=True), look_up


def _norm(make: Operands, job: Job, tokens: int, width: int) -> Piece:
    sets = make.sets((1, tokens, width), (width,), grad=True)
    if job.model.positions:
        return sets, lambda x, gain: F.layer_norm(x, (width,), gain, gain)
    return sets, _rms_norm


def _rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return gain * normal.to(x.dtype)


def _residual(make: Operands, job: Job, tokens: int, width: int) -> Piece:
    del job
    return make.sets((tokens, width), (tokens, width), grad=True), torch.add


def _activation(make: Operands, job: Job, tokens: int, hidden: int) -> Piece:
    if job.model.gated:
        shape = (tokens, hidden)
        return make.sets(shape, shape, grad=True), lambda gate, up: F.silu(gate) * up
    return make.sets((tokens, hidden), grad=True), F.gelu


def _attention(
    make: Operands, job: Job, tokens: int, sequence: int, heads: int, kv_heads: int, head_width: int
) -> Piece:
    rows = tokens // sequence
    shapes = [(rows, sequence, number * head_width) for number in (heads, kv_heads, kv_heads)]
    cos, sin = make(1, sequence, head_width), make(1, sequence, head_width)
    module: Any = SimpleNamespace(
        num_key_value_groups=heads // kv_heads, is_causal=True, training=True
    )
    is_fused = job.attention in FUSED
    mask = None if is_fused else make(1, 1, sequence, sequence)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, head_width)).transpose(1, 2) for x in (q, k, v))
        if not job.model.positions:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        attention: Any = sdpa_attention_forward if is_fused else eager_attention_forward
        mixed, _ = attention(module, q, k, v, mask, scaling=head_width**-0.5, dropout=0.0)
        return mixed.reshape(rows, sequence, -1).contiguous()

    return make.sets(*shapes, grad=True), attend


def _loss(make: Operands, job: Job, tokens: int, vocabulary: int) -> Piece:
    del job
    targets = torch.randint(0, vocabulary, (tokens,), device=make.device)
    return make.sets((tokens, vocabulary), grad=True), lambda logits: F.cross_entropy(
        logits.float(), targets, reduction="none"
    )


PIECES: dict[PartName, Callable[..., Piece]] = {
    "embedding": _embedding,
    "norm": _norm,
    "residual": _residual,
    "activation": _activation,
    "attention": _attention,
    "loss": _loss,
}
"""Each gives sets of operands at a shape, and the computation, as transformers and torch have it."""


# collectives --------------------------------------------------------------------------------------


def _group(stride: int, size: int) -> dist.ProcessGroup:
    """This rank's group of `size` ranks, each `stride` from the next; every rank makes all of them."""
    ranks = torch.arange(dist.get_world_size()).reshape(-1, size, stride).transpose(1, 2)
    group, _ = dist.new_subgroups_by_enumeration(ranks.reshape(-1, size).tolist())
    assert isinstance(group, dist.ProcessGroup)
    return group


def _payloads(asked: Questions, kind: Collective, stride: int, size: int) -> list[int]:
    """A few sizes between the smallest and the largest that is asked for, in bytes."""
    sizes = [bytes_ for k, s, n, bytes_ in asked.asked_sums if (k, s, n) == (kind, stride, size)]
    if not sizes:
        return []
    low, high = max(min(sizes), 4.0 * size), max(*sizes, 8.0 * size)
    ratio = (high / low) ** (1 / (POINTS - 1))
    return sorted({round(low * ratio**i / (4 * size)) * 4 * size for i in range(POINTS)})


def _time_collective(
    watch: Stopwatch,
    make: Operands,
    kind: Collective,
    ring: tuple[int, int],
    payload: int,
    group: dist.ProcessGroup,
    between: Callable[[int], object],
) -> None:
    start = _starter(make, kind, payload, group)

    def after_a_product(turn: int) -> None:
        between(turn)
        start()()

    watch.time((kind, *ring, payload), after_a_product)


def _starter(
    make: Operands, kind: Collective, payload: int, group: dist.ProcessGroup
) -> Callable[[], Callable[[], object]]:
    """Starts a collective whose full tensor has so many bytes, as the grid does, and gives its wait."""
    whole = make(payload // make.dtype.itemsize)
    piece = whole.chunk(group.size())[0].clone()

    def reduce() -> Callable[[], object]:
        work: Any = dist.all_reduce(whole, group=group, async_op=True)
        return work.wait

    def gather() -> Callable[[], object]:
        return _all_gather(torch.empty_like(whole), piece, group, async_op=True).wait

    def scatter() -> Callable[[], object]:
        return _reduce_scatter(torch.empty_like(piece), whole, group=group, async_op=True).wait

    def exchange() -> tuple[Tensor, Callable[[], object]]:
        received = torch.empty_like(whole)
        work: Any = dist.all_to_all_single(received, whole, group=group, async_op=True)
        return received, work.wait

    def scatter_terms() -> Callable[[], object]:
        terms, wait = exchange()
        return lambda: (wait(), terms.unflatten(0, (group.size(), -1)).sum(0))

    match kind:
        case "all_reduce":
            return reduce
        case "all_gather":
            return gather
        case "reduce_scatter":
            return scatter_terms if whole.is_cpu else scatter
        case "all_to_all":
            return lambda: exchange()[1]


def _time_theft(
    watch: Stopwatch, make: Operands, asked: Questions, group: dist.ProcessGroup
) -> None:
    """A product alone, a collective alone, and both at once."""
    m, n, k = max(asked.asked_products, key=lambda shape: shape[0] * shape[1] * shape[2])
    x, weight = make(m, k), make(n, k)
    start = _starter(make, "all_reduce", 4 * n * k, group)

    def both(_: int) -> None:
        finish = start()
        F.linear(x, weight)
        finish()

    watch.time("product alone", lambda _: F.linear(x, weight))
    watch.time("collective alone", lambda _: start()())
    watch.time("product and collective", both)


# the rest -----------------------------------------------------------------------------------------


def _time_memory(watch: Stopwatch, make: Operands) -> None:
    elements = COPIED_BYTES // make.dtype.itemsize
    source, target = make(elements), make(elements)
    watch.time("copy", lambda _: target.copy_(source))


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del ctx
        return gradient


def _product_between(make: Operands) -> Callable[[int], object]:
    m, n, k = BETWEEN
    sets = make.sets((m, k), (n, k))
    return lambda turn: F.linear(*sets[turn % len(sets)])


def _time_calls(watch: Stopwatch, make: Operands, between: Callable[[int], object]) -> None:
    tiny, leaf = make(8), make(8, grad=True)

    def calls(_: int) -> None:
        for _ in range(TINY_CALLS):
            torch.add(tiny, tiny)

    def nodes(turn: int) -> None:
        between(turn)
        x = leaf
        for _ in range(TINY_NODES):
            x = _Node.apply(x)
        torch.autograd.grad(x, leaf, tiny)

    watch.time("call", calls, calls=TINY_CALLS)
    watch.time("node", nodes)


def _time_update(watch: Stopwatch, make: Operands, job: Job, ranks: int) -> None:
    """AdamW and clipping, of as many tensors as the model has: of its share's size, and of none."""
    number = job.model.tensors
    for key, elements in (("update", job.model.parameters // ranks // number), ("small update", 1)):
        tensors = [make(elements, grad=True) for _ in range(number)]
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        optimizer = torch.optim.AdamW(tensors, lr=1e-4)

        def update(_: int, tensors: Any = tensors, optimizer: Any = optimizer) -> None:
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            optimizer.step()

        watch.time(key, update)


def _machine(
    watch: Stopwatch,
    asked: Questions,
    job: Job,
    name: str,
    device: torch.device,
    clock: ClockName,
) -> Machine:
    seconds = partial(watch.seconds, clock=clock)
    products = tuple(
        Product(m=m, n=n, k=k, precision=job.precision, seconds=seconds(("product", m, n, k)))
        for m, n, k in sorted(asked.asked_products)
    )
    parts = tuple(
        Part(
            kind=kind, shape=shape, forward_s=seconds(("forward", kind, shape)),
            backward_s=seconds(("backward", kind, shape)),
        )
        for kind, shape in sorted(asked.asked_parts)
    )  # fmt: skip
    curves = tuple(_curves(watch, clock))
    peak = max(2.0 * p.m * p.n * p.k / p.seconds for p in products)
    local, ranks = local_world_size(), dist.get_world_size()
    rings = tuple(_rings(curves))
    everybody = [ring for ring in rings if (ring.stride, ring.size) == (1, ranks)]
    steals = 1.0  # no overlap hides processor time
    if everybody and clock == "wall":
        more = seconds("product and collective") - seconds("product alone")
        steals = min(1.0, max(0.0, more / seconds("collective alone")))
    number, share = job.model.tensors, job.model.parameters // ranks
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local
    )
    return Machine(
        name=name,
        sources=(f"measured by fourfold probe, {clock} clock, torch {torch.__version__}",),
        rates=(
            Rate(
                precision=job.precision, flops_per_s=peak, share=1.0,
                attention_share=_attention_share(parts, peak),
            ),
        ),
        memory_bytes=memory,
        memory_bytes_per_s=2 * COPIED_BYTES / seconds("copy"),
        devices_per_node=local,
        rings=tuple(ring for ring in rings if ring.stride * ring.size <= local),
        node_bytes_per_s=everybody[0].bytes_per_s if everybody else 1.0,
        network_latency_s=everybody[0].latency_s * local / ranks if everybody else 0.0,
        kernel_s=seconds("call"),
        host_computes=device.type == "cpu",
        steals=steals,
        products=products,
        seconds_per_update=max(0.0, seconds("update") - seconds("small update")) / share,
        seconds_per_tensor=seconds("small update") / number,
        node_s=max(0.0, seconds("node") - seconds("between")) / TINY_NODES,
        parts=parts,
        curves=curves,
    )  # fmt: skip


def _curves(watch: Stopwatch, clock: ClockName) -> Iterator[Curve]:
    """Of each collective; more bytes never take less time, so what noise inverts is levelled."""
    points: dict[tuple[Collective, int, int], list[tuple[float, float]]] = {}
    for key in watch.trials:
        if key[0] in KINDS:
            kind, stride, size, payload = key
            alone = watch.seconds(key, clock) - watch.seconds("between", clock)
            points.setdefault((kind, stride, size), []).append((float(payload), alone))
    for (kind, stride, size), measured in points.items():
        payloads, seconds = zip(*sorted(measured), strict=True)
        rising = isotonic_regression(seconds).x.clip(min=LEAST_S)
        yield Curve(
            kind=kind, stride=stride, size=size,
            points=tuple(zip(payloads, rising.tolist(), strict=True)),
        )  # fmt: skip


def _rings(curves: Sequence[Curve]) -> Iterator[Ring]:
    """An all-reduce's rate at its largest payload, and its time at the smallest."""
    for curve in curves:
        if curve.kind == "all_reduce":
            payload, seconds = curve.points[-1]
            latency = min(curve.points[0][1], seconds) / 2
            moved = 2 * (curve.size - 1) / curve.size * payload
            yield Ring(
                stride=curve.stride, size=curve.size, latency_s=latency,
                bytes_per_s=moved / max(seconds - 2 * latency, seconds / 100),
            )  # fmt: skip


def _attention_share(parts: Sequence[Part], peak: float) -> float:
    """Of the largest measured attention, rotary positions included."""
    rates = [0.01]
    for part in parts:
        if part.kind == "attention":
            tokens, sequence, heads, _, head_width = part.shape
            rates.append(2.0 * tokens * sequence * heads * head_width / part.forward_s / peak)
    return min(1.0, max(rates))
