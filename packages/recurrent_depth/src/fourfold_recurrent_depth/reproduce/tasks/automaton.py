"""A cellular automaton run for k steps: a task whose difficulty is k, and whose labels are dense.

Each row shows random cells and asks, at every cell, for its value after k steps of the one-sided rule

    y_t <- y_{t-2} xor (y_{t-1} or y_t),

which is rule 30 shifted so that a cell depends on what stands before it alone. It is chaotic: a model
that has computed k - 1 steps knows nothing about the k-th, and guessing is right half of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_parallel.run.data import Batch, TokenStream
from fourfold_recurrent_depth.reproduce.tasks.rows import in_order


def evolve(cells: Int[Tensor, "batch cell"], steps: int) -> Int[Tensor, "batch cell"]:
    """The cells (0 or 1) after some steps; cells before the first are 0."""
    for _ in range(steps):
        padded = torch.nn.functional.pad(cells, (2, 0))
        cells = padded[:, :-2] ^ (padded[:, 1:-1] | padded[:, 2:])
    return cells


def encode(cells: Int[Tensor, "batch cell"], k: Int[Tensor, " batch"]) -> Int[Tensor, "batch cell"]:
    """Tokens: 2 (k - 1) + cell, so that every token says how many steps are asked for."""
    return cells + 2 * (k - 1)[:, None]


def targets_of(tokens: Int[Tensor, "batch cell"]) -> Int[Tensor, "batch cell"]:
    """The value of each cell after its row's k steps."""
    k = tokens[:, 0] // 2 + 1
    targets = torch.empty_like(tokens)
    for steps in k.unique().tolist():
        chosen = k == steps
        targets[chosen] = evolve(tokens[chosen] % 2, int(steps))
    return targets


@dataclass(frozen=True, slots=True, kw_only=True)
class EvolvedCells:
    """Supervision: every cell's value after k steps."""

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """Of all inputs of the batch."""
        return targets_of(batch.tokens[:, :-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Automaton:
    """Rows of random cells, each asked about k steps ahead, k uniform in 1 .. `hardest`."""

    hardest: int
    rows: int
    """Rows before the stream repeats itself."""
    ramp: int = 0
    """Rows over which the hardest k asked for rises from 1 to `hardest`; 0 for none."""
    validation_rows: int = 64

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """Training rows in the order of their drawing."""
        return self._stream(self.rows, sequence, (seed, 0), ramp=self.ramp)

    def validation(self, *, sequence: int) -> TokenStream:
        """Other rows, all difficulties."""
        return self._stream(self.validation_rows, sequence, (0, 1), ramp=0)

    def _stream(self, rows: int, sequence: int, seed: tuple[int, int], *, ramp: int) -> TokenStream:
        generator = np.random.default_rng(seed)
        risen = np.minimum(1.0, (np.arange(rows) + 1) / ramp) if ramp else np.ones(rows)
        limit = np.ceil(risen * self.hardest).astype(np.int64)
        k = 1 + np.floor(generator.random(rows) * limit).astype(np.int64)
        cells = generator.integers(0, 2, (rows, sequence + 1))
        tokens = cells + 2 * (k - 1)[:, None]
        return in_order("automaton", tokens, vocabulary=2 * self.hardest, seed=seed[0])
