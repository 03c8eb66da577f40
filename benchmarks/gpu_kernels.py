"""The Triton kernels on a GPU against their references: `python gpu_kernels.py OUT.jsonl`.

Stops where they differ. Not run on a GPU so far; `--device cpu` with TRITON_INTERPRET=1 tries the goldfish
half.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fourfold_goldfish import goldfish_cross_entropy
from fourfold_parallel.common.records import commit, hardware, versions

FLOAT32 = 1e-4
"""Relative to the largest entry, in sums over 32,000 ids."""


def goldfish(device: str, vocabulary: int) -> float:
    """The largest difference of loss and gradients between the kernel and torch's operations."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 128, 64, generator=generator).to(device)
    head = torch.randn(vocabulary, 64, generator=generator).to(device) / 8
    targets = torch.randint(0, vocabulary, (2, 128), generator=generator).to(device)
    drop = torch.rand(2, 128, generator=generator).to(device) < 0.25
    found = []
    for backend in ("torch", "triton"):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = goldfish_cross_entropy(leaves[0], leaves[1], targets, drop, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    worst = 0.0
    for theirs, ours in zip(*found, strict=True):
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    if not worst <= FLOAT32:
        raise RuntimeError(
            f"goldfish's kernel differs by {worst} from torch at {vocabulary} ids; the limit is {FLOAT32}"
        )
    return worst


def main() -> None:
    """Compare and record."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("out", type=Path)
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--vocabulary", type=int, default=32_000)
    options = asked.parse_args()
    line: dict[str, object] = {
        "event": "gpu_kernels",
        "goldfish": goldfish(options.device, options.vocabulary),
    }
    if options.device == "cuda":
        import loki_gpu  # needs Triton with a driver

        line["loki"] = loki_gpu.check()
    line |= {"hardware": hardware(), "versions": versions(), "commit": commit()}
    options.out.write_text(json.dumps(line) + "\n", encoding="utf-8")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
