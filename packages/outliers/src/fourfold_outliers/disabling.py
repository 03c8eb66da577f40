"""Disabling coordinates: each way a scope that leaves the model bit for bit as it was, errors included.

The paper's way is a gain of zero in every norm (`silenced`): no block reads the coordinate, the stream
keeps it. Two others are a zero in the stream itself (`removed`), and its mean over tokens (`averaged`),
which keeps what is constant in a coordinate and takes what tells tokens apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold_outliers.stream import layers_of, looking, width_of
from fourfold_parallel.grid.layout import decoder_name, norm_kind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norm:
    """A norm over the residual stream."""

    name: str
    layer: int
    """Of the decoder, from 1; 0 for norms outside of the layers, such as the final one."""
    module: nn.Module
    offset: float
    """What the stored gain is a difference from: 1 in Gemma's norms, 0 in most."""

    @property
    def gain(self) -> nn.Parameter:
        """The stored vector."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """A LayerNorm's."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, nn.Parameter) else None


def norms_of(model: PreTrainedModel) -> tuple[Norm, ...]:
    """Every norm of the decoder over the width of its residual stream, in the model's order.

    Raises:
        ValueError: there is none.
    """
    prefix, width = decoder_name(model), width_of(model)
    places = {id(layer): number for number, layer in enumerate(layers_of(model), start=1)}
    inside = {
        id(module): places[id(layer)] for layer in layers_of(model) for module in layer.modules()
    }
    norms: list[Norm] = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_norm = isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,)
        if not is_norm or not name.startswith(prefix):
            continue
        try:
            kind = norm_kind(name, module)
        except ValueError:  # a vector that is no gain, such as a scale of a layer's output
            continue
        norms.append(
            Norm(name=name, layer=inside.get(id(module), 0), module=module, offset=kind.offset)
        )
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no norm with a gain over its {width} coordinates, which this "
            "disables; use removed(...), which zeroes the stream itself"
        )
    return tuple(norms)


def gains_of(norms: Sequence[Norm]) -> Float[Tensor, "norms width"]:
    """Effective gains: the offset is added."""
    return torch.stack([norm.gain.detach().double() + norm.offset for norm in norms])


def biases_of(norms: Sequence[Norm]) -> Float[Tensor, "norms width"]:
    """Biases of those that have them; no rows where none has."""
    kept = [norm.bias.detach().double() for norm in norms if norm.bias is not None]
    return torch.stack(kept) if kept else torch.zeros(0, norms[0].gain.shape[0])


def _checked(model: PreTrainedModel, coordinates: Sequence[int]) -> list[int]:
    width = width_of(model)
    wrong = [d for d in coordinates if not 0 <= d < width]
    if wrong:
        raise ValueError(
            f"coordinates {wrong} of a residual stream of {width}; use 0 to {width - 1}"
        )
    return list(coordinates)


def _in(norms: Sequence[Norm], layers: Sequence[int] | None) -> list[Norm]:
    return [norm for norm in norms if layers is None or norm.layer in layers]


@contextmanager
def silenced(
    model: PreTrainedModel, coordinates: Sequence[int], *, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Norms give zero at some coordinates: gain and bias are zero there.

    Args:
        model: changed within the scope.
        coordinates: of the residual stream.
        layers: whose norms; of all layers and outside of them by default.
    """
    chosen = _checked(model, coordinates)
    changed = [
        (parameter, parameter.detach().clone(), value)
        for norm in _in(norms_of(model), layers)
        for parameter, value in ((norm.gain, -norm.offset), (norm.bias, 0.0))
        if parameter is not None
    ]
    try:
        with torch.no_grad():
            for parameter, _, value in changed:
                parameter[chosen] = value
        yield
    finally:
        with torch.no_grad():
            for parameter, before, _ in changed:
                parameter.copy_(before)


@contextmanager
def masked(
    model: PreTrainedModel, coordinates: Sequence[int], *, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """The same as `silenced` without touching a parameter, for weights that are shared or read-only."""
    chosen = _checked(model, coordinates)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        del module, args
        return output.index_fill(-1, torch.tensor(chosen, device=output.device), 0.0)

    with ExitStack() as stack:
        for norm in _in(norms_of(model), layers):
            stack.callback(norm.module.register_forward_hook(hook).remove)
        yield


def _replaced(
    model: PreTrainedModel,
    chosen: list[int],
    value: Callable[[int], Tensor],
    *,
    spares_first: bool,
) -> AbstractContextManager[None]:
    begin = 1 if spares_first else 0

    def look(layer: int, states: Tensor) -> Tensor | None:
        if layer == 0:
            return None
        changed = states.clone()
        changed[:, begin:, chosen] = value(layer).to(states)
        return changed

    return looking(model, look)


def removed(
    model: PreTrainedModel, coordinates: Sequence[int], *, spares_first: bool = False
) -> AbstractContextManager[None]:
    """Zero in the residual stream after every layer; position 0, the sink, may be spared."""
    zeros = torch.zeros(len(coordinates))
    return _replaced(
        model, _checked(model, coordinates), lambda _: zeros, spares_first=spares_first
    )


def averaged(
    model: PreTrainedModel,
    coordinates: Sequence[int],
    means: Float[Tensor, "layers width"],
    *,
    spares_first: bool = True,
) -> AbstractContextManager[None]:
    """A layer's mean in place of every token's own value.

    Args:
        model: hooked within the scope.
        coordinates: of the residual stream.
        means: as `Sums.means` gives them; row 0 is the embedding's and is not used.
        spares_first: leave position 0, whose values are far from that mean.
    """
    chosen = _checked(model, coordinates)
    return _replaced(model, chosen, lambda layer: means[layer, chosen], spares_first=spares_first)


def random_sets(
    width: int, size: int, *, besides: Sequence[int], times: int, seed: int
) -> list[tuple[int, ...]]:
    """Sets of other coordinates, drawn without replacement within each."""
    generator = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(width), np.asarray(besides))
    drawn = (generator.choice(others, size, replace=False) for _ in range(times))
    return [tuple(sorted(map(int, chosen))) for chosen in drawn]


def matched_sets(
    gains: Float[Tensor, "norms width"],
    like: Sequence[int],
    *,
    besides: Sequence[int],
    times: int,
    seed: int,
    near: int = 10,
) -> list[tuple[int, ...]]:
    """Sets of other coordinates with gains of like size: for each of `like` one of the `near` nearest.

    Args:
        gains: effective ones; their size is the mean absolute value over norms.
        like: coordinates to be matched.
        besides: coordinates that are not drawn.
        times: sets.
        seed: of the drawing.
        near: candidates for each.
    """
    size = gains.abs().mean(0)
    generator = np.random.default_rng(seed)
    others = [d for d in range(len(size)) if d not in set(besides) | set(like)]
    nearest = {
        d: sorted(others, key=lambda other, d=d: abs(float(size[other] - size[d])))[:near]
        for d in like
    }
    sets: list[tuple[int, ...]] = []
    for _ in range(times):
        chosen: list[int] = []
        for d in like:
            free = [other for other in nearest[d] if other not in chosen]
            chosen.append(int(generator.choice(free)))
        sets.append(tuple(sorted(chosen)))
    return sets
