"""The suite's models, rates and forks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fourfold_gemstones import recipes, suite
from fourfold_gemstones.counting import GEMSTONES
from fourfold_gemstones.suite import Gem, Member
from fourfold_parallel.run.corpora import TextFiles
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.progress import silent
from fourfold_parallel.run.recipe import Steps
from fourfold_parallel.run.records import read_record
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
    model = Gem(width=width, depth=depth, architecture=recipes.BYTES).build(seed=0)
    counted = recipes.BYTES.parameters(np.asarray([float(width)]), np.asarray([float(depth)]))
    assert sum(one.numel() for one in model.parameters()) == counted[0]


def test_a_published_shape_has_its_published_size() -> None:
    """256x23 of the paper, built on no device: transformers' Gemma has the published count."""
    with torch.device("meta"):
        model = Gem(width=256, depth=23, architecture=GEMSTONES).build(seed=0)
    assert sum(one.numel() for one in model.parameters()) == 48_377_600


def test_the_rate_falls_with_width_and_root_depth() -> None:
    assert suite.scaled_rate(5.0, 256, 23) == pytest.approx(4.07e-3, rel=1e-3)
    assert suite.scaled_rate(1.0, 64, 16) == suite.scaled_rate(1.0, 32, 4) / 4
    run = recipes.member(64, 4, seed=0, steps=10, forks=()).run
    assert run.optimizer.learning_rate == recipes.BASE_RATE / (64 * math.sqrt(4))


def test_a_run_in_two_segments_is_the_run_in_one(member: Member, tmp_path: Path) -> None:
    """Forking a constant run from its own checkpoint changes no validation loss."""
    points = suite.train_member(member, tmp_path / "segments")
    constant = [point["loss_nats"] for point in points if point["schedule"] == "constant"]
    whole = replace(member.run, horizon=Steps(count=4))
    record = tmp_path / "whole.jsonl"
    train(whole, record=record, checkpoints=tmp_path / "whole", progress=silent)
    validations = read_record(record).of("validation")
    assert constant == [event.number("validation_loss_nats") for event in validations]


def test_a_cooldown_starts_where_it_forks_and_ends_near_zero(
    member: Member, tmp_path: Path
) -> None:
    suite.train_member(member, tmp_path)
    steps = read_record(tmp_path / f"{member.run.name}-cooled2" / "record.jsonl").of("step")
    assert [int(event.number("step")) for event in steps] == [3]
    assert steps[0].number("learning_rate") <= member.run.optimizer.learning_rate


def test_training_again_trains_nothing(member: Member, tmp_path: Path) -> None:
    """A finished member is read from its records; its points are the same."""
    first = suite.train_member(member, tmp_path)
    assert suite.train_member(member, tmp_path) == first


def test_a_width_without_whole_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="width=40 is not a multiple of head_width=16"):
        Gem(width=40, depth=2, architecture=recipes.BYTES).config()
