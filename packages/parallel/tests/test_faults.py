"""What goes wrong on one rank ends on all of them, within a bound, with a message that says who and where."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fourfold_parallel.common.activity import Activity
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.common.values import to_json
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.plan.machines import machine_of
from fourfold_parallel.run import checkpoint, shards
from fourfold_parallel.run.elastic import Planned
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.train import train
from fourfold_parallel.run.watchdog import SPANS, straggler

PATIENCE_S = 15
"""Enough for two ranks to find each other on a busy machine."""
BOUND_S = 60
"""Of a launch of two ranks from its start to its end on a busy machine; most of it is imports."""


def launched(
    run: Run,
    folder: Path,
    fault: str,
    *,
    rank: int = 1,
    step: int = 3,
    options: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    (folder / "run.json").write_text(json.dumps(to_json(run)))
    program = Path(__file__).parent / "faults_on_ranks.py"
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    )
    return subprocess.run(
        [*torchrun, *options, str(program), str(folder), fault, str(rank), str(step)],
        capture_output=True, text=True, timeout=4 * BOUND_S, check=False,
        env={**os.environ, "FOURFOLD_PATIENCE_S": str(PATIENCE_S)},
    )  # fmt: skip


def on_a_grid(run: Run) -> Run:
    return replace(run, engine=Fourfold(depth=2), checkpoint_every=2)


@pytest.mark.slow
def test_a_loader_that_raises_is_named_on_the_other_rank_too(
    tmp_path: Path, small_run: Run
) -> None:
    ended = launched(on_a_grid(small_run), tmp_path, "raise")
    assert ended.returncode
    assert "rank 0 gave up at step 4" in ended.stderr, ended.stderr[-5000:]
    assert "rank 1 has ended: OSError: cannot read the rows of step 4" in ended.stderr
    assert [one.step for one in checkpoint.checkpoints(tmp_path / "c")] == [2]


def test_a_rank_that_stops_answering_is_named_with_axis_layer_and_direction(
    tmp_path: Path, small_run: Run
) -> None:
    """SIGSTOP: nothing closes its connections, so only the launch's patience ends the wait."""
    ended = launched(on_a_grid(small_run), tmp_path, "stop")
    said = ended.stderr
    assert ended.returncode
    way = "(forward|backward)"
    gave_up = rf"rank 0 gave up at step 4, in {way}: .*over depth in {way}, as rank 0 of 2"
    assert re.search(gave_up, said), said[-5000:]
    assert re.search(
        r"in (all_gather|reduce_scatter|all_reduce) of (model|lm_head)\S* over depth", said
    )
    assert "rank 1 gives no sign of life: it was killed or stopped" in said


@pytest.mark.slow
def test_a_rank_that_hangs_elsewhere_is_told_from_one_that_is_stopped(
    tmp_path: Path, small_run: Run
) -> None:
    ended = launched(on_a_grid(small_run), tmp_path, "hang")
    assert ended.returncode
    assert (
        "rank 1 is alive, and does not wait for others: it is in data of step 4" in ended.stderr
    ), ended.stderr[-5000:]


def test_sigterm_saves_and_ends_in_time(tmp_path: Path, small_run: Run) -> None:
    """One rank is asked to end; both save the same step, and one process goes on as if nothing had been."""
    run = replace(on_a_grid(small_run), checkpoint_every=100, horizon=Steps(count=8))
    ended = launched(run, tmp_path, "term")
    assert ended.returncode
    [whole] = checkpoint.checkpoints(tmp_path / "c")
    assert 4 <= whole.step < 8
    assert [*shards.faults(whole.path)] == []
    record = read_record(tmp_path / "r.jsonl")
    assert record.last("terminated").number("step") == whole.step
    assert "asked to end by SIGTERM" in ended.stderr
    alone = replace(run, engine=Single())
    train(alone, record=tmp_path / "r.jsonl", checkpoints=tmp_path / "c", progress=silent)
    straight = tmp_path / "straight"
    train(alone, record=straight / "r.jsonl", checkpoints=straight / "c", progress=silent)
    losses = [
        [event.number("loss_nats") for event in read_record(place / "r.jsonl").of("step")]
        for place in (tmp_path, straight)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)  # sums over two ranks in another order


