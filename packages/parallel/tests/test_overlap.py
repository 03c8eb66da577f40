"""What overlap may not change, and what it must change: gradients, and the order of events."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fourfold_parallel.grid.collectives import SILENT, Observer, Trace, TraceEvent
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.layers import RESIDUAL, RMSNorm
from fourfold_parallel.grid.linear import Linear, bias_cut, weight_cut
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.grid.products import Products
from fourfold_parallel.grid.schedule import Overlaps, Schedule
from fourfold_parallel.testing.grids import (
    OVERLAPS,
    Sizes,
    close,
    mesh_of,
    piece_of,
    summed_over_data,
)
from fourfold_parallel.testing.ranks import run_on_ranks

WIDTH, HIDDEN, BLOCKS, ROWS = 12, 20, 4, 8


class Dense(nn.Module):
    """The serial twin: norm, up, down, and around them a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6, dtype=torch.float64)
        self.up = nn.Linear(WIDTH, HIDDEN, dtype=torch.float64)
        self.down = nn.Linear(HIDDEN, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(self.norm(x))))


class OnGrid(Dense):
    """The same block, with its three modules on the grid."""

    def __init__(
        self, dense: Dense, index: int, mesh: Mesh, schedule: Schedule, **how: bool
    ) -> None:
        super().__init__()
        gain = mesh.distribute(dense.norm.weight.detach(), RESIDUAL)
        self.norm = RMSNorm(
            nn.Parameter(gain), axis=mesh.col, epsilon=1e-6, offset=0.0, gains_wide=False,
            summed=[mesh.depth], mesh=mesh,
            name=f"{index}.norm", schedule=schedule,
        )  # fmt: skip
        for name, swapped in (("up", False), ("down", True)):
            layer: nn.Linear = getattr(dense, name)
            weight = mesh.distribute(layer.weight.detach(), weight_cut(swapped=swapped))
            bias = mesh.distribute(layer.bias.detach(), bias_cut(swapped=swapped))
            linear = Linear(
                nn.Parameter(weight), nn.Parameter(bias), mesh=mesh, name=f"{index}.{name}",
                schedule=schedule, swapped=swapped, products=Products(), **how,
            )  # fmt: skip
            setattr(self, name, linear)


PRODUCTS = partial(
    create_selective_checkpoint_contexts,
    [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
)
"""Selective checkpointing: matrix products are kept, everything else is computed again."""


class Stack(nn.Module):
    """Blocks, run in any order, each under one kind of activation checkpointing."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, walk: Sequence[int], kept: str = "all") -> Tensor:
        for index in walk:
            if kept == "all":
                x = self.blocks[index](x)
            elif kept == "products":
                x = checkpoint(self.blocks[index], x, use_reentrant=False, context_fn=PRODUCTS)
            else:
                x = checkpoint(self.blocks[index], x, use_reentrant=kept == "reentrant")
        return x


def stacks(
    sizes: Sizes, overlaps: Overlaps, observer: Observer = SILENT, **how: bool
) -> tuple[Stack, Stack, Schedule, Mesh]:
    torch.manual_seed(0)
    dense = [Dense() for _ in range(BLOCKS)]
    mesh = mesh_of(sizes)
    mesh = mesh if observer is SILENT else mesh.observed(observer)
    schedule = Schedule(overlaps)
    grid = [OnGrid(block, index, mesh, schedule, **how) for index, block in enumerate(dense)]
    return Stack(dense), Stack(grid), schedule, mesh


def part(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's tokens and features of the residual stream."""
    start, stop = mesh.col.bounds(WIDTH)
    return x.chunk(mesh.batch_size())[mesh.batch_rank()][..., start:stop].contiguous()


def compare(grid: Stack, dense: Stack, mesh: Mesh, *, what: str) -> None:
    serial = dict(dense.named_parameters())
    for name, parameter in grid.named_parameters():
        expected = serial[name].grad
        assert (parameter.grad is None) == (expected is None), f"{what}: d{name} is missing"
        if expected is not None:
            total = summed_over_data(parameter.grad, mesh)
            close(total, piece_of(expected, parameter, mesh), what=f"{what}: d{name}")


def steps_are_dense(
    sizes: Sizes, overlaps: list[str], kept: str, walks: list[list[int]], microbatches: int
) -> None:
    for name, keeps_tile in product(overlaps, (False, True)):
        dense, grid, schedule, mesh = stacks(sizes, OVERLAPS[name], keeps_tile=keeps_tile)
        seen: dict[str, Tensor] = {}
        for parameter_name, parameter in grid.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, key=parameter_name, seen=seen: seen.update(
                    {key: p.grad.to_local().clone()}
                )
            )
        random = torch.Generator().manual_seed(5)
        for step, walk in enumerate(walks):
            what = f"{sizes} {name} keeps_tile={keeps_tile} {kept} step {step}"
            dense.zero_grad()
            grid.zero_grad()
            for _ in range(microbatches):
                x = torch.randn(ROWS, 3, WIDTH, dtype=torch.float64, generator=random)
                dy = torch.randn(ROWS, 3, WIDTH, dtype=torch.float64, generator=random)
                y = dense(x.requires_grad_(), walk)
                y.backward(dy)
                schedule.restart()
                seen.clear()
                mine = part(x.detach(), mesh).requires_grad_()
                out = grid(mine, walk, kept)
                out.backward(part(dy, mesh))
                close(out, part(y, mesh), what=f"{what}: y")
                assert mine.grad is not None
                close(mine.grad, part(x.grad, mesh), what=f"{what}: dx")
            compare(grid, dense, mesh, what=what)
            for parameter_name, parameter in grid.named_parameters():
                if parameter.grad is not None:
                    close(
                        seen[parameter_name], parameter.grad.to_local(), tolerance=0.0,
                        what=f"{what}: what a hook saw of d{parameter_name}",
                    )  # fmt: skip


