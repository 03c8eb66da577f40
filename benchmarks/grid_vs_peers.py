"""Step time and memory of the grid beside DDP, FSDP2, FSDP2 with tensor parallel, DeepSpeed ZeRO-1.

    JAXTYPING_DISABLE=1 scripts/env python benchmarks/grid_vs_peers.py RANKS WIDTH times|memory

The same Llama, batch and AdamW on gloo ranks of this machine, one thread each. The contenders live
in the same processes and take turns within each round, so that a busy machine slows all alike; what
is reported is the ratio to DDP within the round, on one rank to plain torch: there every axis has
size one. Memory is the growth of a rank's peak resident set
from before the model is built to after three steps, each contender in processes of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.testing.ranks import run_on_ranks

BATCH, SEQUENCE, ROUNDS = 8, 128, 25
Step = Callable[[Tensor], None]


def config(width: int) -> LlamaConfig:
    """Four layers of a width."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=3 * width, vocab_size=2048, max_position_embeddings=SEQUENCE,
        use_cache=False,
    )  # fmt: skip


def fresh(width: int) -> Any:
    """The same model on every rank and for every contender."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(width), attn_implementation="sdpa")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same optimizer for all."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def share(tokens: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's rows of the batch."""
    return tokens.chunk(ranks)[rank]


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, ranks: int) -> Step:
    """A step of stock torch code."""

    def step(tokens: Tensor) -> None:
        mine = share(tokens, rank, ranks)
        model(input_ids=mine, labels=mine).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(width: int) -> Step:
    """Torch without any wrapper."""
    model = fresh(width)
    return plain_step(model, adamw(model), rank=0, ranks=1)


def ddp(width: int) -> Step:
    """Torch DistributedDataParallel."""
    model = DistributedDataParallel(fresh(width))
    return plain_step(model, adamw(model), dist.get_rank(), dist.get_world_size())


def fsdp2(width: int) -> Step:
    """Torch fully_shard, each decoder layer one unit."""
    model = fresh(width)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return plain_step(model, adamw(model), dist.get_rank(), dist.get_world_size())


def fsdp2_with_tensor_parallel(width: int) -> Step:
    """Two tensor-parallel ranks by torch's DTensor plan, fully_shard over the others."""
    model = fresh(width)
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("shard", "tensor"))
    column, row = ColwiseParallel(), RowwiseParallel()
    plan = {
        "self_attn.q_proj": column, "self_attn.k_proj": column, "self_attn.v_proj": column,
        "self_attn.o_proj": row, "mlp.gate_proj": column, "mlp.up_proj": column,
        "mlp.down_proj": row,
    }  # fmt: skip
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tensor"], plan)
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    mine, shares = mesh["shard"].get_local_rank(), ranks // 2

    def step(tokens: Tensor) -> None:
        rows = share(tokens, mine, shares)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()  # without clipping: its norm cannot mix the two meshes
        optimizer.zero_grad()

    return step


def deepspeed_zero_1(width: int) -> Step:
    """DeepSpeed, which cuts the optimizer's state over the ranks."""
    import deepspeed

    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    model = fresh(width)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw(model),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": BATCH // ranks,
            "zero_optimization": {"stage": 1},
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**12,
        },
    )

    def step(tokens: Tensor) -> None:
        mine = share(tokens, rank, ranks)
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()

    return step


def fourfold(width: int, *, keeps_tiles: bool = False, **sizes: int) -> Step:
    """A grid, behind the seam of the training loop."""
    model = fresh(width)
    optimizer = adamw(model)
    engine = Fourfold(
        data=sizes.get("data", 1),
        depth=sizes.get("depth", 1),
        row=sizes.get("row", 1),
        col=sizes.get("col", 1),
        keeps_tiles=keeps_tiles,
    )
    opened = engine.open(model, optimizer, precision="fp32", batch=BATCH, microbatch=BATCH)
    session = opened.__enter__()

    def step(tokens: Tensor) -> None:
        assert opened  # the session lives as long as its context
        mine = share(tokens, session.rank, session.ranks)
        with session.microbatch(is_last=True):
            session.backward(session.model(input_ids=mine, labels=mine).loss)
        session.update(1.0)

    return step


