"""Head and loss, forward and backward: row-compacted against computing every row, interleaved.

Peers: transformers' own loss over dense logits with masked labels, our chunked loss over all rows (what
chunking alone gives), and, on a GPU, Liger's fused kernel with masked labels; Liger's chunked losses that run
without a GPU hold no plain cross-entropy. Peak memory is that of one call in a process of its own on a CPU,
torch's own count on a GPU.

    python benchmarks/goldfish/loss_speed.py                                  # CPU, about two minutes
    python benchmarks/goldfish/loss_speed.py --device cuda --tokens 16384 --vocabulary 128256 --width 2048
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from fourfold_goldfish import Goldfish, goldfish_cross_entropy
from fourfold_parallel.common.records import hardware

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def problem(options: argparse.Namespace) -> tuple[Problem, torch.Tensor]:
    """Hidden states, head, next-token targets; and the tokens that masks are made from."""
    generator = torch.Generator().manual_seed(0)
    rows = options.tokens // 2048 if options.tokens >= 2048 else 1
    tokens = torch.randint(
        0, options.vocabulary, (rows, options.tokens // rows + 1), generator=generator
    )
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(rows, tokens.shape[1] - 1, options.width, generator=generator)
    head = torch.randn(options.vocabulary, options.width, generator=generator) / options.width**0.5
    device = torch.device(options.device)
    leaves = [one.to(device, dtype).requires_grad_() for one in (hidden, head)]
    return (leaves[0], leaves[1], tokens[:, 1:].to(device)), tokens.to(device)


def candidates(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What is timed: one forward and backward pass each."""
    (hidden, head, targets), tokens = problem(options)
    masks = {k: Goldfish(k=k, context=13).drop(tokens)[:, 1:] for k in (4, 2)}
    nothing = torch.zeros_like(targets, dtype=torch.bool)
    backend = "triton" if options.device == "cuda" else "torch"

    def compacted(drop: torch.Tensor, kind: str) -> None:
        goldfish_cross_entropy(
            hidden,
            head,
            targets,
            drop,
            chunk=options.chunk,
            backend=kind,  # pyright: ignore[reportArgumentType]
        ).backward()

    def dense(drop: torch.Tensor) -> None:
        labels = targets.masked_fill(drop, -100)
        ForCausalLMLoss(
            hidden @ head.T,
            labels=None,
            vocab_size=options.vocabulary,
            shift_labels=labels,
        ).backward()

    found: dict[str, Callable[[], None]] = {
        "chunked, all rows": lambda: compacted(nothing, backend),
        "compacted, k=4": lambda: compacted(masks[4], backend),
        "compacted, k=2": lambda: compacted(masks[2], backend),
    }
    if options.dense:
        found["transformers, k=4"] = lambda: dense(masks[4])
    if options.device == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        flat = targets.masked_fill(masks[4], -100).flatten()
        found["Liger, k=4"] = lambda: liger(head, hidden.flatten(0, 1), flat).backward()
    return found


def clock(options: argparse.Namespace) -> float:
    """CPU seconds, or on a GPU wall seconds after all work is done."""
    if options.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_bytes(options: argparse.Namespace, name: str) -> int:
    """Peak memory of one call."""
    if options.device == "cuda":
        call = candidates(options)[name]
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    words = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Time all in turn, and write one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-dense", dest="dense", action="store_false")
    parser.add_argument("--only", default="", help="run one once and print the peak memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    options = parser.parse_args()
    if options.only:
        candidates(options)[options.only]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    calls = candidates(options)
    # First: a child's peak counts from its parent's at the fork, which must still be small.
    peaks = {name: peak_bytes(options, name) for name in calls}
    best_s = dict.fromkeys(calls, float("inf"))
    for _ in range(options.repetitions):
        for name, call in calls.items():
            started_s = clock(options)
            call()
            best_s[name] = min(best_s[name], clock(options) - started_s)
    lines = []
    for name, elapsed_s in best_s.items():
        line = {
            "loss": name,
            "elapsed_s": round(elapsed_s, 4),
            "ratio_to_chunked": round(elapsed_s / best_s["chunked, all rows"], 3),
            "peak_bytes": peaks[name],
            **{key: getattr(options, key) for key in ("device", "dtype", "tokens", "vocabulary")},
            **{key: getattr(options, key) for key in ("width", "chunk", "repetitions")},
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "hardware": hardware(),
        }
        lines.append(json.dumps(line))
        print(lines[-1])
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
