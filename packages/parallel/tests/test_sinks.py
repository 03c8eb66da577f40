"""Laws of sinks: each gets what the record gets, and none can hurt a run."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fourfold_parallel.common import sinks
from fourfold_parallel.common.extras import remedy
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import RecordWriter, header, read_record
from fourfold_parallel.common.sinks import Sink, TensorBoard, Trackio, Wandb, named, numbers
from fourfold_parallel.common.values import Json
from fourfold_parallel.reproduce.experiment import Workplace
from fourfold_parallel.run.optimizer import Constant
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.train import train


class Kept:
    """Keeps the events of all records, and how often it was closed."""

    def __init__(self) -> None:
        self.events: list[Mapping[str, Json]] = []
        self.closed = 0

    def __call__(self, record: Path) -> Sink:
        return self

    def write(self, event: Mapping[str, Json]) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


def lines(record: Path) -> list[Any]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def test_a_sink_gets_every_event_of_a_training_and_of_its_stage(
    tmp_path: Path, small_run: Run
) -> None:
    """Through a training, one that goes on to a longer horizon, and what a stage adds."""
    kept, record = Kept(), tmp_path / "r.jsonl"
    place = {"record": record, "checkpoints": tmp_path / "checkpoints", "progress": silent}
    shorter = replace(small_run, schedule=Constant(warmup_steps=2))
    train(shorter, **place, sinks=(kept,))
    longer = replace(shorter, horizon=Steps(count=small_run.steps + 2))
    train(longer, **place, extends=True, sinks=(kept,))
    workplace = Workplace(
        record=record, scratch=tmp_path, finished={}, progress=silent, sinks=(kept,)
    )
    with workplace.concluding() as records:
        records.write("measured", value=float("inf"))
    assert [*kept.events] == lines(record)
    kinds = {event["event"] for event in kept.events}
    assert kinds >= {"run", "step", "validation", "extended", "resumed", "trained", "finished"}
    assert kept.closed == 3


def test_a_sink_that_fails_is_left_and_the_record_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Kept):
        def write(self, event: Mapping[str, Json]) -> None:
            super().write(event)
            raise OSError("no space left")

    broken, kept, record = Broken(), Kept(), tmp_path / "r.jsonl"
    with caplog.at_level(logging.WARNING), RecordWriter(record, (broken, kept)) as records:
        for step in range(3):
            records.write("step", step=step)
    assert [*kept.events] == lines(record)
    assert len(kept.events) == 3
    assert len(broken.events) == 1
    assert caplog.messages == ["Broken failed and gets no further events: no space left"]


def test_numbers_are_what_can_be_plotted() -> None:
    event: dict[str, Json] = {"event": "step", "step": 3, "loss": 2, "is": True, "s": "x", "l": [1]}
    assert numbers(event) == {"step/loss": 2.0}
    assert numbers({"event": "run", "seed": 0}) == {}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError) as raised:
        named((name,))
    said = remedy(raised.value, distribution="fourfold-goldfish")
    assert f"of the extra fourfold-parallel[{name}]: pip install '{name}>=" in said


class FakeWriter:
    """Stands for tensorboard's writer: what was written, by folder."""

    written: list[tuple[object, ...]]

    def __init__(self, folder: str, **options: object) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"events.{len(self.written)}").touch()
        self.written.append(("open", Path(folder).name, options.get("purge_step", 0)))

    def add_text(self, name: str, text: str) -> None:
        self.written.append(("text", name))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))

    def close(self) -> None:
        self.written.append(("close",))


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the fake of `torch.utils.tensorboard` gets."""
    library: Any = ModuleType("torch.utils.tensorboard")
    library.SummaryWriter = type("SummaryWriter", (FakeWriter,), {"written": []})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", library)
    return library.SummaryWriter.written


def test_tensorboard_takes_back_the_steps_that_a_resume_does_again(
    tmp_path: Path, tensorboard: list[tuple[object, ...]]
) -> None:
    sink = TensorBoard(tmp_path / "r.jsonl")
    for event in (
        {"event": "run", "run": {}},
        {"event": "step", "step": 1, "loss": 3.0},
        {"event": "step", "step": 2, "loss": 2.0},
        {"event": "resumed", "step": 1, "world_size": 1},
        {"event": "step", "step": 2, "loss": 1.0},
        {"event": "passage", "score": 0.5},
        {"event": "passage", "score": 0.25},
    ):
        sink.write(event)
    sink.close()
    assert tensorboard == [
        ("open", "r", 0), ("text", "run"), ("step/loss", 3.0, 1), ("step/loss", 2.0, 2), ("close",),
        ("open", "r", 2), ("resumed/world_size", 1.0, 1), ("step/loss", 1.0, 2),
        ("passage/score", 0.5, 0), ("passage/score", 0.25, 1), ("close",),
    ]  # fmt: skip


def test_a_record_begun_anew_has_no_curves_of_the_one_before(
    tmp_path: Path, tensorboard: list[tuple[object, ...]]
) -> None:
    sink = TensorBoard(tmp_path / "r.jsonl")
    for _ in range(2):
        sink.write({"event": "run", "run": {}})
    assert len([*(tmp_path / "tensorboard" / "r").iterdir()]) == 1


class FakeRun:
    """Stands for a run of wandb or trackio."""

    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.finished = options, [], 0

    def define_metric(self, name: str, **options: object) -> None:
        self.options["metric"] = (name, options)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize(("kind", "name"), [(Wandb, "wandb"), (Trackio, "trackio")])
def test_a_tracker_goes_on_with_the_run_of_a_record_and_not_with_another(
    kind: type[Wandb | Trackio], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened again, the record is the same run; begun anew, it is another."""
    runs: list[FakeRun] = []
    library: Any = ModuleType(name)

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(**options))
        return runs[-1]

    library.init = init
    monkeypatch.setitem(sys.modules, name, library)
    key = "id" if name == "wandb" else "name"
    record = tmp_path / "r.jsonl"
    for first in ("run", "resumed", "run"):
        sink = kind(record)
        sink.write({"event": first, "run": {"seed": 3}, "step": 4})
        sink.write({"event": "step", "step": 5, "loss": 1.5})
        sink.close()
    assert [run.finished for run in runs] == [1, 1, 1]
    assert runs[0].options[key] == runs[1].options[key] != runs[2].options[key]
    assert runs[0].options["config"] == {"run": {"seed": 3}}
    values, step = runs[0].logged[-1]
    assert values["step/loss"] == 1.5
    assert (values.get("step") if name == "wandb" else step) == 5


def test_the_real_tensorboard_reads_what_was_written(tmp_path: Path, small_run: Run) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra fourfold-parallel[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = tmp_path / "r.jsonl"
    with RecordWriter(record, (TensorBoard,)) as records:
        records.write_header(header(small_run, seed=0, world_size=1, materials=(), overrides=()))
        for step in (1, 2, 3):
            records.write("step", step=step, loss_nats=1 / step)
    with RecordWriter(record, (TensorBoard,)) as records:
        records.write("resumed", step=2)
        records.write("step", step=3, loss_nats=9.0)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard" / "r"))
    accumulator.Reload()
    read = [(event.step, event.value) for event in accumulator.Scalars("step/loss_nats")]
    assert read == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert len(read_record(record).of("step")) == 3
