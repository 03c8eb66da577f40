"""Started by test_checkpoint.py: train, and die by SIGKILL at a moment of the n-th save."""

import json
import os
import signal
import sys
from pathlib import Path

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.values import from_json
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train


def main() -> None:
    folder, moment, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    run = from_json(json.loads((folder / "run.json").read_text()))
    assert isinstance(run, Run)
    seen = 0

    def die(what: str) -> None:
        nonlocal seen
        seen += what == moment
        if seen == times:
            os.kill(os.getpid(), signal.SIGKILL)

    NOW.listeners.append(die)
    place = {"record": folder / "killed/r.jsonl", "checkpoints": folder / "killed/c"}
    train(run, progress=silent, **place)


if __name__ == "__main__":
    main()