STRAIGHT = [0, 1, 2, 3]
GRIDS_OF_4: list[Sizes] = [(1, 4, 1, 1), (1, 2, 2, 1), (1, 2, 1, 2), (1, 1, 2, 2), (2, 2, 1, 1)]


@pytest.mark.parametrize("kept", ["all", "reentrant", "non_reentrant", "products"])
def test_gradients_are_dense_under_checkpointing(kept: str) -> None:
    """Each kind of activation checkpointing, selective included, tiles kept or not, every overlap."""
    run_on_ranks(
        4, steps_are_dense, sizes=(1, 2, 2, 1), overlaps=["none", "weight_gradient", "all"],
        kept=kept, walks=[STRAIGHT] * 2, microbatches=1,
    )  # fmt: skip


def test_kept_products_are_not_summed_twice() -> None:
    """The sum over col is written into the product's memory, which the checkpoint keeps."""
    run_on_ranks(
        4, steps_are_dense, sizes=(1, 1, 2, 2), overlaps=["all"], kept="products",
        walks=[STRAIGHT] * 2, microbatches=1,
    )  # fmt: skip


@pytest.mark.parametrize("kept", ["all", "reentrant", "non_reentrant"])
def test_gradients_add_up_over_microbatches(kept: str) -> None:
    run_on_ranks(
        4, steps_are_dense, sizes=(1, 2, 1, 2), overlaps=["all"], kept=kept,
        walks=[STRAIGHT] * 2, microbatches=3,
    )  # fmt: skip


