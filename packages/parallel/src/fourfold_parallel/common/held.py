"""The share of one rank in tensors that are cut over ranks: rectangles, as views of the memory in use.

The form in which every engine and every grid describes its state to a checkpoint. Names, shapes and places
are those of the plain model, so that whatever one layout wrote any other reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class HeldPart:
    """A rectangle of a whole tensor: where it begins, and this rank's memory of it."""

    offsets: tuple[int, ...]
    values: Tensor
    """A view, in any memory format: what is copied into it is loaded."""

    @property
    def stops(self) -> tuple[int, ...]:
        """One past its last element, along each dim."""
        return tuple(
            start + size for start, size in zip(self.offsets, self.values.shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle that is written in one piece, and where its content comes from."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    parts: tuple[HeldPart, ...]
    """They fill it."""

    def copy_to(self, memory: Tensor) -> None:
        """Copy its content to memory of its sizes; on a GPU the copy may be under way still."""
        for part in self.parts:
            place = tuple(
                slice(start - origin, stop - origin)
                for start, stop, origin in zip(part.offsets, part.stops, self.offsets, strict=True)
            )
            memory[place].copy_(part.values, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Held:
    """This rank's share of one tensor: disjoint rectangles, possibly none.

    torch's distributed checkpoint plans with it as with a `DTensor` (`__create_write_items__`,
    `__create_chunk_list__`).
    """

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    parts: tuple[HeldPart, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Held:
        """A tensor of which this rank holds everything, or its piece where it is a `DTensor`."""
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return cls.of(tensor.shape, tensor.dtype, [((0,) * tensor.ndim, tensor)])
        piece = tensor.to_local()
        [chunk] = tensor.__create_chunk_list__()
        return cls.of(tensor.shape, tensor.dtype, [(tuple(chunk.offsets), piece)])

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        parts: Sequence[tuple[tuple[int, ...], Tensor]],
    ) -> Held:
        """Rectangles by their offsets; empty ones are left out."""
        filled = tuple(HeldPart(offsets, values) for offsets, values in parts if values.numel())
        return cls(tuple(shape), dtype, filled)

    def boxes(self) -> tuple[Box, ...]:
        """The rectangles to write: one where the parts fill their common outline, else each part."""
        if not self.parts:
            return ()
        starts = tuple(map(min, zip(*(part.offsets for part in self.parts), strict=True)))
        stops = tuple(map(max, zip(*(part.stops for part in self.parts), strict=True)))
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        if math.prod(sizes) == sum(part.values.numel() for part in self.parts):
            return (Box(starts, sizes, self.parts),)
        return tuple(Box(part.offsets, tuple(part.values.shape), (part,)) for part in self.parts)

    def size(self) -> torch.Size:
        """Of the whole tensor, as torch's planners ask for it."""
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:  # noqa: A002 - torch's names
        assert object is self
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for box in self.boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(part.offsets), part.values.shape) for part in self.parts
        ]

    def part_at(self, offsets: Sequence[int]) -> Tensor:
        """The memory of the rectangle that begins there."""
        [values] = [part.values for part in self.parts if part.offsets == tuple(offsets)]
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A session's state: this rank's share of the tensors, and what is no tensor."""

    weights: Mapping[str, Held]
    """By the plain model's names; a tied one once, under its first name."""
    moments: Mapping[str, Held]
    """Of the optimizer, by `<name of the weight>/<key>`."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Of the optimizer: groups and single numbers, equal on every rank, as JSON holds them."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """Second names of tied weights, and their first."""

    def tensors(self) -> Iterator[tuple[str, Held]]:
        """Weights, then moments."""
        yield from self.weights.items()
        yield from self.moments.items()


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The content of a checkpoint, for a session that makes room for it."""

    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """Of weights and moments, by name."""
    numbers: Mapping[str, Any]

    def moments(self) -> Iterator[tuple[str, str, tuple[int, ...], torch.dtype]]:
        """Name of the weight, key, shape and number format of each moment."""
        for path, (shape, dtype) in self.shapes.items():
            name, slash, key = path.rpartition("/")
            if slash:
                yield name, key, shape, dtype


def numbers_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """An optimizer's groups and the single numbers of its state, as JSON holds them.

    Args:
        optimizer: of any layout.
        names: of its parameters, by their identity.
    """
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    singles: dict[str, Any] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if not isinstance(value, Tensor) or not value.ndim:
                singles[f"{names[id(parameter)]}/{key}"] = single(value)
    return {"groups": groups, "singles": singles}


def single(value: Any) -> Any:
    """A number, or a tensor of one, as JSON holds it."""
    if isinstance(value, Tensor):
        return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def number(value: Any, device: torch.device | str) -> Any:
    """The value that `single` was given."""
    if isinstance(value, dict):
        return torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]), device=device)
    return value


