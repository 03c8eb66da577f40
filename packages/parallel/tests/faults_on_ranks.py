"""Started by torchrun in test_faults.py: train one run, with something that goes wrong on one rank.

`python -m torch.distributed.run ... faults_on_ranks.py FOLDER FAULT RANK STEP`
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.values import from_json
from fourfold_parallel.run.data import Batch, TokenStream
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train


def main() -> None:
    folder, fault, rank, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = from_json(json.loads((folder / "run.json").read_text()))
    assert isinstance(run, Run)
    is_mine = int(os.environ["RANK"]) == rank
    is_first_launch = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def happen(mark: str) -> None:
        if NOW.step == step and is_mine and is_first_launch:
            if fault == "kill" and mark == "backward":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stop" and mark == "backward":
                (folder / "stopped").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "term" and mark == "backward":
                os.kill(os.getpid(), signal.SIGTERM)

    batch_of = TokenStream.batch

    def batch(stream: TokenStream, number: int, **how: int) -> Batch:
        if fault == "raise" and is_mine and number == step:
            raise OSError(f"cannot read the rows of step {number + 1}")
        if fault == "slow" and is_mine:
            time.sleep(0.05)
        if fault == "hang" and is_mine and number == step:
            time.sleep(3600)
        return batch_of(stream, number, **how)

    NOW.listeners.append(happen)
    place = {"record": folder / "r.jsonl", "checkpoints": folder / "c"}
    with mock.patch.object(TokenStream, "batch", batch):
        train(run, progress=silent, **place)


if __name__ == "__main__":
    main()
