"""Ranks that are made to be killed: processes forked from one that has imported everything, on gloo.

They see what torchrun would tell them, but start in a tenth of a second instead of ten.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

MOMENTS = {
    "data": ("data",),
    "forward": ("forward",),
    "collective": ("collective",),
    "optimizer": ("update",),
    "save": ("snapshot", "save"),
    "rename": ("rename", "renamed"),
}
"""What a rank is killed in, and the marks (`common.activity`) that say so."""
LONGEST_S = 0.004
"""A kill comes up to so long after its mark: anywhere in what the mark begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A rank's death by SIGKILL."""

    rank: int
    moment: str
    """One of `MOMENTS`."""
    occurrence: int
    """At which of such moments since the launch, from 1."""
    delay: float
    """Of the longest delay, from 0 to 1."""


def launch(folder: Path, *, ranks: int, kill: Kill | None) -> list[ForkServerProcess]:
    """Start the ranks of a training that is described in a folder (`run.json`).

    Args:
        folder: gets record, checkpoints, and each rank's log.
        ranks: to start.
        kill: which of them dies, and when.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fourfold_parallel.storm.preload"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_serve, args=(folder, rank, ranks, port, kill), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[ForkServerProcess], *, bound_s: float) -> tuple[list[int | None], float]:
    """Wait for all ranks; once one has died, the others get so long to end by themselves.

    Returns:
        Exit codes, None for a rank that had to be ended; and seconds from the first death to the last end.
    """
    ending_s, looked_s = 0.0, time.perf_counter()
    while ending_s <= bound_s and any(process.is_alive() for process in processes):
        time.sleep(0.005)
        now_s = time.perf_counter()
        if any(process.exitcode not in (None, 0) for process in processes):
            # A machine that stands still for a while, this process with it, is no hang of a rank.
            ending_s += min(now_s - looked_s, 0.1)
        looked_s = now_s
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return codes, ending_s


def _serve(folder: Path, rank: int, ranks: int, port: int, kill: Kill | None) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "FOURFOLD_PATIENCE_S": os.environ.get("FOURFOLD_PATIENCE_S", "600"),
    }  # fmt: skip
    import torch

    from fourfold_parallel.common.activity import NOW
    from fourfold_parallel.common.progress import silent
    from fourfold_parallel.common.values import from_json
    from fourfold_parallel.run.recipe import Run
    from fourfold_parallel.run.train import train

    torch.set_num_threads(1)
    handler = logging.FileHandler(folder / f"rank-{rank}.log")
    logging.getLogger("fourfold_parallel").addHandler(handler)
    run: Any = from_json(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    assert isinstance(run, Run)
    if kill is not None and kill.rank == rank:
        NOW.listeners.append(_Killer(kill))
    try:
        train(
            run, record=folder / "record.jsonl", checkpoints=folder / "checkpoints", progress=silent
        )
    except BaseException:
        logging.getLogger("fourfold_parallel").exception("rank %d", rank)
        handler.close()
        # What hangs at an interpreter's end is no matter of a training's.
        os._exit(1)


class _Killer:
    """Counts the moments, and kills this process in the right one."""

    def __init__(self, kill: Kill) -> None:
        self._kill = kill
        self._seen = 0

    def __call__(self, mark: str) -> None:
        if mark in MOMENTS[self._kill.moment]:
            self._seen += 1
            if self._seen == self._kill.occurrence:
                threading.Thread(target=self._die, daemon=True).start()

    def _die(self) -> None:
        time.sleep(self._kill.delay * LONGEST_S)
        os.kill(os.getpid(), signal.SIGKILL)


def drawn(
    generator: random.Random, *, moment: str, ranks: int, steps: int, collectives: int
) -> Kill:
    """A kill at a random rank and place.

    Args:
        generator: decides.
        moment: one of `MOMENTS`.
        ranks: of the launch.
        steps: within about so many steps.
        collectives: about so many of each step.
    """
    occurrence = {
        "collective": generator.randint(1, max(1, steps * collectives)),
        "save": generator.randint(1, 4),
        "rename": generator.randint(1, 3),
    }.get(moment, generator.randint(1, steps))
    # The first rank alone renames.
    rank = 0 if moment == "rename" else generator.randrange(ranks)
    return Kill(rank=rank, moment=moment, occurrence=occurrence, delay=generator.random())
