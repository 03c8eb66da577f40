"""One benchmark under several instruction sets: each in a process of its own, with torch held to the same.

ATEN_CPU_CAPABILITY holds torch's own loops and nothing else: MKL and oneDNN, which multiply for it, go on
with all instructions unless they are told too. So all three are.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HELD: dict[str, dict[str, str]] = {
    "native": {},
    "x86-64-v3": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
INSIDE = "FOURFOLD_BENCHMARK_LINES"
ONLY = "FOURFOLD_ONLY_INSTRUCTIONS"
"""Names one of the sets, to measure that one alone."""


def sets() -> list[str]:
    """The instruction sets that this machine can be measured under."""
    return list(HELD) if platform.machine() == "x86_64" else ["native"]


def is_inside() -> bool:
    """True in a process that `on_each` started."""
    return INSIDE in os.environ


def on_each() -> list[dict[str, Any]]:
    """Run this very command under each instruction set; gives the lines that the runs wrote."""
    lines: list[dict[str, Any]] = []
    only = os.environ.get(ONLY)
    for name in [only] if only else sets():
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "lines.jsonl"
            environment = {**os.environ, **HELD[name], INSIDE: str(written)}
            if name != "native":
                environment["FOURFOLD_INSTRUCTIONS"] = name
            subprocess.run([sys.executable, *sys.argv], env=environment, check=True)
            lines += [json.loads(line) for line in written.read_text().splitlines()]
    return lines


def write(line: dict[str, Any]) -> None:
    """Hand a line to the process that started this one, and show it."""
    with Path(os.environ[INSIDE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def machine(threads: int, load_before: float) -> dict[str, Any]:
    """What a record says of where and how it was measured."""
    import torch

    from fourfold_parallel.common import native
    from fourfold_parallel.common.records import commit, hardware, versions

    return {
        "instructions": native.instruction_set(),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "compiler": None if native.compiler() is None else "here",
        "threads": threads,
        "load_1min_before": round(load_before, 2),
        "load_1min_after": round(os.getloadavg()[0], 2),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }
