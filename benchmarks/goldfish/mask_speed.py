"""Nanoseconds per token of the drop mask: ours at several contexts against the published way, interleaved.

The published way is written from its description: unfold the windows, multiply, take the remainder, look
a float table up, compare, write into a copy of the targets. CPU time of the fastest of many repetitions, one
thread; a machine's other work then hardly shows. Under the native instruction set and under x86-64-v3 with
torch held to the same; "by torch" is what stands for the C++ where there is no compiler.

    OMP_NUM_THREADS=1 python benchmarks/goldfish/mask_speed.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fourfold_goldfish import Goldfish

sys.path.insert(0, str(Path(__file__).parents[1]))
import instruction_sets

CONTEXTS = (4, 13, 50)


def published(table: torch.Tensor, targets: torch.Tensor, k: int, context: int) -> torch.Tensor:
    """Targets with -100 where the hash-table strategy leaves them out."""
    masked = targets.clone()
    keys = targets.unfold(1, context, 1).prod(dim=-1) % len(table)
    masked[:, context - 1 :][table[keys] < 1 / k] = -100
    return masked


def main() -> None:
    """Time all of them in turn, and write one JSON line per mask and context."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repetitions", type=int, default=60)
    options.add_argument("--rows", type=int, default=64, help="of 2,048 tokens")
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    chosen = options.parse_args()
    if not instruction_sets.is_inside():
        found = instruction_sets.on_each()
        with chosen.out.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in found))
        return
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    targets = torch.randint(
        0, 32_000, (chosen.rows, 2048), generator=torch.Generator().manual_seed(0)
    )
    table = torch.rand(1_000_003, generator=torch.Generator().manual_seed(2971215073))
    candidates: dict[tuple[str, int], Callable[[], torch.Tensor]] = {}
    for context in CONTEXTS:
        ordered = Goldfish(k=4, context=context)
        prefix = Goldfish(k=4, context=context, boundary="prefix")
        reference = Goldfish(
            k=4, context=context, hash="reference", window="inclusive", boundary="straddle"
        )
        candidates |= {
            ("published", context): lambda context=context: published(table, targets, 4, context),
            ("ordered", context): lambda mask=ordered: mask.drop(targets),
            ("ordered, by torch", context): lambda mask=ordered: mask._by_operations(targets, None),  # noqa: SLF001
            ("ordered, prefix", context): lambda mask=prefix: mask.drop(targets),
            ("reference", context): lambda mask=reference: mask.drop(targets),
        }
    best_s = dict.fromkeys(candidates, float("inf"))
    for _ in range(chosen.repetitions):
        for name, candidate in candidates.items():
            started_s = time.process_time()
            candidate()
            best_s[name] = min(best_s[name], time.process_time() - started_s)
    for (name, context), elapsed_s in best_s.items():
        instruction_sets.write(
            {
                "mask": name,
                "context": context,
                "ns_per_token": round(elapsed_s / targets.numel() * 1e9, 2),
                "ratio_to_published": round(elapsed_s / best_s["published", context], 3),
                "tokens": targets.numel(),
                "repetitions": chosen.repetitions,
                **instruction_sets.machine(1, load_before),
            }
        )


if __name__ == "__main__":
    main()
