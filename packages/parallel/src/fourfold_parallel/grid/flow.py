"""The places where the residual stream enters and leaves a block, found by one run of the whole model.

On the grid the residual stream is cut over col, and a block that every rank computes alike needs it
whole. Which arguments and results of the block carry it is not said anywhere. In the whole model it
shows: they are as wide as the stream. One pass over a few tokens tells, on one rank as on any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Path = tuple[int | str, ...]
"""A place in the arguments or the result of a call: `(0,)`, or `("hidden_states",)`, and deeper."""

TOKENS = 5
"""Tokens of the pass: few, and an unlikely width."""


@dataclass(slots=True, kw_only=True)
class Flow:
    """The arguments and results of a block that are the residual stream."""

    inputs: set[Path] = field(default_factory=set)
    outputs: set[Path] = field(default_factory=set)
    is_known: bool = False
    """Whether the pass went through the block."""
    is_read: bool = False
    """Whether the pass used its parameters and did not go through it."""
    leaks: bool = False
    """Whether the logits depend on another result of the block, whose gradient col would split."""


def find_flows(model: PreTrainedModel, blocks: Iterable[str], *, width: int) -> dict[str, Flow]:
    """The flows of blocks, by name, from one pass over `TOKENS` tokens.

    Args:
        model: Whole, with values or on the meta device.
        blocks: Names of modules.
        width: Of the residual stream.

    Raises:
        ValueError: The pass fails, such as on the meta device where a model asks for values.
    """
    flows = {name: Flow() for name in blocks}
    others: list[tuple[Flow, Tensor]] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            _watch(flow, others, width), with_kwargs=True
        )
        for name, flow in flows.items()
    ]
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with in_evaluation(model), torch.enable_grad():
            logits = _logits(model)
            for name, flow in flows.items():
                if not flow.is_known:
                    others += [(flow, p) for p in model.get_submodule(name).parameters()]
            uses = _used([x for _, x in others], logits)
    except Exception as error:
        raise ValueError(
            f"a pass of {TOKENS} tokens through {type(model).__name__} failed on "
            f"{model.device.type}, so that nothing says where its residual stream enters its blocks: "
            f"{type(error).__name__}: {error}; give a model with values, or use col=1"
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for handle in handles:
            handle.remove()
    for (flow, _), is_used in zip(others, uses, strict=True):
        flow.leaks |= is_used and flow.is_known
        flow.is_read |= is_used and not flow.is_known
    return flows


def _logits(model: PreTrainedModel) -> Tensor:
    """Of a few tokens; on the meta device with a mask of ours where the making of one asks for values.

    A model with parts that plain text does not reach says in `text_options` what does.
    """
    tokens = torch.arange(TOKENS, device=model.device).unsqueeze(0) % 7 + 1
    options: dict[str, Any] = {"use_cache": False, **getattr(model, "text_options", {})}
    if model.device.type != "meta":
        return model(input_ids=tokens, **options).logits
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device="meta", dtype=model.dtype)
    with _without_experts(model):
        try:
            return model(input_ids=tokens, **options).logits
        except RuntimeError:
            return model(input_ids=tokens, attention_mask=mask, **options).logits


@contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    """Sets of experts give back what they are given: which of them are hit is a question of values."""
    experts = [module for module in model.modules() if hasattr(module, "is_concatenated")]
    for module in experts:
        module.forward = lambda x, *_, **__: x * 1
    try:
        yield
    finally:
        for module in experts:
            del module.forward


def _watch(flow: Flow, others: list[tuple[Flow, Tensor]], width: int) -> Callable[..., Any]:
    """A hook that writes down what a block is given and gives, and collects its other results."""

    def separate(path: Path, x: Tensor) -> Tensor:
        if is_stream(x, width):
            flow.outputs.add(path)
        elif x.requires_grad:
            x = x.view_as(x)  # what the block itself makes of it does not count
            others.append((flow, x))
        return x

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
        del module
        flow.is_known = True
        flow.inputs |= {path for path, x in tensors((*args, kwargs)) if is_stream(x, width)}
        return mapped(result, separate)

    return hook


def _used(results: list[Tensor], logits: Tensor) -> list[bool]:
    """Whether the logits depend on each result."""
    if not results:
        return []
    gradients = torch.autograd.grad(logits.float().sum(), results, allow_unused=True)
    return [gradient is not None for gradient in gradients]


def is_stream(tensor: Tensor, width: int) -> bool:
    """Whether a tensor of the whole model has the form of the residual stream."""
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[-1] == width


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module is as before afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors of a call's arguments (positional ones, then a dict) or of its result."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, (*path, str(key)))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors(item, (*path, index))


def mapped(value: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """The same arguments or result with each tensor changed."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        items = {key: mapped(item, change, (*path, str(key))) for key, item in value.items()}
        if type(value) is dict:
            return items
        for key, item in items.items():  # such as transformers' ModelOutput
            value[key] = item  # pyright: ignore[reportIndexIssue]
        return value
    if isinstance(value, (tuple, list)):
        items = [mapped(item, change, (*path, index)) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
