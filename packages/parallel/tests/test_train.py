"""Laws of the loop: grouping changes nothing, resuming changes nothing, bad runs stop by name."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.common.records import Material, read_record
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.engines import DDP, FSDP2, DeepSpeed, Engine, Single
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import IGNORE, KeepAll, MicrobatchLoss, NextToken
from fourfold_parallel.run.recipe import At, Run, Steps, Tokens
from fourfold_parallel.run.train import train, trained_model


def losses(path: Path) -> list[float]:
    return [event.number("loss_nats") for event in read_record(path).of("step")]


def run_to(folder: Path, run: Run, progress: Progress = silent) -> checkpoint.Checkpoint:
    return train(
        run, record=folder / "r.jsonl", checkpoints=folder / "checkpoints", progress=progress
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepThirds:
    """Leaves out an uneven number of targets per row, so that means of means would differ."""

    def drop(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return (tokens % 3 == 0) & (tokens.cumsum(1) % 2 == 0)


@pytest.mark.parametrize("microbatch", [1, 3, 8])
def test_microbatches_change_nothing(tmp_path: Path, small_run: Run, microbatch: int) -> None:
    """Losses, gradient norms and weights are those of the undivided batch, masks of uneven size included."""
    whole = replace(small_run, objective=NextToken(mask=KeepThirds()))
    run_to(tmp_path / "whole", whole)
    run_to(tmp_path / "split", replace(whole, microbatch=microbatch))
    # float32 sums in another order, over six steps.
    assert losses(tmp_path / "split/r.jsonl") == pytest.approx(
        losses(tmp_path / "whole/r.jsonl"), abs=2e-6
    )


class StoppedError(Exception):
    """The machine was switched off."""


def stop_at(step: int) -> Progress:
    def report(done: int, total: int, note: str) -> None:
        if done == step:
            raise StoppedError

    return report


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, small_run: Run, step: int) -> None:
    """Stopped after any step, it ends with the same losses and the same weights, bit for bit."""
    straight = run_to(tmp_path / "straight", small_run)
    with pytest.raises(StoppedError):
        run_to(tmp_path / "broken", small_run, stop_at(step))
    resumed = run_to(tmp_path / "broken", small_run)
    assert losses(tmp_path / "broken/r.jsonl") == losses(tmp_path / "straight/r.jsonl")
    ours, theirs = trained_model(small_run, resumed), trained_model(small_run, straight)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def test_a_save_that_dies_leaves_the_last_whole_checkpoint(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between writing and renaming, the half-written folder is passed over and cleaned up."""
    write_text = checkpoint.write_text

    def dies_at_the_second(path: Path, text: str) -> None:
        if path.name == "checkpoint.json" and json.loads(text)["step"] == 4:
            raise StoppedError
        write_text(path, text)

    monkeypatch.setattr(checkpoint, "write_text", dies_at_the_second)
    with pytest.raises(StoppedError):
        run_to(tmp_path, small_run)
    assert [found.step for found in checkpoint.checkpoints(tmp_path / "checkpoints")] == [2]
    monkeypatch.setattr(checkpoint, "write_text", write_text)
    assert run_to(tmp_path, small_run).step == 6
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_removal_that_dies_leaves_whole_checkpoints_only(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while an old checkpoint is removed, the run resumes from the new one, and clears up."""
    rmtree = shutil.rmtree

    def dies_within_step_2(path: Path, **options: bool) -> None:
        if "step-00000002" in path.name:
            (path / "checkpoint.json").unlink()
            raise StoppedError
        rmtree(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", dies_within_step_2)
    with pytest.raises(StoppedError):
        run_to(tmp_path, small_run)
    assert [found.step for found in checkpoint.checkpoints(tmp_path / "checkpoints")] == [4]
    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    assert run_to(tmp_path, small_run).step == 6
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Plain gradient descent, which has no state."""

    learning_rate: float

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class WithSpare:
    """A small Llama with a weight that no loss reaches, and AdamW has no moments for."""

    plain: Llama

    def build(self, *, seed: int) -> PreTrainedModel:
        model = self.plain.build(seed=seed)
        model.register_parameter("spare", nn.Parameter(torch.ones(3)))
        return model

    def materials(self) -> tuple[Material, ...]:
        return ()


@pytest.mark.parametrize("change", ["no state", "no gradient"])
def test_what_has_no_moments_resumes_too(tmp_path: Path, small_run: Run, change: str) -> None:
    """Gradient descent, and a weight without a gradient: bit for bit the uninterrupted run."""
    run = replace(small_run, optimizer=Descent(learning_rate=0.1))
    if change == "no gradient":
        assert isinstance(small_run.model, Llama)
        run = replace(small_run, model=WithSpare(plain=small_run.model))
    straight = run_to(tmp_path / "straight", run)
    with pytest.raises(StoppedError):
        run_to(tmp_path / "broken", run, stop_at(3))
    resumed = run_to(tmp_path / "broken", run)
    ours, theirs = trained_model(run, resumed), trained_model(run, straight)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def test_another_models_checkpoint_is_refused(tmp_path: Path, small_run: Run) -> None:
    """A deeper and a shallower model than the checkpoint's: both name the weight and both sides."""
    last = run_to(tmp_path, small_run)
    for depth, words in ((1, "the model has no such weight"), (3, "no 'model.layers.2")):
        other = replace(small_run, model=replace(small_run.model, depth=depth))  # type: ignore[type-var]
        with pytest.raises(ValueError, match=words):
            trained_model(other, last)


def test_an_untied_checkpoint_is_refused_by_a_tied_model(tmp_path: Path, small_run: Run) -> None:
    """Which of the two weights it should keep is not known."""
    untied = replace(small_run, model=replace(small_run.model, tied=False))  # type: ignore[type-var]
    last = run_to(tmp_path, untied)
    with pytest.raises(ValueError, match=r"'lm_head.weight' and 'model.embed_tokens.weight'"):
        trained_model(small_run, last)


def test_a_run_called_again_is_trained_once(tmp_path: Path, small_run: Run) -> None:
    """At its horizon already, it takes no step and its record has one end."""
    for _ in range(2):
        run_to(tmp_path, small_run)
        record = read_record(tmp_path / "r.jsonl")
        assert len(record.of("step")) == 6
        assert len(record.of("trained")) == 1


def test_another_runs_checkpoint_is_refused(tmp_path: Path, small_run: Run) -> None:
    run_to(tmp_path, small_run)
    with pytest.raises(ValueError, match="was written by another run"):
        run_to(tmp_path, replace(small_run, seed=9))


def test_another_runs_record_is_not_gone_on_with(tmp_path: Path, small_run: Run) -> None:
    """A resumed run finds a record of its own, or none, or one whose first line was cut: not another's."""
    other = replace(small_run, seed=9)
    checkpoints, record = tmp_path / "checkpoints", tmp_path / "r.jsonl"
    with pytest.raises(StoppedError):
        train(small_run, record=record, checkpoints=checkpoints, progress=stop_at(3))
    run_to(tmp_path / "other", other)
    theirs = (tmp_path / "other/r.jsonl").read_bytes()
    record.write_bytes(theirs)
    with pytest.raises(ValueError, match="is the record of another run"):
        run_to(tmp_path, small_run)
    assert record.read_bytes() == theirs
    record.write_bytes(theirs[:50])
    run_to(tmp_path, small_run)
    assert read_record(record).run == small_run


def test_a_run_is_validated_at_the_steps_it_names(tmp_path: Path, small_run: Run) -> None:
    """After each step named and at the end; unsorted steps are refused."""
    run_to(tmp_path, replace(small_run, validate_every=At(steps=(1, 4))))
    record = read_record(tmp_path / "r.jsonl")
    assert [event.number("step") for event in record.of("validation")] == [1, 4, 6]
    assert record.run == replace(small_run, validate_every=At(steps=(1, 4)))
    with pytest.raises(ValueError, match="not ascending from 1"):
        At(steps=(4, 1))


@pytest.mark.parametrize(("batch", "microbatch"), [(1, 1), (8, 3), (256, 64)])
def test_each_held_out_row_counts_once(
    tmp_path: Path, small_run: Run, batch: int, microbatch: int
) -> None:
    """For a batch that does not divide the rows, or is larger than they are, too."""
    run = replace(small_run, batch=batch, microbatch=microbatch, horizon=Steps(count=1))
    model = trained_model(run, run_to(tmp_path, run))
    stream = run.data.validation(sequence=run.sequence)
    starts = stream.row_starts[:, None] + np.arange(run.sequence + 1)
    rows = torch.from_numpy(stream.file.tokens[starts].astype(np.int64))
    assert len(rows) % 8
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    found = read_record(tmp_path / "r.jsonl").last("validation")
    # float32 sums in another order
    assert found.number("validation_loss_nats") == pytest.approx(expected.item(), abs=2e-6)
    assert found.number("tokens") == len(rows) * run.sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepNone:
    """Leaves every target out."""

    def drop(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return torch.ones_like(tokens, dtype=torch.bool)


def test_a_step_without_targets_says_so(tmp_path: Path, small_run: Run) -> None:
    run_to(tmp_path, replace(small_run, objective=NextToken(mask=KeepNone())))
    for event in read_record(tmp_path / "r.jsonl").of("step"):
        assert event.number("supervised_targets") == 0
        assert event.number("grad_norm") == 0


def test_the_record_says_what_was_run(tmp_path: Path, small_run: Run) -> None:
    """Run, versions, hardware, material with licence and digest: all in the first line."""
    run_to(tmp_path, small_run)
    record = read_record(tmp_path / "r.jsonl")
    first = record.events[0].values
    assert record.run == small_run
    assert {"commit", "versions", "hardware", "seed", "world_size", "materials"} <= set(first)
    assert [material["licence"] for material in first["materials"]] == [
        "made here",
        "as the corpus",
    ]  # type: ignore[index, union-attr]
    steps = record.of("step")
    assert len(steps) == 6
    assert all(event.number("supervised_targets") == 8 * 24 for event in steps)
    assert [event.number("step") for event in record.of("validation")] == [4, 6]


def test_training_learns(tmp_path: Path, small_run: Run) -> None:
    """Thirty steps take the loss well below that of a uniform guess over the 15 words of the text."""
    longer = replace(small_run, horizon=Tokens(count=30 * 8 * 24), checkpoint_every=100)
    run_to(tmp_path, longer)
    curve = losses(tmp_path / "r.jsonl")
    assert len(curve) == 30
    assert curve[0] == pytest.approx(math.log(320), abs=0.3)
    assert curve[-1] < math.log(15) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Overflowing:
    """Gives an infinite loss at the third step's first row."""

    bad: int

    def targets(self, batch: Batch) -> Tensor:
        return NextToken(mask=KeepAll()).targets(batch)

    def loss(self, model: nn.Module, batch: Batch, targets: Tensor) -> MicrobatchLoss:
        found = NextToken(mask=KeepAll()).loss(model, batch, targets)
        return replace(
            found, nats_sum=found.nats_sum * (math.inf if self.bad in batch.addresses else 1)
        )


def test_a_loss_that_is_not_finite_stops_the_run_by_name(tmp_path: Path, small_run: Run) -> None:
    """The message names the step, the rows and the last whole checkpoint, which is left as it was."""
    stream = small_run.data.open(sequence=24, seed=small_run.seed)
    bad = stream.batch(2, batch=8).addresses[0]
    with pytest.raises(FloatingPointError) as caught:
        run_to(tmp_path, replace(small_run, objective=Overflowing(bad=bad)))
    message = str(caught.value)
    assert "loss_nats=inf at step 3" in message
    assert str(bad) in message
    assert "step-00000002" in message


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinked:
    """From one step on the gradient is not finite (the root's at zero), while the loss is."""

    since: int

    def targets(self, batch: Batch) -> Tensor:
        return NextToken(mask=KeepAll()).targets(batch)

    def loss(self, model: nn.Module, batch: Batch, targets: Tensor) -> MicrobatchLoss:
        found = NextToken(mask=KeepAll()).loss(model, batch, targets)
        if batch.number < self.since - 1:
            return found
        root = (next(model.parameters()).flatten()[:1] * 0).sqrt().sum()
        return replace(found, nats_sum=found.nats_sum + root)


@pytest.mark.parametrize(("since", "kept"), [(4, 2), (6, 4)])
def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(
    tmp_path: Path, small_run: Run, since: int, kept: int
) -> None:
    """In the middle or at the last step: the run stops, and the checkpoint before it is whole."""
    run = replace(small_run, objective=Kinked(since=since))
    with pytest.raises(FloatingPointError, match=f"grad_norm=nan at step {since};.*0000000{kept}"):
        run_to(tmp_path, run)
    (last,) = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert last.step == kept
    assert all(weight.isfinite().all() for weight in trained_model(run, last).parameters())


def test_a_validation_that_is_not_finite_never_reaches_a_checkpoint(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record keeps the value; the run stops."""
    ruined = {"validation_loss_nats": math.nan, "tokens": 1}
    monkeypatch.setattr("fourfold_parallel.run.train.validate", lambda *_: ruined)
    with pytest.raises(FloatingPointError, match=r"validation_loss_nats=nan at step 4;.*00000002"):
        run_to(tmp_path, small_run)
    assert read_record(tmp_path / "r.jsonl").last("validation").values["step"] == 4


def test_dropped_targets_get_no_gradient_and_are_still_measured(small_run: Run) -> None:
    """The loss on kept targets has the gradient of manual masking; telemetry adds up to the whole."""
    model = small_run.model.build(seed=0)
    batch = small_run.data.open(sequence=24, seed=0).batch(0, batch=4)
    masked = NextToken(mask=KeepThirds())
    targets = masked.targets(batch)
    kept = masked.loss(model, batch, targets)
    everything = NextToken(mask=KeepAll())
    whole = everything.loss(model, batch, everything.targets(batch))
    total = kept.nats_sum.detach() + kept.telemetry["dropped_nats_sum"]
    assert total.item() == pytest.approx(whole.nats_sum.item(), rel=1e-6)
    assert kept.telemetry["dropped_targets"].item() == (targets == IGNORE).sum().item() > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: replace(run, batch=0), "batch=0"),
        (lambda run: replace(run, horizon=Steps(count=0)), "count=0"),
        (lambda run: replace(run, max_grad_norm=0.0), "max_grad_norm=0.0"),
        (lambda run: replace(run, data=replace(run.data, held_out=0.0)), "held_out=0"),
        (lambda run: replace(run, model=replace(run.model, vocabulary=100)), "embeds 100"),
        (lambda run: replace(run, model=replace(run.model, heads=5)), "heads=5"),
        (lambda run: replace(run, model=replace(run.model, kv_heads=3)), "kv_heads=3"),
        (lambda run: replace(run, engine=DDP()), "torchrun"),
        (lambda run: replace(run, engine=FSDP2(reshard_after_forward=True)), "torchrun"),
        (lambda run: replace(run, engine=DeepSpeed(zero=1)), "torchrun"),
    ],
)
def test_bad_runs_are_refused_before_any_work(
    tmp_path: Path, small_run: Run, change: Callable[[Run], Run], words: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        run_to(tmp_path, change(small_run))
    assert words in str(caught.value)
    assert not (tmp_path / "r.jsonl").exists()


def test_a_single_process_engine_refuses_a_launch_of_several(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine: Engine = Single()
    with pytest.raises(ValueError, match="2 were launched"):
        run_to(tmp_path, replace(small_run, engine=engine))
