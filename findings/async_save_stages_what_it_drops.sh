#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint.async_save copies the whole state of every rank to host memory before the planner
# drops what other ranks save. Replicas (DDP, HSDP's second axis) each stage all N bytes and write N / ranks: with eight
# replicas on a node, a save holds eight further copies of the model in that node's memory and writes one.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 2>/dev/null
cat >"$folder/seen.py" <<'PY'
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.staging import BlockingAsyncStager

RANKS, TENSORS = 4, 8


def bytes_of(state):
    return sum(tensor.untyped_storage().nbytes() for tensor in state.values())


class Counting(BlockingAsyncStager):
    staged = 0

    def stage(self, state_dict):
        copy = super().stage(state_dict)
        self.staged = bytes_of(copy)
        return copy


class CountingWriter(dcp.FileSystemWriter):
    written = 0

    def write_data(self, plan, planner):
        self.written = sum(planner.resolve_data(item).nbytes for item in plan.items if item.tensor_data)
        return super().write_data(plan, planner)


def rank_of_four(rank, folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    state = {f"weight {n}": torch.randn(1 << 18) for n in range(TENSORS)}
    stager, writer = Counting(), CountingWriter(f"{folder}/saved")
    dcp.async_save(state, storage_writer=writer, async_stager=stager).result()
    told = [None] * RANKS
    dist.all_gather_object(told, (stager.staged, writer.written))
    if rank == 0:
        print("torch", torch.__version__)
        print(f"a state of {bytes_of(state) >> 20} MiB, the same on {RANKS} ranks")
        print("MiB staged by each rank:", [staged >> 20 for staged, _ in told])
        print("MiB written by each rank:", [written >> 20 for _, written in told])
    assert [staged for staged, _ in told] == [bytes_of(state)] * RANKS
    assert sum(written for _, written in told) == bytes_of(state)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_of_four, args=(sys.argv[1],), nprocs=RANKS)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/seen.py" "$folder" 2>/dev/null
# Seen:
# torch 2.13.0+cpu
# a state of 8 MiB, the same on 4 ranks
# MiB staged by each rank: [8, 8, 8, 8]
# MiB written by each rank: [2, 2, 2, 2]
