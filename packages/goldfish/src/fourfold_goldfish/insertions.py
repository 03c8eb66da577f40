"""Passages inserted at random: training data on which every number about memorisation is an effect.

Pairs of passages, two pieces of one article each, are assigned by lot: one of a pair is inserted into the
training data, as often and at such times as its cell says, its twin is held out. Whatever differs between the
two afterwards, on average, was caused by the insertion (Hubble, 2025, does so with copies and times). Any run
of the runtime takes it as its data; the background is of articles without a passage.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_parallel.run.corpora import Corpus
from fourfold_parallel.run.data import TokenFile, TokenStream, packed_starts, tokenize
from fourfold_parallel.run.tokenizers import Tokenizer

Time = Literal["spread", "early", "late"]
"""Of the copies within the run: anywhere, in its first third, in its last."""
_THIRD: dict[Time, tuple[float, float]] = {
    "spread": (0.0, 1.0),
    "early": (0.0, 1 / 3),
    "late": (2 / 3, 1.0),
}
REFORMATTED = 0.15
"""Share of the blanks that are doubled in a copy with other formatting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A dose: so many copies at such a time."""

    copies: int
    time: Time = "spread"
    is_reformatted: bool = False
    """Each copy has blanks doubled at places of its own, so that no two are equal; they are judged by the
    text as it was."""

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(
                f"copies={self.copies} insert nothing; use 1 or more (the twins are the ones held out)"
            )

    @property
    def name(self) -> str:
        """`24 late`."""
        kind = "reformatted" if self.is_reformatted else self.time
        return f"{self.copies} {kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStream(TokenStream):
    """Rows in the order in which they stand: once through, and again from the first."""

    def rows_at(self, positions: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
        """The rows as they stand, from the first again after the last."""
        return positions % len(self.row_starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Insertions:
    """A randomised experiment as the data of a run: cells of pairs, and a background that is seen once."""

    corpus: Corpus
    tokenizer: Tokenizer
    cells: tuple[Cell, ...]
    pairs: int
    """Pairs of passages per cell."""
    background: int
    """Background rows: the same passages among more of them are more dilute."""
    validation_rows: int
    """Rows after the background that are never trained on."""
    lot: int
    """Seed of the lot: which articles go to which cell, which of a pair is inserted, and when."""
    is_deduplicated: bool = False
    """Each distinct row is kept once; rows of background take the places of the others."""

    @property
    def rows(self) -> int:
        """Rows of the run, whether they are deduplicated or not."""
        return self.background + self.pairs * sum(cell.copies for cell in self.cells)

    def open(self, *, sequence: int, seed: int) -> TokenStream:  # noqa: ARG002 - the lot decides the order
        """The rows in the order of their times."""
        plan = _planned(self, sequence)
        return PlannedStream(file=plan.file, row_starts=plan.rows, sequence=sequence, seed=0)

    def validation(self, *, sequence: int) -> TokenStream:
        """Rows that follow the background."""
        plan = _planned(self, sequence)
        return TokenStream(file=plan.file, row_starts=plan.validation, sequence=sequence, seed=0)

    def passages(
        self, *, sequence: int
    ) -> tuple[Int[Tensor, "cell pair row"], Int[Tensor, "cell pair row"]]:
        """Ids of what was inserted, and of the twins that were held out."""
        plan = _planned(self, sequence)
        width = np.arange(sequence + 1)
        inserted, twins = (
            torch.from_numpy(plan.file.tokens[starts[..., None] + width].astype(np.int64))
            for starts in (plan.inserted, plan.twins)
        )
        return inserted, twins


@dataclass(frozen=True, slots=True)
class _Plan:
    file: TokenFile
    """The tokenized corpus, with altered copies behind it."""
    rows: Int[np.ndarray, " row"] = field(repr=False)
    validation: Int[np.ndarray, " row"] = field(repr=False)
    inserted: Int[np.ndarray, "cell pair"]
    twins: Int[np.ndarray, "cell pair"]


@lru_cache(maxsize=4)
def _planned(source: Insertions, sequence: int) -> _Plan:
    file = tokenize(source.corpus, source.tokenizer)
    lot = np.random.default_rng((source.lot, 24))
    firsts = _articles(source, file, sequence)
    last = firsts.max()
    cells = lot.permutation(firsts)[: len(source.cells) * source.pairs]
    cells = cells.reshape(len(source.cells), source.pairs)
    # Two pieces of an article, side by side; a coin says which of them is inserted.
    coin = lot.integers(0, 2, size=cells.shape) * (sequence + 1)
    inserted, twins = cells + coin, cells + (sequence + 1) - coin
    file, copies = _with_copies(source, file, inserted, sequence)
    times = [
        lot.uniform(*_THIRD[cell.time], size=source.pairs * cell.copies) for cell in source.cells
    ]
    planted = np.concatenate([starts.reshape(-1) for starts in copies])
    when = np.concatenate(times)
    needed = source.rows
    background = _background(source, int(last), sequence)
    if source.is_deduplicated:
        # The first copy of each row stays; later ones make room for text that nobody has seen.
        order = np.argsort(when, kind="stable")
        contents = file.tokens[planted[order][:, None] + np.arange(sequence + 1)]
        _, kept = np.unique(contents, axis=0, return_index=True)
        planted, when = planted[order][kept], when[order][kept]
    fill = background[: needed - len(planted)]
    starts = np.concatenate([planted, fill])
    order = np.argsort(np.concatenate([when, lot.uniform(size=len(fill))]), kind="stable")
    return _Plan(
        file=file,
        rows=starts[order],
        validation=background[-source.validation_rows :],
        inserted=inserted,
        twins=twins,
    )


def _articles(source: Insertions, file: TokenFile, sequence: int) -> Int[np.ndarray, " article"]:
    """Starts of the first articles that hold two passages."""
    ends = np.append(file.document_starts[1:], len(file.tokens))
    long_enough = file.document_starts[ends - file.document_starts > 2 * (sequence + 1)]
    wanted = len(source.cells) * source.pairs
    if len(long_enough) < wanted:
        raise ValueError(
            f"{len(source.cells)} cells of pairs={source.pairs} need {wanted} articles of more than "
            f"{2 * (sequence + 1)} tokens, the corpus has {len(long_enough)}; "
            f"use at most {len(long_enough) // len(source.cells)} pairs"
        )
    return long_enough[:wanted]


def _background(source: Insertions, last: int, sequence: int) -> Int[np.ndarray, " row"]:
    """Row starts in the articles after the last with a passage, up to the copies behind the corpus."""
    corpus = tokenize(source.corpus, source.tokenizer)
    after = corpus.document_starts[corpus.document_starts > last]
    first = int(after[0]) if len(after) else len(corpus.tokens)
    starts = first + packed_starts(len(corpus.tokens) - first, sequence)
    planted = source.rows - source.background
    needed = source.background + source.validation_rows + planted * source.is_deduplicated
    if len(starts) < needed:
        raise ValueError(
            f"background={source.background} and validation_rows={source.validation_rows} need {needed} "
            f"rows of {sequence} tokens, {len(starts)} are left after the passages; use fewer"
        )
    return starts


def _with_copies(
    source: Insertions, file: TokenFile, inserted: Int[np.ndarray, "cell pair"], sequence: int
) -> tuple[TokenFile, list[Int[np.ndarray, "pair copy"]]]:
    """The file with altered copies behind it, and the row starts of every copy by cell."""
    tokens: list[np.ndarray] = [file.tokens]
    begins: list[int] = []
    copies: list[Int[np.ndarray, "pair copy"]] = []
    end = len(file.tokens)
    for cell, starts in zip(source.cells, inserted, strict=True):
        if not cell.is_reformatted:
            copies.append(np.repeat(starts[:, None], cell.copies, axis=1))
            continue
        places = []
        for start in starts.tolist():
            for ids in _reformatted(file, start, cell.copies, sequence, source.lot):
                tokens.append(ids.astype(file.tokens.dtype))
                places.append(end)
                end += len(ids)
        begins += places
        copies.append(np.asarray(places).reshape(len(starts), cell.copies))
    if not begins:
        return file, copies
    return replace(
        file,
        tokens=np.concatenate(tokens),
        document_starts=np.concatenate([file.document_starts, begins]),
    ), copies


def _reformatted(
    file: TokenFile, start: int, copies: int, sequence: int, lot: int
) -> Iterator[Int[np.ndarray, " row"]]:
    """Rows of the passage's ids with some blanks doubled; what no longer fits is cut off."""
    loaded = file.tokenizer()
    text = loaded.decode(file.tokens[start : start + sequence + 1].tolist())
    for copy in range(copies):
        source = random.Random(f"{lot} {start} {copy}")  # noqa: S311 - an experiment's lot
        words = text.split(" ")
        blanks = ["  " if source.random() < REFORMATTED else " " for _ in words[1:]] + [""]
        blanks[source.randrange(max(1, len(words) - 1))] += " "  # no copy is the text itself
        altered = "".join(word + blank for word, blank in zip(words, blanks, strict=True))
        ids = loaded.tokenizer.encode(altered, add_special_tokens=False)
        yield np.asarray([*ids, *[loaded.end] * (sequence + 1)][: sequence + 1])