def contenders(ranks: int) -> dict[str, Callable[[int], Step]]:
    """Every contender on this number of ranks, from a width."""
    if ranks == 1:
        return {"plain": plain, "fourfold": fourfold}
    found: dict[str, Callable[[int], Step]] = {
        "ddp": ddp,
        "fsdp2": fsdp2,
        "fsdp2_tensor_2": fsdp2_with_tensor_parallel,
        "deepspeed_zero_1": deepspeed_zero_1,
    }
    for axis in ("data", "depth", "row", "col"):
        found[f"fourfold_{axis}_{ranks}"] = partial(fourfold, **{axis: ranks})
    found[f"fourfold_depth_{ranks}_keeping_tiles"] = partial(
        fourfold, depth=ranks, keeps_tiles=True
    )
    if ranks == 4:
        found["fourfold_data_2_row_2"] = partial(fourfold, data=2, row=2)
        found["fourfold_data_2_depth_2"] = partial(fourfold, data=2, depth=2)
    return found


def batch_of(width: int) -> Tensor:
    """The batch of all ranks."""
    vocabulary = config(width).vocab_size
    return torch.randint(0, vocabulary, (BATCH, SEQUENCE), generator=torch.Generator())


def measure(width: int, rounds: int) -> dict[str, list[float] | str]:
    """Step times in seconds by contender, or why there are none."""
    steps: dict[str, Step] = {}
    times: dict[str, list[float] | str] = {}
    tokens = batch_of(width)
    for name, make in contenders(dist.get_world_size()).items():
        try:
            steps[name] = make(width)
            for _ in range(2):  # the first steps make buffers and learn orders
                steps[name](tokens)
        except Exception as error:  # noqa: BLE001 - a contender that cannot run here is reported
            steps.pop(name, None)
            times[name] = f"{type(error).__name__}: {error}"[:200]
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            dist.barrier()
            started_s = time.perf_counter()
            step(tokens)
            dist.barrier()
            seen[name].append(time.perf_counter() - started_s)
    return times | copy.copy(seen)


def growth(name: str, width: int) -> int:
    """Bytes by which a rank's peak resident set grew over three steps of a contender."""
    tokens = batch_of(width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = contenders(dist.get_world_size())[name](width)
    for _ in range(3):
        step(tokens)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def grown(name: str, ranks: int, width: int) -> int | None:
    """The largest growth of any rank, in processes of their own; None where it cannot run."""
    command = [sys.executable, __file__, str(ranks), str(width), "memory", "--contender", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def times(ranks: int, width: int) -> dict[str, Any]:
    """Step times in seconds, and the median over rounds of the ratio to the reference."""
    seen = run_on_ranks(ranks, measure, width=width, rounds=ROUNDS)[0]
    reference_name = "ddp" if ranks > 1 else "plain"
    reference = seen[reference_name]
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, reference, strict=True))
        for name, values in seen.items()
        if not isinstance(values, str)
    }
    return {"rounds": ROUNDS, "step_s": seen, f"median_ratio_to_{reference_name}": ratios}


def memory(ranks: int, width: int, only: list[str]) -> dict[str, Any]:
    """Growth of the peak resident set, of the contenders named or of all."""
    names = only or contenders(ranks)
    return {"peak_growth_bytes": {name: grown(name, ranks, width) for name in names}}


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("ranks", type=int, choices=(1, 2, 4))
    arguments.add_argument("width", type=int, help="of the model, a multiple of 16")
    arguments.add_argument("what", choices=("times", "memory"))
    arguments.add_argument("--out", type=Path, help="JSON lines to append to")
    arguments.add_argument("--contender", help="one process of `memory`: this one")
    arguments.add_argument("--only", nargs="*", default=[], help="`memory` of these contenders")
    asked = arguments.parse_args()
    if asked.contender:
        print(max(run_on_ranks(asked.ranks, growth, name=asked.contender, width=asked.width)))
        return
    load = os.getloadavg()[0]
    found = (
        times(asked.ranks, asked.width)
        if asked.what == "times"
        else memory(asked.ranks, asked.width, asked.only)
    )
    record = {
        "event": "grid_vs_peers", "ranks": asked.ranks, "batch": BATCH, "sequence": SEQUENCE,
        "model": config(asked.width).to_diff_dict(), "torch": torch.__version__,
        "cores": os.cpu_count(), "load_1min_before": load, **found,
    }  # fmt: skip
    print(json.dumps({name: found[name] for name in found if name != "step_s"}, indent=2))
    if asked.out:
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
