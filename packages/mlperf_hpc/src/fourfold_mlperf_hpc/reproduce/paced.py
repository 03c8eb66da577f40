"""A store that is slower to stage from, and a device that computes faster, both simulated by sleeping."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_parallel.common.files import cache_folder
from fourfold_parallel.run.data import Batch, Packed, TokenStream
from fourfold_parallel.run.objective import NextToken

COPIED_BYTES = 2**16
"""Of a token file at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Rows of a packed corpus, whose token file is copied from a slow store before the first step."""

    packed: Packed
    bytes_per_s: float
    """Of the store that it is copied from."""

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """Copy the token file, no faster than the store gives it; then training rows, shuffled per epoch."""
        stream = self.packed.open(sequence=sequence, seed=seed)
        copy(stream.file.path / "tokens.npy", cache_folder() / "staged.npy", self.bytes_per_s)
        return stream

    def validation(self, *, sequence: int) -> TokenStream:
        """The rows left out of training."""
        return self.packed.validation(sequence=sequence)


def copy(source: Path, target: Path, bytes_per_s: float) -> None:
    """Copy a file in pieces, and wait after each for as long as a store of that rate would still take."""
    target.parent.mkdir(parents=True, exist_ok=True)
    started_s, copied = time.perf_counter(), 0
    with source.open("rb") as there, target.open("wb") as here:
        while piece := there.read(COPIED_BYTES):
            here.write(piece)
            copied += len(piece)
            time.sleep(max(0.0, started_s + copied / bytes_per_s - time.perf_counter()))
    shutil.copystat(source, target)
    target.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class Paced:
    """Another objective, whose forward takes at least so long: the device that is simulated sets the pace."""

    inner: NextToken
    forward_s: float

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """As the other's."""
        return self.inner.targets(batch)

    def loss(
        self, model: torch.nn.Module, batch: Batch, targets: Int[Tensor, "batch token"]
    ) -> Any:
        """As the other's, later."""
        started_s = time.perf_counter()
        loss = self.inner.loss(model, batch, targets)
        time.sleep(max(0.0, started_s + self.forward_s - time.perf_counter()))
        return loss
