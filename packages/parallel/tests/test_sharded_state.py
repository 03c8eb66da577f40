"""The state of a model that torch's `fully_shard` has cut: DTensors, weights and moments alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fourfold_parallel.run import checkpoint, shards
from fourfold_parallel.run.state import restoring, state_of
from fourfold_parallel.testing.ranks import run_on_ranks


def session_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return SimpleNamespace(
        model=model, is_main=dist.get_rank() == 0, wait=dist.barrier,
        state=lambda: state_of(model, optimizer),
        restoring=lambda saved: restoring(model, optimizer, saved),
    )  # fmt: skip


def built(*, cut: bool, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))  # rows that do not divide over ranks
    if cut:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def goes_both_ways(folder: Path) -> None:
    cut, plain = built(cut=True, seed=0), built(cut=False, seed=0)
    for model, optimizer in (cut, plain):
        step(model, optimizer)
    assert any(isinstance(parameter, DTensor) for parameter in cut[0].parameters())
    path = checkpoint.save(session_of(*cut), folder / "cut")
    whole = checkpoint.save(session_of(*plain), folder / "plain")
    tensors = [shards.Manifest.read(one).tensors for one in (path, whole)]
    assert tensors[0] == tensors[1]  # checksums of weights and moments
    for source, target in ((path, False), (whole, True)):
        model, optimizer = built(cut=target, seed=1)
        checkpoint.restore(session_of(model, optimizer), source)
        step(model, optimizer)
        step(*(plain if source == path else cut))
        for (name, ours), theirs in zip(
            model.named_parameters(),
            (plain if source == path else cut)[0].parameters(),
            strict=True,
        ):
            assert torch.equal(full(ours), full(theirs)), name


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_a_model_cut_by_torch_saves_and_loads_as_a_plain_one_does(tmp_path: Path) -> None:
    run_on_ranks(2, goes_both_ways, folder=tmp_path)
