"""Laws of the loop: grouping changes nothing, resuming changes nothing, bad runs stop by name."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.common.records import Material, read_record
from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.engines import DDP, FSDP2, DeepSpeed, Engine, Session, Single
from fourfold_parallel.run.models import Llama, Published
from fourfold_parallel.run.objective import IGNORE, KeepAll, MicrobatchLoss, NextToken
from fourfold_parallel.run.optimizer import Constant, Cooldown, Schedule
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


class Norms:
    """Notes the length of what the model's embedding gives at each validation."""

    event: ClassVar[str] = "norms"

    @contextmanager
    def watching(self, session: Session) -> Iterator[Callable[[], dict[str, object]]]:
        [embedding] = [m for m in session.model.modules() if isinstance(m, nn.Embedding)]
        seen: list[Tensor] = []
        hook = embedding.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
        try:
            yield lambda: {"length": float(torch.cat(seen).norm()), "passes": len(seen)}
        finally:
            hook.remove()


def test_an_observer_sees_validations_and_nothing_else(tmp_path: Path, small_run: Run) -> None:
    """One event a validation, behind it, of held-out rows alone; and the run is the one nobody watches."""
    run = replace(small_run, validate_every=3)
    watched, alone = tmp_path / "watched.jsonl", tmp_path / "alone.jsonl"
    train(run, record=watched, checkpoints=tmp_path / "a", progress=silent, observers=(Norms(),))
    last = train(run, record=alone, checkpoints=tmp_path / "b", progress=silent)
    record = read_record(watched)
    kinds = [event.kind for event in record.events if event.kind in ("validation", "norms")]
    assert kinds == ["validation", "norms"] * 2
    rows = run.data.validation(sequence=run.sequence)
    batches = -(-len(rows.row_starts) // run.batch)
    seen = torch.cat([rows.batch(i, batch=run.batch).tokens[:, :-1] for i in range(batches)])
    expected = trained_model(run, last).get_input_embeddings()(seen).detach().norm()
    assert record.last("norms").number("length") == pytest.approx(float(expected), rel=1e-5)
    assert record.last("norms").number("passes") == batches
    assert losses(watched) == losses(alone)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WithAdapter:
    """A small Llama whose queries train through a low-rank adapter."""

    plain: Llama

    def build(self, *, seed: int) -> PreTrainedModel:
        model = self.plain.build(seed=seed)
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
        return model

    def materials(self) -> tuple[Material, ...]:
        return ()


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


def test_another_runs_checkpoint_is_refused_by_the_names_of_the_fields(
    tmp_path: Path, small_run: Run
) -> None:
    """With both values, at any depth, whether or not the classes are of fourfold."""
    run_to(tmp_path / "own", replace(small_run, objective=NextToken(mask=KeepThirds())))
    for mask in (KeepAll(), KeepNone()):
        other = replace(
            small_run,
            seed=9,
            objective=NextToken(mask=mask),
            optimizer=replace(small_run.optimizer, learning_rate=0.001),  # type: ignore[type-var]
        )
        with pytest.raises(ValueError, match="was written by another run") as caught:
            run_to(tmp_path / "own", other)
        for words in (
            "seed: 3 in the checkpoint, 9 asked for",
            "optimizer.learning_rate: 0.003 in the checkpoint, 0.001 asked for",
            f"objective.mask: KeepThirds() in the checkpoint, {type(mask).__name__}() asked for",
            "Published(name='",
        ):
            assert words in str(caught.value)


def test_where_a_run_runs_is_not_what_it_is(tmp_path: Path, small_run: Run) -> None:
    """It goes on in other microbatches, under another name, checked and saved at other steps."""
    run_to(tmp_path / "straight", small_run)
    with pytest.raises(StoppedError):
        run_to(tmp_path / "broken", small_run, stop_at(3))
    elsewhere = replace(
        small_run, name="elsewhere", microbatch=3, validate_every=5, checkpoint_every=1
    )
    run_to(tmp_path / "broken", elsewhere)
    # float32 sums in another order, over four steps
    assert losses(tmp_path / "broken/r.jsonl") == pytest.approx(
        losses(tmp_path / "straight/r.jsonl"), abs=2e-6
    )


def test_an_earlier_versions_checkpoint_is_refused(tmp_path: Path, small_run: Run) -> None:
    """It has no checksums; its plain weights are the way out."""
    last = run_to(tmp_path, small_run)
    earlier = {"step": 6, "run": to_json(small_run), "ranks": 1}
    (last.path / "checkpoint.json").write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match=r"had no checksums.*model=Published\(name='"):
        run_to(tmp_path, small_run)


