"""One step of the grid, told again without tensors: what a rank computes, starts and waits for.

All ranks do the same, so one is enough. The order is that of `grid/linear.py` and its schedule: the
gather of the next tile before each product, the sum of the input's gradient under the weight's
product, the spread of the weight's gradient under the backward of the layer before, the sums over
data as gradients are finished. A collective occupies its link (within the node, or the network) from
when it starts; a wait that comes before its end is *exposed*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from fourfold_parallel.common.axes import AXES, AxisName
from fourfold_parallel.plan.cost import COLLECTIVE_NODES, LINEAR_NODES, NORM_NODES, Work
from fourfold_parallel.plan.job import Job, Layout
from fourfold_parallel.plan.machine import Collective, Machine
from fourfold_parallel.plan.transformer import Block, DecoderLayer, Linear, Mixture, Part

TINY_BYTES = INTEGER_BYTES = 8
BUCKET_BYTES = 25 * 2**20
"""Of the grid's sums over data."""
SIMULATED_LAYERS = 4
"""Of a kind where all are alike, else two; further decoder layers take what the last of these took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A pass through a linear layer or a set of experts, and its place in its block."""

    part: Part
    block: Block
    norms: int = 0
    """Of the residual stream, before it."""
    starts: bool = False
    """It is the first of its block."""
    ends: bool = False
    """It is the last of its block."""
    follows_work: bool = False
    """Attention or the activation is computed before it."""


@cache
def turns_of(layer: DecoderLayer) -> tuple[Turn, ...]:
    """The way through a decoder layer; its norms are spread over its blocks."""
    visits: list[Turn] = []
    blocks = [block for block in layer.blocks if block.parts]
    for number, block in enumerate(blocks, 1):
        norms = layer.norms * number // len(blocks) - layer.norms * (number - 1) // len(blocks)
        last = len(block.parts) - 1
        visits += [
            Turn(
                part=part, block=block, norms=0 if index else norms, starts=index == 0,
                ends=index == last, follows_work=part is block.last,
            )
            for index, part in enumerate(block.parts)
        ]  # fmt: skip
    return tuple(visits)


