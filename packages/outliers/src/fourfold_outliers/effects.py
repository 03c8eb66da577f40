"""A model's behaviour on documents: loss, predictions, and attention to the first token, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold_outliers.stream import Documents
from fourfold_parallel.run.objective import token_nats

FROM = 16
"""Position from which on a query's attention to the first token is told: before it there is little else."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Behaviour:
    """Of one model on some documents."""

    loss_nats: Float[Tensor, " document"]
    """Mean over a document's targets."""
    distinct: int
    """Token ids that are some position's most likely next one."""
    to_first: Float[Tensor, "layers document"]
    """Mean attention of positions from `FROM` on to position 0, over heads; empty where it was not asked."""
    to_delimiters: Float[Tensor, "layers document"]
    """The same to delimiters."""


def delimiters_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Bool[Tensor, " id"]:
    """True for ids that are punctuation or line ends alone."""
    known = min(len(tokenizer), vocabulary)
    words = [str(tokenizer.decode([number])) for number in range(known)]
    marks = torch.zeros(vocabulary, dtype=torch.bool)
    marks[:known] = torch.tensor(
        [bool(word) and all(letter in ".,;:!?()\n" for letter in word) for word in words]
    )
    return marks


@torch.no_grad()
def behaviour(
    model: PreTrainedModel,
    read: Documents,
    *,
    delimiters: Bool[Tensor, " id"] | None = None,
    batch: int = 4,
) -> Behaviour:
    """Loss and predictions over documents; where delimiters are named, attention too, by eager attention.

    Args:
        model: in evaluation mode, under whatever disables a part of it.
        read: what it reads.
        delimiters: true for ids of punctuation and line ends.
        batch: windows of a pass.
    """
    sums = torch.zeros(read.count, dtype=torch.float64)
    windows = torch.zeros(read.count, dtype=torch.float64)
    predicted: set[int] = set()
    attended: list[tuple[Tensor, Tensor]] = []
    for begun in range(0, len(read.ids), batch):
        ids = read.ids[begun : begun + batch].to(model.device)
        output = model(input_ids=ids, use_cache=False, output_attentions=delimiters is not None)
        nats = token_nats(output.logits[:, :-1], ids[:, 1:], model)
        of = torch.tensor(read.of[begun : begun + batch])
        sums.index_add_(0, of, nats.double().mean(1).cpu())
        windows.index_add_(0, of, torch.ones(len(of), dtype=torch.float64))
        predicted |= set(output.logits[:, :-1].argmax(-1).flatten().tolist())
        if delimiters is not None:
            attended.append(_attention(output.attentions, delimiters.to(ids.device)[ids]))
    empty = torch.zeros(0, read.count, dtype=torch.float64)
    first, marked = (
        torch.zeros(len(attended[0][0]), read.count, dtype=torch.float64).index_add_(
            1, torch.tensor(read.of), torch.cat([pair[side] for pair in attended], dim=1)
        )
        / windows
        if attended
        else empty
        for side in range(2)
    )
    return Behaviour(
        loss_nats=sums / windows, distinct=len(predicted), to_first=first, to_delimiters=marked
    )


def _attention(
    maps: tuple[Float[Tensor, "batch heads query key"] | None, ...],
    is_delimiter: Bool[Tensor, "batch key"],
) -> tuple[Float[Tensor, "layers batch"], Float[Tensor, "layers batch"]]:
    """To position 0 and to delimiters but that, from late queries."""
    first: list[Tensor] = []
    marked: list[Tensor] = []
    is_marked = is_delimiter.clone()
    is_marked[:, 0] = False
    for weights in maps:
        if weights is None:
            raise ValueError(
                "a layer gives no attention weights; use a model whose attention can be eager"
            )
        late = weights[:, :, FROM:].double().mean((1, 2))
        first.append(late[:, 0].cpu())
        marked.append((late * is_marked).sum(1).cpu())
    return torch.stack(first), torch.stack(marked)


@contextmanager
def attending_eagerly(model: PreTrainedModel) -> Iterator[None]:
    """A scope in which attention weights are made, which the fast kernels do not."""
    before = model.config._attn_implementation  # noqa: SLF001 - transformers has a setter and no getter
    assert before is not None
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
