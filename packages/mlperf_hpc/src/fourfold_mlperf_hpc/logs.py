"""Facts of MLPerf HPC v0.7's logs: when each run staged, trained, evaluated and stopped, and how good it was.

    git clone https://github.com/mlcommons/hpc_results_v0.7
    python -m fourfold_mlperf_hpc extract hpc_results_v0.7

makes `measured/v0.7.jsonl` again, to the byte. Nothing is computed here: times are told from the run's start,
spans as the pause before them and their length.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fourfold_parallel.common.files import write_text

SOURCE = {
    "kind": "source",
    "source": "https://github.com/mlcommons/hpc_results_v0.7",
    "commit": "3edadefe722000a5613076f0ba429365850b44cd",
    "licence": "Apache-2.0",
    "facts_of": "result_*.txt, systems/*.json; ms from run_start; a span: [ms since the one before, its ms]",
}
QUALITIES = {"cosmoflow": "eval_error", "deepcam": "eval_accuracy"}
"""Key of the quality by benchmark: mean absolute error, intersection over union."""
MARK = re.compile(r":::MLL\S*\s*")
"""Begins a line's own part: `:::MLLOG`, in older logs another ending."""


def extract(folder: Path, out: Path) -> int:
    """Write the facts of a checkout's logs as JSONL; gives the number of runs.

    Raises:
        ValueError: The folder holds no logs of the round.
    """
    lines: list[dict[str, Any]] = [SOURCE]
    runs = 0
    for place in sorted(folder.glob("*/results/*/*")):
        system = json.loads(
            (place.parents[2] / "systems" / f"{place.parent.name}.json").read_text(encoding="utf-8")
        )
        logs = sorted(place.glob("result_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
        lines.append(
            {
                "kind": "submission", "folder": str(place.relative_to(folder)),
                "benchmark": place.name, "division": system["division"],
                "nodes": int(system["number_of_nodes"]),
                "accelerators_per_node": int(system["accelerators_per_node"]),
                "device": system["accelerator_model_name"]
                if int(system["accelerators_per_node"])
                else system["host_processor_model_name"],
            }
        )  # fmt: skip
        lines += [facts(log, place.name) for log in logs]
        runs += len(logs)
    if not runs:
        raise ValueError(
            f"{folder} holds no logs (*/results/*/*/result_*.txt); name a checkout of {SOURCE['source']}"
        )
    write_text(out, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return runs


def facts(log: Path, benchmark: str) -> dict[str, Any]:
    """Facts of one run, qualities to seven digits; `stop_ms` is null where the log ends before the run."""
    events = defaultdict(list)
    for event in _events(log):
        events[event["key"]].append(event)
    start_ms = events["run_start"][0]["time_ms"]

    def times(key: str) -> list[int]:
        return [event["time_ms"] - start_ms for event in events[key]]

    def spans(key: str) -> list[tuple[int, int]]:
        begun = list(zip(times(f"{key}_start"), times(f"{key}_stop"), strict=False))
        ends = [0, *(stop for _, stop in begun)]
        return [
            (start - end, stop - start) for end, (start, stop) in zip(ends, begun, strict=False)
        ]

    qualities = events[QUALITIES[benchmark]]
    stops = events["run_stop"]
    last_ms = max(event["time_ms"] for several in events.values() for event in several) - start_ms
    return {
        "kind": "run",
        "log": log.name,
        "division_in_log": events["submission_division"][0]["value"],
        "status": stops[0]["metadata"].get("status") if stops else None,
        "batch": events["global_batch_size"][0]["value"],
        "train_samples": events["train_samples"][0]["value"],
        "steps": qualities[-1]["metadata"].get("step_num"),
        "stop_ms": times("run_stop")[-1] if stops else None,
        "last_ms": last_ms,
        "staging_ms": spans("staging"),
        "epochs_begun": len(events["epoch_start"]),
        "epochs_ms": spans("epoch"),
        "evaluations_ms": spans("eval"),
        "saves_ms": spans("save"),
        "qualities": [round(event["value"], 7) for event in qualities],
    }


def _events(log: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log that are its own, whatever stands before the token or between them."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            at = MARK.search(line)
            if at is not None:
                try:
                    yield json.loads(line[at.end() :])
                except json.JSONDecodeError:  # ranks that wrote into one another's lines
                    continue
