"""Sums of single digits modulo ten: a task whose difficulty is the number of operands.

Each row shows random digits and asks, at every digit, for the sum of all digits so far. The answer at
place m is an addition of m operands; every row asks for all of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from torch import Tensor

from fourfold_parallel.run.data import Batch, TokenStream
from fourfold_recurrent_depth.reproduce.tasks.rows import in_order

BASE = 10
"""Digits, and the modulus."""


def sums_of(digits: Int[Tensor, "batch digit"]) -> Int[Tensor, "batch digit"]:
    """The sum of each digit and all before it, modulo `BASE`."""
    return digits.cumsum(1) % BASE


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Supervision: the sum so far, at every digit."""

    def targets(self, batch: Batch) -> Int[Tensor, "batch token"]:
        """Of all inputs of the batch."""
        return sums_of(batch.tokens[:, :-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Rows of random digits."""

    rows: int
    """Rows before the stream repeats itself."""
    validation_rows: int = 64

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """Training rows."""
        return self._stream(self.rows, sequence, (seed, 0))

    def validation(self, *, sequence: int) -> TokenStream:
        """Other rows."""
        return self._stream(self.validation_rows, sequence, (0, 1))

    def _stream(self, rows: int, sequence: int, seed: tuple[int, int]) -> TokenStream:
        digits = np.random.default_rng(seed).integers(0, BASE, (rows, sequence + 1))
        return in_order("addition", digits, vocabulary=BASE, seed=seed[0])
