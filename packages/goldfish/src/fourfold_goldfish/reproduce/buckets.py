"""Training data in which some passages recur, in buckets by how often: models memorise in this setting.

The design of the AxoNN study (Singh et al. 2024, section on memorisation): disjoint buckets of pages, each
repeated another number of times among background text, one never seen, and the question how large a
model must be to recite the pages of a bucket. Two buckets, one of them unseen, are the goldfish paper's
own setting.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_parallel.run.corpora import Corpus
from fourfold_parallel.run.data import TokenFile, TokenStream, packed_starts, tokenize
from fourfold_parallel.run.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Background rows seen once, shuffled with buckets of passages seen several times each.

    A passage is the beginning of an article, exactly one row long. Articles go to the buckets in turn.
    Articles with passages give no background.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    repetitions: tuple[int, ...]
    """Times that each bucket's passages are seen in one epoch; 0 is a control."""
    passages: int
    """Passages per bucket."""
    background: int
    """Background rows in the run."""
    validation_rows: int
    """Rows after the background that are never trained on."""
    skipped_articles: int = 0
    """Long enough articles left out before the first with a passage."""

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """One epoch is one pass over the background with all repetitions mixed in."""
        file = tokenize(self.corpus, self.tokenizer)
        repeated = [
            np.repeat(starts, count)
            for starts, count in zip(self._starts(file, sequence), self.repetitions, strict=True)
        ]
        starts = np.concatenate([self._background(file, sequence)[: self.background], *repeated])
        return TokenStream(file=file, row_starts=starts, sequence=sequence, seed=seed)

    def validation(self, *, sequence: int) -> TokenStream:
        """Rows that follow the background."""
        file = tokenize(self.corpus, self.tokenizer)
        rows = self._background(file, sequence)[self.background :][: self.validation_rows]
        return TokenStream(file=file, row_starts=rows, sequence=sequence, seed=0)

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return self.background + self.passages * sum(self.repetitions)

    def contents(self, *, sequence: int) -> tuple[Int[Tensor, "passage row"], ...]:
        """Ids of each bucket's passages, `sequence + 1` each."""
        file = tokenize(self.corpus, self.tokenizer)
        return tuple(
            torch.from_numpy(
                file.tokens[starts[:, None] + np.arange(sequence + 1)].astype(np.int64)
            )
            for starts in self._starts(file, sequence)
        )

    def texts(self, *, sequence: int) -> tuple[tuple[str, ...], ...]:
        """Each bucket's passages as text."""
        tokenizer = tokenize(self.corpus, self.tokenizer).tokenizer()
        return tuple(
            tuple(tokenizer.decode(row) for row in rows.tolist())
            for rows in self.contents(sequence=sequence)
        )

    def _starts(self, file: TokenFile, sequence: int) -> tuple[Int[np.ndarray, " passage"], ...]:
        """Row starts of each bucket's passages: the articles in turn."""
        starts = self._chosen_articles(file, sequence)
        count = len(self.repetitions)
        return tuple(starts[bucket::count] for bucket in range(count))

    def _chosen_articles(self, file: TokenFile, sequence: int) -> Int[np.ndarray, " article"]:
        ends = np.append(file.document_starts[1:], len(file.tokens))
        long_enough = file.document_starts[ends - file.document_starts > sequence + 1]
        long_enough = long_enough[self.skipped_articles :]
        wanted = len(self.repetitions) * self.passages
        if len(long_enough) < wanted:
            raise ValueError(
                f"{len(self.repetitions)} buckets of passages={self.passages} need {wanted} articles of "
                f"more than {sequence + 1} tokens, the corpus has {len(long_enough)} after "
                f"skipped_articles={self.skipped_articles}; "
                f"use at most {len(long_enough) // len(self.repetitions)} passages"
            )
        return long_enough[:wanted]

    def _background(self, file: TokenFile, sequence: int) -> Int[np.ndarray, " rows"]:
        """Row starts after the last article with a passage."""
        chosen = self._chosen_articles(file, sequence)
        after = file.document_starts[file.document_starts > chosen[-1]]
        first = int(after[0]) if len(after) else len(file.tokens)
        starts = first + packed_starts(len(file.tokens) - first, sequence)
        needed = self.background + self.validation_rows
        if len(starts) < needed:
            raise ValueError(
                f"background={self.background} and validation_rows={self.validation_rows} need {needed} "
                f"rows of {sequence} tokens, {len(starts)} are left after the passages; use fewer"
            )
        return starts
