#!/usr/bin/env bash
# accelerate 1.15.0 (torch 2.13.0) asks the environment whether there are several ranks, and not torch.distributed. In two
# processes that have initialised a gloo process group themselves, and have no LOCAL_RANK in their environment, Accelerator
# reports one process, `prepare` gives the model back without DistributedDataParallel, and no word is said: each replica takes
# the gradients of its own batch, and after one step the weights of the two ranks differ. With the variables that torchrun sets
# the same program trains alike. Test harnesses and schedulers that make the group themselves meet this.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.4.6 2>/dev/null
cat >"$folder/seen.py" <<'PY'
import os
import sys

import accelerate
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank_of_two(rank, store, is_told):
    if is_told:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = torch.nn.Linear(2, 1)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    accelerator.backward(model(torch.full((1, 2), float(rank + 1))).sum())
    optimizer.step()
    weights = [torch.empty(1, 2) for _ in range(2)]
    dist.all_gather(weights, plain.weight.detach())
    alike = torch.equal(*weights)
    if rank == 0:
        told = "with" if is_told else "without"
        print(
            f"{told} LOCAL_RANK: group of {dist.get_world_size()}, num_processes {accelerator.num_processes}, "
            f"{type(model).__name__}, weights alike: {alike}"
        )
    assert dist.get_world_size() == 2
    assert (accelerator.num_processes, alike) == ((2, True) if is_told else (1, False))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    print("accelerate", accelerate.__version__, "torch", torch.__version__)
    for is_told in (False, True):
        mp.spawn(rank_of_two, args=(f"{sys.argv[1]}-{is_told}", is_told), nprocs=2)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/seen.py" "$folder/store" 2>/dev/null
# Seen:
# accelerate 1.15.0 torch 2.13.0+cpu
# without LOCAL_RANK: group of 2, num_processes 1, Linear, weights alike: False
# with LOCAL_RANK: group of 2, num_processes 2, DistributedDataParallel, weights alike: True
