"""A run that begins from another's checkpoint: equal to the uninterrupted run, under any engine."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import Record, read_record
from fourfold_parallel.common.values import digest, from_json, to_json
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.checkpoint import Checkpoint, Keep
from fourfold_parallel.run.corpora import TextFiles
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.mixtures import Mixed, MixturePart
from fourfold_parallel.run.objective import token_nats
from fourfold_parallel.run.optimizer import AdamW, Constant
from fourfold_parallel.run.outofcore import Decisions, OutOfCore
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import BytePairs
from fourfold_parallel.run.train import train, trained_model
from fourfold_parallel.run.trained import CheckpointAt, Continued, TrainedBy

ROUNDING = 2e-5
"""float32 sums over two ranks in another order, over six AdamW steps."""
HALF = 4
"""Steps of the parent; a multiple of the mixture's period in rows."""


def mixed_run(small_run: Run, *, first_row: int = 0, steps: int = 2 * HALF) -> Run:
    """Two parts of one corpus at a constant rate, so that halves are equal to a whole."""
    source = small_run.data
    parts = tuple(
        MixturePart(name=name, source=source, weight=weight, first_row=round(first_row * weight))
        for name, weight in (("old", 0.25), ("new", 0.75))
    )
    return replace(
        small_run,
        data=Mixed(parts=parts),
        schedule=Constant(warmup_steps=0),
        horizon=Steps(count=steps),
        microbatch=4,
        validate_every=HALF,
        checkpoint_every=HALF,
    )


def run_to(folder: Path, run: Run) -> tuple[Record, Checkpoint]:
    """Train, and read the record."""
    last = train(
        run, record=folder / "r.jsonl", checkpoints=folder / "c", progress=silent, keep=Keep(last=9)
    )
    return read_record(folder / "r.jsonl"), last


def numbers(record: Record, kind: str = "step", key: str = "loss_nats") -> list[float]:
    return [event.number(key) for event in record.of(kind)]


def halves(small_run: Run) -> tuple[Run, Run]:
    """A parent, and the run that goes on with its data; the seed of the order is one."""
    first = mixed_run(small_run, steps=HALF)
    second = mixed_run(small_run, first_row=HALF * small_run.batch, steps=HALF)
    return first, second


@pytest.mark.parametrize("letters", ["", "SR"])
def test_two_halves_are_the_whole(tmp_path: Path, small_run: Run, letters: str) -> None:
    """With the state carried, from one process and from an engine out of core.

    A step reads the rows that the whole run's reads, in an order of its own number, so sums are rounded anew.
    """
    whole, _ = run_to(tmp_path / "whole", mixed_run(small_run))
    first, second = halves(small_run)
    engine = OutOfCore(inner=Single(), budget=Decisions(letters=letters)) if letters else Single()
    before, last = run_to(tmp_path / "first", replace(first, engine=engine))
    model = Continued(parent=CheckpointAt.of(last.path), optimizer_state="carried")
    after, _ = run_to(tmp_path / "second", replace(second, model=model))
    assert numbers(before) == numbers(whole)[:HALF]
    assert numbers(after) == pytest.approx(numbers(whole)[HALF:], abs=ROUNDING)
    for key in ("validation_loss_nats", "validation_loss_nats_of_old"):
        ends = [numbers(record, "validation", key)[-1] for record in (after, whole)]
        assert ends[0] == pytest.approx(ends[1], abs=ROUNDING)


def test_a_fresh_optimizer_is_another_run(tmp_path: Path, small_run: Run) -> None:
    """Weights are the checkpoint's either way: the first loss is equal, and the second is not."""
    first, second = halves(small_run)
    _, last = run_to(tmp_path / "first", first)
    records = {}
    for state in ("fresh", "carried"):
        model = Continued(parent=CheckpointAt.of(last.path), optimizer_state=state)  # type: ignore[arg-type]
        records[state], _ = run_to(tmp_path / state, replace(second, model=model))
    losses = {state: numbers(record) for state, record in records.items()}
    assert losses["fresh"][0] == losses["carried"][0]
    assert abs(losses["fresh"][1] - losses["carried"][1]) > 1e-4


def test_rates_and_decays_are_the_new_runs_own(tmp_path: Path, small_run: Run) -> None:
    """What is carried are moments and the count of steps."""
    first, second = halves(small_run)
    _, last = run_to(tmp_path / "first", first)
    own = AdamW(learning_rate=1e-3, weight_decay=0.01, beta1=0.8, beta2=0.9, epsilon=1e-6)
    model = Continued(parent=CheckpointAt.of(last.path), optimizer_state="carried")
    _, end = run_to(tmp_path / "second", replace(second, model=model, optimizer=own))
    manifest = json.loads((end.path / "checkpoint.json").read_text())
    group = manifest["numbers"]["groups"][0]
    assert group["betas"] == [0.8, 0.9]
    assert (group["eps"], group["weight_decay"]) == (1e-6, 0.01)
    counts = [
        value for key, value in manifest["numbers"]["singles"].items() if key.endswith("/step")
    ]
    assert {value["value"] for value in counts} == {float(2 * HALF)}


