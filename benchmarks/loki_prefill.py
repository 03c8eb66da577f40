"""A prompt in blocks of queries that read selected pages: what there is to gain, and what certificates leave.

    scripts/env python benchmarks/loki_prefill.py [OUT.jsonl] [TOKENS] [THREADS]

SmolLM2-135M in float32 reads Wikipedia once. "prompt" says how much of the time is attention: what selection
could save at most. "block" says, for some layers and blocks of the last queries, which pages a block has to
read so that every query in it keeps a certified error (Loki, 8 coordinates and 8-bit codes): the pages that
any of them needs. "attention" times the attention of one block over all pages and over a share of them, in
turns: what a block gains that is told which pages to read, for nothing. Ratios are of medians over rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import instruction_sets
import torch
import torch.nn.functional as F

from fourfold_loki.attention_mode import AttentionCall, Observe
from fourfold_loki.basis import fit
from fourfold_loki.budget import Budget, Error
from fourfold_loki.certificate import read_until, scene_of
from fourfold_loki.huggingface import forward as its_module
from fourfold_loki.huggingface.session import attending
from fourfold_loki.reproduce import recipes
from fourfold_loki.reproduce.experiment import built, statistics_of
from fourfold_loki.reproduce.text import windows_of
from fourfold_loki.selectors import Loki
from fourfold_parallel.run.corpora import Wikipedia
from fourfold_parallel.run.models import SmolLM2

forward: Any = its_module  # a function that it imports is wrapped by a clock

SKIP = 300_000
PAGE = 64
LAYERS_APART = 7
BLOCKS = (1, 8, 32)
ERRORS = (0.1, 0.01)
SHARES = (0.25, 0.5, 0.75)
ROUNDS = 5


def main() -> None:
    """Measure, print and record."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/loki_prefill.jsonl")
    length, threads = (
        int(sys.argv[place]) if len(sys.argv) > place else default
        for place, default in ((2, 8192), (3, 1))
    )
    load_before = os.getloadavg()[0]
    torch.set_num_threads(threads)
    lines = [*prompted(length), *block_attention(length)]
    lines.append({"event": "machine", **instruction_sets.machine(threads, load_before)})
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))


@torch.no_grad()
def prompted(length: int) -> list[dict[str, Any]]:
    """One pass over a prompt: time by part, and certified blocks on the way."""
    model: Any = built(SmolLM2())
    basis = fit(statistics_of(replace(recipes.calibration("laptop"), context=2048), model))
    selector = Loki(basis=basis, widths=(8,) * basis.layers, bits=8)
    [ids] = windows_of(Wikipedia(), SmolLM2(), skip_tokens=SKIP, count=1, context=length)
    lines: list[dict[str, Any]] = []
    spent = {"attention": 0.0, "certificates": 0.0}
    whole = forward.sdpa_attention_forward

    def timed(*arguments: Any, **keywords: Any) -> Any:
        began_s = time.perf_counter()
        given = whole(*arguments, **keywords)
        spent["attention"] += time.perf_counter() - began_s
        return given

    def look(call: AttentionCall) -> None:
        began_s = time.perf_counter()
        if call.layer % LAYERS_APART == 0:
            lines.extend(certified_blocks(call, selector))
        spent["certificates"] += time.perf_counter() - began_s

    forward.sdpa_attention_forward = timed
    try:
        with attending(model, Observe(observer=look)):
            began_s = time.perf_counter()
            model.base_model(ids[None], use_cache=False)
            total = time.perf_counter() - began_s - spent["certificates"]
    finally:
        forward.sdpa_attention_forward = whole
    lines.insert(
        0,
        {
            "event": "prompt",
            "tokens": length,
            "attention_share": round(spent["attention"] / total, 3),
        },
    )
    print(json.dumps(lines[0]), flush=True)
    return lines


def certified_blocks(call: AttentionCall, selector: Loki) -> list[dict[str, Any]]:
    """Pages that blocks of the last queries have to read."""
    lines = []
    for error in ERRORS:
        for block in BLOCKS:
            among = call.candidates(queries=block)
            amount = Error(of_output=error)
            scene = scene_of(
                *selector.compared(among),
                call.values,
                selector.bounds(among),
                among.visible,
                scaling=among.scaling,
            )
            read, _ = read_until(amount, scene, Budget(amount=amount, page=PAGE))
            needed = read.any(2).unflatten(1, (call.keys.shape[1], -1)).any(2)
            line = {
                "event": "block",
                "layer": call.layer,
                "error": error,
                "queries": block,
                "pages_read": round(float(needed.float().mean()), 4),
            }
            print(json.dumps(line), flush=True)
            lines.append(line)
    return lines


@torch.no_grad()
def block_attention(length: int, *, queries: int = 64) -> list[dict[str, Any]]:
    """A block of SmolLM2's queries over all keys, and over a share of them that lies together."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 3, 3 * queries, 64, generator=generator)
    key, value = (torch.randn(1, 3, length, 64, generator=generator) for _ in range(2))
    times: dict[float, list[float]] = {}
    for _ in range(ROUNDS):
        for share in (1.0, *SHARES):
            kept = int(share * length)
            began_s = time.perf_counter()
            for _ in range(5):
                F.scaled_dot_product_attention(query, key[:, :, :kept], value[:, :, :kept])
            times.setdefault(share, []).append(time.perf_counter() - began_s)
    dense = statistics.median(times[1.0])
    return [
        {
            "event": "attention",
            "queries": queries,
            "share": share,
            "over_dense": round(dense / statistics.median(each), 3),
        }
        for share, each in times.items()
    ]


if __name__ == "__main__":
    main()
