"""The planner beside published, measured training steps: its error of time and memory by source.

    scripts/env python benchmarks/plan_cases.py CASES.jsonl ... [--out benchmarks/plan_cases.jsonl]

A case is one measured run of somebody else: machine, model, batch, layout, recomputation, and what came
out. Those that the grid can express are predicted: dense, without pipeline or context parallelism, bf16 or
fp16, everything stated. FSDP (ZeRO-3) is our depth, replicas and ZeRO-1 our data, tensor parallelism our
row, with sequence parallelism the sequence form. RULE, fixed before: median error of time at most 15 %.

Fitted on two thirds of the cases (the other third was never seen): six constants, for A100, H100 and B200
each the share of the peak that products and attention reach (`plan/machines.py`). Interconnects are as the
sources state them, 85 % of nominal; where a source states none, the DGX of that GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fourfold_parallel.plan.job import Job, Layout, Storage
from fourfold_parallel.plan.machine import GIB, Machine, Rate, Ring
from fourfold_parallel.plan.machines import machine_of
from fourfold_parallel.plan.memory import memory_of
from fourfold_parallel.plan.simulate import simulate
from fourfold_parallel.plan.transformer import Transformer

Case = dict[str, Any]
PORTS = {
    ("internevo", "A100"): 4 * 12.5e9, ("fms-fsdp", "A100"): 50e9, ("fms-fsdp", "H100"): 100e9,
}  # fmt: skip
"""Bytes a second of a node's network, where the source states other ports than the DGX's."""
MASTER = Storage(weight=2, gradient=4, master=4, moments=8, wire=2)
"""Megatron's: bf16 weights, float32 gradients, master copies and moments."""
STORAGE = {
    "nanotron": MASTER, "simumax-b200": MASTER, "simumax-a100": MASTER,
    "torchtune": Storage(weight=2, gradient=2, moments=4),
}  # fmt: skip
FUSED = ("Megatron", "Transformer Engine")


def read(path: Path) -> list[Case]:
    """The cases of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def can_express(case: Case) -> bool:
    """A grid of ours is this case's layout."""
    needed = ("dense", "pipeline_one", "no_context", "bf16_or_fp16", "complete", "time")
    return all(case["flags"][flag] for flag in needed)


def measured_s(case: Case) -> float:
    """Of a step, from what the source gives."""
    measured, derived = case["measured"], case["derived"] or {}
    step_s = measured["step_s"] or derived.get("step_s")
    if step_s:
        return step_s
    tokens = case["global_batch"] * case["sequence"]
    gpus = case["machine"]["gpus"]
    rate = measured["tokens_per_s_per_gpu"] or derived.get("tokens_per_s_per_gpu")
    if rate:
        return tokens / rate / gpus
    counted = bool(measured["tflops_counts_recompute"]) and case["recompute"] == "full"
    flops = model_of(case).flops(tokens=tokens, sequence=case["sequence"], recomputes=counted)
    return flops / (measured["tflops_per_gpu"] * 1e12 * gpus)


def machine_of_case(case: Case) -> Machine:
    """The machine that the source describes."""
    gpu, group = case["machine"]["gpu"], case["group"]
    kind = gpu.partition("-")[0]
    known = {"A100": "dgx-a100", "H100": "dgx-h100", "B200": "dgx-b200", "V100": "dgx-a100"}[kind]
    machine = machine_of("p5-h100" if group == "nanotron" else known)
    if (group, kind) in PORTS:
        machine = replace(machine, node_bytes_per_s=0.85 * PORTS[group, kind])
    if "40GB" in gpu:
        machine = replace(machine, memory_bytes_per_s=0.8 * 1.555e12)
    if "96GB" in gpu:
        machine = replace(machine, memory_bytes_per_s=0.8 * 2.4e12)
    if "PCIe" in gpu:
        machine = replace(machine, rings=tuple(_pcie(ring) for ring in machine.rings))
    if kind == "V100":
        machine = _dgx_2(machine)
    return replace(machine, devices_per_node=case["machine"]["gpus_per_node"] or 8)


def _pcie(ring: Ring) -> Ring:
    share = 0.418 if ring.size == 8 else 0.69  # SimuMax, configs/system/a100_pcie.json
    return replace(ring, bytes_per_s=share * 30e9, latency_s=1e-5)


