"""A suite of our own, trained through the runtime the way the paper trained its: Gemma-like decoders.

One constant learning rate after a short warm-up, base / (width sqrt(depth)), so that every validation
on the way is a point of the law; cooldowns fork from checkpoints of the constant run and fall linearly
to zero over a tenth more tokens.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GemmaConfig, PreTrainedModel

from fourfold_gemstones.counting import Architecture
from fourfold_gemstones.table import RunTable
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.checkpoint import Checkpoint
from fourfold_parallel.run.experiments import Workplace
from fourfold_parallel.run.files import sync
from fourfold_parallel.run.optimizer import Cooldown
from fourfold_parallel.run.progress import silent
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.records import Material, Record, RecordWriter, header, read_record
from fourfold_parallel.run.train import train
from fourfold_parallel.run.values import digest

WORKERS = 2
"""Training processes at a time, one thread each: at these widths two threads are slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gem:
    """A fresh Gemma-like decoder of a width and a depth (transformers' own implementation)."""

    width: int
    depth: int
    architecture: Architecture

    def config(self) -> GemmaConfig:
        """The same shape in transformers' words: untied embeddings, four times the width in the MLP.

        Raises:
            ValueError: where heads do not tile the width.
        """
        head_width = self.architecture.head_width
        if self.width % head_width:
            raise ValueError(
                f"width={self.width} is not a multiple of head_width={head_width}; "
                f"use a multiple of {head_width}"
            )
        heads = self.width // head_width
        groups = max(1, heads // 2)
        return GemmaConfig(
            vocab_size=self.architecture.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=heads,
            num_key_value_heads=groups if heads % groups == 0 else 1,
            head_dim=head_width,
            intermediate_size=4 * self.width,
            max_position_embeddings=self.architecture.context,
            tie_word_embeddings=False,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )

    def build(self, *, seed: int) -> PreTrainedModel:
        """Weights drawn by transformers' initialisation under `seed`; the global state is put back."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(
                self.config(), dtype=torch.float32, attn_implementation="sdpa"
            )

    def materials(self) -> tuple[Material, ...]:
        """None: nothing published is used."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A constant-rate run of the suite, and where cooldowns fork from it."""

    run: Run
    """Its model is a `Gem`; its horizon the longest point."""
    forks: tuple[int, ...]
    """Steps after which a cooldown of a tenth as many steps is run beside the constant run."""

    @property
    def gem(self) -> Gem:
        """The run's model."""
        assert isinstance(self.run.model, Gem)
        return self.run.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """All members."""

    members: tuple[Member, ...]
    architecture: Architecture
    seed: int


def scaled_rate(base: float, width: int, depth: int) -> float:
    """The paper's learning rate: base / (width sqrt(depth)), section 3.1."""
    return base / (width * math.sqrt(depth))


def fork(source: Checkpoint, run: Run, folder: Path) -> None:
    """Put `source` where `run` looks for its last checkpoint, so that it goes on from there."""

    def copy(partial_folder: Path) -> None:
        for file in source.path.iterdir():
            if file.name != "checkpoint.json":
                shutil.copyfile(file, partial_folder / file.name)
                sync(partial_folder / file.name)

    checkpoint.write(
        folder,
        step=source.step,
        run_sha256=digest(run),
        save=copy,
        wait=lambda: None,
        is_main=True,
    )


def segments(member: Member) -> tuple[tuple[Run, Run | None], ...]:
    """Constant runs to each fork and to the end, each beside the cooldown that forks from its end."""
    found: list[tuple[Run, Run | None]] = []
    steps = member.run.steps
    for stop in sorted({*member.forks, steps}):
        constant = replace(
            member.run, name=f"{member.run.name}-to{stop}", horizon=Steps(count=stop)
        )
        cooled = None
        if stop in member.forks:
            extra = max(1, round(0.1 * stop))
            cooled = replace(
                member.run,
                name=f"{member.run.name}-cooled{stop}",
                horizon=Steps(count=stop + extra),
                schedule=Cooldown(warmup_steps=0, cooldown_steps=extra),
                validate_every=stop + extra,
            )
        found.append((constant, cooled))
    return tuple(found)


def train_member(member: Member, folder: Path) -> tuple[dict[str, float | str], ...]:
    """Train one member and its forks; one point for every validation.

    A member that was finished before is read from its records; an interrupted one goes on.
    """
    torch.set_num_threads(1)
    points: list[dict[str, float | str]] = []
    last: Checkpoint | None = None
    elapsed_s = 0.0
    for constant, cooled in segments(member):
        last, record = _train(constant, last, folder)
        points += _points(member, record, "constant", elapsed_s)
        elapsed_s += sum(event.number("elapsed_s") for event in record.of("step"))
        if cooled is not None:
            _, record = _train(cooled, last, folder)
            points += _points(member, record, "cooled", elapsed_s)
    return tuple(points)


def _train(run: Run, source: Checkpoint | None, folder: Path) -> tuple[Checkpoint, Record]:
    checkpoints = folder / run.name / "checkpoints"
    if source is not None and not checkpoint.checkpoints(checkpoints):
        fork(source, run, checkpoints)
    record = folder / run.name / "record.jsonl"
    last = train(run, record=record, checkpoints=checkpoints, progress=silent)
    return last, read_record(record)


def _points(
    member: Member, record: Record, schedule: str, before_s: float
) -> list[dict[str, float | str]]:
    steps = {int(event.number("step")): event for event in record.of("step")}
    points: list[dict[str, float | str]] = []
    for event in record.of("validation"):
        step = int(event.number("step"))
        spent_s = sum(one.number("elapsed_s") for at, one in steps.items() if at <= step)
        points.append(
            {
                "run": member.run.name,
                "schedule": schedule,
                "width": member.gem.width,
                "depth": member.gem.depth,
                "step": step,
                "tokens": step * member.run.tokens_per_step,
                "learning_rate": member.run.optimizer.learning_rate,
                "seed": member.run.seed,
                "loss_nats": event.number("validation_loss_nats"),
                "seconds": before_s + spent_s,
            }
        )
    return points


def train_suite(suite: Suite, workplace: Workplace) -> None:
    """Train every member, `WORKERS` at a time, and write one record of all points."""
    workplace.record.unlink(missing_ok=True)
    first = suite.members[0].run
    # Tokenized once here, so that the workers find it in the cache.
    stream = first.data.open(sequence=first.sequence, seed=first.seed)
    with (
        RecordWriter(workplace.record) as records,
        ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        records.write_header(
            header(
                suite, seed=suite.seed, world_size=1, materials=stream.file.materials, overrides=()
            )
        )
        trained = pool.map(partial(train_member, folder=workplace.scratch), suite.members)
        for done, points in enumerate(trained, start=1):
            for point in points:
                records.write("point", **point)
            workplace.progress(done, len(suite.members), suite.members[done - 1].run.name)
        records.write("finished")


def suite_table(record: Record, *, schedule: str, names: Sequence[str] = ()) -> RunTable:
    """The points of one schedule as a table; of some runs, where `names` is not empty."""
    suite = record.run
    assert isinstance(suite, Suite)
    points = [
        event.values
        for event in record.of("point")
        if event.values["schedule"] == schedule and (not names or event.values["run"] in names)
    ]
    keys = ("run", "width", "depth", "tokens", "loss_nats", "seconds", "learning_rate", "seed")
    return RunTable.from_columns(
        {key: [point[key] for point in points] for key in keys},
        architecture=suite.architecture,
        source=f"{record.path.name}, {schedule}",
    )
