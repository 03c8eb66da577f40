"""Helpers of the laws of the grid: its factorisations, its meshes, and the serial twin."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.grid.schedule import NO_OVERLAP, Overlaps

EXACT = 1e-10
"""Float64 sums in another order differ by about 1e-13 here; a missing term shows at order one."""

Sizes = tuple[int, int, int, int]

OVERLAPS = {
    "none": NO_OVERLAP,
    "input_gradient": Overlaps(weight_gradient=False, weights=False),
    "weight_gradient": Overlaps(input_gradient=False, weights=False),
    "weights": Overlaps(input_gradient=False, weight_gradient=False),
    "all": Overlaps(),
}


def factorisations(ranks: int) -> list[Sizes]:
    """Every (data, depth, row, col) whose product is `ranks`."""
    divisors = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return [
        (data, depth, row, ranks // (data * depth * row))
        for data in divisors
        for depth in divisors
        for row in divisors
        if ranks % (data * depth * row) == 0
    ]


@lru_cache
def mesh_of(sizes: Sizes) -> Mesh:
    """The grid of these sizes; made once per process."""
    assert math.prod(sizes) == dist.get_world_size()
    data, depth, row, col = sizes
    return Mesh(data=data, depth=depth, row=row, col=col)


def piece_of(whole: Tensor, like: Tensor, mesh: Mesh) -> Tensor:
    """The piece of a serial tensor that this rank should hold of a parameter."""
    assert isinstance(like, DTensor)
    return whole[mesh.slices(whole.shape, mesh.cut_of(like))]


def summed_over_data(gradient: Tensor | None, mesh: Mesh) -> Tensor:
    """This rank's piece of a gradient, summed over data as the reducer would."""
    assert isinstance(gradient, DTensor)
    return mesh.data.all_reduce(gradient.to_local().clone()).wait()


def close(ours: Tensor, serial: Tensor, *, what: str, tolerance: float = EXACT) -> None:
    """Raise unless two tensors agree within `tolerance`, absolutely, in every element."""
    assert ours.shape == serial.shape, f"{what}: {tuple(ours.shape)} is not {tuple(serial.shape)}"
    error = (ours.detach() - serial.detach()).abs().max().item() if ours.numel() else 0.0
    assert error <= tolerance, f"{what}: largest difference {error:.3g}, allowed {tolerance:.3g}"


def generator(seed: int) -> torch.Generator:
    """The same random numbers on every rank."""
    return torch.Generator().manual_seed(seed)


def in_float64(model: nn.Module, names: str = "*") -> nn.Module:
    """The serial twin: the model's own files, with norms that stay in float64."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and fnmatchcase(name, names):
            model.set_submodule(name, _WideRMSNorm(module))
    return model


class _WideRMSNorm(nn.Module):
    """The RMSNorm of the model files, without their detour through float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.epsilon: float = getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0))
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return (
            x
            / (x.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt()
            * (self.offset + self.weight)
        )
