"""The sum of gradients over data: whatever arrives in a step is summed, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fourfold_parallel.grid.gradients import DataReducer, local
from fourfold_parallel.testing.grids import mesh_of
from fourfold_parallel.testing.ranks import run_on_ranks

SHAPES = ((3, 4), (5,), (2, 2), (0, 4))
"""The last is a piece without elements, as a grid larger than a matrix has."""
STEPS = ((0, 1, 2, 3), (2, 0), (1, 3), (2, 1, 3, 0))
"""Which parameters a step uses; a bucket that all of them share is whole in the first and the last."""


def given(step: int, index: int, rank: int) -> Tensor:
    """The gradient that a rank has for a parameter."""
    random = torch.Generator().manual_seed(100 * step + 10 * index + rank)
    return torch.randint(-8, 8, SHAPES[index], generator=random).float()


def what_arrives_is_summed(bucket_bytes: int, on_grid: bool) -> None:
    mesh = mesh_of((2, 1, 1, 1))
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    if on_grid:
        parameters = [nn.Parameter(mesh.distribute(p.detach(), {})) for p in parameters]
    reducer = DataReducer(parameters, mesh, bucket_bytes=bucket_bytes)
    expected: dict[int, Tensor] = {}
    places: list[dict[int, int]] = []
    for step, used in enumerate(STEPS):
        for index in used:
            parameters[index].grad = None
            expected[index] = given(step, index, 0) + given(step, index, 1)
        with reducer.hold():  # a first microbatch, whose gradients wait for the second
            _backward(parameters, used, step, mesh.data.rank, 0.5)
        _backward(parameters, used, step, mesh.data.rank, 0.5)
        for index, total in expected.items():
            assert torch.equal(local(parameters[index].grad), total), (step, index)
        places.append({index: local(parameters[index].grad).data_ptr() for index in used})
    assert places[0] == places[3]  # the memory of a gradient is that of its bucket


def _backward(
    parameters: list[nn.Parameter], used: tuple[int, ...], step: int, rank: int, scale: float
) -> None:
    terms = []
    for index in used:
        parameter = parameters[index]
        piece = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        terms.append((piece * given(step, index, rank)).sum() * scale)
    torch.stack(terms).sum().backward()


@pytest.mark.parametrize("on_grid", [False, True], ids=["plain", "grid"])
@pytest.mark.parametrize("bucket_bytes", [1, 60, 1 << 20])
def test_what_arrives_is_summed_and_what_does_not_is_left_alone(
    bucket_bytes: int, on_grid: bool
) -> None:
    """Alone, two in a bucket, all in one; in steps that use some of the parameters only."""
    run_on_ranks(2, what_arrives_is_summed, bucket_bytes=bucket_bytes, on_grid=on_grid)


def a_sum_is_never_summed_again(reentrant: bool) -> None:
    mesh = mesh_of((2, 1, 1, 1))
    parameter = nn.Parameter(torch.ones(3))
    DataReducer([parameter], mesh)
    x = torch.ones(3, requires_grad=True)
    if reentrant:
        for _ in range(2):
            x = checkpoint(lambda one: one * parameter, x, use_reentrant=True)
            assert isinstance(x, Tensor)
    else:
        (x * parameter).sum().backward()
        x = x * parameter
    with pytest.raises(RuntimeError, match="on top of its sum over data"):
        x.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["uncleared", "reentrant"])
def test_what_was_summed_is_never_summed_again(reentrant: bool) -> None:
    """After a step without clearing; and in two regions of reentrant checkpointing."""
    run_on_ranks(2, a_sum_is_never_summed_again, reentrant=reentrant)
