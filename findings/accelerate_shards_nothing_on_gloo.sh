#!/usr/bin/env bash
# accelerate 1.15.0 (torch 2.13.0) takes an fsdp_plugin on CPU ranks and shards nothing. Accelerator(cpu=True,
# fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)) reports DistributedType.MULTI_CPU, `prepare` wraps the model in
# DistributedDataParallel, every rank holds all parameters, and no word is said. torch's own fully_shard cuts the same model on
# the same gloo ranks. Benchmarks and tests of "FSDP2 on CPU" through accelerate are of replicas.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.4.6 2>/dev/null
cat >"$folder/seen.py" <<'PY'
import os
import sys
import warnings

import accelerate
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def held(model):
    return sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())


def rank_of_two(rank, store):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
        theirs = accelerator.prepare(torch.nn.Linear(64, 64, bias=False))
    of_sharding = [str(w.message) for w in said if "fsdp" in str(w.message).lower() or "shard" in str(w.message).lower()]
    plain = torch.nn.Linear(64, 64, bias=False)
    fully_shard(plain, mesh=init_device_mesh("cpu", (2,)))
    if rank == 0:
        print("accelerate", accelerate.__version__, "torch", torch.__version__)
        print(
            f"accelerate with fsdp_plugin: {accelerator.distributed_type}, {type(theirs).__name__}, rank 0 holds "
            f"{held(theirs)} of 4096, warnings about it: {len(of_sharding)}"
        )
        print(f"torch's fully_shard: rank 0 holds {held(plain)} of 4096")
    assert (type(theirs).__name__, held(theirs), held(plain), of_sharding) == ("DistributedDataParallel", 4096, 2048, [])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_of_two, args=(sys.argv[1],), nprocs=2)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/seen.py" "$folder/store" 2>/dev/null
# Seen:
# accelerate 1.15.0 torch 2.13.0+cpu
# accelerate with fsdp_plugin: DistributedType.MULTI_CPU, DistributedDataParallel, rank 0 holds 4096 of 4096, warnings about it: 0
# torch's fully_shard: rank 0 holds 2048 of 4096
