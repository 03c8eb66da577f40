"""The suite's models, rates and forks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fourfold_gemstones.architecture import GEMSTONES
from fourfold_gemstones.reproduce import recipes
from fourfold_gemstones.reproduce.suite import train as suite
from fourfold_gemstones.reproduce.suite.train import Member, decoder
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.run.corpora import TextFiles
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.recipe import At, Steps
from fourfold_parallel.run.tokenizers import BytePairs
from fourfold_parallel.run.train import train


@pytest.fixture
def member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Member:
    """Four steps of 16x2 on a small text, with a cooldown from the second."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(3000)))
    base = recipes.member(16, 2, seed=0, steps=4, forks=(2,))
    data = Packed(
        corpus=TextFiles(paths=(str(text),), licence="none"),
        tokenizer=BytePairs(vocabulary=257),
        held_out=0.05,
    )
    run = replace(base.run, data=data, batch=4, microbatch=4, validate_every=1)
    return replace(base, run=run)


@pytest.mark.parametrize(("width", "depth"), [(16, 2), (32, 4), (48, 3), (64, 1)])
def test_models_have_the_parameters_that_are_counted(width: int, depth: int) -> None:
    model = decoder(width, depth, recipes.BYTES).build(seed=0)
    counted = recipes.BYTES.parameters(np.asarray([float(width)]), np.asarray([float(depth)]))
    assert sum(weight.numel() for weight in model.parameters()) == counted[0]


def test_a_published_shape_has_its_published_size() -> None:
    """256x23 of the paper, built on no device: transformers' Llama has the published count."""
    with torch.device("meta"):
        model = decoder(256, 23, GEMSTONES).build(seed=0)
    assert sum(weight.numel() for weight in model.parameters()) == 48_377_600


def test_the_rate_falls_with_width_and_root_depth() -> None:
    assert suite.scaled_rate(5.0, 256, 23) == pytest.approx(4.07e-3, rel=1e-3)
    assert suite.scaled_rate(1.0, 64, 16) == suite.scaled_rate(1.0, 32, 4) / 4
    run = recipes.member(64, 4, seed=0, steps=10, forks=()).run
    assert run.optimizer.learning_rate == recipes.BASE_RATE / (64 * math.sqrt(4))


def test_a_run_in_two_segments_is_the_run_in_one(member: Member, tmp_path: Path) -> None:
    """Forking a constant run from its own checkpoint changes no validation loss."""
    events = suite.train_member(member, tmp_path / "segments", member.run.data)
    points = [fields for kind, fields in events if kind == "point"]
    constant = [point["loss_nats"] for point in points if point["schedule"] == "constant"]
    whole = replace(member.run, horizon=Steps(count=4))
    record = tmp_path / "whole.jsonl"
    train(whole, record=record, checkpoints=tmp_path / "whole", progress=silent)
    validations = read_record(record).of("validation")
    assert constant == [event.number("validation_loss_nats") for event in validations]


def test_a_cooldown_starts_where_it_forks_and_ends_near_zero(
    member: Member, tmp_path: Path
) -> None:
    suite.train_member(member, tmp_path, member.run.data)
    steps = read_record(tmp_path / f"{member.run.name}-cooled2" / "record.jsonl").of("step")
    assert [int(event.number("step")) for event in steps] == [3]
    assert steps[0].number("learning_rate") <= member.run.optimizer.learning_rate


def test_training_again_trains_nothing(member: Member, tmp_path: Path) -> None:
    """A finished member is read from its records; its points are the same."""
    first = suite.train_member(member, tmp_path, member.run.data)
    assert suite.train_member(member, tmp_path, member.run.data) == first


def test_validations_stand_in_equal_ratios() -> None:
    """25 of them, from a twentieth of the run to its end, and cooldowns fork from some of them."""
    run = recipes.suite("laptop").members[-1].run
    assert isinstance(run.validate_every, At)
    steps = np.asarray(run.validate_every.steps)
    assert len(steps) == recipes.POINTS
    assert (steps[0], steps[-1]) == (round(0.05 * run.steps), run.steps)
    ratios = np.diff(np.log(steps))
    assert ratios == pytest.approx(ratios.mean(), abs=1.2 / steps[0])
    for member in recipes.suite("laptop").members:
        assert isinstance(member.run.validate_every, At)
        assert set(member.forks) <= set(member.run.validate_every.steps)


def test_the_suite_is_what_the_paper_trained() -> None:
    """17 shapes; three with three seeds; twins at half the rate of six; no seed of earlier records."""
    members = recipes.suite("laptop").members
    full = [member for member in members if member.rate == 1]
    seeds = {member.model: 0 for member in full}
    for member in full:
        seeds[member.model] += 1
    assert sorted(seeds.values()) == [1] * 14 + [3] * 3
    twins = [member for member in members if member.rate == 0.5]
    assert len(twins) == 6
    for twin in twins:
        same = next(member for member in full if member.model == twin.model)
        assert twin.run.optimizer.learning_rate == same.run.optimizer.learning_rate / 2
        assert (twin.run.seed, twin.run.steps) == (same.run.seed, same.run.steps)
    assert min(member.run.seed for member in members) == recipes.FIRST_SEED
    sizes = [sum(weight.numel() for weight in shape.build(seed=0).parameters()) for shape in seeds]
    assert 16_000 < min(sizes) < 17_000
    assert 1_100_000 < max(sizes) < 1_200_000


def test_a_width_without_whole_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="width=40 is not a multiple of head_width=16"):
        decoder(40, 2, recipes.BYTES)
