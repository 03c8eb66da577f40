"""Probe this machine from a launch of ranks: the parts of a step, then a few real steps of one grid."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, PretrainedConfig

from fourfold_parallel.launch import device, process_group
from fourfold_parallel.plan.job import Job, Layout
from fourfold_parallel.plan.machine import Machine, Precision
from fourfold_parallel.plan.probe import ClockName, llama_config, probe
from fourfold_parallel.plan.simulate import simulate
from fourfold_parallel.plan.transformer import Transformer
from fourfold_parallel.planning.verify import LayoutRun

WARM_STEPS, TIMED_STEPS = 2, 5


def probe_launched(
    model: Path | int,
    *,
    name: str,
    batch: int,
    sequence: int,
    precision: Precision,
    clock: ClockName,
) -> Machine:
    """This machine, as the ranks of this launch see it.

    Args:
        model: A folder or file with a configuration of transformers, or the width of a four-layer Llama.
        name: Of the machine.
        batch: Sequences of a step, over all ranks.
        sequence: Tokens of a sequence.
        precision: Of the products.
        clock: The clock to believe.

    Raises:
        ValueError: The planner does not know the model, or no grid of these ranks fits it.
    """
    on = device()
    if on.type != "cpu" and clock == "processor":
        raise ValueError(f"clock='processor' is of ranks on a CPU, not on {on.type}; use 'wall'")
    config = (
        llama_config(width=model, sequence=sequence)
        if isinstance(model, int)
        else AutoConfig.from_pretrained(model)
    )
    job = Job(
        model=Transformer.of(config), batch=batch, sequence=sequence, precision=precision
    )  # fmt: skip
    with process_group(on):
        return probe_with_steps(config, job, name=name, device=on)[clock]


def probe_with_steps(
    config: PretrainedConfig, job: Job, *, name: str, device: torch.device
) -> dict[ClockName, Machine]:
    """As `probe`; on CPUs, then some steps of the plainest grid, which is copies of the model, over data.

    What computing takes in them, over what the parts take one by one, becomes `Machine.together`: parts
    that follow one another find their operands in memory and not in a cache, and ranks that share cores
    are in one another's way. It is one number a machine, measured and not fitted to other grids.

    Args:
        config: Of the job's model, which is built whole on every rank.
        job: What will be planned.
        name: Of the machine.
        device: This rank's.
    """
    machines = probe(job, name=name, device=device)
    ranks = dist.get_world_size()
    if device.type != "cpu" or job.batch % ranks:
        return machines
    layout = Layout(data=ranks, microbatch=job.batch // ranks)
    measured = _steps(LayoutRun(config, job, layout))
    for clock, machine in machines.items():
        step = simulate(job, layout, machine)
        computing = step.compute_s - step.update_s
        more = measured[clock] - step.seconds
        machines[clock] = replace(machine, together=max(0.5, 1 + more / computing))
    return machines


def _steps(run: LayoutRun) -> dict[ClockName, float]:
    """Median seconds of a step by each clock, equal on all ranks."""
    seen: list[tuple[float, float]] = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        dist.barrier()
        started_s, begun_s = time.perf_counter(), time.process_time()
        run.step()
        dist.barrier()
        seen.append((time.perf_counter() - started_s, time.process_time() - begun_s))
    wall, own = (statistics.median(clock) for clock in zip(*seen[WARM_STEPS:], strict=True))
    summed = torch.tensor([wall, own], dtype=torch.float64)
    dist.all_reduce(summed)
    ranks = dist.get_world_size()
    cores = min(ranks, os.cpu_count() or 1)
    return {"wall": summed[0].item() / ranks, "processor": summed[1].item() / cores}
