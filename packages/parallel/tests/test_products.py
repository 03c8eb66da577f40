"""Laws of the tuner of matrix products, and of the number format on the wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fourfold_parallel.grid.collectives import Cast
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.grid.products import MODES, Products, TunedProducts
from fourfold_parallel.testing.grids import generator
from fourfold_parallel.testing.ranks import run_on_ranks


def matrices() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X [2, 3, 10], W [14, 10], b [14], dY [2, 3, 14] in float64."""
    random = generator(0)
    shapes = ((2, 3, 10), (14, 10), (14,), (2, 3, 14))
    x, w, b, dy = (torch.randn(s, dtype=torch.float64, generator=random) for s in shapes)
    return x, w, b, dy


def all_three(products: Products) -> list[Tensor]:
    x, w, b, dy = matrices()
    return [
        products.forward(x, w, b, site="site"),
        products.input_gradient(dy, w, site="site"),
        products.weight_gradient(dy, x, site="site"),
    ]


def favouring(mode: str, factor: float = 0.5) -> Callable[[str, Callable[[], Tensor]], float]:
    """A clock by which one mode takes `factor` of the time of the others."""

    def clock(name: str, product: Callable[[], Tensor]) -> float:
        product()
        return factor if name.split()[1] == mode else 1.0

    return clock


def every_mode_is_the_plain_product(file: str, mode: str) -> None:
    path = Path(file)
    tuned = TunedProducts(Mesh(row=2), path, clock=favouring(mode))
    for ours, plain in zip(all_three(tuned), all_three(Products()), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
        assert ours.is_contiguous()
    assert set(tuned.decisions.values()) == {mode}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_the_plain_product(tmp_path: Path, mode: str) -> None:
    run_on_ranks(2, every_mode_is_the_plain_product, file=str(tmp_path / "modes.json"), mode=mode)


def ranks_that_disagree_decide_alike(file: str) -> list[str]:
    """Rank 0 finds `nt` twice as fast, rank 1 finds `transposed` four times as fast: the sum decides."""
    mesh = Mesh(row=2)
    clock = favouring("nt", 0.5) if mesh.row.rank == 0 else favouring("transposed", 0.25)
    tuned = TunedProducts(mesh, Path(file), clock=clock)
    all_three(tuned)
    return sorted(set(tuned.decisions.values()))


def what_is_remembered_is_not_timed_again(file: str) -> None:
    def never(name: str, product: Callable[[], Tensor]) -> float:
        raise AssertionError(name)

    all_three(TunedProducts(Mesh(col=2), Path(file), clock=never))


def test_the_decision_is_the_same_on_every_rank_and_is_remembered(tmp_path: Path) -> None:
    """Ranks whose own times differ agree; a later start reads the file and times nothing."""
    file = str(tmp_path / "modes.json")
    decided = run_on_ranks(2, ranks_that_disagree_decide_alike, file=file)
    assert decided == [["transposed"], ["transposed"]]
    assert len(json.loads(Path(file).read_text())) == 3
    run_on_ranks(2, what_is_remembered_is_not_timed_again, file=file)


def noise_decides_nothing(file: str) -> None:
    tuned = TunedProducts(Mesh(row=2), Path(file), clock=favouring("nn", 0.97))
    all_three(tuned)
    assert set(tuned.decisions.values()) == {"plain"}


def test_a_gain_within_the_noise_keeps_the_plain_product(tmp_path: Path) -> None:
    run_on_ranks(2, noise_decides_nothing, file=str(tmp_path / "modes.json"))


def the_wire_rounds_and_gives_the_type_back() -> None:
    mesh = Mesh(row=2, wire={"row": Cast(dtype=torch.bfloat16)})
    mine = torch.full((3,), 1.0 + 2.0**-12)
    summed = mesh.row.all_reduce(mine, layer="law").wait()
    assert summed.dtype == torch.float32
    assert torch.equal(summed, torch.full((3,), 2.0))  # 2^-12 does not survive bfloat16
    exact = Mesh(row=2).row.all_reduce(mine, layer="law").wait()
    assert torch.equal(exact, torch.full((3,), 2.0 + 2.0**-11))


def test_an_axis_may_communicate_in_another_number_format() -> None:
    run_on_ranks(2, the_wire_rounds_and_gives_the_type_back)
