#!/usr/bin/env bash
# torch 2.13.0: torch.profiler's count of allocated memory ("Total Allocated" of the events [memory], profile_memory=True) goes
# down only for what is freed on a thread that is profiled. What another thread frees stays in the count for good: 8 blocks of
# 1 MiB, allocated one after the other and each freed by a plain thread before the next, read as 8 MiB held at once.
# gloo's threads free the buffers of collectives that they were the last to hold, so in training on several ranks the count
# drifts upward with every step, more on busy cores. Summing the single events by address, where an address that is given
# out again counts as freed, gives what was held.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/seen.py" <<'PY'
import json
import sys
import threading

import torch
from torch.profiler import ProfilerActivity, profile

MIB, BLOCKS = 2**20, 8


def seen(path, in_a_thread):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(BLOCKS):
            held = [torch.empty(MIB, dtype=torch.uint8)]
            if in_a_thread:
                thread = threading.Thread(target=held.clear)
                thread.start()
                thread.join()
            else:
                held.clear()
    profiled.export_chrome_trace(path)
    with open(path) as file:
        events = [e["args"] for e in json.load(file)["traceEvents"] if e["name"] == "[memory]"]
    return (
        max(e["Total Allocated"] for e in events) / MIB,
        sum(e["Bytes"] > 0 for e in events),
        sum(e["Bytes"] < 0 for e in events),
    )


print("torch", torch.__version__)
for in_a_thread in (False, True):
    most, allocated, freed = seen(sys.argv[1], in_a_thread)
    print(f"freed by {'another' if in_a_thread else 'the same'} thread: {allocated} allocations, {freed} frees, at most {most:g} MiB")
    assert (most, allocated, freed) == ((8.0, 8, 0) if in_a_thread else (1.0, 8, 8))
PY
"$folder/venv/bin/python" "$folder/seen.py" "$folder/trace.json" 2>/dev/null
# Seen:
# torch 2.13.0+cpu
# freed by the same thread: 8 allocations, 8 frees, at most 1 MiB
# freed by another thread: 8 allocations, 0 frees, at most 8 MiB
