"""JSONL records: one object per event, append-only. The first line says everything about the run.

Units are in the keys (`loss_nats`, `elapsed_s`, `peak_bytes`). A run that dies leaves its lines; a line
cut short by the death is not JSON, so no reader takes it for whole, and a resumed run removes it.
"""

import functools
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from fourfold_parallel.common.files import StrPath, append_line
from fourfold_parallel.common.sinks import OpenSink, Sink
from fourfold_parallel.common.values import Json, digest, from_json, strict, to_json

log = logging.getLogger(__name__)

SCHEMA = 1
"""Version of the record format; a reader refuses others."""

_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Data or weights that a run used, with the licence they came under."""

    name: str
    kind: str
    """"corpus", "tokenizer" or "model"."""
    licence: str
    sha256: str
    source: str
    """Its origin: a package and its version, a hub id, a path."""


def versions() -> dict[str, str]:
    """Installed versions of Python, the libraries that matter and every fourfold package."""
    installed = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name.startswith("fourfold-"):
            installed[name] = distribution.version
    return dict(sorted(installed.items()))


def hardware() -> dict[str, Json]:
    """Processor, cores, memory and accelerators of this machine; no host name."""
    import torch  # here, so that commands that only read records start in no time

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpus: list[Json] = [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": pages,
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": gpus,
    }


def commit() -> str:
    """The source's git commit, with "+changes" where tracked files differ; "installed" outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "installed"
    return f"{head}+changes" if changed else head


@functools.cache
def commit_date(commit: str) -> str:
    """The day of a commit that a record names (`2026-11-22`); empty where this copy does not hold it."""
    try:
        return _git("show", "--no-patch", "--format=%cs", commit.partition("+")[0], "--")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(  # noqa: S603 - words of ours, no shell
        command, capture_output=True, text=True, check=True
    ).stdout.strip()


def header(
    run: object,
    *,
    seed: int,
    world_size: int,
    materials: Sequence[Material],
    overrides: Sequence[str],
) -> dict[str, Json]:
    """The first line of a record: the resolved run and everything its numbers depend on."""
    return {
        "event": "run",
        "schema": SCHEMA,
        "run": to_json(run),
        "run_sha256": digest(run),
        "overrides": list(overrides),
        "seed": seed,
        "world_size": world_size,
        "commit": commit(),
        "versions": dict(versions()),
        "hardware": hardware(),
        "materials": [to_json(material) for material in materials],
    }


class Clock:
    """The time of day for events: it counts on from where it began, whatever becomes of the machine's clock.

    Args:
        after_ms: of the last event before; no later one has an earlier time, though the clock was set back.
    """

    def __init__(self, *, after_ms: int = 0) -> None:
        self._began_ms = max(round(time.time() * 1000), after_ms)
        self._began_s = time.perf_counter()

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return self._began_ms + round((time.perf_counter() - self._began_s) * 1000)


class RecordWriter:
    """Append events to a JSONL file, one line each: a line is there whole or, where the disk is full, not.

    A writer with `path=None` writes nothing: the ranks that do not record hold one.
    """

    def __init__(self, path: Path | None, sinks: Sequence[OpenSink] = ()) -> None:
        """A writer to a file, and to sinks that get every event that the file gets."""
        self._handle: int | None = None
        self._sinks: list[Sink] = []
        last_ms = 0
        if path is not None:
            self._sinks = [open_sink(path) for open_sink in sinks]
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_cut_line(path)
            if path.exists():
                times = (values.get("at_ms", 0) for _, values in _lines(path))
                last_ms = max((int(str(at)) for at in times), default=0)
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._clock = Clock(after_ms=last_ms)

    def write(self, event: str, **values: object) -> None:
        """Append one event, with the time of day (`at_ms`).

        Numbers that are not finite are written as strings, since JSON has none.

        Raises:
            OSError: The line does not fit; what was written of it is taken back.
        """
        if self._handle is not None:
            finite = {key: _finite(value) for key, value in values.items()}
            self._append({"event": event, **finite, "at_ms": self._clock.now_ms()})

    def write_header(self, values: dict[str, Json]) -> None:
        """Append the first line of a run, as `header` gives it."""
        if self._handle is not None:
            self._append({key: strict(value) for key, value in values.items()})

    def _append(self, values: dict[str, Json]) -> None:
        assert self._handle is not None
        append_line(self._handle, json.dumps(values))
        for sink in tuple(self._sinks):
            self._told(sink, partial(sink.write, values))

    def _told(self, sink: Sink, tell: Callable[[], None]) -> None:
        """Tell a sink something; one that fails is told no more."""
        try:
            tell()
        except Exception as error:  # noqa: BLE001 - whatever a tracker does, the run and its record go on
            self._sinks.remove(sink)
            log.warning("%s failed and gets no further events: %s", type(sink).__name__, error)

    def close(self) -> None:
        """Push the lines to the disk and close."""
        for sink in tuple(self._sinks):
            self._told(sink, sink.close)
        self._sinks = []
        if self._handle is not None:
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _finite(value: object) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return strict(to_json(value))


