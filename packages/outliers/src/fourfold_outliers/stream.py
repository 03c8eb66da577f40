"""The residual stream of any transformers model: seen, and changed, through hooks on its decoder layers.

Layer 0 is what enters the first decoder layer, the embedding; layer `i` is what leaves the i-th. The last
one is before the final norm, which transformers' own `hidden_states[-1]` is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold_outliers.geometry import Reduce, Sums, View, alone
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.grid.layout import decoder_name, text_config
from fourfold_parallel.run.flow import decoder_layers
from fourfold_parallel.run.tokenizers import beginning, encoded

Look = Callable[[int, Float[Tensor, "batch token width"]], Tensor | None]
"""Gets a layer's number and its states; gives other states to put in their place, or None."""

FEW = 8
"""Documents below which a text's windows count as documents: fewer give no interval worth the name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Documents:
    """Windows of documents, equally long; a model sees each from position 0."""

    ids: Int[Tensor, "window token"]
    of: tuple[int, ...]
    """Number of the document that each window is of, from 0."""

    @property
    def count(self) -> int:
        """Documents."""
        return max(self.of) + 1

    @classmethod
    def each_once(cls, ids: Int[Tensor, "window token"]) -> Documents:
        """A window of each document."""
        return cls(ids=ids, of=tuple(range(len(ids))))


def documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, tokens: int, context: int
) -> Documents:
    """Texts as windows of `context` tokens, the first window of each text before the second of any.

    Args:
        tokenizer: the model's; windows begin as it begins every text.
        texts: a document each; where fewer than `FEW` fill a window, their windows count as documents.
        tokens: at most so many in all.
        context: tokens a window.

    Raises:
        ValueError: no text fills a window.
    """
    start = beginning(tokenizer)
    room = context - len(start)
    cut: list[list[list[int]]] = []
    for text in texts:
        ids = encoded(tokenizer, text)
        windows = [[*start, *ids[at : at + room]] for at in range(0, len(ids) - room + 1, room)]
        if windows:
            cut.append(windows)
        if len(cut) * context >= tokens:
            break
    if not cut:
        raise ValueError(
            f"no text has {context} tokens, a window's; give longer texts, or a smaller --context"
        )
    in_turn = [
        (number, windows[turn])
        for turn in range(max(map(len, cut)))
        for number, windows in enumerate(cut)
        if turn < len(windows)
    ][: max(1, tokens // context)]
    of = tuple(number for number, _ in in_turn) if len(cut) >= FEW else tuple(range(len(in_turn)))
    return Documents(ids=torch.tensor([window for _, window in in_turn]), of=of)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Decoder layers, in order.

    Raises:
        ValueError: the model names none.
    """
    decoder = model.get_submodule(decoder_name(model))
    layers = decoder_layers(decoder)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers that transformers names "
            "(GradientCheckpointingLayer); use a decoder of transformers"
        )
    return layers


def width_of(model: PreTrainedModel) -> int:
    """Coordinates of the residual stream."""
    return int(text_config(model).hidden_size)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Ids that a model embeds."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.num_embeddings


