"""A linear layer on the grid is the linear layer: laws, on every factorisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fourfold_parallel.grid.linear import Linear, bias_cut, weight_cut
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.grid.products import Products
from fourfold_parallel.grid.schedule import Schedule
from fourfold_parallel.testing.grids import (
    OVERLAPS,
    Sizes,
    close,
    factorisations,
    generator,
    mesh_of,
    piece_of,
    summed_over_data,
)
from fourfold_parallel.testing.ranks import run_on_ranks

TOKENS, WIDTH, HIDDEN = (24, 1), 10, 14
"""Neither 10 nor 14 divides by 4 or 8: pieces are unequal, and some are empty."""


def on_grid(
    dense: nn.Linear, mesh: Mesh, schedule: Schedule, *, swapped: bool, **how: bool
) -> Linear:
    weight = mesh.distribute(dense.weight.detach(), weight_cut(swapped=swapped))
    bias = mesh.distribute(dense.bias.detach(), bias_cut(swapped=swapped))
    return Linear(
        nn.Parameter(weight),
        nn.Parameter(bias),
        mesh=mesh,
        name="swapped" if swapped else "plain",
        schedule=schedule,
        swapped=swapped,
        products=Products(),
        **how,
    )


def share(tensor: Tensor, mesh: Mesh) -> Tensor:
    """This rank's part of the batch."""
    return tensor.chunk(mesh.batch_size())[mesh.batch_rank()]


def columns(tensor: Tensor, axis_name: str, mesh: Mesh) -> Tensor:
    axis = getattr(mesh, axis_name)
    start, stop = axis.bounds(tensor.shape[-1])
    return tensor[..., start:stop]


def layer_is_dense(sizes: Sizes, overlaps: list[str], steps: int) -> None:
    for name in overlaps:
        for swapped in (False, True):
            mesh = mesh_of(sizes)
            random = generator(1)
            torch.manual_seed(0)
            dense = nn.Linear(WIDTH, HIDDEN, dtype=torch.float64)
            layer = on_grid(dense, mesh, Schedule(OVERLAPS[name]), swapped=swapped)
            for step in range(steps):
                x = torch.randn(*TOKENS, WIDTH, dtype=torch.float64, generator=random)
                dy = torch.randn(*TOKENS, HIDDEN, dtype=torch.float64, generator=random)
                one_step(dense, layer, x, dy, what=f"{sizes} {name} swapped={swapped} {step}")


def one_step(dense: nn.Linear, layer: Linear, x: Tensor, dy: Tensor, *, what: str) -> None:
    mesh = layer.mesh
    contracted, produced = ("row", "col") if layer.swapped else ("col", "row")
    serial = x.clone().requires_grad_()
    dense.zero_grad()
    y = dense(serial)
    y.backward(dy)

    layer.schedule.restart()
    layer.zero_grad()
    mine = columns(share(x, mesh), contracted, mesh).clone().requires_grad_()
    out = layer(mine)
    out.backward(columns(share(dy, mesh), produced, mesh).contiguous())
    assert serial.grad is not None
    assert mine.grad is not None
    close(out, columns(share(y, mesh), produced, mesh), what=f"{what}: y")
    close(mine.grad, columns(share(serial.grad, mesh), contracted, mesh), what=f"{what}: dX")
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        expected = piece_of(getattr(dense, name).grad, parameter, mesh)
        close(summed_over_data(parameter.grad, mesh), expected, what=f"{what}: d{name}")


@pytest.mark.parametrize("sizes", factorisations(8), ids=str)
def test_a_layer_on_the_grid_is_the_dense_layer(sizes: Sizes) -> None:
    """Output and every gradient, plain and swapped, on unequal and empty pieces."""
    run_on_ranks(8, layer_is_dense, sizes=sizes, overlaps=["none", "all"], steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 6, 8])
def test_every_overlap_gives_the_dense_layer(ranks: int) -> None:
    for sizes in factorisations(ranks):
        run_on_ranks(ranks, layer_is_dense, sizes=sizes, overlaps=list(OVERLAPS), steps=3)
