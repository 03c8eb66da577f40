#!/usr/bin/env bash
# torch 2.13.0: with _ExperimentalConfig(profile_all_threads=True), torch.profiler records no memory at all. profile_memory=True
# gives one event [memory] for each allocation and each free of the profiled thread; asked for all threads, the same eight
# blocks leave none, on the thread that profiles as little as on others, and no word says so. Operators are still recorded.
# So whoever turns to all threads since frees of other threads are missing (profiler_frees_of_other_threads.sh) gets nothing.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/seen.py" <<'PY'
import json
import sys

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile


def seen(path, all_threads):
    settings = _ExperimentalConfig(profile_all_threads=all_threads)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, experimental_config=settings) as profiled:
        for _ in range(8):
            torch.empty(2**20, dtype=torch.uint8)
    profiled.export_chrome_trace(path)
    with open(path) as file:
        events = json.load(file)["traceEvents"]
    return sum(e["name"] == "[memory]" for e in events), sum(e["name"] == "aten::empty" for e in events)


print("torch", torch.__version__)
for all_threads in (False, True):
    memory, operators = seen(sys.argv[1], all_threads)
    print(f"profile_all_threads={all_threads}: {memory} events of memory, {operators} of aten::empty")
    assert (memory, operators) == ((0, 8) if all_threads else (16, 8))
PY
"$folder/venv/bin/python" "$folder/seen.py" "$folder/trace.json" 2>/dev/null
# Seen:
# torch 2.13.0+cpu
# profile_all_threads=False: 16 events of memory, 8 of aten::empty
# profile_all_threads=True: 0 events of memory, 8 of aten::empty
