"""Training data in which some passages recur: the setting in which models memorise."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_parallel.run.corpora import Corpus
from fourfold_parallel.run.data import TokenFile, TokenStream, packed_starts, tokenize
from fourfold_parallel.run.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedPassages:
    """Background rows seen once, shuffled with `passages` rows seen `repetitions` times each.

    A passage is the beginning of an article, exactly one row long. As many further passages, of other
    articles, are never trained on: the control. Articles with passages give no background.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    passages: int
    repetitions: int
    background: int
    """Background rows in the run."""
    validation_rows: int
    """Rows after the background that are never trained on."""

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """One epoch is one pass over the background with all repetitions mixed in."""
        file = tokenize(self.corpus, self.tokenizer)
        background = self._background(file, sequence)[: self.background]
        repeated = np.repeat(self._passage_starts(file, sequence)[0], self.repetitions)
        starts = np.concatenate([background, repeated])
        return TokenStream(file=file, row_starts=starts, sequence=sequence, seed=seed)

    def validation(self, *, sequence: int) -> TokenStream:
        """Rows that follow the background."""
        file = tokenize(self.corpus, self.tokenizer)
        rows = self._background(file, sequence)[self.background :][: self.validation_rows]
        return TokenStream(file=file, row_starts=rows, sequence=sequence, seed=0)

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return self.background + self.passages * self.repetitions

    def trained_and_control(
        self, *, sequence: int
    ) -> tuple[Int[Tensor, "passage row"], Int[Tensor, "passage row"]]:
        """Ids of the repeated passages and of the control, `sequence + 1` each."""
        file = tokenize(self.corpus, self.tokenizer)
        trained, control = (
            torch.from_numpy(
                file.tokens[starts[:, None] + np.arange(sequence + 1)].astype(np.int64)
            )
            for starts in self._passage_starts(file, sequence)
        )
        return trained, control

    def _passage_starts(
        self, file: TokenFile, sequence: int
    ) -> tuple[Int[np.ndarray, " passage"], Int[np.ndarray, " passage"]]:
        """Row starts of trained and control passages: every second article is a control."""
        starts = self._chosen_articles(file, sequence)
        return starts[0::2], starts[1::2]

    def _chosen_articles(self, file: TokenFile, sequence: int) -> Int[np.ndarray, " article"]:
        ends = np.append(file.document_starts[1:], len(file.tokens))
        long_enough = file.document_starts[ends - file.document_starts > sequence + 1]
        wanted = 2 * self.passages
        if len(long_enough) < wanted:
            raise ValueError(
                f"passages={self.passages} with as many controls need {wanted} articles of more than "
                f"{sequence + 1} tokens, the corpus has {len(long_enough)}; "
                f"use at most {len(long_enough) // 2}"
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
