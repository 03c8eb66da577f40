"""Outliers while a model trains: seen in the forward passes of its validations, which are made anyway.

    train(run, record=..., checkpoints=..., observers=(Outliers(),))

adds an event "outliers" after each validation. On the grid each rank sees its piece of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_outliers.geometry import MOST, Reduce, Sums, alone, top_share
from fourfold_outliers.stream import Meter, layers_of, looking, width_of
from fourfold_parallel.grid.collectives import Axis
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.run.engines import Session

TOLD = 8
"""Coordinates that an event names, those that are far from the others in most tokens first."""


def over(axis: Axis) -> Reduce:
    """Sums over the ranks of an axis, which hold the other coordinates."""
    return lambda tensor: axis.all_reduce(tensor.clone()).wait()


def gathered(sums: Sums, mesh: Mesh, width: int) -> Sums:
    """The sums of the whole residual stream and the whole batch, from those of each rank's piece.

    Args:
        sums: of this rank's coordinates and rows.
        mesh: the grid, whose axis col cuts the stream.
        width: of the whole stream.
    """
    start, stop = mesh.col.bounds(width)

    def whole(name: str) -> Tensor:
        piece = getattr(sums, name)
        if piece.ndim == 3:  # every rank fills its own coordinates of a whole row
            room = torch.zeros(*piece.shape[:2], width, dtype=piece.dtype)
            room[..., start:stop] = piece
            piece = mesh.col.all_reduce(room).wait()
        return mesh.sum_over_batch(piece)

    return sums.mapped(whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """Writes, by layer: the number of outliers by share, the mean cosine, the top three's share."""

    event: ClassVar[str] = "outliers"

    @contextmanager
    def watching(self, session: Session) -> Iterator[Callable[[], dict[str, object]]]:
        """See `fourfold_parallel.run.train.Observer`.

        Raises:
            ValueError: the engine cuts tokens over row, or a block that is whole gives all coordinates.
        """
        model = next(m for m in session.model.modules() if isinstance(m, PreTrainedModel))
        parallel = getattr(session, "parallel", None)
        mesh: Mesh | None = getattr(parallel, "mesh", None)
        if getattr(parallel, "cuts_tokens", False):
            raise ValueError(
                "cuts_tokens=True leaves a rank of row a part of the tokens, and outliers are counted by "
                "whole rows; train without this observer, or with cuts_tokens=False"
            )
        width, layers = width_of(model), len(layers_of(model)) + 1
        here = width
        over_width = alone
        if mesh is not None:
            start, stop = mesh.col.bounds(width)
            here, over_width = stop - start, over(mesh.col)
        meter = Meter(1, layers, here)

        def look(layer: int, states: Tensor) -> None:
            if states.shape[-1] != here:
                raise ValueError(
                    f"layer {layer} gives {states.shape[-1]} coordinates where this rank should hold "
                    f"{here} of {width}; train without this observer, or on a grid without blocks that are "
                    "whole"
                )
            meter.take(layer, states, [0] * len(states), over_width)

        def told() -> dict[str, object]:
            if mesh is not None:
                return described(gathered(meter.sums, mesh, width))
            on = session.device
            summed = meter.sums.mapped(
                lambda name: session.sum(getattr(meter.sums, name).to(on)).cpu()
            )
            return described(summed)

        with looking(model, look):
            yield told


def described(sums: Sums) -> dict[str, object]:
    """The numbers of an event, from the sums of one document."""
    [shares], [contributions] = sums.shares(), sums.contributions()
    largest = shares.amax(0).topk(min(TOLD, shares.shape[-1])).indices.tolist()
    return {
        "tokens": int(sums.tokens[0, 0]),
        "outliers_by_layer": (shares > MOST).sum(-1).tolist(),
        "cosine_by_layer": _rounded(contributions.sum(-1)),
        "top_share_by_layer": _rounded(top_share(contributions)),
        "shares": {str(d): _rounded(shares[:, d]) for d in largest},
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 5) for value in values]
