"""A record is followed while it grows, and what is no record is refused by name."""

import json
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fourfold_parallel.common.records import RecordWriter, header
from fourfold_parallel.reproduce import watch
from fourfold_parallel.reproduce.watch import Watched, curve, duration, planned_steps
from fourfold_parallel.run.recipe import Run, Tokens


def begin(path: Path, run: Run) -> RecordWriter:
    writer = RecordWriter(path)
    writer.write_header(header(run, seed=0, world_size=1, materials=(), overrides=()))
    return writer


def write_step(records: RecordWriter, step: int, loss_nats: float = 2.0) -> None:
    records.write(
        "step",
        step=step,
        loss_nats=loss_nats,
        elapsed_s=0.5,
        tokens_per_s=1000.0,
        peak_bytes=3 * 2**30,
    )


def said(path: Path, *, once: bool = True, patience_s: float = 60.0) -> str:
    target = Console(file=StringIO(), width=100)
    watch.watch(path, target, once=once, patience_s=patience_s)
    assert isinstance(target.file, StringIO)
    return target.file.getvalue()


def test_one_look_says_loss_speed_time_left_and_memory(tmp_path: Path, small_run: Run) -> None:
    path = tmp_path / "r.jsonl"
    with begin(path, small_run) as records:
        for step in (1, 2):
            write_step(records, step, loss_nats=3.0 - step)
        records.write("validation", step=2, validation_loss_nats=1.25)
    text = said(path)
    assert f"2 of {small_run.steps}" in text
    assert "1.0000 nats  █▁" in text
    assert "1.2500 nats at step 2" in text
    assert "1,000 tokens a second" in text
    assert f"left        {duration((small_run.steps - 2) * 0.5)} " in text
    assert "3.00 GiB" in text
    assert "running" in text


def test_it_ends_when_the_run_ends(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever follows the last step at once; and not at the `trained` of a run that was resumed."""
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    path = tmp_path / "r.jsonl"
    records = begin(path, small_run)
    write_step(records, 1)
    records.write("trained", step=1)
    records.write("resumed", step=1)

    def go_on() -> None:
        time.sleep(0.2)
        write_step(records, 2)
        records.write("trained", step=2)
        records.write("passage", exact=True)
        records.close()

    thread = threading.Thread(target=go_on)
    thread.start()
    text = said(path, once=False)
    thread.join()
    assert f"2 of {small_run.steps}" in text
    assert "trained" in text.splitlines()[0]


def test_a_look_reads_new_lines_only_and_begins_anew_with_the_file(
    tmp_path: Path, small_run: Run
) -> None:
    path = tmp_path / "r.jsonl"
    watched = Watched(path)
    with begin(path, small_run) as records:
        write_step(records, 1)
    watched.look()
    with path.open("a") as file:
        file.write('{"event": "st')
    watched.look()
    assert (watched.lines, len(watched.steps)) == (2, 1)
    path.unlink()
    begin(path, small_run).close()
    watched.look()
    assert (watched.lines, len(watched.steps)) == (1, 0)


def test_steps_done_again_are_counted_once(tmp_path: Path, small_run: Run) -> None:
    path = tmp_path / "r.jsonl"
    with begin(path, small_run) as records:
        for step in (1, 2, 3):
            write_step(records, step)
        records.write("resumed", step=1)
        write_step(records, 2)
    watched = Watched(path)
    watched.look()
    assert [step["step"] for step in watched.steps] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# a page\n", "line 1, is no event"),
        ('{"event": "step"}\n', "does not begin with a run"),
        ('{"event": "run", "schema": 1, "run": {}}\nnull\n', "line 2, is no event"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        said(path)
    with pytest.raises(ValueError, match="no record at"):
        said(tmp_path)


def test_a_run_that_writes_nothing_is_taken_for_dead(tmp_path: Path, small_run: Run) -> None:
    path = tmp_path / "r.jsonl"
    begin(path, small_run).close()
    with pytest.raises(ValueError, match="perhaps killed"):
        said(path, once=False, patience_s=-1)


def test_an_empty_record_and_a_loss_that_is_not_finite_are_shown(
    tmp_path: Path, small_run: Run
) -> None:
    path = tmp_path / "r.jsonl"
    path.touch()
    assert "no line yet" in said(path)
    with begin(path, small_run) as records:
        write_step(records, 1)
        write_step(records, 2, loss_nats=float("nan"))
    assert "nan nats" in said(path)


def test_planned_steps_are_the_runs(small_run: Run) -> None:
    """Read from the description alone, of a run within a study too; several runs have no one horizon."""
    from dataclasses import replace

    from fourfold_parallel.common.values import to_json

    tokens = replace(small_run, horizon=Tokens(count=1001))
    for run in (small_run, tokens):
        described = json.loads(json.dumps(to_json(run)))
        assert planned_steps(described) == run.steps
        assert planned_steps({"type": "goldfish/Attack", "run": described}) == run.steps
    assert planned_steps({"members": [to_json(small_run)] * 2}) == 0


def test_a_curve_keeps_its_ends() -> None:
    assert curve([4.0, 3.0, 2.0, 1.0]) == "█▆▃▁"
    assert curve([float(value) for value in range(100)], columns=2) == "▁█"
    assert curve([1.0, 1.0]) == "▁▁"
