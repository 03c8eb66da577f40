"""Decoding on a GPU: the Triton kernels beside torch's flash attention, and both beside the bandwidth bound.

    scripts/env python benchmarks/loki_gpu.py [OUT.jsonl]

Batch 1 and 8, three head shapes, up to 128k tokens where the cache fits, bfloat16. The kernels are first
compared with the plain reference on this device; the run stops where they differ. The bound is the time to
read what each contender must read at the copy bandwidth measured here. Needs CUDA and triton.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fourfold_loki.attention import approximate_scores, attend
from fourfold_loki.budget import Budget, Count
from fourfold_loki.cache import tiled
from fourfold_loki.kernels import triton as kernels
from fourfold_loki.kernels.page_read import PageRead
from fourfold_parallel.common.records import hardware, versions

SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128), "Llama-2-7B": (32, 32, 128)}
LENGTHS = (4096, 16384, 65536, 131072)
PAGE, SHARE, ROUNDS = 16, 4, 30
LARGEST_CACHE_BYTES = 20e9
TOLERANCE = 2e-2
"""bfloat16 inputs and output; sums in float32."""


def milliseconds(call: Callable[[], object]) -> float:
    """Median over rounds, by events of the device, after a warm-up that also compiles."""
    for _ in range(3):
        call()
    times = []
    for _ in range(ROUNDS):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) / 1e3)


def check() -> float:
    """The largest difference between kernels and reference, on this device.

    Raises:
        RuntimeError: where they differ.
    """
    torch.manual_seed(0)
    most = 0.0
    for heads, kv_heads, width in SHAPES.values():
        keys, values = torch.randn(2, 2, kv_heads, 1024, width, device="cuda").bfloat16()
        queries = torch.randn(2, heads, 1, width, device="cuda").bfloat16()
        ours = decode(queries, keys, values, tiled(keys[..., : width // 4]), length=1000)
        everything = torch.ones(2, 1, 1, 1000, dtype=torch.bool, device="cuda")
        keys, values, queries = (part.float() for part in (keys, values, queries))
        keys, values = keys[:, :, :1000], values[:, :, :1000]
        scores = approximate_scores(queries, keys, width=width // 4, scaling=width**-0.5)
        budget = Budget(amount=Count(keys=1000 // SHARE), page=PAGE)
        keep = budget.keep(scores, everything, kv_heads=kv_heads, layer=0)
        expected = attend(queries, keys, values, keep, scaling=width**-0.5)
        worst = float((ours.float() - expected).abs().max())
        most = max(most, worst)
        if not worst <= TOLERANCE:
            raise RuntimeError(
                f"kernels differ by {worst} from the reference at {heads}/{kv_heads}"
            )
    return most


def decode(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    leading: torch.Tensor,
    *,
    length: int,
) -> torch.Tensor:
    """A quarter of the keys, in pages of 16."""
    read = PageRead(
        length=length,
        pages=length // SHARE // PAGE,
        page=PAGE,
        sinks=0,
        window=0,
        scaling=queries.shape[-1] ** -0.5,
    )
    return kernels.decode(queries, keys, values, leading, read)


def measure(name: str, batch: int, length: int, bytes_per_s: float) -> dict[str, object]:
    """One shape, both contenders."""
    heads, kv_heads, width = SHAPES[name]
    keys, values = torch.randn(
        2, batch, kv_heads, length, width, device="cuda", dtype=torch.bfloat16
    )
    queries = torch.randn(batch, heads, 1, width, device="cuda", dtype=torch.bfloat16)
    leading = tiled(keys[..., : width // 4])
    dense_bytes = 2 * keys.numel() * 2
    loki_bytes = dense_bytes / SHARE + leading.numel() * 2
    ms = {
        "flash": milliseconds(
            lambda: F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
        ),
        "loki": milliseconds(lambda: decode(queries, keys, values, leading, length=length)),
    }
    bound = {
        "flash": 1e3 * dense_bytes / bytes_per_s,
        "loki": 1e3 * loki_bytes / bytes_per_s,
    }
    return {
        "event": "loki_gpu",
        "shape": name,
        "batch": batch,
        "tokens": length,
        "median_ms": ms,
        "share_of_bound": {one: bound[one] / ms[one] for one in ms},
        "over_flash": ms["flash"] / ms["loki"],
    }


def main() -> None:
    """Check, measure, record."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks/loki_gpu.py needs a CUDA device, and there is none")
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/loki_gpu.jsonl")
    check()
    bytes_per_s = bandwidth()
    lines: list[dict[str, object]] = [
        {
            "event": "machine",
            "copy_bytes_per_s": bytes_per_s,
            "hardware": hardware(),
            "versions": versions(),
        }
    ]
    for name, (_, kv_heads, width) in SHAPES.items():
        for batch in (1, 8):
            for length in LENGTHS:
                if 4 * batch * kv_heads * length * width < LARGEST_CACHE_BYTES:
                    lines.append(measure(name, batch, length, bytes_per_s))
                    print(json.dumps(lines[-1]), flush=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
