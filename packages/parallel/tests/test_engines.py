"""torchrun with 2 gloo ranks trains the losses and the weights of one process, on every engine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.common.values import to_json
from fourfold_parallel.run.engines import check_no_stale_lock
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train

ROUNDING = 2e-5
"""float32 sums over two ranks in another order, over six AdamW steps."""


# DeepSpeed compiles a C++ extension on its first use: a minute of both cores, once per home.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "engines", [("ddp", "fsdp2"), ("depth", "row", "col", "data"), ("zero1", "zero2", "zero3")]
)
def test_two_ranks_train_the_losses_of_one_process(
    tmp_path: Path, small_run: Run, engines: tuple[str, ...]
) -> None:
    """Losses, gradient norms, validation and final weights, with accumulation, stopped and resumed once."""
    run = replace(small_run, microbatch=2)
    last = train(
        run, record=tmp_path / "single.jsonl", checkpoints=tmp_path / "single", progress=silent
    )
    on_two_ranks(run, tmp_path, engines)
    single = read_record(tmp_path / "single.jsonl")
    weights = load_file(last.path / "model.safetensors")
    for engine in engines:
        record = read_record(tmp_path / f"{engine}.jsonl")
        for kind, key in (
            ("step", "loss_nats"),
            ("step", "grad_norm"),
            ("validation", "validation_loss_nats"),
        ):
            ours = [event.number(key) for event in record.of(kind)]
            theirs = [event.number(key) for event in single.of(kind)]
            assert ours == pytest.approx(theirs, abs=ROUNDING), (engine, key)
        assert record.events[0].values["world_size"] == 2
        assert len(record.of("resumed")) == 1
        [path] = (tmp_path / engine).glob("step-*/model.safetensors")
        trained = load_file(path)
        assert set(trained) >= set(weights)
        for name, weight in weights.items():
            # A weight moves by at most about the learning rate per step; compare within a hundredth.
            torch.testing.assert_close(
                trained[name], weight, rtol=0, atol=3e-5, msg=f"{engine} {name}"
            )
        read = AutoModelForCausalLM.from_pretrained(path.parent).state_dict()
        assert all(torch.equal(read[name], weight) for name, weight in trained.items())
        assert AutoTokenizer.from_pretrained(path.parent).decode([40, 41])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "words", [("ddp@3", "row@4", "fsdp2@5"), ("zero1@3", "zero3@4", "zero2@5")]
)
def test_a_run_goes_on_under_other_engines_and_on_other_ranks(
    tmp_path: Path, small_run: Run, words: tuple[str, ...]
) -> None:
    """From one process over three engines on two ranks back to one: the losses of one process."""
    run = replace(small_run, checkpoint_every=1)
    straight = train(run, record=tmp_path / "r.jsonl", checkpoints=tmp_path / "r", progress=silent)
    shared = {"record": tmp_path / "shared.jsonl", "checkpoints": tmp_path / "shared"}

    def stop_at_three(done: int, total: int, note: str) -> None:
        if done == 3:  # before its checkpoint
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, progress=stop_at_three, **shared)
    on_two_ranks(replace(run, microbatch=2), tmp_path, words)
    last = train(run, progress=silent, **shared)
    record = read_record(tmp_path / "shared.jsonl")
    assert [event.number("step") for event in record.of("resumed")] == [2, 3, 4, 5]
    assert [event.number("world_size") for event in record.of("resumed")] == [2, 2, 2, 1]
    losses = [
        [event.number("loss_nats") for event in read_record(tmp_path / name).of("step")]
        for name in ("r.jsonl", "shared.jsonl")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=ROUNDING)
    weights = load_file(straight.path / "model.safetensors")
    for name, weight in load_file(last.path / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=3e-5, msg=name)


def on_two_ranks(run: Run, folder: Path, words: tuple[str, ...]) -> None:
    """Launch engines_on_ranks.py, which says what the words mean."""
    (folder / "run.json").write_text(json.dumps(to_json(run)))
    program = Path(__file__).parent / "engines_on_ranks.py"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    launched = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(program), str(folder), *words],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert launched.returncode == 0, launched.stdout[-3000:] + launched.stderr[-6000:]


def test_a_lock_that_a_killed_deepspeed_left_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    check_no_stale_lock()  # somebody compiles right now
    os.utime(lock, (0, 0))
    with pytest.raises(ValueError, match="remove the file"):
        check_no_stale_lock()


def test_the_lock_of_another_python_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch's own place each interpreter and build has a folder of its own."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    for name in ("py38_cpu", f"py{sys.version_info.major}{sys.version_info.minor}_cpu"):
        lock = tmp_path / name / "deepspeed_shm_comm" / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (0, 0))
        if name == "py38_cpu":
            check_no_stale_lock()
    with pytest.raises(ValueError, match="remove the file"):
        check_no_stale_lock()