@pytest.mark.parametrize("kept", ["all", "reentrant", "non_reentrant"])
def test_blocks_may_be_reused_skipped_and_reordered(kept: str) -> None:
    """What the schedule learnt is wrong in every step, and the gradients are right."""
    walks = [STRAIGHT, [0, 1, 0, 1, 3], [2, 3], [3, 2, 1, 0], [0, 0, 0, 0], STRAIGHT]
    run_on_ranks(
        4, steps_are_dense, sizes=(1, 2, 2, 1), overlaps=["all"], kept=kept, walks=walks,
        microbatches=1,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sizes", GRIDS_OF_4, ids=str)
def test_every_overlap_under_every_checkpointing(sizes: Sizes) -> None:
    for kept in ("all", "reentrant", "non_reentrant"):
        walks = [STRAIGHT, STRAIGHT, [1, 1, 0, 2], STRAIGHT]
        run_on_ranks(
            4, steps_are_dense, sizes=sizes, overlaps=list(OVERLAPS), kept=kept, walks=walks,
            microbatches=2,
        )  # fmt: skip


def traced_step(
    sizes: Sizes, overlaps: Overlaps, kept: str = "all", **how: bool
) -> list[TraceEvent]:
    """The events of a step after the first, on this rank."""
    trace = Trace()
    _, grid, schedule, mesh = stacks(sizes, overlaps, trace, **how)
    for _ in range(2):
        trace.events.clear()
        schedule.restart()
        x = torch.randn(ROWS, 3, WIDTH, dtype=torch.float64)
        grid(part(x, mesh).requires_grad_(), STRAIGHT, kept).sum().backward()
    return trace.events


def place(
    events: list[TraceEvent], moment: str, what: str, layer: str, *, last: bool = False
) -> int:
    found = [
        index
        for index, event in enumerate(events)
        if (event.moment, event.what, event.layer) == (moment, what, layer)
    ]
    return found[-1 if last else 0]


LAYERS = [f"{block}.{name}" for block in range(BLOCKS) for name in ("up", "down")]


def test_the_input_gradients_sum_runs_under_the_weight_gradients_product() -> None:
    """Start of dX's sum, then dW's product, then its wait, in every layer."""
    for events in run_on_ranks(4, traced_step, sizes=(1, 1, 2, 2), overlaps=Overlaps()):
        for layer in LAYERS:
            weight_product = place(events, "product", "weight_gradient", layer)
            start = place(events, "start", "all_reduce", layer, last=True)
            wait = place(events, "wait", "all_reduce", layer, last=True)
            assert start < weight_product < wait, layer


@pytest.mark.parametrize("kept", ["all", "reentrant", "non_reentrant"])
def test_a_weight_gradient_is_waited_for_after_the_preceding_layers_products(kept: str) -> None:
    for events in run_on_ranks(4, traced_step, sizes=(1, 4, 1, 1), overlaps=Overlaps(), kept=kept):
        # With reentrant checkpointing each block's backward ends with its own waits.
        pairs = pairwise(LAYERS)
        within = [(a, b) for a, b in pairs if kept == "all" or a[0] == b[0]]
        for before, layer in within:
            wait = place(events, "wait", "reduce_scatter", layer)
            assert wait > place(events, "product", "weight_gradient", before), layer
            assert wait > place(events, "start", "reduce_scatter", before), layer


@pytest.mark.parametrize("kept", ["all", "reentrant", "non_reentrant"])
def test_every_tile_but_the_first_is_gathered_under_a_product(kept: str) -> None:
    """Forward, recomputed and backward; with at most one gather ahead of its use."""
    for events in run_on_ranks(4, traced_step, sizes=(1, 4, 1, 1), overlaps=Overlaps(), kept=kept):
        under_way: list[tuple[str, int]] = []
        exposed: list[str] = []
        for index, event in enumerate(events):
            if event.what != "all_gather":
                continue
            if event.moment == "start":
                under_way.append((event.layer, index))
                assert len(under_way) <= 2
                continue
            layer, start = under_way.pop(0)
            assert layer == event.layer
            if not any(between.moment == "product" for between in events[start:index]):
                exposed.append(layer)
        assert exposed == ["0.up"]


def test_without_overlap_every_collective_is_waited_for_at_once() -> None:
    for sizes in ((1, 4, 1, 1), (1, 1, 2, 2)):
        for events in run_on_ranks(4, traced_step, sizes=sizes, overlaps=OVERLAPS["none"]):
            moved = [event for event in events if event.moment != "product"]
            for start, wait in zip(moved[::2], moved[1::2], strict=True):
                assert (start.moment, wait.moment) == ("start", "wait")
                assert (start.what, start.layer) == (wait.what, wait.layer)


def results(sizes: Sizes, overlaps: str) -> list[Tensor]:
    _, grid, schedule, mesh = stacks(sizes, OVERLAPS[overlaps])
    x = torch.randn(ROWS, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        grid.zero_grad()
        schedule.restart()
        out = grid(part(x, mesh), STRAIGHT)
        out.square().sum().backward()
    return [out.detach(), *(p.grad.to_local().clone() for p in grid.parameters())]


def test_overlap_changes_no_bit() -> None:
    for sizes in ((1, 2, 2, 1), (1, 2, 1, 2)):
        without = run_on_ranks(4, results, sizes=sizes, overlaps="none")
        for name in list(OVERLAPS)[1:]:
            for ours, theirs in zip(
                run_on_ranks(4, results, sizes=sizes, overlaps=name), without, strict=True
            ):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name


def copies_work(sizes: Sizes) -> None:
    _, grid, schedule, mesh = stacks(sizes, Overlaps())
    x = part(torch.randn(ROWS, 3, WIDTH, dtype=torch.float64), mesh)
    for _ in range(2):
        schedule.restart()
        grid(x, STRAIGHT).sum().backward()
    for twin in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
        assert all(
            torch.equal(a.to_local(), b.to_local())
            for a, b in zip(twin.parameters(), grid.parameters(), strict=True)
        )
        twin.zero_grad()
        twin(x, STRAIGHT).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())


def test_a_model_on_the_grid_can_be_copied_and_pickled() -> None:
    run_on_ranks(4, copies_work, sizes=(1, 2, 2, 1))


def frozen_weights_are_quiet(sizes: Sizes) -> list[TraceEvent]:
    trace = Trace()
    _, grid, schedule, mesh = stacks(sizes, Overlaps(), trace)
    for name, parameter in grid.named_parameters():
        parameter.requires_grad_("1.up" in name)
    for _ in range(2):
        trace.events.clear()
        schedule.restart()
        grid(
            part(torch.randn(ROWS, 3, WIDTH, dtype=torch.float64), mesh), STRAIGHT
        ).sum().backward()
    assert [name for name, p in grid.named_parameters() if p.grad is not None] == [
        "blocks.1.up.weight",
        "blocks.1.up.bias",
    ]
    return trace.events


def test_a_frozen_weight_sends_no_gradient() -> None:
    for events in run_on_ranks(4, frozen_weights_are_quiet, sizes=(1, 4, 1, 1)):
        scattered = {event.layer for event in events if event.what == "reduce_scatter"}
        assert scattered == {"1.up"}


def a_change_is_refused(sizes: Sizes) -> None:
    x = torch.randn(ROWS, 3, WIDTH, dtype=torch.float64)
    for change, wide in product(CHANGES.values(), (True, False)):
        _, grid, schedule, mesh = stacks(sizes, Overlaps())
        for _ in range(2):
            grid.zero_grad()
            schedule.restart()
            with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
                out = grid(part(x, mesh), STRAIGHT)
            out.sum().backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=not wide):
            out = grid(part(x, mesh), STRAIGHT)
        weight = grid.get_parameter("blocks.1.up.weight")
        change(weight)
        with pytest.raises(RuntimeError, match=r"1\.up\.weight was changed|an inplace operation"):
            out.sum().backward()


