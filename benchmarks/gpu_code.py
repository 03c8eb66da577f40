"""What the machine code of every Triton kernel needs, for GPUs that are not here.

    scripts/env python benchmarks/gpu_code.py [OUT.jsonl]

Each kernel is compiled as it is launched: one decoded token of 16k in bfloat16 on three head shapes, a chunk
of 1,024 rows of logits in float32; for A100, H100, B200 and MI300. A line names registers, shared memory of
a program, what spills, and the bytes that the launch must move. Nothing of it was run on a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton as triton_language

from fourfold_goldfish.kernels import losses_and_slopes
from fourfold_loki.cache import tiled
from fourfold_loki.kernels import triton
from fourfold_loki.kernels.page_read import PageRead
from fourfold_parallel.common.records import commit
from fourfold_parallel.testing.gpu_code import (
    SHARED_LIMITS,
    TARGETS,
    KernelLaunch,
    compiled,
    launches,
)

SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128), "Llama-2-7B": (32, 32, 128)}
LENGTH, PAGE, SHARE, DIVISOR = 16384, 16, 4, 4
VOCABULARIES = (32_000, 128_256)


def bytes_of(launch: KernelLaunch) -> int:
    """What a launch reads and writes at least: of a cache the pages chosen, of logits each twice and back."""
    held = {name: t.nbytes for name, t in launch.arguments.items() if isinstance(t, torch.Tensor)}
    match launch.name:
        case "gather_kernel":
            share = launch.arguments["pages"] * launch.arguments["page"] / launch.arguments["room"]
            held |= {name: int(held[name] * share) for name in ("keys", "values")}
        case "_softmax_slope":
            held["logits_pointer"] *= 3
        case _:
            pass
    return sum(held.values())


def decode(heads: int, kv_heads: int, width: int) -> None:
    """One token over a cache."""
    queries = torch.zeros(1, heads, 1, width, dtype=torch.bfloat16)
    keys, values = torch.zeros(2, 1, kv_heads, LENGTH, width, dtype=torch.bfloat16)
    read = PageRead(
        length=LENGTH, pages=LENGTH // SHARE // PAGE, page=PAGE, sinks=0, window=0, scaling=1.0
    )
    triton.decode(queries, keys, values, tiled(keys[..., : width // DIVISOR]), read)


def loss(vocabulary: int) -> None:
    """One chunk of logits."""
    losses_and_slopes(torch.zeros(1024, vocabulary), torch.zeros(1024, dtype=torch.long))


def main() -> None:
    """Compile, print, write."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/gpu_code.jsonl")
    cases: dict[str, Callable[[], None]] = {
        f"loki, {name}": lambda shape=shape: decode(*shape) for name, shape in SHAPES.items()
    }
    cases |= {f"goldfish, {n} ids": lambda n=n: loss(n) for n in VOCABULARIES}
    lines: list[dict[str, object]] = [
        {
            "event": "gpu_code",
            "run": "not run on a GPU",
            "triton": triton_language.__version__,
            "commit": commit(),
        }
    ]
    for case, call in cases.items():
        with launches() as caught:
            call()
        for launch in caught:
            for target in TARGETS:
                code = compiled(launch, target)
                lines.append(
                    {
                        "case": case,
                        "kernel": launch.name,
                        "grid": launch.grid,
                        "target": target,
                        "registers": code.registers,
                        "spilled_bytes": code.spilled_bytes,
                        "shared_bytes": code.shared_bytes,
                        "shared_limit_bytes": SHARED_LIMITS[target],
                        "warps": code.warps,
                        "launch_bytes": bytes_of(launch),
                    }
                )
                print(json.dumps(lines[-1]), flush=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