def _drop_cut_line(path: Path) -> None:
    """Remove a last line without its newline, which a killed writer left."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a record: its 1-based line number, its values and the name of its file."""

    line: int
    values: dict[str, Json]
    file: str

    @property
    def kind(self) -> str:
        """The event's name: "run", "step", "evaluation", "finished", ..."""
        return str(self.values["event"])

    def number(self, key: str) -> float:
        """A numeric value of the event.

        Raises:
            ValueError: The event has no such number.
        """
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"line {self.line} has no number {key!r}; it has {', '.join(sorted(self.values))}"
            )
        return float(value)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers of the event.

        Raises:
            ValueError: The event has no such list.
        """
        values = self.values.get(key)
        if not isinstance(values, list):
            raise ValueError(
                f"line {self.line} has no list {key!r}; it has {', '.join(sorted(self.values))}"
            )
        return [float(str(value)) for value in values]


@dataclass(frozen=True, slots=True)
class Record:
    """A record read back: steps that a resume did again are present once, as done last."""

    path: Path
    events: tuple[Event, ...] = field(repr=False)

    @property
    def run(self) -> object:
        """The run, rebuilt from the first line, or from the last that extended it."""
        described = [event for event in self.events if event.kind in _DESCRIBING]
        return from_json(described[-1].values["run"])

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.events[0].number("seed"))

    @property
    def is_finished(self) -> bool:
        """True where the run came to its end."""
        return self.events[-1].kind == "finished"

    def of(self, kind: str, **fields: object) -> tuple[Event, ...]:
        """All events of one kind with these values, in order."""
        return tuple(
            event
            for event in self.events
            if event.kind == kind
            and all(event.values.get(name) == value for name, value in fields.items())
        )

    def last(self, kind: str, **fields: object) -> Event:
        """The last event of a kind with these values.

        Raises:
            ValueError: There is none.
        """
        events = self.of(kind, **fields)
        if not events:
            raise ValueError(
                f"{self.path} has no event {_named(kind, fields)}; is the run unfinished?"
            )
        return events[-1]

    def only(self, kind: str, **fields: object) -> Event:
        """The one event of a kind with these values.

        Raises:
            ValueError: There is none, or more than one.
        """
        events = self.of(kind, **fields)
        if len(events) != 1:
            raise ValueError(
                f"{self.path} has {len(events)} events {_named(kind, fields)} where one is expected"
            )
        return events[0]

    def seeds(self, kind: str, **fields: object) -> tuple[int, ...]:
        """The seeds that events of a kind with these values name, ascending."""
        return tuple(sorted({int(event.number("seed")) for event in self.of(kind, **fields)}))


def _named(kind: str, fields: Mapping[str, object]) -> str:
    return " ".join([repr(kind), *(f"{name}={value!r}" for name, value in fields.items())])


_DESCRIBING = ("run", "extended")
"""Events that hold the description of the run from there on."""


def description_in(path: Path) -> Json:
    """The description of the run that a record is of; None where no first line is whole yet."""
    lines = _lines(path) if path.exists() else ()
    described = [values["run"] for _, values in lines if values.get("event") in _DESCRIBING]
    return described[-1] if described else None


def read_record(path: StrPath) -> Record:
    """Read a record, leaving out a cut last line and steps that a resume replaced.

    Raises:
        ValueError: The file does not begin with a run of this schema.
    """
    path = Path(path)
    events = [Event(number, values, path.name) for number, values in _lines(path)]
    if not events or events[0].kind != "run" or events[0].values.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} does not begin with a run of schema {SCHEMA}; remove it and run again"
        )
    kept: list[Event] = []
    for event in events:
        if event.kind == "resumed":
            step = event.number("step")
            kept = [
                old
                for old in kept
                if old.kind == "run" or (_step_of(old) <= step and old.kind != "trained")
            ]
        kept.append(event)
    return Record(path, tuple(kept))


def _step_of(event: Event) -> float:
    step = event.values.get("step")
    return float(step) if isinstance(step, int | float) else math.inf


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Json]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            yield number, json.loads(line)