def _dgx_2(machine: Machine) -> Machine:
    rate = Rate(precision="bf16", flops_per_s=125e12, share=0.75, attention_share=0.4)
    rings = tuple(replace(ring, bytes_per_s=0.75 * 150e9) for ring in machine.rings)
    return replace(
        machine, rates=(rate,), memory_bytes_per_s=0.8 * 0.9e12, rings=rings, node_bytes_per_s=85e9
    )


def model_of(case: Case) -> Transformer:
    """The sizes of a case's model."""
    sizes = case["model"]
    shared = {
        "name": sizes["name"], "layers": sizes["layers"], "width": sizes["hidden"], "heads": sizes["heads"],
        "vocabulary": sizes["vocab"], "tied": bool(sizes["tied_embeddings"]), "hidden": sizes["ffn_hidden"],
    }  # fmt: skip
    if "glu" in (sizes["ffn"] or ""):
        return Transformer.llama(kv_heads=sizes["kv_heads"], **shared)
    return Transformer.gpt(positions=case["sequence"], **shared)


def layout_of(case: Case) -> Layout:
    """The grid that a case's layout is."""
    parallel = case["parallel"]
    data = parallel["data"] or case["machine"]["gpus"] // parallel["tensor"]
    stage = parallel["shard_stage"] or 0
    depth = (parallel["shard_size"] or data) if stage == 3 else 1
    return Layout(
        data=data // depth,
        depth=depth,
        row=parallel["tensor"],
        microbatch=case["micro_batch"] or 1,
        recomputes=case["recompute"] == "full",
        cuts_tokens=bool(parallel["sequence_parallel"]) and parallel["tensor"] > 1,
        shards_optimizer=stage in (1, 2),
    )


def job_of(case: Case) -> Job:
    """The job of a case. Kernels are fused where the source compiles or uses fused ones."""
    attention, framework = case["attention"] or "flash", case["framework"] or ""
    holds_scores = "unfused" in attention or attention in ("torch", "fused")
    return Job(
        model=model_of(case),
        batch=case["global_batch"],
        sequence=case["sequence"],
        attention="eager" if holds_scores else "sdpa",
        fused=bool(case["compile"]) or any(word in framework for word in FUSED),
        storage=STORAGE.get(case["group"], Storage(wire=2)),
    )


def predicted_s(case: Case) -> float:
    """The planner's seconds. Selective recomputation is taken as half way to full."""
    job, layout, machine = job_of(case), layout_of(case), machine_of_case(case)
    seconds = simulate(job, layout, machine).seconds
    if case["recompute"] == "selective":
        full = simulate(job, replace(layout, recomputes=True), machine).seconds
        return (seconds + full) / 2
    return seconds


def errors(cases: list[Case]) -> Iterator[dict[str, Any]]:
    """The error of each case that the grid can express; of memory where the source gives it."""
    for case in filter(can_express, cases):
        row = {
            "group": case["group"],
            "id": case["id"],
            "time": predicted_s(case) / measured_s(case) - 1,
        }
        peak = case["measured"]["peak_memory_gib"]
        if case["flags"]["memory"] and peak and case["recompute"] != "selective":
            row["memory"] = memory_of(job_of(case), layout_of(case)).peak / GIB / peak - 1
        yield row


def summary(group: str, found: list[float], what: str) -> dict[str, Any]:
    """Of a group's errors, as parts."""
    return {
        "event": "plan_cases", "of": what, "group": group, "cases": len(found),
        "median": round(statistics.median(found), 4),
        "median_absolute": round(statistics.median(map(abs, found)), 4),
        "largest": round(max(found, key=abs), 4),
    }  # fmt: skip


def main() -> None:
    """Predict, print a table, append a record."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("files", type=Path, nargs="+", help="JSON lines of cases")
    arguments.add_argument("--out", type=Path, help="JSON lines to write")
    asked = arguments.parse_args()
    rows = list(errors([case for path in asked.files for case in read(path)]))
    lines = []
    for what in ("time", "memory"):
        by_group = defaultdict(list)
        for row in rows:
            if what in row:
                by_group[row["group"]].append(row[what])
        lines += [summary(group, found, what) for group, found in by_group.items()]
        lines.append(summary("all", [e for found in by_group.values() for e in found], what))
    for line in lines:
        print(
            f"{line['of']:7s}{line['group']:16s}{line['cases']:5d}  median {line['median']:+.1%}  "
            f"absolute {line['median_absolute']:.1%}  largest {line['largest']:+.0%}"
        )
    if asked.out:
        asked.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
