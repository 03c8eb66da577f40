"""A machine as the planner sees it: how fast it multiplies, reads memory and communicates."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from fourfold_parallel.common.files import StrPath
from fourfold_parallel.common.values import from_json, strict, to_json

Precision = Literal["fp32", "bf16"]
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
PartName = Literal["embedding", "norm", "attention", "activation", "residual", "loss"]
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Products in one number format."""

    precision: Precision
    flops_per_s: float
    """Nominal peak, of which utilisation is a part."""
    share: float
    """The best measured product's part of the peak."""
    attention_share: float
    """A fused attention kernel's part of the peak, forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """Measured groups: `size` ranks, each `stride` ranks from the next, with all sibling groups at once."""

    stride: int
    size: int
    bytes_per_s: float
    """Of a rank's ring: payload over time, times `(size - 1) / size`, twice that for an all-reduce."""
    latency_s: float
    """Of a collective without payload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A measured product `[m, k] @ [k, n]`."""

    m: int
    n: int
    k: int
    precision: Precision
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A measured piece of a step beside the products, at the shape of one rank."""

    kind: PartName
    shape: tuple[int, ...]
    """As `Work` in `cost.py` asks for it."""
    forward_s: float
    backward_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Measured times of one collective, with all sibling groups at once, by size of the full tensor."""

    kind: Collective
    stride: int
    size: int
    points: tuple[tuple[float, float], ...]
    """(bytes, seconds), ascending."""

    def seconds(self, payload: float) -> float:
        """Between two points on their line; beyond them in proportion, at least the first's time."""
        index = bisect_left(self.points, (payload, 0.0))
        if index == 0:
            return self.points[0][1]
        if index == len(self.points):
            last, seconds = self.points[-1]
            return seconds * payload / last
        (before, early), (after, late) = self.points[index - 1 : index + 1]
        return early + (late - early) * (payload - before) / (after - before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """The road between a device and a slower memory; both directions may be in use at once."""

    out_bytes_per_s: float
    in_bytes_per_s: float
    out_latency_s: float = 0.0
    """Of a transfer, however small."""
    in_latency_s: float = 0.0

    def out_s(self, nbytes: float) -> float:
        """Seconds of a transfer away from the device."""
        return self.out_latency_s + nbytes / self.out_bytes_per_s

    def in_s(self, nbytes: float) -> float:
        """Seconds of a transfer back to it."""
        return self.in_latency_s + nbytes / self.in_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of equal devices. Rates are those of one device, in one direction."""

    name: str
    sources: tuple[str, ...]
    """Where the numbers are from; `fitted: ...` names those that were fitted to measured steps."""
    rates: tuple[Rate, ...]
    memory_bytes: float
    """Of one device, of which the planner leaves `memory_slack` to the allocator and libraries."""
    memory_bytes_per_s: float
    """Reading or writing in an elementwise kernel, as measured or as a share of the nominal rate."""
    devices_per_node: int
    rings: tuple[Ring, ...]
    """Within a node. A group that was not measured takes the nearest that was."""
    node_bytes_per_s: float
    """Of all network ports of a node together, as a large ring sees them."""
    network_latency_s: float
    """That each node adds to a collective over the network."""
    network_shares: tuple[tuple[int, float], ...] = ((1, 1.0),)
    """By number of nodes, the part of `node_bytes_per_s` that a ring over them sees."""
    kernel_s: float
    """From one call of torch to the next: the host's time to launch a kernel, or to begin an operation."""
    host_computes: bool = False
    """The host is the device (a CPU): the time of a call adds to that of the operation."""
    steals: float = 0.0
    """The part of a collective's time that computation under way loses to it. 1 hides nothing."""
    together: float = 1.0
    """What computing in a real step takes, over its parts measured one by one (caches, shared cores)."""
    memory_slack: float = 0.06
    products: tuple[Product, ...] = ()
    """Measured; others are computed from the rates."""
    seconds_per_update: float = 0.0
    """Of one parameter by the optimizer, where it was measured; else from the memory's rate."""
    seconds_per_tensor: float = 0.0
    """Of one tensor by the optimizer, however small."""
    node_s: float = 0.0
    """The host's time for a node of autograd that is written in Python, forward and backward together."""
    parts: tuple[Part, ...] = ()
    """Measured; others are computed from the memory's rate."""
    curves: tuple[Curve, ...] = ()
    """Measured; others are computed from the rings."""
    host: Channel | None = None
    """Between a device and its host's memory; None where it is not known."""

    def rate(self, precision: Precision) -> Rate:
        """The products' rate in a number format.

        Raises:
            ValueError: The machine has none.
        """
        for rate in self.rates:
            if rate.precision == precision:
                return rate
        known = ", ".join(rate.precision for rate in self.rates)
        raise ValueError(f"machine {self.name} has no rate for {precision}; it has {known}")

    @property
    def is_probed(self) -> bool:
        """The pieces of a step were measured, with their calls: what they leave out is counted apart."""
        return bool(self.parts)

    def product(self, m: int, n: int, k: int, precision: Precision) -> float | None:
        """Seconds of `[m, k] @ [k, n]`, if it was measured."""
        return self._products.get((m, n, k, precision))

    def part(self, kind: PartName, shape: tuple[int, ...]) -> Part | None:
        """A piece of a step, if it was measured at this shape."""
        return self._parts.get((kind, shape))

    @cached_property
    def _products(self) -> dict[tuple[int, int, int, Precision], float]:
        return {(p.m, p.n, p.k, p.precision): p.seconds for p in self.products}

    @cached_property
    def _parts(self) -> dict[tuple[PartName, tuple[int, ...]], Part]:
        return {(p.kind, p.shape): p for p in self.parts}

    @cached_property
    def _curves(self) -> dict[tuple[Collective, int, int], Curve]:
        return {(c.kind, c.stride, c.size): c for c in self.curves}

    def ring(self, *, stride: int, size: int) -> Ring:
        """The ring of `size` ranks, each `stride` from the next, while all sibling groups communicate.

        A group that fits in a node takes the measured ring. One that spans nodes shares the node's
        network with its siblings: `min(devices_per_node, stride)` of them (Singh et al. 2024, section V).
        """
        known = self._rings.get((stride, size))
        if known is None:
            known = self._rings[stride, size] = self._ring(stride, size)
        return known

    @cached_property
    def _rings(self) -> dict[tuple[int, int], Ring]:
        return {}

    def _ring(self, stride: int, size: int) -> Ring:
        node = self.devices_per_node
        if stride * size <= node and self.rings:
            return min(self.rings, key=lambda r: (abs(r.stride - stride), abs(r.size - size)))
        nodes = max(2, stride * size // node)
        shared = self.node_bytes_per_s * self._network_share(nodes) / min(node, stride)
        inside = max(
            (r.bytes_per_s for r in self.rings if r.stride * r.size == node), default=shared
        )
        return Ring(
            stride=stride, size=size,
            bytes_per_s=min(shared, inside) if stride < node else shared,
            latency_s=self.network_latency_s * min(size, nodes),
        )  # fmt: skip

    def seconds(self, kind: Collective, payload: float, *, stride: int, size: int) -> float:
        """Of a collective whose full tensor has `payload` bytes: as measured, or in a ring."""
        if size == 1:
            return 0.0
        if curve := self._curves.get((kind, stride, size)):
            return curve.seconds(payload)
        ring = self.ring(stride=stride, size=size)
        rounds = 2 if kind == "all_reduce" else 1
        return ring.latency_s * rounds + rounds * (size - 1) / size * payload / ring.bytes_per_s

    def crosses_nodes(self, *, stride: int, size: int) -> bool:
        """True where such a group spans nodes."""
        return stride * size > self.devices_per_node

    def _network_share(self, nodes: int) -> float:
        return min(self.network_shares, key=lambda entry: abs(entry[0] - nodes))[1]

    def save(self, path: StrPath) -> None:
        """Write it as JSON, which `load` reads."""
        Path(path).write_text(json.dumps(strict(to_json(self)), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: StrPath) -> Machine:
        """A machine that `save` or `fourfold probe` wrote.

        Raises:
            ValueError: The file holds something else.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            machine = from_json(json.loads(text))
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} holds no machine ({error}); `fourfold probe` writes one"
            ) from error
        if not isinstance(machine, Machine):
            raise ValueError(f"{path} holds no machine; `fourfold probe` writes one")
        return machine
