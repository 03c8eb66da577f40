"""Started by torchrun in test_long_runs.py: train one run on every engine, and note this rank's memory."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from fourfold_parallel.common.values import from_json
from fourfold_parallel.run.engines import DDP, FSDP2, DeepSpeed, Engine, Single
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train

ENGINES: dict[str, Engine] = {
    "single": Single(),
    "ddp": DDP(),
    "fsdp2": FSDP2(reshard_after_forward=True),
    "zero1": DeepSpeed(zero=1),
    "zero2": DeepSpeed(zero=2),
    "zero3": DeepSpeed(zero=3),
}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    run = from_json(json.loads((folder / "run.json").read_text()))
    assert isinstance(run, Run)
    for name in sys.argv[2:]:
        seen: list[tuple[int, int]] = []

        def note(done: int, total: int, said: str) -> None:
            seen.append((resident_bytes(), open_files()))  # noqa: B023 - called in this turn alone

        mine = replace(run, engine=ENGINES[name])
        train(mine, progress=note, record=folder / f"{name}.jsonl", checkpoints=folder / name)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
