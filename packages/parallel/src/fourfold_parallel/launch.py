"""This process's launch: its ranks, its device, its process group.

`torchrun` and `accelerate launch` leave the same few variables, `srun` others, which `adopt_slurm`
translates; they are read here only.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


def adopt_slurm() -> None:
    """Take ranks and meeting point from Slurm, where `srun` started several tasks by itself.

    Does nothing under another launcher, or for a single task.
    """
    environ = os.environ
    if "RANK" in environ or int(environ.get("SLURM_NTASKS", "1")) == 1:
        return
    if "SLURM_PROCID" not in environ:
        return
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = environ["SLURM_NTASKS"]
    environ.setdefault("MASTER_ADDR", environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    # The same on every rank, and another for a second job on the same node.
    environ.setdefault("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 20000))


def world_size() -> int:
    """Ranks of this launch; 1 for a process that was started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """True in a process that a launcher started, alone or with others."""
    return "RANK" in os.environ


def relaunch(arguments: Sequence[str], *, ranks: int) -> None:
    """Start this program again on so many ranks of this node, by torchrun, and wait for its end.

    Raises:
        ValueError: A rank failed; it has said why.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        "-m", "fourfold_parallel", *arguments,
    ]  # fmt: skip
    if subprocess.run(command, check=False).returncode:  # noqa: S603 - this program itself
        raise ValueError(f"a rank of {ranks} failed; its message stands above")


def local_world_size() -> int:
    """Ranks of this launch on this node; without a launcher's word, all ranks of the process group."""
    ranks = dist.get_world_size() if dist.is_initialized() else world_size()
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))


def is_main_rank() -> bool:
    """True on the launch's first process, which writes."""
    return os.environ.get("RANK", "0") == "0"


def device() -> torch.device:
    """This rank's GPU, by its number on the node, or the CPU.

    Where the launcher shows each rank its own GPU only, that one is number 0.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def check_launched(engine: str) -> None:
    """Refuse a process that has no process group and was not launched in one.

    Raises:
        ValueError: It was not; the engine and the way out are named.
    """
    if "RANK" not in os.environ and not dist.is_initialized():
        raise ValueError(
            f"engine {engine} needs a process group, but this process was not launched in one; "
            "start the run with `torchrun --nproc-per-node N` (N=1 will do), or use Single"
        )


@contextmanager
def process_group(on: torch.device) -> Iterator[None]:
    """The launch's process group: gloo on CPUs, NCCL on GPUs; one made here ends with the scope."""
    if dist.is_initialized():
        yield
        return
    how: dict[str, Any] = {"timeout": patience(), **_meeting_place()}
    if on.type == "cuda":
        torch.cuda.set_device(on)
        dist.init_process_group("nccl", device_id=on, **how)
    else:
        dist.init_process_group("gloo", **how)
    try:
        yield
    except RuntimeError:
        raise  # where a collective failed, others are under way, and to destroy the group waits for them
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meeting_place() -> dict[str, Any]:
    """The launcher's store, under a name of this attempt; nothing where the launcher has none.

    torchrun keeps one store for all its restarts (torch 2.13). What an earlier attempt has left there would
    be taken for the present one's: addresses at which nobody answers any more.
    """
    environ = os.environ
    if "TORCHELASTIC_RESTART_COUNT" not in environ:
        return {}
    store, rank, size = next(rendezvous("env://", timeout=patience()))
    attempt = f"{environ['TORCHELASTIC_RESTART_COUNT']} of {size}"
    return {
        "store": dist.distributed_c10d.PrefixStore(attempt, store),
        "rank": rank,
        "world_size": size,
    }


@functools.cache
def patience() -> timedelta:
    """The time for which a rank waits for others: `FOURFOLD_PATIENCE_S`, else ten minutes."""
    return timedelta(seconds=float(os.environ.get("FOURFOLD_PATIENCE_S", "600")))


class Ranks:
    """All ranks of this launch, on a communicator of their own, on the CPU.

    What it does disturbs no collective of the training, and may be called from another thread. Every rank
    makes it, at the same time; one process alone is a launch of one rank.
    """

    def __init__(self) -> None:
        self.size: int = dist.get_world_size() if dist.is_initialized() else 1
        self.rank: int = dist.get_rank() if dist.is_initialized() else 0
        self.group: dist.ProcessGroup | None = None
        if self.size > 1:
            made: Any = dist.new_group(backend="gloo", timeout=patience())
            self.group = made

    def gather(self, value: Any) -> list[Any]:
        """The value that each rank gave, in their order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """A tensor on the CPU, summed over all ranks."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def table(self, row: Sequence[float]) -> Tensor:
        """Each rank's row of numbers, float64, [ranks, numbers]."""
        mine = torch.tensor(row, dtype=torch.float64)
        if self.group is None:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self.group)
        return torch.stack(rows)
