"""A training step of a 1B-class Llama on one GPU: the grid beside plain torch, and the planner's memory.

    python gpu_training.py OUT.jsonl

Both run the same transformers model and attention, AdamW in float32 and products in bfloat16, eager;
with `--compile` plain torch also compiled. MFU is six FLOPs a parameter and token over the device's peak in
bfloat16, where it is known here. Memory is torch's own peak against the planner's for the same layout, on a
grid of one rank. Not run on a GPU so far; `--device cpu --width 64 --layers 2` tries the same lines here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold_parallel.common.records import commit, hardware, versions
from fourfold_parallel.plan.job import GRID, GRID_ON_CPU, Job, Layout
from fourfold_parallel.plan.memory import memory_of
from fourfold_parallel.plan.transformer import Transformer
from fourfold_parallel.planning.verify import LayoutRun
from fourfold_parallel.testing.ranks import run_on_ranks

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s by NVIDIA's data sheets."""


def config(width: int, layers: int) -> LlamaConfig:
    """At width 2,048 and 16 layers 1.2 billion parameters, as Llama 3.2 1B."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256), intermediate_size=4 * width, vocab_size=128_256,
        max_position_embeddings=2048, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip


def plain(settings: LlamaConfig, tokens: torch.Tensor, *, compiles: bool) -> Callable[[], None]:
    """A step of stock torch code."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    model = model.to(tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    called = torch.compile(model) if compiles else model

    def step() -> None:
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            loss = called(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(step: Callable[[], None], rounds: int, *, on_gpu: bool) -> float:
    """Median after two steps that compile and allocate."""
    times = []
    for turn in range(rounds + 2):
        started_s = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(time.perf_counter() - started_s)
    return statistics.median(times)


def grid(width: int, layers: int, batch: int, sequence: int, rounds: int) -> dict[str, float]:
    """Seconds and bytes of the grid's step on one rank."""
    settings = config(width, layers)
    on_gpu = torch.cuda.is_available()
    job = job_of(settings, batch, sequence, on_gpu=on_gpu)
    layout = Layout(microbatch=batch)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run = LayoutRun(settings, job, layout)
    if on_gpu:
        run.tokens = run.tokens.to("cuda")
    seconds = seconds_of(run.step, rounds, on_gpu=on_gpu)
    measured = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {
        "seconds": seconds,
        "measured_bytes": measured,
        "predicted_bytes": memory_of(job, layout).peak,
    }


def job_of(settings: LlamaConfig, batch: int, sequence: int, *, on_gpu: bool) -> Job:
    """The planner's view of it."""
    return Job(
        model=Transformer.of(settings), batch=batch, sequence=sequence, precision="bf16",
        storage=GRID if on_gpu else GRID_ON_CPU,
    )  # fmt: skip


def main() -> None:
    """Measure and record."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("out", type=Path)
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--width", type=int, default=2048)
    asked.add_argument("--layers", type=int, default=16)
    asked.add_argument("--batch", type=int, default=4)
    asked.add_argument("--sequence", type=int, default=2048)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--compile", action="store_true", help="compile the plain model too")
    options = asked.parse_args()
    settings = config(options.width, options.layers)
    on_gpu = options.device == "cuda"
    sizes = (options.batch, options.sequence)
    # A process of its own for the grid: its memory is counted from nothing.
    [ours] = run_on_ranks(
        1, grid, width=options.width, layers=options.layers, batch=options.batch,
        sequence=options.sequence, rounds=options.rounds,
    )  # fmt: skip
    tokens = torch.randint(0, settings.vocab_size, sizes, device=options.device)
    theirs = {
        "eager": seconds_of(plain(settings, tokens, compiles=False), options.rounds, on_gpu=on_gpu)
    }
    if options.compile:
        theirs["compiled"] = seconds_of(
            plain(settings, tokens, compiles=True), options.rounds, on_gpu=on_gpu
        )
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(settings).num_parameters()
    flops = 6 * parameters * options.batch * options.sequence
    name = torch.cuda.get_device_name() if on_gpu else ""
    peak = next((value for known, value in PEAKS.items() if known in name), None)
    line = {
        "event": "gpu_training",
        "parameters": parameters,
        "batch": options.batch,
        "sequence": options.sequence,
        "grid_s": ours["seconds"],
        "plain_s": theirs,
        "grid_over_plain": ours["seconds"] / theirs["eager"],
        "mfu": None if peak is None else flops / ours["seconds"] / peak,
        "plain_mfu": None if peak is None else flops / theirs["eager"] / peak,
        "measured_bytes": ours["measured_bytes"],
        "predicted_bytes": ours["predicted_bytes"],
        "prediction_error": ours["predicted_bytes"] / ours["measured_bytes"] - 1
        if ours["measured_bytes"]
        else None,
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }
    options.out.write_text(json.dumps(line) + "\n", encoding="utf-8")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
