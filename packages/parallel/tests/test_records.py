"""Laws of records: whole lines or none, resumed steps once."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold_parallel.common.records import RecordWriter, description_in, header, read_record
from fourfold_parallel.common.values import describes
from fourfold_parallel.run.recipe import Run


def begin(path: Path, run: Run) -> RecordWriter:
    writer = RecordWriter(path)
    writer.write_header(header(run, seed=0, world_size=1, materials=(), overrides=()))
    return writer


def test_a_cut_last_line_is_never_taken_for_whole(tmp_path: Path, small_run: Run) -> None:
    """At whatever byte a writer dies, reading gives the whole lines, and resuming goes on after them."""
    path = tmp_path / "r.jsonl"
    with begin(path, small_run) as records:
        records.write("step", step=1, loss_nats=2.0)
        records.write("step", step=2, loss_nats=1.5)
    content = path.read_bytes()
    last = content.rfind(b"\n", 0, -1) + 1
    for cut in range(last, len(content)):
        path.write_bytes(content[:cut])
        assert len(read_record(path).of("step")) == 1
        with RecordWriter(path) as records:
            records.write("step", step=2, loss_nats=1.25)
        steps = read_record(path).of("step")
        assert [event.number("loss_nats") for event in steps] == [2.0, 1.25]


def test_steps_done_again_after_a_resume_count_once(tmp_path: Path, small_run: Run) -> None:
    path = tmp_path / "r.jsonl"
    with begin(path, small_run) as records:
        for step in (1, 2, 3):
            records.write("step", step=step, loss_nats=float(step))
        records.write("resumed", step=1)
        records.write("step", step=2, loss_nats=20.0)
        records.write("finished")
    record = read_record(path)
    assert [event.number("loss_nats") for event in record.of("step")] == [1.0, 20.0]
    assert record.is_finished
    assert record.run == small_run


def test_numbers_that_json_lacks_stay_readable(tmp_path: Path, small_run: Run) -> None:
    path = tmp_path / "r.jsonl"
    with begin(path, small_run) as records:
        records.write("step", step=1, loss_nats=float("inf"))
    assert json.loads(path.read_text().splitlines()[1])["loss_nats"] == "inf"
    with pytest.raises(ValueError, match="no number 'loss_nats'"):
        read_record(path).of("step")[0].number("loss_nats")


def test_a_run_without_clipping_has_a_header_that_is_json(tmp_path: Path, small_run: Run) -> None:
    """Any JSON reader takes the line, and the run comes back with its digest."""
    run = replace(small_run, max_grad_norm=math.inf)
    begin(tmp_path / "r.jsonl", run).close()
    json.loads((tmp_path / "r.jsonl").read_text(), parse_constant=pytest.fail)
    record = read_record(tmp_path / "r.jsonl")
    assert record.run == run
    assert describes(description_in(tmp_path / "r.jsonl"), run)


def test_a_line_that_does_not_fit_is_an_error_and_leaves_nothing(
    tmp_path: Path, small_run: Run
) -> None:
    """A file that may grow by half a line only: the error is raised, and later lines stand alone."""
    path = tmp_path / "r.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with begin(path, small_run) as records:
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                records.write("step", step=1, text="x" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        records.write("step", step=2)
    assert [event.number("step") for event in read_record(path).of("step")] == [2]


def test_a_killed_process_leaves_a_readable_record(tmp_path: Path, small_run: Run) -> None:
    """SIGKILL in the middle of a stream of lines: every line read back is whole and in order."""
    path = tmp_path / "r.jsonl"
    begin(path, small_run).close()
    program = (
        "import sys; from pathlib import Path\n"
        "from fourfold_parallel.common.records import RecordWriter\n"
        "records = RecordWriter(Path(sys.argv[1]))\n"
        "for step in range(10**9): records.write('step', step=step, text='x' * 300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)]) as process:
        while path.stat().st_size < 200_000:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    steps = read_record(path).of("step")
    assert [int(event.number("step")) for event in steps] == list(range(len(steps)))