@dataclass(frozen=True, slots=True)
class Road:
    """The links of an axis' collectives."""

    size: int
    crosses: bool
    latency_s: float
    seconds_per_byte: float
    """Of payload, once around the ring."""

    @classmethod
    def of(cls, axis: AxisName, layout: Layout, machine: Machine) -> Road:
        """The road of an axis on a machine."""
        size, stride = layout.size(axis), layout.stride(axis)
        if size == 1:
            return cls(1, False, 0.0, 0.0)
        ring = machine.ring(stride=stride, size=size)
        return cls(
            size,
            machine.crosses_nodes(stride=stride, size=size),
            ring.latency_s,
            (size - 1) / size / ring.bytes_per_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that happened: on lane `compute`, or on the lane of an axis."""

    lane: str
    name: str
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A simulated step."""

    seconds: float
    compute_s: float
    """Products, elementwise work and the update, if nothing were waited for."""
    exposed_s: dict[AxisName, float]
    """Waited for, by axis."""
    moved_bytes: dict[AxisName, float]
    """That this rank sends along each axis, in rings."""
    update_s: float
    spans: tuple[Span, ...] = ()

    @property
    def bound(self) -> str:
        """The part that takes most of the step's time."""
        parts = {"compute": self.compute_s} | {f"{n} exposed": s for n, s in self.exposed_s.items()}
        return max(parts, key=parts.__getitem__)


@dataclass(slots=True, kw_only=True)
class Clock:
    """A rank's time: its host, its device, its links."""

    machine: Machine
    layout: Layout
    records: bool
    host: float = 0.0
    device: float = 0.0
    links: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    computed: float = 0.0
    exposed: dict[AxisName, float] = field(default_factory=lambda: dict.fromkeys(AXES, 0.0))
    moved: dict[AxisName, float] = field(default_factory=lambda: dict.fromkeys(AXES, 0.0))
    spans: list[Span] = field(default_factory=list)
    roads: dict[AxisName, Road] = field(init=False)

    def __post_init__(self) -> None:
        self.roads = {axis: Road.of(axis, self.layout, self.machine) for axis in AXES}

    def compute(self, name: str, seconds: float, kernels: int = 1) -> None:
        """Run `seconds` of work in so many kernels, each of which the host launches."""
        calls = kernels * self.machine.kernel_s
        if self.machine.host_computes:
            # What was measured on the host was measured with its calls.
            start = self.device
            seconds = self.machine.together * (seconds + (0.0 if self.machine.is_probed else calls))
        else:
            self.host += calls
            # The first kernel starts when it was launched, the last cannot end before it was.
            start = max(self.device, self.host - calls)
            seconds = max(seconds, self.host - start)
        self.device = start + seconds
        self.computed += seconds
        if self.records:
            self.spans.append(Span(lane="compute", name=name, start_s=start, stop_s=self.device))

    def nodes(self, number: int) -> None:
        """Pass so many nodes of autograd that are written in Python, forward and backward."""
        seconds = number * self.machine.node_s
        self.host += seconds
        if self.machine.host_computes:
            seconds *= self.machine.together
            self.device += seconds
            self.computed += seconds

    def start(self, axis: AxisName, kind: Collective, payload: float, name: str) -> float:
        """Start a collective; gives when it ends. Nothing on an axis of size one."""
        road = self.roads[axis]
        if road.size == 1:
            return 0.0
        self.nodes(COLLECTIVE_NODES)
        rounds = 2 if kind == "all_reduce" else 1
        if self.machine.is_probed:
            stride = self.layout.stride(axis)
            seconds = self.machine.seconds(kind, payload, stride=stride, size=road.size)
        else:
            seconds = rounds * (road.latency_s + payload * road.seconds_per_byte)
        begin = max(self.device, self.links[road.crosses])
        self.links[road.crosses] = begin + seconds
        self.device += self.machine.steals * seconds
        self.moved[axis] += rounds * (road.size - 1) / road.size * payload
        if self.records:
            self.spans.append(
                Span(lane=axis, name=f"{kind} {name}", start_s=begin, stop_s=begin + seconds)
            )
        return begin + seconds

    def wait(self, axis: AxisName, end: float) -> None:
        """Let the device wait for a collective."""
        if end > self.device:
            self.exposed[axis] += end - self.device
            self.device = end
        if self.machine.host_computes:
            self.host = self.device


class Rank:
    """One rank going through a microbatch."""

    def __init__(self, job: Job, layout: Layout, machine: Machine, *, records: bool) -> None:
        self.job, self.layout = job, layout
        self.clock = Clock(machine=machine, layout=layout, records=records)
        self.work = Work(job, layout, machine)
        self._head = Turn(part=job.model.head, block=Block(parts=(), attends=False))
        self._sizes: dict[int, tuple[int, float, int]] = {}
        self._gathers: dict[int, float] = {}
        self._late: tuple[float, Part] | None = None
        self.sums_end: float = 0.0
        """When the last sum over data ends. Nothing but the update waits for it."""
        self._bucket = 0.0
        self._phases: list[str] = []
        """Of the visits after the loss: each is a forward, made again, or a backward."""

    def microbatch(self, layers: Sequence[DecoderLayer], *, is_last: bool) -> None:
        """Forward and backward of these decoder layers, the embedding and the head."""
        job, model = self.job, self.job.model
        visits = [turns_of(layer) for layer in layers]
        order = [visit for of_layer in visits for visit in of_layer] + [self._head]
        self._embed()
        for index in range(len(order) - 1):
            self._forward(order, index)
        self.clock.compute("norm", self.work.norm(), self.work.passes.norm_kernels)
        self.clock.nodes(NORM_NODES)
        self._statistics(2)
        self._product_forward(order, len(order) - 1)
        self.clock.compute("loss", self.work.loss(), 12)
        self._column(self.work.tokens * 4 * 2, "row", "loss")
        if self.clock.machine.is_probed:
            self._small()
        backward = self._backward_order(visits)
        self._phases = [phase for _, phase in backward]
        order = [visit for visit, _ in backward]
        for position in range(len(backward)):
            self._backward(backward, order, position, is_last=is_last)
        self._finish_late(is_last=is_last)
        if is_last:
            table = 0 if model.tied else model.vocabulary * model.width
            tile = table / (self.layout.row * self.layout.col)
            if self.clock.machine.is_probed:
                self.clock.compute("embedding", self.work.embedding(backward=True))
            ends = self.clock.start("depth", "reduce_scatter", tile * job.element, "embedding")
            self.clock.wait("depth", ends)
            self._reduce(tile / self.layout.depth, "embedding")
        self._send_bucket()

    # forward ------------------------------------------------------------------------------------

    def _embed(self) -> None:
        model, layout = self.job.model, self.layout
        tile = model.vocabulary * model.width / (layout.row * layout.col)
        clock = self.clock
        clock.wait(
            "depth", clock.start("depth", "all_gather", tile * self.job.element, "embedding")
        )
        elements = self.work.tokens * model.width / layout.col
        clock.compute("embedding", self.work.embedding(), 6)
        clock.wait(
            "row", clock.start("row", "all_reduce", elements * self.job.element, "embedding")
        )

    def _forward(self, order: Sequence[Turn], index: int) -> None:
        """A part with what comes before it in its block."""
        visit, clock, work = order[index], self.clock, self.work
        for _ in range(visit.norms):
            clock.compute("norm", work.norm(), work.passes.norm_kernels)
            clock.nodes(NORM_NODES)
            self._statistics(1)
        if visit.starts:
            if visit.block.whole:
                self._gather_stream("into block")
            else:
                self._gather_tokens("into block")
        if visit.follows_work:
            self._between(visit.block)
        self._product_forward(order, index)
        if visit.ends:
            clock.compute("residual", work.residual())

    def _between(self, block: Block, *, backward: bool = False) -> None:
        """Attention or activation: the work before a block's last linear layer."""
        work = self.work
        if not block.attends:
            self.clock.compute("activation", work.activation(block, backward=backward), 2)
        else:
            self.clock.compute(
                "attention",
                work.attention(whole=block.whole, backward=backward),
                3 + work.passes.rotary_kernels,
            )

    def _known(self, part: Part) -> tuple[int, float, int]:
        """Elements of a part that this rank gathers over depth, seconds of a product, and its kernels."""
        known = self._sizes.get(id(part))
        if known is None:
            row, col = self.layout.row, self.layout.col
            size = part.tile_elements(row, col)
            if isinstance(part, Mixture):
                seconds, kernels = self.work.experts(part), part.matrices
                size = round(
                    size * part.crowding(self.layout.depth)
                )  # gathers fill up what is missing
            else:
                seconds, kernels = self.work.product(*part.tile(row, col)), 1
            known = self._sizes[id(part)] = size, seconds, kernels
        return known

    def _start_gather(self, order: Sequence[Turn], index: int) -> None:
        if index < len(order) and index not in self._gathers:
            part = order[index].part
            if self.layout.leaves(part):
                self._gathers[index] = 0.0
                return
            if part.lies_whole and self._phases[index : index + 1] == ["backward"]:
                self._gathers[index] = 0.0
                return
            self._gathers[index] = self.clock.start(
                "depth", "all_gather", self._known(part)[0] * self.job.element, part.name
            )

    def _product_forward(self, order: Sequence[Turn], index: int) -> None:
        part, clock = order[index].part, self.clock
        self._start_gather(order, index)
        self._start_gather(order, index + 1)
        clock.wait("depth", self._gathers.pop(index))
        if isinstance(part, Linear) and part.form == "alike":
            self._gather_whole(self._known(part)[0], part.parameters, part.name)
        tokens, element = self.work.tokens, self.job.element
        if isinstance(part, Mixture):
            self._experts_forward(part)
            return
        clock.nodes(LINEAR_NODES)
        clock.compute(part.name, *self._known(part)[1:])
        if part.form == "divided":
            rows = -(-part.outputs // self.layout.row)
            self._gather_whole(tokens * rows, tokens * part.outputs, part.name)
        if part.form in {"divided", "alike"}:
            return
        rows, _ = part.tile(self.layout.row, self.layout.col)
        contracted: AxisName = "row" if part.swapped else "col"
        kind: Collective = "all_reduce"
        if part.swapped and self.layout.cuts_tokens:
            kind = "reduce_scatter"
        clock.wait(contracted, clock.start(contracted, kind, tokens * rows * element, part.name))
        if part.form == "latent":
            payload = tokens * part.outputs * element
            clock.wait("row", clock.start("row", "all_gather", payload, part.name))

    def _experts_forward(self, part: Mixture) -> None:
        rows, exchanged = self.work.tokens, self.layout.leaves(part)
        if exchanged:
            rows = self.work.rows(part)
            self._exchange(INTEGER_BYTES * self.layout.depth, part.name)  # counts
            self._exchange(rows * part.width * self.job.element, part.name)
            self._exchange(rows * self.job.element, part.name)  # weights
            self._exchange(rows * INTEGER_BYTES, part.name)  # choices
        self.clock.nodes(LINEAR_NODES)
        self.clock.compute(part.name, *self._known(part)[1:])
        over: tuple[AxisName, ...] = ("row", "col")
        for axis in over:
            self._column(rows * part.width * self.job.element, axis, part.name)
        if exchanged:
            self._exchange(rows * part.width * self.job.element, part.name)

    def _exchange(self, payload: float, name: str) -> None:
        """As many rows to each rank of depth, and from it."""
        self.clock.wait("depth", self.clock.start("depth", "all_to_all", payload, name))

    def _gather_whole(self, over_col: float, over_row: float, name: str) -> None:
        """Pieces of elements that are gathered over col, then over row."""
        gathers: tuple[tuple[AxisName, float], ...] = (("col", over_col), ("row", over_row))
        for axis, elements in gathers:
            payload = elements * self.job.element
            self.clock.wait(axis, self.clock.start(axis, "all_gather", payload, name))

    def _gather_stream(self, name: str) -> None:
        """The whole residual stream, into a whole block, or its gradient, out of it."""
        payload = self.work.tokens * self.job.model.width * self.job.element
        shared = self.layout.row if self.layout.cuts_tokens else 1
        self.clock.wait("col", self.clock.start("col", "all_gather", payload / shared, name))
        if self.layout.cuts_tokens:
            self.clock.wait("row", self.clock.start("row", "all_gather", payload, name))

    def _gather_tokens(self, name: str) -> None:
        if self.layout.cuts_tokens:
            payload = self.work.tokens * self.job.model.width / self.layout.col * self.job.element
            self.clock.wait("row", self.clock.start("row", "all_gather", payload, name))

    def _statistics(self, times: int) -> None:
        """Sums of a norm's statistics over col: a number a token."""
        for _ in range(times):
            self._column(self.work.between * 4, "col", "norm")

    def _column(self, payload: float, axis: AxisName, name: str) -> None:
        self.clock.wait(axis, self.clock.start(axis, "all_reduce", payload, name))

    def _small(self) -> None:
        """Meetings of all ranks over a few numbers: the loss's maximum and sum, the gradient's norm."""
        self._column(self.work.tokens * 4, "row", "loss")
        for axis in ("data", "depth"):
            self._column(TINY_BYTES, axis, "loss")
        for axis in ("depth", "row", "col"):
            self._column(TINY_BYTES, axis, "gradient norm")
        self.clock.compute("norm", self.work.norm(backward=True))

    # backward -----------------------------------------------------------------------------------

    def _backward_order(self, layers: Sequence[Sequence[Turn]]) -> list[tuple[Turn, str]]:
        """Every visit after forward: backward ones, and with recomputation forward ones before them."""
        visits: list[tuple[Turn, str]] = [(self._head, "backward")]
        for layer in reversed(layers):
            if self.layout.recomputes:
                visits += [(visit, "forward") for visit in layer]
            visits += [(visit, "backward") for visit in reversed(layer)]
        return visits

    def _backward(
        self, visits: list[tuple[Turn, str]], order: list[Turn], position: int, *, is_last: bool
    ) -> None:
        visit, phase = visits[position]
        if phase == "forward":
            self._forward(order, position)
            return
        clock, work, part = self.clock, self.work, visit.part
        if visit.ends:
            clock.compute("residual", work.residual())
            if visit.block.whole:
                self._gather_stream("backward")
            else:
                self._gather_tokens("backward")
        if not self.layout.keeps_tiles:
            self._start_gather(order, position)
            self._start_gather(order, position + 1)
            clock.wait("depth", self._gathers.pop(position))
        size, seconds, kernels = self._known(part)
        if self.layout.leaves(part):
            self._exchange(self.work.rows(part) * part.width * self.job.element, part.name)
        clock.compute(f"d{part.name} input", seconds, kernels)
        ends = self._sum_input_gradient(part)
        clock.compute(f"d{part.name} weight", seconds, kernels)
        self._finish_late(is_last=is_last)
        spread = 0.0
        if not self.layout.leaves(part):
            spread = clock.start("depth", "reduce_scatter", size * self.job.element, part.name)
        self._late = (spread, part)
        for axis, end in ends:
            clock.wait(axis, end)
        if visit.follows_work:
            self._between(visit.block, backward=True)
        if visit.starts:
            self._leave_block(visit)

    def _sum_input_gradient(self, part: Part) -> list[tuple[AxisName, float]]:
        """Start what makes the gradient of a part's input whole; gives when each ends."""
        tokens, element, clock = self.work.tokens, self.job.element, self.clock
        if self.layout.leaves(part):
            rows = self.work.rows(part) * element
            self._exchange(rows * part.width, part.name)
            self._exchange(rows, part.name)  # of the weights
        if isinstance(part, Mixture) or part.form == "divided":
            width = part.width if isinstance(part, Mixture) else part.inputs
            over: tuple[AxisName, ...] = ("row", "col")
            for axis in over:  # at once: nothing of the block's backward is overlapped
                self._column(tokens * width * element, axis, part.name)
            return []
        if part.form == "alike":
            return []
        _, columns = part.tile(self.layout.row, self.layout.col)
        payload = tokens * columns * element
        if part.form == "expanding":  # the latent's sum over row is its own layer's
            whole = tokens * part.inputs * element
            return [("col", clock.start("col", "all_gather", whole, part.name))]
        ends: list[tuple[AxisName, float]] = []
        if part.form == "latent":
            latent = tokens * part.outputs * element
            clock.wait("row", clock.start("row", "reduce_scatter", latent, part.name))
        produced: AxisName = "col" if part.swapped else "row"
        if part.swapped or not self.layout.cuts_tokens:
            ends.append((produced, clock.start(produced, "all_reduce", payload, part.name)))
        return ends

    def _leave_block(self, visit: Turn) -> None:
        """Backward of what a block begins with: the gather of tokens, and its norms."""
        if self.layout.cuts_tokens and not visit.block.whole:
            payload = self.work.tokens * self.job.model.width / self.layout.col * self.job.element
            ends = self.clock.start("row", "reduce_scatter", payload, "out of block")
            self.clock.wait("row", ends)
        passes = self.work.norm(backward=True)
        for _ in range(visit.norms):
            self.clock.compute("norm", passes, 2 * self.work.passes.norm_kernels)
            self._statistics(1)
        if self.clock.machine.is_probed:  # the gradients of a block's plain layers meet
            plain = sum(part.form == "plain" for part in visit.block.linears)
            self.clock.compute("residual", max(0, plain - 1) * self.work.residual())

    def _finish_late(self, *, is_last: bool) -> None:
        """Wait for the layer's gradient of before, and send it over data."""
        if self._late is None:
            return
        ends, part = self._late
        self._late = None
        self.clock.wait("depth", ends)
        if is_last:
            self._reduce(self._known(part)[0] / self.layout.depth, part.name)

    def _reduce(self, elements: float, name: str) -> None:
        payload = elements * self.job.storage.wire
        if self.layout.shards_optimizer:
            self.sums_end = self.clock.start("data", "reduce_scatter", payload, name)
        elif self.clock.machine.is_probed:
            self._fill(payload)
        else:
            self.sums_end = self.clock.start("data", "all_reduce", payload, name)

    def _fill(self, payload: float) -> None:
        """Copy a gradient into its bucket, which is sent when it is full."""
        if self.layout.data > 1:
            self.clock.compute("bucket", self.work.traffic(payload, 2, element=1))
            self._bucket += payload
            if self._bucket >= BUCKET_BYTES:
                self._send_bucket()

    def _send_bucket(self) -> None:
        if self._bucket:
            self.sums_end = self.clock.start("data", "all_reduce", self._bucket, "bucket")
            self._bucket = 0.0


def simulate(job: Job, layout: Layout, machine: Machine, *, records: bool = False) -> Step:
    """One step of a job on a layout.

    Args:
        job: The model and batch.
        layout: The grid and the microbatch.
        machine: The machine.
        records: Keep the spans of the last microbatch, of at most four decoder layers.
    """
    microbatches = layout.microbatches(job.batch)
    last = _microbatch(job, layout, machine, is_last=True, records=records)
    others = last
    if microbatches > 1 and layout.data > 1:
        others = _microbatch(job, layout, machine, is_last=False, records=False)
    return _step(job, layout, machine, last + others * (microbatches - 1))


def scout(job: Job, layout: Layout, machine: Machine) -> float:
    """A rough, cheap guess of a step's seconds: one decoder layer of each kind stands for all."""
    microbatches, seconds = layout.microbatches(job.batch), 0.0
    for layer, number in job.model.stack:
        short, long = (
            _walk(job, layout, machine, [layer] * n, is_last=False, records=False) for n in (1, 2)
        )
        seconds += (long.seconds - short.seconds) * number * microbatches
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """A rank's way through some layers and microbatches; walks add up."""

    seconds: float
    host_s: float
    """Until the host has launched everything."""
    sums_end: float
    compute_s: float
    exposed_s: dict[AxisName, float]
    moved_bytes: dict[AxisName, float]
    spans: tuple[Span, ...] = ()

    def __add__(self, other: _Walk) -> _Walk:
        return _Walk(
            seconds=self.seconds + other.seconds,
            host_s=self.host_s + other.host_s,
            sums_end=self.sums_end + other.seconds,
            compute_s=self.compute_s + other.compute_s,
            exposed_s={n: self.exposed_s[n] + other.exposed_s[n] for n in AXES},
            moved_bytes={n: self.moved_bytes[n] + other.moved_bytes[n] for n in AXES},
            spans=self.spans,
        )

    def __mul__(self, times: float) -> _Walk:
        return _Walk(
            seconds=self.seconds * times,
            host_s=self.host_s * times,
            sums_end=self.sums_end * times,
            compute_s=self.compute_s * times,
            exposed_s={n: seconds * times for n, seconds in self.exposed_s.items()},
            moved_bytes={n: size * times for n, size in self.moved_bytes.items()},
        )


def _microbatch(
    job: Job, layout: Layout, machine: Machine, *, is_last: bool, records: bool
) -> _Walk:
    """A few layers are walked; each of the others takes what the last of its kind took."""
    most = SIMULATED_LAYERS if len(job.model.stack) == 1 else 2
    walked_layers = [layer for layer, n in job.model.stack for _ in range(min(n, most))]
    walked = _walk(job, layout, machine, walked_layers, is_last=is_last, records=records)
    whole = walked
    for layer, number in job.model.stack:
        more = number - min(number, most)
        if not more:
            continue
        fewer_layers = [*walked_layers]
        fewer_layers.remove(layer)
        fewer = _walk(job, layout, machine, fewer_layers, is_last=is_last, records=False)
        # The sums over data queue on their own: they end later by what each layer adds to their queue.
        ends = whole.sums_end + (walked.sums_end - fewer.sums_end) * more
        whole = replace(whole + (walked + fewer * -1) * more, sums_end=ends)
    # A host that needs longer for a layer than the device falls behind after some layers.
    behind = max(0.0, whole.host_s - whole.seconds)
    return replace(
        whole, seconds=whole.seconds + behind, compute_s=whole.compute_s + behind,
        sums_end=whole.sums_end + behind,
    )  # fmt: skip


def _walk(
    job: Job,
    layout: Layout,
    machine: Machine,
    layers: Sequence[DecoderLayer],
    *,
    is_last: bool,
    records: bool,
) -> _Walk:
    rank = Rank(job, layout, machine, records=records)
    rank.microbatch(layers, is_last=is_last)
    clock = rank.clock
    return _Walk(
        seconds=max(clock.device, clock.host), host_s=clock.host, sums_end=rank.sums_end,
        compute_s=clock.computed,
        exposed_s=clock.exposed, moved_bytes=clock.moved, spans=tuple(clock.spans),
    )  # fmt: skip


def _step(job: Job, layout: Layout, machine: Machine, walk: _Walk) -> Step:
    """The walk with what follows it: the last sums over data, the update, ZeRO-1's gather."""
    pieces = job.model.parameters + job.model.crowded(layout.depth)
    pieces /= layout.depth * layout.row * layout.col
    update = Work(job, layout, machine).update(pieces)
    waited = max(0.0, walk.sums_end - walk.seconds)
    moved, exposed = dict(walk.moved_bytes), dict(walk.exposed_s)
    if layout.shards_optimizer and layout.data > 1:
        payload = pieces * job.storage.weight
        stride = layout.stride("data")
        waited += machine.seconds("all_gather", payload, stride=stride, size=layout.data)
        moved["data"] += (layout.data - 1) / layout.data * payload
    exposed["data"] += waited
    return Step(
        seconds=walk.seconds + waited + update,
        compute_s=walk.compute_s + update,
        exposed_s=exposed,
        moved_bytes=moved,
        update_s=update,
        spans=walk.spans,
    )
