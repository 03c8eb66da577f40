"""The three matrix products of a linear layer, and the choice of how to compute them.

A product `A B` may be asked of the library with either factor stored by rows or by columns, or as
`(Bᵀ Aᵀ)ᵀ`. On most devices the choice is worth little; on the MI250X the paper found one product of
GPT-320B at 6 % of peak in one mode where others reached 55 %, and timing the modes in the first
step more than halved the compute of a batch.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fourfold_parallel.grid.mesh import Mesh

Kind = Literal["forward", "input_gradient", "weight_gradient"]


class Products:
    """The products as torch would compute them for `torch.nn.Linear`, bit for bit.

    `site` names the layer's shape on the grid; it is equal on every rank.
    """

    def forward(
        self,
        x: Float[Tensor, "*batch k"],
        tile: Float[Tensor, "n k"],
        bias: Float[Tensor, " n"] | None,
        *,
        site: str,  # noqa: ARG002 - for those who choose
    ) -> Float[Tensor, "*batch n"]:
        """`X Wᵀ + b`."""
        return F.linear(x, tile, bias)

    def input_gradient(
        self,
        dy: Float[Tensor, "*batch n"],
        tile: Float[Tensor, "n k"],
        *,
        site: str,  # noqa: ARG002 - for those who choose
    ) -> Float[Tensor, "*batch k"]:
        """`dY W`."""
        return dy.flatten(0, -2).mm(tile).unflatten(0, dy.shape[:-1])

    def weight_gradient(
        self,
        dy: Float[Tensor, "*batch n"],
        x: Float[Tensor, "*batch k"],
        *,
        site: str,  # noqa: ARG002 - for those who choose
    ) -> Float[Tensor, "n k"]:
        """`dYᵀ X`."""
        return dy.flatten(0, -2).t().mm(x.flatten(0, -2))


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda a, b: a.mm(b),
    "nn": lambda a, b: a.contiguous().mm(b.contiguous()),
    "nt": lambda a, b: a.contiguous().mm(_by_columns(b)),
    "tn": lambda a, b: _by_columns(a).mm(b.contiguous()),
    "transposed": lambda a, b: b.t().mm(a.t()).t(),
}
"""Ways to compute `A B`, the copies that they need included. `plain` takes the factors as they are."""

WARM_UPS, TRIALS = 2, 7
WORTH = 0.95
"""Another mode than `plain` must take less than this part of its time: below, it is noise."""


class TunedProducts(Products):
    """Times every mode when a product first occurs, and from then on uses the fastest.

    The decision is made once for the whole grid, from the sum of all ranks' times, since ranks that
    compute differently would wait for one another. It depends on kind, shape, number format, device
    and version of torch, and is remembered in a file.

    Args:
        mesh: The grid; every rank makes this object at the same time.
        file: Where decisions are kept, a JSON object. Read by the first rank, written by it.
        clock: Runs a product and gives the time it took, in seconds.
    """

    def __init__(
        self,
        mesh: Mesh,
        file: Path,
        *,
        clock: Callable[[str, Callable[[], Tensor]], float] | None = None,
    ) -> None:
        self._mesh, self._file = mesh, file
        self._clock = clock or _elapsed_s
        self._is_first = mesh.torch_mesh.get_rank() == 0
        known = file.read_text(encoding="utf-8") if self._is_first and file.exists() else "{}"
        self.decisions: dict[str, str] = json.loads(_from_first(known, mesh))

    def forward(
        self,
        x: Float[Tensor, "*batch k"],
        tile: Float[Tensor, "n k"],
        bias: Float[Tensor, " n"] | None,
        *,
        site: str,
    ) -> Float[Tensor, "*batch n"]:
        """`X Wᵀ + b`."""
        rows = x.flatten(0, -2)
        mode = self._decide("forward", rows, tile.t(), site)
        if mode == "plain":
            return F.linear(x, tile, bias)
        y = MODES[mode](rows, tile.t())
        return (y if bias is None else y + bias).contiguous().unflatten(0, x.shape[:-1])

    def input_gradient(
        self, dy: Float[Tensor, "*batch n"], tile: Float[Tensor, "n k"], *, site: str
    ) -> Float[Tensor, "*batch k"]:
        """`dY W`."""
        rows = dy.flatten(0, -2)
        mode = self._decide("input_gradient", rows, tile, site)
        return MODES[mode](rows, tile).contiguous().unflatten(0, dy.shape[:-1])

    def weight_gradient(
        self, dy: Float[Tensor, "*batch n"], x: Float[Tensor, "*batch k"], *, site: str
    ) -> Float[Tensor, "n k"]:
        """`dYᵀ X`."""
        rows, x_rows = dy.flatten(0, -2).t(), x.flatten(0, -2)
        return MODES[self._decide("weight_gradient", rows, x_rows, site)](rows, x_rows).contiguous()

    @torch.no_grad()
    def _decide(self, kind: Kind, a: Tensor, b: Tensor, site: str) -> str:
        tokens = a.shape[0] if kind != "weight_gradient" else a.shape[1]
        key = f"{kind} {site} tokens={tokens} {a.dtype} {_device(a)} torch={torch.__version__}"
        if key in self.decisions:
            return self.decisions[key]
        times: list[float] = []
        for mode, product in MODES.items():
            trials = [
                self._clock(f"{kind} {mode}", lambda product=product: product(a, b))
                for _ in range(WARM_UPS + TRIALS)
            ]
            times.append(statistics.median(trials[WARM_UPS:]))
        total = torch.tensor(times, dtype=torch.float64, device=a.device)
        for axis in self._mesh.axes:
            total = axis.all_reduce(total, layer="tuner").wait()
        plain, best = float(total[0]), int(total.argmin())
        mode = [*MODES][best] if float(total[best]) < WORTH * plain else "plain"
        self.decisions[key] = mode
        if self._is_first:
            self._file.write_text(json.dumps(self.decisions, indent=1), encoding="utf-8")
        return mode


def _elapsed_s(name: str, product: Callable[[], Tensor]) -> float:
    """Time of one product on an idle device."""
    del name
    started_s = time.perf_counter()
    result = product()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - started_s


def _device(tensor: Tensor) -> str:
    return torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else tensor.device.type


def _from_first(text: str, mesh: Mesh) -> str:
    """The first rank's text, on every rank."""
    is_first = mesh.torch_mesh.get_rank() == 0
    device = mesh.torch_mesh.device_type
    content = torch.tensor([*text.encode()], device=device)
    length = torch.tensor([len(content) if is_first else 0], device=device)
    for axis in mesh.axes:
        length = axis.all_reduce(length, layer="tuner").wait()
    message = torch.zeros(int(length), dtype=torch.int64, device=device)
    if is_first:
        message[:] = content
    for axis in mesh.axes:
        message = axis.all_reduce(message, layer="tuner").wait()
    return bytes(message.tolist()).decode()
