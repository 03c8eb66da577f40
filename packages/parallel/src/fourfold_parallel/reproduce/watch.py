"""A record as it grows, in a terminal: loss, speed, time left, memory."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fourfold_parallel.common.records import SCHEMA

LOOK_S = 0.5
"""Seconds between two looks at the file."""
RECENT = 20
"""Steps that speed and time left are averaged over."""
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 48
"""Width of the curve, in characters."""


@dataclass(slots=True)
class Watched:
    """The state of a record so far: it reads only the lines that came since the last look."""

    path: Path
    header: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    latest: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    slow: dict[str, Any] = field(default_factory=dict)
    """The last rank that kept the others waiting."""
    saved: dict[str, Any] = field(default_factory=dict)
    """The last save that ended, well or not."""
    lines: int = 0
    is_over: bool = False
    """True once a training has done its last step, or a stage has ended, until it is resumed."""
    _read: int = 0

    def look(self) -> None:
        """Take in the whole lines that are new; a file that was begun anew is read from its start.

        Raises:
            ValueError: A line is no event, or the file does not begin with a run.
        """
        if self.path.stat().st_size < self._read:
            self.header, self.steps, self.latest, self.validation = {}, [], {}, {}
            self.slow, self.saved = {}, {}
            self.lines = self._read = 0
            self.is_over = False
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self.lines += 1
            self._take(self._parsed(line))

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            event = json.loads(line)
            assert isinstance(event, dict)
            event["event"]
        except (ValueError, AssertionError, KeyError):
            raise ValueError(
                f"{self.path}, line {self.lines}, is no event of a record; name the .jsonl file of a run"
            ) from None
        if self.lines == 1 and (event["event"], event.get("schema")) != ("run", SCHEMA):
            raise ValueError(f"{self.path} does not begin with a run of schema {SCHEMA}")
        return event

    def _take(self, event: dict[str, Any]) -> None:
        self.latest = event
        match event["event"]:
            case "run":
                self.header = event
            case "extended":
                self.header = {**self.header, "run": event["run"]}
            case "resumed":
                self.steps = [step for step in self.steps if step["step"] <= event["step"]]
                self.is_over = False
            case "step":
                self.steps.append(event)
            case "validation":
                self.validation = event
            case "straggler":
                self.slow = event
            case "saved" | "save_failed":
                self.saved = event
            case "trained" | "finished":
                self.is_over = True
            case _:  # what a paper measures
                pass

    @property
    def total(self) -> int:
        """Steps until the horizon; 0 where the record is not of one training run."""
        return planned_steps(self.header.get("run"))

    @property
    def silent_s(self) -> float:
        """Seconds since the file was last written to."""
        return time.time() - self.path.stat().st_mtime

    @property
    def step_s(self) -> float:
        """Mean seconds of the last steps; 0 before the first."""
        recent = [step["elapsed_s"] for step in self.steps[-RECENT:]]
        return sum(recent) / len(recent) if recent else 0.0


def planned_steps(described: object) -> int:
    """Steps of the one run in a description, read without importing its classes; 0 if there is none."""
    level = [described]
    while level:
        runs = [item for item in level if isinstance(item, dict) and _is_run(item)]
        if runs:
            return _steps(runs[0]) if len(runs) == 1 else 0
        level = [below for item in level for below in _below(item)]
    return 0


def _is_run(item: dict[str, Any]) -> bool:
    return {"horizon", "batch", "sequence"} <= item.keys()


def _steps(run: dict[str, Any]) -> int:
    count = run["horizon"]["count"]
    is_steps = str(run["horizon"]["type"]).endswith("Steps")
    return count if is_steps else -(-count // (run["batch"] * run["sequence"]))


def _below(item: object) -> Iterator[object]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, list):
        yield from item


def curve(values: list[float], columns: int = _COLUMNS) -> str:
    """The finite values as a line of bars, each column the mean of its share of them."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    columns = min(columns, len(values))
    edges = [len(values) * column // columns for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 10 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def shown(watched: Watched) -> Group:
    """The state of a record as a terminal shows it."""
    rows = Table.grid(padding=(0, 2))
    if watched.total:
        last = watched.steps[-1]["step"] if watched.steps else 0
        rows.add_row("", ProgressBar(total=watched.total, completed=last, width=_COLUMNS))
    for name, text in _rows(watched):
        rows.add_row(Text(name, style="dim"), Text(text))
    return Group(_title(watched), rows)


def _title(watched: Watched) -> Text:
    match watched.latest.get("event"):
        case None:
            state = "no line yet"
        case "finished":
            state = "finished"
        case "terminated":
            state = "ended by SIGTERM; the same command goes on from its checkpoint"
        case _ if watched.is_over:
            state = "trained"
        case _ if watched.silent_s > max(10.0, 5 * watched.step_s):
            state = f"nothing written for {duration(watched.silent_s)}"
        case _:
            state = "running"
    return Text.assemble((str(watched.path), "bold"), f"  {state}")


def _rows(watched: Watched) -> Iterator[tuple[str, str]]:
    if watched.steps:
        last, recent = watched.steps[-1], watched.steps[-RECENT:]
        losses = [float(step["loss_nats"]) for step in watched.steps]
        of = f" of {watched.total}" if watched.total else ""
        yield "step", f"{last['step']}{of}"
        yield "loss", f"{losses[-1]:.4f} nats  {curve(losses)}"
        if watched.validation:
            loss, step = watched.validation["validation_loss_nats"], watched.validation["step"]
            yield "validation", f"{float(loss):.4f} nats at step {step}"
        speed = sum(step["tokens_per_s"] for step in recent) / len(recent)
        yield "speed", f"{speed:,.0f} tokens a second"
        if watched.total and not watched.is_over:
            yield "left", duration((watched.total - last["step"]) * watched.step_s)
        yield "memory", f"{last['peak_bytes'] / 2**30:.2f} GiB at most"
    if watched.saved:
        event = watched.saved
        failed = event["event"] == "save_failed"
        told = f"failed: {event['reason']}" if failed else f"stalled {event['stall_s']:.2f} s"
        yield "saved", f"step {event['step']}, {told}"
    if watched.slow:
        event = watched.slow
        yield (
            "slow",
            (
                f"rank {event['rank']}, in {event['phase']}; others waited {event['share']:.0%} of the time"
            ),
        )
    if watched.lines:
        yield "lines", f"{watched.lines}, the last of kind {watched.latest['event']!r}"


def watch(path: Path, target: Console, *, once: bool, patience_s: float) -> None:
    """Show a record until its run ends, or once.

    Raises:
        ValueError: There is no such record, or it grows no more.
    """
    if not path.is_file():
        raise ValueError(f"no record at {path}; name the .jsonl file that a run writes")
    watched = Watched(path)
    watched.look()
    if once or watched.is_over:
        target.print(shown(watched))
        return
    with Live(shown(watched), console=target, auto_refresh=False) as live:
        while not watched.is_over:
            if watched.silent_s > patience_s:
                raise ValueError(
                    f"{path} has not grown for {duration(watched.silent_s)}, and its run has not ended: it "
                    "was perhaps killed. The command that began it goes on from its last checkpoint; "
                    "--patience-s waits longer"
                )
            time.sleep(LOOK_S)
            watched.look()
            live.update(shown(watched), refresh=True)
