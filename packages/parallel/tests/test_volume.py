"""What is communicated is the table of `grid/linear.py`: calls and bytes per axis, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fourfold_parallel.grid.collectives import Trace, TraceEvent
from fourfold_parallel.grid.linear import Linear, bias_cut, weight_cut
from fourfold_parallel.grid.products import Products
from fourfold_parallel.grid.schedule import Overlaps, Schedule
from fourfold_parallel.testing.grids import Sizes, factorisations, mesh_of
from fourfold_parallel.testing.ranks import run_on_ranks

K, N, TOKENS, ELEMENT = 16, 32, 64, 8
"""Inputs, outputs and tokens that every grid of 8 divides; bytes of a float64."""


def one_layer(sizes: Sizes, *, swapped: bool, keeps_tile: bool) -> list[TraceEvent]:
    """The events of the second forward and backward of one layer."""
    trace = Trace()
    mesh = mesh_of(sizes).observed(trace)
    schedule = Schedule(Overlaps())
    weight = mesh.distribute(torch.randn(N, K).double(), weight_cut(swapped=swapped))
    bias = mesh.distribute(torch.randn(N).double(), bias_cut(swapped=swapped))
    layer = Linear(
        nn.Parameter(weight), nn.Parameter(bias), mesh=mesh, name="layer", schedule=schedule,
        swapped=swapped, keeps_tile=keeps_tile, products=Products(),
    )  # fmt: skip
    for _ in range(2):
        trace.events.clear()
        schedule.restart()
        features = K // layer.contracted.size
        x = torch.randn(TOKENS // mesh.batch_size(), features, dtype=torch.float64)
        layer(x.requires_grad_()).sum().backward()
    return trace.events


def expected(
    sizes: Sizes, *, swapped: bool, keeps_tile: bool
) -> dict[tuple[str, str], tuple[int, int]]:
    """The table of `grid/linear.py`, row by row."""
    data, depth, row, col = sizes
    contracted, produced = ("row", "col") if swapped else ("col", "row")
    n_parts, k_parts = (col, row) if swapped else (row, col)
    tokens = TOKENS // (data * depth)
    tile = N * K // (row * col) * ELEMENT
    gathers = 1 if keeps_tile else 2
    table = {
        ("depth", "all_gather"): (gathers, gathers * tile),
        ("depth", "reduce_scatter"): (1, tile),
        ("depth", "all_reduce"): (1, N // n_parts * ELEMENT),
        (contracted, "all_reduce"): (1, tokens * N // n_parts * ELEMENT),
        (produced, "all_reduce"): (1, tokens * K // k_parts * ELEMENT),
    }
    size = {"depth": depth, "row": row, "col": col}
    return {key: value for key, value in table.items() if size[key[0]] > 1}


@pytest.mark.parametrize("sizes", factorisations(8), ids=str)
def test_a_layer_communicates_what_its_table_says(sizes: Sizes) -> None:
    """Nothing more, nothing on an axis of size one, and the same sequence on every rank."""
    for swapped in (False, True):
        for keeps_tile in (False, True):
            how = {"swapped": swapped, "keeps_tile": keeps_tile}
            first, *others = run_on_ranks(8, one_layer, sizes=sizes, **how)
            assert Trace(events=first).volume() == expected(sizes, **how)
            assert all(events == first for events in others)
