"""Lossless Loki beside dense generation: the same tokens, at 16k tokens of real text.

    scripts/env python benchmarks/loki_lossless.py [OUT.jsonl] [TOKENS] [ROUNDS] [THREADS]

SmolLM2-135M in float32 over Wikipedia articles; a prompt is read once, and its cache is used by all in turns:
"dense" is `generate` by single steps that read everything with the query heads of a group packed, "static"
goes over transformers' StaticCache, "lossless" drafts by Loki and verifies. Every round generates the same
tokens anew; ratios are of medians over rounds. "draft_ms" and "block_ms" are medians of single passes.
The text is longer than the 8,192 positions that the model was trained on, for dense and drafts alike.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import instruction_sets
import torch
from transformers import DynamicCache, StaticCache

from fourfold_loki.basis import fit
from fourfold_loki.budget import Budget, Share
from fourfold_loki.huggingface.lossless import Lossless
from fourfold_loki.huggingface.session import loki
from fourfold_loki.reproduce import recipes
from fourfold_loki.reproduce.experiment import built, statistics_of
from fourfold_loki.reproduce.text import windows_of
from fourfold_parallel.run.corpora import Wikipedia
from fourfold_parallel.run.models import SmolLM2

SKIP = 300_000
MADE = 48
"""Tokens generated a round."""
PAGE = 16
SETTINGS = ((1 / 16, 8, 4), (1 / 16, 8, 8), (1 / 16, 16, 6))
"""Share of the keys, width and lookahead of a draft."""


def main() -> None:
    """Measure, print and record."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/loki_lossless.jsonl")
    length, rounds, threads = (
        int(sys.argv[place]) if len(sys.argv) > place else default
        for place, default in ((2, 16384), (3, 2), (4, 1))
    )
    load_before = os.getloadavg()[0]
    lines = measured(length, rounds, threads)
    lines.append({"event": "machine", **instruction_sets.machine(threads, load_before)})
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Timed(Lossless):
    """Drafting and verifying, with the time of every pass by the number of its tokens."""

    def logits(self, model: Any, ids: Any, cache: Any) -> Any:
        """As it is, timed."""
        began_s = time.perf_counter()
        given = super().logits(model, ids, cache)
        PASSES.setdefault(ids.shape[1], []).append(1e3 * (time.perf_counter() - began_s))
        return given


PASSES: dict[int, list[float]] = {}


@torch.no_grad()
def measured(length: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Every way of generating in turns, over one prompt."""
    model: Any = built(SmolLM2())
    basis = fit(statistics_of(replace(recipes.calibration("laptop"), context=2048), model))
    ids = windows_of(Wikipedia(), SmolLM2(), skip_tokens=SKIP, count=1, context=length)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": MADE,
        "min_new_tokens": MADE,
        "do_sample": False,
    }
    static = StaticCache(config=model.config, max_cache_len=length + MADE + 8)
    times: dict[str, list[float]] = {}
    texts: dict[str, list[int]] = {}
    extra: dict[str, dict[str, Any]] = {}
    everything = Budget(amount=Share(of_visible=1.0))
    started_s = time.perf_counter()
    read = DynamicCache(
        config=model.config
    )  # without a mask: a quarter of the time over a StaticCache
    model.base_model(ids[:, :-1], past_key_values=read)
    prompt: Any = read.layers
    for layer, held in enumerate(prompt):
        static.update(held.keys, held.values, layer)
    del read, prompt
    reserved: Any = static.layers
    torch.set_num_threads(threads)
    print(f"prompt of {length} read in {time.perf_counter() - started_s:.0f} s", flush=True)

    def timed(name: str, generate: Callable[[], torch.Tensor]) -> None:
        began_s = time.perf_counter()
        made = generate()[0, length:].tolist()
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - began_s) / MADE)
        texts[name] = made

    def filled(session: Any) -> Any:
        """A LokiCache of the prompt, from the keys that the static cache holds."""
        cache = session.cache(capacity=length + MADE + 64)
        session.is_inside = True
        for layer, held in enumerate(reserved):
            cache.update(held.keys[:, :, : length - 1], held.values[:, :, : length - 1], layer)
        session.is_inside = False
        return cache

    def step(name: str) -> None:
        if name == "static":
            timed(name, lambda: model.generate(ids, past_key_values=static, **options))
            for layer in reserved:  # a StaticCache cannot be cropped
                layer.cumulative_length.fill_(length - 1)
            return
        if name == "dense":
            with loki(model, basis, everything) as session:
                cache = filled(session)
                timed(name, lambda: model.generate(ids, past_key_values=cache, **options))
            return
        share, width, lookahead = SETTINGS[int(name.split()[1])]
        budget = Budget(amount=Share(of_visible=share), page=PAGE, sinks=PAGE, window=4 * PAGE)
        with loki(model, basis, budget, width=width) as session:
            cache, decoder = filled(session), Timed(session=session, lookahead=lookahead)
            PASSES.clear()
            timed(
                name,
                lambda: model.generate(
                    ids, past_key_values=cache, custom_generate=decoder, **options
                ),
            )
            extra[name] = {
                "share": share,
                "width": width,
                "lookahead": lookahead,
                "surety": decoder.surety,
                "acceptance": round(decoder.acceptance, 4),
                "tokens_a_block": round(MADE / decoder.verified, 3),
                "drafted": decoder.drafted,
                "draft_ms": round(statistics.median(PASSES.get(1, [0.0])), 2),
                "block_ms": {
                    str(size): round(statistics.median(each), 2)
                    for size, each in sorted(PASSES.items())
                    if size > 1
                },
            }

    names = ["dense", "static", *(f"lossless {place}" for place in range(len(SETTINGS)))]
    for _ in range(rounds):
        for name in names:
            step(name)
    median = {name: statistics.median(each) for name, each in times.items()}
    lines = []
    for name in names:
        same = [a == b for a, b in zip(texts[name], texts["dense"], strict=True)]
        lines.append(
            {
                "event": "loki_lossless",
                "tokens": length,
                "way": name,
                "threads": torch.get_num_threads(),
                "rounds": rounds,
                "median_ms": round(median[name], 3),
                "equal_tokens": [*same, False].index(False),
                "made": MADE,
                "over_dense": round(median["dense"] / median[name], 3),
                "over_static": round(median["static"] / median[name], 3),
                **extra.get(name, {}),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    main()