def take_group(own: dict[str, Any], group: Mapping[str, Any]) -> None:
    """Give a group of an optimizer's parameters what it had when it was saved."""
    for key, value in group.items():
        if key != "params":
            own[key] = tuple(value) if isinstance(own.get(key), tuple) else value


def take_numbers(
    optimizer: torch.optim.Optimizer,
    numbers: Mapping[str, Any],
    parameters: Mapping[str, Any],
) -> None:
    """Give an optimizer what `numbers_of` gave.

    Args:
        optimizer: of any layout, with as many groups.
        numbers: groups and single numbers.
        parameters: its parameters by name.
    """
    for own, group in zip(optimizer.param_groups, numbers["groups"], strict=True):
        take_group(own, group)
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for path, value in numbers["singles"].items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        device = parameter.device if fused else "cpu"
        optimizer.state[parameter][key] = number(value, device)


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, a tied one once, and the buffers that checkpoints hold."""
    yield from model.named_parameters()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in parameters and isinstance(value, Tensor):
            yield name, value


def make_room(
    optimizer: torch.optim.Optimizer,
    moments: Iterable[tuple[Tensor, str, tuple[int, ...], torch.dtype]],
) -> None:
    """Give an optimizer a tensor for each moment, and take all other state from it.

    A tensor that it has already is filled again where it fits, so that a load takes no second room.

    Args:
        optimizer: over the parameters of the moments.
        moments: parameter, key, shape and type of each.
    """
    before = {parameter: dict(values) for parameter, values in optimizer.state.items()}
    optimizer.state.clear()
    for parameter, key, shape, dtype in moments:
        made = before.get(parameter, {}).pop(key, None)
        if isinstance(made, Tensor) and (tuple(made.shape), made.dtype) == (shape, dtype):
            pass
        elif tuple(parameter.shape) == shape or isinstance(parameter, DTensor):
            made = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        else:
            made = torch.empty(shape, dtype=dtype, device=parameter.device)
        optimizer.state[parameter][key] = made


def ties_of(model: nn.Module) -> dict[str, str]:
    """Second names of tied parameters: name -> first name."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return ties


def check_weights(saved: Saved, wanted: Mapping[str, Held], ties: Mapping[str, str]) -> None:
    """Compare names and shapes of a model and a checkpoint.

    Args:
        saved: what lies in the checkpoint.
        wanted: the model's weights, a tied one under its first name.
        ties: second names of tied weights, which a checkpoint may hold too (`ties_of`).

    Raises:
        ValueError: They differ; the first weight that does is named.
    """
    shapes = {name: held.shape for name, held in wanted.items()}
    held = {name: shape for name, (shape, _) in saved.shapes.items() if "/" not in name}
    unknown = sorted(set(held) - set(shapes) - set(ties))
    other = [name for name, shape in held.items() if name in shapes and shapes[name] != shape]
    if unknown or other:
        first = (unknown + other)[0]
        raise ValueError(
            f"the checkpoint holds {first!r} of shape {held[first]}, the model has "
            f"{shapes.get(first, 'no such weight')}; build the model that the checkpoint was written by"
        )
    missing = sorted(set(shapes) - set(held))
    if missing:
        raise ValueError(
            f"the checkpoint holds {len(held)} weights and no {missing[0]!r}, which the model has, of "
            f"shape {shapes[missing[0]]}; build the model that the checkpoint was written by"
        )


def parts_of_stretch(
    shape: Sequence[int], start: int, flat: Tensor
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The rectangles of a tensor that make up a stretch of its elements in memory order, as views.

    Args:
        shape: of the whole tensor.
        start: number of the stretch's first element.
        flat: the stretch, one-dimensional.
    """
    if len(shape) < 2:
        if len(flat):
            yield ((start,) if shape else ()), (flat if shape else flat[0])
        return
    row = math.prod(shape[1:])
    while len(flat):
        first, skipped = divmod(start, row)
        if skipped or len(flat) < row:
            taken = min(row - skipped, len(flat))
            for offsets, values in parts_of_stretch(shape[1:], skipped, flat[:taken]):
                yield (first, *offsets), values[None]
        else:
            rows = len(flat) // row
            taken = rows * row
            yield (first, *(0,) * (len(shape) - 1)), flat[:taken].view(rows, *shape[1:])
        start, flat = start + taken, flat[taken:]
