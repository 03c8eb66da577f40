"""Rows that were drawn, not read: a token stream in the order of their drawing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from fourfold_parallel.run.data import TokenFile, TokenStream


@dataclass(frozen=True, slots=True, kw_only=True)
class _InOrder(TokenStream):
    """Rows as they were drawn: the difficulty may rise on the way."""

    def rows_at(self, positions: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
        """The rows as they stand, from the first again after the last."""
        return positions % len(self.row_starts)


def in_order(
    name: str, tokens: Int[np.ndarray, "row token"], *, vocabulary: int, seed: int
) -> TokenStream:
    """A stream of rows of `sequence + 1` tokens each."""
    rows, length = tokens.shape
    starts = np.arange(rows, dtype=np.int64) * length
    file = TokenFile(
        path=Path(name),
        tokens=tokens.astype(np.uint16).reshape(-1),
        document_starts=starts,
        vocabulary=vocabulary,
        materials=(),
        characters=tokens.size,
    )
    return _InOrder(file=file, row_starts=starts, sequence=length - 1, seed=seed)