@pytest.mark.parametrize(
    "schedule", [Constant(warmup_steps=2), Cooldown(warmup_steps=2, cooldown_steps=2)]
)
def test_an_extended_run_is_the_longer_run(
    tmp_path: Path, small_run: Run, schedule: Schedule
) -> None:
    """Where the rates so far do not depend on the horizon: the same losses and weights, bit for bit."""
    longer = replace(small_run, schedule=schedule, horizon=Steps(count=8))
    straight = run_to(tmp_path / "straight", longer)
    shorter = replace(longer, horizon=Tokens(count=6 * longer.tokens_per_step), name="shorter")
    if isinstance(schedule, Constant):
        run_to(tmp_path / "grown", shorter)
    else:  # the fall begins after step 4
        with pytest.raises(StoppedError):
            run_to(tmp_path / "grown", shorter, stop_at(5))
    with pytest.raises(ValueError, match=r"6 steps in the checkpoint, 8 asked for\); extends=True"):
        run_to(tmp_path / "grown", longer)
    place = {"record": tmp_path / "grown/r.jsonl", "checkpoints": tmp_path / "grown/checkpoints"}
    with pytest.raises(StoppedError):
        train(longer, progress=stop_at(7), extends=True, **place)
    last = train(longer, progress=silent, extends=True, **place)
    assert losses(tmp_path / "grown/r.jsonl") == losses(tmp_path / "straight/r.jsonl")
    ours, theirs = trained_model(longer, last), trained_model(longer, straight)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    record = read_record(tmp_path / "grown/r.jsonl")
    assert record.run == longer
    assert record.of("extended")
    assert len(record.of("trained")) == 1
    with pytest.raises(ValueError, match=r"by a longer run .*8 steps in the checkpoint, 6 asked"):
        train(shorter, extends=True, **place)


def test_a_schedule_that_depends_on_the_horizon_is_not_extended(
    tmp_path: Path, small_run: Run
) -> None:
    run_to(tmp_path, small_run)
    longer = replace(small_run, horizon=Steps(count=8))
    with pytest.raises(ValueError, match="the schedule Cosine depends on the horizon"):
        train(
            longer, record=tmp_path / "r.jsonl", checkpoints=tmp_path / "checkpoints", extends=True
        )


