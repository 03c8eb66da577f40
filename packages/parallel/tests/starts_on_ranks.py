"""Started by test_endurance.py: two new ranks again and again, each time for a few steps."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_endurance import opened, take_steps

RANKS, STEPS = 2, 10


def rank_of_a_start(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    with opened((1, RANKS, 1, 1)) as session:
        take_steps(session, STEPS, folder)
    dist.destroy_process_group()


def main() -> None:
    folder, starts = Path(sys.argv[1]), int(sys.argv[2])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_endurance"])
    for start in range(starts):
        here = folder / str(start)
        here.mkdir()
        ranks = [context.Process(target=rank_of_a_start, args=(r, here)) for r in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        codes = [process.exitcode for process in ranks]
        if codes != [0] * RANKS:
            sys.exit(f"start {start} ended with {codes}")


if __name__ == "__main__":
    main()
