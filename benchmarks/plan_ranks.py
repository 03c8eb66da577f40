"""The planner on this machine: the predicted and the measured step of every grid of gloo ranks.

    scripts/env python benchmarks/plan_ranks.py RANKS WIDTH --out benchmarks/plan_ranks.jsonl

The ranks probe the machine, in which steps of copies over data have a part, and the planner predicts each
grid; errors are those of the other grids. Then all grids are opened in one process group, in so many
batches as memory asks for, and take turns within each round. The rules stand in `RULES`, and were written
before the first run at the widths that they judge.

Two clocks are read: the wall's, and the processor time of all ranks over the cores that they share,
which other work on the machine moves little. Each is predicted from the probe by the same clock. Where the
machine is not ours alone (a load above `QUIET` before the run), the processor's clock is the one judged.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.plan.authors import Links, communication_seconds
from fourfold_parallel.plan.job import Job, Layout
from fourfold_parallel.plan.machine import GIB, Machine
from fourfold_parallel.plan.probe import ClockName, layouts_of, llama_config
from fourfold_parallel.plan.simulate import Step, simulate
from fourfold_parallel.plan.transformer import Transformer
from fourfold_parallel.planning.probing import probe_with_steps
from fourfold_parallel.testing import ranks as workplace
from fourfold_parallel.testing.ranks import run_on_ranks

BATCH, SEQUENCE, ROUNDS, WARM_UPS = 8, 128, 5, 2
TOGETHER = 7
"""Grids whose models are held at once, the reference grid included, which is in every batch."""
QUIET = 1.5
"""Load of the last minute, before the ranks start."""
LAW_LIMIT_S = 1200
RULES = {"best_within": 3, "spearman": 0.8, "median_error": 0.15, "worst_error": 0.35}


def job_of(width: int) -> Job:
    """As the planner sees it."""
    model = Transformer.of(llama_config(width=width, sequence=SEQUENCE))
    return Job(model=model, batch=BATCH, sequence=SEQUENCE, precision="fp32")


def sizes(layout: Layout) -> dict[str, int]:
    """Of the four axes."""
    return {axis: layout.size(axis) for axis in ("data", "depth", "row", "col")}


def open_session(stack: ExitStack, layout: Layout, width: int) -> Any:
    """A session of the training loop's engine, with AdamW."""
    torch.manual_seed(0)
    config = llama_config(width=width, sequence=SEQUENCE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine = Fourfold(data=layout.data, depth=layout.depth, row=layout.row, col=layout.col)
    opened = engine.open(model, optimizer, precision="fp32", batch=BATCH, microbatch=BATCH)
    return stack.enter_context(opened)


def step(session: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """Wall and processor seconds of a step of this rank: forward, backward, clipping, AdamW."""
    mine = tokens.chunk(session.ranks)[session.rank]
    dist.barrier()
    started_s, begun_s = time.perf_counter(), time.process_time()
    with session.microbatch(is_last=True):
        session.backward(session.model(input_ids=mine, labels=mine).loss)
    session.update(1.0)
    dist.barrier()
    return time.perf_counter() - started_s, time.process_time() - begun_s


def rounds_of(layouts: list[Layout], width: int) -> dict[Layout, list[tuple[float, float]]]:
    """Wall and processor seconds by round, of grids that take turns."""
    tokens = torch.randint(0, 2048, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
    seen: dict[Layout, list[tuple[float, float]]] = {layout: [] for layout in layouts}
    with ExitStack() as stack:
        sessions = {layout: open_session(stack, layout, width) for layout in layouts}
        for session in sessions.values():
            for _ in range(WARM_UPS):
                step(session, tokens)
        for _ in range(ROUNDS):
            for layout, session in sessions.items():
                seen[layout].append(step(session, tokens))
    return seen


def machines_of(width: int) -> tuple[dict[ClockName, Machine], float]:
    """On every rank: the machine by each clock, and the seconds that the probe took."""
    started_s = time.perf_counter()
    config = llama_config(width=width, sequence=SEQUENCE)
    on = torch.device("cpu")
    machines = probe_with_steps(config, job_of(width), name="this machine", device=on)
    return machines, time.perf_counter() - started_s


def measured(ranks: int, width: int) -> dict[ClockName, dict[Layout, list[float]]]:
    """Seconds of each round, by clock and grid.

    By the wall's clock, a batch's are scaled so that its reference takes what the first batch's took.
    """
    first, *others = layouts_of(job_of(width), ranks)
    cores = min(ranks, os.cpu_count() or 1)
    seconds: dict[ClockName, dict[Layout, list[float]]] = {"wall": {}, "processor": {}}
    for start in range(0, len(others), TOGETHER - 1):
        batch = [first, *others[start : start + TOGETHER - 1]]
        runs = run_on_ranks(ranks, rounds_of, layouts=batch, width=width)
        wall = {grid: [wall_s for wall_s, _ in runs[0][grid]] for grid in batch}
        scale = statistics.median(seconds["wall"].get(first, wall[first])) / statistics.median(
            wall[first]
        )
        for grid in batch if start == 0 else batch[1:]:
            seconds["wall"][grid] = [scale * wall_s for wall_s in wall[grid]]
            turns = zip(*(run[grid] for run in runs), strict=True)
            seconds["processor"][grid] = [sum(own for _, own in turn) / cores for turn in turns]
    return seconds


def links(machine: Machine) -> Links:
    """The probed bandwidths as the authors' script reads them."""
    inside = {(ring.stride, ring.size): ring.bytes_per_s / GIB for ring in machine.rings}
    return Links(
        devices_per_node=machine.devices_per_node,
        inside=inside,
        between=lambda faster: 1.0 / faster,
    )


def judged(rows: list[dict[str, Any]], column: str) -> dict[str, float]:
    """The figures that the rules limit, of a column of predictions."""
    predicted, measured = ([row[key] for row in rows] for key in (column, "measured_s"))
    correlation: Any = spearmanr(predicted, measured)
    errors = [
        abs(p / m - 1)
        for row, p, m in zip(rows, predicted, measured, strict=True)
        if row["data"] != math.prod(row[axis] for axis in ("data", "depth", "row", "col"))
    ]
    best = measured.index(min(measured))
    return {
        "best_at": 1 + sorted(predicted).index(predicted[best]),
        "spearman": round(float(correlation.statistic), 9),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
    }


def keeps_rule(verdict: dict[str, float], name: str) -> bool:
    """True where a rule is kept."""
    if name == "best_within":
        return verdict["best_at"] <= RULES[name]
    if name == "spearman":
        return verdict[name] >= RULES[name]
    return verdict[name] <= RULES[name]


def keeps(verdict: dict[str, float]) -> bool:
    """True where all rules are kept."""
    return all(keeps_rule(verdict, name) for name in RULES)


def grid_row(
    layout: Layout, predicted: Step, rounds: list[float], authors_s: float
) -> dict[str, Any]:
    """A grid's line of the table."""
    measured = statistics.median(rounds)
    return {
        **sizes(layout), "predicted_s": predicted.seconds, "measured_s": measured,
        "error": predicted.seconds / measured - 1, "rounds_s": rounds, "authors_s": authors_s,
        "compute_s": predicted.compute_s, "update_s": predicted.update_s,
        "communication_s": {axis: s for axis, s in predicted.exposed_s.items() if s},
    }  # fmt: skip


def record(ranks: int, width: int) -> dict[str, Any]:
    """Probe, predict, measure, judge."""
    job, load = job_of(width), os.getloadavg()[0]
    machines, probe_s = run_on_ranks(ranks, machines_of, width=width)[0]
    rounds_by_clock = measured(ranks, width)
    clocks: dict[str, Any] = {}
    for clock, machine in machines.items():
        rows = [
            grid_row(
                layout, simulate(job, replace(layout, microbatch=BATCH // layout.shares), machine),
                rounds,
                communication_seconds(
                    layout, links(machine), layers=4, width=width, batch=BATCH, sequence=SEQUENCE
                ),
            )
            for layout, rounds in rounds_by_clock[clock].items()
        ]  # fmt: skip
        verdict = judged(rows, "predicted_s")
        authors = judged(rows, "authors_s")
        clocks[clock] = {
            "grids": rows, **verdict, "keeps_rules": keeps(verdict),
            "authors_best_at": authors["best_at"], "authors_spearman": authors["spearman"],
            "steals": machine.steals, "together": machine.together, "kernel_s": machine.kernel_s,
            "node_s": machine.node_s,
        }  # fmt: skip
    return {
        "event": "plan_ranks", "ranks": ranks, "width": width, "batch": BATCH, "sequence": SEQUENCE,
        "torch": torch.__version__, "cores": os.cpu_count(), "rounds": ROUNDS, "rules": RULES,
        "load_1min_before": load, "load_1min_after": os.getloadavg()[0],
        "probe_s": probe_s, "judged_clock": "wall" if load <= QUIET else "processor", "clocks": clocks,
    }  # fmt: skip


def table(entry: dict[str, Any]) -> str:
    """A record as text."""
    lines = [f"{entry['ranks']} ranks, width {entry['width']}, probed in {entry['probe_s']:.0f} s, "
             f"load {entry['load_1min_before']:.1f} to {entry['load_1min_after']:.1f}"]  # fmt: skip
    for clock, result in entry["clocks"].items():
        lines.append(
            f"{clock}: best at {result['best_at']}, Spearman {result['spearman']:.2f}, error median "
            f"{result['median_error']:.3f} worst {result['worst_error']:.3f}; the authors': best at "
            f"{result['authors_best_at']}, Spearman {result['authors_spearman']:.2f}"
        )
        lines += [
            f"  {row['data']}x{row['depth']}x{row['row']}x{row['col']}  predicted "
            f"{row['predicted_s']:.3f}  measured {row['measured_s']:.3f}  {row['error']:+.2f}"
            for row in sorted(result["grids"], key=lambda row: row["measured_s"])
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("ranks", type=int)
    arguments.add_argument("width", type=int, help="of the model, a multiple of 64")
    arguments.add_argument("--out", type=Path, help="JSON lines to append to")
    asked = arguments.parse_args()
    workplace.LAW_TIMEOUT_S = LAW_LIMIT_S
    entry = record(asked.ranks, asked.width)
    print(table(entry))
    if asked.out:
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
