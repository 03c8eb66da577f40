"""What overlap hides: an 8-layer stack on a grid whose every collective takes 20 ms.

    scripts/env python benchmarks/grid_overlap.py [OUT.jsonl]

Interleaves a step without overlap, with each kind, and with all, on gloo ranks of this machine, and
writes the median step times. The products are sized so that computing takes about as long as the
network, as on the machines of the paper; without anything to compute, overlap could hide nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from fourfold_parallel.grid.collectives import Trace
from fourfold_parallel.grid.linear import Linear, weight_cut
from fourfold_parallel.grid.products import Products
from fourfold_parallel.grid.schedule import Overlaps, Schedule
from fourfold_parallel.testing.grids import OVERLAPS, mesh_of
from fourfold_parallel.testing.ranks import run_on_ranks

LATENCY_S = 0.02
LAYERS, WIDTH, TOKENS, ROUNDS = 8, 512, 2048, 7
SIZES = (1, 2, 1, 1)


def stack(overlaps: Overlaps) -> tuple[nn.Sequential, Schedule]:
    """Plain and swapped layers in turn, on a grid with a slow network."""
    mesh = mesh_of(SIZES).observed(Trace(latency_s=LATENCY_S))
    schedule = Schedule(overlaps)
    layers = [
        Linear(
            nn.Parameter(
                mesh.distribute(torch.randn(WIDTH, WIDTH), weight_cut(swapped=index % 2 == 1))
            ),
            None,
            mesh=mesh,
            name=str(index),
            schedule=schedule,
            swapped=index % 2 == 1,
            products=Products(),
        )
        for index in range(LAYERS)
    ]
    return nn.Sequential(*layers), schedule


def measure() -> dict[str, list[float]]:
    """Step times in seconds by kind of overlap, interleaved, the first round left out."""
    stacks = {name: stack(overlaps) for name, overlaps in OVERLAPS.items()}
    x = torch.randn(TOKENS // 2, WIDTH, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in stacks}
    for round_ in range(ROUNDS + 1):
        for name, (model, schedule) in stacks.items():
            model.zero_grad()
            torch.distributed.barrier()
            started_s = time.perf_counter()
            schedule.restart()
            model(x).sum().backward()
            if round_:
                times[name].append(time.perf_counter() - started_s)
    return times


def main() -> None:
    """Measure, print and write."""
    times = run_on_ranks(2, measure)[0]
    medians = {name: statistics.median(values) for name, values in times.items()}
    record = {
        "event": "grid_overlap", "grid": SIZES, "layers": LAYERS, "width": WIDTH, "tokens": TOKENS,
        "latency_s": LATENCY_S, "rounds": ROUNDS, "torch": torch.__version__,
        "cores": os.cpu_count(), "load_1min": os.getloadavg()[0], "step_s": times,
        "ratio_to_none": {name: median / medians["none"] for name, median in medians.items()},
    }  # fmt: skip
    print(json.dumps(record["ratio_to_none"], indent=1))
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
