"""Started by torchrun in test_training.py: train one run on several engines, one after another."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.values import from_json
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.run.engines import DDP, FSDP2, DeepSpeed, Engine
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train

ENGINES: dict[str, Engine] = {
    "ddp": DDP(),
    "fsdp2": FSDP2(reshard_after_forward=True),
    "zero1": DeepSpeed(zero=1),
    "row": Fourfold(data=1, depth=1, row=2, col=1),
    "col": Fourfold(data=1, depth=1, row=1, col=2),
    "data": Fourfold(data=2, depth=1, row=1, col=1, shards_optimizer=True),
}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = from_json(json.loads((folder / "run.json").read_text()))
    assert isinstance(run, Run)
    for name in sys.argv[2:]:
        mine = replace(run, engine=ENGINES[name])
        train(mine, record=folder / f"{name}.jsonl", checkpoints=folder / name, progress=silent)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
