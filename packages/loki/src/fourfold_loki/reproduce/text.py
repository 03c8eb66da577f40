"""Text as the model's ids, tokenized once for a corpus and kept: that takes longer than a smoke run."""

from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer

from fourfold_parallel.common.records import Material
from fourfold_parallel.run.corpora import Corpus, Documents
from fourfold_parallel.run.data import TokenFile, tokenize
from fourfold_parallel.run.models import Model, SmolLM2
from fourfold_parallel.run.tokenizers import LoadedTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTokenizer:
    """The tokenizer that belongs to a model's weights."""

    model: Model

    def load(self, documents: Documents) -> LoadedTokenizer:
        """Read it from beside the weights.

        Raises:
            ValueError: for a model that has none.
        """
        del documents
        if not isinstance(self.model, SmolLM2):
            raise ValueError(f"model={self.model!r} has no tokenizer here; use SmolLM2")
        tokenizer: Any = AutoTokenizer.from_pretrained(self.model.folder())
        [weights] = self.model.materials()
        material = Material(
            name=f"tokenizer of {weights.name}",
            kind="tokenizer",
            licence=weights.licence,
            sha256=weights.sha256,
            source=weights.source,
        )
        return LoadedTokenizer(tokenizer=tokenizer, end=tokenizer.eos_token_id, material=material)


def tokenized(corpus: Corpus, model: Model) -> TokenFile:
    """A corpus in a model's ids, document by document."""
    return tokenize(corpus, OwnTokenizer(model=model))


def windows_of(
    corpus: Corpus, model: Model, *, skip_tokens: int = 0, count: int, context: int
) -> Int[Tensor, "window context"]:
    """Whole documents after the first `skip_tokens`, end to end, cut into windows.

    Raises:
        ValueError: where the corpus holds fewer.
    """
    file = tokenized(corpus, model)
    first = 0
    passed = 0
    while passed < skip_tokens and first < len(file.document_starts):
        passed += len(file.document(first))
        first += 1
    documents = (file.document(index) for index in range(first, len(file.document_starts)))
    ids = list(islice(chain.from_iterable(documents), count * context))
    if len(ids) < count * context:
        raise ValueError(
            f"{len(ids)} tokens behind the first {skip_tokens}, and {count} windows of {context} were "
            "asked for; skip or ask for less"
        )
    return torch.tensor(ids, dtype=torch.long).view(count, context)
