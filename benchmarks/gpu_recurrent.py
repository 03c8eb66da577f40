"""Recurrent generation on a GPU beside the published algorithm written plainly: `gpu_recurrent.py OUT.jsonl`.

Eight rows, width 1,024, equal weights and equal greedy tokens; wall seconds behind a synchronised device, the
fastest of three in turns. Not run on a GPU so far; `--device cpu --width 64` tries the same lines here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from recurrent_depth_plain import Plain
from recurrent_depth_speed import contracting, ours

from fourfold_parallel.common.records import commit, hardware, versions

NEW, STEPS, ROUNDS = 16, 32, 3


def main() -> None:
    """Measure and record."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("out", type=Path)
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--width", type=int, default=1024)
    asked.add_argument("--new", type=int, default=NEW)
    options = asked.parse_args()
    width = options.width
    model = contracting(width, width // 32, 11 * width // 4 // 16 * 16, 1024).to(options.device)
    plain = Plain(model)
    prompt = torch.randint(0, 384, (8, 64), generator=torch.Generator().manual_seed(1))
    prompt = prompt.to(options.device)

    def finished() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: plain.generate(prompt, new=options.new, steps=STEPS, threshold=None)[0],
        "ours": lambda: ours(model, prompt, options.new, STEPS)[0],
    }
    seconds = dict.fromkeys(ways, float("inf"))
    made = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started_s = finished()
            made[name] = way()
            seconds[name] = min(seconds[name], finished() - started_s)
    line = {
        "event": "gpu_recurrent",
        "width": width,
        "recurrences": STEPS,
        "new_tokens": options.new,
        "seconds": seconds,
        "speedup": seconds["plain"] / seconds["ours"],
        "same_tokens": float((made["plain"] == made["ours"]).double().mean()),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }
    options.out.write_text(json.dumps(line) + "\n", encoding="utf-8")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
