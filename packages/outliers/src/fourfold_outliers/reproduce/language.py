"""Two languages that differ in how often their tokens occur, and in nothing else that is named.

A bigram language is a joint distribution of neighbours. From one random affinity of tokens, the same for
both languages, a joint is made whose margins are given (Sinkhorn's scaling of `exp(beta g)`): Zipf's law,
or flat. `beta` is chosen so that the entropy of a token after its predecessor, the least loss that a model
can reach, is the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold_parallel.common.records import Material
from fourfold_parallel.run.data import TokenFile, TokenStream
from fourfold_parallel.run.models import Llama

Law = Literal["zipf", "flat"]


def margins(law: Law, vocabulary: int) -> Float[np.ndarray, " id"]:
    """Probability of each id: 1 over its rank, or the same for all."""
    weights = 1 / np.arange(1, vocabulary + 1) if law == "zipf" else np.ones(vocabulary)
    return weights / weights.sum()


def joint(
    affinity: Float[np.ndarray, "id next"], margin: Float[np.ndarray, " id"], beta: float
) -> Float[np.ndarray, "id next"]:
    """The joint distribution proportional to `exp(beta * affinity)` up to a factor a row and a column."""
    positive = np.exp(beta * affinity)
    rows = np.ones(len(margin))
    columns = rows
    for _ in range(300):
        columns = margin / (positive.T @ rows)
        rows = margin / (positive @ columns)
    return rows[:, None] * positive * columns[None]


def entropy_rate(pairs: Float[np.ndarray, "id next"]) -> float:
    """Nats of a token, given the one before it."""
    first = pairs.sum(1, keepdims=True)
    return float(-(pairs * np.log(np.maximum(pairs / first, 1e-300))).sum())


@lru_cache(maxsize=8)
def transitions(
    law: Law, vocabulary: int, entropy_nats: float, seed: int
) -> Float[np.ndarray, "id next"]:
    """Probability of the next id after each, at the entropy rate asked for.

    Raises:
        ValueError: the law's own entropy is below it.
    """
    affinity = np.random.default_rng((seed, 0)).standard_normal((vocabulary, vocabulary))
    margin = margins(law, vocabulary)
    most = float(-(margin * np.log(margin)).sum())
    if not 0 < entropy_nats < most:
        raise ValueError(
            f"entropy_nats={entropy_nats} of a language whose tokens have {most:.3f} each; use less, and "
            "more than 0"
        )
    low, high = 0.0, 12.0
    for _ in range(20):
        middle = (low + high) / 2
        is_too_even = entropy_rate(joint(affinity, margin, middle)) > entropy_nats
        low, high = (middle, high) if is_too_even else (low, middle)
    pairs = joint(affinity, margin, (low + high) / 2)
    return pairs / pairs.sum(1, keepdims=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bigrams:
    """Rows drawn from a bigram language. Both laws share the affinities of a seed."""

    law: Law
    vocabulary: int
    entropy_nats: float
    """Of a token after its predecessor."""
    rows: int
    """Rows before the stream repeats itself."""
    validation_rows: int
    seed: int

    def open(self, *, sequence: int, seed: int) -> TokenStream:
        """Training rows."""
        return self._stream(self.rows, sequence, (self.seed, 1), order=seed)

    def validation(self, *, sequence: int) -> TokenStream:
        """Other rows."""
        return self._stream(self.validation_rows, sequence, (self.seed, 2), order=0)

    def _stream(
        self, rows: int, sequence: int, seed: tuple[int, int], *, order: int
    ) -> TokenStream:
        drawn = self._drawn(rows, sequence + 1, seed)
        starts = np.arange(rows, dtype=np.int64) * (sequence + 1)
        file = TokenFile(
            path=Path("bigrams"),
            tokens=drawn.astype(np.uint16).reshape(-1),
            document_starts=starts,
            vocabulary=self.vocabulary,
            materials=(
                Material(
                    name=f"bigrams, {self.law}",
                    kind="corpus",
                    licence="none: drawn",
                    sha256=hashlib.sha256(drawn.tobytes()).hexdigest(),
                    source=f"seed {seed}",
                ),
            ),
            characters=drawn.size,
        )
        return TokenStream(file=file, row_starts=starts, sequence=sequence, seed=order)

    def _drawn(self, rows: int, length: int, seed: tuple[int, int]) -> Int[np.ndarray, "row token"]:
        generator = np.random.default_rng(seed)
        after = transitions(self.law, self.vocabulary, self.entropy_nats, self.seed).cumsum(1)
        last = generator.choice(self.vocabulary, size=rows, p=margins(self.law, self.vocabulary))
        drawn = np.empty((rows, length), dtype=np.int64)
        for place in range(length):
            drawn[:, place] = last
            chance = generator.random(rows)[:, None]
            last = (after[last] < chance).sum(1).clip(max=self.vocabulary - 1)
        return drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenFrequencies:
    """A fresh Llama whose logits begin at the tokens' log frequencies, which it need not learn."""

    llama: Llama
    law: Law

    def build(self, *, seed: int) -> PreTrainedModel:
        """The model; the frequencies are no parameters."""
        model = self.llama.build(seed=seed)
        given = torch.from_numpy(np.log(margins(self.law, self.llama.vocabulary))).float()

        def add(module: nn.Module, args: object, logits: Tensor) -> Tensor:
            del module, args
            return logits + given.to(logits)

        head = model.get_output_embeddings()
        assert head is not None
        head.register_forward_hook(add)
        return model

    def materials(self) -> tuple[Material, ...]:
        """None: nothing published is used."""
        return ()
