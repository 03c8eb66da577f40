"""Attention of one decoded token: Loki with pages beside transformers' sdpa and packed dense attention.

    scripts/env python benchmarks/loki_decode.py [OUT.jsonl] [SECONDS]

One thread, one sequence, three head shapes, 4k to 32k tokens, bfloat16 (and float32 where the processor has
no bfloat16 arithmetic). Contenders take turns within each round, so that a busy machine slows all alike;
ratios are of medians over rounds. "sdpa" is transformers' own function on an ordinary cache without a mask;
"packed" is the same attention with the query heads of a group as one matrix; "loki" reads a quarter of the
keys in pages of 16, ranked by a quarter of the coordinates and shared in groups. The last line decodes
whole tokens with SmolLM2-135M over a cache of 16k tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fourfold_loki.basis import Basis, Label
from fourfold_loki.budget import Budget, Share
from fourfold_loki.huggingface import loki
from fourfold_loki.kernels import cpu
from fourfold_loki.provenance import Imported
from fourfold_parallel.run.models import SmolLM2
from fourfold_parallel.run.records import hardware, versions

SHAPES = {
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3-8B": (32, 8, 128),
    "Llama-2-7B": (32, 32, 128),
}
"""Query heads, key/value heads, head width."""
LENGTHS = (4096, 8192, 16384, 32768)
PAGE, SHARE = 16, 0.25
Contender = Callable[[], torch.Tensor]


def contenders(heads: int, kv_heads: int, width: int, length: int, dtype: torch.dtype) -> dict:
    """Every contender on the same cache of random numbers."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    queries = normal(1, heads, 1, width)
    keys, values = normal(1, kv_heads, length, width), normal(1, kv_heads, length, width)
    leading = keys[..., : width // 4].mT.contiguous()
    group, scaling = heads // kv_heads, width**-0.5
    module = SimpleNamespace(num_key_value_groups=group, is_causal=True)
    packed = queries.view(1, kv_heads, group, width)
    return {
        "sdpa": lambda: sdpa_attention_forward(module, queries, keys, values, None)[0],  # type: ignore[arg-type]
        "packed_sdpa": lambda: F.scaled_dot_product_attention(packed, keys, values),
        "packed": lambda: cpu.dense(queries, keys, values, length=length, scaling=scaling),
        "loki": lambda: cpu.decode(
            queries,
            keys,
            values,
            leading,
            length=length,
            pages=int(length * SHARE) // PAGE,
            page=PAGE,
            sinks=0,
            window=0,
            scaling=scaling,
        ),
    }


def timed(run: dict[str, Contender], *, seconds: float, skip: float) -> dict[str, list[float]]:
    """Milliseconds of each contender, round by round; one slower than `skip` is timed three times only."""
    found: dict[str, list[float]] = {name: [] for name in run}
    for call in run.values():
        call()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(found["loki"]) < 5:
        for name, call in run.items():
            if len(found[name]) >= 3 and min(found[name]) > skip:
                continue
            started = time.perf_counter()
            call()
            found[name].append(1e3 * (time.perf_counter() - started))
    return found


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    """A number a contender."""
    return {name: round(statistics.median(times), 4) for name, times in found.items()}


def end_to_end(length: int, *, rounds: int) -> dict[str, float]:
    """Milliseconds a decoded token of the whole model, over caches of random numbers."""
    model = AutoModelForCausalLM.from_pretrained(SmolLM2().folder(), dtype=torch.float32).eval()
    config = model.config
    maps = torch.linalg.qr(torch.randn(config.num_hidden_layers, 3, 64, 64)).Q
    label = Label(kind="pca", stage="after rotary", source=Imported(folder="random rotation"))
    basis = Basis(query_maps=maps, key_maps=maps, spectra=torch.ones(maps.shape[:-1]), label=label)
    token = torch.zeros(1, 1, dtype=torch.long)
    budget = Budget(amount=Share(of_visible=SHARE), page=PAGE)
    times: dict[str, list[float]] = {"dense": [], "loki": []}
    dense = DynamicCache(config=config)
    with torch.no_grad(), loki(model, basis, budget) as session:
        sparse = session.cache(capacity=length + 64)
        session.is_inside = True
        for layer in range(config.num_hidden_layers):
            keys, values = torch.randn(2, 1, 3, length, 64)
            dense.update(keys, values, layer)
            sparse.update(keys, values, layer)
        session.is_inside = False
        for _ in range(rounds):
            started = time.perf_counter()
            model(token, past_key_values=sparse)
            times["loki"].append(1e3 * (time.perf_counter() - started))
    with torch.no_grad():
        for _ in range(rounds):
            started = time.perf_counter()
            model(token, past_key_values=dense)
            times["dense"].append(1e3 * (time.perf_counter() - started))
    return medians(times)


def main() -> None:
    """Measure, print and record."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/loki_decode.jsonl")
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 1.5
    torch.set_num_threads(1)
    dtypes = [torch.bfloat16, torch.float32]
    load_before = os.getloadavg()[0]
    lines = []
    with torch.no_grad():
        for dtype in dtypes:
            for shape, (heads, kv_heads, width) in SHAPES.items():
                for length in LENGTHS:
                    if kv_heads == 32 and (length > 8192 or dtype == torch.float32):
                        continue  # a cache of a gigabyte a layer says no more
                    run = contenders(heads, kv_heads, width, length, dtype)
                    found = timed(run, seconds=seconds, skip=1e3 * seconds / 6)
                    ms = medians(found)
                    best = min(ms["packed"], ms["packed_sdpa"])
                    lines.append(
                        {
                            "event": "loki_decode",
                            "shape": shape,
                            "dtype": str(dtype).removeprefix("torch."),
                            "tokens": length,
                            "rounds": {name: len(times) for name, times in found.items()},
                            "median_ms": ms,
                            "over_sdpa": round(ms["sdpa"] / ms["loki"], 3),
                            "over_packed_sdpa": round(ms["packed_sdpa"] / ms["loki"], 3),
                            "over_best_dense": round(best / ms["loki"], 3),
                        }
                    )
                    print(json.dumps(lines[-1]), flush=True)
    ms = end_to_end(16384, rounds=7)
    lines.append(
        {
            "event": "loki_end_to_end",
            "tokens": 16384,
            "dtype": "float32",
            "median_ms": ms,
            "over_dense": round(ms["dense"] / ms["loki"], 3),
        }
    )
    print(json.dumps(lines[-1]))
    facts = {
        "event": "machine",
        "threads": 1,
        "load_1min_before": load_before,
        "hardware": hardware(),
        "versions": versions(),
    }
    out.write_text("".join(json.dumps(line) + "\n" for line in [facts, *lines]))


if __name__ == "__main__":
    main()
