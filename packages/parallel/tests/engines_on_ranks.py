"""Started by torchrun in test_engines.py: train one run on every engine, one after another.

A word `ddp` trains it to its end in a place of that name, stopped once on the way; `ddp@3` goes on with
the run in the place `shared`, and is stopped after 3 steps.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from fourfold_parallel.common.values import from_json
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.run.engines import DDP, FSDP2, DeepSpeed, Engine
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train

ENGINES: dict[str, Engine] = {
    "ddp": DDP(),
    "fsdp2": FSDP2(reshard_after_forward=True),
    "depth": Fourfold(data=1, depth=2, row=1, col=1),
    "row": Fourfold(data=1, depth=1, row=2, col=1),
    "col": Fourfold(data=1, depth=1, row=1, col=2),
    "data": Fourfold(data=2, depth=1, row=1, col=1, shards_optimizer=True),
    "zero1": DeepSpeed(zero=1),
    "zero2": DeepSpeed(zero=2),
    "zero3": DeepSpeed(zero=3),
}


class StoppedError(Exception):
    """The machine was switched off."""


def stop_after(steps: int) -> Callable[..., None]:
    """In the place of `seed_dropout`, which every rank calls at the beginning of a step."""

    def stop(*, seed: int, step: int, share: int) -> None:
        del seed, share
        if step == steps:
            raise StoppedError

    return stop


def first_rank_only(done: int, total: int, note: str) -> None:
    """Progress: no other rank is told."""
    assert dist.get_rank() == 0, (done, total, note)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = from_json(json.loads((folder / "run.json").read_text()))
    assert isinstance(run, Run)
    for word in sys.argv[2:]:
        name, _, steps = word.partition("@")
        mine = replace(run, engine=ENGINES[name])
        where = "shared" if steps else name
        place = {"record": folder / f"{where}.jsonl", "checkpoints": folder / where}
        try:
            with mock.patch(
                "fourfold_parallel.run.train.seed_dropout", stop_after(int(steps or 5))
            ):
                train(mine, progress=first_rank_only, **place)
        except StoppedError:
            dist.barrier()
        if not steps:
            train(mine, progress=first_rank_only, **place)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
