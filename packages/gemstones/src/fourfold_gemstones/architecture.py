"""Parameters and FLOPs of a decoder, by width and depth."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


class Embeddings(enum.Enum):
    """The vocabulary tables (input embedding, output head) that count as parameters.

    The paper's "no embeds" means `NONE` in its approach 1 and `ONE` in its approach 3.
    """

    BOTH = "both"
    ONE = "one"
    NONE = "none"

    @property
    def tables(self) -> int:
        """Tables of `vocabulary x width` that are counted."""
        return {Embeddings.BOTH: 2, Embeddings.ONE: 1, Embeddings.NONE: 0}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A Gemma-like decoder; width and depth are the two free dimensions.

    Untied embeddings, RMSNorm before each of two sublayers, queries in pairs that share one key
    and value head, a gated MLP of four times the width. The defaults are those of Gemstones.
    """

    vocabulary: int = 50_304
    """Rows of each of the two embedding tables."""
    context: int = 2_048
    """Tokens per sequence."""
    head_width: int = 128
    """Size of one attention head."""

    def key_value_width(
        self, width: Float[np.ndarray, "*shape"], depth: Float[np.ndarray, "*shape"]
    ) -> Float[np.ndarray, "*shape"]:
        """Width of keys, and of values: one head for every two of queries, at least one.

        Half the width for real-valued shapes and even numbers of heads, as the closed forms have it.
        """
        heads = width / self.head_width
        whole = (np.abs(heads - np.round(heads)) < 1e-9) & (depth > 0)
        groups = np.maximum(1, np.floor(np.round(heads) / 2))
        return np.where(whole, groups * self.head_width, width / 2)

    def parameters(
        self,
        width: Float[np.ndarray, "*shape"],
        depth: Float[np.ndarray, "*shape"],
        embeddings: Embeddings = Embeddings.BOTH,
    ) -> Float[np.ndarray, "*shape"]:
        """Weights; differentiable in real-valued shapes.

        Per block: queries and output (2 w²), keys and values, three MLP matrices (12 w²) and two
        norms; one norm at the end.
        """
        block = 14 * width**2 + 2 * width * self.key_value_width(width, depth) + 2 * width
        return embeddings.tables * self.vocabulary * width + width + depth * block

    def flops_per_token(
        self, width: Float[np.ndarray, "*shape"], depth: Float[np.ndarray, "*shape"]
    ) -> Float[np.ndarray, "*shape"]:
        """Training FLOPs per token, forward and backward, term by term as the paper counts them.

        The attention scores are halved for causality and their product with the values is not;
        that inconsistency is the reference's, and kept, because its published numbers have it.
        """
        projections = (4 + 2 + 24) * width**2
        rotary = 3.5 * 1.5 * width
        elementwise = (40 + 2 + 14) * width
        scores = self.context * (1 + 3 / self.head_width + 2) * width
        backward, recomputing_backward = 2, 2.5
        block = (1 + backward) * (projections + rotary + elementwise)
        block = block + (1 + recomputing_backward) * scores
        head = (1 + backward) * (7 * width + 2 * self.vocabulary * width)
        return depth * block + head


GEMSTONES = Architecture()
"""The published suite."""
