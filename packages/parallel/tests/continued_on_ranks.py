"""Started by torchrun in test_continued.py: each engine trains a parent, and each goes on from each one's.

Words after the folder are engines, as `engines_on_ranks` names them; `single` is a parent that lies there.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from engines_on_ranks import ENGINES

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.values import from_json
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train
from fourfold_parallel.run.trained import CheckpointAt, Continued


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parent, child = from_json(json.loads((folder / "runs.json").read_text()))  # type: ignore[misc]
    assert isinstance(parent, Run)
    assert isinstance(child, Run)
    for name in names:
        train(
            replace(parent, engine=ENGINES[name]), progress=silent,
            record=folder / f"{name}.jsonl", checkpoints=folder / name,
        )  # fmt: skip
    for source in ("single", *names):
        [path] = (folder / source).glob("step-*")
        model = Continued(parent=CheckpointAt.of(path), optimizer_state="carried")
        for name in names:
            train(
                replace(child, model=model, engine=ENGINES[name]), progress=silent,
                record=folder / f"{source}-{name}.jsonl", checkpoints=folder / f"{source}-{name}",
            )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
