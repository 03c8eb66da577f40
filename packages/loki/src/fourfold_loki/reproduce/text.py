"""Text as a model's ids, tokenized once for a corpus and kept: that takes longer than a smoke run."""

from itertools import chain, islice

import torch
from jaxtyping import Int
from torch import Tensor

from fourfold_parallel.run.corpora import Corpus
from fourfold_parallel.run.data import TokenFile, tokenize
from fourfold_parallel.run.models import Gemma3, Packaged, SmolLM2
from fourfold_parallel.run.tokenizers import Gemma3Tokenizer, SmolLM2Tokenizer

TOKENIZERS = {SmolLM2: SmolLM2Tokenizer(), Gemma3: Gemma3Tokenizer()}


def tokenized(corpus: Corpus, model: Packaged) -> TokenFile:
    """A corpus in a model's ids, document by document."""
    return tokenize(corpus, TOKENIZERS[type(model)])


def windows_of(
    corpus: Corpus, model: Packaged, *, skip_tokens: int = 0, count: int, context: int
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
