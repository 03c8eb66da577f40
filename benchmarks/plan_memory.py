"""The planner's memory beside what torch allocates on a rank, on gloo ranks of this machine.

    scripts/env python benchmarks/plan_memory.py [--out benchmarks/plan_memory.jsonl]

Measured is the largest number of bytes that torch's CPU allocator holds at once in three steps, counted
where it asks for them and gives them back (`allocations.c`, preloaded): torch's own profiler does not see
what a thread of gloo frees (`findings/profiler_frees_of_other_threads.sh`). RULE, fixed before: within 8 %
on every configuration, and no underestimate above 3 %.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from fourfold_parallel.plan.job import GRID_ON_CPU, Job, Layout
from fourfold_parallel.plan.memory import memory_of
from fourfold_parallel.plan.transformer import Transformer
from fourfold_parallel.planning.verify import LayoutRun
from fourfold_parallel.testing.ranks import run_on_ranks

STEPS = 3
COUNT = Path(__file__).with_name("allocations.c")
LIMIT, UNDER = 0.08, 0.03


def config(kind: str, width: int, layers: int) -> PretrainedConfig:
    """A small Llama, or a Mixtral with eight experts of which a token meets two."""
    sizes: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 512, "use_cache": False,
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralConfig(intermediate_size=width, num_local_experts=8, **sizes)
    return LlamaConfig(intermediate_size=3 * width, **sizes)


Case = tuple[str, int, int, Job, Layout]
"""Kind, width, layers, job and layout; two ranks each, or four."""


def cases() -> list[Case]:
    """Every configuration."""
    configurations: list[Case] = []
    both, kept = (False, True), (False,)
    axes = (Layout(data=2), Layout(depth=2), Layout(row=2), Layout(col=2))
    exchanged = tuple(Layout(depth=depth, experts="exchanged") for depth in (2, 4))
    for kind, width, layers, batch, sequence, grids, forms in (
        ("llama", 512, 4, 8, 128, (*axes, Layout(data=2, row=2)), both),
        ("llama", 256, 8, 8, 256, (*axes, Layout(depth=2, row=2)), both),
        ("mixtral", 256, 4, 8, 256, (*axes, *exchanged), kept),
        # Measured after the constants of plan/memory.py had been fitted to those above.
        ("llama", 384, 6, 4, 256, (*axes, Layout(depth=2, col=2)), both),
    ):
        model = Transformer.of(config(kind, width, layers))
        job = Job(
            model=model, batch=batch, sequence=sequence, precision="fp32", storage=GRID_ON_CPU
        )
        for grid in grids:
            share = batch // grid.shares
            for recomputes in forms:
                layout = replace(grid, recomputes=recomputes, microbatch=share)
                configurations.append((kind, width, layers, job, layout))
    return configurations


def peak(kind: str, width: int, layers: int, job: Job, layout: Layout) -> int:
    """Bytes that torch holds at once, at most; runs on every rank."""
    allocations = ctypes.CDLL(None)  # this process, into which the count is preloaded
    allocations.held_at_most.restype = ctypes.c_size_t
    torch.manual_seed(0)
    run = LayoutRun(config(kind, width, layers), job, layout)
    run.step()
    allocations.watch()
    for _ in range(STEPS):
        run.step()
    return allocations.held_at_most()


def measure(kind: str, width: int, layers: int, job: Job, layout: Layout) -> dict[str, Any]:
    """One configuration, predicted and measured."""
    measured = run_on_ranks(
        layout.ranks, peak, kind=kind, width=width, layers=layers, job=job, layout=layout
    )
    memory = memory_of(job, layout)
    error = memory.peak / max(measured) - 1
    return {
        "event": "plan_memory", "model": kind, "width": width, "layers": layers, "batch": job.batch,
        "sequence": job.sequence, "attention": job.attention, "layout": asdict(layout),
        "measured_bytes": max(measured), "predicted_bytes": round(memory.peak),
        "parts": {name: round(size) for name, size in memory.parts().items()}, "error": round(error, 4),
        "holds": -UNDER <= error <= LIMIT, "torch": torch.__version__,
    }  # fmt: skip


def in_processes_of_its_own(index: int, library: Path) -> dict[str, Any]:
    """One configuration, under the count."""
    command = [sys.executable, __file__, "--index", str(index)]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print, write."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, help="JSON lines to write")
    arguments.add_argument("--index", type=int, help="this configuration alone")
    asked = arguments.parse_args()
    configurations = cases()
    if asked.index is not None:
        print(json.dumps(measure(*configurations[asked.index])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "allocations.so"
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(COUNT)], check=True
        )
        for index, (kind, width, _, _, layout) in enumerate(configurations):
            row = in_processes_of_its_own(index, library)
            rows.append(row)
            print(
                f"{layout}  {kind}, width {width}: {row['predicted_bytes'] / 2**20:.0f} MiB predicted, "
                f"{row['measured_bytes'] / 2**20:.0f} measured, {row['error']:+.1%}",
                flush=True,
            )
    if asked.out:
        asked.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
