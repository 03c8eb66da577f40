"""Models far larger than this machine's memory: opened, laid out, read and written by one rank of many.

    scripts/env python benchmarks/open_large.py [OUT.jsonl]

The model is made from its configuration on the meta device. Its safetensors have all its tensors at their
real sizes, as holes of sparse files, so that 141 or 281 GB take no disk. One rank of a grid, whose group is
torch's fake one, lays it out, reads its pieces, and writes its part of a checkpoint. Measured are that rank's
seconds and by how much its own memory grows at its peak, over its shard, sampled every 5 ms; pages of mapped
files are the system's. RULE, fixed before: at most 1.3 times the shard. What the values are is not asked
here: tests of the grid ask it at sizes that fit.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from fourfold_parallel.common.axes import AxisName
from fourfold_parallel.common.held import State, ties_of
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.run import shards

MOST = 1.3
RANK = 5
"""Of the many; all have pieces of one size, but for what does not divide."""
MODELS: Mapping[str, tuple[PretrainedConfig, dict[AxisName, int], dict[str, Any]]] = {
    "Llama-3.1-70B": (
        LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128_256,
        ),
        {"data": 1, "depth": 8, "row": 8, "col": 4},
        {},
    ),
    "Mixtral-8x22B": (
        MixtralConfig(
            hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48,
            num_key_value_heads=8, vocab_size=32_768, num_local_experts=8,
        ),
        {"data": 1, "depth": 8, "row": 8, "col": 4},
        {"experts": "exchanged"},
    ),
}  # fmt: skip


def write_holes(model: nn.Module, folder: Path) -> int:
    """A safetensors file a decoder layer or so, all of holes; gives the bytes that they seem to have."""
    files: list[dict[str, Any]] = [{}]
    ends = 0
    for name, parameter in model.named_parameters():
        if ends > 2**31:
            files, ends = [*files, {}], 0
        offsets = [ends, ends + parameter.nbytes]
        files[-1][name] = {"dtype": "BF16", "shape": [*parameter.shape], "data_offsets": offsets}
        ends = offsets[1]
    for number, header in enumerate(files):
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + max(each["data_offsets"][1] for each in header.values()))
    return sum(parameter.nbytes for parameter in model.parameters())


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds and the growth of this process' own memory at its peak."""
    seen: dict[str, float] = {}
    before, ends, started_s = own_bytes(), threading.Event(), time.perf_counter()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not ends.wait(0.005):
            peak = max(peak, own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    ends.set()
    watcher.join()
    seen |= {"seconds": round(time.perf_counter() - started_s, 1), "peak_bytes": peak - before}


def own_bytes() -> int:
    """Memory that is this process' own."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(name: str) -> dict[str, Any]:
    """One model, in a process of its own."""
    config, sizes, options = MODELS[name]
    large_pieces = -3, 65536  # M_MMAP_THRESHOLD: what is freed leaves the process
    assert ctypes.CDLL(None).mallopt(*large_pieces)
    ranks = math.prod(sizes.values())
    dist.init_process_group("fake", rank=RANK, world_size=ranks, store=FakeStore())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        whole = write_holes(model, folder)
        mesh = Mesh(
            data=sizes["data"],
            depth=sizes["depth"],
            row=sizes["row"],
            col=sizes["col"],
            device="cpu",
        )
        with watched() as loading:
            parallel = parallelize(model, mesh, weights=folder, **options)
        held = {n: parallel.held(n, p, local(p)) for n, p in model.named_parameters()}
        state = State(weights=held, moments={}, numbers={}, ties=ties_of(model))
        with watched() as saving:
            items = shards.plan(state, group=None).items
            image = shards.Image(state, items, label=f"-{RANK:05d}")
            image.take(state)
            image.write(folder)
    shard = sum(local(p).nbytes for p in model.parameters())
    worst = max(loading["peak_bytes"], saving["peak_bytes"]) / shard
    return {
        "event": "open_large", "model": name, "grid": sizes, **options, "parameters": parameters,
        "file_bytes": whole, "shard_bytes": shard, "loading": loading, "saving": saving,
        "peak_over_shard": round(worst, 3), "holds": worst <= MOST, "torch": torch.__version__,
        "cores": os.cpu_count(),
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    if len(sys.argv) > 1 and sys.argv[1] in MODELS:
        print(json.dumps(measure(sys.argv[1])))
        return
    rows = []
    for name in MODELS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, check=True)
        rows.append(done.stdout.decode().splitlines()[-1])
        print(rows[-1], flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