@contextmanager
def looking(model: PreTrainedModel, look: Look) -> Iterator[None]:
    """The scope of passes whose residual stream is looked at, and changed where the look gives states.

    Layers that a model iterates or skips are numbered as they stand in it, not as they are called.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        if args:
            changed = look(0, args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        changed = look(0, kwargs["hidden_states"])
        return None if changed is None else (args, {**kwargs, "hidden_states": changed})

    def after(number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            del module, args
            is_alone = isinstance(output, Tensor)
            changed = look(number, output if is_alone else output[0])
            if changed is None:
                return None
            return changed if is_alone else (changed, *output[1:])

        return hook

    layers = layers_of(model)
    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [
        layer.register_forward_hook(after(number)) for number, layer in enumerate(layers, start=1)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True, eq=False)
class First:
    """Position 0 apart from the others: the attention sink of a causal model."""

    norm: Float[Tensor, " layers"]
    """Mean length of its state."""
    held: Float[Tensor, "layers width"]
    """Mean share of its squared length that each coordinate holds."""


class Sample:
    """Some tokens' states of every layer, the same tokens in each: what no sum can tell."""

    def __init__(self, layers: int, *, most: int = 512) -> None:
        """Of at most so many tokens, the first that pass."""
        self._kept: list[list[Tensor]] = [[] for _ in range(layers)]
        self._most = most

    def take(
        self, layer: int, states: Float[Tensor, "batch token width"], windows: Sequence[int]
    ) -> None:
        """Keep the states of a pass, but those of position 0."""
        del windows
        room = self._most - sum(len(kept) for kept in self._kept[layer])
        if room > 0:
            self._kept[layer].append(states[:, 1:].flatten(0, 1)[:room].detach().float().cpu())

    def of(self, layer: int) -> Float[Tensor, "token width"]:
        """A layer's."""
        return torch.cat(self._kept[layer])


class Meter:
    """Takes the residual stream in as it passes: sums of positions 1 on, in one or several views; 0 apart."""

    def __init__(self, documents: int, layers: int, width: int, views: Sequence[View] = ()) -> None:
        """For so many documents, layers (the embedding counts) and coordinates held here."""
        self.sums: Sums = Sums.empty(documents, layers, width)
        self.viewed: tuple[Sums, ...] = tuple(Sums.empty(documents, layers, width) for _ in views)
        self._views = tuple(views)
        self._first = torch.zeros(layers, width, dtype=torch.float64)
        self._first_norm = torch.zeros(layers, dtype=torch.float64)
        self._firsts = torch.zeros(layers, dtype=torch.float64)

    def take(
        self,
        layer: int,
        states: Float[Tensor, "batch token width"],
        of: Sequence[int],
        over_width: Reduce = alone,
    ) -> None:
        """Take in a layer's states; `of` names each row's document."""
        first = states[:, 0].detach().double()
        power = first.square()
        length = over_width(power.sum(1))
        self._first[layer] += (power / length.clamp(min=1e-300)[:, None]).sum(0).cpu()
        self._first_norm[layer] += length.sqrt().sum().cpu()
        self._firsts[layer] += len(states)
        for document in dict.fromkeys(of):
            rows = states[[number == document for number in of], 1:].flatten(0, 1)
            self.sums.add_(document, layer, rows, over_width=over_width)
            for view, sums in zip(self._views, self.viewed, strict=True):
                sums.add_(document, layer, view(layer, rows.double()), over_width=over_width)

    def first(self) -> First:
        """Position 0."""
        return First(self._first_norm / self._firsts, self._first / self._firsts[:, None])


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    read: Documents,
    *,
    views: Sequence[View] = (),
    batch: int = 4,
    also: Sequence[Callable[[int, Tensor, Sequence[int]], None]] = (),
    progress: Progress = silent,
) -> Meter:
    """The geometry of a model's residual stream over documents, in one pass.

    Args:
        model: any decoder of transformers, in evaluation mode.
        read: what it reads.
        views: further ways to see the states, each with sums of its own.
        batch: windows of a forward pass.
        also: each gets a layer's number and states, and the numbers of the windows.
        progress: told after each pass.
    """
    meter = Meter(read.count, len(layers_of(model)) + 1, width_of(model), views)
    for begun in range(0, len(read.ids), batch):
        chosen = range(begun, min(begun + batch, len(read.ids)))

        def look(layer: int, states: Tensor, chosen: range = chosen) -> None:
            meter.take(layer, states, [read.of[window] for window in chosen])
            for take in also:
                take(layer, states, chosen)

        with looking(model, look):
            model(input_ids=read.ids[chosen.start : chosen.stop].to(model.device), use_cache=False)
        progress(chosen.stop, len(read.ids), "geometry")
    return meter
