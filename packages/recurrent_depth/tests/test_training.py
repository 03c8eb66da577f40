"""Training at a random depth through the runtime: alike on one process, after a resume, on two ranks."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.common.values import to_json
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.train import train
from fourfold_recurrent_depth import LogNormalPoisson, RandomDepth
from fourfold_recurrent_depth.reproduce.recipes import automaton_run
from fourfold_recurrent_depth.reproduce.tasks.automaton import EvolvedCells
from fourfold_recurrent_depth.training.models import RecurrentDepth

ROUNDING = 3e-5
"""float32 sums over two ranks in another order, over five AdamW steps."""


@pytest.fixture
def run() -> Run:
    small = automaton_run("law", 3, hardest=2, cells=8, steps=5)
    return replace(
        small,
        model=RecurrentDepth(
            width=16, heads=2, prelude=1, core=1, coda=1, hidden=24, vocabulary=4, context=8,
            mean_recurrence=3, mean_backprop=2,
        ),
        objective=RandomDepth(
            recurrences=LogNormalPoisson(mean=3, backprop=2), supervision=EvolvedCells()
        ),
        batch=8,
        microbatch=4,
        horizon=Steps(count=5),
        checkpoint_every=2,
    )  # fmt: skip


class StoppedError(Exception):
    """The machine was switched off."""


def stop_at_three(done: int, total: int, note: str) -> None:
    if done == 3:
        raise StoppedError


def test_a_resumed_run_is_the_run(tmp_path: Path, run: Run) -> None:
    """Bit for bit: depths and initial states are functions of the step."""
    torch.set_num_threads(1)
    whole = train(run, record=tmp_path / "a.jsonl", checkpoints=tmp_path / "a", progress=silent)
    place = {"record": tmp_path / "b.jsonl", "checkpoints": tmp_path / "b"}
    with pytest.raises(StoppedError):
        train(run, progress=stop_at_three, **place)
    torch.rand(7)
    again = train(run, progress=silent, **place)
    one, other = (load_file(last.path / "model.safetensors") for last in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    steps = read_record(tmp_path / "a.jsonl").of("step")
    depths = {event.number("recurrences_times_rows") / run.batch for event in steps}
    assert len(depths) > 1


@pytest.mark.parametrize(
    "engines",
    [
        ("ddp", "fsdp2"),
        pytest.param(("row", "col", "data"), marks=pytest.mark.slow),
        pytest.param(("zero1",), marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
    ids="-".join,
)
def test_two_ranks_train_the_losses_of_one_process(
    tmp_path: Path, run: Run, engines: tuple[str, ...]
) -> None:
    """Losses and gradient norms on two ranks of every engine, at the depths of one process."""
    single = replace(run, microbatch=8)
    train(single, record=tmp_path / "one.jsonl", checkpoints=tmp_path / "one", progress=silent)
    (tmp_path / "run.json").write_text(json.dumps(to_json(single)))
    program = Path(__file__).parent / "training_on_ranks.py"
    launched = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(program), str(tmp_path), *engines,
        ],
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-4000:]
    theirs = read_record(tmp_path / "one.jsonl").of("step")
    for engine in engines:
        ours = read_record(tmp_path / f"{engine}.jsonl").of("step")
        for key in ("loss_nats", "grad_norm", "recurrences_times_rows"):
            expected = [event.number(key) for event in theirs]
            found = [event.number(key) for event in ours]
            assert found == pytest.approx(expected, rel=ROUNDING), (engine, key)