def test_a_checkpoint_is_a_folder_that_transformers_reads(tmp_path: Path, small_run: Run) -> None:
    """Model, tokenizer and text: the weights are the trained ones. Paths are given as text."""
    last = train(small_run, record=str(tmp_path / "r.jsonl"), checkpoints=str(tmp_path / "c"))
    model = AutoModelForCausalLM.from_pretrained(last.path)
    ours = trained_model(small_run, last)
    assert type(model) is type(ours)
    for name, weight in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    tokenizer = AutoTokenizer.from_pretrained(last.path)
    prompt = tokenizer("the grid holds", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(made[0]).startswith("the grid holds")
    assert model.generation_config.use_cache
    plain = ours.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(made, plain)
    again = Published(name=last.path, revision="main", licence="made here")
    assert from_json(to_json(again)) == again
    for name, weight in again.build(seed=0).state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name


def test_a_checkpoint_that_transformers_cannot_read_holds_no_configuration(
    tmp_path: Path, small_run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Low-rank adapters: what reads it is named, and nothing can take it for a plain model."""
    assert isinstance(small_run.model, Llama)
    run = replace(small_run, model=WithAdapter(plain=small_run.model), horizon=Steps(count=2))
    last = run_to(tmp_path, run)
    assert "holds low-rank adapters; trained_model(run, checkpoint) reads them" in caplog.text
    assert not (last.path / "config.json").exists()
    assert any("lora_A" in name for name in trained_model(run, last).state_dict())


def test_a_training_tells_where_it_is(
    tmp_path: Path, small_run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Through logging, at the first step and the last at least."""
    caplog.set_level(logging.INFO, logger="fourfold_parallel")
    train(small_run, record=tmp_path / "r.jsonl", checkpoints=tmp_path / "c")
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert lines[0].startswith("step 1 of 6: loss ")
    assert lines[-1].startswith("step 6 of 6: loss ")


def test_another_runs_record_is_not_gone_on_with(tmp_path: Path, small_run: Run) -> None:
    """A resumed run finds a record of its own, or none, or one whose first line was cut: not another's."""
    other = replace(small_run, seed=9)
    checkpoints, record = tmp_path / "checkpoints", tmp_path / "r.jsonl"
    with pytest.raises(StoppedError):
        train(small_run, record=record, checkpoints=checkpoints, progress=stop_at(3))
    run_to(tmp_path / "other", other)
    theirs = (tmp_path / "other/r.jsonl").read_bytes()
    record.write_bytes(theirs)
    with pytest.raises(
        ValueError, match="is the record of another run: seed: 9 in the record, 3 asked"
    ):
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
    validated = read_record(tmp_path / "r.jsonl").last("validation")
    # float32 sums in another order
    assert validated.number("validation_loss_nats") == pytest.approx(expected.item(), abs=2e-6)
    assert validated.number("tokens") == len(rows) * run.sequence


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
        plain = NextToken(mask=KeepAll()).loss(model, batch, targets)
        return replace(
            plain, nats_sum=plain.nats_sum * (math.inf if self.bad in batch.addresses else 1)
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
        plain = NextToken(mask=KeepAll()).loss(model, batch, targets)
        if batch.number < self.since - 1:
            return plain
        root = (next(model.parameters()).flatten()[:1] * 0).sqrt().sum()
        return replace(plain, nats_sum=plain.nats_sum + root)


@pytest.mark.parametrize(("since", "kept"), [(4, 2), (6, 4)])
def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(
    tmp_path: Path, small_run: Run, since: int, kept: int
) -> None:
    """In the middle or at the last step: the run stops, and the checkpoint before it is whole."""
    run = replace(small_run, objective=Kinked(since=since))
    with pytest.raises(FloatingPointError, match=f"grad_norm=nan at step {since};.*0000000{kept}"):
        run_to(tmp_path, run)
    *_, last = checkpoint.checkpoints(tmp_path / "checkpoints")
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


def test_a_place_that_cannot_be_written_to_is_refused_before_the_first_step(
    tmp_path: Path, small_run: Run
) -> None:
    """A folder where a file is meant, a file where a folder is, and a path below a file."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    places = {"record": tmp_path / "r.jsonl", "checkpoints": tmp_path / "c"}
    for name, wrong, words in (
        ("record", tmp_path / "folder", "is a folder; name a file"),
        ("record", tmp_path / "file" / "r.jsonl", "cannot be written to"),
        ("checkpoints", tmp_path / "file", "cannot be written to"),
        ("checkpoints", str(tmp_path / "file" / "c"), "cannot be written to"),
    ):
        with pytest.raises(ValueError, match=f"{name}='{wrong}' {words}"):
            train(small_run, **{**places, name: wrong})
    assert not places["record"].exists()


def test_a_single_process_engine_refuses_a_launch_of_several(
    tmp_path: Path, small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine: Engine = Single()
    with pytest.raises(ValueError, match="2 were launched"):
        run_to(tmp_path, replace(small_run, engine=engine))