@torch.no_grad()
def on_the_piece(weight: Tensor) -> None:
    local(weight).mul_(1.5)


@torch.no_grad()
def on_the_parameter(weight: Tensor) -> None:
    weight.mul_(1.5)


CHANGES = {
    "piece": on_the_piece,
    "parameter": on_the_parameter,
    "optimizer": lambda weight: torch.optim.SGD([weight], lr=0.1).step(),
}


def test_weights_changed_between_forward_and_backward_are_refused() -> None:
    """As autograd refuses it for a dense layer: the tile of backward would be another than forward's."""
    for sizes in ((1, 2, 1, 1), (1, 1, 2, 1)):
        run_on_ranks(2, a_change_is_refused, sizes=sizes)


def steps_within_backward(sizes: Sizes) -> None:
    dense, grid, schedule, mesh = stacks(sizes, Overlaps())
    x = torch.randn(ROWS, 3, WIDTH, dtype=torch.float64)
    for stack in (dense, grid):
        for parameter in stack.parameters():
            step = torch.optim.SGD([parameter], lr=0.01).step
            parameter.register_post_accumulate_grad_hook(lambda _, step=step: step())
    for _ in range(3):
        schedule.restart()
        dense.zero_grad()
        grid.zero_grad()
        dense(x, STRAIGHT).square().sum().backward()
        grid(part(x, mesh), STRAIGHT).square().sum().backward()
    for name, parameter in grid.named_parameters():
        expected = piece_of(dense.get_parameter(name), parameter, mesh)
        close(local(parameter), expected, what=name)


def test_an_optimizer_may_step_each_weight_within_backward() -> None:
    for sizes in ((1, 2, 1, 1), (1, 1, 2, 1)):
        run_on_ranks(2, steps_within_backward, sizes=sizes)
