"""Sinks: a record's events, as they are written, in TensorBoard, wandb or trackio.

The record is what counts. A sink gets every event after the record has it, and one that fails is left, with
a warning, while the run goes on.
"""

import importlib
import importlib.util
import shutil
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.values import Json


class Sink(Protocol):
    """Gets the events of one record."""

    def write(self, event: Mapping[str, Json]) -> None:
        """An event as its line in the record holds it; the first of a run is its header."""
        ...

    def close(self) -> None:
        """No event follows, unless the record is opened again."""
        ...


OpenSink = Callable[[Path], Sink]
"""Opens a sink for the record at a path."""
SinkName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "fourfold"


class TensorBoard:
    """Event files in `tensorboard/<record's name>` beside the record: `tensorboard --logdir FOLDER`."""

    def __init__(self, record: Path) -> None:
        """The sink of a record; its folder is begun anew where the record is."""
        from torch.utils.tensorboard import SummaryWriter

        self._kind: Any = SummaryWriter
        self._folder = record.parent / "tensorboard" / record.stem
        self._index = Index()
        self._writers: list[Any] = []

    def write(self, event: Mapping[str, Json]) -> None:
        """Numbers as scalars `kind/key`, the header as text."""
        if event["event"] == "run":
            self.close()
            shutil.rmtree(self._folder, ignore_errors=True)
        step = self._index.of(event)
        if event["event"] == "resumed":
            self.close()
            self._writers = [self._kind(str(self._folder), purge_step=step + 1)]
        if not self._writers:
            self._writers = [self._kind(str(self._folder), flush_secs=10)]
        [writer] = self._writers
        if event["event"] == "run":
            writer.add_text("run", f"    {event['run']}")
        for name, number in numbers(event).items():
            writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Write what is waiting."""
        for writer in self._writers:
            writer.close()
        self._writers = []


class _Tracker(ABC):
    """The common part of wandb and trackio: a named run that is begun, told of numbers, and finished."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._index = Index()
        self._runs: list[Any] = []

    @abstractmethod
    def _begin(self, session: str, config: Mapping[str, Json]) -> Any:
        """A run of the tracker's, begun under this name."""

    @abstractmethod
    def _tell(self, run: Any, values: Mapping[str, float], step: int) -> None:
        """Give a run the numbers of a step."""

    def write(self, event: Mapping[str, Json]) -> None:
        """Numbers as `kind/key`; the header as the run's configuration."""
        is_header = event["event"] == "run"
        if is_header:
            self.close()
        if not self._runs:
            config = {"run": event["run"]} if is_header else {}
            self._runs = [self._begin(_session(self._record, anew=is_header), config)]
        step = self._index.of(event)
        if values := numbers(event):
            self._tell(self._runs[0], values, step)

    def close(self) -> None:
        """Finish the run; an event that follows goes on with it."""
        for run in self._runs:
            run.finish()
        self._runs = []


class Wandb(_Tracker):
    """A run of the project `fourfold`; `WANDB_MODE=offline` and wandb's other settings hold."""

    def __init__(self, record: Path) -> None:
        """The sink of a record."""
        super().__init__(record)
        self._library = importlib.import_module("wandb")

    def _begin(self, session: str, config: Mapping[str, Json]) -> Any:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        run = self._library.init(
            project=PROJECT,
            name=self._record.stem,
            id=session,
            resume="allow",
            dir=str(self._record.parent),
            config=dict(config),
        )
        # Steps that a resumed run does again come twice: wandb's own counter may not go back, ours may.
        run.define_metric("*", step_metric="step")
        return run

    def _tell(self, run: Any, values: Mapping[str, float], step: int) -> None:
        run.log({**values, "step": step})


class Trackio(_Tracker):
    """A run of the project `fourfold` in trackio's local store: `trackio show`."""

    def __init__(self, record: Path) -> None:
        """The sink of a record."""
        super().__init__(record)
        self._library = importlib.import_module("trackio")

    def _begin(self, session: str, config: Mapping[str, Json]) -> Any:
        name = f"{self._record.stem}-{session}"
        return self._library.init(project=PROJECT, name=name, resume="allow", config=dict(config))

    def _tell(self, run: Any, values: Mapping[str, float], step: int) -> None:
        run.log(dict(values), step=step)


_SINKS: Mapping[SinkName, OpenSink] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def named(names: Sequence[SinkName]) -> tuple[OpenSink, ...]:
    """The sinks of these names.

    Raises:
        ModuleNotFoundError: The library of one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return tuple(_SINKS[name] for name in names)


class Index:
    """The number that orders events: their step, or how many of their kind came before."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self._seen = Counter[str]()

    def of(self, event: Mapping[str, Json]) -> int:
        """The number of the next event."""
        kind, step = str(event["event"]), event.get("step")
        self._seen[kind] += 1
        return step if isinstance(step, int) else self._seen[kind] - 1


def numbers(event: Mapping[str, Json]) -> dict[str, float]:
    """The numbers of an event, as `kind/key`; all but its step. A header has none."""
    if event["event"] == "run":
        return {}
    return {
        f"{event['event']}/{key}": float(value)
        for key, value in event.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
    }


def _session(record: Path, *, anew: bool) -> str:
    """The tracker's name of a record's run, kept beside it; a record that is begun anew gets another."""
    path = record.with_name(f".{record.stem}.session")
    if anew or not path.exists():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8")
