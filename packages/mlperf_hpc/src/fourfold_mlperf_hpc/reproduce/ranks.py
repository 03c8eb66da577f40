"""A training on ranks of this machine: a law, since that is what they run."""

from __future__ import annotations

from pathlib import Path

from fourfold_parallel.common.progress import silent
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train


def train_on_ranks(run: Run, record: Path, checkpoints: Path) -> None:
    """Train a run; every rank calls this."""
    train(run, record=record, checkpoints=checkpoints, progress=silent)
