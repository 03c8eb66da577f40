"""Attention of one decoded token: Loki with pages beside transformers' sdpa and packed dense attention.

    scripts/env python benchmarks/loki_decode.py [OUT.jsonl] [SECONDS]

One thread, one sequence, three head shapes, 4k to 32k tokens, bfloat16 and float32. Contenders take turns
within each round, so that a busy machine slows all alike; ratios are of medians over rounds. "loki" reads a
quarter of the keys in pages of 16, ranked by a quarter of the coordinates and shared in groups, by the
compiled kernel; "loki by torch" does so by torch's operations. The ratio to the best dense form is the one
that counts. The last line is `generate` with SmolLM2-135M over caches of 16k tokens, with the elements that
Loki read beside what the traffic model predicts.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fourfold_loki.basis import Basis, Label, PublishedSource
from fourfold_loki.budget import Budget, Share
from fourfold_loki.evaluate.bench import contenders, timed
from fourfold_loki.evaluate.traffic import Shape
from fourfold_loki.huggingface.session import loki
from fourfold_parallel.common.records import hardware, versions
from fourfold_parallel.run.models import SmolLM2

SHAPES = {
    "SmolLM2-135M": (9, 3, 64),
    "Llama-3-8B": (32, 8, 128),
    "Llama-2-7B": (32, 32, 128),
}
"""Query heads, key/value heads, head width."""
LENGTHS = (4096, 8192, 16384, 32768)
PAGE, SHARE, DIVISOR = 16, 0.25, 4
TOKENS = 8
"""Generated a round, end to end."""


def end_to_end(length: int, *, rounds: int) -> dict[str, Any]:
    """`generate` beside `generate`, over caches of random numbers."""
    place = SmolLM2().folder()
    models: tuple[Any, ...] = tuple(
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for _ in range(2)
    )
    plain, ours = models
    config = plain.config
    layers, kv_heads, width = config.num_hidden_layers, config.num_key_value_heads, 64
    maps = torch.linalg.qr(torch.randn(layers, kv_heads, width, width)).Q
    label = Label(
        kind="pca", stage="after rotary", source=PublishedSource(folder="random rotation")
    )
    basis = Basis(query_maps=maps, key_maps=maps, spectra=torch.ones(maps.shape[:-1]), label=label)
    ids = torch.zeros(1, length + 1, dtype=torch.long)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": TOKENS,
        "min_new_tokens": TOKENS,
        "do_sample": False,
    }
    times: dict[str, list[float]] = {"dense": [], "loki": []}
    dense = DynamicCache(config=config)
    with loki(ours, basis, Budget(amount=Share(of_visible=SHARE), page=PAGE)) as session:
        sparse = session.cache(capacity=length + 64)
        session.is_inside = True
        for layer in range(layers):
            keys, values = torch.randn(2, 1, kv_heads, length, width)
            dense.update(keys, values, layer)
            sparse.update(keys, values, layer)
        session.is_inside = False
        for _ in range(rounds):
            for name, model, cache in (("dense", plain, dense), ("loki", ours, sparse)):
                started_s = time.perf_counter()
                model.generate(ids, past_key_values=cache, **options)
                times[name].append(1e3 * (time.perf_counter() - started_s) / TOKENS)
                cache.crop(length - cache.get_seq_length())
        predicted = SHARE + 1 / DIVISOR / 2
        return {
            "median_ms": {name: round(statistics.median(each), 3) for name, each in times.items()},
            "read_share": round(session.reads.read_share, 5),
            "predicted_share": predicted,
            "read_over_predicted": round(session.reads.read_share / predicted, 4),
        }


def main() -> None:
    """Measure, print and record."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/loki_decode.jsonl")
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 1.5
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    lines: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for shape, (heads, kv_heads, width) in SHAPES.items():
            for length in LENGTHS:
                if kv_heads == 32 and (length > 16384 or dtype == torch.float32):
                    continue  # a cache of a gigabyte a layer says no more
                run = contenders(heads, kv_heads, width, tokens=length, dtype=dtype)
                found = timed(run, seconds=seconds, patience_s=seconds / 6)
                ms = {name: round(statistics.median(each), 4) for name, each in found.items()}
                best = min(ms["packed"], ms["packed sdpa"])
                traffic = Shape(
                    layers=1,
                    heads=heads,
                    kv_heads=kv_heads,
                    head_width=width,
                    weights=0,
                    bytes_each=dtype.itemsize,
                )
                lines.append(
                    {
                        "event": "loki_decode",
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "tokens": length,
                        "rounds": {name: len(each) for name, each in found.items()},
                        "median_ms": ms,
                        "dense_bytes": traffic.cache_bytes(length),
                        "loki_bytes": traffic.cache_bytes(
                            length, share=SHARE, width=width // DIVISOR
                        ),
                        "over_sdpa": round(ms["sdpa"] / ms["loki"], 3),
                        "over_packed_sdpa": round(ms["packed sdpa"] / ms["loki"], 3),
                        "over_best_dense": round(best / ms["loki"], 3),
                        "by_torch_over_best_dense": round(best / ms["loki by torch"], 3),
                    }
                )
                print(json.dumps(lines[-1]), flush=True)
    ends = end_to_end(16384, rounds=5)
    over = round(ends["median_ms"]["dense"] / ends["median_ms"]["loki"], 3)
    lines.append(
        {
            "event": "loki_end_to_end",
            "tokens": 16384,
            "dtype": "float32",
            "generated": TOKENS,
            **ends,
            "over_dense": over,
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
