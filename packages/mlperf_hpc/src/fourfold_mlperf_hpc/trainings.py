"""Trainings of ours as attempts at a quality: from their records, and from nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fourfold_mlperf_hpc.decomposition import Attempt
from fourfold_parallel.common.records import Record, read_record
from fourfold_parallel.run.recipe import Run, Until
from fourfold_parallel.run.timeline import is_timed, seconds_by_part


def run_of(record: Record) -> Run:
    """The run that a record is of, or that the study is of which it is.

    Raises:
        ValueError: It is of something else, or lacks the times.
    """
    run = _run_within(record.run)
    if run is None or not is_timed(record):
        raise ValueError(
            f"{record.path} is not the record of one training with its times; name the .jsonl file that "
            "train(...) wrote"
        )
    return run


def _run_within(described: object) -> Run | None:
    """A run itself, or the one run that a value of a study holds."""
    if isinstance(described, Run) or not dataclasses.is_dataclass(described):
        return described if isinstance(described, Run) else None
    held = [getattr(described, field.name) for field in dataclasses.fields(described)]
    runs = [value for value in held if isinstance(value, Run)]
    return runs[0] if len(runs) == 1 else None


def target_of(run: Run, target_loss_nats: float | None) -> float:
    """The quality that a run is timed to: the caller's, or the run's own (`Until`).

    Raises:
        ValueError: Neither names one.
    """
    if target_loss_nats is not None:
        return target_loss_nats
    if isinstance(run.horizon, Until):
        return run.horizon.loss_nats
    raise ValueError(
        f"run {run.name!r} trains for a number of steps, and names no quality to be timed to; name one "
        "(--target-loss-nats 3.3), or train with horizon=Until(loss_nats=3.3, count=...)"
    )


def attempt_of(record: Record, *, target_loss_nats: float | None = None) -> Attempt:
    """A training as an attempt at a quality: its first validation that is as good ends it.

    One record serves every target that its validations pass. A restart costs time and no samples.

    Args:
        record: of one training.
        target_loss_nats: of a validation; the run's own (`Until`) where none is given.

    Raises:
        ValueError: The record is of something else, lacks the times, or no target is named.
    """
    run = run_of(record)
    target = target_of(run, target_loss_nats)
    for validation in record.of("validation"):
        if validation.number("validation_loss_nats") <= target:
            return Attempt(
                samples=validation.number("step") * run.batch,
                is_reached=True,
                seconds=seconds_by_part(record, until=validation),
            )
    return Attempt(
        samples=record.last("step").number("step") * run.batch,
        is_reached=False,
        seconds=seconds_by_part(record),
    )


def attempts_in(place: Path, *, target_loss_nats: float | None = None) -> tuple[Attempt, ...]:
    """The attempts of a record, or of a folder of records that differ in their seeds.

    Raises:
        ValueError: The folder holds none, runs of several configurations, or a seed twice.
    """
    paths = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    if not paths:
        raise ValueError(f"{place} holds no record (*.jsonl); name a record, or a folder of them")
    records = [read_record(path) for path in paths]
    runs = [run_of(record) for record in records]
    seeds = [run.seed for run in runs]
    for path, run in zip(paths, runs, strict=True):
        if (run.batch, run.model, run.engine) != (runs[0].batch, runs[0].model, runs[0].engine):
            raise ValueError(
                f"{path} is of another batch, model or engine than {paths[0]}; put the seeds of one "
                "configuration in a folder of their own"
            )
    for path, run in zip(paths, runs, strict=True):
        if seeds.count(run.seed) > 1:
            raise ValueError(f"{path} repeats seed {run.seed} of {place}; a seed counts once")
    return tuple(attempt_of(record, target_loss_nats=target_loss_nats) for record in records)
