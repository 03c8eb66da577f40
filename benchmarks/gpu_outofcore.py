"""Training out of core on one GPU: a 3B-class Llama on long sequences, beside recomputing and offloading.

    python gpu_outofcore.py OUT.jsonl

Llama in bfloat16 (autocast), microbatches of 1, 2 and 4 rows, activations of decoder layers under 20, 40
and 60 GB, pinned host memory as the store. Each of plain training (where it fits), recomputation of every
layer, torch's `save_on_cpu` and ours takes five steps, twice, one after the other. Recorded: tokens a
second, torch's own peak less what is there before a step, the predicted seconds, and whether losses are
plain's. Not run on a GPU so far; `--device cpu --width 64 --layers 4 --sequence 128` tries the same lines
here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold_parallel.common.records import commit, hardware, versions
from fourfold_parallel.run.engines import Engine, Single
from fourfold_parallel.run.outofcore import Decisions, OutOfCore

STEPS = 5


def config(width: int, layers: int, sequence: int) -> LlamaConfig:
    """At width 3,072 and 28 layers 3.2 billion parameters, as Llama 3.2 3B."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 384), intermediate_size=width * 8 // 3 // 64 * 64,
        vocab_size=32_000, max_position_embeddings=sequence, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip


def steps(
    engine: Engine, settings: LlamaConfig, rows: int, sequence: int, *, saves_on_cpu: bool
) -> dict[str, Any]:
    """Five steps of a fresh model."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with engine.open(model, optimizer, precision="bf16", batch=rows, microbatch=rows) as session:
        tokens = torch.randint(
            0, settings.vocab_size, (rows, sequence), generator=torch.Generator().manual_seed(0)
        ).to(session.device)
        times, losses, peak, before = [], [], 0, 0
        for step in range(STEPS + 1):
            if session.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started_s = time.perf_counter()
            saving = (
                torch.autograd.graph.save_on_cpu(pin_memory=True) if saves_on_cpu else nullcontext()
            )
            with session.microbatch(is_last=True), saving:
                loss = session.model(input_ids=tokens, labels=tokens).loss
                session.backward(loss)
            session.update(1.0)
            losses.append(loss.item())  # waits for the device
            if step:  # the first measures and plans
                times.append(time.perf_counter() - started_s)
                if session.device.type == "cuda":
                    peak = max(peak, torch.cuda.max_memory_allocated() - before)
        told: dict[str, Any] = {}
        planner = getattr(session, "planner", None)
        if planner is not None:
            [choice] = planner.choices
            told = {"decisions": choice.decisions, "predicted_s": choice.timeline.seconds}
    seconds = statistics.median(times)
    return {"seconds": seconds, "tokens_per_s": rows * sequence / seconds, "peak_bytes": peak,
            "losses": losses, **told}  # fmt: skip


def main() -> None:
    """Measure and record."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("out", type=Path)
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--width", type=int, default=3072)
    asked.add_argument("--layers", type=int, default=28)
    asked.add_argument("--sequence", type=int, default=8192)
    asked.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4])
    asked.add_argument("--budgets-gb", type=float, nargs="*", default=[20, 40, 60])
    options = asked.parse_args()
    settings = config(options.width, options.layers, options.sequence)
    recompute = Decisions(letters="R" * options.layers)
    engines: dict[str, Engine] = {
        "plain": Single(), "recompute": OutOfCore(inner=Single(), budget=recompute), "save_on_cpu": Single(),
    }  # fmt: skip
    for gigabytes in options.budgets_gb:
        engines[f"ours {gigabytes}"] = OutOfCore(inner=Single(), budget=int(gigabytes * 1e9))
    about = {"hardware": hardware(), "versions": versions(), "commit": commit()}
    with options.out.open("a", encoding="utf-8") as out:
        for rows in options.rows:
            for turn in range(2):
                for name, engine in engines.items():
                    line = {"event": "gpu_outofcore", "rows": rows, "turn": turn, "engine": name}
                    try:
                        line |= steps(
                            engine,
                            settings,
                            rows,
                            options.sequence,
                            saves_on_cpu=name == "save_on_cpu",
                        )
                    except (torch.OutOfMemoryError, ValueError) as error:
                        line["refused"] = str(error)[:300]
                    if options.device == "cuda":
                        torch.cuda.empty_cache()
                    print(json.dumps(line))
                    out.write(json.dumps({**line, **about}) + "\n")


if __name__ == "__main__":
    main()
