#!/usr/bin/env bash
# torch 2.13.0: the communicators that torch.distributed.device_mesh.init_device_mesh makes do not take over the timeout of
# init_process_group. A launch that asks for 7 s waits 7 s where it uses the world's group, and half an hour for a rank that
# never comes where it uses an axis of a mesh; init_device_mesh has no argument named timeout. Everything that is built on meshes
# (FSDP2, tensor parallelism, a grid) then hangs for 30 minutes in jobs whose authors believed to have set the limit.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 2>/dev/null
cat >"$folder/seen.py" <<'PY'
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh


def limit(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def rank_of_four(rank, store):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=timedelta(seconds=7)
    )
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    limits = [limit(group) for group in (dist.group.WORLD, mesh.get_group("rows"), mesh.get_group("columns"))]
    if rank == 0:
        print("torch", torch.__version__)
        print("world {}, rows {}, columns {}".format(*limits))
    assert limits == [timedelta(seconds=7), timedelta(minutes=30), timedelta(minutes=30)]
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_of_four, args=(sys.argv[1],), nprocs=4)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/seen.py" "$folder/store" 2>/dev/null
# Seen:
# torch 2.13.0+cpu
# world 0:00:07, rows 0:30:00, columns 0:30:00