def test_torchrun_starts_again_by_itself_and_loses_two_steps_at_most(
    tmp_path: Path, small_run: Run
) -> None:
    """`--max-restarts`: a rank killed in step 4; the run goes on from the last whole checkpoint."""
    ended = launched(on_a_grid(small_run), tmp_path, "kill", options=("--max-restarts", "1"))
    assert ended.returncode == 0, ended.stderr[-5000:]
    record = read_record(tmp_path / "r.jsonl")
    assert [event.number("step") for event in record.of("resumed")] in ([2], [])
    assert [event.number("step") for event in record.of("step")] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (tmp_path / "c").glob(".*")] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_launch_that_loses_a_node_goes_on_with_the_rest(tmp_path: Path, small_run: Run) -> None:
    """Two of torchrun's agents with a rank each; one is killed with its rank. The grid is found anew."""
    machine = tmp_path / "machine.json"
    machine_of("dgx-a100").save(machine)
    engine = Planned(machine=str(machine), sequence=small_run.sequence)
    run = replace(
        on_a_grid(small_run), engine=engine, horizon=Steps(count=400), checkpoint_every=20
    )
    (tmp_path / "run.json").write_text(json.dumps(to_json(run)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).parent / "faults_on_ranks.py"

    def command(*, is_host: bool) -> list[str]:
        # Whoever holds torchrun's store must live: with it dies the meeting place.
        conf = f"last_call_timeout=5,join_timeout=120,is_host={is_host}"
        return [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
            "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
            "--rdzv-id", "fewer", "--rdzv-conf", conf, str(program), str(tmp_path), "nothing", "0", "0",
        ]  # fmt: skip

    environ = {**os.environ, "FOURFOLD_PATIENCE_S": "20"}
    with ExitStack() as logs:
        first, second = (
            subprocess.Popen(
                command(is_host=not agent), env=environ, start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=logs.enter_context((tmp_path / f"agent-{agent}.log").open("w")),
            )
            for agent in range(2)
        )  # fmt: skip
    record = tmp_path / "r.jsonl"
    try:
        waited_until_s = time.monotonic() + 120
        while not [*(tmp_path / "c").glob("step-*")] and time.monotonic() < waited_until_s:
            time.sleep(0.2)
        # Its rank has a session of its own, and would train to the end without it.
        children = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
        for pid in (second.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        assert first.wait(300) == 0, (tmp_path / "agent-0.log").read_text()[-5000:]
    finally:
        for agent in (first, second):
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    read = read_record(record)
    assert read.events[0].values["world_size"] == 2
    assert [event.number("world_size") for event in read.of("resumed")] == [1]
    alone = tmp_path / "alone"
    train(replace(run, engine=Single()), record=alone / "r.jsonl", checkpoints=alone / "c")
    losses = [
        [event.number("loss_nats") for event in read_record(path).of("step")]
        for path in (record, alone / "r.jsonl")
    ]
    # float32 sums in another order, over 400 steps; rows in another order would show in the first
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.slow
def test_a_slow_rank_is_named_with_its_share(tmp_path: Path, small_run: Run) -> None:
    """50 ms more in the data of each step."""
    run = replace(
        on_a_grid(small_run), horizon=Steps(count=120), checkpoint_every=1000, validate_every=1000
    )
    ended = launched(run, tmp_path, "slow")
    assert ended.returncode == 0, ended.stderr[-3000:]
    slow = read_record(tmp_path / "r.jsonl").of("straggler")
    assert slow
    assert {(event.number("rank"), event.values["phase"]) for event in slow} == {(1, "data")}
    assert all(0.1 < event.number("share") < 1 for event in slow)
    assert "rank 1 is slow: it worked" in ended.stderr


def test_a_straggler_is_who_works_longer_than_the_others() -> None:
    usual = [1.0, 2.0, 3.0, 0.5]
    ranks = torch.tensor([usual, usual, [1.0, 2.0, 5.0, 0.5], usual], dtype=torch.float64)
    found = straggler(ranks, 10.0, steps=7)
    assert found is not None
    assert (found.rank, found.phase, found.steps) == (2, SPANS[2], 7)
    assert found.share == pytest.approx(0.2)
    assert straggler(ranks[[0, 1, 3]], 10.0, steps=7) is None
    assert straggler(ranks[:1], 10.0, steps=7) is None


def test_activity_accounts_for_all_time() -> None:
    """Phases and waits add up to the clock; waits within waits count once."""
    activity = Activity()
    started_s = time.perf_counter()
    activity.enter("data")
    time.sleep(0.02)
    with activity.waiting("one"), activity.waiting("another"):
        time.sleep(0.03)
    activity.enter("forward")
    time.sleep(0.01)
    own, waited = activity.seconds()
    elapsed_s = time.perf_counter() - started_s
    assert waited["data"] >= 0.03
    assert 0.02 <= own["data"] < elapsed_s - 0.03
    assert own["forward"] >= 0.01
    told_s = own["data"] + own["forward"] + waited["data"]
    assert told_s == pytest.approx(elapsed_s, abs=2e-3)


def test_one_process_is_asked_to_end_too(tmp_path: Path, small_run: Run) -> None:
    def tell(done: int, total: int, note: str) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    place = {"record": tmp_path / "r.jsonl", "checkpoints": tmp_path / "c"}
    with pytest.raises(SystemExit) as ended:
        train(small_run, progress=tell, **place)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    stopped = checkpoint.checkpoints(tmp_path / "c")[-1].step
    assert stopped >= 3
    assert train(small_run, progress=silent, **place).step == 6
