"""The state of a model and its optimizer under the plain model's names, as ranks hold it.

For one process, replicas and FSDP2; the grid and DeepSpeed describe theirs themselves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fourfold_parallel.common.files import StrPath
from fourfold_parallel.common.held import (
    Held,
    Saved,
    State,
    check_weights,
    make_room,
    numbers_of,
    take_numbers,
    ties_of,
    weights_of,
)
from fourfold_parallel.run.shards import ShardReader, held_checksums, read, unlike


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """This rank's share, as views of the memory in use; nothing is copied and no rank waits."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}/{key}": Held.whole(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor) and value.ndim
    }
    return State(
        weights={name: Held.whole(tensor) for name, tensor in weights_of(model)},
        moments=moments,
        numbers=numbers_of(optimizer, names),
        ties=ties_of(model),
    )


@contextmanager
def restoring(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Saved) -> Iterator[State]:
    """Room for what was saved: the tensors to fill within; after it the optimizer's numbers are set."""
    parameters = dict(model.named_parameters())
    make_room(
        optimizer,
        ((parameters[name], key, shape, dtype) for name, key, shape, dtype in saved.moments()),
    )
    yield state_of(model, optimizer)
    take_numbers(optimizer, saved.numbers, parameters)


def load_weights(model: nn.Module, folder: StrPath) -> None:
    """Load the weights of a checkpoint, whatever layout wrote it, into a plain model of this process.

    Raises:
        CorruptError: It is not what was written; file and tensor are named.
        ValueError: It is of another model.
    """
    reader = ShardReader(folder)
    held = {name: Held.whole(tensor) for name, tensor in weights_of(model)}
    ties = ties_of(model)
    check_weights(reader.manifest.saved(), held, ties)
    check_ties(reader, ties)
    read(reader, held)
    reader.refuse(unlike(reader.manifest, held, held_checksums(held)))


def check_ties(reader: ShardReader, ties: Mapping[str, str]) -> None:
    """Refuse different values for two names that a model ties.

    Raises:
        ValueError: Which of the two it should keep is not known.
    """
    tensors = reader.manifest.tensors
    for name, first in ties.items():
        if name in tensors and tensors[name][2] != tensors[first][2]:
            raise ValueError(
                f"the checkpoint holds different values for {name!r} and {first!r}, which the model "
                "ties; build the model without tied weights"
            )
