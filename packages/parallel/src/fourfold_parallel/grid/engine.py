"""The four-dimensional engine: a recipe's model and optimizer on a grid, for the training loop."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fourfold_parallel.grid.gradients import DataReducer, clip_gradients
from fourfold_parallel.grid.huggingface import Parallel, parallelize
from fourfold_parallel.grid.mesh import AxisName, Mesh, check_sizes
from fourfold_parallel.grid.schedule import ALL_OVERLAPS, Overlaps
from fourfold_parallel.grid.zero import ShardedReducer


@dataclass(frozen=True, slots=True, kw_only=True)
class Fourfold:
    """A grid of `data * depth * row * col` ranks (AxoNN); they multiply to the ranks launched."""

    data: int
    """Replicas of the model."""
    depth: int
    """Ranks that share a replica's batch and hold pieces of every weight."""
    row: int
    """Parts of heads, hidden units and vocabulary."""
    col: int
    """Parts of the residual stream."""
    overlaps: Overlaps = ALL_OVERLAPS
    """Which communication runs under computation."""
    shards_optimizer: bool = False
    """Cut the optimizer's state over data (ZeRO-1)."""

    @contextmanager
    def open(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Literal["fp32", "bf16"],
        batch: int,
        microbatch: int,  # noqa: ARG002 - the protocol's
    ) -> Iterator[GridSession]:
        """A session over all launched ranks; gloo on CPUs, NCCL on GPUs.

        Raises:
            ValueError: The grid does not fit the ranks, the batch or the model.
        """
        sizes: dict[AxisName, int] = {
            "data": self.data, "depth": self.depth, "row": self.row, "col": self.col,
        }  # fmt: skip
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        check_sizes(sizes, dist.get_world_size() if dist.is_initialized() else launched)
        shares = self.data * self.depth
        if batch % shares:
            raise ValueError(
                f"batch={batch} does not divide over data={self.data} * depth={self.depth}; "
                f"use a multiple of {shares}"
            )
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"engine Fourfold lays out transformers models, not {type(model).__name__}; "
                "use a PreTrainedModel, or another engine"
            )
        device = _device()
        with _process_group(device):
            mesh = Mesh(**sizes, device=device.type)
            yield GridSession(model, optimizer, mesh, self, device, precision)


class GridSession:
    """A model and its optimizer on a grid."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        engine: Fourfold,
        device: torch.device,
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self.rank: int = mesh.batch_rank()
        self.ranks: int = mesh.batch_size()
        self.is_main: bool = dist.get_rank() == 0
        self.device: torch.device = device
        before = {id(p): name for name, p in model.named_parameters()}
        self.parallel: Parallel = parallelize(model, mesh, overlaps=engine.overlaps)
        self.model: nn.Module = model
        self.optimizer: torch.optim.Optimizer = optimizer
        after = dict(model.named_parameters())
        self._stepped = {name: after[name] for name in before.values()}
        self._reducer: DataReducer | ShardedReducer = self.parallel.reducer
        if engine.shards_optimizer:
            self.parallel.reducer.remove()
            self._reducer = ShardedReducer([*model.parameters()], mesh)
            shares = self._reducer.shares
            self._stepped = {name: shares.get(p, p) for name, p in self._stepped.items()}
        for group in optimizer.param_groups:
            group["params"] = [self._stepped[before[id(p)]] for p in group["params"]]
        self._names = {id(p): name for name, p in self._stepped.items()}
        self._mesh, self._precision = mesh, precision

    @contextmanager
    def microbatch(self, *, is_last: bool) -> Iterator[None]:
        """The scope of one forward and backward; only the last sums gradients over data."""
        casts = self._precision == "bf16"
        autocast = torch.autocast(self.device.type, torch.bfloat16) if casts else nullcontext()
        held: AbstractContextManager[None] = nullcontext() if is_last else self._reducer.hold()
        with held, autocast:
            yield

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Backpropagate this rank's share of the loss."""
        loss.backward()

    def update(self, max_grad_norm: float) -> float:
        """Clip to a global 2-norm, step, clear gradients; gives the norm before clipping."""
        norm = clip_gradients([*self._stepped.values()], self._mesh, max_norm=max_grad_norm)
        self.optimizer.step()
        if isinstance(self._reducer, ShardedReducer):
            self._reducer.gather()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def sum(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A tensor summed over all shares of the batch."""
        return self._mesh.sum_over_batch(value)

    def save(self, folder: Path) -> None:
        """Write the published weights, and the optimizer's state under their names."""
        self._write(folder / "model.safetensors", dict(self.parallel.published()))
        names = self._names
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for parameter, values in self.optimizer.state.items():
            name = names[id(parameter)]
            for key, value in values.items():
                if isinstance(value, DTensor):
                    how = self.parallel.stored[name]
                    tensors[f"{name}/{key}"] = how.publish(value.full_tensor())
                elif isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                else:
                    numbers[f"{name}/{key}"] = value
        self._write(folder / "optimizer.safetensors", tensors)
        if self.is_main:
            groups = self.optimizer.state_dict()["param_groups"]
            named = [
                {**group, "params": [names[id(p)] for p in own["params"]]}
                for group, own in zip(groups, self.optimizer.param_groups, strict=True)
            ]
            (folder / "optimizer.json").write_text(
                json.dumps({"numbers": numbers, "param_groups": named}), encoding="utf-8"
            )
        self.wait()

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote on any grid, reading this rank's pieces only."""
        self.parallel.load(folder / "model.safetensors")
        saved = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
        for group, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=True):
            own.update({key: value for key, value in group.items() if key != "params"})
        state: dict[str, dict[str, Any]] = {}
        with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
            for path in file.keys():  # noqa: SIM118 - not a dict
                name, _, key = path.rpartition("/")
                state.setdefault(name, {})[key] = self._moment(file, path, name)
        for path, number in saved["numbers"].items():
            name, _, key = path.rpartition("/")
            state.setdefault(name, {})[key] = number
        for name, values in state.items():
            self.optimizer.state[self._stepped[name]] = values

    def wait(self) -> None:
        """Return when every rank has called this."""
        dist.barrier()

    def _moment(self, file: Any, path: str, name: str) -> Tensor:
        """A tensor of the optimizer's state: cut as its parameter if it has the same shape."""
        view, parameter = file.get_slice(path), self._stepped[name]
        how = self.parallel.stored[name]
        assert isinstance(parameter, DTensor)
        shape = tuple(view.get_shape())
        if not shape or how.keep_shape(torch.Size(shape)) != tuple(parameter.shape):
            return file.get_tensor(path)
        cut, kept = self._mesh.cut_of(parameter), how.keep_shape(torch.Size(shape))
        piece = how.read(view, self._mesh.slices(kept, cut), kept)
        return self._mesh.assemble(piece.to(self.device, copy=True), kept, cut)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        if self.is_main:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """The launch's process group; one that was made here does not outlive the run.

    Raises:
        ValueError: The process was not launched in a group.
    """
    if dist.is_initialized():
        yield
        return
    if "RANK" not in os.environ:
        raise ValueError(
            "engine Fourfold needs a process group, but this process was not launched in one; start "
            "the run with `torchrun --nproc-per-node N` (N=1 will do), or use Single"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
