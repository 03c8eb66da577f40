"""The authors' own model: communication alone, as their script computes it.

It ranks the grids of a GPT by the time of their collectives, without computation, memory or overlap. It is
kept as it is to stand beside ours: the rankings that their script gives are reproduced to six decimals.
Its last linear layer of a block has inputs and outputs exchanged; so it is there.

Singh et al. 2024, section V; axonn-ai/Megatron-AxoNN, branch gordon-bell-perlmutter, examples/comm_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fourfold_parallel.plan.job import Layout, grids
from fourfold_parallel.plan.machine import GIB

GRADIENT_BYTES = 4
ELEMENT_BYTES = 2
FORWARDS = 2
"""Every activation is recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Bandwidths of the authors' script, in GiB/s."""

    devices_per_node: int
    inside: Mapping[tuple[int, int], float]
    """By (ranks of the faster axes, size)."""
    between: Callable[[int], float]
    """By ranks of the faster axes."""

    def bytes_per_s(self, *, faster: int, size: int) -> float:
        """Of a ring along an axis."""
        if faster * size <= self.devices_per_node:
            return self.inside[faster, size] * GIB
        return self.between(faster) * GIB


PERLMUTTER = Links(
    devices_per_node=4,
    inside={(1, 2): 76, (1, 4): 225, (2, 2): 76},
    between=lambda faster: {1: 80.0, 2: 40.0}.get(faster, 20.0),
)
FRONTIER = Links(
    devices_per_node=8,
    inside={(1, 2): 129, (1, 4): 52, (1, 8): 135, (2, 2): 50, (2, 4): 72, (4, 2): 36},
    between=lambda faster: {1: 40.0, 2: 20.0, 4: 10.0}.get(faster, 5.0),
)


def communication_seconds(
    layout: Layout, links: Links, *, layers: int, width: int, batch: int, sequence: int
) -> float:
    """Of a step's collectives, by the authors' equations."""
    sizes = {"col": layout.col, "row": layout.row, "depth": layout.depth, "data": layout.data}
    faster, per_byte = 1, {}
    for axis, size in sizes.items():
        rate = links.bytes_per_s(faster=faster, size=size) if size > 1 else 1.0
        per_byte[axis] = (size - 1) / size / rate
        faster *= size
    tokens = batch * sequence / (layout.depth * layout.data)
    total = 0.0
    for outputs, inputs, swapped, exchanged in (
        (3 * width, width, False, False),
        (width, width, True, False),
        (4 * width, width, False, False),
        (width, 4 * width, True, True),
    ):
        tile = outputs * inputs / (layout.row * layout.col)
        total += 2 * GRADIENT_BYTES * tile / layout.depth * per_byte["data"]
        total += 3 * ELEMENT_BYTES * tile * per_byte["depth"]
        produced, contracted = ("col", "row") if swapped else ("row", "col")
        n, k = (inputs, outputs) if exchanged else (outputs, inputs)
        sums = 2 * ELEMENT_BYTES * tokens
        total += FORWARDS * sums * n / sizes[produced] * per_byte[contracted]
        total += sums * k / sizes[contracted] * per_byte[produced]
    return layers * total


def ranking(
    links: Links,
    *,
    ranks: int,
    layers: int,
    width: int,
    batch: int,
    sequence: int,
    least_tensor: int,
) -> list[tuple[Layout, float]]:
    """The authors' ranking: grids of powers of two, and their seconds, fastest first.

    Args:
        links: The machine.
        ranks: Devices.
        layers: Decoder layers.
        width: Of the residual stream.
        batch: Sequences.
        sequence: Tokens.
        least_tensor: The fewest ranks that hold the model, which the authors gave by hand.
    """
    seconds = [
        (grid, communication_seconds(grid, links, layers=layers, width=width, batch=batch, sequence=sequence))
        for grid in grids(ranks)
        if grid.depth * grid.row * grid.col >= least_tensor
        and batch % (grid.data * grid.depth) == 0
        and all(size & (size - 1) == 0 for size in (grid.data, grid.depth, grid.row, grid.col))
    ]  # fmt: skip
    return sorted(seconds, key=lambda entry: entry[1])
