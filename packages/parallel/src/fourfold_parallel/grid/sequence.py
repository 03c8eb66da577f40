"""The sequence form: between blocks, a rank of row holds its part of the tokens only.

A block (attention, MLP) starts with plain layers and ends with a swapped one. Its heads and hidden
units are cut over row and need all tokens; the norms and additions between blocks treat each token
by itself, and without the sequence form every rank of row does them all, in copies. Here the
residual stream's tokens are cut over row:

==========================  ============================  =============================
where                       forward                       backward
==========================  ============================  =============================
before the first layer      take one's tokens             gather
into a block                gather                        spread the sum (reduce-scatter)
out of a block              spread the sum                gather
after the last layer        gather                        take one's tokens
==========================  ============================  =============================

A gather and a spread move as much as the all-reduce that they replace, once for the layers of a
block together, and what the norms and additions save for backward shrinks to a part in `row`.
Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold_parallel.grid.collectives import Axis
from fourfold_parallel.grid.layout import Latent, Plain, ResidualNorm, Rule, Swapped, adapted


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The part of a model over which tokens are cut."""

    layers: tuple[str, ...]
    """The decoder layers, in order."""
    blocks: tuple[str, ...]
    """The modules that hold plain and swapped layers."""

    def covers(self, name: str) -> bool:
        """Whether a module lies within the decoder layers."""
        return any(name.startswith(f"{layer}.") for layer in self.layers)


def find_stretch(model: PreTrainedModel, rules: Mapping[str, Rule]) -> Stretch:
    """The decoder layers and their blocks.

    Raises:
        ValueError: A block holds norms of the residual stream too, so that gathering its tokens
            would gather theirs; or there is no list of layers that holds all blocks.
    """
    blocks = tuple(
        dict.fromkeys(
            adapted(name).rpartition(".")[0]
            for name, rule in rules.items()
            if isinstance(rule, Plain | Latent | Swapped)
        )
    )
    layers: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            entries = [f"{name}.{index}" for index in range(len(module))]
            layers += [entry for entry in entries if any(b.startswith(f"{entry}.") for b in blocks)]
    for name, rule in rules.items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if isinstance(rule, ResidualNorm) and block is not None:
            raise ValueError(
                f"{name} normalises the residual stream inside of {block}, which also holds plain and "
                "swapped layers; the sequence form needs them in modules of their own: turn it off"
            )
    stretch = Stretch(layers=tuple(layers), blocks=blocks)
    outside = [block for block in blocks if not stretch.covers(block)]
    if outside or not layers:
        raise ValueError(
            f"{outside or 'the model'} lies in no list of decoder layers, over which the sequence "
            "form could cut tokens; turn it off"
        )
    return stretch


def cut_tokens(model: nn.Module, stretch: Stretch, row: Axis) -> None:
    """Take, gather and spread tokens where the table above says; swapped layers spread by themselves."""

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        return _replaced(args, kwargs, lambda x: row.share(_divisible(x, row), dim=-2))

    def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        return _replaced(args, kwargs, lambda x: _whole(x, row, used="apart"))

    def finish(module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        if isinstance(output, tuple):
            return (_whole(output[0], row, used="alike"), *output[1:])
        return _whole(output, row, used="alike")

    if row.size == 1:
        return
    model.get_submodule(stretch.layers[0]).register_forward_pre_hook(take, with_kwargs=True)
    for block in stretch.blocks:
        model.get_submodule(block).register_forward_pre_hook(gather, with_kwargs=True)
    model.get_submodule(stretch.layers[-1]).register_forward_hook(finish)


def _whole(x: Float[Tensor, "batch piece width"], row: Axis, *, used: Any) -> Tensor:
    return row.whole(x, dim=-2, length=x.shape[-2] * row.size, used=used)


def _divisible(
    x: Float[Tensor, "batch token width"], row: Axis
) -> Float[Tensor, "batch token width"]:
    if x.shape[-2] % row.size:
        raise ValueError(
            f"a sequence of {x.shape[-2]} tokens does not divide over axis 'row' of size {row.size}; "
            "pad it, or turn the sequence form off"
        )
    return x


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> Any:
    """The arguments of a call with its hidden states changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