def test_the_record_names_the_ancestry(tmp_path: Path, small_run: Run) -> None:
    """Each parent by the digest of its weights and of its run, the nearest first; and the run is rebuilt."""
    first, second = halves(small_run)
    _, last = run_to(tmp_path / "first", first)
    once = replace(
        second,
        model=Continued(parent=CheckpointAt.of(last.path), optimizer_state="fresh"),
        name="b",
    )
    _, middle = run_to(tmp_path / "second", once)
    twice = replace(
        second,
        model=Continued(parent=CheckpointAt.of(middle.path), optimizer_state="fresh"),
        name="c",
    )
    record, _ = run_to(tmp_path / "third", twice)
    assert record.run == twice
    materials: Any = record.events[0].values["materials"]
    models = [each for each in materials if each["kind"] == "model"]
    assert [each["name"] for each in models] == ["b", "small"]
    assert models[0]["sha256"] == CheckpointAt.of(middle.path).weights_sha256
    assert models[1]["source"] == f"step {HALF} of the run {digest(first)}"


def test_a_parent_may_be_a_run(tmp_path: Path, small_run: Run) -> None:
    """It is trained on first use and kept; with another seed it is another."""
    first, second = halves(small_run)
    model = Continued(parent=first, optimizer_state="carried")
    after, _ = run_to(tmp_path / "child", replace(second, model=model))
    whole, _ = run_to(tmp_path / "whole", mixed_run(small_run))
    assert numbers(after) == pytest.approx(numbers(whole)[HALF:], abs=ROUNDING)
    weights = model.build(seed=0).state_dict()
    theirs = TrainedBy(run=first).build(seed=0).state_dict()
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
    assert from_json(to_json(model)) == model


def test_a_continued_run_is_resumed(tmp_path: Path, small_run: Run) -> None:
    """From its own checkpoint, not from its parent's again."""
    first, second = halves(small_run)
    _, last = run_to(tmp_path / "first", first)
    model = Continued(parent=CheckpointAt.of(last.path), optimizer_state="carried")
    child = replace(second, model=model, checkpoint_every=1)
    straight, _ = run_to(tmp_path / "straight", child)

    def stop(done: int, total: int, note: str) -> None:
        del total, note
        if done == 3:
            raise KeyboardInterrupt

    place = {"record": tmp_path / "r.jsonl", "checkpoints": tmp_path / "stopped"}
    with pytest.raises(KeyboardInterrupt):
        train(child, progress=stop, **place)
    train(child, progress=silent, **place)
    resumed = read_record(tmp_path / "r.jsonl")
    assert len(resumed.of("resumed")) == 1
    assert numbers(resumed) == numbers(straight)


def test_other_weights_are_refused(tmp_path: Path, small_run: Run) -> None:
    """A folder whose content has changed under its name, and one that is no checkpoint of a run."""
    first, _ = halves(small_run)
    _, last = run_to(tmp_path / "first", first)
    there = CheckpointAt.of(last.path)
    other = replace(there, weights_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"not 000000000000; name the folder of those"):
        Continued(parent=other, optimizer_state="fresh").build(seed=0)
    with pytest.raises(ValueError, match=r"is no checkpoint of a run.*use Published"):
        CheckpointAt.of(tmp_path)
    moved = last.path.rename(tmp_path / "step-00000004")
    assert CheckpointAt.of(moved).weights_sha256 == there.weights_sha256


def test_the_digest_of_weights_does_not_see_how_they_are_cut(
    tmp_path: Path, small_run: Run
) -> None:
    first, _ = halves(small_run)
    _, last = run_to(tmp_path / "first", first)
    cut = checkpoint.reshard(last.path, tmp_path / "cut", ranks=3)
    assert CheckpointAt.of(cut).weights_sha256 == CheckpointAt.of(last.path).weights_sha256


