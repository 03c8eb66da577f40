"""The planner beside published, measured training steps.

scripts/env python benchmarks/plan_cases.py FILE.jsonl ... --out benchmarks/plan_cases.jsonl
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fourfold_parallel.plan.job import Job, Layout, Storage
from fourfold_parallel.plan.machine import GIB, Machine
from fourfold_parallel.plan.machines import machine_of
from fourfold_parallel.plan.machines import _node
from fourfold_parallel.plan.simulate import simulate
from fourfold_parallel.plan.transformer import Linear, Transformer


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def can(case: dict[str, Any]) -> bool:
    f = case["flags"]
    return bool(
        f["dense"]
        and f["pipeline_one"]
        and f["no_context"]
        and f["bf16_or_fp16"]
        and f["complete"]
        and f["time"]
    )


def measured_s(case: dict[str, Any]) -> float:
    m, d = case["measured"], case["derived"] or {}
    step = m["step_s"] or d.get("step_s")
    if step:
        return step
    rate = m["tokens_per_s_per_gpu"] or d.get("tokens_per_s_per_gpu")
    tokens = case["global_batch"] * case["sequence"]
    if rate:
        return tokens / rate / case["machine"]["gpus"]
    t = model(case)
    flops = t.flops(
        tokens=tokens,
        sequence=case["sequence"],
        recomputes=bool(m["tflops_counts_recompute"]) and case["recompute"] == "full",
    )
    return flops / (m["tflops_per_gpu"] * 1e12 * case["machine"]["gpus"])


NETWORK = {"llm-foundry": 1, "fms-fsdp": 1}


def machine(case: dict[str, Any]) -> Machine:
    gpu, group = case["machine"]["gpu"], case["group"]
    if group == "nanotron":
        m = machine_of("p5-h100")
    elif gpu.startswith("A100"):
        m = machine_of("dgx-a100")
        if "40GB" in gpu:
            m = replace(m, memory_bytes=40 * GIB, memory_bytes_per_s=0.8 * 1.555e12)
        if "PCIe" in gpu:
            m = replace(
                m, rings=_node(0.69 * 30e9, 8, latency_s=1e-5), memory_bytes_per_s=0.8 * 1.94e12
            )
        ports = {"internevo": 4 * 12.5e9, "fms-fsdp": 50e9}.get(group)
        if ports:
            m = replace(m, node_bytes_per_s=0.85 * ports)
    elif gpu.startswith("H100"):
        m = machine_of("dgx-h100")
        if group == "fms-fsdp":
            m = replace(m, node_bytes_per_s=0.85 * 100e9)
        if "96GB" in gpu:
            m = replace(m, memory_bytes=96 * GIB, memory_bytes_per_s=0.8 * 2.4e12)
    elif gpu.startswith("B200"):
        m = machine_of("dgx-b200")
    else:
        from fourfold_parallel.plan.machine import Rate

        m = replace(
            machine_of("dgx-a100"),
            name="dgx-2",
            memory_bytes=32 * GIB,
            memory_bytes_per_s=0.8 * 0.9e12,
            rates=(Rate(precision="bf16", flops_per_s=125e12, share=0.75, attention_share=0.4),),
            devices_per_node=16,
            rings=_node(0.75 * 150e9, 16),
            node_bytes_per_s=0.85 * 100e9,
        )
    return replace(m, devices_per_node=case["machine"]["gpus_per_node"] or m.devices_per_node)


def model(case: dict[str, Any]) -> Transformer:
    m = case["model"]
    if "glu" in (m["ffn"] or ""):
        t = Transformer.llama(
            name=m["name"],
            layers=m["layers"],
            width=m["hidden"],
            hidden=m["ffn_hidden"],
            heads=m["heads"],
            kv_heads=m["kv_heads"],
            vocabulary=m["vocab"],
            tied=bool(m["tied_embeddings"]),
        )
    else:
        t = Transformer.gpt(
            name=m["name"],
            layers=m["layers"],
            width=m["hidden"],
            heads=m["heads"],
            vocabulary=m["vocab"],
            hidden=m["ffn_hidden"],
            positions=case["sequence"],
            tied=bool(m["tied_embeddings"]),
        )
    return t


def layout(case: dict[str, Any]) -> Layout:
    p, gpus = case["parallel"], case["machine"]["gpus"]
    data = p["data"] or gpus // p["tensor"]
    stage = p["shard_stage"] or 0
    depth = (p["shard_size"] or data) if stage == 3 else 1
    return Layout(
        data=data // depth,
        depth=depth,
        row=p["tensor"],
        microbatch=case["micro_batch"] or 1,
        recomputes=case["recompute"] == "full",
        cuts_tokens=bool(p["sequence_parallel"]) and p["tensor"] > 1,
        shards_optimizer=stage in (1, 2),
    )


def job(case: dict[str, Any]) -> Job:
    att = case["attention"] or "flash"
    eager = "unfused" in att or att in ("torch", "fused")
    fused = (
        bool(case["compile"])
        or case["framework"]
        and any(x in case["framework"] for x in ("Megatron", "Transformer Engine"))
    )
    return Job(
        model=model(case),
        batch=case["global_batch"],
        sequence=case["sequence"],
        precision="bf16",
        attention="eager" if eager else "sdpa",
        fused=bool(fused),
        storage=Storage(wire=2),
    )


def predicted(case: dict[str, Any]) -> float:
    on, way = machine(case), layout(case)
    seconds = simulate(job(case), way, on).seconds
    if case["recompute"] == "selective":  # of every second layer, or of what is cheap: half way
        seconds = (seconds + simulate(job(case), replace(way, recomputes=True), on).seconds) / 2
    return seconds
