"""The state of a model and its optimizer in plain files, whole and under the plain model's names.

Any engine that gathers full state writes them, and any such engine reads them onto its own layout.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from fourfold_parallel.common.files import write_text

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_WHOLE = StateDictOptions(full_state_dict=True)


def save_full_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, is_main: bool
) -> None:
    """Gather model and optimizer to the main rank and write them as safetensors. Every rank calls it."""
    weights, moments = _gathered(model, optimizer)
    if not is_main:
        return
    save_weights(weights, folder)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, values in moments["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.contiguous()
            else:
                numbers[f"{name}/{key}"] = value
    save_file(tensors, folder / "optimizer.safetensors")
    groups = json.dumps({"numbers": numbers, "param_groups": moments["param_groups"]})
    write_text(folder / "optimizer.json", groups)


def _gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Whole weights and optimizer state, by name, on the main rank.

    torch steps an optimizer without state, so that it has some: the next update would count as its second.
    """
    gathered: Any
    if optimizer.state:
        gathered = get_state_dict(model, optimizer, options=_FULL)
        return gathered
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    gathered = get_model_state_dict(model, options=_FULL)
    return gathered, {"state": {}, "param_groups": groups}


def save_weights(weights: dict[str, Any], folder: Path) -> None:
    """Write whole weights as `model.safetensors`; a tied tensor is written once, under its first name."""
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            kept[name] = value.contiguous()
    # Some readers ask for the format.
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` of a checkpoint into a plain model.

    Raises:
        ValueError: The file is of another model.
    """
    model.load_state_dict(_weights_for(model, folder))


def load_full_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore what `save_full_state` wrote, onto any layout. Every rank calls it.

    Raises:
        ValueError: The files are of another model.
    """
    weights: dict[str, Any] = dict(_weights_for(model, folder))
    saved: dict[str, Any] = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    state: dict[str, dict[str, Any]] = {}
    tensors = load_file(folder / "optimizer.safetensors")
    for path, value in {**tensors, **saved["numbers"]}.items():
        name, _, key = path.rpartition("/")
        state.setdefault(name, {})[key] = value
    moments: Any = {"state": state, "param_groups": saved["param_groups"]}
    is_cut = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if is_cut and state:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=weights,
            optim_state_dict=moments,
            options=_WHOLE,
        )
    elif is_cut:
        set_model_state_dict(model, weights, options=_WHOLE)
        optimizer.load_state_dict(moments)
    else:
        # `set_state_dict` refuses an optimizer without state, and a parameter that has had no gradient;
        # the optimizer itself takes both, and matches the names of the groups by their order.
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)


def _weights_for(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    weights = load_file(folder / "model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    unknown = sorted(set(weights) - set(shapes))
    other = [
        name for name in weights if name in shapes and tuple(weights[name].shape) != shapes[name]
    ]
    if unknown or other:
        first = (unknown + other)[0]
        raise ValueError(
            f"{folder} holds {first!r} of shape {tuple(weights[first].shape)}, the model has "
            f"{shapes.get(first, 'no such weight')}; build the model that the checkpoint was written by"
        )
    for name, alias in _aliases(model).items():
        if alias not in weights:
            continue
        if not torch.equal(weights.setdefault(name, weights[alias]), weights[alias]):
            raise ValueError(
                f"{folder} holds different values for {name!r} and {alias!r}, which the model ties; build "
                "the model without tied weights"
            )
    missing = sorted(set(shapes) - set(weights))
    if missing:
        raise ValueError(
            f"{folder} holds {len(weights)} weights and no {missing[0]!r}, which the model has, of shape "
            f"{shapes[missing[0]]}; build the model that the checkpoint was written by"
        )
    return weights


def _aliases(model: nn.Module) -> dict[str, str]:
    """Second names of tied parameters: name -> first name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return aliases