def test_losses_of_parts_sum_to_the_whole(tmp_path: Path, small_run: Run) -> None:
    """In training weighted by targets, in validation by shares; each is that of its own rows."""
    run = mixed_run(small_run)
    record, last = run_to(tmp_path, run)
    for event in record.of("step"):
        nats = sum(event.number(f"nats_sum_of_{part}") for part in ("old", "new"))
        targets = sum(event.number(f"targets_of_{part}") for part in ("old", "new"))
        assert targets == event.number("supervised_targets")
        # Sums of float32 losses, one of all rows and one of each part.
        assert nats / targets == pytest.approx(event.number("loss_nats"), abs=ROUNDING)
    counts = [event.number("targets_of_old") / run.sequence for event in record.of("step")]
    assert counts == [2.0] * run.steps
    event = record.of("validation")[-1]
    mean = 0.25 * event.number("validation_loss_nats_of_old")
    mean += 0.75 * event.number("validation_loss_nats_of_new")
    assert event.number("validation_loss_nats") == pytest.approx(mean, abs=1e-12)
    model = trained_model(run, last)
    assert isinstance(small_run.data, Packed)
    rows = small_run.data.validation(sequence=run.sequence)
    tokens = rows.batch(0, batch=rows.rows).tokens
    with torch.inference_mode():
        logits = model(input_ids=tokens[:, :-1]).logits
        mean = token_nats(logits, tokens[:, 1:], model).mean().item()
    assert event.number("validation_loss_nats_of_old") == pytest.approx(mean, abs=ROUNDING)


def test_a_part_of_weight_0_is_validated_on(
    tmp_path: Path, small_run: Run, corpus: TextFiles
) -> None:
    """And does not weigh: the mix is the other part, which is the single source's own number."""
    alone, _ = run_to(tmp_path / "alone", small_run)
    other = Packed(corpus=corpus, tokenizer=BytePairs(vocabulary=320), held_out=0.3)
    parts = (
        MixturePart(name="read", source=small_run.data, weight=1.0),
        MixturePart(name="watched", source=other, weight=0.0),
    )
    mixed, _ = run_to(tmp_path / "mixed", replace(small_run, data=Mixed(parts=parts)))
    assert numbers(mixed) == numbers(alone)
    mix = numbers(mixed, "validation", "validation_loss_nats")
    assert mix == numbers(mixed, "validation", "validation_loss_nats_of_read")
    assert mix == pytest.approx(numbers(alone, "validation", "validation_loss_nats"), abs=1e-6)
    watched = numbers(mixed, "validation", "validation_loss_nats_of_watched")
    assert watched != pytest.approx(mix, abs=1e-6)
    assert mixed.of("step")[0].number("targets_of_watched") == 0


def test_a_single_source_records_what_it_did(tmp_path: Path, small_run: Run) -> None:
    """No new key, so that old records and new ones of the same run are alike."""
    record, _ = run_to(tmp_path, small_run)
    keys = {key for event in record.events for key in event.values}
    assert not [key for key in keys if "_of_" in key]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "engines",
    [
        ("ddp", "fsdp2", "row", "data"),
        pytest.param(("zero1", "zero3", "ddp", "col"), marks=pytest.mark.slow),
    ],
)
def test_any_engine_goes_on_from_any_other(
    tmp_path: Path, small_run: Run, engines: tuple[str, ...]
) -> None:
    """All pairs, on two ranks and from and to one process: losses, and those of each part, are those of the
    uninterrupted run of one process."""
    whole, _ = run_to(tmp_path / "whole", mixed_run(small_run))
    first, second = halves(small_run)
    train(first, record=tmp_path / "s.jsonl", checkpoints=tmp_path / "single", progress=silent)
    (tmp_path / "runs.json").write_text(json.dumps(to_json([first, second])))
    here = Path(__file__).parent
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(here / "continued_on_ranks.py"), str(tmp_path), *engines],
        capture_output=True, text=True, timeout=800, check=False,
        env={**os.environ, "PYTHONPATH": str(here)},
    )  # fmt: skip
    assert launched.returncode == 0, launched.stdout[-3000:] + launched.stderr[-6000:]
    records = [
        read_record(tmp_path / f"{source}-{name}.jsonl")
        for source in ("single", *engines)
        for name in engines
    ]
    for name in engines:
        [path] = (tmp_path / name).glob("step-*")
        model = Continued(parent=CheckpointAt.of(path), optimizer_state="carried")
        records.append(run_to(tmp_path / f"{name}-single", replace(second, model=model))[0])
    for record in records:
        for kind, key in (
            ("step", "loss_nats"),
            ("step", "nats_sum_of_old"),
            ("validation", "validation_loss_nats"),
            ("validation", "validation_loss_nats_of_old"),
            ("validation", "validation_loss_nats_of_new"),
        ):
            theirs = numbers(whole, kind, key)
            ours = numbers(record, kind, key)
            # A sum over 48 targets is rounded as often.
            bound = ROUNDING * (48 if "sum" in key else 1)
            assert ours == pytest.approx(theirs[len(theirs) // 2 :], abs=bound), (record.path, key)
