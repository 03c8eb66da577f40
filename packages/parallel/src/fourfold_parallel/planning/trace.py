"""A simulated step as a Chrome trace, for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fourfold_parallel.common.axes import AXES
from fourfold_parallel.common.files import StrPath, write_text
from fourfold_parallel.plan.simulate import Span

LANES = ("compute", *AXES)


def chrome_trace(spans: Sequence[Span]) -> str:
    """The spans as complete events, microseconds, a thread a lane."""
    names = [
        {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": lane}}
        for tid, lane in enumerate(LANES)
    ]
    events = [
        {
            "ph": "X", "pid": 0, "tid": LANES.index(span.lane), "name": span.name,
            "ts": 1e6 * span.start_s, "dur": 1e6 * (span.stop_s - span.start_s),
        }
        for span in spans
    ]  # fmt: skip
    return json.dumps({"traceEvents": [*names, *events], "displayTimeUnit": "ms"})


def write_trace(spans: Sequence[Span], path: StrPath) -> None:
    """Write it as a file, whole."""
    write_text(Path(path), chrome_trace(spans))
