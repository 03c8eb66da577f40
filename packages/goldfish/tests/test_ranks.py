"""Two gloo ranks train the goldfish losses of one process, on every kind of engine."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fourfold_goldfish.reproduce.recipes import verbatim_smoke
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.common.values import to_json
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.recipe import Steps
from fourfold_parallel.run.train import train

ROUNDING = 2e-5
"""float32 sums over two ranks in another order, over four AdamW steps."""


def test_two_ranks_train_the_losses_of_one_process(tmp_path: Path) -> None:
    """DDP, FSDP2 and three grids, with gaps spread unevenly over ranks and microbatches.

    Losses are divided by the targets kept in the whole step, so that losses and gradient norms agree, and
    so do the telemetry's sums over the targets left out.
    """
    small = verbatim_smoke("k4", 0).run
    model = Llama(
        width=32, depth=2, heads=2, kv_heads=2, hidden=64, vocabulary=1024, context=64, tied=False
    )
    run = replace(small, model=model, horizon=Steps(count=4), microbatch=2, sequence=48)
    train(run, record=tmp_path / "single.jsonl", checkpoints=tmp_path / "single", progress=silent)
    (tmp_path / "run.json").write_text(json.dumps(to_json(run)))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    program = Path(__file__).parent / "goldfish_on_ranks.py"
    done = subprocess.run(
        [sys.executable, *launch, str(program), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    single = read_record(tmp_path / "single.jsonl").of("step")
    engines = ("ddp", "fsdp2", "row", "col", "depth")
    compacted = tuple(f"{name}-compacted" for name in ("ddp", "row", "col", "depth"))
    for engine in engines + compacted:
        steps = read_record(tmp_path / f"{engine}.jsonl").of("step")
        for ours, theirs in zip(steps, single, strict=True):
            for key in ("supervised_targets", "dropped_targets"):
                assert ours.number(key) == theirs.number(key), engine
            keys = ("loss_nats", "grad_norm", "dropped_nats_sum")
            for key in keys[:2] if engine in compacted else keys:
                expected = pytest.approx(theirs.number(key), rel=ROUNDING, abs=ROUNDING)
                assert ours.number(key) == expected, (engine, key)


def test_another_mask_does_not_go_on_from_a_runs_checkpoint(tmp_path: Path) -> None:
    """The runtime's checkpoints carry the digest of the whole run, the mask included."""
    small = verbatim_smoke("k4", 0).run
    model = Llama(
        width=16, depth=1, heads=2, kv_heads=2, hidden=16, vocabulary=1024, context=64, tied=True
    )
    run = replace(small, model=model, horizon=Steps(count=1), sequence=32)
    place = {"record": tmp_path / "record.jsonl", "checkpoints": tmp_path / "checkpoints"}
    train(run, progress=silent, **place)
    other = replace(run, objective=verbatim_smoke("k2", 0).run.objective)
    with pytest.raises(ValueError, match="was written by another run"):
        train(other, progress=silent, **place)
