"""The grid of ranks: four axes named by what they divide.

=======  ==================  =================================  ===========================
axis     the paper's letter  what it divides                    what moves along it
=======  ==================  =================================  ===========================
`data`   G_data              the batch                          gradients, once a step
`depth`  G_z                 the batch, and each weight's tile  tiles and their gradients
`row`    G_x                 outputs of a plain layer           gradients of inputs
`col`    G_y                 inputs of a plain layer            outputs
=======  ==================  =================================  ===========================

In a swapped layer `row` and `col` change places. The ranks are numbered with `col` innermost, then
`row`, `depth`, `data`: the axes that talk most sit closest together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fourfold_parallel.common.axes import AXES, AxisName
from fourfold_parallel.grid.collectives import SILENT, Axis, Observer, Unchanged, Wire

STORAGE_ORDER: tuple[AxisName, ...] = ("row", "col", "depth", "data")
"""Order of the mesh that holds parameters. `DTensor` cuts a dim by the mesh's axes from left to
right, so with `row` and `col` before `depth` the tile is cut first and its pieces last, and with
`data` at the end optimizer states can be cut once more. No strided placement is needed."""

Cut = Mapping[AxisName, int]
"""How a parameter is cut: the dim that each axis divides. Along an axis without one it is copied."""


class Mesh:
    """A grid of `data * depth * row * col` ranks, on one torch `DeviceMesh`.

    Every rank must build it, at the same time, in an initialised process group.

    Args:
        data: Replicas of the model, each with its share of the batch.
        depth: Ranks that share the batch of one replica and hold pieces of every tile.
        row: Parts of the output features of a plain layer.
        col: Parts of the input features of a plain layer, and of the residual stream.
        device: Type of the devices, as in `torch.device`.
        wire: Number format of an axis' collectives where it is not that of the tensors.
        observer: Sees every collective and product.

    Raises:
        ValueError: The sizes do not multiply to the number of ranks.
    """

    def __init__(
        self,
        *,
        data: int = 1,
        depth: int = 1,
        row: int = 1,
        col: int = 1,
        device: str = "cpu",
        wire: Mapping[AxisName, Wire] | None = None,
        observer: Observer = SILENT,
    ) -> None:
        sizes: dict[AxisName, int] = {"data": data, "depth": depth, "row": row, "col": col}
        check_sizes(sizes, dist.get_world_size())
        used: tuple[AxisName, ...] = tuple(n for n in STORAGE_ORDER if sizes[n] > 1) or ("row",)
        ranks = torch.arange(dist.get_world_size()).reshape(data, depth, row, col)
        in_order = ranks.permute([AXES.index(name) for name in STORAGE_ORDER])
        # An axis of size one would change no placement, and make DTensor's first use of every
        # operator several times slower: it enumerates the placements of all axes together.
        self.torch_mesh = DeviceMesh(
            device, in_order.reshape([sizes[name] for name in used]), mesh_dim_names=used
        )
        wire = wire or {}
        axes = {
            name: self._axis(name, size, wire.get(name, Unchanged()), observer)
            for name, size in sizes.items()
        }
        self.data, self.depth = axes["data"], axes["depth"]
        self.row, self.col = axes["row"], axes["col"]
        self.observer = observer

    def _axis(self, name: AxisName, size: int, wire: Wire, observer: Observer) -> Axis:
        if size == 1:
            return Axis(name=name, size=1, rank=0, wire=wire, observer=observer)
        index, rank = self._names.index(name), self.torch_mesh.get_local_rank(name)
        sums = self.torch_mesh.get_group(name)
        gathers = sums
        if name in ("data", "depth"):
            siblings = self.torch_mesh.mesh.movedim(index, -1).reshape(-1, size)
            gathers, _ = dist.new_subgroups_by_enumeration(siblings.tolist())
        assert isinstance(gathers, dist.ProcessGroup)
        return Axis(
            name=name, size=size, rank=rank, sum_group=sums.group_name,
            gather_group=gathers.group_name, wire=wire, observer=observer,
        )  # fmt: skip

    @property
    def axes(self) -> tuple[Axis, Axis, Axis, Axis]:
        """The four axes: data, depth, row, col."""
        return self.data, self.depth, self.row, self.col

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.torch_mesh.size()

    def observed(self, observer: Observer) -> Mesh:
        """The same grid, on the same communicators, with another observer."""
        seen = copy.copy(self)
        seen.observer = observer
        for axis in self.axes:
            setattr(seen, axis.name, replace(axis, observer=observer))
        return seen

    def batch_rank(self) -> int:
        """This rank's position among the `data * depth` shares of the batch."""
        return self.data.rank * self.depth.size + self.depth.rank

    def batch_size(self) -> int:
        """Number of shares of the batch."""
        return self.data.size * self.depth.size

    def sum_over_batch(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over `depth` and `data`, outside autograd."""
        inner = self.depth.all_reduce(tensor.detach().clone()).wait()
        return self.data.all_reduce(inner).wait()

    def distribute(self, whole: Shaped[Tensor, "..."], cut: Cut) -> DTensor:
        """The parameter of which this rank keeps its piece; `whole` is equal on every rank."""
        shape = tuple(whole.shape)
        return self.assemble(whole[self.slices(shape, cut)].clone(), shape, cut)

    def assemble(self, piece: Shaped[Tensor, "..."], shape: Sequence[int], cut: Cut) -> DTensor:
        """The parameter of `shape` of which this rank holds `piece`."""
        placements = [Shard(cut[name]) if name in cut else Replicate() for name in self._names]
        return DTensor.from_local(
            piece.contiguous(), self.torch_mesh, placements, run_check=False,
            shape=torch.Size(shape), stride=torch.empty(tuple(shape), device="meta").stride(),
        )  # fmt: skip

    def cut_of(self, parameter: DTensor) -> dict[AxisName, int]:
        """The cut of a parameter of this grid."""
        return {
            name: placement.dim
            for name, placement in zip(self._names, parameter.placements, strict=True)
            if isinstance(placement, Shard)
        }

    def slices(self, shape: Sequence[int], cut: Cut) -> tuple[slice, ...]:
        """The place of this rank's piece in a whole tensor of `shape`."""
        bounds = [(0, length) for length in shape]
        for name in STORAGE_ORDER:
            if name in cut:
                start, stop = bounds[cut[name]]
                axis: Axis = getattr(self, name)
                lower, upper = axis.bounds(stop - start)
                bounds[cut[name]] = (start + lower, start + upper)
        return tuple(slice(start, stop) for start, stop in bounds)

    @property
    def _names(self) -> tuple[AxisName, ...]:
        names = self.torch_mesh.mesh_dim_names
        assert names is not None
        return tuple(name for name in STORAGE_ORDER if name in names)


def check_sizes(sizes: Mapping[AxisName, int], ranks: int) -> None:
    """Refuse a grid that does not use every rank exactly once.

    Raises:
        ValueError: A size is below one, or the product is not `ranks`.
    """
    product = 1
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} is not a size; use 1 for an axis that is not used")
        product *= size
    if product != ranks:
        terms = " * ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"the grid {terms} has {product} ranks, but {ranks} were started; "
            f"choose sizes whose product is {ranks}"
        )
