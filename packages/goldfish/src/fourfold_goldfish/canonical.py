"""The same gaps in near-duplicates: hash what a text says, not how it is cut into tokens.

A line that is wrapped elsewhere, a straight quote made curly or a heading in capitals changes token ids, so
a hash of ids leaves out other targets in the second copy, and what one copy hides the other teaches. Here
the window before a target is its last `characters` *canonical* characters: letters and digits, case folded,
without blanks and punctuation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fourfold_goldfish.loss import Goldfish

_UNICODE_END = 0x110000


@dataclass(frozen=True, slots=True, eq=False)
class Spelling:
    """The canonical characters of every id of a tokenizer, end to end."""

    codes: Int[Tensor, " character"]
    starts: Int[Tensor, " id+1"]
    """Where each id's characters begin; the last entry is their number."""

    @classmethod
    def of(cls, tokenizer: Any) -> "Spelling":
        """Of one of transformers' tokenizers (about a second for 50,000 ids).

        An id that is part of a character, as byte-level tokenizers have, is a character of its own.
        """
        codes: list[int] = []
        starts = [0]
        for index in range(len(tokenizer)):
            text = str(tokenizer.decode([index]))
            is_part = "�" in text
            codes.extend([_UNICODE_END + index] if is_part else map(ord, canonical(text)))
            starts.append(len(codes))
        return cls(torch.tensor(codes, dtype=torch.long), torch.tensor(starts))

    def __len__(self) -> int:
        """Ids of the tokenizer."""
        return len(self.starts) - 1

    def characters(
        self, tokens: Int[Tensor, " token"]
    ) -> tuple[Int[Tensor, " character"], Int[Tensor, " token"]]:
        """Canonical characters of some tokens, and how many each token has.

        Raises:
            ValueError: for ids that the tokenizer does not have.
        """
        ids = len(self)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < ids:
            raise ValueError(
                f"tokens hold ids {int(tokens.min())} to {int(tokens.max())}, the spelling has {ids}; "
                "make it from the tokenizer of these ids"
            )
        starts, codes = self.starts.to(tokens.device), self.codes.to(tokens.device)
        lengths = starts[tokens + 1] - starts[tokens]
        begins = lengths.cumsum(0) - lengths
        total = int(lengths.sum())
        within = torch.arange(total, device=tokens.device) - begins.repeat_interleave(lengths)
        return codes[starts[tokens].repeat_interleave(lengths) + within], lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class CanonicalGoldfish:
    """A drop mask that near-duplicates share: a pure function of the text that the tokens spell."""

    k: int
    """One target in `k` is left out, on average."""
    characters: int
    """Canonical characters hashed per decision; 24 are about five English words."""
    spelling: Spelling
    key: int = 0
    """Secret that the hash is mixed with, as `Goldfish.key`."""

    def __post_init__(self) -> None:
        if self.characters < 1:
            raise ValueError(
                f"characters={self.characters} hash nothing; use 1 or more (24 are about five words)"
            )
        _ = self._hash  # refuses its k and key

    @property
    def shortest(self) -> int:
        """Tokens of the shortest row that the mask takes: any."""
        return 0

    def drop(
        self, tokens: Int[Tensor, "batch row"], document_ids: Int[Tensor, "batch row"] | None = None
    ) -> Bool[Tensor, "batch row"]:
        """True where `tokens[b, i]`, as a target, is left out of the loss.

        A target is decided by the characters before it in its document, `characters` of them or what there
        is. Tokens without a canonical character share the decision of the next one that has some.
        """
        # All rows end to end as one string of characters; a row, like a document, begins anew.
        spelled, lengths = self.spelling.characters(tokens.flatten().long())
        rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
        documents = rows if document_ids is None else rows * (1 << 40) + document_ids
        flat = documents.flatten()
        # Where each token's characters begin, and those of its document.
        begins = lengths.cumsum(0) - lengths
        is_new = torch.ones_like(flat, dtype=torch.bool)
        is_new[1:] = flat[1:] != flat[:-1]
        first = (is_new * begins).cummax(0).values
        hit = self._hash.decide(
            spelled[None], torch.maximum(first, begins - self.characters)[None], begins[None]
        )
        return hit.view(tokens.shape)

    @property
    def _hash(self) -> Goldfish:
        return Goldfish(k=self.k, context=self.characters, boundary="prefix", key=self.key)


def canonical(text: str) -> str:
    """Letters and digits alone, case folded."""
    return "".join(character for character in text.casefold() if character.isalnum())
