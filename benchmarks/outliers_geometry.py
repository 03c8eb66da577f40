"""Cost of measuring the residual stream: SmolLM2-135M's forward pass alone and with it, on one thread.

scripts/env python benchmarks/outliers_geometry.py

Appends a line to `benchmarks/outliers_geometry.jsonl`. The aim is 1.15 times the pass alone.
"""

import json
import statistics
import time
from pathlib import Path

import torch

from fourfold_outliers.stream import Documents, measure
from fourfold_parallel.common.records import commit, hardware, versions
from fourfold_parallel.run.models import SmolLM2

RECORD = Path(__file__).with_suffix(".jsonl")
WINDOWS, TOKENS, ROUNDS = 8, 256, 4


def main() -> None:
    """Time both, a round of each in turn."""
    torch.set_num_threads(1)
    model = SmolLM2().build(seed=0).eval()
    ids = torch.randint(0, 49152, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))
    read = Documents.each_once(ids)

    def alone() -> None:
        with torch.no_grad():
            for begun in range(0, WINDOWS, 4):
                model(input_ids=ids[begun : begun + 4], use_cache=False)

    times: dict[str, list[float]] = {"alone_s": [], "measured_s": []}
    for round_ in range(ROUNDS + 1):
        for name, work in (("alone_s", alone), ("measured_s", lambda: measure(model, read))):
            started_s = time.perf_counter()
            work()
            if round_:  # the first warms up
                times[name].append(round(time.perf_counter() - started_s, 3))
    ratio = statistics.median(times["measured_s"]) / statistics.median(times["alone_s"])
    line = {
        "tokens": WINDOWS * TOKENS, "window": TOKENS, "threads": 1, **times, "ratio": round(ratio, 3),
        "commit": commit(), "versions": versions(), "hardware": hardware(),
    }  # fmt: skip
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"with geometry {ratio:.3f} of the forward pass alone, {times}")


if __name__ == "__main__":
    main()
