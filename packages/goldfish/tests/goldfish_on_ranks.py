"""Started by torchrun in test_ranks.py: train one run on every engine, one after another."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from fourfold_goldfish.objective import CompactedNextToken
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.values import from_json
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.run.engines import DDP, FSDP2, Engine
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train

ENGINES: dict[str, Engine] = {
    "ddp": DDP(),
    "fsdp2": FSDP2(reshard_after_forward=True),
    "row": Fourfold(data=1, depth=1, row=2, col=1),
    "col": Fourfold(data=1, depth=1, row=1, col=2),
    "depth": Fourfold(data=1, depth=2, row=1, col=1),
}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run = from_json(json.loads((folder / "run.json").read_text()))
    assert isinstance(run, Run)
    compacted = CompactedNextToken(mask=run.objective.mask)
    runs = {name: replace(run, engine=engine) for name, engine in ENGINES.items()}
    runs |= {
        f"{name}-compacted": replace(runs[name], objective=compacted)
        for name in ("ddp", "row", "col", "depth")
    }
    for name, named in runs.items():
        train(
            named,
            record=folder / f"{name}.jsonl",
            checkpoints=folder / name,
            progress=silent,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
