"""Attention of one decoded token: Loki with pages beside transformers' sdpa and packed dense attention.

    scripts/env python benchmarks/loki_decode.py [OUT.jsonl] [SECONDS] [THREADS]

One and two threads, one sequence, three head shapes, 4k to 32k tokens, bfloat16 and float32, under the native
instruction set and under x86-64-v3 with torch held to the same. Contenders take turns within each round, so
that a busy machine slows all alike; ratios are of medians over rounds, and of the fastest rounds. "loki"
reads a quarter of the keys in pages of 16, ranked by a quarter of the coordinates and shared in groups, by
the compiled kernel; "loki by torch" does so by torch's operations. The ratio to the best dense form is the
one that counts; "pays_from" is what a session's own timing (`Budget(dense_below=WhereItPays())`) finds here.

The last lines are `generate` with SmolLM2-135M over caches of 16k tokens, beside transformers' DynamicCache
and StaticCache, with the elements that Loki read beside what the traffic model predicts. FOURFOLD_KVPRESS
names an interpreter that has kvpress (it needs an older transformers); its caches are then measured too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import instruction_sets
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from fourfold_loki.attention_mode import NEVER
from fourfold_loki.basis import Basis, Label, PublishedSource
from fourfold_loki.budget import Budget, Share
from fourfold_loki.evaluate.bench import contenders, timed
from fourfold_loki.evaluate.traffic import Shape
from fourfold_loki.huggingface.session import loki
from fourfold_loki.kernels.choice import Heads, forms_for
from fourfold_parallel.common.native import instruction_set
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
    times: dict[str, list[float]] = {"dense": [], "static": [], "loki": []}
    dense = DynamicCache(config=config)
    static = StaticCache(config=config, max_cache_len=length + 64)
    with loki(ours, basis, Budget(amount=Share(of_visible=SHARE), page=PAGE)) as session:
        sparse = session.cache(capacity=length + 64)
        session.is_inside = True
        for layer in range(layers):
            keys, values = torch.randn(2, 1, kv_heads, length, width)
            dense.update(keys, values, layer)
            static.update(keys, values, layer)
            sparse.update(keys, values, layer)
        session.is_inside = False
        for _ in range(rounds):
            for name, model, cache in (
                ("dense", plain, dense),
                ("static", plain, static),
                ("loki", ours, sparse),
            ):
                started_s = time.perf_counter()
                model.generate(ids, past_key_values=cache, **options)
                times[name].append(1e3 * (time.perf_counter() - started_s) / TOKENS)
                if name == "static":
                    layers: Any = static.layers
                    for layer in layers:  # a StaticCache cannot be cropped
                        layer.cumulative_length.fill_(length)
                else:
                    cache.crop(length - cache.get_seq_length())
        predicted = SHARE + 1 / DIVISOR / 2
        return {
            "median_ms": {name: round(statistics.median(each), 3) for name, each in times.items()},
            "read_share": round(session.reads.read_share, 5),
            "predicted_share": predicted,
            "read_over_predicted": round(session.reads.read_share / predicted, 4),
        }


def kvpress(length: int) -> dict[str, Any]:
    """Decoding over a cache that kvpress has thinned to a quarter, in an environment of its own."""
    interpreter = os.environ.get("FOURFOLD_KVPRESS")
    if not interpreter:
        return {
            "event": "kvpress",
            "skipped": "FOURFOLD_KVPRESS names no interpreter that has kvpress and transformers before 5.3",
        }
    script = Path(__file__).with_name("loki_kvpress.py")
    command = [interpreter, script, SmolLM2().folder(), str(length), str(SHARE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"event": "kvpress", **json.loads(done.stdout.splitlines()[-1])}


def attention(threads: int, seconds: float) -> None:
    """Every shape, format and length."""
    torch.set_num_threads(threads)
    load_before = os.getloadavg()[0]
    for dtype in (torch.bfloat16, torch.float32):
        for shape, (heads, kv_heads, width) in SHAPES.items():
            pays = forms_for(
                Heads(
                    heads=heads, kv_heads=kv_heads, head_width=width, width=width // DIVISOR, page=PAGE,
                    share=SHARE, dtype=dtype, device=torch.device("cpu"), threads=threads,
                )
            )  # fmt: skip
            for length in LENGTHS:
                if kv_heads == 32 and length > 8192:
                    continue  # a cache of half a gigabyte a layer says no more
                run = contenders(heads, kv_heads, width, tokens=length, dtype=dtype)
                found = timed(run, seconds=seconds, patience_s=seconds / 10)
                ms = {name: round(statistics.median(each), 4) for name, each in found.items()}
                least = {name: round(min(each), 4) for name, each in found.items()}
                best = min(ms["packed"], ms["packed sdpa"])
                traffic = Shape(
                    layers=1,
                    heads=heads,
                    kv_heads=kv_heads,
                    head_width=width,
                    weights=0,
                    bytes_each=dtype.itemsize,
                )
                instruction_sets.write(
                    {
                        "event": "loki_decode",
                        "instructions": instruction_set(),
                        "threads": threads,
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "tokens": length,
                        "rounds": {name: len(each) for name, each in found.items()},
                        "median_ms": ms,
                        "least_ms": least,
                        "dense_bytes": traffic.cache_bytes(length),
                        "loki_bytes": traffic.cache_bytes(
                            length, share=SHARE, width=width // DIVISOR
                        ),
                        "over_sdpa": round(ms["sdpa"] / ms["loki"], 3),
                        "over_best_dense": round(best / ms["loki"], 3),
                        "over_best_dense_by_least": round(
                            min(least["packed"], least["packed sdpa"]) / least["loki"], 3
                        ),
                        "by_torch_over_best_dense": round(best / ms["loki by torch"], 3),
                        "pays_from": None if pays.pays_from == NEVER else pays.pays_from,
                        "chosen": {"dense": pays.dense, "sparse": pays.sparse},
                    }
                )
    instruction_sets.write({"event": "machine", **instruction_sets.machine(threads, load_before)})


def main() -> None:
    """Measure, print and record."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/loki_decode.jsonl")
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.4
    if not instruction_sets.is_inside():
        lines = [*instruction_sets.on_each(), kvpress(16384)]
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return
    alone = [int(sys.argv[3])] if len(sys.argv) > 3 else None
    for threads in alone or (1, 2):
        attention(threads, seconds)
    if alone:
        return
    torch.set_num_threads(1)
    ends = end_to_end(16384, rounds=3)
    times = ends["median_ms"]
    instruction_sets.write(
        {
            "event": "loki_end_to_end",
            "instructions": instruction_set(),
            "threads": 1,
            "tokens": 16384,
            "dtype": "float32",
            "generated": TOKENS,
            **ends,
            "over_dense": round(times["dense"] / times["loki"], 3),
            "over_static_cache": round(times["static"] / times["loki"], 3),
        }
    )


if __name__ == "__main__":
    main()
